"""Traces of an agent: thought, action, observation, again and again, and an answer; read from rows, laid out as chats.

A row has a question, its `steps`, and perhaps the `tools` that were offered and how well the trace ended. Steps are a
list (or the JSON of one), or the text of a ReAct trace:

    Thought: Who wrote it?
    Action: search[Moby Dick]
    Observation: A novel by Herman Melville.
    Answer: Herman Melville

Everything that cannot be read is an error with the row, the step and the field: half a trace teaches half a habit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core import DataError, near
from luthier.data.chat import Message, read_tools

__all__ = [
    "Action",
    "Step",
    "Trace",
    "chat_of",
    "read_action",
    "read_step",
    "read_trace",
    "read_turn",
    "said",
    "tool_names",
]

HEADING = re.compile(r"^(Thought|Action|Observation|Answer)[ \t]*\d*[ \t]*:[ \t]*", re.MULTILINE)
CALL = re.compile(r"([\w.-]+)[ \t]*\[(.*)\]\s*", re.DOTALL)
FINISH = "finish"
"""The action that is an answer, as ReAct writes it: Finish[answer]."""
FIELDS = ("thought", "action", "observation", "answer")


@dataclass(frozen=True)
class Action:
    """A tool and what it is given; a text without a name of its own is called "input"."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What the agent said in one turn, and what came back."""

    thought: str = ""
    action: Action | None = None
    observation: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Trace:
    """A question and the steps that were taken. `tools` are functions as templates know them, or None."""

    question: str
    steps: tuple[Step, ...]
    tools: list[Any] | None = None


def read_trace(row: Mapping[str, Any], place: str, *, question: str, steps: str, tools: Sequence[Any] | None) -> Trace:
    """One row as a trace that ends with an answer.

    Args:
        question, steps: columns.
        tools: functions of all rows; a column `tools` of the row stands before them.

    Raises:
        DataError: with place, step and field: no question, no step, a step without an action, an unknown tool, an
            action without an observation, anything behind the answer, no answer.
    """
    asked = row.get(question)
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(f"{place}: field {question!r} is {asked!r}; it must be what the agent was asked.")
    try:
        offered = read_tools(row.get("tools"), "tools")
    except DataError as error:
        raise DataError(f"{place}: {error}.") from None
    offered = offered if offered is not None else (list(tools) if tools is not None else None)
    found = [read_step(*given) for given in _steps(row.get(steps), f"{place}: field {steps!r}")]
    if not found:
        raise DataError(f"{place}: field {steps!r} has no step. Leave the row out.")
    known = None if offered is None else tool_names(offered, place)
    for number, step in enumerate(found, 1):
        where, last = f"{place}: field {steps!r}, step {number}", number == len(found)
        if step.action is None and not step.answer:
            raise DataError(f"{where}: neither an action nor an answer. Give one, or leave the row out.")
        if step.action is not None and known is not None and step.action.name not in known:
            raise DataError(
                f"{where}: the tool {step.action.name!r} is not among those that the row offers: {', '.join(known)}."
                f"{near(step.action.name, known)} Name it in `tools`, or mend the step."
            )
        if step.answer and not last:
            raise DataError(f"{where}: an answer, and {len(found) - number} more steps behind it. The answer is last.")
        if step.action is not None and not step.observation:
            raise DataError(
                f"{where}: the action {step.action.name!r} has no observation. Say what the tool gave back."
            )
    if not found[-1].answer:
        raise DataError(f"{place}: field {steps!r} ends without an answer after step {len(found)}. Leave the row out.")
    return Trace(asked, tuple(found), offered)


def tool_names(tools: Sequence[Any], place: str) -> list[str]:
    """The names of functions as templates know them.

    Raises:
        DataError: one has no name.
    """
    inner = [tool.get("function", tool) if isinstance(tool, dict) else {} for tool in tools]
    nameless = [number for number, tool in enumerate(inner, 1) if not isinstance(tool.get("name"), str)]
    if nameless:
        raise DataError(f"{place}: tool {nameless[0]} has no name. It must be a function with a name.")
    return [str(tool["name"]) for tool in inner]


