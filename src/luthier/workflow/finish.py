"""What follows the last step: the tuning is chosen, refused where it is none, saved, read back, compared and scored."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.core import IntegrityError, NothingTrains, human_count, plain
from luthier.data.columns import Columns
from luthier.data.examples import Examples
from luthier.data.rows import Table
from luthier.data.stop_tokens import stop_ids
from luthier.data.tasks import Task
from luthier.runs import Record, RunFolder, durable, environment, load_step, peak_bytes
from luthier.surgery import Method, Tuned, answerers, tuning_files
from luthier.training.answers import positions_for_rows
from luthier.training.evaluate import plain_scores, references
from luthier.training.loop import Loop
from luthier.training.memory_parts import whole_memory
from luthier.training.quality import Quality, beside_plain, judge
from luthier.training.temperature import calibrated, fit_temperature
from luthier.training.thresholds import choose_thresholds, thresholds_said
from luthier.training.word_counts import answers_by_words
from luthier.workflow.build import evaluator_of
from luthier.workflow.forecasts import forecast_of, timing_of, widest
from luthier.workflow.load_model import collator_of
from luthier.workflow.looks import Looks, held_looks
from luthier.workflow.merged_folder import merge
from luthier.workflow.prediction import predict
from luthier.workflow.preparation import Prepared
from luthier.workflow.reference import Reader, choose_rows, observe, write_reference
from luthier.workflow.written_scores import after_training

__all__ = ["Result", "finish", "record_of", "result_of"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """A finished run: its folder, its record, and the model as it was saved."""

    path: Path
    record: Record
    scores: dict[str, float]
    tuned: Tuned = field(repr=False)
    tokenizer: Any = field(repr=False)
    seconds: float
    peak_bytes: int | None
    stored_bytes: int
    memory: dict[str, int]
    n_params: int
    n_base: int
    quality: Quality | None = None

    def predict(
        self,
        texts: str | Sequence[str] = (),
        *,
        data: str | None = None,
        max_new_tokens: int = 64,
        unsure: float | None = None,
    ) -> list[dict[str, Any]]:
        """Answers of the run as it was saved, for texts or the rows of a file; see `luthier.predict`."""
        asked = [texts] if isinstance(texts, str) else texts
        return predict(self.path, texts=asked, data=data, max_new_tokens=max_new_tokens, unsure=unsure)

    def merge(self, out: Path | str) -> Path:
        """Write a model folder that transformers loads without luthier, and return its path."""
        return merge(self.path, out)

    def _facts(self) -> list[tuple[str, str]]:
        scores = [(name, f"{value:.4g}") for name, value in self.scores.items()]
        rest = [("trained", f"{human_count(self.n_params)} numbers"), ("folder", str(self.path))]
        return [("method", str(self.record.spec["method"])), *scores, *rest]

    def __repr__(self) -> str:
        return f"Result({self.record.status}, {', '.join(f'{name} {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        """For a notebook."""
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._facts())
        return f"<table>{rows}</table>"


def finish(prepared: Prepared, loop: Loop, run: RunFolder) -> tuple[dict[str, float], int, Quality | None]:
    """The result: chosen, brought into its stored form, refused where it is none, saved, read back, scored."""
    loop.optimiser.let_go()  # the last checkpoint holds it
    _take_best(loop, run)
    loop.set_mode(training=False)
    loop.moments.finish()
    loop.tuned.finish()
    loop.signals.check()
    _refuse_base(prepared, loop)
    _conclude(prepared, loop)
    prepared = _with_thresholds(prepared, loop, run)
    stored = _save(prepared, loop.tuned, run)
    _keep_reference(prepared, loop.tuned, run)
    scores: dict[str, float] = {}
    quality, writer = None, None  # the latter wrote answers to the test rows
    if prepared.test is not None:
        evaluator = evaluator_of(prepared, loop, prepared.test)
        out = evaluator.outputs()
        scores = evaluator.scores_of(out)
        plainly = _plainly(prepared, loop, prepared.test)
        quality = _keep_answers(prepared, prepared.test, out, run, plainly, _temperature(prepared, loop))
        writer = evaluator.more
    more, samples = after_training(prepared, loop, writer)
    scores |= more
    if samples:
        run.write_json("samples.json", samples)
        loop.listener.say(_sample_said(samples[0], run.path / "samples.json"))
    if scores:
        run.event("scores", lasting=False, step=loop.step, **plain_scores(scores, 6))
        loop.listener.scores(loop.step, scores)
    run.flush()
    run.write_json("scores.json", plain_scores(scores))
    return scores, stored, quality


def _sample_said(sample: dict[str, str], path: Path) -> str:
    before, after = (repr(sample[name][:80]) for name in ("before", "after"))
    return f"{sample['place']}: the base writes {before}, the tuned model {after}; more in {path}"


def _with_thresholds(prepared: Prepared, loop: Loop, run: RunFolder) -> Prepared:
    """Where the spec asks for thresholds: chosen on the rows held out to select by, and from now on a part of the task.

    They are stored with it, so that whoever reads the tuning answers by them.
    """
    held = prepared.selection
    if not prepared.spec.eval.thresholds or held is None or held.targets is None:
        return prepared
    found = choose_thresholds(prepared.task, evaluator_of(prepared, loop, held).outputs()["logits"], held.row_targets)
    task = replace(prepared.task, thresholds=found)
    run.event("thresholds", lasting=False, values=list(found))
    loop.listener.say(thresholds_said(task, len(held.read_rows)))
    return replace(prepared, task=task)


def _temperature(prepared: Prepared, loop: Loop) -> float | None:
    """Where the spec asks for it: the temperature that fits the rows held out to select by."""
    held = prepared.selection
    if not prepared.spec.eval.calibrate or held is None or held.targets is None:
        return None
    chances = prepared.task.probabilities(evaluator_of(prepared, loop, held).outputs()["logits"])
    return fit_temperature(chances, held.row_targets.astype(np.int64))


def _conclude(prepared: Prepared, loop: Loop) -> None:
    """Let methods measure on the training rows what they save beside the result."""
    held = held_looks(loop, prepared.selection) if prepared.selection is not None else []
    for part in prepared.method.parts():
        if type(part).conclude is not Method.conclude:
            looks = Looks(loop)
            share = f"{part.settings().get('data', 1.0):.0%} of " if "data" in part.settings() else ""
            loop.listener.say(f"{part.name} looks at the training rows once more: {share}the {len(looks)} steps")
            part.conclude(loop.tuned, looks, held)
    loop.optimiser.zero_grad()


def _plainly(prepared: Prepared, loop: Loop, examples: Examples) -> dict[str, Any] | None:
    """The outputs of the model alone, where a method answers otherwise: what its answers are compared with."""
    if not answerers(loop.tuned):
        return None
    evaluator = evaluator_of(prepared, loop, examples)
    evaluator.plainly = True
    return evaluator.outputs()


def _keep_answers(
    prepared: Prepared, test: Examples, out: dict[str, Any], run: RunFolder, plainly: dict[str, Any] | None,
    temperature: float | None,
) -> Quality | None:  # fmt: skip
    """Beside the scores: what they are worth (`quality.json`) and each held-out row's answer (`predictions.csv`)."""
    task, train = prepared.task, prepared.train
    if test.targets is None or train.targets is None or prepared.test_table is None:
        return None
    by_words = _by_words(prepared, test)
    quality = judge(task, out["logits"], test.row_targets, train.row_targets, float(out["loss"]), by_words)
    if quality is not None and plainly is not None:
        quality = beside_plain(quality, task, plainly["logits"], test.row_targets, float(plainly["loss"]))
    if quality is not None and temperature is not None:
        quality = calibrated(quality, task, out["logits"], test.row_targets, temperature)
    if quality is not None:
        run.write_json("quality.json", plain(quality))
    durable.write_bytes(
        run.path / "predictions.csv", answers_csv(task, prepared.columns, prepared.test_table, test, out["logits"])
    )
    return quality


