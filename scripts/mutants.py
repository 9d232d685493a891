"""Change the code in small wrong ways, and see whether a test notices.

    make mutants                                        40 mutants of each room, two workers; about an hour
    make mutants ARGS="--only training/schedule.py"     of one file, or of a folder such as methods/additive
    make mutants ARGS="--survivors"                     those that survived the last time, against today's tests

A mutant is tried in a copy of the source, by the tests that enter its function, fastest first, in a process forked from
one that has torch and transformers already. A test is known to enter a function from a run of all tests, once; results
and that knowledge are kept in build/mutants, so a run that was stopped goes on. Which mutants are taken follows from
their own names and the seed alone, and a mutant that changes nothing is listed in scripts/mutants_known.toml with its
reason. The exit code is 1 where more than a twentieth of the mutants survived without one.
"""

import argparse
import compileall
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from _mutate import Mutant, mutants_of
from _touched import Touched, child, gather, pytest_in, warm_up

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "luthier"
ROOMS = ("data", "runs", "training", "surgery", "kernels", "methods")
TESTS = ("kernels", "runs", "training", "data", "surgery", "methods", "strategies", "contracts", "workflow", "faults")
KNOWN = ROOT / "scripts" / "mutants_known.toml"
HOME = ROOT / "build" / "mutants"
LONGEST = 900.0
"""seconds of a processor for the tests of one file, while it is found out what they enter"""
ALIKE = 6
"""of the cases of one test function, those tried: a test of every method on every model has hundreds"""


def candidates(only: list[str], seed: int, count: int) -> list[Mutant]:
    """The mutants of a run: of each room, or of each of `only`, the `count` whose names come first under the seed."""
    taken: list[Mutant] = []
    for place in only or ROOMS:
        paths = sorted((SOURCE / place).rglob("*.py")) if (SOURCE / place).is_dir() else [SOURCE / place]
        made = [m for path in paths for m in mutants_of(path, path.relative_to(SOURCE).as_posix())]
        made.sort(key=lambda m: hashlib.sha256(f"{seed}/{m.name}".encode()).digest())
        sound = (m for m in made if m.parses((SOURCE / m.file).read_bytes()))
        taken += islice(sound, count)
    return taken


def tests_for(mutant: Mutant, touched: Touched, seconds: float) -> list[str]:
    """The tests that enter its function, or its file where it stands outside any; those named after it come first."""
    wanted = f"{mutant.file}:{mutant.function}"
    if mutant.function:
        able = {t: s for t, (s, entered) in touched.items() if wanted in entered}
    else:
        able = {t: s for t, (s, entered) in touched.items() if any(e.startswith(f"{mutant.file}:") for e in entered)}
    stem = Path(mutant.file).stem
    chosen: list[str] = []
    spent, alike = 0.0, Counter[str]()
    for test in sorted(able, key=lambda t: (_far(t, stem), able[t], t)):
        function = test.partition("[")[0]
        if alike[function] >= ALIKE or spent + able[test] > seconds:
            continue
        alike[function] += 1
        spent += able[test]
        chosen.append(test)
    return chosen


def _far(test: str, stem: str) -> int:
    """0 for a test in the file named after the code or a case of that name, else 1."""
    path, _, name = test.partition("::")
    return int(Path(path).stem != f"test_{stem}" and not name.partition("[")[2].startswith((f"{stem}-", f"{stem}]")))


def digest(*paths: Path) -> str:
    """Of the bytes of some files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


@dataclass
class Slot:
    """A copy of the source in which one mutant at a time is tried."""

    folder: Path
    mutant: Mutant | None = None
    tests: list[str] = field(default_factory=list)
    pid: int = 0
    ends: float = 0.0

    @property
    def source(self) -> Path:
        return self.folder / "src"

    @property
    def said(self) -> Path:
        return self.folder / "failed.txt"


class _First:
    """Writes down the first test that failed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(f"{report.nodeid} (cannot be imported)")


