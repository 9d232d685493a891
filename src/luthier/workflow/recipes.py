"""A recipe driven: phase after phase, each an ordinary run; what is finished is not run again.

OUT/recipe.json       the spec, what each phase was asked to be, and in the end which folder is the result
OUT/spec.toml         the spec as a file: `luthier train OUT/spec.toml --out AGAIN` repeats the whole
OUT/1-texts ...       the runs, in their order; lineage.json in each says what it was made of
OUT/1-texts-merged    a run's model with its tuning in the weights, where a later phase starts from it
OUT/rows-NAME.jsonl   rows that were written between two phases; rows-NAME.json, what they were made of, where that
                      is dear
OUT/asked.jsonl       what models were asked between two phases, by digest, and what they gave
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, IntegrityError, Interrupted, Locked, plain
from luthier.data.columns import Columns
from luthier.data.infer_task import Kind, kind_of_model
from luthier.data.load_data import load_data, load_inputs
from luthier.data.rows import Table
from luthier.data.sets import named_sources
from luthier.runs import RunFolder, durable
from luthier.runs.lock import Lock
from luthier.runs.spec import RunSpec
from luthier.surgery import compose, tuning_files
from luthier.training.listener import Listener
from luthier.training.recipe import RECIPE, Guesses, Phase, Plan, plan_of
from luthier.workflow.finish import Result
from luthier.workflow.gap_search import guess_words, write_fillings
from luthier.workflow.kept_rows import keep_rows
from luthier.workflow.load_model import find_model, load_config
from luthier.workflow.merged_folder import merge
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import prepare
from luthier.workflow.run import default_out, run_to_end
from luthier.workflow.speaker import Speaker
from luthier.workflow.text_writer import TextWriter

__all__ = ["FILE", "Followed", "follow", "is_recipe"]

FILE = RECIPE
BEGUN = {"recipe.lock", "spec.toml"}
"""What stands in a folder whose making was killed before it was a recipe's: the lock, and then this too."""


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A recipe that is finished.

    Attributes:
        path: the folder of the whole.
        phases: name of each phase -> its scores, in their order.
        result: the run of the last phase, which is the one to use.
    """

    path: Path
    phases: dict[str, dict[str, float]]
    result: Path
    last: Result | None = field(default=None, repr=False)
    """what came out of that run, where it was made just now"""


def last_of(spec: RunSpec | Path, *, stop_at: int | None, listener: Listener, changed: bool = False) -> Result:
    """The result of a recipe's last run, for whoever trains or resumes it as if it were one run.

    Raises:
        ConfigError: nothing is left to do, or what is asked for is of one run.
    """
    if stop_at is not None or changed:
        raise ConfigError("a recipe is a chain of runs, which are resumed as they were: leave stop_at and changes out.")
    found = follow(spec, listener=listener)
    if found.last is None:
        raise ConfigError(f"{found.path}: this recipe is finished. Its result is in {found.result}.")
    return found.last


def is_recipe(path: Path | str) -> bool:
    """Whether a folder is that of a recipe."""
    return (Path(path) / FILE).is_file()


def follow(spec: RunSpec | Path | str, *, listener: Listener | None = None) -> Followed:
    """Run a recipe, or go on with the one in a folder. Phases that are finished are not run again.

    Args:
        spec: with a recipe among its strategies; or the folder of a recipe to go on with.

    Raises:
        ConfigError: the folder holds something else, or another recipe.
        IntegrityError: the recipe asks for another phase than before: its file, or the rows, have changed.
        Any LuthierError: of a run; nothing is lost.
    """
    listener = listener or Listener()
    spec, path = _opened(spec)
    plan = _plan(spec)
    lock = Lock(path / "recipe.lock") if is_recipe(path) else None
    if lock is None:
        lock = _create(path, spec, plan, listener)
    else:
        lock.acquire()
    try:
        return _follow(path, spec, plan, listener)
    except Interrupted as stopped:
        raise Interrupted(
            f"stopped in a phase of the recipe; nothing is lost. Go on with `luthier resume {path}`.",
            stopped.exit_code - 128,
        ) from None
    finally:
        lock.release()


def _opened(spec: RunSpec | Path | str) -> tuple[RunSpec, Path]:
    if isinstance(spec, RunSpec):
        path = Path(spec.out) if spec.out is not None else default_out(spec)
        if is_recipe(path):
            kept = RunSpec.from_plain(_read(path)["spec"], where=f"{path}/{FILE}")
            if replace(kept, out=None) != replace(spec, out=None):
                raise ConfigError(
                    f"{path}: holds another recipe, or this one with other settings. Go on with it as it was (luthier "
                    f"resume {path}), or name another folder with --out."
                )
        elif path.exists() and not _is_begun(path):
            raise ConfigError(f"{path}: is not empty and holds no recipe. Choose another --out.")
        return spec, path
    path = Path(spec)
    return RunSpec.from_plain(_read(path)["spec"], where=f"{path}/{FILE}"), path


def _is_begun(path: Path) -> bool:
    """Whether a folder is empty, or holds what a recipe puts there first; a spec.toml alone is somebody else's."""
    names = {file.name for file in path.iterdir()}
    return not names or ("recipe.lock" in names and names <= BEGUN)


