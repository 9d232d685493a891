"""For the API page: examples in docstrings (`>>> ...`) become code, which Markdown would take for quotations."""

import re
from typing import Any

import griffe

__all__ = ["FencedExamples"]

EXAMPLE = re.compile(r"(?:^|(?<=\n))( *)>>> .*?(?=\n\s*\n|\Z)", re.DOTALL)


def fenced(text: str) -> str:
    """The docstring with a fence round each example, from its first line to the blank line behind it."""
    return EXAMPLE.sub(lambda found: f"\n{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n", text)


class FencedExamples(griffe.Extension):
    """Applied to every object that griffe has read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
