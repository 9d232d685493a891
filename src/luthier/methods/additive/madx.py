"""MAD-X: language and task adapters in a stack, and an invertible map of the embeddings, undone before the last layer.

    v = LN(s + u)     s <- s + A_language(v)     v = LN(s + u)     s <- s + A_task(v)          A: bottlenecks

    x = [x1, x2], embedded words:     y1 = x1 + F(x2)     y2 = x2 + G(y1)
    undone:                           x2 = y2 - G(y1)     x1 = y1 - F(x2)

part=language trains the language adapters and the map, on plain text. part=task stacks task adapters on a language's,
which is named with --source and frozen, and trains those. A source that is a task's tuning brings its task adapters;
naming another language behind it swaps the language: `sources=[task, language]`. The map acts behind the norm of the
embeddings, where there is one; it is undone where the output words are the embedding's own table.

Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer", arXiv:2005.00052,
section 4. Each adapter reads the normed stream that the one before leaves, as AdapterHub's code does.

Count: language, per block 2 d r + r + d with r = d / 2, and F and G, each 2 (d / 2)(d / 4) + d / 4 + d / 2; task, per
block the same with r = d / 16.
Claims: a task learnt in one language answers in another whose adapters were trained on its text alone.
Cost: the language's bottlenecks are wide: d / 2 a block, and run in answers too.
Use it when: a task has rows in one language and is asked in others.
Not when: one language is meant: pfeiffer_adapter.
Pitfalls: without the inverse the output words are scored in another space; a language must not train in the task's run.
The paper trains languages as masked language models: no such task is offered in runs here, so train an encoder's
language in a loop of your own, or a decoder's in a run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, at_least
from luthier.methods.parts.adopted import agreed, own_sites
from luthier.methods.parts.behind import Behind, behind_sites, closing_norm, reduced
from luthier.methods.parts.own_tensors import own_tunings
from luthier.surgery import METHODS, Attach, Attachment, Base, Edit, Method, Source, TunedView, attach_each


@METHODS.register("madx", family="additive", paper="arXiv:2005.00052")
@dataclass(frozen=True, kw_only=True)
class MADX(Method):
    """Settings of MAD-X."""

    part: Annotated[Literal["language", "task"], "what trains"] = "language"
    language_reduction: Annotated[
        int | None,
        "how many times narrower than the stream a language adapter is; left out, 2 or the source's",
        at_least(1),
    ] = None
    task_reduction: Annotated[int | None, "of a task adapter; left out, 16 or the source's", at_least(1)] = None
    invertible: Annotated[bool, "also map the embeddings"] = True

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-4
    sources: ClassVar[tuple[str, ...]] = ("madx",)
    tiny: ClassVar[dict[str, int]] = {"language_reduction": 4, "task_reduction": 8}

    @property
    def least_sources(self) -> int:  # type: ignore[override]
        """A task stands on a language; a language on nothing."""
        return 1 if self.part == "task" else 0

    def fitted(self, sources: Sequence[Source]) -> Self:
        if self.part == "language" and sources:
            raise ConfigError(
                f"madx: part=language is made of nothing, and {sources[0].folder} is named. Did you mean part=task?"
            )
        language = agreed(self, sources, "language_reduction") if sources else self.language_reduction
        for source in sources:
            if source.settings.get("invertible") != self.invertible:
                raise ConfigError(
                    f"madx: invertible={self.invertible}, and {source.folder} was trained with "
                    f"invertible={source.settings.get('invertible')}. Say the same here."
                )
        tasks = [source for source in sources if source.settings.get("part") == "task"]
        task = agreed(self, tasks, "task_reduction") if tasks else self.task_reduction
        return replace(self, language_reduction=language or 2, task_reduction=task or 16)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.part == "task" and self.language_reduction is None:
            raise ConfigError(
                "madx: part=task stands on a language. Name its tuning: --source runs/language, or attach(..., "
                "sources=[...])."
            )
        sites = behind_sites(anatomy, (), "madx")
        norms = {site.key: closing_norm(anatomy, site, "madx") for site in sites}
        yield from attach_each(sites, lambda site, base: Stack(self, base, norms[site.key]))
        if not self.invertible:
            return
        places = self._embedded(anatomy)
        coupling = Coupling(places[0].d_out).requires_grad_(self.part == "language")
        yield from attach_each(places, lambda site, base: Mapped(coupling), shared={"invertible": coupling})
        for head in self._tied_heads(anatomy):
            yield Attach(head, lambda base: Unmapped(coupling), {"invertible": coupling})

    def n_params(self, anatomy: Anatomy) -> int:
        sites = behind_sites(anatomy, (), "madx")
        widths = ((s.d_out, self.width(s, self.part)) for s in sites)
        total = sum(2 * d * r + r + d for d, r in widths)
        return total + (self._mapped_numbers(anatomy) if self.part == "language" else 0)

    def n_stored(self, anatomy: Anatomy) -> int:
        if self.part == "language":
            return self.n_params(anatomy)
        widths = ((s.d_out, self.width(s, "language")) for s in behind_sites(anatomy, (), "madx"))
        return self.n_params(anatomy) + sum(2 * d * r + r + d for d, r in widths) + self._mapped_numbers(anatomy)

    def width(self, site: Site, part: str) -> int:
        """Width of the bottlenecks of a language, or of a task."""
        return reduced(site, (self.language_reduction or 2) if part == "language" else (self.task_reduction or 16))

    def _mapped_numbers(self, anatomy: Anatomy) -> int:
        if not self.invertible:
            return 0
        d = self._embedded(anatomy)[0].d_out
        a, b, q = d // 2, d - d // 2, max(1, d // 4)
        return (b * q + q + q * a + a) + (a * q + q + q * b + b)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        maps = [m for t in own_tunings(self, tuned) for m in t.modules_by_key().values() if isinstance(m, Coupling)]
        for source in sources:
            for key, stack in own_sites(self, tuned, Stack):
                # A language's tuning has no task adapters, and leaves those of a source before it alone.
                stack.load_state_dict(source.part(key), strict=source.settings["part"] == "task")
            for coupling in maps:
                coupling.load_state_dict(source.part("invertible"))

    def _embedded(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Where embedded words leave: behind the norm of the embeddings, or at the table."""
        tables = anatomy.sites("embed", asked_by="madx")
        norms = {s.stack: s for s in anatomy.all_sites if s.kind == "norm" and s.layer is None and s.part == "embed"}
        return tuple(norms.get(table.stack, table) for table in tables)

    def _tied_heads(self, anatomy: Anatomy) -> list[Site]:
        heads, width = [s for s in anatomy.all_sites if s.kind == "head" and s.tied], self._embedded(anatomy)[0].d_out
        for head in heads:
            if head.d_in != width:
                raise AnatomyError(
                    f"madx: the output words of this {anatomy.model_type} model read {head.d_in} numbers, and its "
                    f"embeddings leave {width}, so the map cannot be undone there. Use invertible=false."
                )
        return heads


