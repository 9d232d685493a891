"""Adding a method is one new file and no edit: methods written here pass the whole contract, whatever they need."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import pytest
import test_every_method as contract
import test_training_equals_generation as generation

from luthier.core import UnknownName
from luthier.surgery import METHODS, Combined, method

OUTPUT_SHIFT = '''"""Output shift: a learned vector is added to what the values' projection gives.

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

# What it adds is drawn anew in every pass of training, and it learns at a rate of its own.
NOISY_SHIFT = (
    OUTPUT_SHIFT.replace("output_shift", "noisy_shift")
    .replace("starts_at_base: ClassVar[bool] = True", "draws: ClassVar[bool] = True\n    tiny = {'lr': 0.02}")
    .replace("return y + self.shift", "return y + self.shift * (torch.rand(()) + 0.5 if self.training else 1)")
)

# It has no numbers of its own and stands beside a method that has.
PENALTY = '''"""Penalty: the matrices of the method beside it are pulled to zero.

    loss + strength sum |A|^2

Count: none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import CompositionError, above
from luthier.methods.parts.own_tensors import own_tunings
from luthier.surgery import METHODS, Edit, Method, Tuned


@METHODS.register("penalty", family="unified", paper="none: written by a test")
@dataclass(frozen=True, kw_only=True)
class Penalty(Method):
    strength: Annotated[float, "how hard", above(0)] = 1e-4

    mergeable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("lora",)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if anatomy.model_type == "gpt2":
            raise CompositionError("penalty: a test wants to see what a refusal looks like. Use another model.")
        return ()

    def n_params(self, anatomy: Anatomy) -> int:
        return 0

    def extra_loss(self, tuned: Tuned) -> Tensor | None:
        held = [p for t in own_tunings(self, tuned) for m in t.modules_by_key().values() for p in m.parameters()]
        return self.strength * sum(p.square().sum() for p in held)
'''

PRESET = '''"""Value shift: the output shift, of the values alone.

    v = x W_v^T + b_v + s

Count: d per layer.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "value_shift", of="output_shift", family="additive", paper="none: written by a test",
    sites=("attn.v",), default_lr=5e-3,
)
'''

SUM = '''"""Thin shift: LoRA of rank 2 and an output shift.

    y = W x + b + B A x + s

Count: both.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "thin_shift", of="lora+output_shift", family="hybrid", paper="none: written by a test",
    default_lr=7e-3, **{"lora.rank": 2, "output_shift.sites": ("ffn.down",)},
)
'''

FILES = {
    "output_shift": OUTPUT_SHIFT, "noisy_shift": NOISY_SHIFT, "penalty": PENALTY, "value_shift": PRESET,
    "thin_shift": SUM,
}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shelf")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    METHODS.add_shelf(folder)
    try:
        yield folder
    finally:
        METHODS.remove_shelf(folder)


CHECKS: dict[str, Any] = {
    name: test
    for module in (contract, generation)
    for name, test in vars(module).items()
    if name.startswith("test_") and "name" in inspect.signature(test).parameters
}


def test_there_is_a_contract_to_pass() -> None:
    assert len(CHECKS) >= 16


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("check", CHECKS)
def test_a_method_from_a_new_file_passes_the_contract(check: str, name: str, shelf: Path, tmp_path: Path) -> None:
    assert name in METHODS.names()
    test, wants = CHECKS[check], inspect.signature(CHECKS[check]).parameters
    decoder = "generation" in check
    for arch in [a for a in cells.QUICK if not decoder or a != "bert"] if "arch" in wants else [""]:
        given: dict[str, Any] = {"name": name}
        if "arch" in wants:
            given["arch"] = arch
        if "fast" in wants:
            given["fast"] = True
        if "tmp_path" in wants:
            given["tmp_path"] = tmp_path / arch
            given["tmp_path"].mkdir()
        before = len(contract.REFUSED)
        test(**given)
        assert len(contract.REFUSED) == before, "the contract was not run but refused"


