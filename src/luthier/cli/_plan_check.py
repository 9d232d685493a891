"""`luthier plan --check`: what forecasts of finished runs were worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.cli._output import screen
from luthier.cli._plan_screen import spread
from luthier.core import human_bytes, plain, several

__all__ = ["check_runs"]


def check_runs(folder: str, real_steps: bool) -> None:
    """What forecasts of finished runs were worth."""
    from luthier.core import ConfigError
    from luthier.forecast import committed, leave_out, residuals
    from luthier.workflow.forecasts import pairs_of

    home = Path(folder)
    if not home.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Name one with finished runs: luthier plan runs --check.")
    with screen().busy("forecasting again"):
        pairs, times, silent = pairs_of([home], real_steps=real_steps)
    if not pairs and not silent:
        raise ConfigError(f"{folder}: no finished runs lie in it or below it. Name a folder that holds some.")
    known = committed()
    made, found = leave_out(pairs, known), residuals(pairs, known)
    screen().result({
        "pairs": [plain(pair) for pair in pairs], "intervals": [one and plain(one) for one in made],
        "silent": {str(path): why for path, why in silent.items()},
        "residuals": plain(found) if found is not None else None,
        "times": {how: _of_times(how, times) for how in ("counted", "probed", "loading")},
    })  # fmt: skip
    rows = [
        (Path(p.model).name, p.method, f"{p.rows} x {p.tokens}", spread(one), human_bytes(p.measured),
         f"{p.measured / (one.likely if one else p.forecast) - 1:+.0%}")
        for p, one in zip(pairs, made, strict=True)
    ]  # fmt: skip
    head = ("model", "method", "batch", "forecast", "measured", "off")
    screen().table(head, rows, right=head[2:], whole=head)
    if silent:
        screen().show(f"\n{several(len(silent), 'run')} cannot be compared:")
        screen().table(("run", "reason"), [(str(path), why) for path, why in silent.items()])
    if found is None:
        screen().show(f"\n{several(len(pairs), 'run')}; of other methods too few are known, or far smaller ones.")
        _show_times(times)
        return
    screen().show(
        f"\n{several(found.n, 'run')} with an interval. Median error {found.median_error:.1%}; {found.covered:.0%} "
        f"inside; {found.above:.0%} above it, which are the forecasts that were too low.\n"
        "Each interval is made from the runs of other methods, those of luthier's own grid among them."
    )
    _show_times(times)


def _of_times(how: str, times: Sequence[Any]) -> dict[str, Any]:
    """The pairs of one way of forecasting seconds, each with its interval from others, and what those were worth."""
    from luthier.forecast import committed_times, residuals_of_times, spans_left_out

    own, known = [p for p in times if p.how == how], committed_times()
    return {
        "pairs": [plain(pair) for pair in own],
        "intervals": [one and plain(one) for one in spans_left_out(own, known)],
        "residuals": plain(residuals_of_times(own, known)),
    }  # fmt: skip


def _show_times(times: Sequence[Any]) -> None:
    """What forecasts of seconds were worth, a line for each way."""
    from luthier.forecast import committed_times, residuals_of_times

    said = {"counted": "a step, over measured rates", "probed": "a step, from real steps", "loading": "loading"}
    rows = []
    for how, words in said.items():
        own = [p for p in times if p.how == how]
        if not own:
            continue
        off = sorted(p.measured / p.forecast for p in own)
        made = residuals_of_times(own, committed_times())
        judged = (f"{made.median_error:.0%}", f"{made.covered:.0%}", f"{made.above:.0%}") if made else ("?", "?", "?")
        rows.append((words, len(own), f"{off[len(off) // 2]:.2f}", *judged))
    if rows:
        head = ("seconds of", "runs", "measured / forecast", "median error", "inside", "above")
        screen().show()
        screen().table(head, rows, right=head[1:])
        screen().show("A question mark: fewer than 19 runs of other methods are known.")
