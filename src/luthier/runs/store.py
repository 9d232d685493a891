"""A run is a folder that stays readable without this code.

README.txt         what is what, for a reader without luthier
run.lock           who is writing to it now
run.json           the resolved spec and fingerprints; written once, never again
drift-1.json ...   differences that a resume accepted, one file each time
spec.toml          the spec as a file to start another run from
environment.json   versions, threads, device
events.jsonl       what happened (facts with a time) and one row per step (without one)
rows.jsonl         the data rows: used, truncated, dropped and why
rollouts.jsonl     what the model wrote in training, with its rewards, where a strategy has it write
ckpt/              checkpoints, newest last
tuning/            the result
scores.json, record.json    written at the end
"""

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli_w

from luthier.core import ConfigError, IntegrityError, ResourceError
from luthier.core.places import place_of
from luthier.runs import durable
from luthier.runs.environment import environment
from luthier.runs.journal import Journal
from luthier.runs.lock import Lock
from luthier.runs.versions import Migration, migrate

__all__ = ["RUN_VERSION", "RunFolder", "refuse_place"]

RUN_VERSION = 1
RUN_MIGRATIONS: dict[int, Migration] = {}

README = """\
This folder is one training run of luthier. Everything in it is text (JSON, JSON lines, TOML) or safetensors.

run.json           the resolved specification and the fingerprints of model, data and tokenizer
drift-N.json       what had changed when the run was resumed and the change was accepted
spec.toml          the specification, ready for `luthier train spec.toml`
environment.json   library versions, threads, device
events.jsonl       one JSON object per line; lines with "at" are facts, lines without are one row per step
rows.jsonl         the data rows: used, truncated, dropped and why
rollouts.jsonl     what the model wrote in training, with its rewards, where a strategy has it write
ckpt/step-N/       checkpoints; MANIFEST.json holds the size and SHA-256 of each file
tuning/            the trained weights (safetensors) and what is needed to use them
reference.json     a few rows, and what the trained model made of them: `luthier certify FOLDER` compares with it
scores.json        the measured scores
record.json        the summary: spec, environment, scores, seconds, peak memory

Continue an unfinished run with `luthier resume FOLDER`. Names that begin with .tmp- or .del- are leftovers.
"""


