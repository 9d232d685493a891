"""What methods share that are made of saved tunings: settings that the sources decide, and where their numbers go."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.core import ConfigError
from luthier.methods.parts.own_tensors import M, own_tunings
from luthier.surgery import Method, Source, TunedView

__all__ = ["agreed", "mean_of", "no_sources", "own_sites"]


def agreed(method: Method, sources: Sequence[Source], name: str) -> Any:
    """The value that all sources have for the setting `name`; the method's own, where it has one, must be the same.

    Raises:
        ConfigError: they differ, in one another's eyes or the method's.
    """
    own = _plain(getattr(method, name))
    for source in sources:
        value, first = _plain(source.settings.get(name)), _plain(sources[0].settings.get(name))
        if value != first:
            raise ConfigError(
                f"{method.name}: {sources[0].folder} was trained with {name}={first!r} and {source.folder} with "
                f"{name}={value!r}. Their sources must be alike: train one of them again."
            )
        if own not in (None, ()) and own != value:
            raise ConfigError(
                f"{method.name}: {name}={own!r}, and {source.folder} was trained with {name}={value!r}. Leave {name} "
                "out: the sources decide it."
            )
    return _plain(sources[0].settings.get(name))


def no_sources(method: Method, what: str) -> ConfigError:
    """What to say of a method that is made of saved tunings where none is named. what: such as "adapters to merge"."""
    least = "at least two tunings" if method.least_sources > 1 else "tunings"
    return ConfigError(
        f"{method.name}: no {what}. Name {least} of {method.sources[0]}: --source runs/a --source runs/b, or "
        "attach(..., sources=[...])."
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def own_sites(method: Method, tuned: TunedView, kind: type[M]) -> Iterator[tuple[str, M]]:
    """Its modules of one class, each with the key under which a tuning of one method alone saves what is there."""
    for tuning in own_tunings(method, tuned):
        for key, module in tuning.modules_by_key().items():
            if isinstance(module, kind):
                yield key.rpartition(":")[2], module


def mean_of(sources: Sequence[Source], key: str) -> dict[str, Tensor]:
    """The mean of each tensor of the module `key`; its order in `sources` changes nothing.

    In double precision: a sum of fp32 numbers rounds differently in another order.
    """
    parts = [source.part(key) for source in sources]
    return {n: torch.stack([part[n].double() for part in parts]).mean(0).float() for n in parts[0]}
