"""Names of options stand whole in every help text, however narrow the terminal is.

Typer lays options out in a table of rich, which shortens whichever columns are widest: a name with three dots at its
end can be neither copied nor searched for. The other columns give way instead.
"""

from typing import Any

from rich.table import Table

__all__ = ["keep_names_whole"]


class _Named(Table):
    """A table whose columns of options are as wide as their longest name."""

    def add_row(self, *cells: Any, **more: Any) -> None:
        super().add_row(*cells, **more)
        for column, cell in zip(self.columns, cells, strict=False):
            column.overflow = "fold"
            if str(cell).startswith("--"):
                column.no_wrap = True


def keep_names_whole() -> None:
    """From now on typer makes its tables so."""
    from typer import rich_utils

    rich_utils.Table = _Named  # type: ignore[attr-defined]
