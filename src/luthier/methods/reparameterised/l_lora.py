"""L-LoRA: LoRA to first order around its start, so that what several tunings learned can be added up.

    dW = (alpha / rank) ((B - B0) A0 + B0 (A - A0))            A: (rank, d_in)    B: (d_out, rank)

    scope=layer    y = x (W + dW)^T + b      each module replaced by its own linearisation
    scope=model    h(x) = h0(x) + the derivative of h0 along the dW of all sites      h0: the base's last hidden states

B starts at zero, so the tuned model starts as the base model, and the term of A's movement is zero for ever: A stays as
drawn. By layer that is the function of `lora_fa`. With `start=svd`, `minor` or `qr` both start in the weight, and
`train_a=true` lets both move.

Tang et al. 2023, "Parameter Efficient Multi-task Model Fusion with Partial Linearization", arXiv:2310.04742, section 4:
the paper's linearisation is that of the model, the released code's that of each module. By `model` the last hidden
states are affine in what trains, and so are logits that are one matrix times them; a head reads the sum, whatever it
makes of it, and is not linearised itself.

Count: sum over sites of rank * d_out; the paper counts A's rank * d_in too, which never move.
Claims: tunings of several tasks add up with less interference, since each is affine in what it learned.
Use it when: several tunings of one base are to be added up. Use scope=layer where they must merge into the weights.
Not when: one task is all there is: `lora` can leave its tangent space, and costs less than scope=model.
Pitfalls: sums of tunings make sense from one start only: give all of them the same seed. scope=model carries a
derivative beside every state, with torch's plain attention and without activation checkpointing: about twice the time
and memory of a pass; it has no form in the weights nor in peft's files, stands beside no other method, and takes one
text, so no encoder-decoder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, NumberBySite, Site, WholeBySite
from luthier.core import AnatomyError, CannotMerge, ConfigError, above, at_least
from luthier.methods.parts.low_rank import MovedUpdate, ThinUpdate
from luthier.methods.parts.row_starts import FromRows
from luthier.methods.reparameterised.lora import LoRA
from luthier.surgery import METHODS, Attachment, Base, Edit, Linearise, Method, move, value_of

_BOTH_MOVE = ("svd", "minor", "qr")


@METHODS.register("l_lora", family="reparameterised", paper="arXiv:2310.04742")
@dataclass(frozen=True, kw_only=True)
class LLoRA(LoRA):
    """Settings of L-LoRA."""

    rank: Annotated[int | WholeBySite, "width of the two thin matrices; by place: 8, attn.q@0: 16", at_least(1)] = 16
    alpha: Annotated[float | NumberBySite, "the update is scaled by alpha / rank", above(0)] = 32.0
    train_a: Annotated[bool, "A learns too; start=svd, minor or qr only"] = False
    scope: Annotated[Literal["layer", "model"], "each module to first order by itself, or the model as a whole"] = (
        "layer"
    )

    tiny: ClassVar[dict[str, Any]] = {"rank": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mergeable", self.scope == "layer")
        if self.train_a and self.start not in _BOTH_MOVE:
            raise ConfigError(
                f"l_lora.train_a: true with start={self.start}, and to first order around it A has no gradient, or A "
                f"and B are not kept apart. Leave it out, or use start={', '.join(_BOTH_MOVE)}."
            )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        if self.scope == "model":
            for site in sites:
                if site.kind == "head" or site.expert is not None:
                    what = "lies behind the last hidden states" if site.kind == "head" else "is an expert's weight"
                    raise AnatomyError(f"l_lora.sites: {site.key} {what}. Leave it out, or use scope=layer.")
        return sites

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.scope == "model":
            yield Linearise()
        yield from super().edits(anatomy)

    def conflicts(self, other: Method) -> str | None:
        if self.scope == "model":
            return f"scope=model takes a derivative through the model alone, not through {other.name}. Use scope=layer."
        return None

    @classmethod
    def lends(cls, settings: Mapping[str, Any]) -> str | None:
        return "acts to first order of the whole model" if settings.get("scope") == "model" else None

    def build(self, site: Site, base: Base) -> Attachment:
        kinds = (ThinUpdate, Around, FromRows) if self.scope == "layer" else (AlongThin, AlongAround, AlongRows)
        made: Attachment = self.update_at(site, base, kinds)
        return made


class Around(MovedUpdate):
    """Adds `scale * ((B - B0) A0 + B0 (A - A0)) x`."""

    def thin(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.a0, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], 1)


class _Along(ThinUpdate):
    """The update as a derivative: it goes along with what the layer gives, and changes no value."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.thin()
        seen = self.dropout(value_of(x), self.training)
        return move(y, (seen @ a.T @ b.T) * self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise CannotMerge("l_lora: scope=model is a derivative of the model, and no weights do the same. Use layer.")

    def fused(self, base: Base, x: Tensor) -> None:
        """None: a derivative goes along."""

    def still(self, base: Base) -> None:
        """None: a derivative goes along."""

    @classmethod
    def together(cls, members: Any, dtype: torch.dtype) -> None:
        """None: a pass to first order is that of all rows."""


class AlongThin(_Along, ThinUpdate):
    """From zero."""


class AlongAround(_Along, Around):
    """From parts of the weight."""


class AlongRows(_Along, FromRows):
    """From where rows say."""
