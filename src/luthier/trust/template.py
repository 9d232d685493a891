"""Chat templates: programs that come with a model, and are treated as such.

They run in a sandbox inside a child process, with caps on processor time, memory and output for each conversation. One
child renders all rows of a data set, so that the cost of its start (about 0.2 s) is paid once.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from luthier.core import DataError, ModelError, Refused
from luthier.trust._bytes import show
from luthier.trust._limits import Limits
from luthier.trust.jail import Child

__all__ = ["Facts", "Rendered", "Renderer", "check", "render", "render_many"]

Message = Mapping[str, Any]

# `strftime_now` answers with this day: a template that reads the clock would train on other text tomorrow.
FIXED_DAY = datetime.date(2025, 1, 1)


@dataclass(frozen=True)
class Facts:
    """What a template asks for: its free variables, and whether it marks text with `{% generation %}`."""

    variables: tuple[str, ...]
    marks_generation: bool


@dataclass(frozen=True)
class Rendered:
    """The text of one conversation; `spans` are the (first, past-last) characters inside `{% generation %}`."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


class Renderer:
    """A template, compiled in a child process. Use it in a `with` block, or call `close`.

    Args:
        template: the template's text.
        special_tokens: `bos_token`, `eos_token` and so on, for the template to read.
        today: what `strftime_now` answers.
        timeout: seconds of processor time for one conversation.
        max_chars: of one rendered conversation.

    Raises:
        ModelError: no template, or one with a syntax error (line given).
        Refused: over a cap, or it reaches for what a template has no business with.
    """

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        today: datetime.date = FIXED_DAY,
        timeout: float = Limits.render_seconds,
        max_chars: int = Limits.rendered_chars,
        limits: Limits = Limits(),  # noqa: B008  # frozen
    ) -> None:
        if not isinstance(template, str) or not template.strip():
            raise ModelError(
                "This model has no chat template. Put one beside its tokenizer (chat_template.jinja), or train on "
                "columns of plain text."
            )
        if len(template) > limits.template_chars:
            raise Refused(f"chat template: {len(template)} characters; at most {limits.template_chars} are read.")
        self.special_tokens = dict(special_tokens or {})
        self._child = Child(
            "luthier.trust._render:start",
            {"template": template, "today": today.isoformat(), "most": max_chars},
            what="chat template",
            seconds=timeout,
            bytes_=limits.child_bytes,
            preload=("jinja2.debug",),  # jinja2 imports it when something fails
            answer_bytes=12 * max_chars + 100_000,  # JSON may spell one character with twelve
        )

    def facts(self) -> Facts:
        """What the template asks for."""
        found = self._child.ask(None)
        return Facts(tuple(found["variables"]), bool(found["marks_generation"]))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        must_keep: bool = True,
        where: str = "",
        **variables: Any,
    ) -> Rendered:
        """Render one conversation.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the opening of an assistant's turn.
            must_keep: stop if the last assistant turn does not appear in the text.
            where: the row's place ("data.jsonl:12"), for messages.
            variables: more variables for the template, such as `tools`; plain values chosen by us, never by a row.

        Raises:
            DataError: the template raises on this row, or drops the assistant's turn; the row is quoted.
            Refused: over the caps on time, memory or output.
        """
        row = [dict(message) for message in messages]
        given = {**self.special_tokens, "tools": None, "documents": None, **variables}
        given |= {"messages": row, "add_generation_prompt": add_generation_prompt}
        label = f"{where}: " if where else ""
        try:
            answer = self._child.ask(given)
        except DataError as error:
            raise DataError(
                f"{label}{error} for the row {show(repr(row), 400)}. Mend the row or the template."
            ) from None
        except Refused as error:
            raise Refused(f"{label}{error} The row was {show(repr(row), 400)}.") from None
        rendered = Rendered(answer["text"], tuple((a, b) for a, b in answer["spans"]))
        if must_keep and (lost := _lost(row, rendered.text)) is not None:
            raise DataError(
                f"{label}the chat template drops the assistant's turn {show(lost)}: it renders "
                f"{show(rendered.text, 400)}. There would be nothing to learn: pass another template."
            )
        return rendered

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check(template: str, *, limits: Limits = Limits()) -> Facts:  # noqa: B008
    """Compile and inspect a template, without rendering anything. Raises as `Renderer`."""
    with Renderer(template, limits=limits) as renderer:
        return renderer.facts()


def render(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str] | None = None, **options: Any
) -> str:
    """Render one conversation to text; takes the options of `Renderer` and of its `render`, and raises as they do."""
    return next(iter(render_many(template, [messages], special_tokens, **options))).text


def render_many(
    template: str,
    conversations: Iterable[Sequence[Message]],
    special_tokens: Mapping[str, str] | None = None,
    *,
    places: Sequence[str] | None = None,
    today: datetime.date = FIXED_DAY,
    timeout: float = Limits.render_seconds,
    max_chars: int = Limits.rendered_chars,
    limits: Limits = Limits(),  # noqa: B008
    **options: Any,
) -> list[Rendered]:
    """Render many conversations in one child process; `places` names the rows in messages. Raises as `Renderer`."""
    with Renderer(
        template, special_tokens, today=today, timeout=timeout, max_chars=max_chars, limits=limits
    ) as renderer:
        names: Iterator[str] = iter(places if places is not None else ())
        return [
            renderer.render(messages, where=next(names, f"row {number}"), **options)
            for number, messages in enumerate(conversations)
        ]


def _lost(row: Sequence[Message], text: str) -> str | None:
    """The last assistant turn, if `text` does not hold it."""
    for message in reversed(row):
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str):
            # Templates of reasoning models set the thought anew, or leave it out; the answer must stay.
            answer = content.rsplit("</think>", 1)[-1].strip()
            return content if answer and answer not in text else None
    return None
