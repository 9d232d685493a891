"""Use a finished run: its base, its tuning, its labels and its template, as they were in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from luthier.core import ConfigError, IntegrityError, WrongBase, build
from luthier.data.batches import Collator, EvalBatches
from luthier.data.chat import ChatTemplate
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import TRUNCATED, Examples
from luthier.data.load_data import load_inputs, texts_as_rows
from luthier.data.row_tasks import with_tasks
from luthier.data.rows import Table
from luthier.data.stop_tokens import stop_ids
from luthier.data.tasks import Task
from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.surgery import answerers, compose, decode_layers, read_tuning
from luthier.surgery import load as load_tuning
from luthier.training.answers import positions_for_rows
from luthier.training.objective import Objective
from luthier.training.precision import choose_device, choose_precision
from luthier.training.preference import Weighing, judge_of
from luthier.training.strategy import split_settings, strategies
from luthier.workflow.controls import Controls, controls_for
from luthier.workflow.generation import Generator
from luthier.workflow.label_answers import read_answers
from luthier.workflow.load_model import collator_of, find_model, load_model, load_tokenizer, tokenizer_digest
from luthier.workflow.unsure import check_unsure, unsure_of

__all__ = ["Predictor", "predict"]

_ROWS, _WRITTEN_ROWS = 1024, 64  # rows that are answered before the first of them is handed out


class Predictor:
    """A run ready to answer. Loading it checks base, tokenizer and tuning against what the run recorded.

    Args:
        dtype: type of the base's weights; left out, the one it was trained in, whose answers are those of the run.
        decode: have a base that is held in codes as the plain layers that these stand for, into which can be merged.

    Raises:
        ConfigError: no such run, or one that is not finished.
        WrongBase, IntegrityError: model, tokenizer or tuning are not those of the run.
    """

    def __init__(self, path: Path | str, *, dtype: torch.dtype | None = None, decode: bool = False) -> None:
        self.path = path = Path(path)
        run = RunFolder.open(path, write=False)
        if not run.tuning.exists():
            raise ConfigError(f"{path}: this run has no result yet. Go on with `luthier resume {path}`.")
        self.spec = RunSpec.from_plain(run.spec, where=f"{path}/run.json")
        facts = read_tuning(run.tuning)
        self._facts = facts
        task = dict(facts["task"])
        self.columns = build(Columns, task.pop("columns"), f"{run.tuning}/tuning.json columns")
        self.task = build(Task, task, f"{run.tuning}/tuning.json task")
        self.contract = {"long": "cut", **facts["contract"]}  # older runs say nothing of long rows
        source = self.source = find_model(self.spec.model)
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
        if dtype is None:
            dtype = torch.float32 if self.contract["weights"] == "fp32" else self.precision.dtype
        store = self.spec.codes
        model, _ = load_model(source, self.task, dtype=dtype, device=self.device, seed=self.spec.seed, store=store)
        if store is not None and decode:
            decode_layers(model)
        model.config.pad_token_id = pad["id"]
        self.tuned = load_tuning(model, run.tuning)
        self.accelerate()
        self.objective = Objective(self.tuned, self.task, full_logits=True)
        # Runs of older versions say nothing of stop tokens.
        stop = self.contract.get("stop") or stop_ids(None, self.tokenizer, model)
        if getattr(model, "generation_config", None) is not None and stop:
            model.generation_config.eos_token_id = stop  # what is merged or saved from here stops there too
        self.generator = Generator(
            self.tuned, self.tokenizer, self.precision, self.device, pad_id=int(pad["id"]), stop=stop,
            limit=positions_for_rows(self.tuned), tokens=4 * self.spec.batch.tokens,
        )  # fmt: skip

    @staticmethod
    def spec_of(path: Path | str) -> RunSpec:
        """What a run was asked to do."""
        return RunSpec.from_plain(RunFolder.open(Path(path), write=False).spec, where=f"{path}/run.json")

    @staticmethod
    def task_of(path: Path | str) -> Task:
        """The task of a finished run, without its model.

        Raises:
            ConfigError: no such run, or one that is not finished.
        """
        run = RunFolder.open(Path(path), write=False)
        if not run.tuning.exists():
            raise ConfigError(f"{path}: this run has no result yet. Go on with `luthier resume {path}`.")
        task = {k: v for k, v in read_tuning(run.tuning)["task"].items() if k != "columns"}
        return build(Task, task, f"{run.tuning}/tuning.json task")

    @cached_property
    def judge(self) -> Weighing | None:
        """What weighed answers in training, where that was learnt."""
        if not self.task.weighs:
            return None
        own, _ = split_settings(self.spec.strategy, self.spec.settings, compose.setting_names(self.spec.method))
        return judge_of(strategies(self.spec.strategy, own, self.tuned.tuning().method))

    def accelerate(self) -> None:
        """Let the model be computed by faster functions, where the run did not say otherwise."""
        if self.spec.fast:
            self.tuned.forward.route_attention()
            self.tuned.fast.accelerate(training=False)

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
        # Older runs have no "stop"; a run whose rows end otherwise differs in its template too.
        theirs = {"long": "cut", **facts["contract"]}
        differs += [k for k, v in theirs.items() if k in self.contract and v != self.contract[k]]
        if differs:
            raise ConfigError(
                f"{path}: differs from this run in {', '.join(differs)}, so its rows cannot be encoded and answered "
                "alike. Use a Predictor of its own for it."
            )
        load_tuning(self.tuned.model, run.tuning, name=name)
        self.tuned.activate("default")

    @property
    def length_said(self) -> str:
        """How long rows were in training, and what was done with longer ones, for whoever reads them elsewhere."""
        said = f"Learnt with at most {self.contract['max_length']} tokens a row."
        if self.contract["long"] == "windows":
            said += (
                " Longer rows were read in windows of so many tokens that overlap by a quarter, and the logits of a"
                " row's windows averaged; other libraries cut such rows, so windows have to be made before."
            )
        return said

    def rows(
        self,
        table: Table,
        *,
        max_new_tokens: int = 64,
        tunings: Sequence[str | None] | None = None,
        strict: bool = False,
        unsure: float | None = None,
        controls: Controls | None = None,
    ) -> list[dict[str, Any]]:
        """One answer for each row, in their order: label and probabilities, a number, tags, or generated text.

        A row that cannot be read has `{"refused": reason}` in its place. A row that was read in part has a "note"
        beside its answer. Tags are one a word, each with how sure it is; a word that has no token has None.

        Args:
            unsure: a probability: each answer also says what of it is less sure. `"unsure": True` stands for a label,
                a list of labels where a row has several, a list of the numbers of words for tags.
            tunings: for each row the tuning that answers it ("default", or what `add` named), or None for the base.
                Rows of one batch may have different ones; see `Tuned.rows`.
            strict: refuse all rows where one cannot be read.
            controls: how text is written, its length too; left out, the likeliest token each time. Each row is drawn
                by its number, so neither its neighbours nor their number change it.

        Raises:
            DataError: with `strict`, a row that cannot be read; all such rows are named.
            ConfigError: not as many tunings as rows; `unsure` for a task whose answers have no probability; controls
                for one whose answers are no texts.
            UnknownName, CompositionError: a tuning that is not there, or that cannot stand beside others in a batch.
        """
        return list(
            self.stream(
                table, max_new_tokens=max_new_tokens, tunings=tunings, strict=strict, unsure=unsure, controls=controls
            )
        )

    def stream(
        self,
        table: Table,
        *,
        max_new_tokens: int = 64,
        tunings: Sequence[str | None] | None = None,
        strict: bool = False,
        unsure: float | None = None,
        controls: Controls | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The answers of `rows`, as they come: some rows are answered at a time."""
        if self.task.filled_in:
            raise ConfigError(
                f"this run learnt {self.task.name}: it fills in words that were taken out of texts, and has no answer "
                "to a row. Score it (luthier evaluate), or go on from it: luthier merge RUN --out FOLDER, and luthier "
                "train FOLDER with rows that have labels."
            )
        if unsure is not None:
            check_unsure(unsure, self.task)
        controls = controls_for(self.task, controls, max_new_tokens)
        if tunings is not None and len(tunings) != len(table.rows):
            raise ConfigError(
                f"{len(tunings)} tunings are named for {len(table.rows)} rows. Name one for each, or None for the base."
            )
        if tunings and (names := [part.name for part in answerers(self.tuned)]):
            raise ConfigError(
                f"tunings: {' and '.join(names)} answers by more than one pass, of whole batches. Leave the tunings "
                "out, and ask a Predictor of the other run for its answers."
            )
        if tunings:
            with self.tuned.serving(), self.tuned.rows(tunings):  # refuses what cannot be before any work
                pass
        if strict:
            self._encoded(table).ledger.refuse_any()
        written = self.task.writes
        at_a_time = _WRITTEN_ROWS if written else _ROWS
        for start in range(0, len(table), at_a_time):
            part = table.take(range(start, min(start + at_a_time, len(table))))
            named = None if tunings is None else tunings[start : start + at_a_time]
            with self.answering():
                examples = self._encoded(part)
                if written:
                    found = self._write(examples, controls, named, start)
                else:
                    batches = EvalBatches(examples, self.collator(), 4 * self.spec.batch.tokens)
                    found = read_answers(
                        examples, batches, self.objective, self.columns, self.precision, self.device, named
                    )
            for record in examples.ledger:
                answer = found.get(record["row"])
                if answer is not None and unsure is not None:
                    answer |= {"unsure": unsure_of(answer, unsure)}
                if answer is None:
                    yield {"refused": record["reason"]}
                elif record["status"] == TRUNCATED:
                    yield {**answer, "note": record["reason"]}
                else:
                    yield answer

    def answering(self) -> AbstractContextManager[Any]:
        """Within, answers come faster where they are those of the model alone: see `Tuned.serving`."""
        return nullcontext() if answerers(self.tuned) else self.tuned.serving()

    def _encoded(self, table: Table) -> Examples:
        """The rows as training read them, up to the target."""
        stored = self.contract["template"]
        examples = encode(
            table, self.columns, self.task, self.tokenizer, n_vocab=self._vocabulary(),
            max_length=int(self.contract["max_length"]), long=self.contract["long"], with_targets=False, check=False,
            template=None if stored is None else build(ChatTemplate, stored, "template"),
        )  # fmt: skip
        return self.of_tasks(examples)

    def of_tasks(self, examples: Examples) -> Examples:
        """Examples that say which task each row is of, where this run has several."""
        names = self.contract.get("row_tasks")
        return examples if names is None else with_tasks(examples, self.columns.row_task or "", names)

    def collator(self) -> Collator:
        """What lays rows side by side for this run's model."""
        pad_id = int(self.contract["pad"]["id"])
        return collator_of(self.task, self.tuned.model, self.tokenizer, pad_id=pad_id, pad_to=1, seed=0)

    def _write(
        self, examples: Examples, controls: Controls, tunings: Sequence[str | None] | None, first: int
    ) -> dict[int, dict[str, Any]]:
        named = None if tunings is None else [tunings[i] for i in examples.rows]
        sampling = controls.sampling([f"row {first + row}" for row in examples.rows.tolist()])
        written = self.generator.write(
            examples, controls.max_new_tokens, named, sampling=sampling, repetition=controls.repetition
        )
        return {
            row: {"text": each.text, **({"note": each.note} if each.note else {})}
            for row, each in zip(examples.rows.tolist(), written, strict=True)
        }

    def written(self, table: Table, *, max_new_tokens: int = 64, beams: int = 1) -> list[tuple[str, bool]]:
        """The text that is written for each row, in their order, and whether it came to an end of its own.

        Args:
            beams: see `Generator.write`.

        Raises:
            ConfigError: the run learnt no texts.
            DataError: a row that cannot be read; all such rows are named.
        """
        if not self.task.writes:
            raise ConfigError(
                f"the run of {self.spec.model} on {self.spec.data.source} learnt {self.task.name} and writes no text. "
                "Name one that learnt causal_lm or seq2seq."
            )
        with self.tuned.serving():
            examples = self._encoded(table)
            examples.ledger.refuse_any()
            written = self.generator.write(examples, max_new_tokens, beams=beams)
        found = dict(zip(examples.rows.tolist(), written, strict=True))
        return [(found[row].text, found[row].ended) for row in range(len(table))]

    def texts(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        tunings: Sequence[str | None] | None = None,
        strict: bool = False,
        unsure: float | None = None,
        controls: Controls | None = None,
    ) -> list[dict[str, Any]]:
        """Answers for texts alone; see `rows`.

        Raises:
            ConfigError: the task needs more than one text a row.
        """
        table = self.table_of(texts)
        return self.rows(
            table, max_new_tokens=max_new_tokens, tunings=tunings, strict=strict, unsure=unsure, controls=controls
        )

    def table_of(self, texts: Sequence[str]) -> Table:
        """Texts as rows with the one column that this run reads.

        Raises:
            ConfigError: the task needs more than one text a row.
        """
        return texts_as_rows(
            texts, self.columns, self.task, places=[f"--text {i + 1}" for i in range(len(texts))], source="--text",
            known=self.contract.get("row_tasks", ()),
        )  # fmt: skip

    def _vocabulary(self) -> int:
        return int(self.tuned.model.get_input_embeddings().weight.shape[0])


