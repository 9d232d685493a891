"""Every file of the corpus, made, read by the reading process (`reader.py`), and what came of it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trust import corpus, reader


def ask(cases: list[corpus.Case], root: Path) -> dict[str, dict[str, Any]]:
    """Each case's name -> what the reading process said of it, with two answers more.

    wall: seconds from the question to the answer.
    left: names that lie in the file's folder, or around it, only since it was read.
    """
    found: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(
        [sys.executable, "-I", str(Path(reader.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for number, case in enumerate(cases):
            outer = root / str(number)
            folder = outer / "in"
            folder.mkdir(parents=True)
            path = case.make(folder)
            before = _listing(outer)
            begun = time.monotonic()
            process.stdin.write(json.dumps([case.reader, str(path), str(folder)]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            wall = time.monotonic() - begun
            assert line, f"the reading process died at {case.name!r} with {process.wait()}"
            found[case.name] = {**json.loads(line), "wall": wall, "left": sorted(_listing(outer) - before)}
            if path.is_file():
                path.unlink()
    return found


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