def _by_words(prepared: Prepared, test: Examples) -> NDArray[np.int64] | None:
    """What counted words answer to the held-out rows, learnt from the rows that the run learnt from."""
    task, train, test_table = prepared.task, prepared.train, prepared.test_table
    if task.name != "classification" or task.multi_label or train.targets is None or test_table is None:
        return None
    roles = [c for c in (prepared.columns.text, prepared.columns.pair) if c is not None]

    def texts(table: Table, examples: Examples) -> list[str]:
        return [" ".join(str(table.rows[row].get(name) or "") for name in roles) for row in examples.read_rows.tolist()]

    return answers_by_words(texts(prepared.train_table, train), train.row_targets, texts(test_table, test))


def answers_csv(task: Task, columns: Columns, table: Table, test: Examples, logits: NDArray[Any]) -> bytes:
    """Labelled rows with what was wanted and answered, and how sure the answer is; one line a row."""
    roles = [c for c in (columns.text, columns.pair) if c is not None]
    answers, wanted = task.decode(logits), references(task, test)
    chances = task.probabilities(logits) if task.name == "classification" else None
    chosen = task.chosen(logits) if chances is not None else None
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet)
    writer.writerow(["place", *roles, "wanted", "answer", *(["sure"] if chances is not None else [])])
    for line, row in enumerate(test.read_rows.tolist()):
        sure = []
        if chances is not None and chosen is not None:
            sure = [f"{(chances[line].max() if task.multi_label else chances[line, chosen[line]]):.4f}"]
        cells = [table.rows[row].get(name) for name in roles]
        writer.writerow([table.places[row], *cells, _in_cell(wanted[line]), _in_cell(answers[line]), *sure])
    return sheet.getvalue().encode()


