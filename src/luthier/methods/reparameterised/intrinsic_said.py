"""Intrinsic SAID: the whole model moves inside one random subspace, each layer by its own measure.

    theta_j = theta_j(0) + lambda_j P_j(z)      z: (dimension - M,), shared    lambda: (M,)    P_j: frozen, random

z starts at zero and lambda at one, so the tuned model starts as the base model. P_j is a Fastfood projection, drawn
anew for every tensor j from (subspace, name of the tensor); it is made again at loading and never stored.

Aghajanyan, Zettlemoyer, Gupta 2020, "Intrinsic Dimensionality Explains the Effectiveness of Language Model
Fine-Tuning", arXiv:2012.13255, section 3. The paper has one lambda per layer (here: one per block, and one for all
that lies outside the blocks), the authors' code one per tensor; `share="none"` is the variant without (DID). A tensor
shorter than z is reached by all of z here, not by its first numbers only.

Count: exactly `dimension`, whatever the model; M of it are lambdas.
Claims: a few hundred to a few thousand numbers reach 90 % of full fine-tuning's quality.
Cost: every pass projects z onto the whole model and back, N log N for N numbers, whatever the batch: nine steps of
LoRA on short rows, three on long ones (docs/benchmarks.md).
Use it when: the question is how few directions a task needs, or a tuning must be a few thousand numbers.
Not when: time counts: every step computes a projection of the whole model.
Pitfalls: a backward transform divided by sqrt(N) makes wrong gradients; one seed for all tensors makes their updates
copies of each other; a rate of 1e-2 learns one batch and never the rows (every tensor moves as far as z, biases
too); computing an update of the whole model costs its size in time and memory at every pass, so large
models are out of reach.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, at_least
from luthier.methods.parts.hadamard import Projection
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.surgery import METHODS, Edit, Group, Method, Reparametrise, TunedView


@METHODS.register("intrinsic_said", family="reparameterised", paper="arXiv:2012.13255")
@dataclass(frozen=True, kw_only=True)
class IntrinsicSAID(Method):
    """Settings of intrinsic SAID."""

    dimension: Annotated[int, "trained numbers in all, the lambdas among them", at_least(2)] = 2000
    share: Annotated[Literal["layer", "tensor", "none"], "what has a lambda of its own"] = "layer"
    subspace: Annotated[int, "which random subspace: any whole number"] = 0

    mergeable: ClassVar[bool] = True
    computes_tensors: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-3
    default_head_lr: ClassVar[float | None] = 1e-2
    tiny: ClassVar[dict[str, float]] = {"dimension": 600, "lr": 1e-2}
    trains_base: ClassVar[bool] = True

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        owner = self._owner(anatomy)
        m = len(set(owner.values())) if self.share != "none" else 0
        if self.dimension <= m:
            raise ConfigError(
                f"intrinsic_said.dimension: {self.dimension} leaves nothing beside the {m} lambdas of this "
                f"{anatomy.model_type} model; set it above {m}."
            )
        subspace, scales = Subspace(self.dimension - m), Scales(m)
        shared: dict[str, nn.Module] = {"subspace": subspace} | ({"lambda": scales} if m else {})
        places = {who: i for i, who in enumerate(dict.fromkeys(owner.values()))}
        for name in owner:
            shape = torch.Size(anatomy.tensors[name])
            projection = Projection(self.dimension - m, shape.numel(), self.subspace, "intrinsic_said", name)
            moved = Moved(subspace, scales, places[owner[name]] if m else None, projection)
            yield Reparametrise(name, moved, shared=shared)

    def n_params(self, anatomy: Anatomy) -> int:
        return self.dimension

    def groups(self, tuned: TunedView) -> list[Group]:
        lambdas = [m.values for m in own_modules(self, tuned, Scales)]
        return [Group(group_names(tuned, lambdas), decay_to=1.0)] if lambdas else []

    def _owner(self, anatomy: Anatomy) -> dict[str, str]:
        """Every tensor below the head -> what its lambda belongs to."""
        heads = set(anatomy.head_tensors)
        owner = {}
        for name in anatomy.tensors:
            if name not in heads:
                block = next((b.path for b in anatomy.blocks if name.startswith(f"{b.path}.")), "")
                owner[name] = name if self.share == "tensor" else block
        return owner


class Subspace(nn.Module):
    """Holds z."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(size))


class Scales(nn.Module):
    """Holds the lambdas."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(size))


class Moved(nn.Module):
    """A tensor of the model, moved by `lambda P(z)`."""

    def __init__(self, subspace: Subspace, scales: Scales, place: int | None, projection: Projection) -> None:
        super().__init__()
        # Shared by all tensors and registered once, elsewhere.
        self.__dict__["subspace"], self.__dict__["scales"] = subspace, scales
        self.place = place
        self.projection = projection

    def forward(self, frozen: Tensor) -> Tensor:
        update = self.projection(self.__dict__["subspace"].z)
        if self.place is not None:
            update = update * self.__dict__["scales"].values[self.place]
        moved: Tensor = frozen + update.view(frozen.shape)
        return moved
