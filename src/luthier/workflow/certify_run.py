"""Whether a run goes on as the model that was trained, by every way that leads out of its folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import BadInput, ConfigError, DataError, LuthierError
from luthier.data.examples import REFUSED
from luthier.data.load_data import load_inputs, texts_as_rows
from luthier.runs import RunFolder, durable
from luthier.runs.spec import RunSpec
from luthier.surgery import read_tuning
from luthier.surgery.storage import form_of
from luthier.workflow import certificate
from luthier.workflow.certificate import (
    FAILED,
    NOT_DONE,
    PASSED,
    Certificate,
    Expected,
    Step,
    certificate_of,
    rms_between,
    step_of,
)
from luthier.workflow.export import export_peft
from luthier.workflow.fresh import Answer, Asked, ask
from luthier.workflow.load_model import find_model, load_config, load_tokenizer
from luthier.workflow.merged_folder import last_with_bias, write_merged
from luthier.workflow.prediction import Predictor
from luthier.workflow.reference import Reader, Seen, read_reference

__all__ = ["certify"]

MOST_PROMPTS = 64
# By which file a folder is known; the first that is there: a graph has a configuration beside it, too.
KNOWN = {
    "model.onnx": "onnx",
    "model.gguf": "gguf",
    "adapter.gguf": "gguf_adapter",
    "adapter_config.json": "exported",
    "config.json": "merged",
}
QUANTISED = 1.5  # times what the same codes move the base's logits


def certify(
    path: Path | str, *, prompts: str | None = None, store: str | None = None, folder: Path | str | None = None,
    say: Callable[[Step], None] = lambda step: None, do: Callable[[Asked], Answer] = ask,
) -> Certificate:  # fmt: skip
    """Compare a run, by every way that leads out of its folder, with what its model computed when training ended.

    Each step is done in a process of its own. The result is written to certificate.json in the run's folder.

    >>> from luthier import certify, train
    >>> result = train("sample:minilm-l6", "reviews.csv", text="review", label="stars", steps=20)
    >>> certify(result.path).passed
    True

    Args:
        path: the folder of a finished run.
        prompts: a file of further rows to compare on, with the columns of the training rows; or a .txt file with a text
            a line.
        store: also hold the merged model in these codes, such as nf4.
        folder: a folder that was merged or exported before, to look at in place of new ones.
        say: hears of each step that is done.
        do: carries a step out, given what is asked.

    Raises:
        ConfigError: no such run, one that is not finished, no such store, or a folder that is neither merged nor
            exported.
        DataError: the prompts, or a row of them, cannot be read.
    """
    path = Path(path)
    if store is not None:
        form_of(store)
    run = RunFolder.open(path, write=False)
    if not run.tuning.exists():
        raise ConfigError(f"{path}: this run has no result yet. Go on with `luthier resume {path}`.")
    if folder is not None and _kind(Path(folder)) is None:
        raise ConfigError(f"{folder}: is neither a merged model nor an export: it has none of {', '.join(KNOWN)}.")
    certifier = _Certifier(path, RunSpec.from_plain(run.spec, where=f"{path}/run.json"), prompts, say, do)
    certifier.do_steps(None if folder is None else Path(folder), store)
    found = certifier.certificate()
    durable.write_json(path / certificate.FILE, found.to_plain())
    return found


class _Certifier:
    """The steps of one run, one after another."""

    def __init__(
        self, path: Path, spec: RunSpec, prompts: str | None, say: Callable[[Step], None], do: Callable[[Asked], Answer]
    ) -> None:
        self.path, self.spec, self.do, self._say = path, spec, do, say
        self.facts = read_tuning(path / "tuning")
        self.kept = read_reference(path)
        self.prompts = () if prompts is None else self._prompts(prompts)
        self.steps: list[Step] = []
        self.halves = self.facts["precision"] != "fp32" or self.facts["contract"].get("weights") != "fp32"

    def _prompts(self, file: str) -> Sequence[dict[str, Any]]:
        """The user's rows; one that cannot be read is named before any step begins."""
        source = find_model(self.spec.model)
        n_vocab = int(load_config(source).get_text_config().vocab_size)
        reader = Reader.of_run(self.path / "tuning", load_tokenizer(source), n_vocab)
        columns = reader.columns
        if file.endswith(".txt"):
            lines = _lines(file)
            table = texts_as_rows(
                [text for _, text in lines], columns, reader.task, places=[f"{file}:{n}" for n, _ in lines],
                source=file, known=reader.contract.get("row_tasks", ()), option="--prompts",
            )  # fmt: skip
        else:
            table, _ = load_inputs(file, columns)
        if not 1 <= len(table) <= MOST_PROMPTS:
            raise ConfigError(
                f"{file}: {len(table)} rows; give 1 to {MOST_PROMPTS}, since each is answered many times."
            )
        ledger = reader.read(table, with_targets=False).ledger
        if bad := [f"{row['place']}: {row['reason']}" for row in ledger if row["status"] == REFUSED]:
            raise DataError(
                f"{file}: {len(bad)} of {len(table)} rows cannot be read: {'; '.join(bad[:10])}. Correct them."
            )
        return table.rows

    def certificate(self) -> Certificate:
        rows = 0 if self.kept is None else len(self.kept.rows)
        return certificate_of(self.path, self.spec, rows, len(self.prompts), self.steps)

    def do_steps(self, folder: Path | None, store: str | None) -> None:
        """All that can be done; where the run itself does not load, nothing further can."""
        reloaded = self._reloaded()
        if reloaded is None:
            return
        trained = self._trained(reloaded)
        for name in () if folder is not None else ("served", "detached"):
            self._step(name, trained, halves=self.halves)
        try:
            plain = self._plain(reloaded)
        except LuthierError as error:
            self._note(Step(name="in fp32", status=FAILED, reason=str(error)))
            return
        if folder is not None:
            self._folder(folder, plain)
            return
        with tempfile.TemporaryDirectory(prefix="luthier-certify-") as place:
            self._merged(Path(place) / "merged", plain, store)
            self._exported(Path(place) / "exported", plain)

    def _note(self, step: Step) -> None:
        self.steps.append(step)
        self._say(step)

    def _asked(self, step: str, **more: Any) -> Asked:
        return Asked(step=step, run=str(self.path), prompts=self.prompts, **more)

    def _step(self, name: str, expected: Expected, *, halves: bool, folder: str = "", beside: str = "") -> Seen | None:
        asked = self._asked(name, folder=folder)
        step, answer = step_of(name, asked, expected, halves=halves, beside=beside, do=self.do)
        self._note(step)
        return None if answer is None else answer.kept.plus(answer.asked)

    def _reloaded(self) -> Answer | None:
        """The first step: what lies on the disk, beside what was kept of the model in memory when training ended."""
        expected = None if self.kept is None else Expected(self.kept.trained, self.kept.base)
        try:
            answer = self.do(self._asked("reloaded"))
        except LuthierError as error:
            self._note(Step(name="reloaded", status=FAILED, reason=str(error)))
            return None
        if expected is None:
            why = "the run kept nothing of the model that was trained: an older luthier made it"
            self._note(Step(name="reloaded", status=NOT_DONE, reason=why))
            return answer if self.prompts else None
        self._note(certificate.compared("reloaded", expected, answer.kept, halves=self.halves))
        return answer

    def _trained(self, reloaded: Answer) -> Expected:
        kept = reloaded.kept if self.kept is None else self.kept.trained
        return Expected(kept.plus(reloaded.asked), _logits(reloaded.base) + _logits(reloaded.base_asked))

    def _plain(self, reloaded: Answer) -> Expected:
        if self.kept is None:
            return self._trained(reloaded)
        return certificate.expected_of(
            self.path, self.spec, self.kept, reloaded, do=self.do, prompts=self.prompts
        )  # fmt: skip

    def _in_unit(self, expected: Expected, in_unit: bool) -> Expected:
        task = self.facts["task"]
        if not in_unit or task["name"] != "regression":
            return expected
        return expected.in_unit(float(task["scale"]), float(task["center"]))

    def _merged(self, folder: Path, expected: Expected, store: str | None) -> None:
        folder.mkdir()
        try:
            written = write_merged(self.path, folder, dtype="auto", name="merged")
        except BadInput as error:
            self._note(Step(name="merged", status=NOT_DONE, reason=_without_advice(error)))
            return
        wanted = self._in_unit(expected, written.in_unit)
        found = self._step("merged", wanted, halves=written.halves, folder=str(folder), beside=written.beside)
        if store is not None and found is not None:
            self._quantised(folder, wanted, found, store)

    def _exported(self, folder: Path, expected: Expected) -> None:
        if find_spec("peft") is None:
            self._note(Step(name="exported", status=NOT_DONE, reason="peft is not installed here"))
            return
        try:
            predictor = Predictor(self.path)
            export_peft(predictor, folder, check=False)
            model: Any = predictor.tuned.model
            in_unit = last_with_bias(model) is not None
            del predictor, model
        except (BadInput, ConfigError) as error:
            self._note(Step(name="exported", status=NOT_DONE, reason=_without_advice(error)))
            return
        self._step("exported", self._in_unit(expected, in_unit), halves=False, folder=str(folder))

    def _folder(self, folder: Path, expected: Expected) -> None:
        """One that was written before: it is read as what it is."""
        step = _kind(folder) or "merged"
        halves = step == "merged" and load_config(find_model(str(folder))).dtype in (torch.bfloat16, torch.float16)
        halves = halves or (step == "gguf" and "matrices in f32" not in _text(folder / "README.md"))
        raw = step in ("merged", "onnx") and "multiply an answer by" in _text(folder / "README.md")
        self._step(step, self._in_unit(expected, not raw), halves=halves, folder=str(folder))

    def _quantised(self, folder: Path, expected: Expected, merged: Seen, store: str) -> None:
        """The merged model in codes. Codes cost something: not more than they cost the base."""
        try:
            answer = self.do(self._asked("quantised", folder=str(folder), store=store))
            base, base_asked = answer.base, answer.base_asked
            assert base is not None and base_asked is not None
        except LuthierError as error:
            self._note(Step(name=f"quantised to {store}", status=FAILED, reason=str(error)))
            return
        found = answer.kept.plus(answer.asked)
        step = certificate.compared(f"quantised to {store}", replace(expected, trained=merged), found, halves=True)
        if step.off is not None and step.from_base is not None:
            of_base = rms_between(expected.base, base.plus(base_asked).logits)
            allowed = QUANTISED * of_base
            lost = step.off > allowed
            reason = f"the codes move its logits by {step.off:.2g}, and its base's by {of_base:.2g}"
            step = replace(step, status=FAILED if lost else PASSED, reason=reason, tolerance=allowed)
        self._note(step)


def _kind(folder: Path) -> str | None:
    """The step that looks at a folder that was written before."""
    return next((step for name, step in KNOWN.items() if (folder / name).exists()), None)


def _logits(seen: Seen | None) -> tuple[Tensor, ...]:
    return () if seen is None else seen.logits


def _lines(file: str) -> list[tuple[int, str]]:
    """The lines of a text that are not empty, with their numbers from 1."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{file}: cannot be read ({why}). Give a text file in UTF-8, one text a line.") from error
    return [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _without_advice(error: LuthierError) -> str:
    """Why a step cannot be done, without what to do instead."""
    return str(error).removesuffix(".").split(". ")[0] + "."
