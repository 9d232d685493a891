"""Rows with a label as texts with a gap: the template is kept whole, and where a row is too long its text is cut."""

from typing import Any

import numpy as np

from luthier.data.cloze import marks_of, rendered, shown_beside
from luthier.data.columns import Columns, text_complaint
from luthier.data.examples import Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.soft_words import softened
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_ids, tokenize

__all__ = ["encode_cloze"]


def encode_cloze(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    n_vocab: int,
    max_length: int,
    ledger: Ledger,
    with_targets: bool,
) -> Examples:
    assert columns.text is not None
    names = [name for name in (columns.text, columns.pair) if name is not None]
    ids, kept, marks = Flat(np.int32), [], marks_of(task.template)
    for row in range(len(table)):
        values = [table.rows[row].get(name) for name in names]
        found = (text_complaint(v, f"field {n!r}") for v, n in zip(values, names, strict=True))
        complaint = next((c for c in found if c), None)
        if complaint:
            ledger.refuse(row, complaint)
            continue
        for draw in range(max(1, task.draws)):
            texts = [str(v) for v in values]
            tokens, cut = _fitting(task, texts, shown_beside(task, texts, draw), tokenizer, max_length)
            check_ids([tokens], [row], table, tokenizer, n_vocab)
            made = softened(task, marks, tokens, n_vocab) if tokens else tokens
            if made is None:
                token = tokenizer.convert_ids_to_tokens(task.filler)
                ledger.refuse(row, f"its text holds {token}, which stands for the template's trained words")
                continue
            tokens = made
            gaps = tokens.count(task.gap) if task.asks != "decoder" else 1
            if not tokens or gaps != 1:
                reason = f"{gaps} gaps: the text holds the token that stands for one" if tokens and gaps else "no room"
                ledger.refuse(row, reason)
                continue
            if cut:
                reason = f"its text was cut by {cut} words, to {len(tokens)}"
                ledger.truncate(row, len(tokens), int(with_targets), reason)
            else:
                ledger.use(row, len(tokens), int(with_targets))
            ids.add(tokens)
            kept.append(row)
    chosen = np.asarray(kept, dtype=np.int64)
    targets = task.targets(table, columns) if with_targets else None
    typed = "token_type_ids" in tokenizer.model_input_names
    flat = ids.array()
    return Examples(
        ids=flat,
        offsets=ids.offsets(),
        rows=chosen,
        n_targets=np.full(len(chosen), int(with_targets), dtype=np.int64),
        types=np.zeros(len(flat), dtype=np.int8) if typed else None,
        targets=None if targets is None else targets[chosen],
        ledger=ledger,
    )


def _fitting(
    task: Task, texts: list[str], shown: list[tuple[str, ...]], tokenizer: Any, size: int
) -> tuple[list[int], int]:
    """The ids of a row, and how many words were cut off its longest text for it to fit; no ids where none is left.

    What is shown beside it is cut first, down to half of what the row itself has.
    """
    cut, beside = 0, [list(row) for row in shown]
    while True:
        said = rendered(task, texts, tokenizer, beside)
        tokens = list(tokenize(tokenizer, [said])["input_ids"][0])
        ends = tokenizer.eos_token_id
        own = ends == task.filler and tokens.count(ends) <= task.n_soft  # it stands for a trained word
        if task.asks == "decoder" and len(tokens) > 1 and tokens[-1] == ends and not own:
            tokens.pop()  # the gap is the end
        if len(tokens) <= size:
            return tokens, cut
        widest = max(beside, key=lambda row: sum(len(text.split()) for text in row), default=[])
        place = max(range(len(widest)), key=lambda i: len(widest[i].split()), default=0)
        if widest and 2 * len(widest[place].split()) > max(len(text.split()) for text in texts):
            widest[place] = " ".join(widest[place].split()[: -max(1, (len(tokens) - size) // (2 * len(beside)))])
            continue
        longest = max(range(len(texts)), key=lambda i: len(texts[i].split()))
        words = texts[longest].split()
        drop = max(1, (len(tokens) - size) // 2)
        if len(words) <= drop:
            return [], cut
        texts[longest], cut = " ".join(words[:-drop]), cut + drop
