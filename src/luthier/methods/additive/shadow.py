"""SHADOW: a small network of the base's own kind runs beside it, and its state corrects what every block reads.

    s_0 = norm(block(x_1))          a block of the base's kind, from nothing; x_1: what the first block reads

    u_l = x_l + strength W_up drop(W_down (x_l - s_l-1))          y_l = block_l(u_l)          x, s, y: (rows, tokens, d)

    s_l = (1 - g) s_l-1 + g T(y_l)          g = sigmoid(G(y_l))          T, G: d -> hidden -> d with a GELU between

W_down: (rank, d) and W_up: (d, rank), the second zero at the start, so that the tuned model starts as the base. Keys
and values of the block beside lie in the model's own cache behind those of its layers: beams and crops carry them.

In training a language model, the state s_0 also answers alone, through the model's own output matrix, so that the
network beside learns from more than what it corrects:

    L = L_task + auxiliary * CE(head(s_0), the next words)

Li, Li, Lee, Li, Xie, Li 2026, "ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning", arXiv:2604.19254. The
form is that of peft 0.21 with one block beside, of the base's width, that reads the base's embeddings. Not offered: the
network beside alone as a model; a network of another depth or width, or a pretrained one; a second head of labels, so
the second loss is of language models that learn words, not of classifiers, nor of answers that are compared. Three
differences: where positions are vectors (GPT-2), it reads the base's, and peft's has a table of its own; nothing is
kept for the state behind the last block, which nothing reads; the second loss is left out where rows are only scored.

Count: one block and the last norm, 2 d rank per block, and 2 (2 d hidden + hidden + d) for all blocks but the last.
Claims: as good as LoRA and DoRA of the same size on tasks of generation and understanding.
Cost: one block more in each pass, and its keys and values in the cache; most of what trains is that block. The second
loss costs a second product with the output matrix, in chunks.
Use it when: a block's worth of numbers may train, and what is tuned should follow the text through all layers.
Not when: it must merge, or be small: `lora`. Not with an encoder-decoder, nor with rows of several tunings.
Pitfalls: with W_up at zero nothing else has a gradient of the task's loss in the first step; peft counts dropout on the
difference, so the default of 0.2 is a strong one.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.word_logits import finished_logits, scale_of, softcap_of
from luthier.core import AnatomyError, CannotMerge, ConfigError, IntegrityError, above, at_least, between
from luthier.kernels import linear_cross_entropy
from luthier.methods.parts.cache_room import filled_elsewhere, make_room
from luthier.methods.parts.narrow_copy import Sizes, kept_layers, side_params
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.trial_pass import try_pass
from luthier.surgery import (
    METHODS,
    PEFT_LAYERS,
    Attach,
    Attachment,
    Base,
    Edit,
    Method,
    Objective,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
    TunedView,
)

FOLLOWS = ("lst", "coda", "pasta", "xlora", "tiny_attention", "attention_fusion", "adapterdrop")

_ALIKE = ("llama", "mistral", "qwen2", "qwen3")
_BESIDE = {
    "mirror.block.": "base_model.shadow_backbone.default.layers.0.",
    "mirror.norm.": "base_model.shadow_backbone.default.norm.",
}
_EACH = {
    "down.": "shadow_down.default.",
    "up.": "shadow_up.default.",
    "move.": "shadow_update_transform.default.",
    "gate.": "shadow_update_gate.default.",
}
_SAME_WIDTHS = ("shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")


def _apart(anatomy: Anatomy) -> str | None:
    """Why peft computes something else on such a model."""
    if anatomy.model_type in _ALIKE:
        return None
    return f"peft's network beside a {anatomy.model_type} model is not known to be ours; it is for {', '.join(_ALIKE)}"


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if why := _apart(going.anatomy):
        raise CannotMerge(f"shadow: {why}.")
    if going.answers != "CAUSAL_LM":
        raise CannotMerge("shadow: peft keeps a second head beside that of a classifier, which ours has not.")
    tensors, sites = {}, list(going.sites.items())
    for name, value in going.stored.items():
        key, _, short = name.partition(".")
        part = next(p for p in (*_BESIDE, *_EACH) if short.startswith(p))
        before = _BESIDE.get(part) or f"{PEFT_LAYERS}{going.sites[key].path}.{_EACH[part]}"
        tensors[before + short.removeprefix(part)] = value
    for name, value in going.stored.items():  # peft moves the state behind the last block too, where nothing reads it
        key, _, short = name.partition(".")
        if key == sites[0][0] and short.startswith(("move.", "gate.")):
            part = short[: len("move.")]
            there = f"{PEFT_LAYERS}{sites[-1][1].path}.{_EACH[part]}{short.removeprefix(part)}"
            tensors[there] = torch.zeros_like(value)
    return tensors, {}


def _back(coming: PeftIn) -> PeftTaken:
    if why := _apart(coming.anatomy):
        raise ConfigError(f"{coming.where}: {why}.")
    sites = {site.path: site for site in coming.anatomy.sites("block_out", asked_by="shadow")}
    if set(coming.paths("shadow_down.default.weight")) != set(sites):
        raise ConfigError(f"{coming.where}: not all blocks are corrected, and ours are. Attach it to all of them.")
    stored, left, last = {}, [], list(sites)[-1]
    for name, value in coming.tensors.items():
        path = next((p for p in sites if name.startswith(f"{PEFT_LAYERS}{p}.")), None)
        first = next(iter(sites.values())).key
        begins = {theirs: f"{first}.{ours}" for ours, theirs in _BESIDE.items()}
        if path is not None:
            begins = {f"{PEFT_LAYERS}{path}.{theirs}": f"{sites[path].key}.{ours}" for ours, theirs in _EACH.items()}
        found = next((b for b in begins if name.startswith(b)), None)
        if found is None:
            left.append(name)
        elif path != last or "shadow_update" not in name:
            stored[begins[found] + name.removeprefix(found)] = value
    if left:
        raise IntegrityError(f"{coming.where}: {', '.join(sorted(left)[:3])} have no place in this model.")
    return PeftTaken({}, stored)


def _one_block(facts: Mapping[str, Any]) -> dict[str, Any]:
    depth = facts.get("shadow_num_hidden_layers")
    if depth not in (None, 1):
        raise ConfigError(f"shadow_num_hidden_layers is {depth!r}; ours has one block beside, and no more.")
    return {}


@METHODS.register("shadow", family="additive", paper="arXiv:2604.19254")
@dataclass(frozen=True, kw_only=True)
class Shadow(Method):
    """Settings of SHADOW."""

    rank: Annotated[int, "of the correction of what a block reads", at_least(1)] = 8
    strength: Annotated[float, "times which the correction is added", above(0)] = 0.1
    dropout: Annotated[float, "of the difference between stream and state", between(0, 0.99)] = 0.2
    hidden: Annotated[int | None, "width inside T and G; left out, the rank", at_least(1)] = None
    auxiliary: Annotated[float, "what the loss of s_0's own words counts; 0 for none", at_least(0)] = 0.05

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, Any]] = {"rank": 3, "hidden": 4, "strength": 0.5, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "SHADOW",
        out=_out,
        back=_back,
        settings={
            "r": "rank",
            "shadow_alpha": "strength",
            "shadow_dropout": "dropout",
            "update_hidden_size": "hidden",
            "auxiliary_loss_weight": "auxiliary",
        },
        fixed={"shadow_model": "mirror", "share_embeddings": True, **dict.fromkeys(_SAME_WIDTHS)},
        ignored=("init_weights",),
        silent=("exclude_modules", "layers_pattern", "layers_to_transform"),
        read=_one_block,
        also=("shadow_num_hidden_layers", "target_modules"),
        transposed=False,
        heads=False,
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self._blocks(anatomy)
        key = object()  # under which the state is handed from block to block
        for number, site in enumerate(sites):

            def build(base: Base, s: Site = site, n: int = number) -> Attachment:
                beside = Mirror(base.module, anatomy) if n == 0 else None
                return Corrected(self, s, key, beside, last=n == len(sites) - 1)

            yield Attach(site, build, takes_over=True)

    def n_params(self, anatomy: Anatomy) -> int:
        sites = self._blocks(anatomy)
        d, hidden = sites[0].d_out, self.hidden or self.rank
        sizes = Sizes(anatomy.d, anatomy.d_head, 1, anatomy.d)
        beside = side_params(anatomy, sizes, sites[0].stack, (sites[0].layer or 0,))
        beside += sum(s.n_params for s in anatomy.all_sites if s.kind == "norm" and s.part == "final")
        update = 2 * (2 * d * hidden + hidden + d)
        return beside + 2 * d * self.rank * len(sites) + update * (len(sites) - 1)

    def begin(self, tuned: TunedView) -> None:
        try_pass(tuned, "shadow")

    def loss(self, tuned: TunedView, forward: Objective) -> Any:
        mirrors = [m.mirror for m in own_modules(self, tuned, Corrected) if m.mirror is not None]
        learns = tuned.anatomy.is_decoder and self.auxiliary > 0 and bool(mirrors) and mirrors[0].training
        head = tuned.model.get_output_embeddings() if learns else None
        if head is None:
            return forward()
        (mirror,) = mirrors
        mirror.listens = True
        try:
            result = forward()
        finally:
            mirror.listens, state, mirror.heard = False, mirror.heard, None
        labels = result.labels  # (rows, tokens); of answers that are compared there are none
        if state is not None and labels is not None and labels.dim() == 2:
            own = words_loss(tuned.model, head, state[:, -labels.shape[1] :], labels)
            result.loss = result.loss + self.auxiliary * own
        return result

    def conflicts(self, other: Method) -> str | None:
        if other.is_a(*FOLLOWS):
            return (
                f"shadow takes the calls of blocks over, which {other.name} reads, changes or repeats. Use one of them."
            )
        return None

    def _blocks(self, anatomy: Anatomy) -> tuple[Site, ...]:
        if anatomy.is_encoder_decoder:
            raise AnatomyError(
                f"shadow: a state goes through one stack of blocks, and this {anatomy.model_type} has two. Use lst."
            )
        kept_layers(anatomy, (), "shadow")
        return anatomy.sites("block_out", asked_by="shadow")


def words_loss(model: Any, head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of the next words, told by states (rows, tokens, d) through the model's output matrix."""
    states, wanted = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if not isinstance(head, nn.Linear):  # what is attached to the head acts here too
        return nn.functional.cross_entropy(finished_logits(model, head(states).float()), wanted, reduction="sum")
    with torch.autocast(device, enabled=False):
        scaled = (states * scale_of(model)).to(head.weight.dtype)
        loss, _ = linear_cross_entropy(scaled, head.weight, head.bias, wanted, softcap=softcap_of(model), dtype=dtype)
    return loss


