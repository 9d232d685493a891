"""OSF: the small singular directions of a weight train, and may not turn into the large ones.

    y = x (W + U diag(s) V - U_0 diag(s_0) V_0)^T + b      U_0 diag(s_0) V_0: W without its `kept` leading directions

U: (d_out, rest), s: (rest,), V: (rest, d_in) start at U_0, s_0, V_0, so the tuned model starts as the base model. What
lies in the kept directions is taken out of a gradient of U or V: g - U_h U_h^T g, and the same for V from the right.

"Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning" 2025, arXiv:2504.07097. The form is
that of peft 0.21; choosing how much each layer keeps by its importance is left to `sites` and several parts.

Count: sum over sites of rest (d_in + d_out + 1), rest = min(d_in, d_out) - kept.
Claims: learns a new task with less loss of the old ones than full fine-tuning.
Cost: in every pass a branch of twice the trained directions, by default two products as large as the weight's; each
gradient of U and V also goes through the kept frames.
Measured: `python -m experiments.rates osf`, 300 questions of trec6 that the table does not score: 0.93, and 0.92 with
`--seed 1`. The rate is ours; at 1e-4, the default before, runs of luthier's own length ended before they had learnt:
0.79 and 0.68 on the table's rows.
Use it when: several tasks come one after the other and the first may not suffer.
Not when: a tuning must be small: with half of the directions kept it holds more numbers than the weight.
Pitfalls: an optimiser that scales each number by itself, as Adam does, leaves the subspace again a little; the start is
a full decomposition of every weight; a quantised base is refused.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.principal import principal
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("osf", family="reparameterised", paper="arXiv:2504.07097")
@dataclass(frozen=True, kw_only=True)
class OSF(AtProjections):
    """Settings of OSF."""

    kept: Annotated[float, "leading directions that stay: a share below 1, or their number", above(0)] = 0.5

    start_is_drawn: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-4
    tiny: ClassVar[dict[str, float]] = {"kept": 0.75, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "OSF",
        {f"osf_svd_params.{theirs}": ours for ours, theirs in (("u", "U_low"), ("s", "S_low"), ("v", "V_low"))},
        write=lambda method: {"effective_rank": method.kept if method.kept < 1 else int(method.kept)},
        read=lambda facts: {"kept": _kept(facts.get("effective_rank"))},
        also=("effective_rank",),
        silent=("target_svd_config",),
        transposed=False,
    )

    def __post_init__(self) -> None:
        if self.kept > 1 and self.kept != int(self.kept):
            raise ConfigError(f"osf.kept: {self.kept:g} is neither a share below 1 nor a whole number. Give either.")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            most = min(site.d_in, site.d_out)
            if not 0 < self.kept_at(site) < most:
                raise ConfigError(
                    f"osf.kept: {self.kept:g} leaves {most - self.kept_at(site)} of the {most} directions of "
                    f"{site.key} to train, and {self.kept_at(site)} to keep. Set a share such as 0.5."
                )
        return sites

    def kept_at(self, site: Site) -> int:
        """How many directions of a site stay."""
        return int(self.kept * min(site.d_in, site.d_out)) if self.kept < 1 else int(self.kept)

    def params_at(self, site: Site) -> int:
        return (min(site.d_in, site.d_out) - self.kept_at(site)) * (site.d_in + site.d_out + 1)

    def build(self, site: Site, base: Base) -> Attachment:
        return SmallDirections(base, self.kept_at(site))


def _kept(rank: Any) -> float:
    """Ours for peft's rank: nothing for the half, a fraction, or a number."""
    if rank is None:
        return 0.5
    if isinstance(rank, float) and rank >= 1:
        raise ConfigError(f"effective_rank is {rank:g}, which keeps every direction, and nothing would train.")
    return float(rank)


class SmallDirections(Thin):
    """Adds `(U diag(s) V - U_0 diag(s_0) V_0) x`. The frames that stay follow from the base and are not stored."""

    reads_base_weight = True
    u0: Tensor
    s0: Tensor
    v0: Tensor
    u_kept: Tensor
    v_kept: Tensor

    def __init__(self, base: Base, kept: int) -> None:
        super().__init__(1.0)
        u, s, v = principal(base, None)
        self.u, self.s, self.v = (nn.Parameter(t.contiguous().clone()) for t in (u[:, kept:], s[kept:], v[kept:]))
        for name, value in (("u", u[:, kept:]), ("s", s[kept:]), ("v", v[kept:])):
            self.register_buffer(f"{name}0", value.contiguous().clone(), persistent=False)
        self.register_buffer("u_kept", u[:, :kept].contiguous(), persistent=False)
        self.register_buffer("v_kept", v[:kept].clone(), persistent=False)  # a view would hold all of v

    def thin(self) -> tuple[Tensor, Tensor]:
        u, v = outside(self.u, self.u_kept), outside(self.v.T, self.v_kept.T).T
        # U s V - U_0 s_0 V_0 as sums of differences: exactly zero at the start
        rows = torch.cat([v, v - self.v0])
        return rows, torch.cat([u * self.s - self.u0 * self.s0, self.u0 * self.s0], dim=1)


class Outside(torch.autograd.Function):
    """Hands a matrix on, and back only what of its gradient stands outside of the kept directions. x: (d, n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        frame = kept.to(grad.dtype)
        return grad - frame @ (frame.T @ grad), None


def outside(x: Tensor, kept: Tensor) -> Tensor:
    """`Outside` of x: (d, n)."""
    handed: Tensor = Outside.apply(x, kept)  # type: ignore[no-untyped-call]
    return handed
