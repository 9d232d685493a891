"""Adding a method is one new file and no edit: a method written here passes the whole contract."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import pytest
import test_every_method as contract

from luthier.surgery import METHODS

METHOD = '''"""Output shift: a learned vector is added to what the values' projection gives.

    v = x W_v^T + b_v + s

Count: d per layer.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.surgery import METHODS, Attachment, Base, PerSite


@METHODS.register("output_shift", family="additive", paper="none: written by a test")
@dataclass(frozen=True, kw_only=True)
class OutputShift(PerSite):
    sites: Annotated[tuple[str, ...], "where to add it"] = ("attn.v", "ffn.down")
    starts_at_base: ClassVar[bool] = True

    def params_at(self, site: Site) -> int:
        return site.d_out

    def build(self, site: Site, base: Base) -> Attachment:
        return Shift(site.d_out)


class Shift(Attachment):
    needs_input = False

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shift
'''


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "output_shift.py").write_text(METHOD)
    METHODS.add_shelf(folder)
    try:
        yield folder
    finally:
        METHODS.remove_shelf(folder)


CHECKS: dict[str, Any] = {
    name: test
    for name, test in vars(contract).items()
    if name.startswith("test_") and "name" in inspect.signature(test).parameters
}


def test_there_is_a_contract_to_pass() -> None:
    assert len(CHECKS) >= 12


@pytest.mark.parametrize("check", list(CHECKS))
def test_a_method_from_a_new_file_passes_the_contract(check: str, shelf: Path, tmp_path: Path) -> None:
    assert METHODS.card("output_shift").title.startswith("Output shift") and "output_shift" in METHODS.names()
    test, wants = CHECKS[check], inspect.signature(CHECKS[check]).parameters
    archs = list(cells.ARCHITECTURES) if "arch" in wants else [None]
    if "generation" in check:
        archs = [a for a in archs if a != "bert"]
    for arch in archs:
        given: dict[str, Any] = {"name": "output_shift"}
        if arch is not None:
            given["arch"] = arch
        if "tmp_path" in wants:
            given["tmp_path"] = tmp_path / str(arch)
            given["tmp_path"].mkdir()
        before = len(contract.REFUSED)
        test(**given)
        assert len(contract.REFUSED) == before, "the contract was not run but refused"


def test_once_the_shelf_is_gone_so_is_the_method() -> None:
    assert "output_shift" not in METHODS.names()
