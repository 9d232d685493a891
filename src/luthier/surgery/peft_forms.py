"""How a method stands in the files of the peft library: said in the method's own file, read and written by peft_files.

A form says which tensors and settings are the same thing under other names, and which of peft's settings must have one
value for both to compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import CannotMerge, ConfigError, IntegrityError

__all__ = ["PEFT_LAYERS", "PeftForm", "PeftIn", "PeftOut", "PeftTaken", "PeftWhole"]

PEFT_LAYERS = "base_model.model."
"""What stands before a layer's path in peft's files; where vectors stand before the text, only its first word does."""


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


@dataclass(frozen=True)
class PeftOut:
    """A tuning on its way into peft's files.

    Attributes:
        stored: its tensors as we store them, by canonical name; those of a head are not among them.
        sites: canonical key -> site, of what sits at a layer of its own.
        answers: what the model is for, as peft calls it: "SEQ_CLS", "CAUSAL_LM".
        own: a frozen tensor of the model, by its name.
    """

    method: Any
    stored: Mapping[str, Tensor]
    sites: Mapping[str, Site]
    anatomy: Anatomy
    model: Any
    answers: str
    own: Callable[[str], Tensor]

    def by_layer(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors of every layer. names: ours -> what stands behind the layer's path in the file."""
        return {
            f"{PEFT_LAYERS}{site.path}.{theirs}": self.stored[f"{key}.{short}"]
            for key, site in self.sites.items()
            for short, theirs in names.items()
        }


@dataclass(frozen=True)
class PeftIn:
    """What a folder of peft's holds.

    Attributes:
        facts: its configuration.
        tensors: by the names that they have in the file; those of a head are not among them.
        where: the configuration's file, for messages.
        own: a tensor of the model, by its name.
        sites_of: paths of layers -> their sites, and the words that choose exactly them. Raises ModelError.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    anatomy: Anatomy
    model: Any
    where: str
    own: Callable[[str], Tensor]
    sites_of: Callable[[set[str]], tuple[dict[str, Site], list[str]]]

    def by_layer(self, names: Mapping[str, str]) -> tuple[list[str], dict[str, Tensor]]:
        """The words that choose the layers, and the layers' tensors by our names. names: theirs -> ours."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            theirs = next((t for t in names if name.startswith(PEFT_LAYERS) and name.endswith(f".{t}")), None)
            if theirs is not None:
                path = name.removeprefix(PEFT_LAYERS).removesuffix(f".{theirs}")
                found.setdefault(path, {})[names[theirs]] = tensor
        sites, words = self.sites_of(set(found))
        return words, {f"{sites[p].key}.{short}": t for p, parts in found.items() for short, t in parts.items()}

    def paths(self, theirs: str) -> list[str]:
        """The layers that have a tensor of this name, in the order of the model."""
        held = {
            n.removeprefix(PEFT_LAYERS).removesuffix(f".{theirs}") for n in self.tensors if n.endswith(f".{theirs}")
        }
        return list(dict.fromkeys(site.path for site in self.anatomy.all_sites if site.path in held))

    def by_target(self) -> list[str]:
        """The words that choose the layers which the configuration names.

        Raises:
            ConfigError: it names them by an expression: those of others are not run.
        """
        named = self.facts.get("target_modules")
        if not isinstance(named, list):
            raise ConfigError(f"{self.where}: target_modules is {named!r}. Give a list of the layers' paths.")
        every = {site.path for site in self.anatomy.all_sites}
        found = {p for p in every if any(p == n or p.endswith(f".{n}") for n in named)}
        return self.sites_of(found or set(map(str, named)))[1]

    def tensor(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            IntegrityError: the file does not have it.
        """
        if name not in self.tensors:
            raise IntegrityError(f"{self.where}: the weights beside it have no {name}. Restore them from a copy.")
        return self.tensors[name]


@dataclass(frozen=True)
class PeftTaken:
    """What is made of such a folder here: settings of our method, and its tensors as we store them."""

    settings: dict[str, Any]
    stored: dict[str, Tensor]


@dataclass(frozen=True)
class PeftWhole(PeftForm):
    """A method whose file in peft is more than the same tensors at each layer: two functions say it.

    Attributes:
        out: tensors under the names of the file, and what its configuration says beside `settings`, `fixed` and what
            every file has. Raises CannotMerge where peft computes something else.
        back: the way back. Raises ConfigError for what we do not compute, IntegrityError for tensors that do not fit.
        prefix: what stands before the names of a head there.
        heads: whether peft keeps a head in such a file.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    out: Callable[[PeftOut], tuple[dict[str, Tensor], dict[str, Any]]] | None = None
    back: Callable[[PeftIn], PeftTaken] | None = None
    prefix: str = PEFT_LAYERS
    heads: bool = True
