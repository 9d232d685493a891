"""Methods by their spelt names: "lora", "lora+prompt_tuning"; and the rules of what may stand together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from luthier.anatomy import Anatomy
from luthier.core import CompositionError, ConfigError, UnknownName, build, fields_of, near, other_names
from luthier.core.card import SUM_FACTS
from luthier.surgery.edits import Edit
from luthier.surgery.method import METHODS, Method
from luthier.surgery.source import Source

__all__ = [
    "Combined",
    "check",
    "check_beside",
    "completed",
    "fitted",
    "for_labels",
    "for_rows",
    "for_template",
    "left_out",
    "method",
    "setting_names",
    "spell",
    "spelling",
    "takes",
]


@dataclass(frozen=True, kw_only=True)
class Combined(Method):
    """Several methods on one model, trained together; each keeps its own settings and keys."""

    members: tuple[Method, ...]

    # Of a preset that is a sum: how it is spelt, and its settings.
    spelt: ClassVar[tuple[str, Mapping[str, Any]]] = ("", {})

    def __post_init__(self) -> None:
        check(self.members)

    @property
    def _acting(self) -> tuple[Method, ...]:
        """Those that make edits; modifiers change their numbers."""
        return tuple(m for m in self.members if not m.modifies)

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """All of its parts are."""
        return all(m.mergeable for m in self._acting)

    @property
    def starts_at_base(self) -> bool:  # type: ignore[override]
        """All of its parts do."""
        return all(m.starts_at_base for m in self._acting)

    @property
    def default_lr(self) -> float:  # type: ignore[override]
        """The smallest of its parts'."""
        return min(m.default_lr for m in self._acting)

    @property
    def default_head_lr(self) -> float | None:  # type: ignore[override]
        """That of the part whose rate is the smallest."""
        return min(self.members, key=lambda m: m.default_lr).default_head_lr

    @property
    def looks_at_data(self) -> bool:  # type: ignore[override]
        """One of its parts does."""
        return any(m.looks_at_data for m in self.members)

    @property
    def computes_tensors(self) -> bool:  # type: ignore[override]
        """One of its parts does."""
        return any(m.computes_tensors for m in self.members)

    @property
    def trains_base(self) -> bool:  # type: ignore[override]
        """One of its parts does."""
        return any(m.trains_base for m in self.members)

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """One of its parts does."""
        return any(m.draws for m in self.members)

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        """One of its parts does."""
        return any(m.looks_ahead for m in self.members)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for member in self.members:
            yield from (edit for edit in member.edits(anatomy) if not left_out(edit, self.members, anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(m.n_params(anatomy) for m in self.members) - self._removed(anatomy)

    def n_stored(self, anatomy: Anatomy) -> int:
        beside = sum(m.n_beside(self._acting, anatomy) for m in self.members if m.modifies)
        return sum(m.n_stored(anatomy) for m in self.members) - self._removed(anatomy) + beside

    def _removed(self, anatomy: Anatomy) -> int:
        return sum(m.n_removed(self._acting, anatomy) for m in self.members if m.modifies)

    def settings(self) -> dict[str, Any]:
        return {f"{m.name}.{k}": v for m in self.members for k, v in m.settings().items()}

    def parts(self) -> tuple[Method, ...]:
        return self.members


def left_out(edit: Edit, parts: Iterable[Method], anatomy: Anatomy) -> bool:
    """Whether a modifier among `parts` takes an edit of the others away."""
    return any(part.modifies and part.leaves_out(edit, anatomy) for part in parts)


def spell(method: Method) -> str:
    """The name a user writes: "lora+prompt_tuning"."""
    return "+".join(part.name for part in method.parts())


def spelling(words: str) -> str:
    """What stands on the model: what needs another method, and is named alone, stands with that of its own paper.

    >>> spelling("adapterdrop"), spelling("lora+adapterdrop")
    ('pfeiffer_adapter+adapterdrop', 'lora+adapterdrop')

    Raises:
        UnknownName: no such method.
    """
    return "+".join(_beside([word.strip() for word in words.split("+")]))


def _beside(names: list[str]) -> list[str]:
    if all(METHODS.get(name).needs for name in names):
        return [*METHODS.get(names[0]).needs, *names]
    return names


def method(words: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Make a method from its spelt name and plain settings.

    For several methods, a setting is named "lora.rank"; a bare "rank" goes to the only part that has one.

    Raises:
        UnknownName: no such method or setting.
        ConfigError: a value that cannot work, or a bare setting that several parts have.
        CompositionError: the parts cannot stand together.
    """
    names, given = _spelt_out([w.strip() for w in words.split("+")])
    names = _beside(names)
    classes = [METHODS.get(n) for n in names]
    if len(set(names)) < len(names):
        raise CompositionError(
            f"{words!r}: a method stands in it twice. Name each once; attach a second tuning for another."
        )
    fields = {n: [f.name for f in fields_of(c)] for n, c in zip(names, classes, strict=True)}
    values: dict[str, dict[str, Any]] = {n: {} for n in names}
    for full, value in (*given.items(), *(settings or {}).items()):
        owner, dot, field = full.rpartition(".")
        if dot and owner in values:
            values[owner][field] = value
            continue
        homes = [n for n in names if full in fields[n]]
        if len(homes) > 1:
            raise ConfigError(
                f"{full!r} is a setting of {' and of '.join(homes)}: write {homes[0]}.{full} or {homes[1]}.{full}."
            )
        if not homes:
            known = fields[names[0]] if len(names) == 1 else [f"{n}.{f}" for n in names for f in fields[n]]
            hint = other_names.answer(full.rpartition(".")[2], known, value) or near(full, known)
            raise UnknownName(f"{words} has no setting {full!r}.{hint} Its settings are {', '.join(known) or 'none'}.")
        values[homes[0]][full] = value
    members = [build(c, values[n], n) for n, c in zip(names, classes, strict=True)]
    check(members)
    whole = Combined if "+" in words else METHODS.get(words.strip())
    if issubclass(whole, Combined):
        return whole(members=tuple(members))
    return members[0] if len(members) == 1 else Combined(members=tuple(members))


def takes(part: Method, source: Source) -> bool:
    """Whether a method is made of tunings such as this one.

    Raises:
        ConfigError: its settings make something else of it.
    """
    if not part.sources or source.method not in METHODS.names():
        return False
    kind = METHODS.get(source.method)
    if kind.is_a(*part.sources) and (why := kind.lends(source.settings)) is not None:
        raise ConfigError(f"{source.folder}: this tuning of {source.method} {why}, so {part.name} cannot take it.")
    return kind.is_a(*part.sources)


def fitted(method: Method, sources: Sequence[Source]) -> Method:
    """`method` with the settings that saved tunings decide; each goes to the parts that are made of such ones.

    Raises:
        ConfigError: too few, one that no part takes, or some that do not go together.
    """
    for source in sources:
        if not any(takes(part, source) for part in method.parts()):
            wanted = [name for part in method.parts() for name in part.sources]
            reason = f"is made of saved tunings of {' or '.join(wanted)}" if wanted else "takes no saved tunings"
            raise ConfigError(
                f"{source.folder}: a tuning of {source.method}, and {spell(method)} {reason}. Leave the source out, or "
                "choose another method."
            )
    for part in method.parts():
        mine = [s for s in sources if takes(part, s)]
        if part.sources and len(mine) < part.least_sources:
            at_least = "one" if part.least_sources == 1 else f"at least {part.least_sources}"
            words = " ".join(["--source runs/NAME"] * part.least_sources)
            raise ConfigError(
                f"{part.name}: is made of saved tunings of {' or '.join(part.sources)}, {at_least}; {len(mine)} given. "
                f"Name the folders of finished runs: {words}, or attach(..., sources=[...])."
            )
    members = tuple(part.fitted([s for s in sources if takes(part, s)]) for part in method.parts())
    return replace(method, members=members) if isinstance(method, Combined) else members[0]


def completed(method: Method, tokenizer: Any, *, pair: bool) -> Method:
    """`method` with the settings that the tokenizer of a run decides."""
    members = tuple(part.completed(tokenizer, pair=pair) for part in method.parts())
    return replace(method, members=members) if isinstance(method, Combined) else members[0]


def for_template(method: Method, words: Sequence[int], n_soft: int, first: int) -> Method:
    """`method` for a run that asks for labels by a gap; see `Method.for_template`.

    Raises:
        ConfigError: words of the template are to be trained, and no part trains such.
    """
    readers = [part for part in method.parts() if part.soft_words]
    if n_soft and len(readers) != 1:
        who = f"{' and '.join(part.name for part in readers)} would both train" if readers else "trains none of"
        raise ConfigError(
            f"data.template has {n_soft} words {{soft}}, and {who if readers else f'{spell(method)} {who}'} them. Use "
            "one method that does, such as warp, or leave them out."
        )
    members = tuple(part.for_template(words, n_soft, first) for part in method.parts())
    return replace(method, members=members) if isinstance(method, Combined) else members[0]


def for_labels(method: Method, counts: Sequence[int]) -> Method:
    """`method` for a run in which each task has labels of its own, so many, which stand in this order among all.

    Raises:
        ConfigError: the setting was given, and says otherwise.
    """
    told = tuple(counts)
    for part in method.parts():
        own = getattr(part, part.counts_labels, ()) if part.counts_labels else ()
        if own and own != told:
            raise ConfigError(
                f"{part.name}.{part.counts_labels} is {list(own)}, and the tasks of the rows have {list(told)} labels. "
                "Leave it out: the data say."
            )
    members = tuple(_changed(p, **({p.counts_labels: told} if p.counts_labels else {})) for p in method.parts())
    return replace(method, members=members) if isinstance(method, Combined) else members[0]


def _changed(part: Any, **values: Any) -> Method:
    made: Method = replace(part, **values) if values else part
    return made


def for_rows(method: Method, facts: Mapping[str, int]) -> Method:
    """`method` for data that say so much of each row: how many tasks there are, say.

    Raises:
        ConfigError: it reads nothing of the kind, or was asked for fewer values.
    """
    for fact, n in facts.items():
        readers = [part for part in method.parts() if fact in part.reads_rows]
        if not readers:
            raise ConfigError(
                f"data.row_{fact}: {spell(method)} keeps no numbers for each {fact}, so the column would change "
                "nothing. Leave it out, or use a method that does, such as hyperformer."
            )
        for part in readers:
            own = getattr(part, f"{fact}s")
            if own is not None and own < n:
                raise ConfigError(
                    f"{part.name}.{fact}s is {own}, and the rows have {n} values of {fact}. Leave it out: the data say."
                )
    members = tuple(
        _changed(part, **{f"{f}s": getattr(part, f"{f}s") or n for f, n in facts.items() if f in part.reads_rows})
        for part in method.parts()
    )
    return replace(method, members=members) if isinstance(method, Combined) else members[0]


def _spelt_out(names: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Presets that are sums, as their parts and the settings that these have in them."""
    parts: list[str] = []
    given: dict[str, Any] = {}
    for name in names:
        cls = METHODS.get(name)
        if issubclass(cls, Combined):
            words, values = cls.spelt
            parts += words.split("+")
            given |= values
        else:
            parts.append(name)
    return parts, given


def _sum(name: str, words: str, values: Mapping[str, Any]) -> type[Method]:
    """The class of a preset that is a sum: `Combined` with its members made, and with a rate of its own if it has one.

    Beside others, as in `u_mam+lora`, a preset is its parts, and their rates count.
    """
    facts = {n: v for n, v in values.items() if n in SUM_FACTS}
    values = {n: v for n, v in values.items() if n not in facts}
    made = method(words, values)
    parts = "+".join(part.name for part in made.parts())
    spelt = {f"{part.name}.{n}": v for part in made.parts() for n, v in part.settings().items()}
    chosen = {n: v for n, v in spelt.items() if n in values or n.partition(".")[2] in values}
    body = {
        "__annotations__": {"members": tuple[Method, ...]},
        "members": made.parts(),
        "spelt": (parts, chosen),
        "__doc__": f"{words} with other defaults.",
        "__module__": __name__,
        **facts,
    }
    title = "".join(part.capitalize() for part in name.split("_"))
    return dataclass(frozen=True, kw_only=True)(type(title, (Combined,), body))


METHODS.combine = _sum


def setting_names(words: str) -> list[str]:
    """Names of all settings of the methods in a spelt name.

    Raises:
        UnknownName: no such method.
    """
    return [f.name for w in words.split("+") for f in fields_of(METHODS.get(w.strip()))]


def check(members: Iterable[Method]) -> None:
    """Refuse methods that cannot stand together; each pair is asked both ways.

    Raises:
        CompositionError: with the reason.
    """
    listed = list(members)
    for i, one in enumerate(listed):
        for other in listed[i + 1 :]:
            reason = one.conflicts(other) or other.conflicts(one)
            if reason:
                raise CompositionError(f"{one.name} and {other.name} cannot stand together: {reason}")


def check_beside(one: Method, other: Method, who: str) -> None:
    """Refuse two tunings that cannot act at once; `who` begins the message.

    Raises:
        CompositionError: with the reason.
    """
    if spell(one) == spell(other):
        return  # what both of them would change is found by what they claim
    try:
        check([*one.parts(), *other.parts()])
    except CompositionError as error:
        raise CompositionError(
            f"{who}{error} Or let one act at a time: tuned.activate(...) names those that do."
        ) from error