def try_in(slot: Slot, mutant: Mutant, tests: list[str], seconds: float, patience: float) -> None:
    """Start the tests of a mutant."""
    target = slot.source / "luthier" / mutant.file
    target.write_bytes(mutant.applied((SOURCE / mutant.file).read_bytes()))
    slot.said.unlink(missing_ok=True)
    slot.mutant, slot.tests, slot.ends = mutant, tests, time.monotonic() + 10 * patience * (seconds + 60)
    act = partial(pytest_in, slot.source, ["-x", *tests], _First(slot.said))
    slot.pid = child(act, patience * (4 * seconds + 40), slot.folder / "log")


def outcome(slot: Slot, status: int) -> tuple[str, str]:
    """(what became of the mutant, by which test)."""
    assert slot.mutant is not None
    shutil.copyfile(SOURCE / slot.mutant.file, slot.source / "luthier" / slot.mutant.file)
    by = slot.said.read_text() if slot.said.exists() else ""
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return ("timed out" if late else "killed"), by or f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if code == 0:
        return "survived", ""
    return ("killed", by or f"pytest ended with code {code}") if code not in (5, 98, 99) else ("broken", f"code {code}")


def files_of(places: list[str]) -> list[Path]:
    """The test files in these folders of tests, or of these names."""
    found: list[Path] = []
    for place in places:
        path = ROOT / "tests" / place
        found += sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    if absent := [str(path) for path in found if not path.is_file()]:
        raise SystemExit(f"--tests: there is no {', '.join(absent)}. Give a folder or a file below tests.")
    return list(dict.fromkeys(found))


def learn(places: list[str], fresh: bool, workers: int) -> Touched:
    """What each test enters: from build/mutants where it is there and the test's file has not changed."""
    folder = HOME / "touched"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    files = files_of(places)
    kept = {path: folder / f"{path.parent.name}-{path.stem}-{digest(path)}.json" for path in files}
    waiting = [path for path in files if not kept[path].exists()][::-1]
    running: dict[int, Path] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                path = waiting.pop()
                act = partial(gather, str(path.relative_to(ROOT)), SOURCE.parent, kept[path])
                running[child(act, LONGEST, folder / f"{path.stem}.log")] = path
            pid, _ = os.waitpid(-1, 0)
            path = running.pop(pid)
            n = len(json.loads(kept[path].read_text())) if kept[path].exists() else 0
            say = f"{n} tests" if n else f"could not be run: {folder / path.stem}.log"
            print(f"{path.relative_to(ROOT)}: {say}", flush=True)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
    touched: Touched = {}
    for path in files:
        if not kept[path].exists():
            continue  # its tests kill nothing; tried again the next time
        touched |= {name: (found[0], found[1]) for name, found in json.loads(kept[path].read_text()).items()}
    return touched


def known() -> list[dict[str, str]]:
    """Mutants that change nothing, each with a reason."""
    return list(tomllib.loads(KNOWN.read_text(encoding="utf-8")).get("mutant", []))


def reason(mutant: Mutant, listed: list[dict[str, str]]) -> str | None:
    """Why nothing can notice this one, where that is known."""
    here = {"file": mutant.file, "function": mutant.function, "was": mutant.was, "becomes": mutant.becomes}
    for one in listed:
        if all(one[name] == value for name, value in here.items()) and int(one.get("nth", mutant.nth)) == mutant.nth:
            return one["reason"]
    return None


