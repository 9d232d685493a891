"""S2: how long it takes to refuse each file of the hostile corpus, and in how much memory.

    python benchmarks/hostile.py [--rounds 3]      figures into docs/reliability.md

The files are read by a process of its own, under the limits of the tests (tests/trust); the slowest round counts.
"""

import argparse
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]

import _marks  # noqa: E402
from trust import corpus, reader  # noqa: E402
from trust.asking import ask  # noqa: E402

from luthier.core import human_bytes  # noqa: E402


def rounds(times: int) -> list[dict[str, Any]]:
    """What the reading process said of each case, round after round."""
    found = []
    for number in range(times):
        root = Path(tempfile.mkdtemp(prefix="luthier-hostile-"))
        try:
            cases = corpus.cases()
            answers = ask(cases, root)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        for case in cases:
            found.append({**answers[case.name], "name": case.name, "reader": case.reader, "round": number})
    return found


def main() -> int:
    """Exit code 1 where a file was believed, or took more than a second or 256 MB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    times: int = parser.parse_args().rounds
    found = rounds(times)
    by_reader: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in found:
        by_reader[answer["reader"]].append(answer)
    lines = [
        "| kind | files | refused | slowest: seconds from question to answer | processor seconds | most memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, answers in sorted(by_reader.items()):
        slowest = max(answers, key=lambda a: float(a["wall"]))
        cpu = max(a["seconds"] + a["child_seconds"] for a in answers)
        peak = human_bytes(max(a["peak"] for a in answers))
        lines.append(
            f"| {kind} | {len(answers) // times} | {sum(a['refused'] for a in answers) // times}"
            f" | {slowest['wall']:.2f} ({slowest['name']}) | {cpu:.2f} | {peak} |"
        )
    refused = sum(a["refused"] for a in found)
    slow = [a for a in found if a["wall"] > reader.LIMIT_SECONDS]
    large = [a for a in found if a["peak"] > reader.LIMIT_BYTES]
    seen = [a for a in found if a["seen"] or a["left"]]
    lines += [
        "",
        f"{refused} of {len(found)} readings refused ({len(found) // times} files, {times} rounds), {len(slow)} took"
        f" more than {reader.LIMIT_SECONDS:g} s, {len(large)} more than {human_bytes(reader.LIMIT_BYTES)}; the audit"
        f" hook spoke {len(seen)} times. `python benchmarks/hostile.py`.",
    ]
    print("\n".join(lines))
    _marks.write_block("hostile", lines)
    return int(refused < len(found) or bool(slow or large or seen))


if __name__ == "__main__":
    raise SystemExit(main())
