"""`luthier demo`: five methods on a real model and real questions, one table, and the cheapest of the best answers."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from luthier.cli._compare_runs import compare
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._spec_options import check_names
from luthier.core import Interrupted, LuthierError, human_bytes, human_count, human_seconds

__all__ = ["EPOCHS", "METHODS", "QUESTIONS", "command", "free_folder", "show_table"]

MODEL, DATA = "minilm-l6", "trec6"
METHODS = ("head_only", "bitfit", "ia3", "lora", "full")
EPOCHS = 2.0
BATCH = 32
QUESTIONS = ("How tall is the Eiffel tower?", "Who wrote Moby Dick?", "Where do penguins live?")


def command(
    method: Annotated[list[str] | None, typer.Option(help="Methods to compare, in place of the usual five.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows, for each method.")] = EPOCHS,
    seed: Annotated[int, typer.Option(help="Names every draw, the same for each method.")] = 0,
    out: Annotated[str | None, typer.Option(help="Folder for the runs. [default: runs/demo, or the next free]")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small real model to sort questions by their kind of answer, with five methods, and compare them.

    Fetches sample:minilm-l6 and sample:trec6 when they are not here yet.

    Examples:

      luthier demo

      luthier demo --method lora --method dora --method adalora

      luthier demo --json
    """
    from luthier import samples

    methods = list(dict.fromkeys(method or METHODS))
    for name in methods:
        check_names(name)
    for name in (MODEL, DATA):
        samples.fetch(name, progress=screen().say)
    sample = samples.load_sample(DATA)
    show = screen().show
    show(f"{DATA}: {len(sample.train)} questions to learn from, {len(sample.test)} held out. Ten of them:\n")
    screen().table(("question", "answer is"), [(row["text"], row["label"]) for row in sample.train[:10]])
    home = Path(out) if out is not None else free_folder(Path("runs") / "demo")
    show(
        f"\nTraining {MODEL} with {len(methods)} methods: the same rows in the same order, {epochs:g} passes, "
        f"seed {seed}.\nRuns go to {home}.\n"
    )
    runs = [_train(name, home / name, epochs, seed) for name in methods]
    show()
    show_table(runs)
    compared = compare(runs)
    show()
    for sentence in compared.sentences():
        show(sentence)
    best = next(run for run in runs if run["method"] == compared.kept)
    questions = _questions()
    screen().headline(f"\n{best['method']} says:\n")
    with screen().busy("answering"):
        from luthier.workflow import predict

        answers = predict(best["path"], texts=questions)
    screen().table(
        ("question", "answer is", "sure"),
        [(q, a["label"], f"{a['probabilities'][a['label']]:.0%}") for q, a in zip(questions, answers, strict=True)],
    )
    show(
        f"\nNext:\n"
        f'  luthier predict {home / best["method"]} --text "What is the capital of Peru?"\n'
        f"  luthier train sample:{MODEL} --data sample:sms-spam --method lora\n"
        f"  luthier train sample:{MODEL} --data YOUR.csv --method {best['method']}\n"
        f"  luthier methods"
    )
    screen().result(
        {
            "model": MODEL, "data": DATA, "rows": {"train": len(sample.train), "test": len(sample.test)},
            "epochs": epochs, "seed": seed, "folder": str(home), "runs": runs, "best": best["method"],
            "compared": {"not_told_apart": list(compared.best), "worse": list(compared.worse)},
            "answers": [{"question": q, **a} for q, a in zip(questions, answers, strict=True)],
        }
    )  # fmt: skip


def free_folder(wanted: Path) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ...: nothing is ever overwritten."""
    number, path = 1, wanted
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def show_table(runs: Sequence[dict[str, Any]]) -> None:
    """One row a method: what it reached and what it cost."""
    rows = [
        (
            run["method"], f"{run['scores']['accuracy']:.3f}", f"{run['scores']['macro_f1']:.3f}",
            human_count(run["trained"]), f"{run['share']:.2%}", human_seconds(run["seconds"]),
            human_bytes(run["peak_bytes"]) if run["peak_bytes"] else "?", human_bytes(run["stored_bytes"]),
        )
        for run in runs
    ]  # fmt: skip
    head = ("method", "accuracy", "macro-F1", "trained", "share", "seconds", "peak memory", "on disk")
    screen().table(head, rows, right=head[1:])


def _train(method: str, path: Path, epochs: float, seed: int) -> dict[str, Any]:
    """One run in a process of its own: a peak of memory is a process's, and would else be that of the largest method.

    Raises:
        LuthierError: with the exit code of the child; it has said why.
    """
    spec = {
        "model": f"sample:{MODEL}", "method": method, "epochs": epochs, "seed": seed, "out": str(path),
        "data": {"source": f"sample:{DATA}"}, "batch": {"size": BATCH}, "eval": {"every": 0},
    }  # fmt: skip
    words = [sys.executable, "-m", "luthier.cli._train_in_child", *([] if screen().lively else ["--plain"])]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = child.communicate(tomli_w.dumps(spec))
    except KeyboardInterrupt:
        # The terminal sent the signal to the child as well: let it make its last step safe.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=60)
        raise Interrupted(f"stopped by Ctrl-C. Go on with `luthier resume {path}`.", 2) from None
    if child.returncode != 0:
        error = LuthierError(f"{method}: the run in {path} failed; its message stands above.")
        error.exit_code = child.returncode if child.returncode > 0 else 128 - child.returncode  # type: ignore[misc]
        raise error
    facts: dict[str, Any] = json.loads(said)
    return facts


def _questions() -> list[str]:
    """Three questions: typed, where somebody is there to type; Enter takes the one that is offered."""
    if not (screen().lively and sys.stdin.isatty()):
        return list(QUESTIONS)
    screen().say("\nAsk three questions (Enter takes the one in brackets):")
    asked = []
    for offered in QUESTIONS:
        print(f"  [{offered}] ", end="", file=screen().err, flush=True)
        try:
            asked.append(sys.stdin.readline().strip() or offered)
        except UnicodeDecodeError:
            asked.append(offered)
    return asked