class Mirror(nn.Module):
    """One block of the model's kind and its last norm, with random weights: where the state starts."""

    def __init__(self, block: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.listens = False
        self.heard: Tensor | None = None
        held = (getattr(m, "config", None) for m in block.modules())
        found = next((c for c in held if isinstance(c, PretrainedConfig)), None)
        if found is None:
            raise AnatomyError(
                f"shadow: a block of {anatomy.model_type} does not hold its configuration, so none can be made beside "
                "it. Use another method, such as lst."
            )
        config: Any = copy.deepcopy(found)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        if anatomy.vocab_size is not None:  # its embeddings are thrown away; only the padding row has to exist
            config.vocab_size = (getattr(config, "pad_token_id", None) or 0) + 2
        vars(config).pop("quantization_config", None)
        small = AutoModel.from_config(config)
        config._attn_implementation = found._attn_implementation
        side = Anatomy.read(small)
        self.block = small.get_submodule(side.blocks[0].path)
        norm = next((s for s in side.all_sites if s.kind == "norm" and s.part == "final"), None)
        self.norm = small.get_submodule(norm.path) if norm is not None else None
        self.depth = max(anatomy.depths.values())
        for module in self.block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = self.depth  # behind the model's own layers in the cache
        self.float()

    def forward(self, x: Tensor, given: dict[str, Any], past: int) -> Tensor:
        """x: (rows, tokens, d), and so the result."""
        dtype = next(self.block.parameters()).dtype
        given = {name: _cast(value, dtype) for name, value in given.items() if value is not x}
        for name in ("past_key_values", "layer_past"):
            if given.get(name) is not None:
                self._room(given[name], past)
        given.pop(next(iter(inspect.signature(self.block.forward).parameters)), None)
        out = self.block.forward(x.to(dtype), **given)  # not as a call: what counts or repeats blocks is not asked
        states: Tensor = out[0] if isinstance(out, tuple | list) else out
        return states if self.norm is None else self.norm(states)

    def _room(self, cache: Any, past: int) -> None:
        if len(cache.layers) <= self.depth and (past or cache.layers):
            if past:
                raise filled_elsewhere("shadow", past, 0)
            make_room(cache, 0, self.depth, "shadow")
        known = cache.get_seq_length(self.depth)
        if known != past:
            raise filled_elsewhere("shadow", past, known)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, tuple) else value


