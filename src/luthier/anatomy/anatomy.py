"""All sites of one model, read from its structure alone: no weight is looked at, so the meta device will do."""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from luthier.anatomy.architecture import architecture_of
from luthier.anatomy.infer import attends, block_lists, has_weight, is_norm, layer_shape, norm_site, read_block
from luthier.anatomy.selection import selectors
from luthier.anatomy.site import KINDS, Site
from luthier.core import AnatomyError, near
from luthier.core.other_names import place_here
from luthier.core.protocols import Model

__all__ = ["Anatomy", "Attention", "Block"]


@dataclass(frozen=True)
class Attention:
    """One attention. `path` is the module that hands its queries, keys and values on.

    `interface` says whether it does so through transformers' registry of attention functions, with itself as the
    first argument; where it does not, no keys can be added to it from outside.
    """

    path: str
    layer: int
    stack: str
    cross: bool
    n_heads: int
    n_kv_heads: int
    d_head: int
    interface: bool
    causal: bool


@dataclass(frozen=True)
class Block:
    """One layer of the model."""

    path: str
    layer: int
    stack: str


@dataclass(frozen=True)
class Anatomy:
    """One name for every place of one model.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20))
    >>> anatomy = Anatomy.read(model)
    >>> for site in anatomy.sites("attn.q"):
    ...     print(site.key, site.path)
    attn.q@0 bert.encoder.layer.0.attention.self.query
    attn.q@1 bert.encoder.layer.1.attention.self.query

    Args:
        d: width of the residual stream.
        m: inner width of the feed-forward layer (of the first stack).
        n_layers: layers that a forward pass goes through, all stacks together; ALBERT counts its one block that often.
        n_heads: of the first attention.
        d_head: width of one of its heads.
        n_kv_heads: its heads of keys and values.
        max_positions: tokens that the model can count; None where nothing bounds them.
        n_params: all numbers of the model, tied ones once, the head included.
        pre_norm: whether sublayers read a normed stream (GPT-2), not the stream itself (BERT).
        backbone: path of the pretrained part below a head; "" where the model is that part, or nests it differently.
        head_tensors: parameters that a pretrained checkpoint does not have: a classifier, say.
        tensors: name -> shape of every parameter, tied ones under their first name only.
        tied: other name -> first name.
    """

    model_type: str
    d: int
    m: int
    n_layers: int
    n_heads: int
    d_head: int
    n_kv_heads: int
    vocab_size: int | None
    max_positions: int | None
    n_params: int
    is_decoder: bool
    is_encoder_decoder: bool
    pre_norm: bool
    all_sites: tuple[Site, ...] = field(repr=False)
    attentions: tuple[Attention, ...] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    backbone: str
    head_tensors: tuple[str, ...]
    tensors: dict[str, tuple[int, ...]] = field(repr=False)
    tied: dict[str, str] = field(repr=False)
    unknown: tuple[str, ...] = ()  # fused layers whose order no table tells
    text_stack: str = ""  # where other stacks (an image tower) stand beside it: the one that reads and writes words
    remarks: tuple[str, ...] = ()  # which layers are unlike the others, and in what
    head_known: bool = True  # False: a classifier of which nothing tells the pretrained part from the new head

    @classmethod
    def read(cls, model: Model | nn.Module) -> "Anatomy":
        """Read the model's structure. To be done before any surgery.

        Raises:
            AnatomyError: no list of blocks with an attention and a feed-forward layer was found.
        """
        if not isinstance(model, nn.Module):
            raise AnatomyError(f"{type(model).__name__} is no module of torch. Give a model of transformers.")
        return _read(model)

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the stacks, "" for the only one."""
        return tuple(dict.fromkeys(b.stack for b in self.blocks))

    @property
    def acting_attentions(self) -> tuple[Attention, ...]:
        """The attentions that a method without a setting for it acts on: of the words' stack where there are others."""
        return tuple(a for a in self.attentions if not self.text_stack or a.stack == self.text_stack)

    def kinds(self) -> list[str]:
        """The kinds of site that the model has, in the vocabulary's order."""
        return [kind for kind in KINDS if any(site.kind == kind for site in self.all_sites)]

    def sites(
        self,
        *kinds: str,
        layers: Iterable[int] | None = None,
        stack: str | None = None,
        asked_by: str = "",
        fits: Callable[[Site], bool] | None = None,
    ) -> tuple[Site, ...]:
        """All sites that the choices mean, in the model's order; each choice must mean one.

        In a model that writes words and has other stacks beside (an image tower), a kind without a stack stands for
        that of the words' stack.

        Args:
            kinds: such as "attn.q"; a family's name ("experts", "ffn") stands for all that the model has of it; "@" and
                a stack or layers may follow ("attn.q@vision_tower", "attn.q@0-5", "*@last4";
                `luthier.anatomy.selection`). None at all stands for every kind.
            layers: only sites of these layers (counted in each stack from 0); sites outside the layers are left out.
            stack: only "encoder" or "decoder".
            asked_by: who asks, for the message.
            fits: what "*" stands for; without it, every site.

        Raises:
            AnatomyError: the model has no such site, or not there; the message lists what there is.
            ConfigError: a choice that is not written as one.
        """
        kept = None if layers is None else set(layers)
        candidates = [
            s for s in self.all_sites if (kept is None or s.layer in kept) and (stack is None or s.stack == stack)
        ]
        if not kinds and candidates:
            return tuple(candidates)
        who = f"{asked_by}: " if asked_by else ""
        wanted: set[int] = set()
        for choice in selectors(kinds or self.kinds(), who):
            where = choice.chosen(self.depths, who)
            inside = choice.stack or (self.text_stack if stack is None else "")
            of_kind = [s for s in candidates if choice.means(s, fits) and (s.stack in (inside, "") or not inside)]
            if not of_kind:
                raise AnatomyError(self._absent(choice.kind, kept, inside or stack, asked_by))
            there = [id(s) for s in of_kind if where is None or (s.stack, s.layer) in where]
            if not there:
                raise AnatomyError(f"{who}{choice.text!r} means no site: {_where(of_kind)}.")
            wanted |= set(there)
        return tuple(s for s in candidates if id(s) in wanted)

    @property
    def depths(self) -> dict[str, int]:
        """Layers of each stack; the one stack of most models is called ""."""
        return {stack: 1 + max(b.layer for b in self.blocks if b.stack == stack) for stack in self.stacks}

    def _absent(self, kind: str, layers: set[int] | None, stack: str | None, asked_by: str) -> str:
        who = f"{asked_by}: " if asked_by else ""
        there = any(s.kind == kind or s.kind.startswith(f"{kind}.") for s in self.all_sites)
        if there:
            layers_there = sorted({b.layer for b in self.blocks})
            stacks = sorted({b.stack for b in self.blocks if b.stack})
            where = f" in layers {sorted(layers)}" if layers is not None else ""
            where += f" in the stack {stack!r}" if stack is not None else ""
            return (
                f"{who}this {self.model_type} model has {kind!r}, but none{where}. It has layers"
                f" {layers_there[0]} to {layers_there[-1]}"
                + (f" in the stacks {', '.join(stacks)}." if stacks else ".")
            )
        if kind not in KINDS and kind not in {k.split(".")[0] for k in KINDS}:
            ours = place_here(kind)
            hint = f" Here that is {ours!r}." if ours is not None else near(kind, list(KINDS))
            return f"{who}no site is called {kind!r}.{hint} This model has {', '.join(self.kinds())}."
        blame = f" The order inside {', '.join(self.unknown)} is not known." if self.unknown else ""
        return (
            f"{who}this {self.model_type} model has no site {kind!r}. It has {', '.join(self.kinds())}."
            f"{near(kind, self.kinds())}{blame}"
        )

    def bias_tensors(self, subset: str | None = None) -> tuple[str, ...]:
        """Names of all bias parameters of the backbone, norms' biases included.

        Args:
            subset: a kind of site, such as "attn.q": only the biases of those sites' modules (where the layer is fused,
                the whole layer's: the site's `rows` say which part is its own).

        Raises:
            AnatomyError: the model has no such site.
        """
        sites = self.all_sites if subset is None else self.sites(subset, asked_by="bias_tensors")
        named = {f"{s.path}.{s.bias}" for s in sites if s.bias}
        if subset is None:  # layers that are no site of ours have biases too: a pooler, a projection of embeddings
            named |= {n for n, shape in self.tensors.items() if n.endswith(".bias") and len(shape) == 1}
        return tuple(n for n in self.tensors if n in named and n not in self.head_tensors)

    def norm_tensors(self) -> tuple[str, ...]:
        """Names of all parameters of norms."""
        paths = {s.path for s in self.all_sites if s.kind == "norm"}
        return tuple(n for n in self.tensors if n.rpartition(".")[0] in paths)

    def table(self) -> list[dict[str, Any]]:
        """One row per kind, stack and part: site, path (with `{}` for the layer), shape, count, numbers."""
        rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for site in self.all_sites:
            path = site.path if site.layer is None else _generic(site, self.blocks)
            part = site.part if site.layer is None else ""
            shape = "" if not site.n_params and not site.tied else f"{site.d_out} x {site.d_in}"
            if site.kind == "norm":
                shape = str(site.d_in)
            key = (site.kind, site.stack, part, f"{path} {shape}")
            row = rows.setdefault(
                key,
                {
                    "site": site.kind,
                    "stack": site.stack,
                    "part": part,
                    "path": path if site.param == "weight" else f"{path}.{site.param}",
                    "shape": shape,
                    "count": 0,
                    "n_params": 0,
                    "notes": _notes(site),
                },
            )
            row["count"] += 1
            row["n_params"] += site.n_params
        order = list(KINDS)
        return sorted(rows.values(), key=lambda row: order.index(row["site"]))


