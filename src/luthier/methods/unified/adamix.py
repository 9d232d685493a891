"""AdaMix: train several copies of an adapter under random routing, then average their weights into one.

    y + W_b σ(V_a y + c_a) + e_b      V_a: (width, d)    W_b: (d, width)    a, b: drawn at every pass, for all rows
    loss = CE(p1) + gamma / 2 [KL(p1 | p2) + KL(p2 | p1)]      p1, p2: two passes of the same batch

Each site draws its own a and b. Experts are drawn independently, with normal weights of 0.02: the start is near the
base model; with `zero_init` it is the base model. With form="lora" the experts are the two thin matrices of LoRA, and
the start is the base model. In evaluation the mean weights are used; they are what is stored and served.

Wang et al. 2022, "AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", arXiv:2205.12410, sections 3.1
to 3.3. In each KL the other side is held constant, as in the authors' code. For one output the distance is the squared
difference (their code's is always zero then). They route at random in evaluation unless told not to; we never do.
Two things are theirs only where they are asked for. Their code for language models weighs the agreement by 100: set
gamma=100; the default is that of their classifiers, for every task. Their two passes also draw dropout apart; here the
frozen model has none unless trunk_dropout = "on", so by default the passes differ by routing alone. Their rate of 4e-4
is for 40 epochs: in the few that luthier takes by itself it hardly leaves the start, so the default is five times that.

Count: per site experts * (d width + width) + up_experts * (width d + d) in training, 2 d width + width + d stored.
Claims: better than one adapter at the cost of one when served.
Cost: two passes a step, and for a language model all logits of both, which LoRA's loss never holds: one and a half
steps of LoRA on a classifier, more than two where the vocabulary is large (docs/benchmarks.md).
Use it when: an adapter should gain from several in training, and cost as much as one afterwards.
Not when: a training step must be cheap: it passes each batch twice.
Pitfalls: experts copied from one start stay alike; the mean of products is not the product of means, and only the
latter is small; each step costs two passes; an expert that was not drawn has no gradient and does not move, neither by
momentum nor by decay.
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy, Site, is_projection, is_sublayer
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.bottleneck import Activation, check_sublayers
from luthier.methods.parts.low_rank import check_projections, fusable
from luthier.methods.parts.own_tensors import own_modules
from luthier.surgery import METHODS, Attachment, Base, Method, Objective, PerSite, TunedView

IGNORED = -100


@METHODS.register("adamix", family="unified", paper="arXiv:2205.12410")
@dataclass(frozen=True, kw_only=True)
class AdaMix(PerSite):
    """Settings of AdaMix."""

    form: Annotated[Literal["adapter", "lora"], "what the experts are"] = "adapter"
    sites: Annotated[tuple[str, ...], "where to attach; none: ffn_out for adapters, attn.q and attn.v for lora"] = ()
    experts: Annotated[int, "copies of the first matrix", at_least(1)] = 4
    up_experts: Annotated[int, "copies of the second matrix; 1 shares it", at_least(1)] = 1
    width: Annotated[int, "width of an adapter", at_least(1)] = 16
    activation: Annotated[Activation, "between an adapter's two layers"] = "gelu"
    rank: Annotated[int, "width of lora's thin matrices", at_least(1)] = 8
    alpha: Annotated[float, "lora's update is scaled by alpha / rank", above(0)] = 16.0
    gamma: Annotated[float, "weight of the agreement between the two passes; 0 runs one pass", at_least(0)] = 1.0
    ce: Annotated[Literal["first", "mean"], "the task's loss: of the first pass, or of both"] = "first"
    zero_init: Annotated[bool, "start adapters at the base model"] = False
    learn_soup: Annotated[
        float, "share of the run, at its end, that learns the weights of the mean", between(0, 0.9)
    ] = 0.0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 2e-3
    draws: ClassVar[bool] = True
    tiny: ClassVar[dict[str, int]] = {"width": 6, "rank": 3}
    needs_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # The averaged form of lora is lora: it merges, and it starts at the base.
        object.__setattr__(self, "mergeable", self.form == "lora")
        object.__setattr__(self, "starts_at_base", self.form == "lora" or self.zero_init)

    def fits(self, site: Site) -> bool:
        return is_sublayer(site) if self.form == "adapter" else is_projection(site)

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        kinds = self.sites or (("ffn_out",) if self.form == "adapter" else ("attn.q", "attn.v"))
        found = anatomy.sites(*kinds, asked_by="adamix.sites", fits=self.fits)
        if self.form == "lora":
            if any(s.expert is not None for s in found):
                raise ConfigError(
                    "adamix.sites: routing inside the model's own experts is not defined; leave them out."
                )
            return check_projections(anatomy, found, "adamix", 0.0)
        return check_sublayers(found, "adamix")

    def params_at(self, site: Site) -> int:
        soup = sum(n for n in (self.experts, self.up_experts) if n > 1 and self.learn_soup > 0)
        if self.form == "lora":
            return self.experts * self.rank * site.d_in + self.up_experts * self.rank * site.d_out + soup
        d, r = site.d_out, self.width
        return self.experts * (d * r + r) + self.up_experts * (r * d + d) + soup

    def n_stored(self, anatomy: Anatomy) -> int:
        if self.form == "lora":
            return sum(self.rank * (s.d_in + s.d_out) for s in self.places(anatomy))
        return sum(2 * s.d_out * self.width + self.width + s.d_out for s in self.places(anatomy))

    def build(self, site: Site, base: Base) -> Attachment:
        downs: list[nn.Module]
        ups: list[nn.Module]
        if self.form == "lora":
            downs = [Matrix(self.rank, site.d_in, zero=False) for _ in range(self.experts)]
            ups = [Matrix(site.d_out, self.rank, zero=True) for _ in range(self.up_experts)]
            return MixedUpdate(downs, ups, self.learn_soup > 0, self.alpha / self.rank)
        downs = [_small(nn.Linear(site.d_out, self.width)) for _ in range(self.experts)]
        ups = [_small(nn.Linear(self.width, site.d_out), zero=self.zero_init) for _ in range(self.up_experts)]
        return MixedBottleneck(downs, ups, self.learn_soup > 0, self.activation)

    def loss(self, tuned: TunedView, forward: Objective) -> Any:
        held = own_modules(self, tuned, Mixed)
        first = forward()
        if self.gamma == 0 or not held or held[0].souping:
            return first
        second = forward()
        anatomy = tuned.anatomy
        shifted = anatomy.is_decoder and not anatomy.head_tensors
        apart = disagreement(first.logits, second.logits, first.labels, shifted=shifted)
        task = first.loss if self.ce == "first" else (first.loss + second.loss) / 2
        result = copy.copy(first)
        result.loss = task + self.gamma * apart
        return result

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        if self.learn_soup > 0 and step >= (1 - self.learn_soup) * total:
            for module in own_modules(self, tuned, Mixed):
                module.phase.fill_(True)
                module.souping = True

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, Mixed):
            module.restore(module.stored())

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("propetl"):
            return "neither paper says what masks over a mixture of experts would be. Use one of them."
        return None


def disagreement(z1: Tensor, z2: Tensor, labels: Tensor | None, *, shifted: bool) -> Tensor:
    """How far two passes are apart: a sum over targets, as the task's loss is. Zero for equal logits, exactly.

    z1, z2: (batch, classes), or (batch, tokens, classes) with labels (batch, tokens), of which -100 is left out.
    shifted: a language model's logits at t are about the label at t + 1.
    """
    z1, z2 = z1.float(), z2.float()
    if z1.dim() == 2 and z1.shape[1] == 1:
        return F.mse_loss(z1, z2, reduction="sum")
    if z1.dim() == 2 and labels is not None and labels.dim() == 2:
        pairs = [torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], dim=-1) for z in (z1, z2)]
        return _symmetric(*pairs).mean(-1).sum()
    if z1.dim() == 3 and labels is not None:
        if shifted:
            z1, z2, labels = z1[:, :-1], z2[:, :-1], labels[:, 1:]
        z1, z2 = z1[labels != IGNORED], z2[labels != IGNORED]
    return _symmetric(F.log_softmax(z1, -1), F.log_softmax(z2, -1)).sum()


def _symmetric(p1: Tensor, p2: Tensor) -> Tensor:
    """½ [KL(p1 | p2) + KL(p2 | p1)] over the last dimension, from log probabilities; each target is held constant."""
    one = F.kl_div(p1, p2.detach(), reduction="none", log_target=True)
    two = F.kl_div(p2, p1.detach(), reduction="none", log_target=True)
    return (one + two).sum(-1) / 2


def _small(layer: nn.Linear, *, zero: bool = False) -> nn.Linear:
    nn.init.zeros_(layer.weight) if zero else nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class Matrix(nn.Module):
    """One thin matrix."""

    def __init__(self, d_out: int, d_in: int, *, zero: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))
        if not zero:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class Mixed(Attachment):
    """Experts of two sides, down and up: one of each is drawn at a training pass; the mean of each serves."""

    phase: Tensor

    def __init__(self, downs: list[nn.Module], ups: list[nn.Module], soup: bool) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(downs), nn.ModuleList(ups)
        for side, experts in (("down", downs), ("up", ups)):
            scores = nn.Parameter(torch.zeros(len(experts))) if soup and len(experts) > 1 else None
            self.register_parameter(f"{side}_scores", scores)
        self.register_buffer("phase", torch.zeros((), dtype=torch.bool))
        self.souping = False  # `phase` again, where asking does not wait for the device

    def side(self, name: str) -> dict[str, Tensor]:
        """The weights of this pass: of the expert drawn, or the mean."""
        experts = getattr(self, name)
        if len(experts) == 1:
            return dict(experts[0].named_parameters())
        if self.training and not self.souping:
            # The ambient generator: activation checkpointing restores it, so a recomputed pass draws the same.
            return dict(experts[int(torch.randint(len(experts), ()))].named_parameters())
        return self.mean(name)

    def mean(self, name: str) -> dict[str, Tensor]:
        """The arithmetic mean of the experts' weights, or the mean that was learnt."""
        experts, scores = getattr(self, name), getattr(self, f"{name}_scores")
        stacks = {n: torch.stack([e.get_parameter(n) for e in experts]) for n, _ in experts[0].named_parameters()}
        if scores is None or not self.souping:
            return {n: stack.mean(0) for n, stack in stacks.items()}
        # Only the scores learn here.
        return {n: torch.tensordot(scores.softmax(0), stack.detach(), dims=1) for n, stack in stacks.items()}

    def stored(self) -> dict[str, Tensor]:
        """One plain module: the mean of each side."""
        found = {(side, n): t.detach() for side in ("down", "up") for n, t in self.mean(side).items()}
        return {self.short(side, n): t for (side, n), t in found.items()}

    def short(self, side: str, name: str) -> str:
        """What the plain module calls this tensor."""
        return f"{side}.{name}"

    def restore(self, tensors: dict[str, Tensor]) -> None:
        left = dict(tensors)
        for side in ("down", "up"):
            experts = getattr(self, side)
            one = copy.deepcopy(experts[0])
            with torch.no_grad():
                for name, parameter in one.named_parameters():
                    parameter.copy_(left.pop(self.short(side, name)))
            setattr(self, side, nn.ModuleList([one]))
            self.register_parameter(f"{side}_scores", None)
        if left:
            raise KeyError(f"tensors that a plain module does not have: {', '.join(left)}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}phase" in state_dict:
            self.souping = bool(state_dict[f"{prefix}phase"])


class MixedBottleneck(Mixed):
    """Adds a bottleneck of the sublayer's output to that output."""

    kind = "sequential"
    needs_input = False

    def __init__(self, downs: list[nn.Module], ups: list[nn.Module], soup: bool, activation: Activation) -> None:
        super().__init__(downs, ups, soup)
        self.activation = activation

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self.side("down"), self.side("up")
        return kernels.bottleneck(y, y, down["weight"], down["bias"], up["weight"], up["bias"], 1.0, self.activation)


class MixedUpdate(Mixed):
    """Adds `scale * B A x` to the output."""

    kind = "delta"

    def __init__(self, downs: list[nn.Module], ups: list[nn.Module], soup: bool, scale: float) -> None:
        super().__init__(downs, ups, soup)
        self.scale = scale

    def short(self, side: str, name: str) -> str:
        return {"down": "a", "up": "b"}[side]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (x @ self.side("down")["weight"].T @ self.side("up")["weight"].T) * self.scale

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        a, b = self.side("down")["weight"], self.side("up")["weight"]
        return kernels.low_rank_linear(x, base.weight(), base.bias(), a, b, self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.mean("up")["weight"] @ self.mean("down")["weight"] * self.scale, bias
