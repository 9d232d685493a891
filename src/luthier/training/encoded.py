"""Encoded rows, kept between runs: a second run on the same rows reads their ids instead of making them.

An entry (`luthier.training.kept`) holds ids, offsets, labels and the ledger, as `encode` made them. Its name is the
digest of everything that encoding depends on: the rows, the columns, the task, the tokenizer with all its rules, the
lengths, the versions of the libraries, and the source text of our own encoder.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import plain
from luthier.training import chat, columns, encode, kept, language, tasks
from luthier.training.columns import Columns
from luthier.training.encode import Examples, Ledger
from luthier.training.rows import Table
from luthier.training.tasks import Task
from luthier.trust import template as rendering

if TYPE_CHECKING:
    from luthier.training.chat import ChatTemplate

__all__ = ["KEPT_FROM", "entry_of", "keep", "read"]

KEPT_FROM = 256
"""Tables with fewer rows are encoded faster than they are looked up."""

ARRAYS = ("ids", "offsets", "rows", "n_targets", "types", "labels", "answers", "answer_offsets", "targets")


def entry_of(
    table: Table, columns: Columns, task: Task, tokenizer: Any, template: "ChatTemplate | None", **options: Any
) -> Path | None:
    """The folder that holds, or is to hold, these rows encoded. None where they are to be encoded anew each time.

    That is so for small tables, for tokenizers whose rules are Python code, and for rows with values that have no JSON
    (such as dates), which a digest of the JSON could confuse with their text.
    """
    if len(table) < KEPT_FROM or not kept.limit() or not tokenizer.is_fast or not table.is_plain():
        return None
    language_rows = task.name == "causal_lm" and columns.shape != "plain"
    if language_rows and template is None:
        template = chat.ChatTemplate.of(tokenizer)
    return kept.entry(
        {
            "rows": table.fingerprint(),
            "columns": columns.used() | {"shape": columns.shape},
            "task": {k: v for k, v in plain(task).items() if k != "notes"},
            "tokenizer": _rules(tokenizer),
            "template": [template.digest, template.origin] if language_rows and template is not None else None,
            "options": options,
            "made_by": _makers(),
        }
    )


def read(entry: Path, table: Table) -> tuple[Examples | None, str]:
    """The examples of an entry, and what is to be said about it; None and why where they have to be made anew."""
    found, said = kept.read(entry, "encoded rows")
    if found is None:
        return None, said
    arrays, words = found
    ledger = Ledger(table)
    ledger.take(
        arrays.pop("status"),
        arrays.pop("tokens"),
        arrays.pop("counts"),
        {int(row): reason for row, reason in words["reasons"].items()},
    )
    ledger.notes += words["notes"]
    return Examples(**arrays, ledger=ledger), f"encoded rows are those kept in {entry}"


def keep(entry: Path, examples: Examples) -> str:
    """Keep the examples; returns what is to be said."""
    status, tokens, counts, reasons = examples.ledger.taken()
    arrays = {name: getattr(examples, name) for name in ARRAYS if getattr(examples, name) is not None}
    arrays |= {"status": status, "tokens": tokens, "counts": counts}
    why_not = kept.keep(entry, arrays, {"reasons": reasons, "notes": examples.ledger.notes})
    return f"encoded rows could not be kept: {why_not}" if why_not else f"encoded rows are kept in {entry}"


def _rules(tokenizer: Any) -> list[Any]:
    """Everything that decides which ids a text gets."""
    backend = tokenizer.backend_tokenizer
    # Both are set anew with every call; what the last call left says nothing.
    backend.no_truncation()
    backend.no_padding()
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return [
        hashlib.sha256(backend.to_str().encode(errors="surrogatepass")).hexdigest(),
        type(tokenizer).__name__,
        special,
        list(tokenizer.model_input_names),
        [tokenizer.truncation_side, tokenizer.padding_side, bool(tokenizer.split_special_tokens)],
        [tokenizer.eos_token_id, tokenizer.unk_token_id, sorted(tokenizer.all_special_ids)],
    ]


def _makers() -> list[str]:
    """The code that encodes: our own source, and the versions of the libraries."""
    ours = kept.source_digest((encode, language, chat, tasks, columns, rendering))
    return [ours, f"tokenizers {version('tokenizers')}", f"transformers {version('transformers')}"]