def predict(
    path: Path | str,
    *,
    texts: Sequence[str] = (),
    data: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    max_new_tokens: int = 64,
    strict: bool = False,
    unsure: float | None = None,
    controls: Controls | None = None,
) -> list[dict[str, Any]]:
    """Answers of a finished run for texts, or for the rows of a file, in their order; see `Predictor.rows`.

    >>> from luthier import DataSpec, RunSpec, train
    >>> rows = DataSpec(source="reviews.csv", text="review", label="stars")
    >>> result = train(RunSpec(model="sample:minilm-l6", data=rows, steps=2))
    >>> answer = predict(result.path, texts=["a film for a long evening"])[0]
    >>> sorted(answer["probabilities"])
    ['bad', 'good']

    Raises:
        ConfigError: neither or both were given; no such run.
        DataError: with `strict`, a row that cannot be read.
    """
    if bool(texts) == (data is not None):
        raise ConfigError("give texts, or a file of rows: one of the two.")
    predictor = Predictor(path)
    if data is None:
        return predictor.texts(texts, max_new_tokens=max_new_tokens, strict=strict, unsure=unsure, controls=controls)
    table, _ = load_inputs(data, predictor.columns, delimiter=delimiter, encoding=encoding)
    return predictor.rows(table, max_new_tokens=max_new_tokens, strict=strict, unsure=unsure, controls=controls)
