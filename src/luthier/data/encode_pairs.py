"""Rows of two answers to one prompt, one better (preference): both as they would be written, with one prompt.

The prompt stands in a column of its own, as text or as messages, or it is what both conversations begin with. An
example is both answers, prompt and all, one after the other in `Examples.ids`; its second half begins at `middles`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.core import ConfigError, DataError
from luthier.data.chat import Chat, ChatTemplate, Message, Tokens, read_messages, read_tools
from luthier.data.columns import Columns, cell, is_blank
from luthier.data.encode_language import conversation_before, prompt_messages, refused_because
from luthier.data.examples import CHUNK, IGNORED, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tokenizer import check_ids

__all__ = ["NEITHER", "encode_pairs", "pair_messages"]

NEITHER = "both answers are the same, so neither is better"
"""Said of a row whose answers are equal."""


def encode_pairs(
    table: Table, columns: Columns, tokenizer: Any, n_vocab: int, max_length: int, ledger: Ledger, loss_on: str,
    template: ChatTemplate | None, *, alone: bool = False,
) -> Examples:  # fmt: skip
    """Encode rows of pairs.

    Args:
        alone: of each row its first answer, with its prompt, and nothing to compare it with: to be scored.

    Raises:
        ConfigError: `loss_on` asks for more than the answers.
    """
    if loss_on != "response":
        raise ConfigError(
            f"data.loss_on: {loss_on}: of two answers to one prompt the answers are compared, and the prompt says "
            "nothing. Leave it out."
        )
    if columns.chosen is None:
        raise DataError(
            f"{table.source}: no column with the answers that are to be scored, which training called 'chosen'. Its "
            f"columns are {', '.join(map(repr, table.columns))}. Rename one."
        )
    if alone:
        return _answers(table, columns, tokenizer, n_vocab, max_length, ledger, template)
    ids, labels = Flat(np.int32), Flat(np.int32)
    middles: list[int] = []
    rows: list[int] = []
    marks: list[tuple[float, float]] = []
    end = 0
    with Chat(tokenizer, "response", template) as chat:
        for start in range(0, len(table), CHUNK):
            plans, planned = [], []
            for row in range(start, min(start + CHUNK, len(table))):
                try:
                    found = _marks(table, row, columns)
                    plans += _plans(chat, table, row, columns)
                except DataError as error:  # this row; `Ledger.check` stops when there are too many
                    ledger.refuse(row, refused_because(str(error), table.places[row]))
                    continue
                planned.append((row, found))
            encoded = chat.encode(plans)
            for k, (row, numbers) in enumerate(planned):
                pair = encoded[2 * k : 2 * k + 2]
                complaint = _complaint(pair, max_length)
                if complaint:
                    ledger.refuse(row, complaint)
                    continue
                halves = [one for one in pair if isinstance(one, Tokens)]
                for one in halves:
                    cut = one.ids[:max_length]
                    check_ids([cut], [row], table, tokenizer, n_vocab)
                    ids.add(cut)
                    told = [t if has_loss else IGNORED for t, has_loss in zip(one.ids, one.loss, strict=True)]
                    labels.add([IGNORED, *told[1:max_length]])
                rows.append(row)
                marks.append(numbers)
                kept = [min(len(one.ids), max_length) for one in halves]
                middles.append(end + kept[0])
                end += sum(kept)
                lengths = [len(one.ids) for one in halves]
                if max(lengths) > max_length:
                    said = [f"the {x} answer ends at token {n}" for x, n in zip(_NAMES, lengths, strict=True)]
                    which = " and ".join(s for s, n in zip(said, lengths, strict=True) if n > max_length)
                    ledger.truncate(row, sum(kept), 1, f"{which}, cut at {max_length}")
                else:
                    ledger.use(row, sum(kept), 1)
        ledger.notes.append(f"chat template: {chat.template.origin} (sha256 {chat.template.digest[:12]})")
        ledger.notes.extend(chat.notes())
    return Examples(
        ids=ids.array(),
        offsets=ids.offsets()[::2],
        middles=np.asarray(middles, dtype=np.int64),
        labels=labels.array(),
        rows=np.asarray(rows, dtype=np.int64),
        n_targets=np.ones(len(rows), dtype=np.int64),
        marks=np.asarray(marks, dtype=np.float32).reshape(-1, 2),
        ledger=ledger,
    )


def _answers(
    table: Table, columns: Columns, tokenizer: Any, n_vocab: int, max_length: int, ledger: Ledger,
    template: ChatTemplate | None,
) -> Examples:  # fmt: skip
    """The first answers alone, as they are read in a pair."""
    ids, rows = Flat(np.int32), []
    with Chat(tokenizer, "response", template) as chat:
        for row in range(len(table)):
            try:
                tools = read_tools(table.rows[row].get(columns.tools), columns.tools) if columns.tools else None
                plans = chat.plan(row, _conversation(table, row, columns), table.places[row], tools)
                (found,) = chat.encode(plans[-1:])
            except DataError as error:
                ledger.refuse(row, refused_because(str(error), table.places[row]))
                continue
            complaint = found if isinstance(found, str) else ""
            if isinstance(found, Tokens) and len(found.ids) > max_length:
                complaint = f"prompt and answer have {len(found.ids)} tokens, only {max_length} fit (max_length)"
            if complaint or isinstance(found, str):
                ledger.refuse(row, complaint)
                continue
            check_ids([found.ids], [row], table, tokenizer, n_vocab)
            ids.add(found.ids)
            rows.append(row)
            ledger.use(row, len(found.ids), 0)
    return Examples(
        ids=ids.array(), offsets=ids.offsets(), rows=np.asarray(rows, dtype=np.int64),
        n_targets=np.zeros(len(rows), dtype=np.int64), ledger=ledger,
    )  # fmt: skip


def _conversation(table: Table, row: int, columns: Columns) -> list[Message]:
    """The prompt of a row with its first answer."""
    assert columns.chosen is not None
    value = cell(table, row, columns.chosen)
    if isinstance(value, list | tuple):
        whole = read_messages(value, columns.chosen)
        if whole[0]["role"] != "assistant":
            last = len(whole) - 1
            return [{**m, "weight": 0} if m["role"] == "assistant" and k < last else m for k, m in enumerate(whole)]
    return prompt_messages(table, row, replace(columns, shape="answered", response=columns.chosen), with_response=True)


_NAMES = ("chosen", "rejected")


def pair_messages(table: Table, row: int, columns: Columns) -> tuple[list[Message], list[Message]]:
    """Both conversations of a row, the better one first: one prompt, and an answer each.

    Raises:
        DataError: a field is missing or empty, the answers are equal, or they answer no common prompt.
    """
    assert columns.chosen is not None and columns.rejected is not None
    fields = (columns.chosen, columns.rejected)
    values = [cell(table, row, name) for name in fields]
    if all(isinstance(value, list | tuple) for value in values):
        one, other = (read_messages(value, name) for value, name in zip(values, fields, strict=True))
        if one[0]["role"] != "assistant" or other[0]["role"] != "assistant":
            one, other = _with_shared_prompt(one, other, conversation_before(table.rows[row], columns))
            _refuse_equal(one, other)
            return one, other
    if columns.prompt is None:
        raise DataError(f"fields {fields[0]!r} and {fields[1]!r} hold no prompt; it must be what both begin with")
    one, other = (
        prompt_messages(table, row, replace(columns, shape="answered", response=name), with_response=True)
        for name in fields
    )
    _refuse_equal(one, other)
    return one, other


def _with_shared_prompt(
    one: list[Message], other: list[Message], before: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Two whole conversations, the turns before the last answer without loss.

    Raises:
        DataError: they differ before their last turn, or end in no answer.
    """
    differs = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if differs == 0:
        raise DataError("the two conversations share no prompt: they differ from their first message on")
    for messages, name in ((one, _NAMES[0]), (other, _NAMES[1])):
        if len(messages) - 1 > differs:
            raise DataError(
                f"the two conversations differ from message {differs + 1} on, and the {name} one has {len(messages)}; "
                "only the last answer may differ"
            )
        if messages[-1]["role"] != "assistant":
            raise DataError(f"the {name} conversation ends in no answer of the assistant")
    if len(one) != len(other):
        raise DataError(f"the conversations have {len(one)} and {len(other)} messages; only the last answer may differ")
    prompt = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in one[:-1]]
    if prompt[0]["role"] != "system":
        prompt = before + prompt
    return [*prompt, one[-1]], [*prompt, other[-1]]


