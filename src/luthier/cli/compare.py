"""`luthier compare`: several methods on the same rows, and what may be said of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli._method_names import method_names
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._spec_options import (
    check_names,
    complete_model,
    overlay,
    settings_of,
    spec_options,
    values_of,
)
from luthier.cli._verb import as_verb
from luthier.core import ConfigError, UsageError, human_bytes, human_count, human_seconds
from luthier.core.config import read_word
from luthier.runs.spec import RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True
WORDS = {"not told apart": "unclear"}
OWN = ("method", "seed", "out")  # fields of a run that a comparison sets for each of its runs

HELP = """Train several methods on the same rows with the same seeds, and say what the differences are worth.

Each method and seed is an ordinary run in the folder of the comparison. The same command goes on where it was stopped.

Examples:

  luthier compare sample:minilm-l6 --data sample:trec6 --method head_only,bitfit,ia3,lora

  luthier compare ./model --data rows.csv --method lora:rank=4,lora:rank=16 --seeds 6 --epochs 5

  luthier compare sample:minilm-l6 --data sample:trec6 --method family:additive --steps 200 --workers 2
"""

Model = Annotated[
    str, typer.Argument(help="A model folder, sample:NAME, or a hub name.", autocompletion=complete_model)
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAMES",
        help="Methods, with commas between: lora,ia3; lora:rank=4 with settings of its own; family:NAME; or all.",
    ),
]
Seeds = Annotated[int, typer.Option(help="Runs of each method. Claims over seeds need 6. [default: 3]", min=1)]
Score = Annotated[str, typer.Option("--metric", help="accuracy, macro_f1 or mcc. [default: accuracy]")]
Margin = Annotated[
    float | None,
    typer.Option(help="Differences below it do not matter. [default: twice the spread over seeds, at least 0.01]"),
]
Workers = Annotated[
    int,
    typer.Option(
        help="Runs at a time; 0, none here: `luthier worker --ledger FOLDER` makes them. [default: 1]", min=0, max=64
    ),
]
Search = Annotated[
    str,
    typer.Option(
        help="How --tune-lr chooses: grid; halving, which leaves the worse half early; optuna (pip install "
        "luthier[search]). [default: grid]"
    ),
]
Race = Annotated[
    bool,
    typer.Option(
        "--race",
        help="Race methods, sizes and rates: the worse half leaves at each rung, and the winner alone makes the final "
        "runs. --tune-lr says how many rates. [default: 3]",
    ),
]
BudgetWords = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="WORDS",
        help="steps=400 for every run; params=100k: each method as large as so many trained numbers allow; of a race "
        "also minutes=20 and memory=8GB. Several with commas between, or given several times.",
    ),
]
Front = Annotated[
    int | None,
    typer.Option(
        "--front",
        metavar="N",
        help="With --method autopeft: search its layers and sizes with N runs on rows of the training half, and "
        "compare the best of each size.",
    ),
]
Folds = Annotated[
    int | None,
    typer.Option(
        "--cv",
        metavar="N",
        help="Hold out each of N folds of the rows once, with near copies in one fold, in place of one held-out half: "
        "N times the runs.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option("--engine", help="Who makes the runs: local, or ray (pip install luthier[ray]). [default: local]"),
]
TuneLr = Annotated[
    int | None,
    typer.Option(
        "--tune-lr",
        metavar="N",
        help="First try N learning rates for each method, factors of about three around its own, on rows of the "
        "training half.",
    ),
]
Out = Annotated[str | None, typer.Option(help="Folder of the comparison. [default: runs/compare-MODEL-DATA]")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A field of all runs, such as optim.warmup=0.1."),
]


def command_for(words: Sequence[str] = ()) -> Callable[..., None]:
    """The verb with the fields of a run, but for those that each run has of its own, as its options."""
    options = [option for option in spec_options(RunSpec) if option.field not in (*OWN, "eval.metric")]

    def command(
        model: Model,
        *,
        method: Methods = None,
        seeds: Seeds = 3,
        metric: Score = "accuracy",
        margin: Margin = None,
        workers: Workers = 1,
        tune_lr: TuneLr = None,
        search: Search = "grid",
        race: Race = False,
        budget: BudgetWords = None,
        front: Front = None,
        cv: Folds = None,
        engine: EngineName = "local",
        out: Out = None,
        settings: Settings = None,
        as_json: AsJson = False,
        **given: Any,
    ) -> None:
        changes = values_of(options, given) | settings_of(settings or [])
        if "data.source" not in changes:
            raise UsageError("compare: no rows. Name them: --data FILE, or --data sample:trec6 to begin with.")
        words = [word for part in budget or () for word in part.split(",")]
        if any(word.partition("=")[0] in ("minutes", "memory") for word in words) and not race:
            raise UsageError(
                f"--budget {','.join(words)}: minutes and memory are what a race may take. Add --race; without it "
                "every method makes the same steps, and `luthier plan` says beforehand what each needs."
            )
        how = {"seeds": seeds, "metric": metric, "workers": workers, "tune_lr": tune_lr, "search": search}
        how |= {"engine": engine, "front": front, "cv": cv}
        _compare(model, method or [], changes, margin, out, words, {**how, "race": race})

    return as_verb(command, HELP, options)


command = command_for()


def _compare(
    model: str, methods: list[str], changes: dict[str, Any], margin: float | None, out: str | None,
    budget: list[str], how: dict[str, Any],
) -> None:  # fmt: skip
    names = method_names(methods)
    for name in names:
        check_names(
            name.partition(":")[0], model, changes["data.source"], changes.get("data.test"),
            strategy=changes.get("strategy"),
        )  # fmt: skip
    if margin is not None and not 0 < margin < 1:
        raise ConfigError(f"--margin {margin:g}: a share between 0 and 1, such as 0.01.")
    from luthier.cli._front_space import front_space
    from luthier.comparison import Front as FrontSearch
    from luthier.comparison import budget_of, compare, entrant_of

    allowed = budget_of(budget)
    if allowed.steps is not None:
        changes = changes | _as_steps(allowed.steps, changes)
    entrants = [entrant_of(name, read_word) for name in names]
    base = RunSpec.from_plain(overlay({"model": model, "data": {}}, changes))
    home = Path(out) if out is not None else _home(model, base.data.source)
    say = screen().say
    say(f"runs go to {home}; the same command goes on where it was stopped")
    raced = allowed if how.pop("race") else None
    how["front"] = None if how["front"] is None else FrontSearch(how["front"], front_space)
    found = compare(
        base,
        entrants,
        home=home,
        margin=margin,
        threads=_threads(how["workers"]),
        budget=raced,
        params=allowed.params,
        say=say,
        **how,
    )
    _show(found)
    if how["front"] is not None:
        _show_front(home)
    screen().show(f"\nAll numbers: {home / 'comparison.json'}")
    screen().show(f"Report: luthier report {home}")
    from luthier.core import plain

    screen().result({**plain(found), "folder": str(home)})


def _as_steps(steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The length of every run.

    Raises:
        UsageError: something else says how long runs are, or lets some end before others.
    """
    other = next((n for n in ("steps", "epochs", "eval.patience") if changes.get(n) is not None), None)
    if other is not None:
        option = f"--{other.rpartition('.')[2]}"
        raise UsageError(
            f"--budget steps={steps}: is the same steps for all, and {option} {changes[other]} says another length. "
            f"Leave one of the two out."
        )
    return {"steps": steps}


