"""What runs in a child process of `jail`: walls first, then one function, one line of JSON per question and answer.

This file is started by its path, not with `-m`, so that nothing of luthier's front page is imported in the child:
the package is put in place as an empty module with a search path, and `luthier.trust` likewise.

The walls, in the order they go up: limits of the kernel (address space, written bytes, open files, no core file), a
network namespace without network where the kernel allows one, and an audit hook that refuses sockets, processes,
foreign imports, and files other than those named. None of them is meant to hold code back that is already running;
they are there so that a mistake in a parser of ours stays a mistake.
"""

import codecs
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handler = Callable[[Any], Any]

# Imports that the standard library makes late, inside functions that we do call.
LATE = frozenset({"_strptime", "unicodedata", "_locale", "locale"})

# Found by import at their first use, which the walls would refuse.
CODECS = ("utf-8", "utf-8-sig", "ascii", "latin-1", "unicode_escape", "raw_unicode_escape", "cp437")

REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "ctypes.",
    "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "shutil.", "os.chmod", "os.chown", "os.link",
    "os.symlink", "os.kill", "os.putenv", "os.truncate", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
    "pickle.find_class", "marshal.load", "sys.settrace", "sys.setprofile", "mmap.", "tempfile.",
)  # fmt: skip


def raise_limits(bytes_: int, written: int) -> None:
    """Lower what the kernel grants this process. Processor time is limited per question, with a timer."""
    for which, most in (
        (resource.RLIMIT_AS, bytes_),
        (resource.RLIMIT_DATA, bytes_),
        (resource.RLIMIT_FSIZE, written),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        top = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (top, top))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def leave_the_network() -> bool:
    """Move into a network namespace of our own; False where the kernel does not let us."""
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        return bool(library.unshare(new_network) == 0 or library.unshare(new_user | new_network) == 0)
    return False


def seal(readable: tuple[str, ...], writable: str | None, seen: list[str]) -> None:
    """Put up the audit hook. What it refuses is also noted in `seen`, in case the refusal is caught."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    files = frozenset(os.path.realpath(path) for path in readable)
    folder = Path(os.path.realpath(writable)) if writable is not None else None

    def refuse(event: str) -> None:
        seen.append(event)
        raise PermissionError(f"the jail refuses {event}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            place = os.path.realpath(os.fsdecode(path))
            inside = folder is not None and Path(place).is_relative_to(folder)
            if not inside and (flags & writing or place not in files):
                refuse(f"opening {ascii(place)[:200]}")
        elif event == "import":
            if str(args[0]).split(".", 1)[0] not in LATE:
                refuse(f"importing {ascii(args[0])[:200]}")
        elif event.startswith(REFUSED_EVENTS):
            refuse(event)

    sys.addaudithook(hook)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # a stray print must not look like an answer
    os.dup2(null, 2)
    questions = sys.stdin.buffer
    order = json.loads(questions.readline())

    here = Path(__file__).resolve().parent
    for name, place in (("luthier", here.parent), ("luthier.trust", here)):
        package = types.ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package
    module, _, function = order["function"].partition(":")
    for name in order["preload"]:
        importlib.import_module(name)
    target = getattr(importlib.import_module(module), function)
    from luthier.core.errors import LuthierError

    for name in CODECS:
        codecs.lookup(name)
    offline = leave_the_network()
    raise_limits(order["bytes"], order["written"])
    seen: list[str] = []
    seal(tuple(order["readable"]), order["writable"], seen)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    def guarded(call: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
        value = None
        signal.setitimer(signal.ITIMER_PROF, order["seconds"])
        try:
            value = call()
            result: dict[str, Any] = {"value": None}
        except LuthierError as error:
            result = {"error": type(error).__name__, "message": str(error)[:20_000]}
        except MemoryError:
            result = {"error": "memory"}
        except RecursionError:
            result = {"error": "depth"}
        except Exception as error:  # the parent must hear of it, whatever it is: it raises Refused
            result = {"error": "other", "message": f"{type(error).__name__}: {ascii(str(error))[:500]}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if seen:
            result = {"error": "wall", "message": "; ".join(seen[:5])}
        return result, value

    result, handler = guarded(lambda: target(order["args"]))
    answer({**result, "offline": offline})
    if "error" in result:
        return
    while line := questions.readline():
        question = json.loads(line)
        result, value = guarded(lambda question=question: handler(question))  # type: ignore[misc]
        if "error" not in result:
            result = {"value": value}
        try:
            answer(result)
        except MemoryError:
            answer({"error": "memory"})


if __name__ == "__main__":
    main()