class Corrected(Attachment):
    """One block, with what it reads corrected by the state, and the state moved by what it gives."""

    kind = "parallel"
    per_token = False

    def __init__(self, settings: Shadow, site: Site, key: object, mirror: Mirror | None, last: bool) -> None:
        super().__init__()
        d, hidden = site.d_out, settings.hidden or settings.rank
        self.key, self.strength, self.dropout = key, settings.strength, nn.Dropout(settings.dropout)
        self.mirror = mirror
        self.down = nn.Linear(d, settings.rank, bias=False)
        self.up = nn.Linear(settings.rank, d, bias=False)
        nn.init.zeros_(self.up.weight)
        self.move = None if last else _two(d, hidden)
        self.gate = None if last else _two(d, hidden)

    def around(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        dtype, context = self.down.weight.dtype, self.context
        if self.mirror is not None:
            state = self.mirror(x, call.given, context.past)  # type: ignore[attr-defined]
            if self.mirror.listens:
                self.mirror.heard = state
        else:
            state = context.looked[id(self.key)]
        change = self.up(self.down(self.dropout(x.to(dtype) - state)))
        out = call(x + (self.strength * change).to(x.dtype))
        if self.move is not None and self.gate is not None:
            wide = out.to(dtype)
            share = torch.sigmoid(self.gate(wide))
            # Replaced, not written to: a block that is computed again finds the state that it was given.
            context.looked = {**context.looked, id(self.key): (1 - share) * state + share * self.move(wide)}
        return out


def _two(d: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))
