"""The edits: everything a method can do to a model. Surgery carries them out; a method only lists them.

    Attach         a small module at one site
    Reparametrise  a module that computes a tensor of the model from its frozen value
    Unfreeze       a tensor of the model trains, whole or where a mask says so
    PrependTokens  vectors before the embedded text
    PrependKeys    keys and values before those of the text, in every attention
    Attend         a module that attends in a way of its own, beside what an attention does or in place of it
    AddBranch      a network beside the model that reads its hidden states and gives its output
    LookFirst      a module that sees what a pass gives without the tuning, before the pass itself
    Linearise      the model's pass to first order in what the tuning moves

`Reparametrise` is the sixth edit that the architecture note expected: see docs/decisions/0002-a-sixth-edit.md.
`LookFirst`: see docs/decisions/0072-a-pass-before-each-pass.md. `Linearise`: 0082-a-pass-to-first-order.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from luthier.anatomy.site import Site

if TYPE_CHECKING:
    from luthier.anatomy.anatomy import Attention
    from luthier.surgery.attachment import Attachment
    from luthier.surgery.base import Base

__all__ = [
    "AddBranch",
    "Attach",
    "Attend",
    "Edit",
    "Linearise",
    "LookFirst",
    "PrependKeys",
    "PrependTokens",
    "Reparametrise",
    "Unfreeze",
    "attach_each",
    "layer_of",
]


@dataclass(frozen=True)
class Attach:
    """Put an attachment at a site.

    `build` is called once with the frozen layer, in fp32 and under a generator keyed by the site. What several sites
    share is listed in `shared`, by key; it is registered, trained and saved once. An attachment that has `around` says
    so by `takes_over`: one block's call has one owner at a time.
    """

    site: Site
    build: Callable[[Base], Attachment]
    shared: Mapping[str, nn.Module] = field(default_factory=dict)
    takes_over: bool = False


@dataclass(frozen=True)
class Reparametrise:
    """Compute the tensor `name` of the model as `module(frozen value)` wherever the model uses it, aliases included."""

    name: str
    module: nn.Module
    shared: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfreeze:
    """Train the tensor `name` of the model itself; with a `mask` (bool, same shape) only where it is true.

    The mask holds for the *update*: gradient, momentum and decay cannot move an entry outside it. With `holds=False` it
    is applied to the gradient alone, so that decay moves the rest, and the tensor is stored whole.
    """

    name: str
    mask: Tensor | None = None
    holds: bool = True


@dataclass(frozen=True)
class PrependTokens:
    """Vectors before the embedded text: `source()` returns (P, d). Mask, positions and pooling follow.

    A source with a method `rows(context, embeds, mask)` and an attribute `length` gives each row vectors of its own,
    (rows, P, d): `embeds` (rows, T, d) is the embedded text, `mask` (rows, T) or None says where it is real.

    Where a source has an attribute `behind`, that many of its vectors, the last ones, stand behind each row's text; no
    decoder reads them there, so a method refuses that.

    A source with a true attribute `listens` finds the last hidden states of its vectors, (rows, P, d), in `heard` after
    a pass; not in an encoder-decoder.

    A source with a method `start(embed)` is given the model's word embedding once, under a keyed generator.
    """

    source: nn.Module
    length: int


@dataclass(frozen=True)
class PrependKeys:
    """Keys and values before those of the text, without moving any position.

    `source.keys_values(context)` is called once per forward pass of the model and returns, for each entry of
    `attentions`, a pair of shape (n_kv_heads, P, d_head) or (batch, n_kv_heads, P, d_head), or a pair of functions that
    give them once the attention is reached.
    """

    source: nn.Module
    attentions: tuple[Attention, ...]
    length: int


@dataclass(frozen=True)
class Attend:
    """Let a module of one's own give what an attention gives, before its output projection.

    `build` is called once with the frozen query projection, which knows the keys' and values' beside it, in fp32 and
    under a generator keyed by the attention. The module has

    `attend(inner, query, key, value) -> Tensor` of shape (B, T, H, D), the queries (B, H, T, D) and the keys and values
    (B, H_kv, S, D) of the text as the model made them, rotated and from the cache. `inner(query, key, value)` attends
    as the model does: with its mask, its bias, its dropout, and the prefix, if there is one. With `of_text=False` it
    attends to keys that are no text: every query sees every key, nothing is dropped, and a prefix is not among them;
    or to those that `seen`, (B, 1, T, S) boolean, says; or, with `causal=True` and nothing `seen`, to the keys at the
    query's own place and before it, without a mask that grows with T S. The facts of the pass are in `self.context`.
    """

    attention: Attention
    build: Callable[[Base], nn.Module]
    shared: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class AddBranch:
    """A network beside the frozen model. `build(model, anatomy)` returns a module with

    `forward(stack, calls: list[BlockCall], context, last) -> Tensor` of shape (batch, tokens, d), which takes the place
    of the backbone's last hidden state `last`. No gradient enters the backbone. The encoder of an encoder-decoder may
    give a wider tensor; then `enter(stack, kwargs) -> kwargs`, called before each stack, narrows what is read.
    """

    build: Callable[..., nn.Module]


@dataclass(frozen=True)
class LookFirst:
    """Run every pass twice: first without a gradient and with nothing of this edit known, then as it is.

    `module(states)` is called in between, with the last hidden states of the first pass, (rows, tokens, d), in its own
    precision; attachments find what it gave as `context.looked.get(id(module))`, and None in the first pass, where they
    are to change nothing. The first pass has keys and values of its own, kept in the model's cache behind those of its
    layers, so beams and crops carry them along. See first_pass.py.
    """

    module: nn.Module


@dataclass(frozen=True)
class Linearise:
    """Let every pass carry, beside each value, its derivative along the tuning, and give the sum of both.

    Attachments of the same tuning call `move(y, moved)` in `after`, on what `value_of(x)` reads: see first_order.py.
    """


Edit = Attach | Attend | Reparametrise | Unfreeze | PrependTokens | PrependKeys | AddBranch | LookFirst | Linearise


def attach_each(
    sites: Iterable[Site], make: Callable[[Site, Base], Attachment], shared: Mapping[str, nn.Module] | None = None
) -> Iterator[Attach]:
    """One attachment at each of the sites: what `make(site, base)` gives there."""
    for site in sites:
        yield Attach(site, partial(make, site), shared or {})


def layer_of(edit: Edit) -> int | None:
    """The layer that an edit attaches something in; None for any other edit."""
    return edit.site.layer if isinstance(edit, Attach) else None