def _plan(spec: RunSpec) -> Plan:
    return plan_of(spec, compose.setting_names(spec.method))


def _create(path: Path, spec: RunSpec, plan: Plan, listener: Listener) -> Lock:
    """The folder, after a first look at what every phase needs: the first phase, and all that is checked before it."""
    desk = _Desk(path, plan, listener, writes=False)
    next(plan.recipe.phases(plan, desk))
    for parent in reversed([p for p in (path.absolute().parent, *path.absolute().parent.parents) if not p.exists()]):
        durable.make_folder(parent)
    if not path.exists():
        durable.make_folder(path)
    lock = Lock(path / "recipe.lock")
    lock.acquire()
    if is_recipe(path):
        lock.release()
        raise Locked(f"{path}: another process was faster to begin there. Choose another --out.")
    durable.write_bytes(path / "spec.toml", replace(spec, out=None).to_toml().encode())
    durable.write_json(path / FILE, {"spec": plain(spec), "asked": {}})
    return lock


def _follow(path: Path, spec: RunSpec, plan: Plan, listener: Listener) -> Followed:
    desk = _Desk(path, plan, listener)
    chain = plan.recipe.phases(plan, desk)
    done: dict[str, _Run] = {}
    last: Result | None = None
    number, phase = 0, next(chain, None)
    while phase is not None:
        number += 1
        _hold(path, phase, number)
        home = path / f"{number}-{phase.name}"
        listener.say(f"phase {number}: {phase.name}")
        last = run_to_end(replace(phase.spec, out=str(home)), listener)
        if last is None:
            listener.say(f"is finished in {home}, and not run again")
        run = done[phase.name] = _Run(home)
        _record_lineage(run, phase, plan, number, done)
        try:
            phase = chain.send(run)
        except StopIteration:
            phase = None
    if not done:
        raise ConfigError(f"{plan.recipe.name} has no phase with these settings. Choose others.")
    result = list(done.values())[-1].path
    durable.write_json(path / FILE, _read(path) | {"result": result.name})
    return Followed(path=path, phases={name: dict(run.scores) for name, run in done.items()}, result=result, last=last)


def _hold(path: Path, phase: Phase, number: int) -> None:
    """A phase must be asked for as it was the first time, or the runs after it would be made of something else."""
    kept = _read(path)
    at, digest = f"{number}-{phase.name}", phase.spec.digest()
    if kept["asked"].setdefault(at, digest) != digest:
        raise IntegrityError(
            f"{path}: phase {at} was begun from another spec than the recipe asks for now. The recipe's file, the rows "
            "or an earlier phase have changed. Restore them, or begin anew in another folder."
        )
    durable.write_json(path / FILE, kept)


