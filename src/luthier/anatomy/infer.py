"""Find the blocks of a model and the role of every layer in a block, by structure.

What is used, in this order: the names of query, key and value layers (there are few in use); shapes (a projection back
to the model's width); the order of calls (`order.py`), which tells norms before a sublayer from norms after it, and
a dropout that ends a sublayer from one inside it; and the table of the architecture, where it has one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import nn

from luthier.anatomy.architecture import Architecture, Fused
from luthier.anatomy.order import (
    calls_in_order,
    goes_through_interface,
    is_dropout,
    n_tensor_arguments,
    reads_without_calling,
)
from luthier.anatomy.site import Rows, Site
from luthier.core import AnatomyError

__all__ = [
    "AttentionFacts",
    "BlockFacts",
    "attends",
    "block_lists",
    "has_weight",
    "is_norm",
    "layer_shape",
    "norm_site",
    "read_block",
]

_QUERY = {"q", "q_proj", "q_lin", "query", "query_proj", "q_attn", "wq", "to_q", "queries_linear"}
_KEY = {"k", "k_proj", "k_lin", "key", "key_proj", "wk", "to_k", "keys_linear"}
_VALUE = {"v", "v_proj", "v_lin", "value", "value_proj", "wv", "to_v", "values_linear"}
_FUSED_NAMES = {"c_attn", "query_key_value", "qkv_proj", "qkv", "wqkv", "Wqkv", "in_proj", "attn_qkv"}
_CROSS = re.compile(r"cross|encdec|enc_dec|encoder_attn|inter_attention", re.IGNORECASE)
_GATE = re.compile(r"gate|^wi_0$|^w1$|^linear_v$", re.IGNORECASE)


@dataclass(frozen=True)
class AttentionFacts:
    """One attention of a block. Paths are those of the whole model."""

    path: str
    cross: bool
    n_heads: int
    n_kv_heads: int
    d_head: int
    interface: bool
    causal: bool


@dataclass
class BlockFacts:
    """All that was found in one block."""

    sites: list[Site] = field(default_factory=list)
    attentions: list[AttentionFacts] = field(default_factory=list)
    pre_norm: bool = False
    unknown: list[str] = field(default_factory=list)  # fused layers whose order nobody has told us
    remarks: list[str] = field(default_factory=list)  # what a block lacks that others have


def layer_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """(d_in, d_out, transposed) of a linear layer however it stores its weight; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, bool(getattr(module, "transposed", False))
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and getattr(weight, "ndim", 0) == 2:
        return int(module.nx), int(module.nf), True  # type: ignore[arg-type]
    return None


def is_norm(path: str, module: nn.Module) -> bool:
    """Whether `module` is a LayerNorm or RMSNorm, or the identity that stands where one was left out."""
    named = "norm" in path.rsplit(".", 1)[-1].lower() or path.rsplit(".", 1)[-1].lower().startswith("ln")
    if isinstance(module, nn.Identity):
        return named
    of_class = "norm" in type(module).__name__.lower()
    own = [p for p in module._parameters.values() if p is not None]
    if not own:
        return of_class and not any(module.children())  # OLMo's norms train nothing
    weight = module._parameters.get("weight")
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and (named or of_class)


