"""Gather the fragments of changelog.d into CHANGELOG.md, under the version of luthier as it stands in the code.

    python scripts/changelog.py --date 2026-11-28             write (or write anew) the section of this version
    python scripts/changelog.py --date 2026-11-28 --remove    the same, and remove the fragments: the release is made

A fragment is `<short-name>.<added|changed|fixed>.md`. Its paragraphs and list items become items, ordered by name.
"""

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("added", "changed", "fixed")
TOP = """# Changelog

One small file per change lies in `changelog.d/`; `scripts/changelog.py` gathers them at a release.
"""


def fragments(folder: Path) -> dict[str, list[Path]]:
    """Kind -> its files, by name.

    Raises:
        SystemExit: a file whose name says no kind, or one that is empty: nothing is left out silently.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for path in sorted(folder.glob("*.md")):
        if path.name == "README.md":
            continue
        kind = path.name.removesuffix(".md").rpartition(".")[2]
        if kind not in KINDS or not path.read_text(encoding="utf-8").strip():
            sys.exit(f"{path}: a fragment is called <short-name>.<{'|'.join(KINDS)}>.md and is not empty. Mend it.")
        found[kind].append(path)
    return found


def items(text: str) -> list[str]:
    """The items of one fragment, each in one line: list items, or else paragraphs."""
    pieces = re.split(r"^- |\n\s*\n", text.strip(), flags=re.MULTILINE)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def section(version: str, day: str, found: dict[str, list[Path]]) -> str:
    """The section of one version."""
    lines = [f"## {version} - {day}", ""]
    for kind in KINDS:
        said = [item for path in found[kind] for item in items(path.read_text(encoding="utf-8"))]
        if said:
            lines += [f"### {kind.capitalize()}", "", *(f"- {item}" for item in said), ""]
    return "\n".join(lines)


def merged(old: str, version: str, new: str) -> str:
    """The changelog with the section of `version` replaced, or put before those of earlier versions."""
    parts = re.split(r"^(?=## )", old, flags=re.MULTILINE)[1:]
    rest = [part.rstrip() + "\n" for part in parts if not part.startswith(f"## {version} ")]
    return "\n".join([TOP, new, *rest]).rstrip() + "\n"


def version_of(root: Path) -> str:
    """What luthier calls itself."""
    text = (root / "src" / "luthier" / "__version__.py").read_text(encoding="utf-8")
    return text.partition('"')[2].partition('"')[0]


def main(words: list[str] | None = None, root: Path = ROOT) -> None:
    """Write CHANGELOG.md."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument(
        "--date", required=True, type=datetime.date.fromisoformat, help="day of the release, YYYY-MM-DD"
    )
    parser.add_argument("--remove", action="store_true", help="remove the fragments that were gathered")
    given = parser.parse_args(words)
    version, found, log = version_of(root), fragments(root / "changelog.d"), root / "CHANGELOG.md"
    paths = [path for kind in KINDS for path in found[kind]]
    if not paths:
        sys.exit(f"changelog.d: no fragment, so there is nothing to gather. {log.name} stays as it is.")
    log.write_text(merged(log.read_text(encoding="utf-8"), version, section(version, str(given.date), found)), "utf-8")
    for path in paths if given.remove else []:
        path.unlink()
    print(f"{log.name}: {version}, {len(paths)} fragments{' gathered and removed' if given.remove else ''}")


if __name__ == "__main__":
    main()
