"""What the trained model computed of a few rows when training ended: what a certificate compares everything with.

reference.json          the rows, as they were read; token ids; the tokens that the model wrote greedily, and their lead
reference.safetensors   its logits of these rows, and those of its base

The rows are held-out ones where there are any. They lie beside the tuning, not in it: who is given the tuning is not
given them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core import IntegrityError, LuthierError, build, plain
from luthier.data.batches import Batch, Collator
from luthier.data.chat import ChatTemplate
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.row_tasks import with_tasks
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.runs import durable
from luthier.surgery import read_tuning
from luthier.training.precision import Precision
from luthier.trust import config as trusted_config
from luthier.trust import safetensors

__all__ = ["NEW_TOKENS", "Reader", "Reference", "Seen", "choose_rows", "observe", "read_reference", "write_reference"]

FACTS, NUMBERS = "reference.json", "reference.safetensors"
ROWS, WRITTEN_ROWS = 8, 4  # kept; of rows that are written a fewer number, since each costs a generation
SHORT = 128  # tokens of a kept row, where there are such rows: all logits of a long one would take much memory
NEW_TOKENS = 16
MOST_NUMBERS = 2**19  # logits that are kept


@dataclass(frozen=True)
class Seen:
    """What one model makes of some rows.

    Attributes:
        ids: the token ids of each example, as they were read.
        logits: for each example (positions, numbers), or (numbers,) where a row has one answer; fp32.
        written: for each prompt the ids that are written after it, greedily.
        leads: for each of those, how far it stood above the next likely one.
    """

    ids: tuple[tuple[int, ...], ...] = ()
    logits: tuple[Tensor, ...] = field(default=(), repr=False)
    written: tuple[tuple[int, ...], ...] = ()
    leads: tuple[tuple[float, ...], ...] = ()

    def plus(self, other: Seen) -> Seen:
        """Both, one after the other."""
        return Seen(
            self.ids + other.ids, self.logits + other.logits, self.written + other.written, self.leads + other.leads
        )

    def save(self, folder: Path) -> None:
        """Into an empty folder, for another process."""
        durable.write_tensors(folder / "seen.safetensors", _named("logits", self.logits))
        durable.write_json(folder / "seen.json", {"ids": self.ids, "written": self.written, "leads": self.leads})

    @classmethod
    def load(cls, folder: Path) -> Seen:
        """The inverse of `save`."""
        facts = json.loads((folder / "seen.json").read_bytes())
        return cls(**_tuples(facts), logits=_listed("logits", safetensors.read(folder / "seen.safetensors")))


@dataclass(frozen=True)
class Reference:
    """Rows that were kept, what the trained model computed of them, and the logits of its base.

    Attributes:
        numbers, new: at most so many logits and written tokens were kept; they are counted alike ever after.
    """

    rows: tuple[dict[str, Any], ...] = field(repr=False)
    trained: Seen
    base: tuple[Tensor, ...] = field(repr=False)
    numbers: int = MOST_NUMBERS
    new: int = NEW_TOKENS


class Reader:
    """Reads rows as a run's training did.

    Args:
        tokenizer: of the run; another's, to see whether it reads the same.
        template: of chats, in place of the one that the tokenizer has.
    """

    def __init__(
        self, columns: Columns, task: Task, contract: Mapping[str, Any], tokenizer: Any, n_vocab: int,
        template: ChatTemplate | None = None,
    ) -> None:  # fmt: skip
        self.columns, self.task, self.tokenizer, self.n_vocab = columns, task, tokenizer, n_vocab
        self.contract, self.template = contract, template
        self.writes = task.writes

    @classmethod
    def of_run(cls, tuning: Path, tokenizer: Any, n_vocab: int, *, own_template: bool = False) -> Reader:
        """As the stored tuning says.

        Args:
            own_template: chats are put into words by the tokenizer's template instead of the stored one.
        """
        facts = read_tuning(tuning)
        task = dict(facts["task"])
        columns = build(Columns, task.pop("columns"), f"{tuning}/tuning.json columns")
        contract = {"long": "cut", **facts["contract"]}
        stored = contract["template"]
        template = None if stored is None or own_template else build(ChatTemplate, stored, "template")
        return cls(columns, build(Task, task, f"{tuning}/tuning.json task"), contract, tokenizer, n_vocab, template)

    def read(self, rows: Table | Sequence[dict[str, Any]], *, with_targets: bool) -> Examples:
        """Rows as examples; those that cannot be read are left out, and stand in the ledger."""
        table = rows
        if not isinstance(table, Table):
            table = Table(list(table), [f"row {i + 1}" for i in range(len(table))], "the kept rows")
        examples = encode(
            table, self.columns, self.task, self.tokenizer, n_vocab=self.n_vocab,
            max_length=int(self.contract["max_length"]), long=self.contract["long"],
            loss_on=self.contract["loss_on"], with_targets=with_targets, template=self.template, check=False,
        )  # fmt: skip
        names = self.contract.get("row_tasks")
        return with_tasks(examples, self.columns.row_task or "", names) if names else examples


def choose_rows(table: Table, columns: Columns, examples: Examples, *, writes: bool) -> list[dict[str, Any]]:
    """A few rows, short ones, spread over the table; with the fields that are read of them, as JSON holds them."""
    lengths = np.bincount(examples.rows, weights=examples.lengths, minlength=len(table))[examples.read_rows]
    short = examples.read_rows[lengths <= SHORT]
    if not len(short):
        short = examples.read_rows[np.argsort(lengths, kind="stable")[:1]]
    most = WRITTEN_ROWS if writes else ROWS
    chosen = short[np.unique(np.linspace(0, len(short) - 1, min(most, len(short))).astype(int))]
    wanted = {name for name in plain(columns).values() if isinstance(name, str)}
    rows = [{k: v for k, v in table.rows[row].items() if k in wanted} for row in chosen.tolist()]
    found: list[dict[str, Any]] = json.loads(json.dumps(rows, default=str))
    return found


@torch.inference_mode()
def observe(
    model: Any, rows: Sequence[dict[str, Any]], reader: Reader, collator: Collator, precision: Precision,
    device: torch.device, *, room: int | None = None, new: int = NEW_TOKENS,
    numbers: int = MOST_NUMBERS, answered: bool = True, facts: bool = True,
    of_base: bool = False,
) -> Seen:  # fmt: skip
    """What a model makes of rows, each read alone.

    Args:
        model: in evaluation mode.
        room: positions that the model has for prompt and answer; None where nothing limits them.
        new: tokens that are written, at most.
        numbers: logits that are kept, at most.
        answered: rows say what is right, so that a language model's logits are taken along the right answer. Where
            they do not, its first written token's are.
        facts: hand the model what is said of a row besides its ids, such as its task; a plain model takes none.
        of_base: no tuning acts, so that words that a tuning learnt are read as the word that they stand in for.
    """
    if not rows:
        return Seen()
    examples = reader.read(rows, with_targets=reader.writes and answered)
    ids, logits = [], []
    most = max(1, numbers // max(1, min(len(examples), ROWS)))
    for i in range(min(len(examples), ROWS) if answered else len(examples)):
        batch = collator(examples, np.asarray([i])).to(device)
        ids.append(tuple(int(t) for name in ("input_ids", "decoder_input_ids") for t in _flat(batch, name)))
        if reader.writes and not answered:
            continue
        with precision.autocast(device):
            out = model(**_inputs(batch, facts, reader if of_base else None))
        found = (out.logits if hasattr(out, "logits") else out[0])[0].float().cpu()  # (t, n) or (n,)
        logits.append(found if found.dim() == 1 else found[_positions(batch, reader, len(found), most)].clone())
    if not reader.writes or new == 0:
        return Seen(tuple(ids), tuple(logits))
    prompts = examples if not answered else reader.read(rows, with_targets=False)
    written, leads = [], []
    for i in range(len(prompts)):
        batch = collator(prompts, np.asarray([i])).to(device)
        length = batch.inputs["input_ids"].shape[1]
        both = reader.task.name == "seq2seq"
        most = new if room is None else min(new, room - (1 if both else length))
        if most < 1:
            continue
        with precision.autocast(device):
            out = model.generate(
                input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"],
                do_sample=False, num_beams=1, max_new_tokens=most, pad_token_id=collator.pad_id,
                return_dict_in_generate=True, output_logits=True,
                **{name: v for name, v in batch.inputs.items() if facts and name.startswith("row_")},
            )  # fmt: skip
        steps = [step[0].float() for step in out.logits]
        written.append(tuple(int(t) for t in out.sequences[0, 1 if both else length :]))
        leads.append(tuple(float(top[0] - top[1]) for top in (step.topk(2).values for step in steps)))
        if not answered:
            logits.append(steps[0].cpu())
    return Seen(tuple(ids), tuple(logits), tuple(written), tuple(leads))


def _flat(batch: Batch, name: str) -> list[int]:
    return batch.inputs[name][0].tolist() if name in batch.inputs else []


def _inputs(batch: Batch, facts: bool, of_base: Reader | None) -> dict[str, Any]:
    found = {name: value for name, value in batch.inputs.items() if facts or not name.startswith("row_")}
    if of_base is not None and of_base.task.n_soft:
        ids = found["input_ids"]  # those of learnt words lie behind the vocabulary
        found["input_ids"] = ids.where(ids < of_base.n_vocab, of_base.task.filler)
    return found


def _positions(batch: Batch, reader: Reader, n: int, numbers: int) -> list[int]:
    """Those at which something is to be said, counted from the end: prompts of numbers may stand before the ids."""
    labels = None if batch.labels is None or batch.labels.dim() != 2 else batch.labels[0]
    places = list(range(-n, 0))
    if labels is not None:
        told = (labels != IGNORED).nonzero().flatten() - (1 if reader.task.of_turns else 0)
        places = [int(p) - len(labels) for p in told if p >= 0] or places
    most = max(1, min(64, numbers // max(1, reader.n_vocab)))
    return [places[int(k)] for k in np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int))]


def write_reference(folder: Path, rows: Sequence[dict[str, Any]], trained: Seen, base: Seen) -> None:
    """Beside the tuning of a run."""
    tensors = {**_named("trained", trained.logits), **_named("base", base.logits)}
    digest = durable.write_tensors(folder / NUMBERS, tensors)
    told = {"ids": trained.ids, "written": trained.written, "leads": trained.leads}
    durable.write_json(
        folder / FACTS,
        {
            "format": 1,
            "numbers": MOST_NUMBERS,
            "new": NEW_TOKENS,
            "sha256": digest,
            "rows": [json.dumps(r) for r in rows],
            **told,
        },
    )


def read_reference(folder: Path) -> Reference | None:
    """What `write_reference` wrote; None of a run that has none, as older ones do.

    Raises:
        IntegrityError: a file is not as it was written.
    """
    where = folder / FACTS
    if not where.exists():
        return None
    try:
        facts = trusted_config.read_json(
            where, {"format", "numbers", "new", "sha256", "rows", "ids", "written", "leads"}
        )
        tensors = safetensors.read(folder / NUMBERS, digest=facts["sha256"])
        told = _tuples({name: facts[name] for name in ("ids", "written", "leads")})
        trained = Seen(**told, logits=_listed("trained", tensors))
        return Reference(
            tuple(json.loads(row) for row in facts["rows"]),
            trained,
            _listed("base", tensors),
            facts.get("numbers", MOST_NUMBERS),
            facts.get("new", NEW_TOKENS),
        )
    except (LuthierError, OSError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{where}: cannot be read ({error}). Restore it from a copy, or remove it.") from error


def _tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(tuple(inner) for inner in outer) for name, outer in facts.items()}


def _named(stem: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{stem}.{i}": tensor.contiguous() for i, tensor in enumerate(tensors)}


def _listed(stem: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    found = [name for name in tensors if name.startswith(f"{stem}.")]
    return tuple(tensors[f"{stem}.{i}"] for i in range(len(found)))
