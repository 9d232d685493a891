"""A drawing of what a method does to a transformer block, made from the very edits that it lists for a tiny model."""

from collections.abc import Iterable
from html import escape
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError
from luthier.surgery import (
    METHODS,
    AddBranch,
    Attach,
    Attend,
    LookFirst,
    Method,
    PrependKeys,
    PrependTokens,
    Reparametrise,
    Unfreeze,
)

__all__ = ["draw", "marks", "tiny_anatomy"]

# kind of site -> (left, top, width, label); where the boxes of the drawing stand.
BOXES = {
    "embed": (96, 96, 58, "embed"),
    "attn.q": (196, 44, 40, "q"),
    "attn.k": (196, 96, 40, "k"),
    "attn.v": (196, 148, 40, "v"),
    "attn.o": (334, 96, 40, "o"),
    "norm.0": (436, 96, 46, "norm"),
    "ffn.up": (502, 96, 46, "up"),
    "ffn.down": (568, 96, 50, "down"),
    "norm.1": (680, 96, 46, "norm"),
    "head": (772, 96, 52, "head"),
}
# Places that own no numbers: points of the line.
POINTS = {"attn_out": 388, "ffn_out": 632, "block_out": 744}
STATES = {
    "attached": "something small is attached here, and trains",
    "computed": "this tensor is computed anew from its frozen value",
    "trained": "these numbers of the model train",
    "bias": "its bias trains",
    "prepended": "learned vectors stand before those of the text",
    "attended": "attention is computed otherwise, with numbers that train",
    "branch": "a network beside the frozen model",
}


def tiny_anatomy() -> tuple[Any, Anatomy]:
    """A classifier whose dimensions all differ, and its anatomy."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=80, num_labels=3,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    return model, Anatomy.read(model)


def tiny_decoder() -> Anatomy:
    """Of a model that sees only what came before, for methods that need one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=64,
    )  # fmt: skip
    return Anatomy.read(LlamaForCausalLM(config))


def marks(method: Method, anatomy: Anatomy) -> dict[str, set[str]]:
    """Part of the drawing -> what the method's edits do there."""
    found: dict[str, set[str]] = {}
    for edit in method.edits(anatomy):
        for part, state in _marks_of(edit, anatomy):
            found.setdefault(part, set()).add(state)
    # Without an edit only the new task head is left to train, which surgery adds to every method.
    return found or {"head": {"trained"}}


def _marks_of(edit: Any, anatomy: Anatomy) -> Iterable[tuple[str, str]]:
    if isinstance(edit, Attach):
        yield _box(edit.site), "attached"
    elif isinstance(edit, Unfreeze):
        yield _owner(edit.name, anatomy), "bias" if edit.name.endswith(".bias") else "trained"
    elif isinstance(edit, Reparametrise):
        yield _owner(edit.name, anatomy), "computed"
    elif isinstance(edit, PrependTokens):
        yield "tokens", "prepended"
    elif isinstance(edit, PrependKeys):
        yield "keys", "prepended"
    elif isinstance(edit, Attend):
        yield "keys", "attended"
    elif isinstance(edit, AddBranch):
        yield "side", "branch"
    elif isinstance(edit, LookFirst):
        return  # a pass before the pass changes no place
    else:
        raise TypeError(f"{type(edit).__name__}: a kind of edit that the drawing does not know")


def _box(site: Any) -> str:
    if site.kind != "norm":
        return str(site.kind)
    return f"norm.{site.part}" if f"norm.{site.part}" in BOXES else "embed"


def _owner(name: str, anatomy: Anatomy) -> str:
    """The part that a tensor belongs to; what stands outside of the blocks is the embedding's or the head's."""
    owners = [s for s in anatomy.all_sites if s.n_params and name.startswith(f"{s.path}.")]
    if owners:
        return _box(max(owners, key=lambda s: len(s.path)))
    return "embed" if "embed" in name else "head"


def draw(name: str) -> str:
    """The drawing of one method of the shelf at its defaults, as inline SVG; its colours come from the page's style."""
    torch.manual_seed(0)
    _, anatomy = tiny_anatomy()
    cls = METHODS.get(name)
    try:
        found = _marks_of_some(cls, anatomy)
    except AnatomyError:
        found = _marks_of_some(cls, tiny_decoder())
    return svg(name, found)


