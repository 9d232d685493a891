"""Places where small components may stand, each behind a gate, so that a search can choose some of them.

    lora  y + z B A x      bias  y + z b      norm  y + z (a y + b)      adapter  y + z (f(y D + b_d) U + b_u)

z of a place is a number, or one for each rank of a LoRA. D and U of an adapter are products of rank one. All
components give nothing at the start. What is not chosen is dropped when the run ends.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, near
from luthier.methods.parts.by_halves import numbers_below_head
from luthier.methods.parts.own_tensors import group_names, own_modules, own_tunings
from luthier.surgery import Attach, Attachment, Base, Group, Method, Phase, TunedView

__all__ = ["Components", "Gates", "Place", "PlaceSearch", "fitting", "of_rank", "open_places", "place_edits", "select"]

REDUCTION = 32
_LINEAR = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")


class Place(NamedTuple):
    """One component at one site. `size`: its numbers."""

    name: str
    kind: str
    site: Site
    size: int


def open_places(anatomy: Anatomy, rank: int, asked_by: str) -> tuple[Place, ...]:
    """Every place of a model, in its order.

    Raises:
        AnatomyError: it has none.
    """
    found: list[Place] = []
    for site in (s for s in anatomy.all_sites if s.layer is not None and s.expert is None):
        if site.kind in _LINEAR:
            found.append(Place(f"lora:{site.key}", "lora", site, rank * (site.d_in + site.d_out)))
            if site.bias is not None:
                found.append(Place(f"bias:{site.key}", "bias", site, site.d_out))
        elif site.kind == "norm":
            found.append(Place(f"norm:{site.key}", "norm", site, site.d_out * (1 + (site.bias is not None))))
        elif site.kind in ("attn_out", "ffn_out"):
            k = max(1, site.d_out // REDUCTION)
            found.append(Place(f"adapter:{site.key}", "adapter", site, 3 * (site.d_out + k)))
    if not found:
        raise AnatomyError(f"{asked_by}: this {anatomy.model_type} model has no layer to search in. Use lora.")
    return tuple(found)


def fitting(places: Sequence[Place], names: Sequence[str], asked_by: str) -> tuple[Place, ...]:
    """The places of these names.

    Raises:
        ConfigError: there is none of a name.
    """
    by_name = {place.name: place for place in places}
    for name in names:
        if name not in by_name:
            raise ConfigError(
                f"{asked_by}.plan: this model has no place {name!r}.{near(name, list(by_name))} A place is written "
                "like lora:attn.q@0."
            )
    return tuple(place for place in places if place.name in set(names))


def of_rank(place: Place, rank: int) -> Place:
    """The place with a LoRA of another rank, and its size; any other place as it is."""
    if place.kind != "lora":
        return place
    return place._replace(size=rank * (place.site.d_in + place.site.d_out))


def select(worth: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """Places taken in the order of their worth, each that still fits; one that does not is passed over.

    >>> select([0.9, 0.8, 0.1], [4, 9, 3], 8)
    [0, 2]
    """
    chosen, left = [], budget
    for number in sorted(range(len(sizes)), key=lambda i: (-worth[i], i)):
        if sizes[number] <= left:
            chosen.append(number)
            left -= sizes[number]
    return sorted(chosen)


class Gates(nn.Module):
    """The gates of all places. Subclasses say how z follows from what is searched.

    alpha: what is searched, a line for each place
    fixed: (places,) 1 where a place was chosen, 0 where not; below 0 while it is searched.
    """

    may_rest: ClassVar[bool] = True
    """It hears nothing before the weights have moved, and of small batches several may have no row that teaches it."""
    alpha: nn.Parameter
    fixed: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.halves = {0, 1}  # of the rows, those that this step had one of: small batches may lack either
        self.register_buffer("fixed", torch.full((n,), -1.0))

    @property
    def done(self) -> bool:
        """Whether the search is over."""
        return bool((self.fixed >= 0).all())

    @property
    def unasked(self) -> bool:
        """Whether this step had no row that teaches the weights."""
        return not self.done and 0 not in self.halves

    def z(self) -> Tensor:
        """(places,) or (places, ranks): of this pass."""
        raise NotImplementedError

    def choose(self, budget: int) -> None:
        """Fix what is taken, within the budget."""
        raise NotImplementedError

    def kept(self, place: int, short: str, parameter: Tensor) -> Tensor:
        """Where a tensor of a place, called `short` there, may be other than zero."""
        return torch.full_like(parameter, float(self.fixed[place]) > 0, dtype=torch.bool)

    def narrow(self, module: Components) -> None:
        """Cut what was kept at one site to the rank that was chosen."""

    def stored(self) -> dict[str, Tensor]:
        return {"fixed": (self.fixed if self.done else torch.ones_like(self.fixed)).to(torch.uint8)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.fixed.copy_(tensors["fixed"].float())


def place_edits(places: Sequence[Place], gates: Gates | None) -> Iterator[Attach]:
    """The components at their sites; without gates all of them act."""
    by_site: dict[str, list[tuple[int, Place]]] = {}
    for number, place in enumerate(places):
        by_site.setdefault(place.site.key, []).append((number, place))
    shared = {} if gates is None else {"gates": gates}
    for here in by_site.values():
        yield Attach(here[0][1].site, partial(_made, here, gates), shared)


def _made(here: Sequence[tuple[int, Place]], gates: Gates | None, base: Base) -> Attachment:
    d = base.site.d_in + base.site.d_out
    rank = max([place.size // d for _, place in here if place.kind == "lora"], default=1)
    kind = {"lora": AtLinear, "bias": AtLinear, "norm": AtNorm, "adapter": AtSublayer}[here[0][1].kind]
    return kind(base.site, {place.kind: number for number, place in here}, rank, gates)


class Components(Attachment):
    """The components at one site, by kind; `numbers` are those of their places."""

    needs_input = False

    def __init__(self, site: Site, numbers: dict[str, int], rank: int, gates: Gates | None) -> None:
        super().__init__()
        self.numbers = dict(numbers)
        self.__dict__["gates"] = gates  # registered once, on the tuning
        self.make(site, rank)

    def make(self, site: Site, rank: int) -> None:
        """Register the tensors, `KIND_...`; draws come in one order, whatever else stands here."""
        raise NotImplementedError

    def of(self, kind: str) -> dict[str, nn.Parameter]:
        """The tensors of one component."""
        return {n: p for n, p in self.named_parameters() if n.startswith(f"{kind}_")}

    def gate(self, kind: str) -> Tensor | float:
        """z of a component in this pass."""
        gates: Gates | None = self.__dict__["gates"]
        if gates is None:
            return 1.0
        memory = self.context.memory
        key = ("gates", id(gates))
        if key not in memory:
            memory[key] = gates.z()
        found: Tensor = memory[key][self.numbers[kind]]
        return found if kind == "lora" or found.dim() == 0 else found[0]

    def keep(self, kinds: Collection[str]) -> None:
        """Drop what was not chosen."""
        for name in [n for n, _ in self.named_parameters() if n.partition("_")[0] not in kinds]:
            setattr(self, name, None)
        self.numbers = {kind: number for kind, number in self.numbers.items() if kind in kinds}

    def narrow(self, rank: int) -> None:
        """Keep the first `rank` ranks of a LoRA."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.keep({name.partition("_")[0] for name in tensors})
        self.load_state_dict(tensors, strict=True)