def _where(sites: Iterable[Site]) -> str:
    """Where sites of one kind stand, for a message."""
    by_kind: dict[str, list[Site]] = {}
    for site in sites:
        by_kind.setdefault(site.kind, []).append(site)
    said = []
    for kind, members in by_kind.items():
        layers = sorted({(s.stack, s.layer) for s in members if s.layer is not None})
        named = ", ".join(f"{stack}.{layer}" if stack else str(layer) for stack, layer in layers)
        said.append(f"{kind} stands in layers {named}" if named else f"{kind} stands outside of the layers")
    return "; ".join(said)


def _generic(site: Site, blocks: tuple[Block, ...]) -> str:
    """The path with the layer's number left open."""
    for block in blocks:
        if site.path == block.path or site.path.startswith(f"{block.path}."):
            head = block.path.rpartition(".")[0]
            return f"{head}.{{}}{site.path[len(block.path) :]}"
    return site.path


def _notes(site: Site) -> str:
    words = []
    if site.rows is not None:
        words.append(f"{site.rows.count} rows of a fused layer")
    if site.transposed:
        words.append("stored transposed")
    if site.tied:
        words.append("tied")
    if site.shared > 1:
        words.append(f"shared by {site.shared} layers")
    if site.n_experts:
        words.append(f"one of {site.n_experts} experts")
    return ", ".join(words)


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(model: nn.Module) -> Anatomy:
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    backbone = _backbone(model)
    body = _read_blocks(model, config, model_type, encoder_decoder)
    tensors, tied = _tensors(model)
    trunks = _trunks(model, backbone, [block.path for block in body.blocks])
    head, is_language_model = _head(model, trunks)
    sites = [
        *_embeddings(model, encoder_decoder),
        *body.sites,
        *_outside_norms(model, body.blocks, encoder_decoder, config, backbone),
        *([head] if head is not None else []),
    ]
    text_stack = "" if encoder_decoder or not is_language_model else _text_stack(model, body.blocks)
    sites = _mark_tied(sites, tied)
    _refuse_doubles(sites, model_type)
    main = [a for a in body.attentions if a.stack == text_stack] if text_stack else body.attentions
    first = main[0]
    of_main = [s for s in sites if not text_stack or s.stack == text_stack]
    return Anatomy(
        model_type=model_type,
        d=next(s.d_in for s in of_main if s.kind == "block_out"),
        m=next((s.d_in for s in of_main if s.kind in ("ffn.down", "experts.down")), 0),
        n_layers=body.n_layers,
        n_heads=first.n_heads,
        d_head=first.d_head,
        n_kv_heads=first.n_kv_heads,
        vocab_size=next((s.d_in for s in sites if s.kind == "embed"), None),
        max_positions=_max_positions(model, config, text_stack, body.blocks),
        n_params=sum(math.prod(shape) for shape in tensors.values()),
        is_decoder=not encoder_decoder and any(a.causal for a in body.attentions),
        is_encoder_decoder=encoder_decoder,
        pre_norm=all(body.pre_norm),
        all_sites=tuple(sites),
        attentions=tuple(body.attentions),
        blocks=tuple(body.blocks),
        backbone=backbone,
        head_tensors=() if is_language_model else _outside(tensors, trunks),
        tensors=tensors,
        tied=tied,
        unknown=tuple(body.unknown),
        text_stack=text_stack,
        remarks=tuple(_remark(stack, what, layers) for (stack, what), layers in body.remarks.items()),
        head_known=is_language_model or bool(trunks) or not _is_classifier(model),
    )


