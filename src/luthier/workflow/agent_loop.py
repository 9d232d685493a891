"""A tuned model acts: what it says is read as a step, the tool that it names is called, and what comes back is told it.

>>> from luthier.workflow.agent_loop import act
>>> lines = iter(["Thought: add them\\nAction: add[2 3]", "Answer: 5"])
>>> done = act(lambda messages: next(lines), "2 + 3?", {"add": lambda text: sum(map(int, text.split()))})
>>> done.answer, done.ended, done.steps[0].observation
('5', 'answer', '5')

Only functions that were handed over are called, and never more than `turns` of them: nothing that a model writes is
executed. A tool that fails is an observation, as it is to the models that traces come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.core import ConfigError, DataError
from luthier.data.chat import Message
from luthier.data.rows import Table
from luthier.data.traces import Step, Trace, chat_of, read_turn
from luthier.workflow.prediction import Predictor

__all__ = ["Acted", "act", "writer_of"]

Write = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Acted:
    """How it went. `ended` is "answer", "turns" (too many), or "unreadable": `why` says what could not be read."""

    steps: tuple[Step, ...]
    ended: Literal["answer", "turns", "unreadable"]
    answer: str = ""
    why: str = ""


def act(write: Write, question: str, tools: Mapping[str, Callable[..., Any]], *, turns: int = 8) -> Acted:
    """Let a model act until it answers.

    Args:
        write: the assistant's next turn after a chat, as ReAct text; see `writer_of`.
        tools: functions by name. A text argument is given as it is, an object by its names.
        turns: what the model may say, at most.

    Raises:
        ConfigError: no turn.
    """
    if turns < 1:
        raise ConfigError(f"turns: got {turns}; it must be 1 or more.")
    steps: list[Step] = []
    for _ in range(turns):
        text = write(chat_of(Trace(question, tuple(steps)), form="react"))
        try:
            step = read_turn(text, f"turn {len(steps) + 1}")
        except DataError as error:
            return Acted(tuple(steps), "unreadable", why=str(error))
        if step.answer:
            return Acted((*steps, step), "answer", step.answer)
        steps.append(replace(step, observation=_called(step, tools)))
    return Acted(tuple(steps), "turns")


def _called(step: Step, tools: Mapping[str, Callable[..., Any]]) -> str:
    assert step.action is not None
    name, given = step.action.name, dict(step.action.arguments)
    if name not in tools:
        return f"no tool {name!r}; there are {', '.join(tools) or 'none'}"
    try:
        found = tools[name](given["input"]) if set(given) == {"input"} else tools[name](**given)
    except Exception as error:  # whatever a tool raises is what the model gets to see
        return f"{type(error).__name__}: {error}"
    return str(found).strip() or "nothing"


def writer_of(run: Predictor, *, max_new_tokens: int = 128) -> Write:
    """The next turn as a finished run writes it, greedily.

    Raises:
        ConfigError: the run learnt no chats.
    """
    column = run.columns.messages
    if column is None:
        raise ConfigError(f"{run.path}: learnt no chats, and an agent's turns are such. Name a run of agent_sft.")

    def write(messages: Sequence[Message]) -> str:
        table = Table([{column: list(messages)}], ["the agent's chat"], "the agent's chat")
        return str(run.rows(table, max_new_tokens=max_new_tokens, strict=True)[0]["text"])

    return write