class AtLinear(Components):
    """A LoRA and a bias at a projection."""

    kind = "delta"
    needs_input = True

    def make(self, site: Site, rank: int) -> None:
        self.lora_a = nn.Parameter(torch.empty(rank, site.d_in).uniform_(-1, 1) / site.d_in**0.5)
        self.lora_b = nn.Parameter(torch.zeros(site.d_out, rank))
        self.bias_b = nn.Parameter(torch.zeros(site.d_out))
        for name in ("lora_a", "lora_b", "bias_b"):
            if name.partition("_")[0] not in self.numbers:
                setattr(self, name, None)

    def narrow(self, rank: int) -> None:
        self.lora_a = nn.Parameter(self.lora_a.detach()[:rank].clone(), self.lora_a.requires_grad)
        self.lora_b = nn.Parameter(self.lora_b.detach()[:, :rank].clone(), self.lora_b.requires_grad)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if "lora_a" in tensors and len(tensors["lora_a"]) < len(self.lora_a):
            self.narrow(len(tensors["lora_a"]))
        super().restore(tensors)

    def gate(self, kind: str) -> Tensor | float:
        found = super().gate(kind)
        return found[: len(self.lora_a)] if kind == "lora" and isinstance(found, Tensor) and found.dim() else found

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if "lora" in self.numbers:
            y = y + (x @ self.lora_a.T * self.gate("lora")) @ self.lora_b.T
        return y + self.gate("bias") * self.bias_b if "bias" in self.numbers else y


