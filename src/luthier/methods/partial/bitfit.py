"""BitFit: train the bias vectors and nothing else.

    y = x W^T + b          b trains; W does not

Every bias of the pretrained model trains, the shifts of its norms among them, and nothing else; nothing changes before
the first step. The biases of a head belong to the head.

Ben Zaken, Ravfogel, Goldberg 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv:2106.10199, section 3.

Count: sum of the lengths of all biases; in BERT's blocks L (7 d + m), and outside them, with `embeddings`, d for the
embedding norm and d for a pooler where there is one. With `subset`, the biases of attn.q and ffn.up: L (d + m), also
where one layer computes queries, keys and values together: a mask lets only the queries' part move.
Claims: 0.09 % of BERT-base trained, near full fine-tuning on small and medium data.
Use it when: the model has biases, rows are few, and a tuning should be tens of kilobytes and merge.
Not when: the model has no biases, as most decoders since Llama, or rows are many.
Pitfalls: a model without biases (T5, Llama) has nothing to train: refused, unless `add_missing_biases` gives each
linear layer of the blocks a new bias of zeros; the name `output.dense.bias` fits two layers of BERT's block; decay
pulls a bias towards zero and not towards its pretrained value, so there is none here; the key bias of softmax attention
without rotary has a gradient that is mathematically zero and does not move.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site, is_projection
from luthier.core import AnatomyError, ConfigError
from luthier.methods.parts.own_tensors import group_names, own_modules, own_unfrozen
from luthier.surgery import METHODS, Attachment, Edit, Group, Method, TunedView, Unfreeze, attach_each

_LINEAR = ("attn.q", "attn.k", "attn.v", "attn.o", "cross.q", "cross.k", "cross.v", "cross.o")
_FFN = ("ffn.gate", "ffn.up", "ffn.down")
_SUBSET = ("attn.q", "ffn.up")


@METHODS.register("bitfit", family="partial", paper="arXiv:2106.10199")
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Settings of BitFit."""

    subset: Annotated[bool, "only the biases of attn.q and ffn.up"] = False
    sites: Annotated[tuple[str, ...], "only the biases of these places, such as *@last4; none: all of them"] = ()
    embeddings: Annotated[bool, "also the biases outside the blocks: embedding norm, last norm, pooler"] = True
    add_missing_biases: Annotated[bool, "give linear layers without a bias a new one of zeros"] = False

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 4e-3
    trains_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.subset and self.sites:
            raise ConfigError(f"bitfit: subset names attn.q and ffn.up, and sites {', '.join(self.sites)}. Give one.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        names = self._names(anatomy)
        missing = self._missing(anatomy)
        if not names and not missing:
            raise AnatomyError(
                f"bitfit: this {anatomy.model_type} model has no bias to train. "
                "Set add_missing_biases=true, or use ia3, or lora."
            )
        yield from (Unfreeze(name, mask=_mask(anatomy, name, rows)) for name, rows in names.items())
        yield from attach_each(missing, lambda site, base: AddedBias(site.d_out))

    def n_params(self, anatomy: Anatomy) -> int:
        return self._held(anatomy) + sum(site.d_out for site in self._missing(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        """The biases; a part of one is stored with its places."""
        places = sum(len(rows) for rows in self._names(anatomy).values() if rows is not None)
        return self.n_params(anatomy) + places

    def groups(self, tuned: TunedView) -> list[Group]:
        biases = [u.parameter for u in own_unfrozen(self, tuned)] + [
            m.bias for m in own_modules(self, tuned, AddedBias)
        ]
        return [Group(group_names(tuned, biases), weight_decay=0.0)]

    def _names(self, anatomy: Anatomy) -> dict[str, tuple[int, ...] | None]:
        """Name of a bias -> which of its numbers train; None for all of them."""
        if self.subset or self.sites:
            found: dict[str, tuple[int, ...] | None] = {}
            for site in self._chosen(anatomy):
                if site.bias is not None:
                    name = f"{site.path}.{site.bias}"
                    name = anatomy.tied.get(name, name)
                    before = found.get(name, ())
                    found[name] = (
                        None if site.rows is None or before is None else tuple(sorted({*before, *site.rows.indices()}))
                    )
            return found
        blocks = tuple(f"{block.path}." for block in anatomy.blocks)
        inside = f"{anatomy.backbone}." if anatomy.backbone else ""
        return {n: None for n in anatomy.bias_tensors() if n.startswith(inside if self.embeddings else blocks)}

    def _held(self, anatomy: Anatomy) -> int:
        """Trained numbers of biases that the model has."""
        sizes = {n: torch.Size(anatomy.tensors[n]).numel() for n in self._names(anatomy)}
        return sum(sizes[n] if rows is None else len(rows) for n, rows in self._names(anatomy).items())

    def _missing(self, anatomy: Anatomy) -> list[Site]:
        if not self.add_missing_biases:
            return []
        if self.subset or self.sites:
            return [s for s in self._chosen(anatomy) if s.bias is None and is_projection(s)]
        present = [k for k in (*_LINEAR, *_FFN) if k in anatomy.kinds()]
        return [s for s in anatomy.sites(*present, asked_by="bitfit") if s.bias is None]

    def _chosen(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The places that `subset` or `sites` names."""
        chosen = self.sites or _SUBSET
        return anatomy.sites(*chosen, asked_by="bitfit.sites", fits=lambda site: site.layer is not None)


def _mask(anatomy: Anatomy, name: str, rows: tuple[int, ...] | None) -> Tensor | None:
    """True where a bias trains; None where all of it does."""
    if rows is None:
        return None
    mask = torch.zeros(anatomy.tensors[name], dtype=torch.bool)
    mask[list(rows)] = True
    return mask


class AddedBias(Attachment):
    """Adds a vector to the output of a layer that has no bias."""

    kind = "delta"
    needs_input = False

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias if bias is None else bias + self.bias
