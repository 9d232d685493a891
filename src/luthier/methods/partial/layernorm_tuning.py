"""LayerNorm tuning: train the scales and shifts of the norms and nothing else.

    y = gamma * normed(x) + beta          gamma, beta: (d,) train; the rest does not

Nothing changes before the first step. RMS norms have a scale alone.

Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", arXiv:2211.08682;
also Zhao et al. 2023, arXiv:2312.11420, for models of images and text. The learning rate is ours.

Count: sum of the numbers of all norms; in BERT's blocks 4 d L, and outside them, with `outside`, the norm behind the
embedding (2 d) or behind the last block. RMS norms: 2 d L + d.
Claims: 0.03 % of BERT-large trained.
Use it when: the smallest file is wanted, or norms must follow another kind of text.
Not when: the task is far from what the model knows.
Pitfalls: norms that are no `nn.LayerNorm`, those of queries and keys in recent decoders, and the one behind the last
block are easily missed; decay pulls a scale towards zero and not towards 1, so there is none here.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError
from luthier.methods.parts.in_place import TrainsInPlace
from luthier.methods.parts.own_tensors import group_names, own_unfrozen
from luthier.surgery import METHODS, PEFT_LAYERS, Group, PeftForm, PeftIn, PeftOut, PeftTaken, PeftWhole, TunedView

_THERE = "ln_tuning_layers"
_OURS = "model/"


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors, paths = {}, []
    for name, value in going.stored.items():
        path, _, short = name.removeprefix(_OURS).rpartition(".")
        tensors[f"{PEFT_LAYERS}{path}.{_THERE}.{short}"] = value
        paths.append(path)
    return tensors, {"target_modules": list(dict.fromkeys(paths))}


def _back(coming: PeftIn) -> PeftTaken:
    held = {n.removeprefix(PEFT_LAYERS).replace(f".{_THERE}.", "."): t for n, t in coming.tensors.items()}
    for outside in (True, False):
        if set(held) == set(LayerNormTuning(outside=outside).tensors(coming.anatomy)):
            return PeftTaken({"outside": outside}, {f"{_OURS}{n}": t for n, t in held.items()})
    raise ConfigError(
        f"{coming.where}: {len(held)} tensors of norms; ours are all norms of the model, or all of its blocks. Train "
        "all of them."
    )


@METHODS.register("layernorm_tuning", family="partial", paper="arXiv:2211.08682")
@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(TrainsInPlace):
    """Settings of LayerNorm tuning."""

    outside: Annotated[bool, "also the norms outside the blocks: behind the embedding, behind the last block"] = True

    default_lr: ClassVar[float] = 4e-3
    peft: ClassVar[PeftForm | None] = PeftWhole("LN_TUNING", out=_out, back=_back)

    def groups(self, tuned: TunedView) -> list[Group]:
        return [Group(group_names(tuned, [u.parameter for u in own_unfrozen(self, tuned)]), weight_decay=0.0)]

    def tensors(self, anatomy: Anatomy) -> list[str]:
        heads, blocks = set(anatomy.head_tensors), tuple(f"{b.path}." for b in anatomy.blocks)
        names = [n for n in anatomy.norm_tensors() if n not in heads and (self.outside or n.startswith(blocks))]
        if not names:
            raise AnatomyError(
                f"layernorm_tuning: this {anatomy.model_type} model has no norm with numbers of its own. "
                "Use bitfit, ia3 or lora."
            )
        return names
