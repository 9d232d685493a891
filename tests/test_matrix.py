"""The support matrix in slices: no cell is run twice, none is lost, and other code makes all of them anew."""

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def _script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix, conftest = _script(ROOT / "scripts/matrix.py"), _script(ROOT / "tests/conftest.py")


def test_slices_add_up_to_one_table(tmp_path: Path) -> None:
    held = tmp_path / "cells.json"
    for method, said in (("lora", "passed"), ("ia3", "refused")):
        cells = conftest.Cells()
        cells.rows = {(method, arch, "counts"): said for arch in ("bert", "t5")}
        if held.exists():
            cells.add_from(held)
        cells.save(held)
    assert matrix.left(["bitfit", "ia3", "lora"], held) == ["bitfit"]
    assert len(json.loads(held.read_text())) == 4
    table = cells.matrix()
    assert "| lora | 1 of 1 | 1 of 1 |" in table and "| ia3 | 0 of 1, 1 refused | 0 of 1, 1 refused |" in table
    assert "contract cells: 2 passed, 2 refused" in table


def test_a_cell_that_is_run_again_replaces_the_one_that_was_held(tmp_path: Path) -> None:
    held = tmp_path / "cells.json"
    held.write_text(json.dumps([["lora", "bert", "counts", "failed"]]))
    cells = conftest.Cells()
    cells.rows = {("lora", "bert", "counts"): "passed"}
    cells.add_from(held)
    assert cells.count("passed") == 1 and cells.count("failed") == 0


def test_other_code_is_another_digest(tmp_path: Path) -> None:
    for folder in ("src/luthier", "tests/contracts"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("1\n")
    before = matrix.digest_of(tmp_path)
    assert matrix.digest_of(tmp_path) == before
    (tmp_path / "tests/contracts/a.py").write_text("2\n")
    assert matrix.digest_of(tmp_path) != before