def _marks_of_some(cls: type[Method], anatomy: Anatomy) -> dict[str, set[str]]:
    try:
        return marks(cls(), anatomy)
    except ConfigError:  # a size for models of real width, or a setting that a run decides: the places are the same
        return marks(cls(**{n: v for n, v in cls.tiny.items() if n != "lr"}), anatomy)


def svg(name: str, found: dict[str, set[str]]) -> str:
    """The picture of a block with its marks, a legend of those that occur, and the same in words for readers."""
    states = [s for s in STATES if any(s in held for held in found.values())]
    height = 216 + (48 if "side" in found else 0) + 20 * len(states)
    words = "; ".join(f"{part}: {', '.join(sorted(held))}" for part, held in sorted(found.items())) or "nothing"
    lines = [
        f'<svg class="edit" viewBox="0 0 840 {height}" role="img" '
        f'aria-label="{escape(name)} on a block. {escape(words)}">',
        '<rect class="block" x="162" y="24" width="598" height="172" rx="8"/>',
        '<text class="note" x="748" y="40" text-anchor="end">each block</text>',
        *_wires(),
    ]
    if "tokens" in found:
        lines += ['<rect class="prepended" x="24" y="64" width="44" height="24" rx="3"/>', _line(68, 76, 96, 104)]
    lines.append('<text class="label" x="46" y="117" text-anchor="middle">text</text>')
    if "keys" in found:
        for top in (96, 148):
            lines.append(f'<rect class="prepended" x="240" y="{top + 2}" width="16" height="24" rx="3"/>')
    for part, (left, top, width, label) in BOXES.items():
        lines += _boxed(left, top, width, label, found.get(part, set()))
    lines.append('<circle class="frozen" cx="292" cy="110" r="22"/>')
    lines.append('<text class="label" x="292" y="114" text-anchor="middle">attn</text>')
    for part, x in POINTS.items():
        if part in found:
            lines.append(f'<rect class="attached" x="{x - 7}" y="103" width="14" height="14" rx="2"/>')
    if "side" in found:
        lines.append('<rect class="branch" x="176" y="208" width="580" height="26" rx="4"/>')
        lines.append('<text class="inside" x="466" y="225" text-anchor="middle">side network</text>')
        lines += [_line(166, 110, 176, 221), _line(756, 221, 772, 122)]
    top = height - 20 * len(states) + 4
    for state in states:
        lines.append(f'<rect class="{state}" x="24" y="{top}" width="14" height="12" rx="2"/>')
        lines.append(f'<text class="note" x="46" y="{top + 10}">{escape(STATES[state])}</text>')
        top += 20
    return "\n".join([*lines, "</svg>"])


def _boxed(left: int, top: int, width: int, label: str, held: set[str]) -> list[str]:
    state = next((s for s in ("trained", "computed") if s in held), "frozen")
    text = "label" if state == "frozen" else "inside"
    lines = [
        f'<rect class="{state}" x="{left}" y="{top}" width="{width}" height="28" rx="4"/>',
        f'<text class="{text}" x="{left + width / 2:g}" y="{top + 18}" text-anchor="middle">{label}</text>',
    ]
    if "bias" in held and state == "frozen":
        lines.append(f'<rect class="bias" x="{left}" y="{top + 23}" width="{width}" height="5" rx="2"/>')
    if "attached" in held:
        lines.append(f'<rect class="attached" x="{left + width - 9}" y="{top - 7}" width="14" height="14" rx="2"/>')
    return lines


def _line(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<path class="wire" d="M{x1} {y1} L{x2} {y2}"/>'


def _wires() -> list[str]:
    line = [_line(66, 110, 96, 110), _line(154, 110, 196, 110)]
    for top in (58, 162):
        line += [
            f'<path class="wire" d="M166 110 L180 {top} L196 {top}"/>',
            f'<path class="wire" d="M236 {top} L276 {top} L284 110"/>',
        ]
    line += [_line(236, 110, 270, 110), _line(314, 110, 334, 110), _line(374, 110, 772, 110)]
    # The residual stream passes each sublayer by.
    line.append('<path class="wire" d="M166 110 L166 184 L408 184 L408 118"/>')
    line.append('<path class="wire" d="M492 110 L492 184 L652 184 L652 118"/>')
    for x in (408, 652):
        line.append(
            f'<circle class="sum" cx="{x}" cy="110" r="8"/><path class="wire" d="M{x - 8} 110 h16 M{x} 102 v16"/>'
        )
    return line
