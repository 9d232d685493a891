"""The changelog's script: nothing is lost, a second run changes nothing, older versions stay."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("changelog_script", ROOT / "scripts" / "changelog.py")
assert SPEC is not None and SPEC.loader is not None
changelog = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(changelog)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "src" / "luthier").mkdir(parents=True)
    (tmp_path / "src" / "luthier" / "__version__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\nwords\n\n## 1.1.0 - 2020-01-01\n\n### Added\n\n- Before.\n")
    (tmp_path / "changelog.d" / "README.md").write_text("how to\n")
    (tmp_path / "changelog.d" / "b.added.md").write_text("A new\nthing.\n")
    (tmp_path / "changelog.d" / "a.fixed.md").write_text("- One mend.\n- Another, that\n  goes on.\n")
    return tmp_path


def test_every_item_is_under_its_heading_and_older_versions_stay(root: Path) -> None:
    changelog.main(["--date", "2020-02-03"], root)
    first = (root / "CHANGELOG.md").read_text()
    assert first.index("## 1.2.0 - 2020-02-03") < first.index("## 1.1.0 - 2020-01-01") < first.index("- Before.")
    new = first[: first.index("## 1.1.0")]
    assert "### Added\n\n- A new thing.\n" in new
    assert "### Fixed\n\n- One mend.\n- Another, that goes on.\n" in new and "### Changed" not in new
    changelog.main(["--date", "2020-02-03"], root)
    assert (root / "CHANGELOG.md").read_text() == first
    changelog.main(["--date", "2020-02-03", "--remove"], root)
    assert (root / "CHANGELOG.md").read_text() == first
    assert [p.name for p in (root / "changelog.d").iterdir()] == ["README.md"]
    with pytest.raises(SystemExit, match="no fragment"):
        changelog.main(["--date", "2020-02-03"], root)
    assert (root / "CHANGELOG.md").read_text() == first


@pytest.mark.parametrize(("name", "text"), [("c.improved.md", "x\n"), ("c.md", "x\n"), ("c.added.md", " \n")])
def test_a_fragment_that_cannot_be_placed_stops_it(root: Path, name: str, text: str) -> None:
    (root / "changelog.d" / name).write_text(text)
    before = (root / "CHANGELOG.md").read_text()
    with pytest.raises(SystemExit, match=name):
        changelog.main(["--date", "2020-02-03"], root)
    assert (root / "CHANGELOG.md").read_text() == before


def test_the_fragments_that_lie_here_can_all_be_placed() -> None:
    assert set(changelog.fragments(ROOT / "changelog.d")) == set(changelog.KINDS)