def block_lists(model: nn.Module) -> list[tuple[str, list[str]]]:
    """The lists of blocks, as (path of the list, paths of its blocks).

    A list of blocks is the innermost list each of whose members has an attention and a feed-forward layer; or whose
    members differ in that, as long as one has both and the others are of the same make: layers without keys or values
    of their own (Gemma 4), or with something else in the attention's place (Qwen3-Next).
    """
    found: list[tuple[str, list[str]]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and _are_blocks(list(module)):
            found = [(p, blocks) for p, blocks in found if not path.startswith(f"{p}.")]
            found.append((path, [f"{path}.{name}" for name in module._modules]))
    return found


def _are_blocks(members: list[nn.Module]) -> bool:
    kinds = {type(m) for m in members if _is_block(m)}
    return all(type(m) in kinds for m in members)


def _is_block(module: nn.Module) -> bool:
    """Whether one module holds an attention, and a linear layer that is none of its projections."""
    roles = [_role(path) for path, m in module.named_modules() if layer_shape(m) is not None]
    attends = {"q", "k", "v"} <= set(roles) or "fused" in roles
    others = any(p.ndim == 3 for p in module.parameters()) or roles.count("") >= 2
    return attends and others


def _role(path: str) -> str:
    """ "q", "k", "v", "fused" or "" for a linear layer of that name."""
    name = _name(path)
    for role, names in (("q", _QUERY), ("k", _KEY), ("v", _VALUE)):
        if name in names:
            return role
    # A state-space layer has an in_proj too: the name alone says too little.
    return "fused" if name in _FUSED_NAMES and "att" in _parent(path).lower() else ""


def read_block(
    model: nn.Module,
    path: str,
    layer: int,
    stack: str,
    config: Any,
    architecture: type[Architecture],
    shared: int = 1,
    causal: bool = False,
    width: int = 0,
) -> BlockFacts:
    """All sites of the block at `path`.

    Args:
        causal: whether an attention that does not say so itself looks back only.
        width: of the residual stream, for a block without an attention, which tells it otherwise.

    Raises:
        AnatomyError: the number of heads is nowhere to be found.
    """
    return _Reader(model, path, layer, stack, config, architecture, shared, causal, width).read()


def attends(block: nn.Module) -> bool:
    """Whether a block has an attention with queries of its own."""
    return any(_role(path) in ("q", "fused") for path, m in block.named_modules() if layer_shape(m) is not None)


class _Reader:
    """Reads one block. Paths inside are relative to the block."""

    def __init__(
        self,
        model: nn.Module,
        path: str,
        layer: int,
        stack: str,
        config: Any,
        architecture: type[Architecture],
        shared: int,
        causal: bool,
        width: int,
    ) -> None:
        self.block = model.get_submodule(path)
        self.path, self.layer, self.stack, self.shared = path, layer, stack, shared
        self.config, self.architecture, self.causal = config, architecture, causal
        self.width = width
        self.calls = calls_in_order(self.block)
        self.order = list(dict.fromkeys(self.calls))
        self.modules: dict[str, nn.Module] = dict(self.block.named_modules())
        self.linears = [p for p in self.order if layer_shape(self.modules[p]) is not None]
        self.facts = BlockFacts()

    def read(self) -> BlockFacts:
        scopes = self._attention_scopes()
        inside = {p for scope in scopes for p in self.linears if _below(p, scope)}
        outs: dict[str, str] = {}  # sublayer -> path where it ends
        firsts: dict[str, str] = {}  # sublayer -> its first projection
        for scope in scopes:
            name, firsts_here, out = self._attention(scope)
            firsts[name], outs[name] = firsts_here, out
        experts = self._experts()
        feed = [p for p in self.linears if p not in inside and _name(p) not in self.architecture.beside]
        if not scopes:  # what stands in the attention's place has linear layers too
            self.facts.remarks.append(f"{self._mixer(feed)} in place of an attention with queries, keys and values")
            feed = [p for p in feed if _top(p) == _top(self._down(feed))]
        if experts:
            firsts["ffn"], outs["ffn"] = experts, experts
        ends = self._feed_forward(feed)
        if ends is not None and not experts:
            firsts["ffn"], outs["ffn"] = ends
        self._sublayers(firsts, outs)
        self._norms()
        return self.facts

    # -- attention -------------------------------------------------------------------------------------------------

    def _attention_scopes(self) -> list[str]:
        """The modules that hold an attention and its output projection, in order of use."""
        scopes: list[str] = []
        for path in self.linears:
            if _role(path) not in ("q", "fused"):
                continue
            parent = _parent(path)
            while parent and not self._outputs(parent):
                parent = _parent(parent)  # BERT: query, key and value lie one module deeper than the output
            if parent and parent not in scopes:
                scopes.append(parent)
        return scopes

    def _outputs(self, scope: str) -> list[str]:
        """Linear layers below `scope` that are no query, key or value: the output projection comes last."""
        names = [p for p in self.linears if _below(p, scope)]
        return [p for p in names if not _role(p) and not _name(p).startswith("pos_")]

    def _attention(self, scope: str) -> tuple[str, str, str]:
        """Add the projections of one attention; say its name, its first projection and where it ends."""
        cross = bool(_CROSS.search(scope))
        prefix = "cross" if cross else "attn"
        mine = [p for p in self.linears if _below(p, scope)]
        roles = {_role(p): p for p in reversed(mine)}
        inner = self.modules[_parent(roles.get("q") or roles["fused"])]
        n_heads = self._n_heads(inner)
        output = self._outputs(scope)[-1]
        joined = _shape(self.modules[output])[0]  # the width of all heads together
        d_head = joined // n_heads
        n_kv = n_heads
        groups = getattr(inner, "num_key_value_groups", None)
        if "k" in roles:
            n_kv = _shape(self.modules[roles["k"]])[1] // d_head
        elif "fused" in roles and "q" not in roles:
            n_kv = (_shape(self.modules[roles["fused"]])[1] // d_head - n_heads) // 2
        elif "q" in roles and isinstance(groups, int) and groups > 0:
            n_kv = n_heads // groups
        if "q" in roles and "fused" not in roles and (missing := [r for r in ("k", "v") if r not in roles]):
            names = {"k": "key", "v": "value"}
            self.facts.remarks.append(f"no {' or '.join(names[r] for r in missing)} projection of their own")
        for role in ("q", "k", "v"):
            if role in roles:
                self._add(f"{prefix}.{role}", roles[role])
        if "fused" in roles:
            self._add_fused(roles["fused"], prefix, n_heads, n_kv, d_head, "q" in roles)
        self._add(f"{prefix}.o", output)
        self.width = _shape(self.modules[output])[1]
        causal = getattr(inner, "is_causal", None)
        causal = self.causal if causal is None else causal
        self.facts.attentions.append(
            AttentionFacts(
                path=self._whole(_parent(roles.get("q") or roles["fused"])),
                cross=cross,
                n_heads=n_heads,
                n_kv_heads=n_kv,
                d_head=d_head,
                interface=goes_through_interface(inner),
                causal=bool(causal) and not cross,
            )
        )
        return prefix, roles.get("q") or roles["fused"], self._end(output)

    def _n_heads(self, attention: nn.Module) -> int:
        own = getattr(attention, "config", None) or self.config
        for holder in (attention, own, self.config):
            for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
                if isinstance(value := getattr(holder, name, None), int) and value > 0:
                    return value
        raise AnatomyError(
            f"{self.path}: the number of attention heads is neither in the module nor in the configuration"
            " (as num_attention_heads, num_heads, n_heads or n_head)."
        )

    def _add_fused(self, path: str, prefix: str, n_heads: int, n_kv: int, d_head: int, has_query: bool) -> None:
        told = self.architecture.fused.get(_name(path))
        if told is None:
            self.facts.unknown.append(self._whole(path))
            return
        parts = [p.replace("attn.", f"{prefix}.") for p in told.parts if not (has_query and p == "attn.q")]
        widths = [(n_heads if part.endswith(".q") else n_kv) * d_head for part in parts]
        for part, rows in _split(told, parts, widths, n_heads):
            self._add(part, path, rows)

    # -- feed-forward ----------------------------------------------------------------------------------------------

    def _feed_forward(self, names: list[str]) -> tuple[str, str] | None:
        """Add gate, up and down; say where the sublayer begins and ends."""
        width = self.width
        down = self._down(names)
        if not down:
            return None
        inner = _shape(self.modules[down])[0]
        before = [p for p in names[: names.index(down)] if _shape(self.modules[p])[0] == width]
        whole = [p for p in before if _shape(self.modules[p])[1] == inner]
        fused = [p for p in before if _shape(self.modules[p])[1] == 2 * inner]
        if fused:
            told = self.architecture.fused.get(_name(fused[-1]))
            if told is None:
                self.facts.unknown.append(self._whole(fused[-1]))
            else:
                for part, rows in _split(told, list(told.parts), [inner, inner], 1):
                    self._add(part, fused[-1], rows)
        else:
            gates = [p for p in whole if _GATE.search(_name(p))] if len(whole) > 1 else []
            for path in whole[-2:]:
                self._add("ffn.gate" if path in gates else "ffn.up", path)
        self._add("ffn.down", down)
        firsts = fused or whole
        return (firsts[0] if firsts else down), self._end(down, firsts)

    def _down(self, names: list[str]) -> str:
        """The last projection back to the model's width; "" where there is none."""
        return next((p for p in reversed(names[1:]) if _shape(self.modules[p])[1] == self.width), "")

    def _mixer(self, feed: list[str]) -> str:
        """The class of what the first linear layer of the block lies in."""
        first = _parent(feed[0]) if feed else ""
        return type(self.modules[first]).__name__ if first else "nothing"

    def _experts(self) -> str | None:
        """Add the sites of 3-D expert weights; return the path of the module that mixes the experts."""
        for path in self.order:
            module = self.modules[path]
            weights = {n: p for n, p in module._parameters.items() if p is not None and p.ndim == 3}
            if "down_proj" not in weights:
                continue
            n_experts, rows, columns = weights["down_proj"].shape
            widest = next((p for n, p in weights.items() if n != "down_proj"), weights["down_proj"])
            # Expert weights are square often enough; the other tensor tells (d_out, d_in) from (d_in, d_out) then.
            transposed = columns == self.width and (rows != self.width or widest.shape[2] > widest.shape[1])
            inner = rows if transposed else columns
            for name, weight in weights.items():
                d_in, d_out = (weight.shape[1], weight.shape[2])[:: 1 if transposed else -1]
                bias = f"{name}_bias" if f"{name}_bias" in module._parameters else None
                places: list[tuple[str, Rows | None]] = [("experts.down", None)]
                if name != "down_proj":
                    places = [("experts.gate" if _GATE.search(name) else "experts.up", None)]
                if name != "down_proj" and d_out == 2 * inner:
                    told = self.architecture.fused.get(name)
                    if told is None:
                        self.facts.unknown.append(f"{self._whole(path)}.{name}")
                        continue
                    places = list(_split(told, list(told.parts), [inner, inner], 1))
                spot = replace(self._site("", path), param=name, bias=bias, transposed=transposed, n_experts=n_experts)
                for expert in range(n_experts):
                    for kind, which in places:
                        out = which.count if which else d_out
                        n = out * (d_in + (bias is not None))
                        self.facts.sites.append(
                            replace(spot, kind=kind, rows=which, d_in=d_in, d_out=out, expert=expert, n_params=n)
                        )
            return _parent(path) or path
        return None

    # -- where sublayers begin and end -----------------------------------------------------------------------------

    def _end(self, last: str, firsts: list[str] | None = None) -> str:
        """The module that returns the sublayer's output: its dropout, or its feed-forward module, or `last`.

        A dropout that ends several sublayers of the block (ViT) is the place of none of them.
        """
        if dropout := self._dropout_after(last):
            others = [p for p in self.linears if p != last and self._dropout_after(p) == dropout]
            if not others:
                return dropout
        parent = _parent(last)
        if firsts and parent and all(_below(p, parent) for p in firsts):
            holds_norm = any(_below(p, parent) and is_norm(p, m) for p, m in self.modules.items())
            if not holds_norm and n_tensor_arguments(self.modules[parent]) == 1:
                return parent
        return last

    def _dropout_after(self, path: str) -> str:
        """The dropout called next after `path`, if it is next."""
        for here, following in pairwise(self.calls):
            if here == path and is_dropout(following, self.modules[following]):
                return following
        return ""

    def _sublayers(self, firsts: Mapping[str, str], outs: Mapping[str, str]) -> None:
        width = self.width
        norms = [p for p in self.order if is_norm(p, self.modules[p])]
        told = self.architecture.pre_norm(self.config)
        first = firsts.get("attn") or next(iter(self.linears), None)
        calls_norm_first = any(self.order.index(p) < self.order.index(first) for p in norms) if first else False
        self.facts.pre_norm = calls_norm_first if told is None else told
        for name in ("attn", "cross", "ffn"):
            if name not in outs:
                continue
            reads = self.architecture.inputs.get(name) or firsts[name]
            residual = reads
            if self.facts.pre_norm and not self.architecture.residual_is_input(self.config):
                begin = self.order.index(firsts[name]) if firsts[name] in self.order else self._begin(firsts[name])
                earlier = [p for p in norms if self.order.index(p) < begin]
                residual = earlier[-1] if earlier else reads
            out = outs[name]
            shape = layer_shape(self.modules[out])
            self.facts.sites.append(
                replace(
                    self._site(f"{name}_out", out),
                    d_in=shape[0] if shape else width,
                    d_out=width,
                    transposed=False,
                    bias=None,
                    n_params=0,
                    input_path=self._whole(reads),
                    residual_path=self._whole(residual),
                )
            )
        self.facts.sites.append(
            Site("block_out", self.layer, self.path, width, width, stack=self.stack, shared=self.shared)
        )

    def _begin(self, path: str) -> int:
        return min(self.order.index(p) for p in self.order if _below(p, path))

    def _norms(self) -> None:
        used = [p for p in self.order if is_norm(p, self.modules[p]) and has_weight(self.modules[p])]
        for index, path in enumerate(used):
            self.facts.sites.append(
                norm_site(self._whole(path), self.modules[path], self.layer, self.stack, str(index))
            )
            self.facts.sites[-1] = replace(self.facts.sites[-1], shared=self.shared)

    # -- small things ----------------------------------------------------------------------------------------------

    def _whole(self, path: str) -> str:
        return f"{self.path}.{path}" if path else self.path

    def _site(self, kind: str, path: str) -> Site:
        return Site(kind, self.layer, self._whole(path), 0, 0, stack=self.stack, shared=self.shared)

    def _add(self, kind: str, path: str, rows: Rows | None = None) -> None:
        if reads_without_calling(self.modules[_parent(path)], _name(path)):
            # Nothing attached there would be called, and no gradient would come.
            self.facts.remarks.append(f"{_name(path)}, whose weight is read without the layer being called: no site")
            return
        module = self.modules[path]
        d_in, d_out, transposed = _shape(module)
        bias = "bias" if module._parameters.get("bias") is not None else None
        d_out = rows.count if rows else d_out
        self.facts.sites.append(
            replace(
                self._site(kind, path),
                d_in=d_in,
                d_out=d_out,
                rows=rows,
                transposed=transposed,
                bias=bias,
                n_params=d_out * (d_in + (bias is not None)),
            )
        )


def has_weight(norm: nn.Module) -> bool:
    """Whether a norm has numbers of its own."""
    return norm._parameters.get("weight") is not None


def norm_site(path: str, module: nn.Module, layer: int | None, stack: str, part: str) -> Site:
    """The site of one norm; its width is d_in and d_out."""
    own = {n: p for n, p in module._parameters.items() if p is not None}
    width = own["weight"].numel()
    bias = "bias" if "bias" in own else None
    n = sum(p.numel() for p in own.values())
    return Site("norm", layer, path, width, width, stack=stack, bias=bias, n_params=n, part=part)


def _split(told: Fused, parts: list[str], widths: list[int], n_heads: int) -> Iterator[tuple[str, Rows]]:
    """Give each part its rows."""
    total = sum(widths)
    offset = 0
    for k, (part, width) in enumerate(zip(parts, widths, strict=True)):
        if told.layout == "contiguous":
            yield part, Rows(offset, width, total)
        elif told.layout == "per_head":
            yield part, Rows(offset // n_heads, width // n_heads, total // n_heads, n_heads)
        else:
            yield part, Rows(k, 1, len(parts), width)
        offset += width


def _shape(module: nn.Module) -> tuple[int, int, bool]:
    shape = layer_shape(module)
    assert shape is not None
    return shape


def _below(path: str, scope: str) -> bool:
    return path.startswith(f"{scope}.")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _top(path: str) -> str:
    """The child of the block that a path lies in; "" for a child itself."""
    return path.partition(".")[0] if "." in path else ""


def _name(path: str) -> str:
    return path.rpartition(".")[2]