def _remark(stack: str, what: str, layers: list[int]) -> str:
    where = f"of the {stack} " if stack else ""
    some = "layer" if len(layers) == 1 else "layers"
    return f"{some} {', '.join(map(str, layers))} {where}".rstrip() + f": {what}"


@dataclass
class _Body:
    """What all blocks of a model hold together."""

    sites: list[Site] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    pre_norm: list[bool] = field(default_factory=list)
    remarks: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    n_layers: int = 0


def _read_blocks(model: nn.Module, config: Any, model_type: str, encoder_decoder: bool) -> _Body:
    lists = block_lists(model)
    if not lists:
        raise AnatomyError(
            f"{type(model).__name__} ({model_type}): found no list of layers with an attention and a"
            " feed-forward layer, so it has none of our sites. Is it a transformer? If so, its query, key and value"
            " layers have names we do not know: describe it in a file of luthier/anatomy/architectures."
        )
    body = _Body()
    stacks = _stacks([path for path, _ in lists], encoder_decoder)
    for path, members in lists:
        stack = stacks[path]
        own = _config_of(model, path, config)
        architecture = architecture_of(str(getattr(own, "model_type", model_type)))
        shared = _times_used(own)
        body.n_layers += len(members) * shared
        start = sum(b.stack == stack for b in body.blocks)
        looks_back, width = _looks_back(own, stack), 0
        if not all(attends(model.get_submodule(member)) for member in members):
            like = next(m for m in members if attends(model.get_submodule(m)))
            found = read_block(model, like, 0, stack, own, architecture, shared, looks_back)
            width = next(s.d_in for s in found.sites if s.kind == "block_out")
        for layer, member in enumerate(members, start):
            facts = read_block(model, member, layer, stack, own, architecture, shared, looks_back, width)
            for remark in facts.remarks:
                body.remarks.setdefault((stack, remark), []).append(layer)
            body.sites += facts.sites
            body.attentions += [Attention(layer=layer, stack=stack, **vars(a)) for a in facts.attentions]
            body.blocks.append(Block(member, layer, stack))
            body.unknown += facts.unknown
            body.pre_norm.append(facts.pre_norm)
    return body


