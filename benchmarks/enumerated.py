"""Every place where a save, a prune or a run can be disturbed, tried one after another: run the tests and count.

    python benchmarks/enumerated.py                       runs them (ten minutes), counts into docs/reliability.md
    python benchmarks/enumerated.py --read A.xml B.xml    takes what `pytest -o junit_family=xunit1 --junitxml` wrote

A test notes what it has tried as a property `counted: WHAT, HOW`, after its last assertion.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import _marks

ROOT = Path(__file__).parents[1]
TESTS = (
    "test_durable_crashes.py",
    "test_store_damage.py",
    "test_loop_disk.py",
    "test_signals.py",
    "test_loop_resume.py",
)
MARK = "counted: "
FAMILY = ("-o", "junit_family=xunit1")  # the one that has properties


def count(reports: list[Path]) -> tuple[dict[tuple[str, str], int], list[str], int]:
    """(what, how) -> places; the tests that failed; how many passed.

    Args:
        reports: JUnit files, written by pytest here. Of a test that stands in several, the last one counts.
    """
    cases: dict[str, ElementTree.Element] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            cases[f"{case.get('classname')}::{case.get('name')}"] = case
    counts: dict[tuple[str, str], int] = {}
    failed, passed = [], 0
    for test, case in cases.items():
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(test)
            continue
        passed += 1
        for noted in case.iter("property"):
            name = noted.get("name") or ""
            if name.startswith(MARK):
                what, _, how = name.removeprefix(MARK).partition(", ")
                counts[what, how] = counts.get((what, how), 0) + int(noted.get("value") or 0)
    return counts, failed, passed


def main() -> int:
    """Exit code 1, and the page left as it is, where a test failed or nothing was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, nargs="+", default=[])
    reports: list[Path] = parser.parse_args().read
    with tempfile.TemporaryDirectory() as folder:
        if not reports:
            reports = [Path(folder) / "report.xml"]
            files = [str(ROOT / "tests" / "faults" / name) for name in TESTS]
            subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *FAMILY, f"--junitxml={reports[0]}", *files],
                cwd=ROOT,
            )
        counts, failed, passed = count(reports)
    if failed or not counts:
        print("\n".join(failed) or "nothing was counted", file=sys.stderr)
        return 1
    lines = ["| disturbed | by | places tried, all recovered |", "| --- | --- | --- |"]
    lines += [f"| {what} | {how} | {number:,} |" for (what, how), number in sorted(counts.items())]
    lines += [
        "",
        f"{sum(counts.values()):,} places in {len(counts)} ways; {passed} tests passed, none failed."
        " `python benchmarks/enumerated.py`.",
    ]
    print("\n".join(lines))
    _marks.write_block("enumerated", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
