"""What a method finds of itself on a model that may hold other tunings: its own modules, tensors and names."""

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from luthier.surgery import Method, TunedView, TuningView
from luthier.surgery.unfrozen import Unfrozen

__all__ = ["attached", "group_names", "own_head", "own_modules", "own_tunings", "own_unfrozen"]

M = TypeVar("M", bound=nn.Module)


def own_tunings(method: Method, tuned: TunedView) -> list[TuningView]:
    """The tunings that learn and hold this very method, alone or beside others."""
    return [t for t in tuned.tunings.values() if t.trainable and t.made_by(method)]


def own_modules(method: Method, tuned: TunedView, kind: type[M]) -> list[M]:
    """Its modules of one class, in the order of the model."""
    found = (m for t in own_tunings(method, tuned) for m in t.modules_by_key().values())
    return [m for m in found if isinstance(m, kind)]


def own_unfrozen(method: Method, tuned: TunedView) -> list[Unfrozen]:
    """The tensors of the model that it trains in place, a new head left out, in the order of the model."""
    mine = ("model/", f"{method.name}:model/")
    return [u for t in own_tunings(method, tuned) for key, u in t.unfrozen.items() if key.startswith(mine)]


def own_head(method: Method, tuned: TunedView) -> list[Unfrozen]:
    """The tensors of a new head that learns with it."""
    return [u for t in own_tunings(method, tuned) for key, u in t.unfrozen.items() if key.startswith("head/")]


def attached(tuning: TuningView) -> dict[str, nn.Parameter]:
    """The attached tensors of a tuning that learn, by canonical name."""
    named = ((f"{k}.{n}", p) for k, m in tuning.modules_by_key().items() for n, p in m.named_parameters())
    return {name: p for name, p in named if p.requires_grad}


def group_names(tuned: TunedView, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
    """The names under which `parameters` train, for a `Group`."""
    wanted = {id(p) for p in parameters}
    return tuple(name for name, p in tuned.trained().items() if id(p) in wanted)
