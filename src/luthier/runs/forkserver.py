"""A template process with the slow imports done: a run of a comparison, or a crash of a test, is a fork of it.

    with Template() as template:
        outcome = template.run(__file__, "save_once", {"folder": str(folder)}, fault="save:7:kill")
        assert outcome.status == -signal.SIGKILL

Each run is a fork of the template: it shares its imports and dies alone. Requests and answers are JSON lines.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from luthier.core import LuthierError, ResourceError
from luthier.runs import durable
from luthier.runs.fault import parse_fault
from luthier.runs.parent import end_with_the_parent

__all__ = ["Outcome", "Template", "serve"]


@dataclass(frozen=True)
class Outcome:
    """How a forked run ended.

    Attributes:
        status: its exit code, or minus the number of the signal that killed it.
        output: what it wrote to stdout and stderr.
    """

    status: int
    output: str


class Template:
    """The warm process. Use it in a `with` block, or call `close`.

    Args:
        preload: modules to import once.
    """

    def __init__(self, preload: tuple[str, ...] = ("torch", "safetensors.torch", "luthier.runs")) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from luthier.runs.forkserver import serve; serve()", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._fork: int | None = None

    def run(
        self,
        file: str | Path,
        function: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fault: str = "",
        timeout_s: float | None = 60,
    ) -> Outcome:
        """Call `function(**arguments)` of the Python file `file` in a fork, and wait for its end.

        Args:
            fault: armed in the fork only, such as "save:7:kill".
            timeout_s: after so many seconds the fork is killed; None, never.

        Raises:
            ResourceError: the template itself has ended.
        """
        request = {
            "file": str(file),
            "function": function,
            "arguments": dict(arguments or {}),
            "fault": fault,
            "timeout_s": timeout_s,
        }
        return Outcome(**self._ask(request))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            begun = self._process.stdout.readline()
            self._fork = json.loads(begun)["pid"] if begun else None
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            self._fork = None
        if not answer:
            raise ResourceError("the template process has ended; its output above says why. Start a new Template.")
        told: dict[str, Any] = json.loads(answer)
        return told

    def warm(self, file: str | Path, function: str, arguments: Mapping[str, Any]) -> str:
        """Call a function in the template itself: what it imports, every later fork has.

        Returns:
            The error that it raised, in words, or nothing. Later forks are slower for it and may be none the worse.

        Raises:
            ResourceError: the template has ended.
        """
        told = self._ask({"file": str(file), "function": function, "arguments": dict(arguments), "here": True})
        return str(told["wrong"])

    @property
    def at_work(self) -> bool:
        """Whether a run has been forked and has not ended."""
        return self._fork is not None

    def signal(self, number: int) -> None:
        """Send a signal to the run at work, if there is one; from another thread than the one that waits for it."""
        if self._fork is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._fork, number)

    def close(self) -> None:
        """End the template."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _load(file: str, loaded: dict[str, ModuleType]) -> ModuleType:
    if file not in loaded:
        spec = importlib.util.spec_from_file_location(f"forked_{len(loaded)}", file)
        assert spec is not None and spec.loader is not None
        loaded[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[file])
    return loaded[file]


def _child(module: ModuleType, request: dict[str, Any], output: int) -> None:
    """Never returns."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request["fault"]:
            durable.install(parse_fault(request["fault"]))
        getattr(module, request["function"])(**request["arguments"])
        status = 0
    except LuthierError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        status = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def serve() -> None:
    """What the template process does: import the modules that its arguments name, then answer until stdin closes."""
    end_with_the_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the fork too: what it makes of it is the answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a fork must not inherit a pool of threads that it does not have
    loaded: dict[str, ModuleType] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("here"):
            print(json.dumps({"pid": None}), json.dumps({"wrong": _here(request, loaded)}), sep="\n", flush=True)
            continue
        with tempfile.TemporaryFile() as output:
            module = _load(request["file"], loaded)
            pid = os.fork()
            if pid == 0:
                _child(module, request, output.fileno())
            print(json.dumps({"pid": pid}), flush=True)
            within = request["timeout_s"]
            status = _wait(pid, time.monotonic() + within if within is not None else math.inf)
            output.seek(0)
            text = output.read().decode(errors="replace")
        print(json.dumps({"status": status, "output": text}), flush=True)


def _here(request: dict[str, Any], loaded: dict[str, ModuleType]) -> str:
    """Call a function in this very process; what went wrong, or nothing."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            getattr(_load(request["file"], loaded), request["function"])(**request["arguments"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wait(pid: int, deadline: float) -> int:
    pause = 0.001
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(0.05, 1.2 * pause)
