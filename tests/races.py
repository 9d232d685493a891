"""Little comparisons, whose runs are made in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path

from little import little_data, little_model

from luthier.comparison.cells import Cell, Failure, finished
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.workflow import train

__all__ = ["base_in", "here"]


def base_in(folder: Path) -> RunSpec:
    return RunSpec(
        model=str(little_model(folder / "bert", "bert")), data=DataSpec(source=str(little_data(folder / "rows.csv"))),
        steps=1, batch=BatchSpec(size=8), precision="fp32", threads=1,
    )  # fmt: skip


def here(done: list[str], fail: str = "") -> Callable[..., dict[Path, Failure]]:
    """In place of processes: the cells one after another in this one."""

    def run(
        cells: Sequence[Cell], workers: int, said: Callable[[Cell, Failure | None], None], threads: int | None = None
    ) -> dict[Path, Failure]:
        failures = {}
        for cell in cells:
            if finished(cell):
                continue
            failure = Failure("it may not", 3) if cell.entrant.method == fail else None
            if failure is None:
                train(cell.spec, progress=False)
                done.append(cell.path.name)
            else:
                failures[cell.path] = failure
            said(cell, failure)
        return failures

    return run
