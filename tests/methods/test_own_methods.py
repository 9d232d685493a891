"""Methods that do not lie in our folder, but in one of one's own or in an installed package: found, never mixed up."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from little import little_spec
from tiny import inputs, tiny

from luthier.cli._shelf import SHELF
from luthier.core import ConfigError
from luthier.surgery import METHODS, attach
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "own-methods.md"
METHOD, PRESET = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Whatever a test puts on the shelves is gone after it."""
    yield
    for name in [m for m in sys.modules if m.split(".")[0] == "shop_methods"]:
        del sys.modules[name]
    for catalogue in (METHODS, SHELF):
        catalogue.refresh()
        assert catalogue.names() == catalogue.ours()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "my-methods"
    home.mkdir()
    (home / "output_shift.py").write_text(METHOD)
    (home / "wide_lora.py").write_text(PRESET)
    monkeypatch.setenv("LUTHIER_SHELF", str(home))
    return home


def package(home: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """An installed package, as an installer leaves it: its files, and its entry points beside them."""
    inner = home / "shop_methods" / "methods"
    inner.mkdir(parents=True)
    (home / "shop_methods" / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("")
    (inner / "output_shift.py").write_text(METHOD)
    (inner / "wide_lora.py").write_text(PRESET)
    facts = home / "shop_methods-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-methods\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[luthier.methods]\nall = {entry}\n")
    monkeypatch.syspath_prepend(str(home))
    METHODS.refresh()
    SHELF.refresh()


def check_both(origin: str) -> None:
    """The listing knows both without running them; both attach and train what they count."""
    assert {"output_shift", "wide_lora"} <= set(SHELF.names())
    assert SHELF.card("output_shift").origin == SHELF.card("wide_lora").origin == origin
    assert SHELF.card("wide_lora").of == "lora"
    assert not [m for m in sys.modules if m.endswith((".output_shift", ".wide_lora"))], "listing ran a file"
    for name in ("output_shift", "wide_lora"):
        model = tiny("llama", "lm")
        tuned = attach(model, name)
        assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
        model(**inputs(model)).loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in tuned.trained().values())


def test_a_folder_that_the_environment_names_is_a_shelf(folder: Path) -> None:
    check_both(f"folder {folder}")


def test_several_folders_are_separated_as_paths_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "more"
    other.mkdir()
    (folder / "wide_lora.py").rename(other / "wide_lora.py")
    monkeypatch.setenv("LUTHIER_SHELF", f"{folder}{os.pathsep}{other}{os.pathsep}")
    assert SHELF.card("wide_lora").origin == f"folder {other}"
    assert SHELF.card("output_shift").origin == f"folder {folder}"


def test_an_installed_package_offers_a_folder_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "shop_methods.methods")
    check_both("package shop-methods")
    assert METHODS.get("output_shift").__module__ == "shop_methods.methods.output_shift"


def test_an_installed_package_offers_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "shop_methods.methods.output_shift")
    assert "wide_lora" not in SHELF.names()
    assert "shop_methods" not in sys.modules, "listing ran the package"
    assert METHODS.get("output_shift")().settings() == {"sites": ["attn.v", "ffn.down"]}


def test_helpers_in_the_folder_are_imported_and_are_no_methods(folder: Path) -> None:
    (folder / "amounts.py").write_text("START = 0.25\n")
    text = METHOD.replace("torch.zeros(d_out)", "torch.full((d_out,), START)")
    assert text != METHOD
    (folder / "output_shift.py").write_text(
        text.replace("import torch\n", "import torch\nfrom .amounts import START\n", 1)
    )
    assert "amounts" not in SHELF.names()
    (first, *_) = attach(tiny("llama"), "output_shift").trained().values()
    assert bool((first == 0.25).all())


def test_what_a_method_draws_before_a_step_is_drawn_again_by_a_resumed_run(folder: Path, tmp_path: Path) -> None:
    text = METHOD.replace("return y + self.shift\n", "return y + self.factor * self.shift\n    factor = 1.0\n")
    text = text.replace(
        "from luthier.surgery", "from luthier.methods.parts.own_tensors import own_modules\nfrom luthier.surgery"
    )
    hook = "    def before_step(self, tuned, step, total):\n        for shift in own_modules(self, tuned, Shift):\n"
    hook += "            shift.factor = 0.5 + float(torch.rand(()))\n\n    def params_at"
    (folder / "output_shift.py").write_text(text.replace("    def params_at", hook))
    digests = []
    for stop in (None, 5):
        out = tmp_path / f"run-{stop}"
        train(little_spec(tmp_path, "output_shift", settings={}, out=str(out)), stop_at=stop)
        if stop:
            resume(out)
        digests.append(run_digests(out))
    assert digests[0] == digests[1]
    (folder / "output_shift.py").write_text(text)
    METHODS.refresh()
    train(little_spec(tmp_path, "output_shift", settings={}, out=str(tmp_path / "still")))
    assert run_digests(tmp_path / "still")["tuning"] != digests[0]["tuning"], "the hook was never asked"


def test_a_name_that_luthier_has_is_refused_with_both_files(folder: Path) -> None:
    (folder / "lora.py").write_text(METHOD.replace("output_shift", "lora"))
    with pytest.raises(ConfigError, match=r"my-methods.lora\.py: 'lora' is the name of a method of luthier's .*Rename"):
        SHELF.names()
    with pytest.raises(ConfigError, match="Rename"):
        METHODS.get("lora")
    (folder / "lora.py").unlink()
    METHODS.refresh()
    SHELF.refresh()


def test_a_name_on_two_shelves_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        package(tmp_path / "site", patch, "shop_methods.methods")
        with pytest.raises(ConfigError, match=r"'output_shift' is the name of another method, from package shop"):
            SHELF.names()
    METHODS.refresh()
    SHELF.refresh()


def test_a_file_that_registers_another_name_is_refused(folder: Path) -> None:
    (folder / "shifted.py").write_text(METHOD.replace("output_shift", "other_name"))
    with pytest.raises(ConfigError, match=r"shifted\.py: registers no method called 'shifted'"):
        METHODS.get("shifted")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:\n", r"broken\.py:1: .*Mend the file"),
        (
            'METHODS.preset("broken", of="lora", rank=2 * 8)\n',
            r"broken\.py:1: rank=2 \* 8 is computed",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(folder: Path, text: str, says: str) -> None:
    (folder / "broken.py").write_text(text)
    METHODS.refresh()
    with pytest.raises(ConfigError, match=says):
        METHODS.cards()
    (folder / "broken.py").unlink()
    METHODS.refresh()


def test_a_folder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("LUTHIER_SHELF", str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match=r"LUTHIER_SHELF: .*nowhere' is no folder"):
            SHELF.names()


def test_an_entry_point_that_leads_nowhere_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        package(tmp_path, patch, "shop_methods.gone")
        with pytest.raises(ConfigError, match=r"'all' .* of the package shop-methods .*shop_methods\.gone"):
            SHELF.names()
    METHODS.refresh()
    SHELF.refresh()