def report(results: dict[str, dict[str, Any]], chosen: list[Mutant]) -> int:
    """Print what became of the chosen mutants; 1 where too many survive unexplained."""
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    listed, open_ = known(), []
    for mutant in chosen:
        became = results.get(mutant.name, {}).get("became")
        if became is None:
            continue
        why = reason(mutant, listed) if became in ("survived", "no test") else None
        rooms[mutant.file.partition("/")[0]]["equivalent" if why else became] += 1
        if became in ("survived", "no test") and why is None:
            open_.append((mutant, became, len(results[mutant.name]["tests"])))
    for mutant, became, n in sorted(open_, key=lambda one: (one[0].file, one[0].line)):
        print(f"{mutant}   [{became}{f' {n} tests' if n else ''}]")
    for room, counts in sorted(rooms.items()):
        print(
            f"{room}: {sum(counts.values())} tried, " + ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
        )
    tried = sum(sum(counts.values()) for counts in rooms.values())
    print(f"in all {tried} tried, {len(open_)} survive unexplained")
    return int(len(open_) > 0.05 * tried)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], help="a file or folder below src/luthier; may be repeated"
    )
    parser.add_argument("--count", type=int, default=40, help="mutants of each room, or of each --only")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for one mutant, by their measured times")
    parser.add_argument(
        "--tests", action="append", help="only tests of this folder or file below tests; may be repeated"
    )
    parser.add_argument("--survivors", action="store_true", help="only those that survived before")
    parser.add_argument("--fresh", action="store_true", help="find out anew which tests enter which functions")
    parser.add_argument("--list", action="store_true", help="print the mutants, try none")
    given = parser.parse_args()
    chosen = candidates([place.removeprefix("src/luthier/") for place in given.only], given.seed, given.count)
    if given.list:
        print("\n".join(map(str, chosen)))
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    HOME.mkdir(parents=True, exist_ok=True)
    kept = HOME / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    lived = ("survived", "no test")

    def is_due(mutant: Mutant) -> bool:
        before = results.get(mutant.name)
        if given.survivors:
            return before is not None and before["became"] in lived and reason(mutant, listed) is None
        return before is None or before["source"] != digest(SOURCE / mutant.file) or before["became"] == "broken"

    listed = known()
    due = [mutant for mutant in chosen if is_due(mutant)]
    if due:
        warm_up()
        touched = learn(given.tests or list(TESTS), given.fresh, given.workers)
        with tempfile.TemporaryDirectory(prefix="luthier-mutants-") as scratch:
            go(due, touched, given, Path(scratch), results, kept)
    return report(results, chosen)


def go(
    due: list[Mutant], touched: Touched, given: argparse.Namespace, scratch: Path, results: dict[str, Any], kept: Path
) -> None:
    """Try the mutants, as many side by side as there are workers."""
    slots = [Slot(scratch / str(n)) for n in range(given.workers)]
    for slot in slots:
        shutil.copytree(SOURCE, slot.source / "luthier", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(slot.source, quiet=1)  # once: no child writes what it has compiled
    waiting, n = due[::-1], 0

    def note(mutant: Mutant, became: str, by: str, tests: list[str], seconds: float) -> None:
        nonlocal n
        n += 1
        results[mutant.name] = {
            "mutant": str(mutant), "became": became, "by": by, "tests": tests, "seconds": round(seconds, 1),
            "source": digest(SOURCE / mutant.file),
        }  # fmt: skip
        unfinished = kept.with_suffix(".new")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        unfinished.replace(kept)
        print(f"{n}/{len(due)} {became} in {seconds:.0f} s: {mutant}", flush=True)

    started: dict[int, float] = {}
    try:
        while waiting or any(slot.pid for slot in slots):
            for slot in slots:
                while waiting and not slot.pid:
                    mutant = waiting.pop()
                    tests = tests_for(mutant, touched, given.seconds)
                    if not tests:
                        note(mutant, "no test", "", [], 0.0)
                        continue
                    try_in(slot, mutant, tests, sum(touched[t][0] for t in tests), 1.0)
                    started[slot.pid] = time.monotonic()
            for slot in slots:
                if not slot.pid:
                    continue
                pid, status = os.waitpid(slot.pid, os.WNOHANG)
                if pid:
                    assert slot.mutant is not None
                    became, by = outcome(slot, status)
                    note(slot.mutant, became, by, slot.tests, time.monotonic() - started.pop(pid))
                    slot.pid = 0
                elif time.monotonic() > slot.ends:
                    os.killpg(slot.pid, signal.SIGKILL)  # told at the next turn
            time.sleep(0.05)
    finally:
        for slot in slots:
            if slot.pid:
                os.killpg(slot.pid, signal.SIGKILL)
                os.waitpid(slot.pid, 0)


if __name__ == "__main__":
    sys.exit(main())
