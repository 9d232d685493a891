"""Reads hostile files in a process of its own, under limits and an audit hook; prints one line of JSON per file.

Started as `python -I reader.py FOLDER_OF_THE_SOURCES`; takes lines of [reader, path, folder] on its standard input.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

LIMIT_SECONDS = 1.0
LIMIT_BYTES = 256_000_000
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]


WATCHED = (
    *("socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pty.", "ctypes."),
    *("urllib.", "pickle.", "webbrowser."),
)


def peak() -> int:
    """Most bytes this program has held. Not ru_maxrss: that also counts what the parent held when it forked."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:", 1)[1].split()[0]) * 1024


class TooSlow(BaseException):
    """More than a second of processor time for one file."""


def main() -> None:
    import _strptime  # noqa: F401  # imports that the standard library makes late
    import encodings.idna  # noqa: F401
    import glob  # noqa: F401
    import stringprep  # noqa: F401

    import yaml  # noqa: F401

    from luthier import trust
    from luthier.core import LuthierError
    from luthier.trust import _child

    assert "torch" not in sys.modules and "jinja2" not in sys.modules and "pickle" not in vars(trust)
    script = _child.__file__
    seen: list[str] = []
    allowed: list[str] = []  # the folder that may be written in

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not allowed:
            return
        # marshal.load(s) is not in the list: the standard library's own late imports are made of it.
        if event.startswith(WATCHED):
            seen.append(event)
        elif event == "subprocess.Popen":
            if list(args[1])[:3] != [sys.executable, "-I", script]:
                seen.append(f"{event} {args[1]}")
        elif event == "import":
            top = str(args[0]).split(".", 1)[0]
            if top not in sys.stdlib_module_names and not str(args[0]).startswith("luthier.trust"):
                seen.append(f"import {args[0]}")
        elif event == "open" and isinstance(args[0], str | bytes):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                place = os.path.realpath(os.fsdecode(args[0]))
                if not Path(place).is_relative_to(allowed[0]) and place != os.devnull:
                    seen.append(f"write {place}")
        elif event in (
            "os.remove",
            "os.rename",
            "os.link",
            "os.symlink",
            "os.mkdir",
            "os.rmdir",
            "os.chmod",
            "os.truncate",
        ):
            targets = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            relative = (
                isinstance(args[-1], int) and args[-1] > 2 and event in ("os.remove", "os.rmdir")
            )  # below a folder's handle
            for target in targets:
                if not relative and not Path(os.path.realpath(os.fsdecode(target))).is_relative_to(allowed[0]):
                    seen.append(f"{event} {target!r}")

    def too_slow(signum: int, frame: FrameType | None) -> None:
        raise TooSlow

    def attempt(reader: str, path: str, folder: str) -> None:
        settings = ("rank", "alpha")
        if reader == "safetensors":
            trust.safetensors.check_header(path)
        elif reader == "gguf":
            trust.gguf.check(path)
        elif reader == "archive":
            trust.archive.extract(path, Path(folder) / "target")
        elif reader in ("json", "toml", "yaml"):
            {"json": trust.config.read_json, "toml": trust.config.read_toml, "yaml": trust.config.read_yaml}[reader](
                path, settings
            )
        elif reader == "template":
            trust.template.render(Path(path).read_text(encoding="utf-8"), TALK)
        elif reader in ("jsonl", "csv", "parquet"):
            trust.row_files.read(path, require=["text"])
        elif reader == "model":
            trust.model.check_folder(path)
        elif reader == "pickle":
            trust.convert.pickle_to_safetensors(path, Path(folder) / "target.safetensors")
        else:
            raise ValueError(reader)

    sys.addaudithook(hook)
    signal.signal(signal.SIGPROF, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    for line in sys.stdin:
        reader, path, folder = json.loads(line)
        seen.clear()
        os.chdir(folder)
        allowed[:] = [os.path.realpath(folder)]
        answer = {"path": path, "refused": False, "error": "", "code": 0}
        before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        try:
            attempt(reader, path, folder)
        except LuthierError as error:
            answer |= {"refused": True, "error": f"{type(error).__name__}: {error}", "code": error.exit_code}
        except TooSlow:
            answer["error"] = "too slow"
        except BaseException as error:  # whatever it is, the test must hear of it
            answer["error"] = f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            allowed.clear()
        answer["seen"] = list(seen)
        answer["seconds"] = time.process_time() - before[0]
        answer["child_seconds"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before[1]
        answer["peak"] = peak()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
