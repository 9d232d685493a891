"""Rows of tokens, drawn: in colour on a terminal, between marks where there is none, and as a page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.trust.text import for_terminal

if TYPE_CHECKING:
    from rich.text import Text

    from luthier.workflow.look_at_rows import LookedAt, Piece, ShownRow

__all__ = ["drawn", "page_of"]

LOSS, SPECIAL, CUT = "bold white on dark_green", "bold magenta", "strike red"
SPECIAL_LOSS = "bold yellow on dark_green"
OPEN, CLOSE, OPEN_CUT, CLOSE_CUT = "⟦", "⟧", "⟪", "⟫"
FULL_BAR = 40


def drawn(found: "LookedAt") -> Iterator["Text"]:
    """What there is to see, part by part."""
    from rich.text import Text

    yield Text(f"{found.source} as {found.model} sees it: {found.task.replace('_', ' ')}", style="bold")
    if found.template[0]:
        yield Text(f"chat template: {for_terminal(found.template[0])}, sha256 {found.template[1][:12]}")
    yield _legend(found)
    for row in found.shown:
        yield Text("")
        yield from _row(row, of_tokens=found.supervised is not None)
    yield Text("")
    yield from _facts(found)


def _legend(found: "LookedAt") -> "Text":
    from rich.text import Text

    line = Text("key: ")
    if found.supervised is not None:
        line.append(f"{OPEN}carries loss{CLOSE}", LOSS).append("  ")
    return line.append("read only  ").append("special", SPECIAL).append("  ").append(f"{OPEN_CUT}cut{CLOSE_CUT}", CUT)


def _row(row: "ShownRow", *, of_tokens: bool) -> Iterator["Text"]:
    from rich.text import Text

    head = Text(for_terminal(row.place), style="bold")
    of_loss = f", {row.targets} carry loss" if of_tokens else ""
    head.append(f" · {row.status} · {row.tokens} tokens{of_loss}", "dim")
    if row.reason:
        head.append(f" · {for_terminal(row.reason)}", "yellow")
    yield head
    line = _tokens(row.pieces)
    line.rstrip()
    yield line
    if row.wanted:
        yield Text("label: ", style="dim").append(for_terminal(row.wanted), LOSS)


def _tokens(pieces: "tuple[Piece, ...]") -> "Text":
    """Stretches between marks, so that they are seen without colour and in a copy too."""
    from rich.text import Text

    marks = {"loss": (OPEN, CLOSE), "cut": (OPEN_CUT, CLOSE_CUT), "read": ("", "")}
    line, kind = Text(), "read"
    for piece in pieces:
        style = {"loss": LOSS, "cut": CUT, "read": ""}[piece.kind]
        if piece.kind != kind:
            line.append(marks[kind][1], "bold green" if kind == "loss" else CUT)
            line.append(marks[piece.kind][0], "bold green" if piece.kind == "loss" else CUT)
            kind = piece.kind
        if piece.special and piece.kind != "cut":
            style = SPECIAL_LOSS if piece.kind == "loss" else SPECIAL
        shown = for_terminal(piece.text, keep_lines=True)
        for number, part in enumerate(shown.split("\n")):
            if number:
                line.append("↵", style).append("\n")
            line.append(part, style)
    return line.append(marks[kind][1], "bold green" if kind == "loss" else CUT)


def _facts(found: "LookedAt") -> Iterator["Text"]:
    from rich.text import Text

    counts = found.counts
    spread = "" if found.sampled == found.rows else f" ({found.sampled:,} spread over {found.rows:,})"
    yield Text(
        f"rows{spread}: {counts['used']:,} used, {counts['truncated']:,} cut to {found.max_length} tokens, "
        f"{counts['refused']:,} refused"
    )
    if found.supervised is not None:
        yield Text(f"supervised: {found.supervised:.1%} of the tokens carry loss")
    if found.stop:
        ends = ", ".join(map(for_terminal, found.stop))
        yield Text(f"stop token: {ends} carries loss at the end of {found.stopping:.1%} of the rows", style="bold")
    elif found.stopping is not None:
        yield Text("stop token: none is taught; what it writes ends at a limit only", style="bold red")
    yield Text(f"batches of {found.batch}: {found.full:.1%} of their tokens are real, the rest is padding")
    lengths = found.lengths
    yield Text(f"lengths: median {lengths[len(lengths) // 2]}, longest {lengths[-1]} tokens")
    most = max(n for _, n in found.bars)
    for upto, n in found.bars:
        bar = "█" * round(FULL_BAR * n / most) or ("▏" if n else "")
        yield Text(f"  ≤ {upto:>5} ").append(f"{bar} ", "green3").append(f"{n:,}" if n else "", "dim")
    for note in found.notes:
        yield Text(f"note: {for_terminal(note)}", style="dim")


def page_of(found: "LookedAt") -> str:
    """The same as one page of HTML that loads nothing from elsewhere."""
    import io

    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    for part in drawn(found):
        console.print(part)
    return console.export_html(inline_styles=True)
