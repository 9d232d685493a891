"""Child processes with walls: for parsers and templates that a foreign file can make slow, big or wrong.

A function of ours runs in a fresh interpreter (`-I`: no environment, no user site, no working folder on the path) with
limits on address space, processor time, written bytes and open files, without network, and behind an audit hook that
refuses sockets, processes, imports and files that were not named. Questions and answers are lines of JSON.
"""

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.core import LuthierError, Refused, errors, human_bytes
from luthier.trust._limits import Limits

__all__ = ["Child", "run"]

_SCRIPT = Path(__file__).with_name("_child.py")


class Child:
    """One jailed process that answers many questions; use it in a `with` block.

    Args:
        function: "module:name" of a function of ours that takes `args` and returns the handler of questions.
        args: plain values for it.
        what: named in messages, such as the file being read.
        seconds: of processor time, for each question.
        bytes_: of address space.
        readable: the files it may open.
        writable: the one folder it may write in.
        written: bytes of the largest file it may write.
        preload: modules that must be imported before the walls go up.
        answer_bytes: longest answer that is taken.

    Raises:
        Refused: the function did not get through its limits, or something in it was stopped by a wall.
        LuthierError: of the class that the function raised.
    """

    def __init__(
        self,
        function: str,
        args: Any,
        *,
        what: str,
        seconds: float = 1.0,
        bytes_: int = Limits.child_bytes,
        readable: Sequence[str] = (),
        writable: str | None = None,
        written: int = 0,
        preload: Sequence[str] = (),
        answer_bytes: int = 64_000_000,
    ) -> None:
        self.what = what
        self.seconds = seconds
        self.bytes = bytes_
        self.answer_bytes = answer_bytes
        self._waiting = b""
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        order = {
            "function": function,
            "args": args,
            "seconds": seconds,
            "bytes": bytes_,
            "written": written,
            "readable": list(readable),
            "writable": writable,
            "preload": list(preload),
        }
        try:
            self.offline = bool(self._exchange(order).get("offline"))
        except BaseException:
            self.close()
            raise

    def ask(self, question: Any) -> Any:
        """Send one question and return the handler's answer. Raises as the class does, and may end the child."""
        return self._exchange(question).get("value")

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    @property
    def alive(self) -> bool:
        """Whether it still takes questions."""
        return self._process.poll() is None

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            line = json.dumps(message).encode() + b"\n"
            while line:
                line = line[self._process.stdin.write(line) or 0 :]
        except BrokenPipeError:
            raise self._dead() from None
        # The real limit is the timer of processor time in the child, which a busy machine does not shorten.
        # This one is for a child that waits: on a signal, on a disk.
        deadline = time.monotonic() + 60 + 20 * self.seconds
        while b"\n" not in self._waiting[-1 << 16 :]:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise Refused(f"{self.what}: no answer within {60 + 20 * self.seconds:g} s; reading it was stopped.")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise self._dead()
            self._waiting += piece
            if len(self._waiting) > self.answer_bytes:
                self.close()
                raise Refused(f"{self.what}: its answer is longer than {human_bytes(self.answer_bytes)}; stopped.")
        line, _, self._waiting = self._waiting.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(str(answer["error"]), str(answer.get("message", "")))
        return answer

    def _error(self, kind: str, message: str) -> LuthierError:
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, LuthierError) and known is not errors.Interrupted:
            return known(message)
        self.close()
        if kind == "memory":
            return Refused(
                f"{self.what}: needs more than {human_bytes(self.bytes)} of memory; stopped. No honest file does."
            )
        if kind == "depth":
            return Refused(f"{self.what}: nested deeper than can be followed; stopped. No honest file is.")
        if kind == "wall":
            return Refused(
                f"{self.what}: tried something that reading never needs ({message}); stopped. Do not use it."
            )
        return Refused(
            f"{self.what}: cannot be read ({message}). It is damaged or hostile; take it from its source again."
        )

    def _dead(self) -> Refused:
        code = self._process.wait()
        self.close()
        if code == -27:  # SIGPROF: the timer of processor time
            return Refused(
                f"{self.what}: took more than {self.seconds:g} s of processor time; stopped. No honest file does."
            )
        return Refused(f"{self.what}: the process that read it ended with code {code}. It is damaged or hostile.")


def run(function: str, args: Any, question: Any = None, **options: Any) -> Any:
    """Ask one question of a fresh child and end it. Takes the options of `Child`, and raises as it does."""
    with Child(function, args, **options) as child:
        return child.ask(question)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
