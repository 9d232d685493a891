"""Traces that ended well are learnt as chats: what the agent thought and did, never what came back.

    1 traces    L = - sum over tokens of thoughts, actions and the answer of log p(token | all before)

A row has a question, its `steps` (a list of thought, action, observation and answer, or the text of a ReAct trace),
and perhaps `tools` and a reward. Traces below `least` are left out, and rows-made.jsonl counts them. `form` writes
actions as text, `Action: search[words]`, or as tool calls of the model's own chat template, which is tried first: calls
that do not come out of it as they went in are refused. `general` names rows of other chats, mixed in as a share. From
Python, `luthier.workflow.agent_loop.act` lets a finished run act with functions that are handed to it.

Paper: arXiv:2310.05915 (FireAct); arXiv:2310.12823 (AgentTuning) keeps traces of reward 1, a fifth of what is learnt.
Quoted for FireAct's code: LoRA of rank 8, alpha 16, rate 3e-4, 30 epochs, and loss on inputs too, as --loss-on all.

Cost: a plain run on long rows.
Claims: a model that is tuned on traces needs no examples of them in its prompt.
Pitfalls: traces are not collected here. As text, `tools` are checked and not shown: what there is, the traces teach. A
model of 135M learnt the form of a trace from 48 rows, and to answer with what a tool said, true or not: expect no plans
of it (`python -m experiments.traces`). Rows longer than max_length lose their answer: the run says how many, `luthier
look` which tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from luthier.core import ConfigError, DataError, between, key
from luthier.data.chat import Chat, Message, read_messages
from luthier.data.columns import find_columns
from luthier.data.encode_language import prompt_messages
from luthier.data.rows import Table, load_halves, load_rows
from luthier.data.traces import Trace, chat_of, read_trace
from luthier.runs.spec import DataSpec
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES
from luthier.workflow.load_model import find_model, load_tokenizer


@STRATEGIES.register("agent_sft", family="recipes", paper="arXiv:2310.05915")
@dataclass(frozen=True, kw_only=True)
class AgentSFT(Recipe):
    """Trajectory tuning."""

    example: ClassVar[str] = "sample:smollm2-135m --data TRACES.jsonl"

    form: Annotated[Literal["react", "calls"], "actions as text, or as tool calls of the chat template"] = "react"
    thoughts: Annotated[Literal["learn", "drop"], "thoughts are learnt, or left out of the rows"] = "learn"
    question: Annotated[str, "column with what the agent was asked"] = "question"
    steps: Annotated[str, "column with the steps"] = "steps"
    reward: Annotated[str | None, "column that says how well a trace ended; left out, all are learnt"] = None
    least: Annotated[float, "traces with less reward are left out"] = 1.0
    tools: Annotated[str | None, "a JSON file with the functions of rows that have no column `tools`"] = None
    general: Annotated[str | None, "rows of other chats that are mixed in"] = None
    general_share: Annotated[float, "their share of what is learnt", between(0, 0.99)] = 0.8

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec = plan.spec
        if desk.kind != "decoder":
            raise ConfigError("agent_sft learns chats, so it needs a decoder. Name another model.")
        data = spec.data
        table, test = load_halves(data)
        learnt, counts = self.kept(table)
        held = None if test is None else self.kept(test)
        if self.form == "calls":
            self.refuse_lost_calls(spec.model, learnt)
        rows = [self.row_of(trace, place) for trace, place in learnt]
        others = self.others(len(rows), spec.seed, spec.data)
        told = [counts | {"general": len(others)}, *([] if held is None else [held[1] | {"held_out": True}])]
        desk.write("made", told)
        source = desk.write("traces", [*rows, *others])
        kept = None if held is None else desk.write("held", [self.row_of(*one) for one in held[0]])
        nothing = dict.fromkeys(("text", "pair", "label", "prompt", "context", "response"))
        share = {} if kept else {"test_share": spec.data.test_share, "fold": spec.data.fold}
        data = plan.data(source, kept, **{**nothing, **share}, messages="messages")
        yield Phase(name="traces", spec=plan.task(data=data, task="causal_lm"))

    def kept(self, table: Table) -> tuple[list[tuple[Trace, str]], dict[str, Any]]:
        """The traces that ended well, with their places; and how many there were.

        Raises:
            DataError: a trace that cannot be read, no such column, or no trace that ended well.
        """
        if self.reward is not None and self.reward not in table.columns:
            names = ", ".join(table.columns)
            raise DataError(f"{table.source}: no column {self.reward!r} (agent_sft.reward). Its columns are {names}.")
        tools = _tools(self.tools)
        good = [n for n, row in enumerate(table.rows) if self._reward(row, table.places[n]) >= self.least]
        if not good:
            raise DataError(
                f"{table.source}: no trace has a {self.reward} of {self.least:g} or more. Lower agent_sft.least."
            )
        found = [
            (read_trace(table.rows[n], table.places[n], question=self.question, steps=self.steps, tools=tools),
             table.places[n])
            for n in good
        ]  # fmt: skip
        return found, {"traces": len(table), "kept": len(good), "left_out": len(table) - len(good), "least": self.least}

    def _reward(self, row: Mapping[str, Any], place: str) -> float:
        if self.reward is None:
            return self.least
        value = str(row.get(self.reward)).lower()
        try:
            return float({"true": "1", "false": "0"}.get(value, value))
        except ValueError:
            raise DataError(
                f"{place}: field {self.reward!r} is {row.get(self.reward)!r}; it must be a number, or true or false."
            ) from None

    def row_of(self, trace: Trace, place: str) -> dict[str, Any]:
        """A chat row with where it came from; keys without a value are left out."""
        tools = {"tools": trace.tools} if trace.tools is not None and self.form == "calls" else {}
        return {"messages": chat_of(trace, form=self.form, thoughts=self.thoughts == "learn"), **tools, "from": place}

    def refuse_lost_calls(self, model: str, traces: list[tuple[Trace, str]]) -> None:
        """Raises: ConfigError, where the chat template does not write a call so that it can be read back."""
        tokenizer = load_tokenizer(find_model(model))
        with Chat(tokenizer) as chat:
            for trace, place in traces:
                messages = chat_of(trace, form="calls", thoughts=self.thoughts == "learn")
                text = tokenizer.decode(chat.prompt(messages[:-1], place, trace.tools))
                for step in trace.steps:
                    if step.action is not None and not _holds(text, step.action.name, dict(step.action.arguments)):
                        raise ConfigError(
                            f"{place}: the chat template of {model} does not write the call of {step.action.name!r} as "
                            f"JSON that reads back. Use agent_sft.form=react. It renders {text[-300:]!r}"
                        )

    def others(self, n: int, seed: int, rows: DataSpec) -> list[dict[str, Any]]:
        """So many general chats that they are their share, drawn by name.

        Raises:
            ConfigError: there are not as many.
        """
        if self.general is None or self.general_share == 0:
            return []
        table, _ = load_rows(self.general, **rows.stored(self.general))
        columns = find_columns(table, DataSpec(source=self.general), "causal_lm")
        wanted = round(n * self.general_share / (1 - self.general_share))
        if wanted > len(table):
            raise ConfigError(
                f"agent_sft.general_share = {self.general_share:g} of {n} traces asks for {wanted} general rows, and "
                f"{self.general} has {len(table)}. Set it to {len(table) / (len(table) + n):.2f}, or give more rows."
            )
        order = sorted(range(len(table)), key=lambda i: key(seed, "agent_sft", "general", i))[:wanted]
        found: list[dict[str, Any]] = []
        for i in sorted(order):
            messages: list[Message]
            if columns.shape == "dialogue" and columns.messages is not None:
                messages = read_messages(table.rows[i].get(columns.messages), columns.messages)
            elif columns.shape == "answered":
                messages = prompt_messages(table, i, columns, with_response=True)
            else:
                raise ConfigError(f"agent_sft.general: {self.general} has no chats and no prompts with responses.")
            found.append({"messages": messages, "from": table.places[i]})
        return found


def _holds(text: str, name: str, arguments: dict[str, Any]) -> bool:
    """Whether the arguments stand in the text as JSON, behind the name."""
    decoder, at = json.JSONDecoder(), text.find(name)
    while at >= 0:
        for start in (i for i in range(at, len(text)) if text[i] == "{"):
            try:
                if decoder.raw_decode(text, start)[0] == arguments:
                    return True
            except ValueError:
                continue
        at = text.find(name, at + 1)
    return False


def _tools(path: str | None) -> list[Any] | None:
    """Raises: ConfigError, where the file is no list of functions."""
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"agent_sft.tools: {path} cannot be read as JSON ({error}).") from error
    if not isinstance(found, list) or not found:
        raise ConfigError(f"agent_sft.tools: {path} must be a list of functions, each with a name.")
    return found