def _home(model: str, data: str) -> Path:
    ends = [Path(word.partition(":")[2] or word).name.split(".")[0] for word in (model, data)]
    return Path("runs") / f"compare-{'-'.join(ends)}"


def _threads(workers: int) -> int | None:
    """Of each process: several must not fight for the same cores."""
    if workers <= 1:
        return None
    import os

    return max(1, (os.cpu_count() or 1) // workers)


def _show(found: Any) -> None:
    """Findings in words first, then the table."""
    to = screen()
    to.show()
    for number, line in enumerate(found.findings):
        (to.headline if number == 0 else to.show)(line)
    to.show()
    rows = []
    for s in found.standings:
        gap = s.difference
        rows.append((
            s.name, f"{s.score:.3f}", f"{_spread(s.scores):.3f}" if len(s.scores) > 1 else "",
            f"{gap.value:+.3f}" if gap else "", f"{_short(gap.low)}..{_short(gap.high)}" if gap else "",
            WORDS.get(s.word, s.word), human_count(s.costs.trained), human_seconds(s.costs.seconds),
            human_bytes(s.costs.peak_bytes) if s.costs.peak_bytes else "?",
        ))  # fmt: skip
    rows += [(name, "failed", *[""] * 7) for name in found.failed]
    head = ("method", found.metric, "±", "behind", "95 %", "", "trained", "time", "peak")
    to.table(head, rows, right=("trained", "time", "peak", "±"), whole=head)
    _show_folds(found)
    _show_sureness(found)
    beside = "; ".join(f"{name} {value:.3f}" for name, value in found.baselines.items())
    to.show(f"\nOn the same rows: {beside}. Trained numbers are those beside the head.")


def _show_folds(found: Any) -> None:
    """How the score differs from fold to fold."""
    if found.folds:
        head = ("method", *(f"fold {i}" for i in range(1, found.folds + 1)))
        rows = [(s.name, *(f"{score:.3f}" for score in s.fold_scores)) for s in found.standings]
        screen().show(f"\n{found.metric} on the rows of each fold, means over seeds:")
        screen().table(head, rows, right=head[1:], whole=head)


def _show_front(home: Path) -> None:
    """The smallest configuration first: what each more number buys."""
    told = json.loads((home / "front.json").read_bytes())
    rows = [
        (one["name"].partition(":")[2], human_count(one["trained"]), f"{one['score']:.3f}",
         f"{one['test']:.3f}" if one["test"] is not None else "failed")
        for one in told["front"]
    ]  # fmt: skip
    screen().show("\nThe front, on the rows that chose it and on those that did not:")
    screen().table(("autopeft:", "trained", "chosen by", "test"), rows, right=("trained", "chosen by", "test"))
    screen().show(f"All that was tried: {home / 'front.json'}")


def _show_sureness(found: Any) -> None:
    """How well certainty fits, and at a fitted temperature where the runs have one."""
    told = [s for s in found.standings if s.nll is not None]
    if not told:
        return
    to = screen()
    head = ["ECE", "Brier", "NLL"]
    fitted = all(s.temperature is not None for s in told)
    if fitted:
        head += ["T", *(f"{name} at T" for name in head)]
    rows = []
    for s in told:
        values = [s.calibration_error, s.brier, s.nll]
        if fitted:
            values += [s.temperature, s.calibrated_calibration_error, s.calibrated_brier, s.calibrated_nll]
        rows.append((s.name, *(f"{value:.3f}" for value in values)))
    to.show("\nHow far answers are from being as sure as they are right; lower is better:")
    to.table(("method", *head), rows, right=tuple(head), whole=("method", *head))
    if fitted:
        to.show("T: the temperature fitted on rows held out to select by, a mean over seeds; no answer changes.")


def _short(value: float) -> str:
    """-.012 for -0.012: the table has little room."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def _spread(scores: Sequence[float]) -> float:
    mean = sum(scores) / len(scores)
    return float((sum((v - mean) ** 2 for v in scores) / (len(scores) - 1)) ** 0.5)
