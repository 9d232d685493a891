"""Rows whose targets are tokens: plain text, prompts with responses, chats (causal_lm), and seq2seq."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.core import DataError
from luthier.data.chat import Chat, ChatTemplate, Message, Tokens, read_messages, read_tools
from luthier.data.columns import Columns, cell, text_complaint
from luthier.data.examples import CHUNK, IGNORED, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tokenizer import check_ids, tokenize

__all__ = ["conversation_before", "encode_language", "loss_view", "prompt_messages", "refused_because"]


def encode_language(
    table: Table,
    columns: Columns,
    tokenizer: Any,
    n_vocab: int,
    max_length: int,
    ledger: Ledger,
    *,
    both: bool,
    with_targets: bool,
    loss_on: str,
    template: ChatTemplate | None,
) -> Examples:
    """Encode rows of text for a language model.

    Args:
        both: the model has an encoder and a decoder.
        with_targets: off for generation, where each example is a prompt.
    """
    gather = _Gather(table, tokenizer, n_vocab, max_length, ledger)
    if both:
        return _seq2seq(gather, columns, with_targets)
    if columns.shape == "plain":
        _plain(gather, columns, with_targets)
    else:
        with Chat(tokenizer, loss_on, template) as chat:
            if with_targets:
                _chats(gather, columns, chat)
            else:
                _prompts(gather, columns, chat)
            ledger.notes.append(f"chat template: {chat.template.origin} (sha256 {chat.template.digest[:12]})")
            ledger.notes.extend(chat.notes())
    return gather.examples(labelled=with_targets)


class _Gather:
    """Collects examples of a causal language model."""

    def __init__(self, table: Table, tokenizer: Any, n_vocab: int, max_length: int, ledger: Ledger) -> None:
        self.table, self.tokenizer, self.n_vocab, self.ledger = table, tokenizer, n_vocab, ledger
        self.max_length = max_length
        self._ids, self._labels = Flat(np.int32), Flat(np.int32)
        self._rows: list[int] = []
        self._targets: list[int] = []

    def chunks(self) -> list[range]:
        n = len(self.table)
        return [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]

    def add(self, row: int, ids: Sequence[int], labels: Sequence[int]) -> int:
        """Add an example; returns how many tokens carry loss. The first never does: nothing stands before it."""
        labels = [IGNORED, *labels[1:]]
        n = sum(label != IGNORED for label in labels)
        self._ids.add(ids)
        self._labels.add(labels)
        self._rows.append(row)
        self._targets.append(n)
        return n

    def check(self, row: int, ids: Sequence[int]) -> None:
        check_ids([ids], [row], self.table, self.tokenizer, self.n_vocab)

    def examples(self, labelled: bool) -> Examples:
        return Examples(
            ids=self._ids.array(),
            offsets=self._ids.offsets(),
            rows=np.asarray(self._rows, dtype=np.int64),
            n_targets=np.asarray(self._targets, dtype=np.int64),
            labels=self._labels.array() if labelled else None,
            ledger=self.ledger,
        )


def _usable(gather: _Gather, indices: Sequence[int], columns: Sequence[str]) -> list[int]:
    """The rows whose fields are all text; the others are refused, with the field."""
    kept = []
    for i in indices:
        found = [text_complaint(gather.table.rows[i].get(c), f"field {c!r}") for c in columns]
        complaint = next((c for c in found if c), None)
        if complaint:
            gather.ledger.refuse(i, complaint)
        else:
            kept.append(i)
    return kept


def _plain(gather: _Gather, columns: Columns, with_targets: bool) -> None:
    """Plain text: the end token follows; a long text becomes several examples that overlap by one token.

    The overlap is context only, so each token but the first of a text is a target exactly once.
    """
    assert columns.text is not None
    eos, size = gather.tokenizer.eos_token_id, gather.max_length
    if eos is None and with_targets:
        gather.ledger.notes.append("the tokenizer has no end token, so none follows the texts")
    for chunk in gather.chunks():
        rows = _usable(gather, chunk, [columns.text])
        if not rows:
            continue
        lists = tokenize(gather.tokenizer, [gather.table.rows[i][columns.text] for i in rows])["input_ids"]
        for row, ids in zip(rows, lists, strict=True):
            ids = list(ids)
            gather.check(row, ids)
            if not with_targets:
                _add_prompt(gather, row, ids[:-1] if ids and ids[-1] == eos else ids)
                continue
            if eos is not None and (not ids or ids[-1] != eos):
                ids.append(eos)
            if len(ids) < 2:
                gather.ledger.refuse(row, f"{len(ids)} token: nothing to predict")
            for start in range(0, len(ids) - 1, size - 1):
                piece = ids[start : start + size]
                gather.ledger.use(row, len(piece) - (start > 0), gather.add(row, piece, piece))


def prompt_messages(table: Table, row: int, columns: Columns, with_response: bool) -> list[Message]:
    """A row with prompt and response as a chat: what the system says, earlier turns, the prompt, and the response.

    Further input follows the prompt after a blank line. A prompt and a response may be lists of messages themselves;
    then the response's turns alone carry loss.

    Raises:
        DataError: a field is missing, empty or no text.
    """
    assert (columns.prompt is not None and columns.response is not None) or not with_response
    assert columns.prompt is not None
    prompt = cell(table, row, columns.prompt)
    context = table.rows[row].get(columns.context) if columns.context else None
    response = None
    if with_response:
        assert columns.response is not None
        response = cell(table, row, columns.response)
    if context is not None and not isinstance(context, str):
        raise DataError(f"field {columns.context!r} is {context!r} ({type(context).__name__}), not text")
    messages = conversation_before(table.rows[row], columns)
    if isinstance(prompt, list | tuple):
        # What the assistant said before is context here: the response alone is to be learnt.
        given = read_messages(prompt, columns.prompt)
        messages += [{**m, "weight": 0} if m["role"] == "assistant" else m for m in given]
    else:
        if complaint := text_complaint(prompt, f"field {columns.prompt!r}"):
            raise DataError(complaint)
        asked = prompt if context is None or not context.strip() else f"{prompt}\n\n{context}"
        messages.append({"role": "user", "content": asked})
    if not with_response:
        return messages
    assert columns.response is not None
    if isinstance(response, list | tuple):
        return messages + read_messages(response, columns.response)
    if complaint := text_complaint(response, f"field {columns.response!r}"):
        raise DataError(complaint)
    return [*messages, {"role": "assistant", "content": response}]


def conversation_before(row: dict[str, Any], columns: Columns) -> list[Message]:
    """What columns of their own say before the conversation: the system's words, and pairs of earlier turns."""
    found: list[Message] = []
    said = row.get(columns.system) if columns.system else None
    if said is not None and not isinstance(said, str):
        raise DataError(f"field {columns.system!r} is {said!r} ({type(said).__name__}), not text")
    if said and said.strip():
        found.append({"role": "system", "content": said})
    for pair in (row.get(columns.history) if columns.history else None) or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(turn, str) for turn in pair):
            raise DataError(
                f"field {columns.history!r} holds {str(pair)[:60]!r}; each must be a question and its answer"
            )
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return found


