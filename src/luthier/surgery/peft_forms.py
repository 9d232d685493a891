"""How a method stands in the files of the peft library: said in the method's own file, read and written by peft_files.

A form says which tensors and settings are the same thing under other names, and which of peft's settings must have one
value for both to compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.anatomy import Site
from luthier.core import CannotMerge, ConfigError

__all__ = ["PeftForm"]


@dataclass(frozen=True)
class PeftForm:
    """One method in peft's files.

    Attributes:
        type: peft's name of it, as `peft_type` says.
        parts: what a layer's tensor is called there, behind the layer's path -> its name in our attachment. A buffer is
            written too, and compared when read: it follows from the base.
        settings: peft's key -> our setting, where both have the same values.
        fixed: peft's key -> the one value under which both compute the same.
        ignored: peft's keys that act in training alone.
        silent: peft's keys that must say nothing.
        transposed: whether peft has it on layers that store their weight the other way round.
        write: further keys of peft's, from the method. Read back by `read`.
        read: our settings, from peft's keys. Raises ConfigError for what we do not compute.
        also: the keys that `read` looks at.
        shared: tensors that peft may write once for the whole model -> key and name of ours. They are drawn from a
            seed here and not written; where a file has them they must be the same.
    """

    type: str
    parts: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    transposed: bool = True
    write: Callable[[Any], dict[str, Any]] | None = None
    read: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    also: tuple[str, ...] = ()
    shared: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def understood(self) -> set[str]:
        """Of peft's configuration, all that this form understands."""
        return {*self.settings, *self.fixed, *self.ignored, *self.also}

    def facts(self, method: Any) -> dict[str, Any]:
        """What peft's configuration says of `method`."""
        same = {theirs: getattr(method, ours) for theirs, ours in self.settings.items()}
        return {**same, **self.fixed, **(self.write(method) if self.write is not None else {})}

    def chosen(self, facts: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Our settings from peft's configuration; what it leaves out keeps our default.

        Raises:
            ConfigError: it asks for something that we do not compute.
        """
        for key, value in self.fixed.items():
            if facts.get(key, value) != value:
                raise ConfigError(
                    f"{where}: {key} is {facts[key]!r}; ours computes what peft does with {value!r}, and nothing else."
                )
        found = {ours: facts[theirs] for theirs, ours in self.settings.items() if theirs in facts}
        return {**found, **(self.read(facts) if self.read is not None else {})}

    def check_places(self, sites: Iterable[Site], name: str) -> None:
        """Refuse places that peft's version of the method has no layer for.

        Raises:
            CannotMerge: with the place.
        """
        turned = next((site for site in sites if site.transposed), None)
        if turned is not None and not self.transposed:
            raise CannotMerge(
                f"{name}: {turned.key} stores its weight as (d_in, d_out), and peft has {self.type} for layers that "
                "store it the other way round only. Export the merged model instead."
            )