class AtNorm(Components):
    """A scale and a shift behind a norm."""

    kind = "scale"

    def make(self, site: Site, rank: int) -> None:
        self.norm_a = nn.Parameter(torch.zeros(site.d_out))
        if site.bias is not None:
            self.norm_b = nn.Parameter(torch.zeros(site.d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if "norm" not in self.numbers:
            return y
        change = y * self.norm_a
        shift = getattr(self, "norm_b", None)
        return y + self.gate("norm") * (change if shift is None else change + shift)


class AtSublayer(Components):
    """A bottleneck behind a sublayer, whose two matrices are of rank one."""

    kind = "sequential"

    def make(self, site: Site, rank: int) -> None:
        d, k = site.d_out, max(1, site.d_out // REDUCTION)
        self.adapter_dl = nn.Parameter(torch.randn(k, 1) / k**0.5)
        self.adapter_dr = nn.Parameter(torch.randn(1, d) / d**0.5)
        self.adapter_db = nn.Parameter(torch.zeros(k))
        self.adapter_ul = nn.Parameter(torch.zeros(d, 1))
        self.adapter_ur = nn.Parameter(torch.randn(1, k) / k**0.5)
        self.adapter_ub = nn.Parameter(torch.zeros(d))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if "adapter" not in self.numbers:
            return y
        narrow = nn.functional.gelu(y @ self.adapter_dr.T @ self.adapter_dl.T + self.adapter_db)
        return y + self.gate("adapter") * (narrow @ self.adapter_ur.T @ self.adapter_ul.T + self.adapter_ub)


class PlaceSearch(Method):
    """A method that searches in the first part of a run; what was chosen starts again, and trains alone in the rest.

    With `plan` there is no search: the places that it names train from the beginning.
    """

    share: float
    search: float
    gate_rate: float
    plan: tuple[str, ...]

    @abstractmethod
    def places(self, anatomy: Anatomy) -> tuple[Place, ...]:
        """What may stand on the model, or what `plan` names."""

    def budget(self, anatomy: Anatomy) -> int:
        """Numbers that the plan may hold."""
        return int(self.share * numbers_below_head(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) if self.plan else self.budget(anatomy) + len(self.places(anatomy))

    def groups(self, tuned: TunedView) -> list[Group]:
        searched = [gates.alpha for gates in self._gates(tuned)]
        names = group_names(tuned, searched)
        return [Group(names, lr_factor=self.gate_rate, weight_decay=0.0)] if searched else []

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        if self.plan:
            return ()
        return Phase(self.search), Phase(1 - self.search, trains=lambda name: "gates.alpha" not in name)

    @torch.no_grad()
    def enter(self, tuned: TunedView, phase: int) -> None:
        for tuning in own_tunings(self, tuned):
            made = {k: m for k, m in tuning.modules_by_key().items() if isinstance(m, Components)}
            named = {f"{k}.{n}": (m, n, p) for k, m in made.items() for n, p in m.named_parameters()}
            if phase == 0:
                tuning.notes |= {f"start.{n}": p.detach().clone() for n, (_, _, p) in named.items()}
                continue
            for gates in self._gates(tuned):
                self._choose(gates, tuned)
                for name, (module, short, parameter) in named.items():
                    kept = gates.kept(module.numbers[short.partition("_")[0]], short, parameter)
                    parameter.copy_(tuning.notes.pop(f"start.{name}") * kept)
                    tuning.masks[name] = kept

    def _choose(self, gates: Gates, tuned: TunedView) -> None:
        if not gates.alpha.any():  # it starts at zero
            warnings.warn(
                f"{self.name}: no step of the search taught it what to keep, so its choice says nothing. One half of "
                "the rows teaches it: give batches of more rows, or more steps.",
                stacklevel=2,
            )
        gates.choose(self.budget(tuned.anatomy))

    def finish(self, tuned: TunedView) -> None:
        for gates in self._gates(tuned):
            if not gates.done:
                self._choose(gates, tuned)
            for tuning in own_tunings(self, tuned):
                for module in tuning.modules_by_key().values():
                    if isinstance(module, Components):
                        module.keep({k for k, n in module.numbers.items() if gates.fixed[n] > 0})
                        gates.narrow(module)
                tuning.masks.clear()

    def _gates(self, tuned: TunedView) -> list[Gates]:
        return own_modules(self, tuned, Gates)