def _conversation(gather: _Gather, columns: Columns, with_response: bool) -> Callable[[int], list[Message]]:
    if columns.shape == "preferred" and columns.prompt is None:
        assert columns.chosen is not None
        chosen = columns.chosen
        return lambda row: [
            *conversation_before(gather.table.rows[row], columns),
            *read_messages(gather.table.rows[row].get(chosen), chosen),
        ]
    if columns.shape in ("answered", "preferred", "judged", "asked"):
        return lambda row: prompt_messages(gather.table, row, columns, with_response)
    assert columns.messages is not None
    column = columns.messages

    def messages(row: int) -> list[Message]:
        found = read_messages(cell(gather.table, row, column), column)
        before = conversation_before(gather.table.rows[row], columns)
        return found if found[0]["role"] == "system" else [*before, *found]

    return messages


def _tools(gather: _Gather, columns: Columns, row: int) -> list[Any] | None:
    return read_tools(gather.table.rows[row].get(columns.tools), columns.tools) if columns.tools else None


def _chats(gather: _Gather, columns: Columns, chat: Chat) -> None:
    messages_of = _conversation(gather, columns, with_response=True)
    for chunk in gather.chunks():
        plans = []
        for row in chunk:
            try:
                tools = _tools(gather, columns, row)
                plans += chat.plan(row, messages_of(row), gather.table.places[row], tools)
            except DataError as error:  # this row; `Ledger.check` stops when there are too many
                gather.ledger.refuse(row, refused_because(str(error), gather.table.places[row]))
        for plan, tokens in zip(plans, chat.encode(plans), strict=True):
            if isinstance(tokens, str):
                gather.ledger.refuse(plan.row, tokens)
            else:
                _add_tokens(gather, plan.row, tokens)


def refused_because(message: str, place: str) -> str:
    return message.removeprefix(f"{place}: ").removesuffix(".")


def _add_tokens(gather: _Gather, row: int, tokens: Tokens) -> None:
    gather.check(row, tokens.ids)
    size = gather.max_length
    wanted = sum(tokens.loss[1:])
    left = sum(tokens.loss[1:size])
    if left == 0:
        first = tokens.loss.index(True) if wanted else None
        reason = "no token of it carries loss"
        if first is not None:
            reason = (
                f"the response begins at token {first + 1}, but only {size} tokens fit (max_length): no target remains"
            )
        gather.ledger.refuse(row, reason)
        return
    labels = [t if has_loss else IGNORED for t, has_loss in zip(tokens.ids, tokens.loss, strict=True)]
    n = gather.add(row, tokens.ids[:size], labels[:size])
    if len(tokens.ids) > size:
        reason = f"{len(tokens.ids)} tokens, cut to {size}; {left} of {wanted} targets remain"
        gather.ledger.truncate(row, size, n, reason)
    else:
        gather.ledger.use(row, len(tokens.ids), n)


