"""After a warm-up, learn those rows alone whose gradient is most like that of a few target rows (LESS).

    score(z) = max over parts of the target of  sum over looks of  rate * cos(grad l(part), G(z))
    G(z) = m' / (sqrt(v') + eps)         m' = (b1 m + (1 - b1) g) / (1 - b1^(t+1))       v' alike, of g^2 with b2

The `share` of the rows with the largest scores is kept. g is the gradient of row z alone, with Adam's moments m and v
after t updates: G is the way in which AdamW would go for it. grad l(part) is the mean over the rows of a part of the
set `target` (--also target=FILE): those of one class, or with `parts` = one, or without classes, all of them. Both are
of what trains in the model, of a LoRA its two matrices, without a new head. No dropout. With `project` = d, both are
first multiplied by a random matrix of signs / sqrt(d), (numbers, d), the same in all looks: products of two come out
within about sqrt(2 / d) times their lengths. 0, none: the exact ones.

The warm-up is one step at least. Looks are `looks`, at equal distances in it, the last of them at its end; where it has
fewer steps, one after each. From then on every step has as many rows as before, of those that are kept, each pass over
them shuffled anew.

Paper: arXiv:2402.04333. 5 % of the rows kept, 5 % for the warm-up, four looks, a LoRA of rank 128 and 8192 numbers of
the projection are quoted for it. There what is chosen is learnt from the base anew, in a run of its own, and features
are stored for further targets, which is what the projection saves room for; here the run goes on.

Neutral: warmup = 1.
Cost: a forward and backward pass of every row alone in each look; with `project`, as many multiplications again as
numbers times d for each row. A gradient of all that trains is held for each class of the target.
Claims: a twentieth of the rows, chosen for a task, teaches it as well as all of them do.
Pitfalls: classes do not get equal shares: of some all cosines are small, and their rows are dropped. On 600 questions
of trec6 with share = 0.3 two to four of six classes are never answered, by the seed (`python -m experiments.strategies
--only less`). Cosines of short texts are larger than those of long ones. Before much has been learnt most of a gradient
is what all rows share: give the warm-up some steps. By plain descent (no moments) G is g. Target rows are not learnt.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from luthier.core import at_least, between, key
from luthier.data.batches import Batch
from luthier.data.order import shuffled
from luthier.surgery import is_head
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy

AT_ONCE = 2048
"""Rows of the random matrix that are drawn at once: 64 MB at 8192 columns."""
BLOCK = 64
"""Gradients that are projected together, so that the signs are drawn once for all of them."""


@STRATEGIES.register("less", family="mixture", paper="arXiv:2402.04333")
@dataclass(frozen=True, kw_only=True)
class Less(Strategy):
    """Rows chosen by their influence on a target."""

    neutral: ClassVar[dict[str, Any] | None] = {"warmup": 1.0}
    sets: ClassVar[tuple[str, ...]] = ("target",)
    tiny: ClassVar[dict[str, Any]] = {"share": 0.3, "warmup": 0.5, "looks": 2, "project": 16}

    share: Annotated[float, "share of the rows that are kept", between(0.001, 1)] = 0.05
    warmup: Annotated[float, "share of the steps that learn all rows", between(0, 1)] = 0.1
    parts: Annotated[Literal["class", "one"], "the target is its classes, each with a mean, or one mean of all"] = (
        "class"
    )
    looks: Annotated[int, "times that all rows are scored", at_least(1)] = 1
    project: Annotated[int, "numbers that a gradient is projected to; 0, it stays as it is", at_least(0)] = 0

    def after_step(self, course: Course) -> None:
        course.memory.facts["rate"] = course.progress.share

    def before_step(self, course: Course) -> None:
        facts, last = course.memory.facts, max(1, int(self.warmup * course.total))
        looks = {-(-last * (i + 1) // self.looks) for i in range(self.looks)}
        if last >= course.total or course.step - 1 not in looks or facts.get("looked") == course.step:
            return
        facts["looked"] = course.step
        rows = course.rows.rows("train")
        found = facts["rate"] * self.scored(course, rows)
        held = course.memory.tensors
        held["scores"] = held["scores"] + found if "scores" in held else found
        if course.step - 1 == last:
            keep = max(1, round(self.share * len(rows)))
            scores = held["scores"].amax(0)
            best = np.lexsort((rows, -scores.numpy()))[:keep]
            held["kept"] = torch.from_numpy(np.sort(rows[best]))
            course.note("kept", keep)
            course.note("least", float(scores[int(best[-1])]))

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        if "kept" not in course.memory.tensors:
            return batches
        kept = course.memory.tensors["kept"].numpy()
        size = min(len(kept), sum(len(batch.rows) for batch in batches))
        per_pass = max(1, len(kept) // size)
        number, place = divmod(course.step - 1 - max(1, int(self.warmup * course.total)), per_pass)
        mixed = kept[shuffled(len(kept), course.seed, "less", number)]
        return course.cut(np.sort(mixed[place * size : (place + 1) * size]))

    def scored(self, course: Course, rows: NDArray[np.int64]) -> Tensor:
        """The cosine of each row with each part of the target, now: (parts, rows)."""
        aims = torch.stack([self._short(course, aim[None])[0] for aim in self._aims(course)])  # (parts, numbers)
        found: list[Tensor] = []
        waiting: list[Tensor] = []
        for i, slope in enumerate(self._slopes(course, rows), 1):
            waiting.append(self.adam(course, slope))
            if not self.project or len(waiting) == BLOCK or i == len(rows):
                ways = self._short(course, torch.stack(waiting))
                found.append(F.normalize(aims, dim=-1) @ F.normalize(ways, dim=-1).T)
                waiting = []
        return torch.cat(found, 1).cpu()

    def _aims(self, course: Course) -> list[Tensor]:
        """The mean gradient of each part of the target: (numbers,) each."""
        target = course.rows.rows("target")
        classes = [0] * len(target)
        if self.parts == "class":
            labels = [course.cut(np.asarray([row]))[0].labels for row in target]
            classes = [
                int(one) if one is not None and one.shape == (1,) and not one.is_floating_point() else 0
                for one in labels
            ]
        counts = Counter(classes)
        aims: dict[int, Tensor] = {}
        for slope, part in zip(self._slopes(course, target), classes, strict=True):  # each as large as all that trains
            aims[part] = aims.get(part, 0) + slope / counts[part]
        return [aims[part] for part in sorted(aims)]

    def adam(self, course: Course, slope: Tensor) -> Tensor:
        """Where AdamW would go for one row: (numbers,)."""
        optimiser = course.optimiser
        if not optimiser.keeps_moments:
            return slope
        beta1, beta2 = optimiser.spec.betas
        parts = []
        for name, g in zip(self._names(course), torch.split(slope, self._sizes(course)), strict=True):
            t = optimiser.counts[name] + 1
            none = torch.zeros_like(g)  # of a tensor that has lain still and forgot
            m, v = (table.get(name, none).reshape(-1).float() for table in (optimiser.first, optimiser.second))
            m = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
            v = (beta2 * v + (1 - beta2) * g.square()) / (1 - beta2**t)
            parts.append(m / (v.sqrt() + optimiser.spec.eps))
        return torch.cat(parts)

    def _names(self, course: Course) -> list[str]:
        names = [*course.weights()]
        return [name for name in names if not is_head(name)] or names

    def _sizes(self, course: Course) -> list[int]:
        return [course.weights()[name].numel() for name in self._names(course)]

    def _slopes(self, course: Course, rows: NDArray[np.int64]) -> Iterable[Tensor]:
        """The gradient of each row's mean loss, one after another: (numbers,)."""
        learns = [course.weights()[name] for name in self._names(course)]
        for row in rows:
            with course.still(), torch.enable_grad():
                batches = course.cut(np.asarray([row]))
                loss = torch.stack([course.forward(batch).loss for batch in batches]).sum()
                loss = loss / max(1, sum(batch.n_targets for batch in batches))
                parts = torch.autograd.grad(loss, learns, allow_unused=True)
            yield torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1).float()
                    for p, g in zip(learns, parts, strict=True)
                ]
            )

    def _short(self, course: Course, slopes: Tensor) -> Tensor:
        return projected(slopes, self.project, key(course.seed, "less")) if self.project else slopes


def projected(x: Tensor, d: int, seed: int) -> Tensor:
    """(rows, numbers) times a matrix of random signs over the root of d, which is named by the seed: (rows, d)."""
    found = x.new_zeros(len(x), d)
    for start in range(0, x.shape[1], AT_ONCE):
        part = x[:, start : start + AT_ONCE]
        generator = torch.Generator().manual_seed(key(seed, start))
        signs = torch.randint(2, (part.shape[1], d), generator=generator, dtype=torch.int8)
        found += part @ (2 * signs - 1).to(x)
    return found / math.sqrt(d)