class Stack(Attachment):
    """The adapters of one block: the language's, then the task's, if there is one."""

    kind = "sequential"
    reads = "residual"

    def __init__(self, settings: MADX, base: Base, norm: str) -> None:
        super().__init__()
        self.language = Behind(base, norm, settings.width(base.site, "language"), "relu")
        self.task: Behind | None = None
        if settings.part == "task":
            self.language.requires_grad_(False)
            self.task = Behind(base, norm, settings.width(base.site, "task"), "relu")

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.language.after(x, y)
        return y if self.task is None else self.task.after(x, y)


class Coupling(nn.Module):
    """A map of d numbers that can be undone exactly: each half moves by a function of the other."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.first, q = d // 2, max(1, d // 4)
        second = d - self.first
        self.f = nn.Sequential(nn.Linear(second, q), nn.ReLU(), nn.Linear(q, self.first))
        self.g = nn.Sequential(nn.Linear(self.first, q), nn.ReLU(), nn.Linear(q, second))
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., d)."""
        one, two = self._halves(x)
        one = one + self.f(two)
        return torch.cat([one, two + self.g(one)], dim=-1).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """x, of `forward(x)`. y: (..., d) -> (..., d)."""
        one, two = self._halves(y)
        two = two - self.g(one)
        return torch.cat([one - self.f(two), two], dim=-1).to(y.dtype)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(next(self.parameters()).dtype)  # shared: no site's precision is its own
        return x[..., : self.first], x[..., self.first :]


class Mapped(Attachment):
    """Maps what the embedding gives."""

    kind = "sequential"

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self.__dict__["coupling"] = coupling  # registered once, on the tuning

    def after(self, x: Any, y: Tensor) -> Tensor:
        out: Tensor = self.__dict__["coupling"](y)
        return out


class Unmapped(Attachment):
    """Undoes the map before the output words are scored."""

    kind = "sequential"

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self.__dict__["coupling"] = coupling

    def before(self, x: Tensor) -> Tensor:
        out: Tensor = self.__dict__["coupling"].inverse(x)
        return out