def _prompts(gather: _Gather, columns: Columns, chat: Chat) -> None:
    messages_of = _conversation(gather, columns, with_response=False)
    for row in range(len(gather.table)):
        try:
            messages = messages_of(row)
            while messages and messages[-1]["role"] == "assistant":  # what is to be generated
                messages = messages[:-1]
            ids = chat.prompt(messages, gather.table.places[row], _tools(gather, columns, row))
        except DataError as error:
            gather.ledger.refuse(row, refused_because(str(error), gather.table.places[row]))
            continue
        gather.check(row, ids)
        _add_prompt(gather, row, ids)


def _add_prompt(gather: _Gather, row: int, ids: Sequence[int]) -> None:
    if not ids:
        gather.ledger.refuse(row, "no token of the prompt remains")
    elif len(ids) > gather.max_length:
        gather.ledger.refuse(row, f"the prompt has {len(ids)} tokens, only {gather.max_length} fit (max_length)")
    else:
        gather.add(row, ids, [IGNORED] * len(ids))
        gather.ledger.use(row, len(ids), 0)


def _seq2seq(gather: _Gather, columns: Columns, with_targets: bool) -> Examples:
    """The prompt goes to the encoder, the response with its end token is what the decoder writes."""
    assert columns.prompt is not None
    tokenizer, size, ledger = gather.tokenizer, gather.max_length, gather.ledger
    ids, answers, kept, counts = Flat(np.int32), Flat(np.int32), [], []
    for chunk in gather.chunks():
        rows, sources, wanted = [], [], []
        for row in chunk:
            try:
                messages = prompt_messages(gather.table, row, columns, with_targets)
            except DataError as error:
                ledger.refuse(row, refused_because(str(error), gather.table.places[row]))
                continue
            rows.append(row)
            asked = messages[:-1] if with_targets else messages
            sources.append("\n\n".join(m["content"] for m in asked))
            wanted.append(messages[-1]["content"] if with_targets else "")
        if not rows:
            continue
        full = tokenize(tokenizer, sources)["input_ids"]
        cut = tokenize(tokenizer, sources, truncation=True, max_length=size)["input_ids"]
        replies = _replies(tokenizer, wanted) if with_targets else [[] for _ in rows]
        for row, whole, source, reply in zip(rows, full, cut, replies, strict=True):
            gather.check(row, source)
            gather.check(row, reply)
            target = reply[:size]
            if with_targets and not any(
                t not in tokenizer.all_special_ids or t == tokenizer.unk_token_id for t in target
            ):
                ledger.refuse(row, f"no token of field {columns.response!r} remains")
                continue
            reasons = []
            if len(source) < len(whole):
                reasons.append(f"prompt of {len(whole)} tokens, cut to {len(source)}")
            if len(target) < len(reply):
                reasons.append(f"response of {len(reply)} tokens, cut to {len(target)}")
            if reasons:
                ledger.truncate(row, len(source) + len(target), len(target), "; ".join(reasons))
            else:
                ledger.use(row, len(source) + len(target), len(target))
            ids.add(source)
            answers.add(target)
            kept.append(row)
            counts.append(len(target))
    return Examples(
        ids=ids.array(),
        offsets=ids.offsets(),
        rows=np.asarray(kept, dtype=np.int64),
        n_targets=np.asarray(counts, dtype=np.int64),
        answers=answers.array() if with_targets else None,
        answer_offsets=answers.offsets() if with_targets else None,
        ledger=ledger,
    )


def _replies(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    lists = tokenizer(text_target=texts, padding=False, verbose=False)["input_ids"]
    return [list(ids) if eos is None or (ids and ids[-1] == eos) else [*ids, eos] for ids in lists]


def loss_view(examples: Examples, index: int, tokenizer: Any) -> list[tuple[str, bool]]:
    """One example as (piece of text, carries loss), for people to look at before step 1."""
    piece = slice(int(examples.offsets[index]), int(examples.offsets[index + 1]))
    ids = examples.ids[piece].tolist()
    if examples.answers is not None and examples.answer_offsets is not None:
        reply = slice(int(examples.answer_offsets[index]), int(examples.answer_offsets[index + 1]))
        replies = examples.answers[reply].tolist()
        return [(tokenizer.decode([t]), False) for t in ids] + [(tokenizer.decode([t]), True) for t in replies]
    labels = examples.labels[piece].tolist() if examples.labels is not None else [IGNORED] * len(ids)
    return [(tokenizer.decode([t]), label != IGNORED) for t, label in zip(ids, labels, strict=True)]
