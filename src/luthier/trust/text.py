"""Text from models, rows and files, made inert for the place where it is shown. Escape at output, never at input."""

import html
import re
import unicodedata

__all__ = ["for_csv", "for_html", "for_markdown", "for_terminal"]

# Bidirectional controls can make a line read differently from what it is ("Trojan Source").
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>:@^$=])")


def for_terminal(text: str, *, keep_lines: bool = False) -> str:
    """Spell out every control character, so that none reaches the terminal.

    >>> for_terminal("\\x1b]0;title\\x07 \\u202ecba")
    '\\\\x1b]0;title\\\\x07 \\\\u202ecba'
    """
    return "".join(c if c == "\n" and keep_lines else _spelled(c) for c in text)


def for_html(text: str) -> str:
    """Text for an HTML element or a quoted attribute.

    >>> for_html("<script>'\\u202e")
    '&lt;script&gt;&#x27;\\\\u202e'
    """
    return html.escape("".join(c if c in "\n\t" else _spelled(c) for c in text), quote=True)


def for_markdown(text: str) -> str:
    """Text for one line of Markdown, or one cell of a Markdown table: no markup, no link, no HTML.

    >>> for_markdown("[x](javascript:y)|<b>")
    '\\\\[x\\\\]\\\\(javascript\\\\:y\\\\)\\\\|&lt;b&gt;'
    """
    flat = "".join(_spelled(c) for c in text.replace("\r\n", " ").replace("\n", " ").replace("\t", " "))
    # Bare addresses become links in most dialects: the colon and the dots of `www.` are escaped too.
    return _MARKDOWN.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;")).replace("\\>", "&gt;")


def for_csv(text: str) -> str:
    """Text for one CSV cell (the csv module quotes it): a spreadsheet takes it as text, not as a formula.

    >>> for_csv("=HYPERLINK(1)"), for_csv("-3.5"), for_csv("plain")
    ("'=HYPERLINK(1)", '-3.5', 'plain')
    """
    safe = "".join(c if c in "\n\t" else _spelled(c) for c in text)
    begins = safe.lstrip()[:1]
    if begins and begins in "=+-@|%＝＋－＠" and not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", safe):
        return "'" + safe
    return "'" + safe if safe[:1] == "\t" else safe


def _spelled(character: str) -> str:
    if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return ascii(character)[1:-1]
    return character
