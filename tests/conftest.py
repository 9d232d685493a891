"""What all tests share: how many threads they take, real samples where they are asked for, and the count of cells."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

# Whoever starts the tests in the background may have these signals ignored, which children inherit; tests send them.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# Before torch is imported anywhere: on few cores, threads that spin while they wait cost more than they bring.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two workers share the cores here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CELLS = pytest.StashKey["Cells"]()


class Cells:
    """The cells of the contract, method x architecture x check, as the reports of all processes bring them in."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], str] = {}
        self._worst: dict[str, str] = {}
        self.lines: list[str] = []  # what tests want to be read at the end of the run

    def hear(self, report: pytest.TestReport) -> None:
        worst = self._worst.get(report.nodeid, "passed")
        worst = self._worst[report.nodeid] = worst if worst != "passed" else report.outcome
        for name, value in report.user_properties:
            if name == "line" and report.when == "call":
                self.lines.append(str(value))
            if name == "cell":
                method, arch, check, said = (str(part) for part in value)  # type: ignore[attr-defined]
                self.rows[method, arch, check] = said if worst == "passed" and said else worst

    def add_from(self, path: Path) -> None:
        """Take over the cells of an earlier run that are not among these."""
        for method, arch, check, said in json.loads(path.read_text(encoding="utf-8")):
            self.rows.setdefault((method, arch, check), said)

    def save(self, path: Path) -> None:
        lines = [json.dumps([*cell, said]) for cell, said in sorted(self.rows.items())]
        beside = path.with_suffix(".new")
        beside.write_text("[" + ",\n".join(lines) + "]\n", encoding="utf-8")
        beside.replace(path)

    def count(self, outcome: str) -> int:
        return list(self.rows.values()).count(outcome)

    def summary(self) -> str:
        said = f"contract cells: {self.count('passed')} passed"
        others = sorted(set(self.rows.values()) - {"passed"})
        return ", ".join([said, *(f"{self.count(outcome)} {outcome}" for outcome in others)])

    def matrix(self) -> str:
        """A Markdown table: one row a method, one column an architecture, passed checks of all checks."""
        archs = sorted({arch for _, arch, _ in self.rows})
        lines = [
            "# Methods x architectures",
            "",
            "Checks of the contract that passed, of those that ran. Written by `make matrix`.",
            "",
            "| method | " + " | ".join(archs) + " |",
            "| --- |" + " --- |" * len(archs),
        ]
        for method in sorted({method for method, _, _ in self.rows}):
            cells = []
            for arch in archs:
                of = [outcome for (m, a, _), outcome in self.rows.items() if (m, a) == (method, arch)]
                refused = of.count("refused")
                cells.append(f"{of.count('passed')} of {len(of)}" + (f", {refused} refused" if refused else ""))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", f"In all, {self.summary()}.", ""])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the contract's cells there, as a Markdown table")
    parser.addoption("--cells", metavar="FILE", help="the contract's cells as JSON: these are added to what is there")
    parser.addoption("--methods", metavar="A,B", help="of the contract, the cells of these methods alone")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = Cells()
    config.pluginmanager.register(_Ear(config.stash[CELLS]), "contract-cells")


class _Ear:
    """Hears every report; under xdist the reports of all workers come to the one process that has no worker's input."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.cells.hear(report)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cells = config.stash[CELLS]
    for line in cells.lines:
        terminalreporter.write_line(line)
    if cells.rows:
        terminalreporter.write_line(cells.summary())
        held = config.getoption("--cells")
        if held:
            if Path(held).exists():
                cells.add_from(Path(held))
            cells.save(Path(held))
        target = config.getoption("--matrix")
        if target:
            Path(target).write_text(cells.matrix(), encoding="utf-8")
            terminalreporter.write_line(f"written to {target}")


@pytest.fixture
def record_cell(request: pytest.FixtureRequest) -> Any:
    """`record_cell(method, arch, check)` counts this test as one cell; with `said="refused"`, as a refusal."""

    def record(method: str, arch: str, check: str, said: str = "") -> None:
        request.node.user_properties.append(("cell", (method, arch, check, said)))

    return record


@pytest.fixture(scope="session")
def minilm_l6() -> Path:
    """The folder of the sample model, fetched where it is not there yet."""
    from luthier import samples

    return samples.model_path("minilm-l6")


@pytest.fixture(scope="session")
def trec6() -> Path:
    """The folder of the sample data."""
    from luthier import samples

    return samples.fetch("trec6")
