"""The audit never takes "nothing was looked up" for "nothing was found"; the bill of materials names what is here."""

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = {"name": "good", "version": "1.0", "vulns": []}
WEAK = {"name": "weak", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([GOOD], 0, "1 of 1 packages looked up, 0 with a known weakness"),
        ([GOOD, WEAK], 1, "weak 2.0: PYSEC-1, mended in 2.1"),
        ([GOOD, UNKNOWN], 2, "NOT AUDITED: 1 of 2 packages (unknown)"),
        ([WEAK, UNKNOWN], 1, "NOT AUDITED: 1 of 2 packages (unknown)"),
        ([], 2, "NOT AUDITED: the list of packages is empty"),
    ],
)
def test_a_package_that_was_not_looked_up_fails_the_audit(
    packages: list[dict[str, object]], code: int, said: str
) -> None:
    found, lines = script("audit").verdict({"dependencies": packages, "fixes": []})
    assert found == code
    assert said in "\n".join(lines)


def test_an_audit_without_an_answer_says_so_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pins.txt").write_text("idna==3.20\n")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["audit.py", str(tmp_path / "pins.txt")])
    assert script("audit").main() == 2
    assert "NOT AUDITED" in capsys.readouterr().err


def test_the_bill_of_materials_names_every_package_with_its_digest_and_does_not_change() -> None:
    sbom = script("sbom")
    lock = "pytest==" + metadata.version("pytest") + " \\\n    --hash=sha256:" + "ab" * 32 + "\n"
    text = sbom.as_json(sbom.bill(lock))
    assert text == sbom.as_json(sbom.bill(lock))
    value = json.loads(text)
    assert value["metadata"]["component"]["name"] == "luthier"
    parts = {part["name"]: part for part in value["components"]}
    assert {sbom.plain(p.metadata["Name"]) for p in metadata.distributions()} == {*parts, "luthier"}
    assert parts["pytest"]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert all(part["version"] and part["purl"].startswith("pkg:pypi/") for part in parts.values())
    needed = {entry["ref"]: entry.get("dependsOn", []) for entry in value["dependencies"]}
    assert any(ref.startswith("torch==") for ref in needed[value["metadata"]["component"]["bom-ref"]])