class RunFolder:
    """One run's folder. `create` and `open(write=True)` hold its lock until `close`; use it in a `with` block.

    Attributes:
        path: the folder.
        facts: the content of run.json.
        journal, rows, texts: events.jsonl, rows.jsonl and rollouts.jsonl, which is there once a text was written.
    """

    def __init__(self, path: Path, facts: dict[str, Any], lock: Lock) -> None:
        self.path = path
        self.facts = facts
        self.lock = lock
        self.journal = Journal(path / "events.jsonl")
        self.rows = Journal(path / "rows.jsonl")
        self.texts = Journal(path / "rollouts.jsonl")

    @classmethod
    def create(
        cls,
        path: Path | str,
        spec: Mapping[str, Any],
        *,
        fingerprints: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> "RunFolder":
        """Make the folder, whole or not at all, and take its lock.

        Args:
            path: must not exist, or be an empty folder; missing parents are made.
            spec: the resolved specification, plain values.
            fingerprints: digests of model, data, tokenizer and code, plain values.
            device: named in environment.json.

        Raises:
            ConfigError: a run or something else is there already; says how to go on.
            ResourceError: it cannot be written there.
        """
        path = Path(path).absolute()
        _refuse_occupied(path)
        for parent in reversed([p for p in (path.parent, *path.parent.parents) if not p.exists()]):
            durable.make_folder(parent)
        facts = {
            "format": "luthier-run",
            "version": RUN_VERSION,
            "spec": dict(spec),
            "fingerprints": dict(fingerprints or {}),
        }
        durable.sweep(path.parent, of=path.name)
        try:
            with durable.scope("create"), durable.folder(path) as draft:
                draft.write_json("run.json", facts)
                draft.write_bytes("spec.toml", _as_toml(spec))
                draft.write_json("environment.json", environment(device))
                draft.write_bytes("README.txt", README.encode())
                draft.write_bytes("events.jsonl", b"")
                draft.write_bytes("rows.jsonl", b"")
                draft.make_folder("ckpt")
        except ResourceError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOTEMPTY, errno.EEXIST):
                _refuse_occupied(path)  # another process was faster: then that is the thing to say
            raise
        lock = Lock(path / "run.lock")
        lock.acquire()
        run = cls(path, json.loads(durable.encode(facts)), lock)
        run.event("created")
        return run

    @classmethod
    def open(cls, path: Path | str, *, write: bool = True, take_over: bool = False) -> "RunFolder":
        """Open an existing run: to go on writing (takes the lock), or only to read.

        Args:
            take_over: take the lock from a holder on another host whose death cannot be proven.

        Raises:
            ConfigError: there is no run in that folder.
            IntegrityError: run.json cannot be read, or is of a format that this version does not know.
            Locked: another process is writing to it.
        """
        path = Path(path).absolute()
        facts = _read_run_json(path)
        lock = Lock(path / "run.lock")
        run = cls(path, facts, lock)
        if write:
            lock.acquire(take_over=take_over)
            try:
                durable.sweep(path)
                if lock.took_over_from:
                    run.event("took_over_lock", holder=lock.took_over_from)
                for journal in (run.journal, run.rows):
                    journal.open()
                    if journal.cut_bytes:
                        run.event("torn_tail_cut", file=journal.path.name, bytes=journal.cut_bytes)
            except BaseException:
                run.close()
                raise
        return run

    def close(self) -> None:
        """Flush the journals and release the lock."""
        try:
            self.journal.close()
            self.rows.close()
            self.texts.close()
        finally:
            self.lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- what is in it

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved specification, as the last accepted change left it."""
        specs = [drift["spec"] for drift in self.drifts() if drift.get("spec") is not None]
        return dict(specs[-1] if specs else self.facts["spec"])

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Digests of model, data, tokenizer and code, with every accepted drift applied."""
        prints = dict(self.facts["fingerprints"])
        for drift in self.drifts():
            prints.update(drift["fingerprints"])
        return prints

    @property
    def ckpt(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "ckpt"

    @property
    def tuning(self) -> Path:
        """Where the result goes."""
        return self.path / "tuning"

    @property
    def finished(self) -> bool:
        """Whether the run has its record."""
        return (self.path / "record.json").exists()

    def read_json(self, name: str) -> Any:
        """One of the folder's JSON files.

        Raises:
            IntegrityError: it is missing or not JSON.
        """
        return _read_json(self.path / name)

    def write_json(self, name: str, value: object) -> None:
        """Write scores.json, record.json or another JSON file, whole or not at all. run.json is never rewritten.

        Raises:
            ConfigError: `name` is run.json.
            DiskFull, ResourceError: it cannot be written.
        """
        if name == "run.json":
            raise ConfigError(f"{self.path / name} is never rewritten; use accept_drift for what has changed.")
        self._must_hold_lock()
        durable.write_json(self.path / name, value)

    def drifts(self) -> list[dict[str, Any]]:
        """The accepted drifts, in order."""
        n = 1
        found = []
        while (self.path / f"drift-{n}.json").exists():
            found.append(_read_json(self.path / f"drift-{n}.json"))
            n += 1
        return found

    def accept_drift(
        self,
        differences: list[str],
        fingerprints: Mapping[str, Any],
        step: int,
        *,
        spec: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that the run goes on although something has changed, in a new file drift-N.json.

        Args:
            differences: one sentence each.
            fingerprints: those that hold from now on.
            spec: the whole specification that holds from now on, where it has changed.

        Raises:
            DiskFull, ResourceError: it cannot be written.
        """
        self._must_hold_lock()
        n = len(self.drifts()) + 1
        content: dict[str, Any] = {"step": step, "differences": differences, "fingerprints": dict(fingerprints)}
        if spec is not None:
            content["spec"] = dict(spec)
        durable.write_json(self.path / f"drift-{n}.json", content)
        self.event("drift_accepted", step=step, differences=differences)

    # --- what happens

    def event(self, kind: str, *, lasting: bool = True, **fields: Any) -> None:
        """Append one line to events.jsonl.

        Args:
            lasting: True for a fact: it gets its time and is on the disk when this returns. False for a row per step:
                no time and no fsync, so it costs microseconds and a resumed run writes the same bytes; `flush` or the
                next checkpoint makes the rows last.

        Raises:
            ConfigError: a value is not plain, or not finite.
            DiskFull, ResourceError: it cannot be written.
        """
        self._must_hold_lock()
        with durable.scope("event"):
            self.journal.append({"event": kind, **fields}, fact=lasting)

    def events(self) -> Iterator[dict[str, Any]]:
        """All whole lines of events.jsonl; a torn last line is left out (`journal.replay()` reports it)."""
        return iter(self.journal)

    def n_rows(self) -> int:
        """How many rows (lines without a time) events.jsonl holds; a checkpoint's state stores it."""
        return self.journal.n_rows()

    def truncate_events(self, after: int) -> int:
        """Drop the rows after the first `after`, so that a resumed run writes them again; facts stay.

        Returns:
            how many rows were dropped. Rows that are missing are recorded as the fact "rows_missing".

        Raises:
            DiskFull, ResourceError: the file cannot be rewritten.
        """
        self._must_hold_lock()
        with durable.scope("rewind"):
            dropped, missing = self.journal.keep_rows(after)
            if missing:
                self.event("rows_missing", expected=after, missing=missing)
        return dropped

    def flush(self) -> None:
        """Make the rows last.

        Raises:
            DiskFull, ResourceError: the disk says that they do not.
        """
        self.journal.flush()
        self.rows.flush()
        self.texts.flush()

    def _must_hold_lock(self) -> None:
        if not self.lock.held:
            raise ResourceError(f"{self.path}: opened for reading; use RunFolder.open(path, write=True) to write.")


def refuse_place(path: Path) -> None:
    """Refuse a folder that a new run cannot have, before anything is read for it.

    Raises:
        ConfigError: it holds something already, or is a file.
        ResourceError: it cannot be made where it is to be.
    """
    _refuse_occupied(path)
    place_of(path, "Choose another --out.")


def _refuse_occupied(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path}: is a file, not a folder. Choose another --out.")
    if not path.exists() or not any(path.iterdir()):
        return
    if (path / "record.json").exists():
        raise ConfigError(f"{path}: holds a finished run. Choose another --out.")
    if (path / "run.json").exists():
        raise ConfigError(f"{path}: holds an unfinished run. Continue it with `luthier resume {path}`.")
    raise ConfigError(f"{path}: is not empty and holds no run. Choose another --out.")


def _read_run_json(path: Path) -> dict[str, Any]:
    if not (path / "run.json").is_file():
        raise ConfigError(f"{path}: holds no run (there is no run.json). Name a folder that `luthier train` made.")
    facts = _read_json(path / "run.json")
    if not isinstance(facts, dict) or facts.get("format") != "luthier-run":
        raise IntegrityError(f'{path / "run.json"}: is not luthier\'s (its "format" is not "luthier-run").')
    return migrate(facts, RUN_VERSION, RUN_MIGRATIONS, path / "run.json")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror}). Restore it from a copy.") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is not JSON ({error}). Restore it from a copy, or start a new run.") from error


def _as_toml(spec: Mapping[str, Any]) -> bytes:
    """The spec as TOML. TOML has no word for nothing, so fields that are nothing stand as comments at the top."""
    empty: list[str] = []

    def without_nothing(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            empty.extend(f"{name}{k}" for k, v in value.items() if v is None)
            return {k: without_nothing(v, f"{name}{k}.") for k, v in value.items() if v is not None}
        return value

    body = tomli_w.dumps(without_nothing(spec, ""))
    return ("".join(f"# {name}: nothing\n" for name in empty) + body).encode()