def _steps(value: Any, where: str) -> list[tuple[Mapping[str, Any], str]]:
    """Each step as fields, and where it stands."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return _text_steps(value, where)
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{where} begins as a list and is no JSON ({error}).") from error
    if not isinstance(found, list | tuple):
        raise DataError(f"{where} is {str(value)[:60]!r}; it must be a list of steps, or the text of a trace.")
    given: list[tuple[Mapping[str, Any], str]] = []
    for number, step in enumerate(found, 1):
        if not isinstance(step, dict):
            raise DataError(f"{where}, step {number} is {str(step)[:60]!r}; it must have {', '.join(FIELDS)}.")
        strange = [str(name) for name, held in step.items() if name not in FIELDS and held is not None]
        if strange:
            raise DataError(
                f"{where}, step {number}: no field {strange[0]!r} is read.{near(strange[0], FIELDS)} A step has "
                f"{', '.join(FIELDS)}."
            )
        given.append((step, f"{where}, step {number}"))
    return given


def _text_steps(text: str, where: str) -> list[tuple[Mapping[str, Any], str]]:
    """The steps of a ReAct text: a new one begins with a thought, an action or an answer behind an observation."""
    headings = list(HEADING.finditer(text))
    before = text[: headings[0].start()] if headings else text
    if before.strip():
        raise DataError(f"{where}: {before.strip()[:60]!r} stands under no heading. A trace has Thought:, Action: ...")
    steps: list[dict[str, Any]] = []
    for number, heading in enumerate(headings, 1):
        end = headings[number].start() if number < len(headings) else len(text)
        name, held = heading[1].lower(), text[heading.end() : end].strip()
        # The order within a step is that of the fields: whatever would go back begins the next one.
        back = any(FIELDS.index(other) >= FIELDS.index(name) for other in (steps[-1] if steps else ()))
        if not steps or back or (name == "answer" and "action" in steps[-1]):
            steps.append({})
        steps[-1][name] = held
    return [(step, f"{where}, step {number}") for number, step in enumerate(steps, 1)]


def read_turn(text: str, where: str) -> Step:
    """One turn of an agent, written as ReAct text: an action or an answer.

    Raises:
        DataError: it holds neither, or more than one step.
    """
    steps = [read_step(*given) for given in _text_steps(text, where)]
    if len(steps) != 1 or steps[0].observation or (steps[0].action is None and not steps[0].answer):
        raise DataError(f"{where}: {text[:80]!r} is no single step with an action or an answer.")
    return steps[0]


def read_step(given: Mapping[str, Any], where: str) -> Step:
    """One step from its fields.

    Raises:
        DataError: a field that is no text, or an action that cannot be read.
    """
    texts = {}
    for name in ("thought", "observation", "answer"):
        held = given.get(name)
        if held is not None and not isinstance(held, str):
            raise DataError(f"{where}: {name} is {held!r} ({type(held).__name__}), not text.")
        texts[name] = (held or "").strip()
        if name != "observation" and HEADING.search(texts[name]):
            raise DataError(f"{where}: {name} holds a line that begins as a heading of a trace. Part it into steps.")
    action = read_action(given.get("action"), where)
    if action is not None and action.name.lower() == FINISH:
        if texts["answer"]:
            raise DataError(f"{where}: both Finish[...] and an answer. Give one of the two.")
        texts["answer"], action = "\n".join(str(v) for v in action.arguments.values()).strip(), None
    if action is not None and texts["answer"]:
        raise DataError(f"{where}: both an action and an answer. The answer is a step of its own.")
    return Step(action=action, **texts)


def read_action(value: Any, where: str) -> Action | None:
    """An action: {"name", "arguments"}, or the text name[arguments]; None where there is none.

    Raises:
        DataError: it is neither.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        if (match := CALL.fullmatch(value.strip())) is None:
            raise DataError(f"{where}: the action {value[:60]!r} is not name[arguments].")
        return Action(match[1], _arguments(match[2].strip()))
    inner = value.get("function", value) if isinstance(value, dict) else {}
    name, given = inner.get("name"), inner.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: the action {str(value)[:60]!r} has no name.")
    if not isinstance(given, str | dict):
        raise DataError(
            f"{where}: the arguments of {name!r} are {str(given)[:60]!r}; they must be an object or a text."
        )
    return Action(name, _arguments(given) if isinstance(given, str) else given)


def _arguments(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"input": text}


def said(step: Step, *, thoughts: bool = True) -> str:
    """What the agent says in a step, as a ReAct text; `read_trace` reads it back."""
    lines = [f"Thought: {step.thought}"] if thoughts and step.thought else []
    if step.action is not None:
        lines.append(f"Action: {step.action.name}[{_bracketed(step.action.arguments)}]")
    return "\n".join([*lines, *([f"Answer: {step.answer}"] if step.answer else [])])


def _bracketed(arguments: Mapping[str, Any]) -> str:
    """The arguments between brackets: a lone text as it is, where it reads back as itself."""
    text = arguments.get("input")
    if len(arguments) == 1 and isinstance(text, str) and text == text.strip() and _arguments(text) == arguments:
        return text
    return json.dumps(dict(arguments), ensure_ascii=False)


def chat_of(trace: Trace, *, form: Literal["react", "calls"], thoughts: bool = True) -> list[Message]:
    """The trace as a chat: what the agent said is the assistant's, what came back is not, so it carries no loss.

    Args:
        form: "react" writes text, and an observation is the user's turn; "calls" writes tool calls, and an observation
            is the tool's turn.
        thoughts: whether they stand in the chat.
    """
    messages: list[Message] = [{"role": "user", "content": trace.question}]
    for step in trace.steps:
        if form == "react":
            messages.append({"role": "assistant", "content": said(step, thoughts=thoughts)})
            if step.action is not None:
                messages.append({"role": "user", "content": f"Observation: {step.observation}"})
            continue
        content = "\n".join(part for part in (step.thought if thoughts else "", step.answer) if part)
        turn: Message = {"role": "assistant", "content": content}
        if step.action is not None:
            call = {"name": step.action.name, "arguments": dict(step.action.arguments)}
            turn["tool_calls"] = [{"type": "function", "function": call}]
        messages.append(turn)
        if step.action is not None:
            messages.append({"role": "tool", "content": step.observation})
    return messages
