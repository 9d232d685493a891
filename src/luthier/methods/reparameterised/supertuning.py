"""Super-tuning: the largest entries of each weight train, and nothing else of it.

    y = x (W + D)^T + b      D: (d_out, d_in), zero but for the entries where |W| is largest

D starts at zero, so the tuned model starts as the base model. It stands beside the frozen weight, so a tuning is a list
of places and numbers.

"Super-Tuning", arXiv:2607.09287, in the form of peft 0.21, by magnitude. Its Supra, which has a LoRA beside it, is near
`magnitude_mask+lora` here and has no file form.

Count: sum over sites of (1 - sparsity) d_in d_out, rounded down; as many places are stored.
Claims: near full fine-tuning from a hundredth of the entries, chosen without data.
Use it when: a tuning must be small and of high rank.
Not when: memory counts in training: an update as large as the weight is made in every pass.
Pitfalls: the paper finds that which end is better, the largest or the smallest, depends on the model; `magnitude_mask`
chooses over all weights of the model at once, this one in each.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.anatomy import Anatomy, Site
from luthier.core import between
from luthier.methods.parts.peft_layers import shared_form
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.sparse import SparseUpdate, check_entries
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("supertuning", family="reparameterised", paper="arXiv:2607.09287")
@dataclass(frozen=True, kw_only=True)
class SuperTuning(AtProjections):
    """Settings of Super-tuning."""

    sparsity: Annotated[float, "share of a weight's entries that do not train", between(0, 1)] = 0.99
    which: Annotated[Literal["largest", "smallest"], "the entries that train, by size"] = "largest"

    start_is_drawn: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[dict[str, float]] = {"sparsity": 0.9, "lr": 2e-2}
    peft: ClassVar[PeftForm | None] = shared_form(
        "SUPERTUNING",
        {"values": "supertuning_values", "index": "supertuning_indices"},
        {},
        settings={"sparsity": "sparsity"},
        fixed={"r": None, "lora_alpha": None, "save_precomputed_indices": True},
        write=lambda method: {"select_top": method.which == "largest"},
        read=lambda facts: {"which": "largest" if facts.get("select_top", True) else "smallest"},
        also=("select_top",),
        ignored=("lora_dropout",),
        transposed=False,
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        return check_entries(sites, [self.params_at(site) for site in sites], "supertuning.sparsity")

    def params_at(self, site: Site) -> int:
        return int(site.d_in * site.d_out * (1 - self.sparsity))

    def n_stored(self, anatomy: Anatomy) -> int:
        return 2 * self.n_params(anatomy)

    def build(self, site: Site, base: Base) -> Attachment:
        scores = base.weight().detach().abs().flatten()
        chosen = scores.topk(self.params_at(site), largest=self.which == "largest").indices
        return SparseUpdate(chosen, site.d_in, site.d_out)
