"""A narrow copy of some blocks of a model: which rows and columns stay, and the same blocks built anew around them.

The kept coordinates of the residual stream are the same in every layer, so that what one narrow block writes is what
the next one reads. Inside a block, the kept coordinates of the heads are the same for all heads.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError
from luthier.surgery import Base

__all__ = ["Sizes", "kept_layers", "narrow_model", "prune", "side_params"]

_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
_INNER = ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim")
_HEAD = ("head_dim", "d_kv", "query_pre_attn_scalar")


@dataclass(frozen=True)
class Sizes:
    """Widths of the narrow copy: every width divided by `reduction`, heads counted as before."""

    d: int
    head: int
    reduction: int
    full: int  # the model's own width

    @classmethod
    def of(cls, anatomy: Anatomy, reduction: int) -> "Sizes":
        """A head keeps its width over `reduction` where that is even, else the next multiple of 4: rotary angles
        come in pairs, and may turn half of a head only.
        """
        whole, rest = divmod(anatomy.d_head, reduction)
        head = whole if rest == 0 and whole % 2 == 0 else 4 * max(1, -(-anatomy.d_head // (4 * reduction)))
        tied = anatomy.d == anatomy.n_heads * anatomy.d_head
        d = anatomy.n_heads * head if tied else max(1, -(-anatomy.d // reduction))
        return cls(d, head, reduction, anatomy.d)

    def inner(self, m: int) -> int:
        """Inner width of a feed-forward layer: m over `reduction`; a multiple of the model's width stays one."""
        times, rest = divmod(m, self.full)
        return times * self.d if rest == 0 else max(1, m // self.reduction)


def kept_layers(anatomy: Anatomy, layers: tuple[int, ...], asked_by: str) -> dict[str, tuple[int, ...]]:
    """Stack -> layers that have a side block; none named means all.

    Raises:
        AnatomyError: a layer that no stack has, a stack left without any, or layers that share one module.
    """
    if any(s.shared > 1 for s in anatomy.all_sites):
        raise AnatomyError(
            f"{asked_by}: the layers of this {anatomy.model_type} model share one module, so a side block has no layer "
            "of its own to be cut from. Use another method."
        )
    if anatomy.remarks or (len(anatomy.stacks) > 1 and not anatomy.is_encoder_decoder):
        what = "; ".join(anatomy.remarks) or f"the stacks {', '.join(anatomy.stacks)}"
        raise AnatomyError(
            f"{asked_by}: a side network is a narrow copy of one stack of like layers, and this {anatomy.model_type} "
            f"model has others: {what}. Use another method, such as lora or sequential_adapter."
        )
    there: dict[str, list[int]] = {}
    for block in anatomy.blocks:
        there.setdefault(block.stack, []).append(block.layer)
    absent = sorted(set(layers) - {i for held in there.values() for i in held})
    kept = {stack: tuple(i for i in held if not layers or i in layers) for stack, held in there.items()}
    empty = [stack for stack, held in kept.items() if not held]
    if absent or empty:
        raise AnatomyError(
            f"{asked_by}.layers: {', '.join(map(str, layers))} names "
            + (f"layers {absent} that the model does not have" if absent else f"no layer of the {empty[0]}")
            + f"; it has {', '.join(f'{len(held)} {stack}'.strip() for stack, held in there.items())} layers, from 0."
        )
    return kept


def _shape(site: Site, anatomy: Anatomy, sizes: Sizes) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear site in the narrow copy; None for sites that are not linear."""
    attention = next(
        (
            a
            for a in anatomy.attentions
            if (a.layer, a.stack, a.cross) == (site.layer, site.stack, "cross" in site.kind)
        ),
        None,
    )
    part = site.kind.rpartition(".")[2]
    if site.kind.startswith(("attn.", "cross.")):
        assert attention is not None
        heads = {"q": attention.n_heads, "o": attention.n_heads}.get(part, attention.n_kv_heads) * sizes.head
        return (sizes.d, heads) if part == "o" else (heads, sizes.d)
    if site.kind.startswith(("ffn.", "experts.")):
        inner = sizes.inner(site.d_in if part == "down" else site.d_out)
        return (sizes.d, inner) if part == "down" else (inner, sizes.d)
    return None


def _norm_width(width: int, anatomy: Anatomy, sizes: Sizes) -> int:
    return sizes.d if width == anatomy.d else sizes.head if width == anatomy.d_head else width


def _bare(anatomy: Anatomy, path: str) -> list[str]:
    """Tensors of a block that are no site's, such as a router. T5's position bias is the frozen model's."""
    owned = {f"{s.path}.{p}" for s in anatomy.all_sites for p in (s.param, s.bias) if p}
    inside = [n for n in anatomy.tensors if n.startswith(f"{path}.") and n not in owned]
    return [n for n in inside if "relative_attention_bias" not in n]


def side_params(anatomy: Anatomy, sizes: Sizes, stack: str, layers: tuple[int, ...]) -> int:
    """Numbers of the narrow copies of these layers."""
    total = 0
    for site in anatomy.all_sites:
        if site.stack == stack and site.layer in layers:
            shape = _shape(site, anatomy, sizes)
            if shape is not None:
                total += shape[0] * (shape[1] + (site.bias is not None))
            elif site.kind == "norm":
                total += site.n_params // site.d_in * _norm_width(site.d_in, anatomy, sizes)
    for block in anatomy.blocks:
        if block.stack == stack and block.layer in layers:
            for name in _bare(anatomy, block.path):
                shape_ = [sizes.d if n == anatomy.d else n for n in anatomy.tensors[name]]
                total += torch.Size(shape_).numel()
    return total


def narrow_model(model: Any, stack: nn.Module, anatomy: Anatomy, sizes: Sizes) -> Any:
    """The model's own class (or that of its one stack) from a configuration of smaller widths, with random weights."""
    whole = model if anatomy.is_encoder_decoder else stack
    config: Any = copy.deepcopy(whole.config)
    for name in vars(config):
        value = vars(config)[name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if name in _WIDTH:
            setattr(config, name, sizes.d)
        elif name in _INNER:
            setattr(config, name, sizes.inner(int(value)))
        elif name in _HEAD:
            setattr(config, name, sizes.head)
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        config._experts_implementation = "batched_mm"  # products of groups want widths in steps of 16 bytes
    if anatomy.vocab_size is not None:
        # Its embeddings are thrown away; only the padding row has to exist.
        config.vocab_size = (getattr(config, "pad_token_id", None) or 0) + 2
    device = "meta" if next(model.parameters()).device.type == "meta" else "cpu"
    with torch.device(device):
        return type(whole)(config)


def prune(
    anatomy: Anatomy,
    weights: dict[str, Tensor],
    scores: dict[str, Tensor],
    narrow: Any,
    sizes: Sizes,
    kept: dict[str, tuple[int, ...]],
    turned: tuple[int, int],
) -> Tensor:
    """Fill the kept blocks of `narrow` with the rows and columns of `weights` that `scores` rank highest.

    Args:
        weights, scores: tensor name -> the frozen value, and how much each of its numbers matters (same shapes).
        turned: coordinates of a head that rotary angles turn: in the model, in the narrow copy. (0, 0) without rotary.

    Returns:
        The kept coordinates of the residual stream, (sizes.d,).
    """
    side = Anatomy.read(narrow)
    side_sites = {s.key: s for s in side.all_sites}
    sites = [s for s in anatomy.all_sites if s.layer is not None and s.layer in kept[s.stack]]
    modules = dict(narrow.named_modules())
    stream = torch.zeros(anatomy.d)
    for site in sites:
        if _shape(site, anatomy, sizes) is not None:
            score = _view(site, scores)
            stream += score.sum(1) if site.kind.endswith((".o", ".down")) else score.sum(0)
    residual = _top(stream, sizes.d)
    picks = _Picks(anatomy, scores, sizes, residual, turned)
    for site in sites:
        target = side_sites.get(site.key)
        if target is None:
            continue
        if site.kind == "norm":
            index = {anatomy.d: residual, anatomy.d_head: picks.heads(site, 1, "qk")}.get(site.d_in)
            for short in (site.param, site.bias):
                if short is not None:
                    value = weights[f"{site.path}.{short}"].float()
                    modules[target.path]._parameters[short].copy_(value if index is None else value[index])
        elif _shape(site, anatomy, sizes) is not None:
            rows, columns = picks.of(site)
            bias = _bias(site, weights)
            kept_bias = bias[rows].float() if bias is not None else None
            Base(modules[target.path], target).write(_view(site, weights)[rows][:, columns], kept_bias)
    own = dict(narrow.named_parameters())
    side_blocks = {(b.stack, b.layer): b.path for b in side.blocks}
    for block in anatomy.blocks:
        if block.layer in kept[block.stack]:
            for name in _bare(anatomy, block.path):
                value = weights[name].float()
                for axis in [a for a, n in enumerate(value.shape) if n == anatomy.d]:
                    value = value.index_select(axis, residual)
                own[side_blocks[(block.stack, block.layer)] + name[len(block.path) :]].copy_(value)
    return residual


def _view(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    """This site's part of a tensor, (d_out, d_in), however the layer stores it."""
    held = SimpleNamespace(**{site.param: tensors[f"{site.path}.{site.param}"]})
    return Base(held, site).weight().float()  # type: ignore[arg-type]


def _bias(site: Site, tensors: dict[str, Tensor]) -> Tensor | None:
    if site.bias is None:
        return None
    return Base(SimpleNamespace(**{site.bias: tensors[f"{site.path}.{site.bias}"]}), site).bias()  # type: ignore[arg-type]


def _top(score: Tensor, n: int) -> Tensor:
    return score.topk(n).indices.sort().values


class _Picks:
    """Kept rows and columns of each linear site; inside a block both sides of a product are asked."""

    def __init__(
        self, anatomy: Anatomy, scores: dict[str, Tensor], sizes: Sizes, residual: Tensor, turned: tuple[int, int]
    ) -> None:
        self.anatomy, self.scores, self.sizes, self.residual, self.turned = anatomy, scores, sizes, residual, turned
        self.found: dict[tuple[Any, ...], Tensor] = {}

    def of(self, site: Site) -> tuple[Tensor, Tensor]:
        """(rows, columns) of a linear site."""
        family, _, part = site.kind.partition(".")
        if family in ("attn", "cross"):
            attention = next(
                a
                for a in self.anatomy.attentions
                if (a.layer, a.stack, a.cross) == (site.layer, site.stack, family == "cross")
            )
            n = attention.n_heads if part in ("q", "o") else attention.n_kv_heads
            heads = self.heads(site, n, "qk" if part in ("q", "k") else "vo")
            return (self.residual, heads) if part == "o" else (heads, self.residual)
        inner = self._inner(site)
        return (self.residual, inner) if part == "down" else (inner, self.residual)

    def heads(self, site: Site, n: int, pair: str) -> Tensor:
        """The kept coordinates inside each of n heads, for queries and keys or for values and outputs."""
        family = "cross" if site.kind.startswith("cross") else "attn"
        mark = (family, site.stack, site.layer, pair)
        width = self.anatomy.d_head
        if mark not in self.found:
            score = torch.ones(width)
            for part in pair:
                held = self._beside(site, f"{family}.{part}")
                view = _view(held, self.scores)
                view = view.T if part == "o" else view
                # Normalised, so that the product of two sums of squares stays in range.
                total = view.sum(1).view(-1, width).sum(0)
                score = score * total / total.mean().clamp(min=1e-30)
            self.found[mark] = self._coordinates(score, pair)
        one = self.found[mark]
        return (torch.arange(n)[:, None] * width + one[None]).flatten()

    def _beside(self, site: Site, kind: str) -> Site:
        for other in self.anatomy.all_sites:
            if (other.kind, other.layer, other.stack) == (kind, site.layer, site.stack):
                return other
        raise AnatomyError(
            f"lst: {site.key} of this {self.anatomy.model_type} model has no {kind} of its own beside it, so a narrow "
            "copy does not know which numbers belong together. Start it at random (importance=random), or use another "
            "method."
        )

    def _coordinates(self, score: Tensor, pair: str) -> Tensor:
        before, after = self.turned if pair == "qk" else (0, 0)
        half = before // 2
        couples = _top(score[:half] + score[half:before], after // 2)  # what one angle turns stays together
        rest = before + _top(score[before:], self.sizes.head - after)
        return torch.cat([couples, couples + half, rest])

    def _inner(self, site: Site) -> Tensor:
        family = site.kind.partition(".")[0]
        mark = (family, site.stack, site.layer, site.expert)
        if mark not in self.found:
            parts = [
                s
                for s in self.anatomy.all_sites
                if (s.kind.partition(".")[0], s.stack, s.layer, s.expert) == mark and _is_linear(s)
            ]
            sums = [_view(s, self.scores).sum(0 if s.kind.endswith("down") else 1) for s in parts]
            score = torch.ones_like(sums[0])
            for total in sums:
                score = score * total / total.mean().clamp(min=1e-30)
            self.found[mark] = _top(score, self.sizes.inner(len(score)))
        return self.found[mark]


def _is_linear(site: Site) -> bool:
    return site.kind.startswith(("ffn.", "experts."))