def _refuse_doubles(sites: list[Site], model_type: str) -> None:
    """Two places of one name would be saved under one key."""
    seen: dict[str, str] = {}
    for site in sites:
        if site.key in seen:
            raise AnatomyError(
                f"this {model_type} model has two places for {site.key!r}: {seen[site.key]} and {site.path}."
                " Its blocks are built in a way that we cannot read; describe them in luthier/anatomy/architectures."
            )
        seen[site.key] = site.path


def _stack_of(path: str, encoder_decoder: bool) -> str:
    """The stack a path lies in: the first word that says so."""
    if not encoder_decoder:
        return ""
    return next((word for word in path.split(".") if word in ("encoder", "decoder")), "")


def _stacks(paths: list[str], encoder_decoder: bool) -> dict[str, str]:
    """The stack of each list of blocks: "" where there is one, even if it comes in stages (Swin)."""
    if encoder_decoder:
        return {path: _stack_of(path, True) for path in paths}
    plain = {path: [word for word in path.split(".") if not word.isdigit()] for path in paths}
    if len({tuple(words) for words in plain.values()}) == 1:
        return dict.fromkeys(paths, "")
    common = set.intersection(*(set(words) for words in plain.values()))
    return {path: next((w for w in words if w not in common), "") for path, words in plain.items()}


