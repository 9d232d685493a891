"""Write docs/support-matrix.md, some methods at a time: what is finished is not run again.

Every cell of the contract takes half an hour of a processor. Cells are kept in build/contract-cells, under a digest of
the code that they are about; once that changes, all are made anew.

    make matrix
    python scripts/matrix.py --slice 4 --only lora
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/support-matrix.md"
HELD = ROOT / "build/contract-cells"


def digest_of(root: Path) -> str:
    """One word for all code that decides how a cell comes out."""
    paths = sorted([*(root / "src").rglob("*.py"), *(root / "tests/contracts").glob("*.py"), *root.glob("tests/*.py")])
    summed = hashlib.sha256()
    for path in paths:
        summed.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return summed.hexdigest()[:16]


def left(names: list[str], held: Path) -> list[str]:
    """The methods without a cell in `held`."""
    done = {cell[0] for cell in json.loads(held.read_text("utf-8"))} if held.exists() else set()
    return [name for name in names if name not in done]


def command(held: Path, methods: list[str], page: Path | None = None) -> list[str]:
    """What runs all cells of some methods, and adds them to `held`."""
    words = [sys.executable, "-m", "pytest", "-q", "tests/contracts/test_every_method.py", "-m", "not gpu"]
    words += ["--cells", str(held), "--methods", ",".join(methods)]
    return [*words, "--matrix", str(page)] if page else words


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--slice", type=int, default=16, help="methods in one process")
    words.add_argument("--only", action="append", help="a method; may be repeated. The page is not written")
    given = words.parse_args()
    from luthier.surgery import METHODS

    for name in given.only or ():
        METHODS.get(name)  # refuses an unknown one
    HELD.mkdir(parents=True, exist_ok=True)
    held = HELD / f"{digest_of(ROOT)}.json"
    todo = left(given.only or METHODS.names(), held)
    for at in range(0, len(todo), given.slice):
        some = todo[at : at + given.slice]
        last = at + given.slice >= len(todo) and not given.only
        print(f"{at} of {len(todo)} methods: {', '.join(some)}", flush=True)
        code = subprocess.run(command(held, some, PAGE if last else None), cwd=ROOT).returncode
        if code not in (0, 1):  # 1: a cell failed, which the page says; else no cell was run
            return code
    return 1 if any(cell[3] not in ("passed", "refused") for cell in json.loads(held.read_text("utf-8"))) else 0


if __name__ == "__main__":
    raise SystemExit(main())
