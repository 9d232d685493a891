"""GLoRA: scales and shifts of weight, input and bias in one; a search keeps of each place what is worth its numbers.

    y = x (W + W * A + B)^T + b + D * b + E + W C      A, B: (d_out, d_in)    C: (d_in,)    D, E: (d_out,)

Each of A, B and C is a product of two thin matrices (low_rank), the first column of the left one (vector), or nothing;
A and B may be its first entry (constant) too, D and E a vector, their first entry, or nothing: 432 ways a place. All
ways of a term share its numbers. The left matrices, D and E start at zero, so every way starts as the base model.

Every step of training draws a way for each place. After the last step, generations of choices are compared by their
loss on training rows: the best are crossed and changed, and none may hold more than `budget` of all numbers. Nothing
is trained after that. A term that is set to a way of its own, a=none say, is not drawn, and holds no other numbers.

Chavan, Liu, Gupta, Xing, Shen 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
arXiv:2306.07967, section 3. The released script searches on the test rows; here it sees training rows alone.

Where a layer has no bias, a search leaves C, D and E out: merged they would need a place that the model has not.

Count: sum over sites of 2 rank (d_in + d_out) + rank (d_in + 1) + 2 d_out; the first term alone where there is no bias.
The file holds all of it, whatever was chosen.
Claims: better than LoRA at the same count of what is chosen, and a bias where LoRA has none.
Cost: an update as large as the weight at every pass; `population` + 50 a generation passes over the rows of the search.
Use it when: what each place needs is to be found out.
Not when: training must be fast: a step costs what an update as large as the weight costs.
Pitfalls: C meets the frozen weight, also where another tuning has been merged; A multiplies entry by entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.low_rank import live_bias
from luthier.methods.parts.masks import first_share, no_trace
from luthier.methods.parts.peft_glora import glora_form
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Batches, PeftForm, TunedView, keyed

Wide = Literal["search", "low_rank", "vector", "constant", "none"]
Narrow = Literal["search", "low_rank", "vector", "none"]
Flat = Literal["search", "vector", "constant", "none"]
WAYS = {
    "a": ("low_rank", "vector", "constant", "none"),
    "b": ("low_rank", "vector", "constant", "none"),
    "c": ("low_rank", "vector", "none"),
    "d": ("vector", "constant", "none"),
    "e": ("vector", "constant", "none"),
}
"""The ways of each term, the richest first."""
CROSSED, CHANGED = 25, 25
"""Children of a generation that are made of two parents, and of one of whose terms some are drawn anew."""
Path = tuple[str, ...]  # a way for each term, in the order of WAYS


@METHODS.register("glora", family="reparameterised", paper="arXiv:2306.07967")
@dataclass(frozen=True, kw_only=True)
class GLoRA(AtProjections):
    """Settings of GLoRA."""

    sites: Annotated[tuple[str, ...], "where to attach"] = ("attn.q", "attn.v")
    rank: Annotated[int, "width of the thin matrices", at_least(1)] = 4
    a: Annotated[Wide, "what scales the weight, or search for it"] = "search"
    b: Annotated[Wide, "what is added to the weight"] = "search"
    c: Annotated[Narrow, "what the weight is given beside its input"] = "search"
    d: Annotated[Flat, "what scales the bias"] = "search"
    e: Annotated[Flat, "what is added to the bias"] = "search"
    budget: Annotated[float, "share of all numbers that what is chosen may hold", between(0.001, 1)] = 0.5
    population: Annotated[int, "choices of the first generation", at_least(2)] = 50
    generations: Annotated[int, "how often the best are crossed and changed", at_least(0)] = 20
    parents: Annotated[int, "the best, of which a generation is made", at_least(2)] = 10
    change: Annotated[float, "chance of a term to be drawn anew in a changed child", between(0, 1)] = 0.2
    data: Annotated[float, "share of the training rows by which choices are compared", between(0.001, 1)] = 0.02

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 2, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = glora_form(WAYS)

    @property
    def chosen(self) -> dict[str, str]:
        """Term -> its setting."""
        return {term: getattr(self, term) for term in WAYS}

    @property
    def searches(self) -> bool:
        """Whether any term is left to the search."""
        return "search" in self.chosen.values()

    def __post_init__(self) -> None:
        if set(self.chosen.values()) == {"none"}:
            raise ConfigError("glora: a, b, c, d and e are all none, so nothing would be changed. Let one be search.")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        bare = next((site for site in sites if site.bias is None), None)
        if bare is not None and self.d in ("vector", "constant"):
            raise ConfigError(f"glora.d: {self.d}, and {bare.key} has no bias to scale. Set d=none, or leave it out.")
        return sites

    def at(self, site: Site) -> Path:
        """The settings at one place: without a bias there is nothing to search for in what would make one."""
        bare = {"c", "d", "e"} if site.bias is None else set()
        return tuple("none" if way == "search" and t in bare else way for t, way in self.chosen.items())

    def params_at(self, site: Site) -> int:
        return cost(site.d_out, site.d_in, self.rank, self.at(site))

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + len(WAYS) * len(self.places(anatomy))  # and the way of each term

    def build(self, site: Site, base: Base) -> Attachment:
        return General(base, self.rank, self.at(site))

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        for module in _modules(self, tuned):
            module.drawn = module.draw()

    def conclude(self, tuned: TunedView, batches: Batches, held: Batches = ()) -> None:
        modules = _modules(self, tuned)
        if not self.searches or not modules:
            return
        if not len(batches):
            raise ConfigError("glora: no rows to search by. Give conclude() steps, or set a, b, c, d and e.")
        looked = first_share(batches, self.data)
        known: dict[tuple[Path, ...], float] = {}

        def loss(paths: tuple[Path, ...]) -> float:
            if paths not in known:
                for module, path in zip(modules, paths, strict=True):
                    module.take(path)
                known[paths] = sum(float(batch()) for batch in looked)
            return known[paths]

        most = self.budget * sum(m.cost(m.chosen) for m in modules)
        with no_trace(tuned, training=False), torch.no_grad(), keyed(0, "glora search"):
            found = self._children(modules, most, self.population, [])
            for _ in range(self.generations):
                best = sorted(found, key=loss)[: self.parents]
                crossed = self._children(modules, most, CROSSED, best, cross=True)
                found = [*best, *crossed, *self._children(modules, most, CHANGED, best)]
            chosen = min(found, key=loss)
        for module, path in zip(modules, chosen, strict=True):
            module.take(path)

    def _children(
        self, modules: Sequence["General"], most: float, n: int, parents: Sequence[tuple[Path, ...]], *,
        cross: bool = False,
    ) -> list[tuple[Path, ...]]:  # fmt: skip
        """Choices for all places that keep to the budget; drawn anew without parents.

        Raises:
            ConfigError: hardly any keeps to it.
        """
        found: list[tuple[Path, ...]] = []
        for _ in range(200 * n):
            made = tuple(m.draw() for m in modules)
            if parents:
                one, other = (parents[int(torch.randint(len(parents), ()))] for _ in range(2))
                share = torch.rand(len(modules), len(WAYS))
                new = other if cross else made
                less = 0.5 if cross else self.change
                made = tuple(
                    tuple(q if at < less else p for p, q, at in zip(*three, strict=True))
                    for three in zip(one, new, share.tolist(), strict=True)
                )
            if sum(m.cost(path) for m, path in zip(modules, made, strict=True)) <= most:
                found.append(made)
            if len(found) == n:
                return found
        if found or parents:
            return found
        raise ConfigError(
            f"glora.budget: {self.budget:g} of the numbers is so little that no choice of {200 * n} keeps to it. Raise "
            "it, or set some terms to none."
        )


def cost(d_out: int, d_in: int, rank: int, path: Path) -> int:
    """Numbers that a path holds at one place; of a term that is searched for, of its richest way."""
    sizes = {"a": (d_out, d_in), "b": (d_out, d_in), "c": (d_in, 1), "d": (d_out, 0), "e": (d_out, 0)}
    ways = [WAYS[t][0] if way == "search" else way for t, way in zip(WAYS, path, strict=True)]
    return sum(_size(way, *sizes[t], rank) for t, way in zip(WAYS, ways, strict=True))


def _size(way: str, rows: int, columns: int, rank: int) -> int:
    return {"low_rank": rank * (rows + columns), "vector": rows, "constant": 1, "none": 0}[way]


def _modules(method: GLoRA, tuned: TunedView) -> list["General"]:
    held = (t for t in tuned.tunings.values() if t.trainable and t.made_by(method))
    return [m for t in held for m in t.modules_by_key().values() if isinstance(m, General)]


class Term(nn.Module):
    """The numbers of one term, (rows, columns), for all of its ways."""

    def __init__(self, rows: int, columns: int, rank: int, way: str) -> None:
        super().__init__()
        product = way == "low_rank"
        if way != "none":
            self.down = nn.Parameter(torch.zeros(1 if way == "constant" else rows, rank if product else 1))
        if product:
            self.up = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, columns)))

    def value(self, way: str) -> Tensor | None:
        """(rows, columns), (rows, 1) or (1, 1)."""
        if way == "none":
            return None
        return self.down @ self.up if way == "low_rank" else self.down[:, :1] if way == "vector" else self.down[:1, :1]


class General(Attachment):
    """Adds all five terms, each in the way that is chosen for it."""

    kind = "delta"
    reads_base_weight = True
    path: Tensor

    def __init__(self, base: Base, rank: int, chosen: Path) -> None:
        super().__init__()
        weight = base.weight()
        d_out, d_in = weight.shape
        self.base, self.rank, self.sizes, self.chosen = base, rank, (d_out, d_in), chosen
        richest = tuple(WAYS[t][0] if way == "search" else way for t, way in zip(WAYS, chosen, strict=True))
        sizes = {"a": (d_out, d_in), "b": (d_out, d_in), "c": (d_in, 1), "d": (d_out, 1), "e": (d_out, 1)}
        self.terms = nn.ModuleDict({t: Term(*sizes[t], rank, way) for t, way in zip(WAYS, richest, strict=True)})
        self.register_buffer("path", torch.zeros(len(WAYS), dtype=torch.int32))
        self.take(richest)
        self.drawn = richest

    def draw(self) -> Path:
        """A way for each term, every one as likely; what is set stays."""
        return tuple(
            WAYS[t][int(torch.randint(len(WAYS[t]), ()))] if way == "search" else way
            for t, way in zip(WAYS, self.chosen, strict=True)
        )

    def take(self, path: Path) -> None:
        """From now on answer in this way."""
        ways = [WAYS[t].index(way) for t, way in zip(WAYS, path, strict=True)]
        self.path.copy_(torch.tensor(ways))

    def cost(self, path: Path) -> int:
        """Numbers that a path holds here."""
        return cost(*self.sizes, self.rank, path)

    def answers(self) -> Path:
        """The way of each term in answers, and in merged weights."""
        return tuple(WAYS[t][i] for t, i in zip(WAYS, self.path.tolist(), strict=True))

    def ways(self) -> Path:
        """The way of each term that acts now."""
        return self.drawn if self.training else self.answers()

    def parts(self, weight: Tensor, bias: Tensor | None, ways: Path) -> tuple[Tensor | None, Tensor | None]:
        """What is added to a weight, (d_out, d_in), and to its bias, (d_out,)."""
        terms = (m for m in self.terms.values() if isinstance(m, Term))
        a, b, c, d, e = (term.value(way) for term, way in zip(terms, ways, strict=True))
        more = None if a is None else weight * a
        if b is not None:
            more = b.expand_as(weight) if more is None else more + b
        flat = [] if c is None else [(weight @ c.to(weight.dtype))[:, 0]]
        flat += [] if e is None else [e[:, 0].expand(len(weight))]
        flat += [] if d is None or bias is None else [d[:, 0] * bias]
        return more, torch.stack(flat).sum(0) if flat else None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        more, flat = self.parts(self.base.weight().to(x.dtype), live_bias(self.base), self.ways())
        y = y if more is None else y + F.linear(x, more.to(x.dtype))
        return y if flat is None else y + flat.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The terms multiply this attachment's own frozen weight; `weight` may hold another tuning's merge by now. In
        # training mode, too, the ways of answers are what is merged, not those that a step has drawn.
        own = self.base.bias()
        more, flat = self.parts(self.base.weight().float(), None if own is None else own.float(), self.answers())
        weight = weight if more is None else weight + more
        return weight, bias if flat is None else flat if bias is None else bias + flat