def _text_stack(model: nn.Module, blocks: list[Block]) -> str:
    """The stack that words go through, where there are several; "" where there is one, or nothing tells."""
    if len({b.stack for b in blocks}) < 2:
        return ""
    table = _asked(model, "get_input_embeddings")
    path = next((p for p, m in model.named_modules() if m is table), "") if table is not None else ""
    found = {b.stack for b in blocks if path and path.startswith(_around(b))}
    return found.pop() if len(found) == 1 else ""


def _around(block: Block) -> str:
    """What holds a block's list: `model.language_model.` for `model.language_model.layers.3`."""
    holder = block.path.rpartition(".")[0].rpartition(".")[0]
    return f"{holder}." if holder else ""


def _looks_back(config: Any, stack: str) -> bool:
    """Whether attentions that do not say so themselves are causal: in a decoder, and in what only writes text."""
    kind = str(getattr(config, "model_type", ""))
    writes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return stack == "decoder" or bool(getattr(config, "is_decoder", False)) or writes


def _config_of(model: nn.Module, path: str, config: Any) -> Any:
    """The configuration of the nearest module above `path` that has one: a stack may have its own."""
    words = path.split(".")
    for n in range(len(words), -1, -1):
        found = getattr(model.get_submodule(".".join(words[:n])), "config", None)
        if found is not None:
            return found
    return config


def _times_used(config: Any) -> int:
    """How many layers use each block: more than one only where groups of layers share theirs (ALBERT)."""
    groups = getattr(config, "num_hidden_groups", None)
    layers = getattr(config, "num_hidden_layers", None)
    if groups is None or layers is None:
        return 1
    return max(1, int(layers) // int(groups))


def _embeddings(model: nn.Module, encoder_decoder: bool) -> list[Site]:
    """The word embedding that each stack looks words up in."""
    table = _asked(model, "get_input_embeddings")
    if not isinstance(table, nn.Embedding):
        return []  # images: patches are projected, not looked up
    same = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
        and (module is table or module.weight.shape[0] == table.weight.shape[0])
        and (module is table or module.weight is table.weight or path.rsplit(".", 1)[-1] == _embed_name(model, table))
    ]
    found: dict[str, Site] = {}
    for path, module in same:
        stack = _stack_of(path, encoder_decoder)
        if encoder_decoder and not stack and len(same) > 1:
            continue  # T5 and BART keep the shared table at the top and look words up in their stacks' own
        found.setdefault(
            stack,
            Site(
                "embed",
                None,
                path,
                module.num_embeddings,
                module.embedding_dim,
                stack=stack,
                n_params=module.weight.numel(),
            ),
        )
    return list(found.values())


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        answer = getattr(model, method, lambda: None)()
    except NotImplementedError:  # how transformers says that a model of images or sound has no words
        return None
    return answer if isinstance(answer, nn.Module) else None


def _embed_name(model: nn.Module, table: nn.Embedding) -> str:
    return str(next(path for path, module in model.named_modules() if module is table)).rpartition(".")[2]


def _outside_norms(
    model: nn.Module, blocks: list[Block], encoder_decoder: bool, config: Any, backbone: str
) -> list[Site]:
    """Norms outside the blocks: "embed" behind the embedding, "final" behind the last block, "head" in a head."""
    found: list[Site] = []
    inside = tuple(f"{b.path}." for b in blocks)
    for path, module in model.named_modules():
        if path.startswith(inside) or not is_norm(path, module) or not has_weight(module):
            continue
        table = architecture_of(str(getattr(_config_of(model, path, config), "model_type", ""))).outside_norms
        told = next((part for end, part in table.items() if path.endswith(end)), None)
        in_head = bool(backbone) and not path.startswith(f"{backbone}.")
        part = told or ("head" if in_head else "embed" if "embed" in path else "final")
        site = norm_site(path, module, None, _stack_of(path, encoder_decoder), part)
        same = sum(s.key.startswith(site.key) for s in found)
        found.append(replace(site, part=f"{part}{same + 1}") if same else site)
    return found


