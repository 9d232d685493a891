"""Ladder side-tuning: a narrow transformer beside the frozen one reads its layers and makes the prediction.

    g_0 = D_0(E(x))        g <- Block_i( μ_i g + (1 - μ_i) D_i(h_i) )        μ_i = sigmoid(α_i / T)
    out = U(norm(g))                                                         in place of the model's last hidden state

h_i is what frozen block i gave, without a gradient; D: d -> d / ρ, U: d / ρ -> d, with biases. Block_i is the model's
own kind of block with all widths over ρ, cut out of frozen block i: the coordinates that matter most stay, the same
ones of the stream in every layer. α starts at 0. From the first step on the prediction is the side network's.

Sung, Cho, Bansal 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
arXiv:2206.06522, section 3.

Count: S kept layers: S side blocks, (S + 1)(d d_s + d_s) for D, S for α, the final norm, d_s d + d for U.
Claims: 69 % less training memory than full fine-tuning of T5, where LoRA and adapters save 26 %.
Starts: by the size of the weights (the default: it needs no data, so attaching is all it takes), or by importance
"fisher", the paper's own, which costs a pass over the data, forward and backward through the whole model, before the
first step: gradients of each optimiser step are squared and summed. The paper squares those of each row: so does
batch.size = 1.
Use it when: memory is short: no gradient enters the frozen model.
Not when: the tuned model must start as the base, or become a plain model again.
Pitfalls: a gradient into the frozen model costs all of that memory and shows nowhere else. In an encoder-decoder the
side decoder reads the side encoder. Position biases (T5, BLOOM) are the frozen model's; rotary angles are computed for
the side's own width. Side keys and values share the model's cache, behind its layers. Refused where layers share one
module (ALBERT) or read relative embeddings of the model's full width (DeBERTa).
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError, ModelError, above, at_least, between
from luthier.methods.parts.cache_room import make_room
from luthier.methods.parts.frozen_below import FrozenBelow
from luthier.methods.parts.masks import first_share, no_trace
from luthier.methods.parts.narrow_copy import Sizes, kept_layers, narrow_model, prune, side_params
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.trial_pass import try_pass
from luthier.surgery import METHODS, AddBranch, Batches, BlockCall, Context, Edit, Tuned, TunedView, gradients
from luthier.surgery.prompts import text_stack


@METHODS.register("lst", family="additive", paper="arXiv:2206.06522")
@dataclass(frozen=True, kw_only=True)
class LST(FrozenBelow):
    """Settings of ladder side-tuning."""

    reduction: Annotated[int, "ρ: widths of the side network are those of the model over this", at_least(1)] = 8
    layers: Annotated[tuple[int, ...], "layers that have a side block, from 0 in each stack; none: all"] = ()
    temperature: Annotated[float, "T of the gates", above(0)] = 0.1
    dropout: Annotated[float, "share of the side's last state dropped in training", between(0, 0.99)] = 0.1
    importance: Annotated[
        Literal["magnitude", "fisher", "random"], "what decides which weights start a side block; random: none do"
    ] = "magnitude"
    data: Annotated[float, "fisher: share of the first epoch that is looked at", between(0.001, 1)] = 1.0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "looks_at_data", self.importance == "fisher")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        self._kept(anatomy)
        yield AddBranch(lambda model, anatomy: Sides(self, model, anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        sizes, total = Sizes.of(anatomy, self.reduction), 0
        for stack, layers in self._kept(anatomy).items():
            ladders = (len(layers) + 1) * (anatomy.d + 1) * sizes.d + len(layers)
            final = next((s for s in anatomy.all_sites if s.kind == "norm" and _is_final(s.part, s.stack, stack)), None)
            norm = 2 * sizes.d if final is None else final.n_params // final.d_in * sizes.d
            total += side_params(anatomy, sizes, stack, layers) + ladders + norm
        width = _out_width(anatomy)
        return total + sizes.d * width + width

    def begin(self, tuned: TunedView) -> None:
        try_pass(tuned, "lst")

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        if self.importance != "fisher":
            return
        for sides in own_modules(self, tuned, Sides):
            sides.start(tuned.model, _fisher(tuned, first_share(batches, self.data), sides.tensors))

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        if self.importance == "fisher" and not all(s.started for s in own_modules(self, tuned, Sides)):
            raise ConfigError("lst: importance=fisher looks at batches before the first step, and none were given.")

    def _kept(self, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
        if anatomy.model_type.startswith("deberta"):
            raise AnatomyError(
                f"lst: the layers of {anatomy.model_type} read relative embeddings of the model's full width, which a "
                "narrow copy of them cannot. Use another method."
            )
        return kept_layers(anatomy, self.layers, "lst")


def _is_final(part: str, of: str, stack: str) -> bool:
    return part == "final" and of == stack


def _out_width(anatomy: Anatomy) -> int:
    """Width of the last hidden state: OPT may project it on, to the width of its head."""
    heads = [s for s in anatomy.all_sites if s.kind == "head"]
    return heads[0].d_in if heads and not anatomy.is_encoder_decoder else anatomy.d


def _fisher(tuned: TunedView, batches: Batches, names: list[str]) -> dict[str, Tensor]:
    """Squared gradients of the frozen tensors `names`, summed over steps, in evaluation mode; leaves no trace."""
    parameters = {n: tuned.tensor(n) for n in names}
    scores = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    # By plain functions: the fast ones hold a frozen weight constant, so it would have no gradient.
    with tuned.base_only(), no_trace(tuned, training=False), kernels.plain():
        before = {n: p.requires_grad for n, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            for batch in batches:
                for name, gradient in zip(parameters, gradients(batch, list(parameters.values())), strict=True):
                    if gradient is not None:
                        scores[name] += gradient.float() ** 2
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])
    return {n: s.cpu() for n, s in scores.items()}


class Ladder(nn.Module):
    """The side network of one stack."""

    def __init__(
        self, narrow: Any, narrow_stack: Any, paths: list[str], norm: nn.Module, d: int, width: int, out: int | None
    ) -> None:
        super().__init__()
        self.entry = nn.Linear(d, width)
        self.steps = nn.ModuleList(nn.Linear(d, width) for _ in paths)
        self.alpha = nn.Parameter(torch.zeros(len(paths)))
        self.blocks = nn.ModuleList(narrow.get_submodule(path) for path in paths)
        self.norm = norm
        self.up = nn.Linear(width, out) if out is not None else None
        rotary = getattr(narrow_stack, "rotary_emb", None)
        self.rotary: nn.Module | None = rotary if isinstance(rotary, nn.Module) else None


class Sides(nn.Module):
    """The side networks of a model, one per stack."""

    def __init__(self, method: LST, model: Any, anatomy: Anatomy) -> None:
        super().__init__()
        self.method, self.anatomy = method, anatomy
        self.sizes = Sizes.of(anatomy, method.reduction)
        self.kept = method._kept(anatomy)
        self.depth = {stack: sum(b.stack == stack for b in anatomy.blocks) for stack in self.kept}
        self.dropout = nn.Dropout(method.dropout)
        self.started = False
        self._encoded: Tensor | None = None  # what the side encoder gave, on its way to the side decoder
        self._positions: Tensor | None = None
        frozen = model if anatomy.is_encoder_decoder else text_stack(dict(model.named_modules()), anatomy)
        narrow = narrow_model(model, frozen, anatomy, self.sizes)
        self._turned = _turned(frozen, narrow, anatomy, self.sizes)
        self._kinds: list[str] = list(getattr(narrow.config, "layer_types", None) or ())
        side = Anatomy.read(narrow)
        self.ladders = nn.ModuleDict()
        for stack, layers in self.kept.items():
            paths = [b.path for b in side.blocks if b.stack == stack and b.layer in layers]
            final = next((s for s in side.all_sites if s.kind == "norm" and _is_final(s.part, s.stack, stack)), None)
            norm = nn.LayerNorm(self.sizes.d) if final is None else narrow.get_submodule(final.path)
            out = None if stack == "encoder" else _out_width(anatomy)
            ladder = Ladder(narrow, narrow, paths, norm, anatomy.d, self.sizes.d, out)
            for number, block in enumerate(ladder.blocks):
                for module in block.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = self.depth[stack] + number  # type: ignore[assignment]  # behind the model's own layers in the cache
                    if getattr(module, "has_relative_attention_bias", False):
                        module.has_relative_attention_bias = False  # type: ignore[assignment]  # the frozen model's is used
                        del module._modules["relative_attention_bias"]
            self.ladders[stack or "self"] = ladder
        blocks = {b.path for b in anatomy.blocks if b.layer in self.kept[b.stack]}
        self.tensors = [n for n in anatomy.tensors if any(n.startswith(f"{path}.") for path in blocks)]
        self.__dict__["narrow"] = narrow  # its kept blocks are registered above; the rest is only needed to start
        if method.importance == "magnitude" and next(model.parameters()).device.type != "meta":
            try:
                self.start(model, None)
            except RuntimeError as error:
                raise AnatomyError(
                    f"lst: the blocks of {anatomy.model_type} hold weights that cannot be cut for a narrower network "
                    f"({error}). Start it at random (importance=random), or choose another method."
                ) from error

    @torch.no_grad()
    def start(self, model: Any, scores: dict[str, Tensor] | None) -> None:
        """Cut the side blocks out of the frozen ones; by the size of their weights where no scores are given."""
        held = Tuned.of(model)
        assert held is not None, "a branch is built on a model that is being tuned"
        weights = {n: held.tensor(n).detach().float().cpu() for n in self.tensors}
        scores = scores if scores is not None else {n: w**2 for n, w in weights.items()}
        narrow = self.__dict__["narrow"]
        home = next(self.parameters()).device
        narrow.cpu()
        residual = prune(self.anatomy, weights, scores, narrow, self.sizes, self.kept, self._turned)
        for site in self.anatomy.all_sites:
            if site.kind == "norm" and site.part == "final" and site.stack in self.kept:
                ladder = self.ladders[site.stack or "self"]
                for short in [p for p in (site.param, site.bias) if p]:
                    value = held.tensor(f"{site.path}.{short}").detach().float().cpu()[residual]
                    ladder.norm._parameters[short].copy_(value)  # type: ignore
        self.to(home)
        self.started = True

    def _load_from_state_dict(self, *args: Any) -> None:
        # What is loaded has started: in the run that saved it.
        super()._load_from_state_dict(*args)
        self.started = True

    def enter(self, stack: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before a stack: part what the side encoder gave from what the frozen encoder gave."""
        self._positions = kwargs.get("position_ids")
        states = kwargs.get("encoder_hidden_states")
        d = self.anatomy.d
        if stack == "decoder" and states is not None:
            if states.shape[-1] == d:
                raise ModelError(
                    "lst: these encoder_outputs hold no state of the side encoder; they were computed without this "
                    "tuning. Run the encoder with it, or hand over the text itself."
                )
            self._encoded = states[..., d:]
            kwargs = {**kwargs, "encoder_hidden_states": states[..., :d].detach()}
        return kwargs

    def forward(self, stack: str, calls: list[BlockCall], context: Context, last: Tensor) -> Tensor:
        ladder = self.ladders[stack or "self"]
        assert isinstance(ladder, Ladder)
        by_layer = {call.layer: call for call in calls}
        dtype = ladder.alpha.dtype
        gates = torch.sigmoid(ladder.alpha / self.method.temperature)
        state: Tensor = ladder.entry(calls[0].before.to(dtype))
        for number, layer in enumerate(self.kept[stack]):
            call = by_layer[layer]
            step = ladder.steps[number](call.after.to(dtype))
            state = gates[number] * state + (1 - gates[number]) * step
            block = ladder.blocks[number]
            out = block(state, **self._arguments(ladder, block, calls[0], call, state, context, number))
            state = out[0] if isinstance(out, tuple | list) else out
        state = self.dropout(ladder.norm(state))
        if ladder.up is None:
            return torch.cat([last, state.to(last.dtype)], dim=-1)
        result: Tensor = ladder.up(state)
        return result

    def _arguments(
        self,
        ladder: Ladder,
        block: nn.Module,
        first: BlockCall,
        call: BlockCall,
        state: Tensor,
        context: Context,
        number: int,
    ) -> dict[str, Any]:
        """The frozen block's own call, with whatever has the model's width computed for the side's."""
        names = list(inspect.signature(block.forward).parameters)
        given = {**dict(zip(names[1:], call.args, strict=False)), **call.kwargs}
        given = {name: _cast(value, state.dtype) for name, value in given.items()}
        if given.get("encoder_hidden_states") is not None:
            assert self._encoded is not None
            given["encoder_hidden_states"] = self._encoded.to(state.dtype)
        if "encoder_decoder_position_bias" in names:  # T5: the first block computes the biases of all
            biases = [_cast(b, state.dtype) for b in first.outputs if isinstance(b, Tensor)]
            given["position_bias"] = biases[0]
            given["encoder_decoder_position_bias"] = biases[1] if len(biases) > 1 else None
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = self._angles(ladder, block, state, given.get("position_ids"), context, call)
        for name in ("past_key_values", "layer_past"):
            if given.get(name) is not None:
                make_room(given[name], call.layer, self.depth[call.stack] + number, "lst")
        return given

    def _angles(
        self, ladder: Ladder, block: nn.Module, state: Tensor, positions: Any, context: Context, call: BlockCall
    ) -> Any:
        assert ladder.rotary is not None
        positions = positions if positions is not None else self._positions
        if positions is None:
            positions = torch.arange(context.past, context.past + state.shape[1], device=state.device)[None]
        names = inspect.signature(ladder.rotary.forward).parameters
        if "layer_type" in names:
            kinds = [m.attention_type for m in (block, *block.children()) if hasattr(m, "attention_type")]
            kinds += [m.layer_type for m in (block, *block.children()) if hasattr(m, "layer_type")]
            # A layer may not say its own kind (ModernBERT as a decoder): the model's configuration has it then.
            return ladder.rotary(state, positions, kinds[0] if kinds else self._kinds[call.layer])
        return ladder.rotary(state, positions)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    return value


def _turned(frozen: Any, narrow: Any, anatomy: Anatomy, sizes: Sizes) -> tuple[int, int]:
    """How many coordinates of a head rotary angles turn, in the model and beside it."""
    counts = []
    for module, head in ((frozen, anatomy.d_head), (narrow, sizes.head)):
        rotary = getattr(module, "rotary_emb", None)
        if rotary is None:
            return 0, 0
        angles = [b for n, b in rotary.named_buffers() if n.endswith("inv_freq") and "original" not in n]
        counts.append(2 * len(angles[0]) if angles else head)
    if counts[1] > sizes.head:
        raise AnatomyError(
            f"lst: rotary angles would turn {counts[1]} coordinates of a side head that has {sizes.head}. "
            "Set another reduction."
        )
    return counts[0], counts[1]
