"""Encoded rows, kept between runs: a second run on the same rows reads their ids instead of making them.

<cache>/encoded/<digest>/encoded.safetensors   ids, offsets, labels and the ledger, as `encode` made them
<cache>/encoded/<digest>/ledger.json           reasons and notes, in words
<cache>/encoded/<digest>/MANIFEST.json         size and SHA-256 of both

<cache> is `luthier.samples.cache_dir()`. The name is the digest of everything that encoding depends on: the rows, the
columns, the task, the tokenizer with all its rules, the lengths, the versions of the libraries, and the source text of
our own encoder. So an entry is never stale: what differs has another name. Every byte is verified when it is read.

What was used longest ago is removed when the entries pass `LUTHIER_ENCODED_GIB` (4 where it is not set). With 0 nothing
is kept or read, and so with `LUTHIER_PLAIN=1`.
"""

import contextlib
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier import kernels
from luthier.core import ConfigError, IntegrityError, LuthierError, ResourceError, human_bytes, plain
from luthier.runs import durable, read_verified
from luthier.runs.tensorfile import read_tensors
from luthier.samples import cache_dir
from luthier.training import chat, columns, encode, language, tasks
from luthier.training.columns import Columns
from luthier.training.encode import Examples, Ledger
from luthier.training.rows import Table
from luthier.training.tasks import Task
from luthier.trust import template as rendering

if TYPE_CHECKING:
    from luthier.training.chat import ChatTemplate

__all__ = ["KEPT_FROM", "entry_of", "keep", "limit", "read"]

KEPT_FROM = 256
"""Tables with fewer rows are encoded faster than they are looked up."""

DEFAULT_GIB = 4.0
ARRAYS = ("ids", "offsets", "rows", "n_targets", "types", "labels", "answers", "answer_offsets", "targets")


def limit() -> int:
    """Bytes that all entries together may take; 0 where nothing is to be kept.

    Raises:
        ConfigError: `LUTHIER_ENCODED_GIB` is no number from 0 on.
    """
    if not kernels.fast():
        return 0
    told = os.environ.get("LUTHIER_ENCODED_GIB", "")
    try:
        gib = float(told) if told else DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not 0 <= gib < 1e9:
        raise ConfigError(
            f"LUTHIER_ENCODED_GIB is {told!r}; it must be a number of GiB for encoded rows, 0 to keep none."
        )
    return int(gib * 2**30)


def entry_of(
    table: Table, columns: Columns, task: Task, tokenizer: Any, template: "ChatTemplate | None", **options: Any
) -> Path | None:
    """The folder that holds, or is to hold, these rows encoded. None where they are to be encoded anew each time.

    That is so for small tables, for tokenizers whose rules are Python code, and for rows with values that have no JSON
    (such as dates), which a digest of the JSON could confuse with their text.
    """
    if len(table) < KEPT_FROM or not limit() or not tokenizer.is_fast or not table.is_plain():
        return None
    language_rows = task.name == "causal_lm" and columns.shape != "plain"
    if language_rows and template is None:
        template = chat.ChatTemplate.of(tokenizer)
    facts = {
        "rows": table.fingerprint(),
        "columns": columns.used() | {"shape": columns.shape},
        "task": {k: v for k, v in plain(task).items() if k != "notes"},
        "tokenizer": _rules(tokenizer),
        "template": [template.digest, template.origin] if language_rows and template is not None else None,
        "options": options,
        "made_by": _makers(),
    }
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return cache_dir() / "encoded" / hashlib.sha256(text.encode()).hexdigest()[:40]


def read(entry: Path, table: Table) -> tuple[Examples | None, str]:
    """The examples of an entry, and what is to be said about it; None and why where they have to be made anew."""
    if not entry.is_dir():
        return None, ""
    try:
        found = read_verified(entry)
        tensors = read_tensors(found.files["encoded.safetensors"])
        words = json.loads(found.files["ledger.json"])
    except (IntegrityError, KeyError) as error:
        _remove(entry)
        return None, f"encoded rows kept in {entry} are damaged ({error}): they are encoded anew"
    with contextlib.suppress(OSError):  # a cache that may only be read serves as well
        os.utime(entry)  # used now: what was used longest ago goes first
    arrays = {name: tensors[name].numpy() for name in ARRAYS if name in tensors}
    ledger = Ledger(table)
    ledger.take(
        tensors["status"].numpy(),
        tensors["tokens"].numpy(),
        tensors["counts"].numpy(),
        {int(row): reason for row, reason in words["reasons"].items()},
    )
    ledger.notes += words["notes"]
    return Examples(**arrays, ledger=ledger), f"encoded rows are those kept in {entry}"


def keep(entry: Path, examples: Examples) -> str:
    """Keep the examples; returns what is to be said. A cache that cannot be written stops no run."""
    status, tokens, counts, reasons = examples.ledger.taken()
    arrays = {name: getattr(examples, name) for name in ARRAYS if getattr(examples, name) is not None}
    arrays |= {"status": status, "tokens": tokens, "counts": counts}
    n_bytes = sum(a.nbytes for a in arrays.values())
    most = limit()
    if n_bytes > most:
        return f"encoded rows take {human_bytes(n_bytes)}, more than LUTHIER_ENCODED_GIB allows: they are not kept"
    root = entry.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with durable.folder(entry, {}) as made:
            made.write_tensors("encoded.safetensors", {k: torch.from_numpy(_own(a)) for k, a in arrays.items()})
            made.write_json("ledger.json", {"reasons": reasons, "notes": examples.ledger.notes})
        _make_room(root, most, entry)
    except (LuthierError, OSError) as error:
        if (entry / durable.MANIFEST).is_file():
            return ""  # another process was quicker
        return f"encoded rows could not be kept ({str(error).splitlines()[0]})"
    return f"encoded rows are kept in {entry}"


def _own(array: Any) -> Any:
    return array if array.flags.writeable and array.flags.c_contiguous else np.array(array)


def _make_room(root: Path, most: int, newest: Path) -> None:
    """Remove what was used longest ago until the entries take no more than `most` bytes; the newest stays."""
    entries = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in entries}
    for path in sorted(entries, key=lambda p: (p.stat().st_mtime_ns, p.name)):
        if sum(sizes.values()) <= most:
            return
        if path != newest:
            sizes.pop(path)
            _remove(path)


def _remove(entry: Path) -> None:
    gone = entry.with_name(f".del-{entry.name}-{os.getpid()}")
    # Another process may remove it too, or nobody may: it is verified whenever it is read.
    with contextlib.suppress(ResourceError, OSError):
        durable.rename(entry, gone)
        durable.remove_folder(gone)


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
    ours = hashlib.sha256()
    for module in (encode, language, chat, tasks, columns, rendering):
        ours.update(Path(str(module.__file__)).read_bytes())
    return [ours.hexdigest(), f"tokenizers {version('tokenizers')}", f"transformers {version('transformers')}"]
