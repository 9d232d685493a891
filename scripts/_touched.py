"""Which tests enter which functions: pytest in a forked child of a process that has torch and transformers already."""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Touched", "child", "gather", "pytest_in", "warm_up"]

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = "not slow and not gpu and not samples"

Touched = dict[str, tuple[float, list[str]]]
"""A test -> its seconds, and the functions it entered as "training/schedule.py:factor" """


def warm_up() -> None:
    """Import what every test needs, but nothing of ours: each child imports that from its own copy."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT / "tests"))
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from tiny import TINY, class_of, tasks

    torch.set_num_threads(1)
    for name in TINY:
        for task in tasks(name):
            class_of(name, task)  # imports the file of the model
    assert "luthier" not in sys.modules


def child(act: Callable[[], int], cpu_seconds: float, log: Path) -> int:
    """Fork; the child does `act`, at most so many seconds of processor time, and ends with its code. Gives its id.

    Args:
        log: what it prints.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        limit = int(cpu_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 60))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(told, stream)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pytest_in(source: Path, words: list[str], plugin: Any) -> int:
    """Run pytest on the package below `source`."""
    import pytest

    os.environ["PYTHONPATH"] = str(source)  # of processes that tests start
    sys.path.insert(0, str(source))
    os.chdir(ROOT)
    import luthier

    if Path(str(luthier.__file__)).parents[1] != source:
        return 98
    words += ["-q", "-m", CHOSEN, "-p", "no:cacheprovider"]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that something has imported already
    return int(pytest.main(words, plugins=[plugin]))


class _Watch:
    """Notes the functions of ours that each test enters, and how long it takes."""

    def __init__(self, source: Path) -> None:
        self.below = f"{source}/luthier/"
        self.names: dict[Any, str | None] = {}
        self.entered: set[str] = set()
        self.found: Touched = {}
        self.failed: set[str] = set()

    def trace(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code not in self.names:
            path = code.co_filename
            ours = path.startswith(self.below)
            name = code.co_qualname
            while name.endswith(">") and "." in name:  # a comprehension, a lambda: the function around it
                name = name.rsplit(".", 2 if name.rsplit(".", 2)[-2] == "<locals>" else 1)[0]
            self.names[code] = f"{path[len(self.below) :]}:{name}" if ours else None
        known = self.names[code]
        if known is not None:
            self.entered.add(known)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.entered = set()
        self.start = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self.found[nodeid] = (round(time.process_time() - self.start, 4), sorted(self.entered))


def gather(test: str, source: Path, result: Path) -> int:
    """In a child: the tests of one file, each with what it entered, to `result`; those that ran, where time is up."""
    import threading

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt  # pytest ends in order

    signal.signal(signal.SIGXCPU, stop)

    watch = _Watch(source)
    threading.settrace(watch.trace)  # type: ignore[arg-type]
    sys.settrace(watch.trace)  # type: ignore[arg-type]
    pytest_in(source, [test], watch)
    sys.settrace(None)
    sound = {name: found for name, found in watch.found.items() if name not in watch.failed}
    result.write_text(json.dumps(sound))
    return 0