def _tensors(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    tensors: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        inside = f"{path}." if path else ""
        # A weight in codes is no parameter, and counts as what it stands for.
        shape = getattr(module, "stored_shape", None)
        held = [("weight", id(module), shape)] if shape is not None else []
        held += [(n, id(p), tuple(p.shape)) for n, p in module._parameters.items() if p is not None]
        for short, mark, size in held:
            if mark in first:
                tied[inside + short] = first[mark]
            else:
                first[mark] = inside + short
                tensors[inside + short] = size
    return tensors, tied


def _mark_tied(sites: list[Site], tied: dict[str, str]) -> list[Site]:
    """Flag sites whose weight is another's too; the numbers count at the first of them."""
    names = [tied.get(f"{s.path}.{s.param}", f"{s.path}.{s.param}") for s in sites]
    counted: set[str] = set()
    marked = []
    for site, name in zip(sites, names, strict=True):
        if site.kind in ("embed", "head"):
            is_tied = sum(n == name for n, s in zip(names, sites, strict=True) if s.kind in ("embed", "head")) > 1
            n = site.n_params - (site.d_in * site.d_out if name in counted else 0)
            site = replace(site, tied=is_tied, n_params=n)
            counted.add(name)
        marked.append(site)
    return marked


def _backbone(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return str(prefix) if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _is_classifier(model: nn.Module) -> bool:
    return re.search(r"For\w*(Classification|QuestionAnswering)$", type(model).__name__) is not None


def _trunks(model: nn.Module, backbone: str, blocks: list[str]) -> tuple[str, ...]:
    """Paths of what is pretrained in a model with a head; none where that cannot be told.

    Where nothing stands under the class's `base_model_prefix` (CLIP, SigLIP, Whisper for audio), a classifier's trunk
    is the children that hold its blocks and its words, if each is a model of its own and no bare list of layers.
    """
    if backbone:
        return (backbone,)
    if not _is_classifier(model):
        return ()
    words = _asked(model, "get_input_embeddings")
    inputs = {"input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values"}
    found = []
    for name, child in model.named_children():
        if any(path.startswith(f"{name}.") for path in blocks):
            if not inputs & set(inspect.signature(child.forward).parameters):
                return ()
            found.append(name)
        elif any(module is words for module in child.modules()):
            found.append(name)
    return tuple(found)


def _outside(tensors: dict[str, tuple[int, ...]], trunks: tuple[str, ...]) -> tuple[str, ...]:
    if not trunks:
        return ()
    return tuple(name for name in tensors if not name.startswith(tuple(f"{trunk}." for trunk in trunks)))


def _head(model: nn.Module, trunks: tuple[str, ...]) -> tuple[Site | None, bool]:
    """The site of the head, and whether it is a language model's."""
    output = _asked(model, "get_output_embeddings")
    if output is not None and layer_shape(output) is not None:
        path = next(p for p, m in model.named_modules() if m is output)
        return _head_site(path, output), True
    if not trunks:
        return None, False
    last = [
        (path, module)
        for path, module in model.named_modules()
        if layer_shape(module) is not None and not path.startswith(tuple(f"{trunk}." for trunk in trunks))
    ]
    return (_head_site(*last[-1]), False) if last else (None, False)


def _head_site(path: str, module: nn.Module) -> Site:
    shape = layer_shape(module)
    assert shape is not None
    bias = "bias" if module._parameters.get("bias") is not None else None
    d_in, d_out, transposed = shape
    n = d_out * (d_in + (bias is not None))
    return Site("head", None, path, d_in, d_out, transposed=transposed, bias=bias, n_params=n)


def _max_positions(model: nn.Module, config: Any, text_stack: str, blocks: list[Block]) -> int | None:
    """Tokens that the model can count, special offsets taken off."""
    within = next((_around(b) for b in blocks if text_stack and b.stack == text_stack), "")
    for path, module in model.named_modules():
        if not path.startswith(within):
            continue  # an image tower counts its patches
        if isinstance(module, nn.Embedding) and "position" in path.rsplit(".", 1)[-1] and module.num_embeddings > 1:
            if (offset := getattr(module, "offset", None)) is not None:
                return int(module.num_embeddings - offset)  # OPT and BART leave their first rows unused
            if module.padding_idx is not None:
                return int(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from padding_idx + 1 on
            return int(module.num_embeddings)
    of_text = getattr(config, "get_text_config", None)
    config = of_text() if text_stack and of_text is not None else config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
