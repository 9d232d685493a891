"""Use a finished run: its base, its tuning, its labels and its template, as they were in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.core import ConfigError, DataError, IntegrityError, WrongBase, build
from luthier.runs import RunFolder
from luthier.surgery import load as load_tuning
from luthier.surgery import read_tuning
from luthier.training.batches import Collator, EvalBatches
from luthier.training.chat import Chat, ChatTemplate, read_messages
from luthier.training.columns import Columns
from luthier.training.data import load_inputs
from luthier.training.encode import encode
from luthier.training.evaluate import Evaluator
from luthier.training.load import find_model, load_model, load_tokenizer
from luthier.training.objective import Objective
from luthier.training.precision import choose_device, choose_precision
from luthier.training.prepared import tokenizer_digest
from luthier.training.rows import Table
from luthier.training.spec import RunSpec
from luthier.training.tasks import Task

__all__ = ["Predictor", "predict"]


class Predictor:
    """A run ready to answer. Loading it checks base, tokenizer and tuning against what the run recorded.

    Raises:
        ConfigError: no such run, or one that is not finished.
        WrongBase, IntegrityError: model, tokenizer or tuning are not those of the run.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        run = RunFolder.open(path, write=False)
        if not run.tuning.exists():
            raise ConfigError(f"{path}: this run has no result yet. Go on with `luthier resume {path}`.")
        self.spec = RunSpec.from_plain(run.spec, where=f"{path}/run.json")
        facts = read_tuning(run.tuning)
        task = dict(facts["task"])
        self.columns = build(Columns, task.pop("columns"), f"{run.tuning}/tuning.json columns")
        self.task = build(Task, task, f"{run.tuning}/tuning.json task")
        self.contract = facts["contract"]
        source = find_model(self.spec.model)
        if source.digest != run.fingerprints.get("model"):
            raise WrongBase(
                f"{self.spec.model}: has changed since {path} was trained on it "
                f"({source.digest[:12]} now, {str(run.fingerprints.get('model'))[:12]} then). Restore that model."
            )
        self.tokenizer = load_tokenizer(source)
        pad = self.contract["pad"]
        if self.tokenizer.pad_token != pad["token"]:
            self.tokenizer.add_special_tokens({"pad_token": pad["token"]})
        if tokenizer_digest(self.tokenizer) != self.contract["tokenizer"]:
            raise IntegrityError(f"{self.spec.model}: its tokenizer has changed since {path} was trained. Restore it.")
        self.device = choose_device(self.spec.device)
        self.precision = choose_precision(self.spec.precision, self.device)
        # The base in the type it was trained in: another would answer a little differently.
        dtype = torch.float32 if self.contract["weights"] == "fp32" else self.precision.dtype
        model, _ = load_model(source, self.task, dtype=dtype, device=self.device, seed=self.spec.seed)
        model.config.pad_token_id = pad["id"]
        self.tuned = load_tuning(model, run.tuning)
        self.objective = Objective(self.tuned, self.task, full_logits=True)

    def rows(self, table: Table, *, max_new_tokens: int = 64) -> list[dict[str, Any]]:
        """One answer for each row, in their order: label and probabilities, a number, tags, or generated text.

        Raises:
            DataError: a row that cannot be read; all such rows are named.
        """
        if self.task.name in ("causal_lm", "seq2seq"):
            return self._generate(table, max_new_tokens)
        examples = encode(
            table, self.columns, self.task, self.tokenizer, n_vocab=self._vocabulary(),
            max_length=int(self.contract["max_length"]), with_targets=False,
        )  # fmt: skip
        batches = EvalBatches(examples, Collator(pad_id=int(self.contract["pad"]["id"])), 4 * self.spec.batch.tokens)
        out = Evaluator(self.tuned, self.objective, batches, self.precision, self.device).outputs()
        if self.task.name == "token_classification":
            return [{"tags": self.task.decode(np.asarray(row))} for row in out["logits"]]
        decoded = self.task.decode(out["logits"])
        if self.task.name == "regression":
            return [{"value": value} for value in decoded]
        shares = self.task.probabilities(out["logits"])
        return [
            {"label": label, "probabilities": {n: float(p) for n, p in zip(self.task.labels, row, strict=True)}}
            for label, row in zip(decoded, shares, strict=True)
        ]

    def texts(self, texts: Sequence[str], *, max_new_tokens: int = 64) -> list[dict[str, Any]]:
        """Answers for texts alone; see `rows`.

        Raises:
            ConfigError: the task needs more than one text a row.
        """
        if self.columns.pair is not None:
            raise ConfigError("this run was trained on pairs of texts: give both columns in a file with --data.")
        column = self.columns.text or self.columns.prompt or self.columns.messages or self.columns.tokens
        assert column is not None
        values: list[Any] = list(texts)
        if column == self.columns.messages:
            values = [[{"role": "user", "content": text}] for text in texts]
        if column == self.columns.tokens:
            values = [text.split() for text in texts]
        rows = [{column: value} for value in values]
        return self.rows(
            Table(source="--text", rows=rows, places=[f"--text {i + 1}" for i in range(len(rows))]),
            max_new_tokens=max_new_tokens,
        )

    def _vocabulary(self) -> int:
        return int(self.tuned.model.get_input_embeddings().weight.shape[0])

    def _prompts(self, table: Table) -> list[list[int]]:
        columns, tokenizer = self.columns, self.tokenizer
        stored = self.contract["template"]
        if self.task.name == "causal_lm" and stored is not None:
            template = build(ChatTemplate, stored, "template")
            with Chat(tokenizer, template=template) as chat:
                return [
                    chat.prompt(self._messages(row), place) for row, place in zip(table.rows, table.places, strict=True)
                ]
        column = columns.prompt or columns.text
        assert column is not None
        texts = [row.get(column) for row in table.rows]
        bad = [p for p, t in zip(table.places, texts, strict=True) if not isinstance(t, str) or not t.strip()]
        if bad:
            raise DataError(f"no text in column {column!r}: {', '.join(bad[:10])}. Fill it in, or remove these rows.")
        return [list(ids) for ids in tokenizer(texts)["input_ids"]]

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        columns = self.columns
        if columns.messages is not None:
            messages = read_messages(row.get(columns.messages), columns.messages)
            # What the assistant said last is what we are asked for.
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        assert columns.prompt is not None
        prompt = str(row.get(columns.prompt, ""))
        context = row.get(columns.context) if columns.context else None
        return [{"role": "user", "content": f"{prompt}\n\n{context}" if context else prompt}]

    def _generate(self, table: Table, max_new_tokens: int) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        pad = int(self.contract["pad"]["id"])
        for ids in self._prompts(table):
            given = torch.tensor([ids], device=self.device)
            with torch.inference_mode(), self.precision.autocast(self.device):
                out = self.tuned.model.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
                    do_sample=False, pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
            new = out[0] if self.tuned.anatomy.is_encoder_decoder else out[0, len(ids) :]
            answers.append({"text": self.tokenizer.decode(new, skip_special_tokens=True).strip()})
        return answers


def predict(
    path: Path | str, *, texts: Sequence[str] = (), data: str | None = None, max_new_tokens: int = 64
) -> list[dict[str, Any]]:
    """Answers of a finished run for texts, or for the rows of a file, in their order.

    Raises:
        ConfigError: neither or both were given; no such run.
    """
    if bool(texts) == (data is not None):
        raise ConfigError("give texts, or a file of rows: one of the two.")
    predictor = Predictor(path)
    if data is None:
        return predictor.texts(texts, max_new_tokens=max_new_tokens)
    table, _ = load_inputs(data, predictor.columns)
    return predictor.rows(table, max_new_tokens=max_new_tokens)
