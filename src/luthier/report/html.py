"""Elements of a page. Text that is not an element is made inert here, and nowhere else."""

from __future__ import annotations

from typing import Any

from luthier.trust.text import for_html

__all__ = ["Html", "coded", "el", "joined"]

EMPTY = frozenset({"meta", "br", "path", "rect", "polyline", "use"})
"""Of those of a drawing, one without an end would hold all that follows it."""


class Html(str):
    """Markup that `el` made. Any other text is escaped where it is put into an element."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element.

    >>> el("td", "<b> & ", el("b", 1), class_="n", data_v=0.5, hidden=None)
    '<td class="n" data-v="0.5">&lt;b&gt; &amp; <b>1</b></td>'

    Args:
        children: elements, or values whose text is escaped; None is left out.
        attributes: names with `_` for `-`, a last `_` is dropped; None and False are left out, True has no value.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.removesuffix("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{for_html(str(value))}"')
    opened = " ".join(words)
    if tag in EMPTY and not children:
        return Html(f"<{opened}/>")
    return Html(f"<{opened}>{joined(*children)}</{tag}>")


def joined(*children: Any) -> Html:
    """Several elements after one another."""
    return Html("".join(c if isinstance(c, Html) else for_html(str(c)) for c in children if c is not None))


def coded(text: str) -> Html:
    """Text in which what stands between backticks is code.

    >>> coded("see `luthier plan`, <b>")
    'see <code>luthier plan</code>, &lt;b&gt;'
    """
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # one without its other is a backtick
        return joined(text)
    return joined(*(el("code", piece) if i % 2 else piece for i, piece in enumerate(pieces)))