def test_a_method_that_says_it_cannot_ends_its_cell(shelf: Path) -> None:
    contract.test_it_learns_what_it_is_shown("penalty", "gpt2")
    assert ("penalty", "gpt2") in contract.REFUSED
    contract.REFUSED.discard(("penalty", "gpt2"))


def test_a_preset_has_a_card_a_page_and_the_defaults_it_names(shelf: Path) -> None:
    card, made = METHODS.card("value_shift"), METHODS.get("value_shift")()
    assert card.of == "output_shift" and card.title.startswith("Value shift")
    assert [(s.name, s.default, s.meaning) for s in card.settings] == [("sites", "('attn.v',)", "where to add it")]
    assert made.settings() == {"sites": ["attn.v"]}
    assert (made.default_lr, card.facts["default_lr"]) == (5e-3, 5e-3)
    assert made.is_a("output_shift") and made.is_a("value_shift") and not made.is_a("lora")
    assert not METHODS.get("output_shift")().is_a("value_shift")


def test_a_preset_of_a_sum_is_the_sum_with_its_settings(shelf: Path) -> None:
    made = method("thin_shift", {"lora.alpha": 4.0})
    assert isinstance(made, Combined)
    assert [p.name for p in made.parts()] == ["lora", "output_shift"]
    assert (made.settings()["lora.rank"], made.settings()["lora.alpha"]) == (2, 4.0)
    assert method("thin_shift", {"lora.rank": 5}).settings()["lora.rank"] == 5, "who says otherwise is obeyed"
    shown = {s.name: s.default for s in METHODS.card("thin_shift").settings}
    assert (shown["lora.rank"], shown["output_shift.sites"]) == ("2", "('ffn.down',)")
    beside = method("thin_shift+prompt_tuning", {"prompt_tuning.length": 3})
    assert [p.name for p in beside.parts()] == ["lora", "output_shift", "prompt_tuning"]
    changed = method("thin_shift", {"lora.rank": 5})
    assert made.default_lr == changed.default_lr == METHODS.card("thin_shift").facts["default_lr"] == 7e-3
    assert replace(made, members=changed.parts()).default_lr == 7e-3
    assert beside.default_lr == min(p.default_lr for p in beside.parts()) != 7e-3, "beside others it is its parts"


def test_a_preset_with_a_setting_that_its_base_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        '"""Wrong."""\nfrom luthier.surgery import METHODS\n'
        'METHODS.preset("wrong", of="lora", family="x", paper="y", rnk=3)\n'
    )
    METHODS.add_shelf(tmp_path)
    try:
        with pytest.raises(UnknownName, match=r"wrong: lora has no setting 'rnk'.*rank"):
            METHODS.get("wrong")
    finally:
        METHODS.remove_shelf(tmp_path)


def test_a_preset_of_a_sum_has_no_fact_of_its_own_but_its_rate(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        '"""Wrong."""\nfrom luthier.surgery import METHODS\n'
        'METHODS.preset("wrong", of="lora+ia3", family="x", paper="y", mergeable=False)\n'
    )
    METHODS.add_shelf(tmp_path)
    try:
        with pytest.raises(UnknownName, match=r"lora\+ia3 has no setting 'mergeable'"):
            METHODS.get("wrong")
    finally:
        METHODS.remove_shelf(tmp_path)


def test_once_the_shelf_is_gone_so_is_the_method(tmp_path: Path) -> None:
    (tmp_path / "short_shift.py").write_text(OUTPUT_SHIFT.replace("output_shift", "short_shift"))
    METHODS.add_shelf(tmp_path)
    assert METHODS.get("short_shift")().settings()["sites"] == ["attn.v", "ffn.down"]
    (tmp_path / "short_shift.py").write_text(OUTPUT_SHIFT.replace("output_shift", "short_shift").replace("ffn.", "x."))
    METHODS.refresh()
    assert METHODS.get("short_shift")().settings()["sites"] == ["attn.v", "x.down"]
    METHODS.remove_shelf(tmp_path)
    assert "short_shift" not in METHODS.names()
    with pytest.raises(UnknownName):
        METHODS.get("short_shift")