def _in_cell(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def _take_best(loop: Loop, run: RunFolder) -> None:
    """Put the best evaluation's tensors back, where the spec asks for the best and it was not the last."""
    best = loop.evaluations.selection.kept
    if best is None or best == loop.step:
        return
    found = load_step(run, best)
    if found is None:
        raise IntegrityError(
            f"{run.ckpt}: the checkpoint of the best step, {best}, is gone or damaged. Restore it from a copy, or "
            "start a new run."
        )
    loop.tuned.state.load_tensors(found.tensors["adapter"])
    loop.moments.load(found.state, found.tensors)  # what is kept may be made of what a strategy remembers
    run.event("best_taken", step=best, value=loop.evaluations.selection.best_value)


def _refuse_base(prepared: Prepared, loop: Loop) -> None:
    """Nothing that equals its base may be called a result."""
    # A few short rows: all logits of the longest batch of a language model would be the run's highest memory.
    lengths = prepared.train.lengths
    short = np.argsort(lengths, kind="stable")[: max(1, min(8, 256 // max(1, int(lengths.min()))))].astype(np.int64)
    batch = loop.feed.batches.collator(prepared.train, short).to(loop.device)
    with torch.inference_mode(), prepared.precision.autocast(loop.device):
        model = loop.tuned.model
        tuned_output = model(**batch.inputs)[0].float()
        read = batch.inputs
        if prepared.task.n_soft:  # the base has no such words: it reads the token that stood for them
            beyond = read["input_ids"] >= model.get_input_embeddings().weight.shape[0]
            read = {**read, "input_ids": read["input_ids"].masked_fill(beyond, prepared.task.filler)}
        with loop.tuned.base_only():
            base = model(**read)[0].float()
    if torch.equal(tuned_output, base):
        raise NothingTrains(
            "after training the model computes exactly what its base computes: nothing was learnt, nothing is saved."
        )
    if not torch.isfinite(tuned_output).all():
        raise IntegrityError(
            "the trained model's outputs are not finite; it is not saved. Resume with a lower learning rate."
        )


def _save(prepared: Prepared, tuned: Tuned, run: RunFolder) -> int:
    """Write the tuning with its contract, read it back, and compare."""
    if run.tuning.exists():
        # Of an attempt that was stopped before its scores. It is the same one, unless the spec has changed since.
        leaving = run.tuning.with_name(f".del-{run.tuning.name}")
        durable.rename(run.tuning, leaving)
        durable.remove_folder(leaving)
    about: dict[str, Any] = {
        "task": {**plain(prepared.task), "columns": plain(prepared.columns)},
        "labels": list(prepared.task.labels),
        "precision": prepared.precision.name,
        "contract": {
            "max_length": prepared.max_length,
            "long": prepared.spec.long or "cut",
            "pad": prepared.pad,
            "tokenizer": prepared.fingerprints["tokenizer"],
            "template": plain(prepared.template) if prepared.template is not None else None,
            "loss_on": prepared.spec.data.loss_on,
            **({"row_tasks": list(prepared.row_tasks)} if prepared.row_tasks else {}),
            **_stop(prepared, tuned),
            "weights": "fp32" if prepared.weights == torch.float32 else prepared.precision.name,
        },
    }
    tuned.save(run.tuning, about=about)
    from luthier.trust import safetensors

    held = tuning_files.stored_tensors(tuned.tuning())
    differs = safetensors.unequal(run.tuning / "tuning.safetensors", held, tuning_files.weights_digest(run.tuning))
    if differs:
        raise IntegrityError(
            f"{run.tuning}: {', '.join(differs[:3])} read back otherwise than written. The disk is at fault."
        )
    return sum(p.stat().st_size for p in run.tuning.iterdir())


def _keep_reference(prepared: Prepared, tuned: Tuned, run: RunFolder) -> None:
    """What the trained model computes of a few rows: `luthier certify` compares with it."""
    examples, table = (prepared.test, prepared.test_table) if prepared.test is not None else (prepared.train, None)
    task, model, device = prepared.task, tuned.model, prepared.device
    n_vocab = int(model.get_input_embeddings().weight.shape[0])
    reader = Reader.of_run(run.tuning, prepared.tokenizer, n_vocab)
    rows = choose_rows(table or prepared.train_table, prepared.columns, examples, writes=reader.writes)
    collator = collator_of(task, model, prepared.tokenizer, pad_id=prepared.pad_id, pad_to=1, seed=0)
    room = positions_for_rows(tuned)
    trained = observe(model, rows, reader, collator, prepared.precision, device, room=room)
    with tuned.base_only():
        base = observe(model, rows, reader, collator, prepared.precision, device, new=0, of_base=True)
    write_reference(run.path, rows, trained, base)


def _stop(prepared: Prepared, tuned: Tuned) -> dict[str, list[int]]:
    """The tokens that end an answer, of a task whose answers are written."""
    if not prepared.task.writes:
        return {}
    found = stop_ids(prepared.train, prepared.tokenizer, tuned.model)
    if getattr(tuned.model, "generation_config", None) is not None and found:
        tuned.model.generation_config.eos_token_id = found  # merged or saved, the model stops there too
    return {"stop": found}


def record_of(
    prepared: Prepared, loop: Loop, run: RunFolder, scores: dict[str, float], stored: int, status: str,
    because: tuple[str, ...], seconds: float = 0.0,
) -> Record:  # fmt: skip
    peak = _peak(loop.device)
    program = loop.program_bytes if loop.device.type == "cpu" else 0  # a GPU's peak is of its own memory
    return Record(
        spec=plain(prepared.spec),
        environment=environment(str(prepared.device)),
        scores={k: float(v) for k, v in scores.items() if math.isfinite(v)},
        seconds=seconds,
        peak_bytes=peak,
        memory=whole_memory(loop.trial.memory, program, peak),
        forecast=_forecast(prepared, loop) if status == "finished" else {},
        timing=timing_of(prepared, loop) if status == "finished" else {},
        trained=prepared.n_params,
        stored=stored,
        status=status,
        bit_exact=not because,
        because=because,
    )


def _forecast(prepared: Prepared, loop: Loop) -> dict[str, int]:
    """What could be said before the first step: made again, since it follows from the spec alone."""
    said = forecast_of(prepared)
    return {**said, **widest(loop)} if said else {}


def _peak(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_bytes()


def result_of(
    prepared: Prepared,
    loop: Loop,
    run: RunFolder,
    record: Record,
    scores: dict[str, float],
    stored: int,
    quality: Quality | None = None,
) -> Result:
    return Result(
        path=run.path, record=record, scores=scores, tuned=loop.tuned, tokenizer=prepared.tokenizer,
        seconds=loop.seconds, peak_bytes=record.peak_bytes, stored_bytes=stored, memory=dict(record.memory),
        n_params=prepared.n_params, n_base=prepared.n_base, quality=quality,
    )  # fmt: skip
