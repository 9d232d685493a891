"""(IA)³: three learned vectors per block rescale keys, values and inner feed-forward activations.

    k = l_k * (x W_k^T + b_k)      v = l_v * (x W_v^T + b_v)      ffn = (l_ff * h) W_down^T + b_down

The vectors start at one, so the tuned model starts as the base model.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3. Its extra losses belong to its recipe, T-Few, and not to this method.

Count: L (2 d + m); with grouped key-value heads, their width for the first two.
Claims: a few tens of thousands of numbers, merged exactly, no cost at inference.
Use it when: the tuning must be tiny, or many of them answer one batch; it merges, and needs few rows.
Not when: the task is far from what the model knows: it can only scale what is there.
Pitfalls: merging must scale the biases of k and v too; decay has to pull towards one, not towards zero; keys are
scaled before rotary angles; for a gated feed-forward layer the scaled vector is what ffn.down reads; a pattern such as
"output.dense" would match BERT's attention output too and train L (3 d + m).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy, Site, is_projection, joined
from luthier.core import AnatomyError, ConfigError
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.methods.parts.scales import RescaleInput, RescaleOutput, Scales
from luthier.surgery import METHODS, Edit, Group, Method, TunedView, attach_each


@METHODS.register("ia3", family="additive", paper="arXiv:2205.05638")
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Settings of (IA)³."""

    outputs: Annotated[tuple[str, ...], "sites whose output is rescaled"] = ("attn.k", "attn.v")
    inputs: Annotated[tuple[str, ...], "sites whose input is rescaled"] = ("ffn.down",)
    cross: Annotated[bool, "also the keys and values of cross-attention, where there is one"] = True

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        if not self.outputs and not self.inputs:
            raise ConfigError("ia3: outputs and inputs name no place, so nothing would train. Name one, or use lora.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(self._outputs(anatomy), lambda site, base: RescaleOutput(site.d_out))
        yield from attach_each(self._inputs(anatomy), lambda site, base: RescaleInput(site.d_in))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(s.d_out for s in self._outputs(anatomy)) + sum(s.d_in for s in self._inputs(anatomy))

    def groups(self, tuned: TunedView) -> list[Group]:
        return [Group(group_names(tuned, [m.scale for m in own_modules(self, tuned, Scales)]), decay_to=1.0)]

    def _outputs(self, anatomy: Anatomy) -> tuple[Site, ...]:
        kinds = joined(self.outputs)
        if self.cross and anatomy.is_encoder_decoder:
            # Cross-attention stands in the decoder only.
            kinds += [k.replace("attn.", "cross.") for k in kinds if k.startswith("attn.") and "@encoder" not in k]
        found = anatomy.sites(*kinds, asked_by="ia3.outputs", fits=is_projection) if kinds else ()
        for site in found:
            if site.kind in ("embed", "norm"):
                raise AnatomyError(f"ia3.outputs: {site.key} is no projection, nor a sublayer's end. Leave it out.")
            if site.expert is not None and site.bias is not None:
                raise AnatomyError(
                    f"ia3.outputs: {site.key} has a bias inside its expert, which is not rescaled. Leave it out."
                )
        return found

    def _inputs(self, anatomy: Anatomy) -> tuple[Site, ...]:
        found = anatomy.sites(*self.inputs, asked_by="ia3.inputs", fits=is_projection) if self.inputs else ()
        for site in found:
            if site.kind in ("embed", "norm") or site.kind.endswith("_out"):
                raise AnatomyError(
                    f"ia3.inputs: {site.key} is no projection; only what a projection reads is rescaled."
                )
        return found
