"""One part in a process of its own: `python -m benchmarks.gpu.part JOB.json RESULT.json`.

A result is written anew after every fact, so that a part that is ended by its limit keeps what it had found.
"""

import importlib
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CONTESTANTS", "Record", "absent", "first_line", "installed", "main"]

ROOT = Path(__file__).parents[2]

Record = Callable[[str, dict[str, Any]], None]
"""Takes the name of a fact and its plain values; `ok` is False where something is wrong"""


def installed(library: str) -> bool:
    """Whether a library can be imported; it is not imported for this."""
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):  # half of it is there
        return False


CONTESTANTS = ("luthier", "peft", "peft + Liger", "luthier QLoRA")


def absent(who: str) -> str | None:
    """Why a contestant cannot take part here, or None."""
    if who == "luthier QLoRA" and not list((ROOT / "src" / "luthier" / "methods").rglob("qlora.py")):
        return "not built yet: no method keeps its base in four bits"
    needed = {"peft": ("peft",), "peft + Liger": ("peft", "liger_kernel")}.get(who, ())
    gone = [library for library in needed if not installed(library)]
    return f"not installed: {', '.join(gone)}" if gone else None


def first_line(error: BaseException) -> str:
    """An error as one line of a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def main(job: Path, result: Path) -> int:
    """Run the part and write what it records; 1 where something was wrong."""
    given = json.loads(job.read_text())
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "contracts")]  # tiny models and the contract's order
    facts: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()

    def record(name: str, values: dict[str, Any]) -> None:
        facts[name] = {**values, "at_second": round(time.perf_counter() - start, 1)}
        unfinished = result.with_suffix(".new")
        unfinished.write_text(json.dumps(facts))
        unfinished.replace(result)
        words = "ok" if values.get("ok", True) else "WRONG"
        print(f"  {name}: {values.get('missing') or values.get('note') or words}", flush=True)

    try:
        module = importlib.import_module(f"benchmarks.gpu.{given['module']}")
        getattr(module, given["function"])(record, **given["arguments"])
    except ModuleNotFoundError as error:
        record("import", {"ok": False, "missing": error.name or first_line(error), "error": first_line(error)})
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        record("the part itself", {"ok": False, "error": first_line(error)})
    return int(any(not values.get("ok", True) for values in facts.values()))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