def _refuse_equal(one: list[Message], other: list[Message]) -> None:
    if [(m["role"], m["content"].strip(), m.get("tool_calls")) for m in one] == [
        (m["role"], m["content"].strip(), m.get("tool_calls")) for m in other
    ]:
        raise DataError(NEITHER)


def _plans(chat: Chat, table: Table, row: int, columns: Columns) -> list[Any]:
    """The rendered text of both."""
    tools = read_tools(table.rows[row].get(columns.tools), columns.tools) if columns.tools else None
    found = []
    for name, messages in zip(_NAMES, pair_messages(table, row, columns), strict=True):
        plans = chat.plan(row, messages, table.places[row], tools)
        if len(plans) != 1:
            raise DataError(f"the template writes the {name} answer in {len(plans)} texts; give answers of one turn")
        found += plans
    return found


def _complaint(pair: Sequence[Tokens | str], size: int) -> str:
    """Why two encoded answers cannot be compared, or nothing."""
    for one in pair:
        if isinstance(one, str):
            return one
    whole = [one for one in pair if isinstance(one, Tokens)]
    firsts = [one.loss.index(True) for one in whole]
    if firsts[0] != firsts[1] or whole[0].ids[: firsts[0]] != whole[1].ids[: firsts[1]]:
        return "the template writes the prompt otherwise before each answer, so they share none"
    if firsts[0] >= size:
        return f"the prompt has {firsts[0]} tokens, and {size} fit with an answer (max_length): no answer remains"
    if whole[0].ids[:size] == whole[1].ids[:size]:
        return f"the answers are the same in their first {size} tokens (max_length)"
    return ""


def _marks(table: Table, row: int, columns: Columns) -> tuple[float, float]:
    """The share of judges who found the first answer better (1 where nothing says so), and by how much (0).

    Raises:
        DataError: no number, a share that is none, or a margin below 0.
    """
    found = []
    for name, usual, most in ((columns.share, 1.0, 1.0), (columns.margin, 0.0, float("inf"))):
        value = None if name is None else table.rows[row].get(name)
        if is_blank(value):
            found.append(usual)
            continue
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = float("nan")
        if not 0 <= number <= most or number == float("inf"):
            limits = "between 0 and 1" if most == 1 else "of at least 0"
            raise DataError(f"field {name!r} is {value!r}; it must be a number {limits}")
        found.append(number)
    return found[0], found[1]
