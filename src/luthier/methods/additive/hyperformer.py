"""HyperFormer: one small network writes the adapters of every layer, for each task from a vector of that task.

    I = LN(MLP([z_task ; e_layer]))          share=all: [z_task ; e_layer ; e_position]          I: (t,)

    s <- s + γ LNorm(W_u σ(W_d s + b_d) + b_u) + β          W_d, b_d, W_u, b_u, γ, β: linear in I

s is what attention, and again what the feed-forward layer, gives; LNorm subtracts the mean and divides by the spread.
Every row of a batch has the adapters of its own task. The networks that write adapters are one for each position, or
one for both (share=all, hyperformer_pp). γ and β start near zero, so the model starts near the base.

Karimi Mahabadi et al. 2021, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
arXiv:2106.04489, section 2; in the form of the authors' code.

Count: per stack, (q (n e + 1) + t (q + 1)) + 2 t + P (t + 1) (2 d r + r + d + 2 d) + L e, with n = 2, P = 2, or n = 3,
P = 1 and 2 e more for share=all; e for each task; the norms of the blocks.
Claims: better than an adapter for each task at a fraction of the numbers, where tasks have something in common.
Cost: the adapters are written anew in every pass: a fifth to a third more than LoRA's step.
Use it when: several tasks train together and a new one should cost a vector.
Not when: there is one task: an adapter of its own is smaller and faster.
Pitfalls: γ, not 1 + γ; every task needs rows in training: `--row-task COLUMN` says which row is of which. The paper
draws single-task batches with p ~ n^(1/10): here batches are drawn from all rows, and may mix tasks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import at_least
from luthier.methods.parts.behind import reduced
from luthier.methods.parts.bottleneck import check_sublayers
from luthier.surgery import METHODS, Attachment, Edit, Method, Unfreeze, attach_each


@METHODS.register("hyperformer", family="additive", paper="arXiv:2106.04489")
@dataclass(frozen=True, kw_only=True)
class HyperFormer(Method):
    """Settings of HyperFormer."""

    tasks: Annotated[int | None, "how many tasks there are; left out, as many as the rows say", at_least(1)] = None
    reduction: Annotated[int, "how many times narrower than the stream the bottlenecks are", at_least(1)] = 32
    share: Annotated[Literal["position", "all"], "a network for each position, or one for both"] = "position"
    embedding: Annotated[int, "width of the vectors of tasks, layers and positions", at_least(1)] = 64
    hidden: Annotated[int, "width inside the network that mixes them", at_least(1)] = 128
    mixed: Annotated[int, "width of what it gives", at_least(1)] = 64
    train_norms: Annotated[bool, "also train the norms of the blocks"] = True

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-4
    trains_base: ClassVar[bool] = True
    reads_rows: ClassVar[tuple[str, ...]] = ("task",)
    tiny: ClassVar[dict[str, int]] = {"reduction": 8, "embedding": 5, "hidden": 7, "mixed": 6}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self._sites(anatomy)
        tasks = nn.Embedding(self.tasks or 1, self.embedding)
        writers = {stack: Writer(self, anatomy, stack) for stack in dict.fromkeys(s.stack for s in sites)}
        for stack, writer in writers.items():
            shared = {"tasks": tasks, f"writer{stack and '/'}{stack}": writer}
            yield from attach_each(
                [s for s in sites if s.stack == stack],
                lambda site, base, w=writer: Written(w, tasks, site),  # type: ignore[misc]
                shared=shared,
            )
        yield from (Unfreeze(name) for name in self._norms(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        e, q, t = self.embedding, self.hidden, self.mixed
        sites = self._sites(anatomy)
        total = (self.tasks or 1) * e + sum(anatomy.tensors[name][0] for name in self._norms(anatomy))
        for stack in dict.fromkeys(s.stack for s in sites):
            here = [s for s in sites if s.stack == stack]
            d, r = here[0].d_out, reduced(here[0], self.reduction)
            inputs, sets = (3, 1) if self.share == "all" else (2, 2)
            network = inputs * e * q + q + q * t + t + 2 * t
            written = sets * (t + 1) * (2 * d * r + r + 3 * d)
            total += network + written + anatomy.depths[stack] * e + (2 * e if self.share == "all" else 0)
        return total

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return check_sublayers(
            anatomy.sites("attn_out", "ffn_out", asked_by="hyperformer", fits=is_sublayer), "hyperformer"
        )

    def _norms(self, anatomy: Anatomy) -> list[str]:
        if not self.train_norms:
            return []
        stacks = {s.stack for s in self._sites(anatomy)}
        paths = {s.path for s in anatomy.all_sites if s.kind == "norm" and s.layer is not None and s.stack in stacks}
        return [n for n in anatomy.norm_tensors() if n.rpartition(".")[0] in paths]


class Writer(nn.Module):
    """The networks of one stack: from a task's vector and a place to the numbers of an adapter."""

    def __init__(self, settings: HyperFormer, anatomy: Anatomy, stack: str) -> None:
        super().__init__()
        site = next(s for s in anatomy.all_sites if s.kind == "attn_out" and s.stack == stack)
        self.d, self.r = site.d_out, reduced(site, settings.reduction)
        e, t, every = settings.embedding, settings.mixed, settings.share == "all"
        self.layers = nn.Embedding(anatomy.depths[stack], e)
        self.positions = nn.Embedding(2, e) if every else None
        self.mix = nn.Sequential(
            nn.Linear((3 if every else 2) * e, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, t)
        )
        self.norm = nn.LayerNorm(t)
        d, r = self.d, self.r
        self.sizes = {"down": r * d, "down_bias": r, "up": d * r, "up_bias": d, "scale": d, "shift": d}
        self.sets = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(t, n) for name, n in self.sizes.items()}) for _ in range(1 if every else 2)
        )
        for layer in (layer for one in self.sets for layer in one.values()):  # type: ignore[operator]
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, layer: int, position: int) -> dict[str, Tensor]:
        """The adapters at one place. z: (tasks, e) -> numbers by name, (tasks, ...)."""
        where = [self.layers.weight[layer].expand(len(z), -1)]
        if self.positions is not None:
            where.append(self.positions.weight[position].expand(len(z), -1))
        mixed = self.norm(self.mix(torch.cat([z, *where], dim=-1)))  # (tasks, t)
        one = self.sets[0 if self.positions is not None else position]
        made: dict[str, Tensor] = {name: one[name](mixed) for name in self.sizes}  # type: ignore[index]
        # (tasks, r d) -> (tasks, r, d), and (tasks, d r) -> (tasks, d, r)
        shapes = {"down": (-1, self.r, self.d), "up": (-1, self.d, self.r)}
        return {name: value.view(shapes[name]) if name in shapes else value for name, value in made.items()}


