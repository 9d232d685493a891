"""Use a finished run: its base, its tuning, its labels and its template, as they were in training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.core import ConfigError, DataError, IntegrityError, WrongBase, build
from luthier.data.batches import Batch, Collator, EvalBatches
from luthier.data.chat import Chat, ChatTemplate, read_messages
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.load_data import load_inputs
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.surgery import Tuned, read_tuning
from luthier.surgery import load as load_tuning
from luthier.training.evaluate import Evaluator
from luthier.training.objective import Objective, Result
from luthier.training.precision import choose_device, choose_precision
from luthier.workflow.load_model import find_model, load_model, load_tokenizer
from luthier.workflow.preparation import tokenizer_digest

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
        self._facts = facts
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
        if self.spec.fast:
            self.tuned.forward.route_attention()
            self.tuned.fast.accelerate(training=False)
        self.objective = Objective(self.tuned, self.task, full_logits=True)

    def add(self, name: str, path: Path | str) -> None:
        """Load the tuning of another run beside this one's, under a name that `rows` and `texts` take in `tunings`.

        This run's own is called "default". The other run must have had the same model, task, labels, lengths and
        template, since all rows are encoded and decoded alike.

        Raises:
            ConfigError: no such run, one that is not finished, a name that is taken, or a run that differs.
            WrongBase, IntegrityError: its base or its files are not what they should be.
        """
        run = RunFolder.open(Path(path), write=False)
        if not run.tuning.exists():
            raise ConfigError(f"{path}: this run has no result yet. Go on with `luthier resume {path}`.")
        facts = read_tuning(run.tuning)
        task = {k: v for k, v in facts["task"].items() if k != "columns"}
        differs = [f"task {k}" for k, v in task.items() if v != self._facts["task"].get(k)]
        differs += [k for k, v in facts["contract"].items() if v != self.contract.get(k)]
        if differs:
            raise ConfigError(
                f"{path}: differs from this run in {', '.join(differs)}, so its rows cannot be encoded and answered "
                "alike. Use a Predictor of its own for it."
            )
        load_tuning(self.tuned.model, run.tuning, name=name)
        self.tuned.activate("default")

    def rows(
        self, table: Table, *, max_new_tokens: int = 64, tunings: Sequence[str | None] | None = None
    ) -> list[dict[str, Any]]:
        """One answer for each row, in their order: label and probabilities, a number, tags, or generated text.

        Args:
            tunings: for each row the tuning that answers it ("default", or what `add` named), or None for the base.
                Rows of one batch may have different ones; see `Tuned.rows`.

        Raises:
            DataError: a row that cannot be read; all such rows are named.
            ConfigError: not as many tunings as rows.
            UnknownName, CompositionError: a tuning that is not there, or that cannot stand beside others in a batch.
        """
        if tunings is not None and len(tunings) != len(table.rows):
            raise ConfigError(
                f"{len(tunings)} tunings are named for {len(table.rows)} rows. Name one for each, or None for the base."
            )
        with self.tuned.serving():
            if tunings:
                with self.tuned.rows(tunings):  # refuses what cannot be before any work
                    pass
            return self._answers(table, max_new_tokens, tunings)

    def _answers(self, table: Table, max_new_tokens: int, tunings: Sequence[str | None] | None) -> list[dict[str, Any]]:
        if self.task.name in ("causal_lm", "seq2seq"):
            return self._generate(table, max_new_tokens, tunings)
        examples = encode(
            table, self.columns, self.task, self.tokenizer, n_vocab=self._vocabulary(),
            max_length=int(self.contract["max_length"]), with_targets=False,
        )  # fmt: skip
        batches = EvalBatches(examples, Collator(pad_id=int(self.contract["pad"]["id"])), 4 * self.spec.batch.tokens)
        objective = self.objective
        if tunings is not None:
            objective = _ByRow(self.tuned, self.task, [tunings[i] for i in examples.rows])
        out = Evaluator(self.tuned, objective, batches, self.precision, self.device).outputs()
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

    def texts(
        self, texts: Sequence[str], *, max_new_tokens: int = 64, tunings: Sequence[str | None] | None = None
    ) -> list[dict[str, Any]]:
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
            tunings=tunings,
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

    def _generate(
        self, table: Table, max_new_tokens: int, tunings: Sequence[str | None] | None
    ) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        pad = int(self.contract["pad"]["id"])
        for i, ids in enumerate(self._prompts(table)):
            given = torch.tensor([ids], device=self.device)
            named = nullcontext() if tunings is None else self.tuned.rows([tunings[i]])
            with torch.inference_mode(), self.precision.autocast(self.device), named:
                out = self.tuned.model.generate(
                    input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
                    do_sample=False, pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
            new = out[0] if self.tuned.anatomy.is_encoder_decoder else out[0, len(ids) :]
            answers.append({"text": self.tokenizer.decode(new, skip_special_tokens=True).strip()})
        return answers


class _ByRow(Objective):
    """The task's outputs, every row with the tuning that is named for it."""

    def __init__(self, tuned: Tuned, task: Task, names: Sequence[str | None]) -> None:
        super().__init__(tuned, task, full_logits=True)
        self.names = names

    def __call__(self, batch: Batch) -> Result:
        with self.tuned.rows([self.names[i] for i in batch.rows]):
            return super().__call__(batch)


def predict(
    path: Path | str, *, texts: Sequence[str] = (), data: str | None = None, max_new_tokens: int = 64
) -> list[dict[str, Any]]:
    """Answers of a finished run for texts, or for the rows of a file, in their order.

    >>> from luthier import DataSpec, RunSpec, train
    >>> rows = DataSpec(source="reviews.csv", text="review", label="stars")
    >>> result = train(RunSpec(model="sample:minilm-l6", data=rows, steps=2))
    >>> answer = predict(result.path, texts=["a film for a long evening"])[0]
    >>> sorted(answer["probabilities"])
    ['bad', 'good']

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