def _record_lineage(run: _Run, phase: Phase, plan: Plan, number: int, done: Mapping[str, _Run]) -> None:
    told = {
        "recipe": plan.recipe.name,
        "settings": plan.recipe.settings(),
        "phase": number,
        "name": phase.name,
        "made_of": {name: {"run": done[name].path.name, "tuning": done[name].digest} for name in phase.made_of},
        "tuning": run.digest,
    }
    file = run.path / "lineage.json"
    if not file.exists():
        durable.write_json(file, told)
    elif json.loads(file.read_text(encoding="utf-8")) != plain(told):
        raise IntegrityError(f"{file}: says another lineage than what lies in the folders. Begin anew in another one.")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path / FILE}: cannot be read ({error}). Restore it, or begin anew.") from error


@dataclass(frozen=True)
class _Run:
    """What came out of a phase."""

    path: Path

    @property
    def scores(self) -> Mapping[str, float]:
        file = self.path / "scores.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {name: float(value) for name, value in found.items()}

    @property
    def digest(self) -> str:
        """Of its tuning."""
        return tuning_files.weights_digest(RunFolder.open(self.path, write=False).tuning)

    def merged(self) -> str:
        out = self.path.with_name(f"{self.path.name}-merged")
        if not out.exists():
            durable.sweep(out.parent, of=out.name)
            merge(self.path, out)
        return str(out)

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self.path)

    def answers(self, table: Table) -> list[dict[str, Any]]:
        return Predictor(self.path).rows(table, strict=True)  # not kept: a recipe may ask many runs

    def written(self, table: Table, *, max_new_tokens: int, beams: int) -> list[tuple[str, bool]]:
        return self._predictor.written(table, max_new_tokens=max_new_tokens, beams=beams)


@dataclass(frozen=True)
class _Desk:
    """What a recipe may ask. Before its folder is made nothing is written: paths alone are given."""

    path: Path
    plan: Plan
    listener: Listener
    writes: bool = True

    @property
    def kind(self) -> Kind:
        return kind_of_model(load_config(find_model(self.plan.spec.model)))

    def check(self, spec: RunSpec) -> None:
        if not self.writes:  # on every later call the phases themselves are checked
            prepare(spec)

    @cached_property
    def _rows(self) -> tuple[Table, Table | None, Columns]:
        data = load_data(self.plan.spec.data, self.plan.spec.task, load_config(find_model(self.plan.spec.model)))
        return data.train, data.test, data.columns

    def rows(self) -> tuple[Table, Table | None, Columns]:
        return self._rows

    def further(self, name: str) -> Table:
        source = named_sources(self.plan.spec.also)[name]
        table, _ = load_inputs(source, self.rows()[2])  # recognised: it need not be stored as the run's own rows are
        return table

    def finished(self, path: str) -> _Run:
        run = _Run(Path(path))
        _ = run._predictor  # refuses what is not finished, or was changed
        return run

    def guesses(self, spec: RunSpec, table: Table) -> Guesses:
        return guess_words(spec, table)

    def fillings(self, model: str, texts: Sequence[str], *, beams: int, most: int) -> list[tuple[str, str]]:
        return write_fillings(self.plan.spec, model, texts, beams=beams, most=most)

    def asked(self, name: str) -> Speaker:
        return Speaker(name, device=self.plan.spec.device, precision=self.plan.spec.precision)

    def kept(
        self, name: str, key: Mapping[str, Any], table: Table, make: Callable[[Table], Iterable[Mapping[str, Any]]]
    ) -> Table:
        if not self.writes:
            return table.take(())
        return keep_rows(self.path / f"rows-{name}.jsonl", key, table, make, self.listener.say)

    def writer(self, model: str) -> TextWriter:
        return TextWriter(model, self.path / "asked.jsonl", self.plan.spec.device)

    def say(self, line: str) -> None:
        if self.writes:
            self.listener.say(line)

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        path = self.path / f"rows-{name}.jsonl"
        if self.writes:
            lines = (json.dumps(plain(dict(row)), ensure_ascii=False) for row in rows)
            content = ("\n".join(lines) + "\n").encode()
            if not path.exists():
                durable.write_bytes(path, content)
            elif path.read_bytes() != content:
                raise IntegrityError(
                    f"{path}: other rows were written there than the recipe makes now: the source has changed, or an "
                    "earlier phase. Restore it, or begin anew in another folder."
                )
        return str(path)