class Written(Attachment):
    """The adapters of one place, one for each task; each row has that of its own."""

    kind = "sequential"
    needs_input = False

    def __init__(self, writer: Writer, tasks: nn.Embedding, site: Site) -> None:
        super().__init__()
        # Registered once, on the tuning, which trains and saves them.
        self.__dict__["writer"], self.__dict__["tasks"] = writer, tasks
        self.layer, self.position = site.layer or 0, 0 if site.kind == "attn_out" else 1

    def adapters(self, picked: Tensor) -> dict[str, Tensor]:
        """The numbers of the adapters of some tasks. picked: (n,) -> (n, ...)."""
        tasks: nn.Embedding = self.__dict__["tasks"]
        made: dict[str, Tensor] = self.__dict__["writer"](tasks(picked), self.layer, self.position)
        return made

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        row = self.context.row("task").to(y.device)
        picked, of_row = torch.unique(row, return_inverse=True)  # each adapter is written once
        own = self.adapters(picked)
        # What is shared has no site whose precision it could follow. (rows, n, d); some models flatten rows and tokens
        s = y.to(own["down"].dtype).reshape(len(row), -1, y.shape[-1])
        mine = {name: value[of_row] for name, value in own.items()}  # (rows, ...)
        hidden = nn.functional.gelu(s @ mine["down"].transpose(1, 2) + mine["down_bias"][:, None])  # (rows, n, r)
        wide = hidden @ mine["up"].transpose(1, 2) + mine["up_bias"][:, None]  # (rows, n, d)
        normed = nn.functional.layer_norm(wide, wide.shape[-1:])
        branch = normed * mine["scale"][:, None] + mine["shift"][:, None]
        return y + branch.reshape(y.shape).to(y.dtype)  # as y came
