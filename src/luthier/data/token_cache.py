"""The cache of token ids: a second run on the same rows reads their ids instead of making them.

An entry (`luthier.data.disk_cache`) holds ids, offsets, labels and the ledger, as `encode` made them. Its name is the
digest of everything that encoding depends on: the rows, the columns, the task, the tokenizer with all its rules, the
lengths, the versions of the libraries, and the source text of our own encoder.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.core import plain
from luthier.data import disk_cache
from luthier.data.chat import ChatTemplate
from luthier.data.columns import Columns
from luthier.data.examples import Examples, Ledger
from luthier.data.rows import Table
from luthier.data.tasks import Task

__all__ = ["CACHED_FROM", "entry_of", "read", "write"]

CACHED_FROM = 256
"""Tables with fewer rows are encoded faster than they are looked up."""

ARRAYS = (
    *("ids", "offsets", "rows", "n_targets", "types", "labels", "words", "answers", "answer_offsets", "targets"),
    *("middles", "marks"),
)


def entry_of(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    template: ChatTemplate | None,
    made_by: Sequence[ModuleType],
    **options: Any,
) -> Path | None:
    """The folder that holds, or is to hold, these rows encoded. None where they are to be encoded anew each time.

    Args:
        made_by: the files whose source decides what the ids are.

    They are encoded anew for small tables, for tokenizers whose rules are Python code, and for rows with values that
    have no JSON (such as dates), which a digest of the JSON could confuse with their text.
    """
    if len(table) < CACHED_FROM or not disk_cache.limit() or not tokenizer.is_fast or not table.is_plain():
        return None
    language_rows = task.of_turns and columns.shape != "plain"
    if language_rows and template is None:
        template = ChatTemplate.of(tokenizer)
    return disk_cache.entry(
        {
            "rows": table.fingerprint(),
            "columns": columns.used() | {"shape": columns.shape},
            "task": {k: v for k, v in plain(task).items() if k != "notes"},
            "tokenizer": _rules(tokenizer),
            "template": [template.digest, template.origin] if language_rows and template is not None else None,
            "options": options,
            "made_by": _makers(made_by),
        }
    )


def read(entry: Path, table: Table) -> tuple[Examples | None, str]:
    """The examples of an entry, and what is to be said about it; None and why where they have to be made anew."""
    found, said = disk_cache.read(entry, "encoded rows")
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
    kept: dict[str, Any] = arrays
    return Examples(**kept, ledger=ledger), f"encoded rows are those kept in {disk_cache.short(entry)}"


def write(entry: Path, examples: Examples) -> str:
    """Keep the examples; returns what is to be said."""
    status, tokens, counts, reasons = examples.ledger.taken()
    arrays = {name: getattr(examples, name) for name in ARRAYS if getattr(examples, name) is not None}
    arrays |= {"status": status, "tokens": tokens, "counts": counts}
    why_not = disk_cache.write(entry, arrays, {"reasons": reasons, "notes": examples.ledger.notes})
    return (
        f"encoded rows could not be kept: {why_not}"
        if why_not
        else f"encoded rows are kept in {disk_cache.short(entry)}"
    )


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


def _makers(files: Sequence[ModuleType]) -> list[str]:
    """The code that encodes: our own source, and the versions of the libraries."""
    ours = disk_cache.source_digest(files)
    return [ours, f"tokenizers {version('tokenizers')}", f"transformers {version('transformers')}"]
