"""The page that the figures about durability go to, and the marks they stand between."""

from pathlib import Path

__all__ = ["PAGE", "read_block", "write_block"]

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def read_block(name: str) -> list[str]:
    """The lines between the marks of `name` on the page."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- begin {name} -->")
    return rest.partition(f"<!-- end {name} -->")[0].splitlines()


def write_block(name: str, lines: list[str]) -> None:
    """Replace what stands between the marks of `name` on the page."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE}: no marks {begin} and {end}; put them where the figures belong.")
    PAGE.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")
