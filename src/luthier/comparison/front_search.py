"""The search for a front as runs of a comparison: each configuration one cell, on rows of the training half alone.

`front.json` keeps what was asked, in order, with what came of it, and is written after each batch. A search that was
killed asks the same again and finds the answers in the ledger. The test half is read by the final runs of the front
alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.comparison.cells import Cell, Entrant, Sweep, cells_of
from luthier.comparison.front import BATCH, Config, Space, Tried, area, front_of, propose
from luthier.comparison.search import Announcing, Asked
from luthier.comparison.tuning import rows_of
from luthier.core import ConfigError, LuthierError, human_count, several
from luthier.runs import durable
from luthier.workflow.load_model import empty_model, find_model

__all__ = ["FRONT_FILE", "LEAST", "Front", "Fronted", "check_front", "search_front", "with_test"]

FRONT_FILE = "front.json"
LEAST = 4
METHOD = "autopeft"


@dataclass(frozen=True)
class Front:
    """A search with `n` runs of the space that `space_of` reads from a model's structure."""

    n: int
    space_of: Callable[[Any], Space]


@dataclass(frozen=True)
class Fronted:
    """The configurations of the front, smallest first, and what may be said of the search."""

    entrants: tuple[Entrant, ...]
    findings: tuple[str, ...]


def check_front(n: int, entrants: Sequence[Entrant], tune_lr: int | None, raced: bool) -> None:
    """Refuse what cannot be searched, before work starts.

    Raises:
        ConfigError: another method, settings that the search sets, too few runs, or two searches at once.
    """
    if n < LEAST:
        raise ConfigError(f"--front {n}: give at least {LEAST} runs; the authors of the search make 200.")
    names = [e.name for e in entrants]
    if names != [METHOD]:
        raise ConfigError(
            f"--front searches layers and sizes of {METHOD}, and {', '.join(names) or 'no method'} is named. Write "
            f"--method {METHOD}, without settings; compare what it finds with other methods in another folder."
        )
    if tune_lr is not None or raced:
        raise ConfigError("--front: takes no --tune-lr and no --race. Set one rate for all with --lr.")


def search_front(
    asked: Asked, space_of: Callable[[Any], Space], sweep: Sweep, say: Callable[[str], None], announcing: Announcing,
    seed: int = 0,
) -> Fronted:  # fmt: skip
    """Make the runs that are not finished, and hand back the front.

    Args:
        asked: `n` runs in all, half of them drawn at random.
        space_of: reads the space from the model's structure.

    Raises:
        ConfigError: the folder holds another search.
        LuthierError: no configuration has a result.
    """
    space = space_of(empty_model(find_model(asked.base.model), asked.data.task))
    # What always gives one answer is worth nothing, however small.
    floor = 1 / len(asked.data.task.labels) if asked.metric == "accuracy" else 0.0
    spec = replace(asked.base, data=rows_of(asked.base, sweep.ledger.home, asked.data), out=None)
    search = {
        "seed": seed, "sizes": list(space.sizes), "layers": space.layers, "floor": floor, "metric": asked.metric,
        "runs": spec.digest(),
    }  # fmt: skip
    path = sweep.ledger.home / FRONT_FILE
    before = _before(path, search)
    initial = -(-asked.n // 2)
    say(
        f"front: {asked.n} of {space.choices():,} configurations, one run each, on rows of the training half; the test "
        "half is not read"
    )
    tried: list[Tried] = []
    areas: list[float] = []
    why: dict[Path, str] = {}
    while len(tried) < asked.n:
        n = min(initial - len(tried) if len(tried) < initial else BATCH, asked.n - len(tried))
        configs = before[len(tried) : len(tried) + n] or propose(space, tried, n, seed, initial, floor)
        if not configs:
            say(f"front: after {several(len(tried), 'configuration')} no other was found")
            break
        cells = [_cell(spec, space, config, sweep.ledger.home) for config in configs]
        failures = sweep.settle(cells, announcing(say, len(cells), sweep.standing(cells)))
        why |= {path: failure.message for path, failure in failures.items()}
        for config, cell in zip(configs, cells, strict=True):
            told = sweep.ledger.result(cell.id)
            score = None if told is None else float(told["scores"][asked.metric])
            tried.append(Tried(config, space.count(config), score))
        areas.append(area(tried, space.whole(), floor))
        found = front_of(tried)
        # What an interrupted call had asked beyond this must not be lost by writing less.
        kept = [_plain(space, t) for t in tried] + [
            _plain(space, Tried(c, space.count(c), None)) | {"open": True} for c in before[len(tried) :]
        ]
        durable.write_json(
            path, {"search": search, "tried": kept, "areas": areas, "front": [_plain(space, t) for t in found]}
        )
        say(f"front: {several(len(tried), 'run')}, {len(found)} on the front, area {areas[-1]:.4f}")
    found = front_of(tried)
    if not found:
        raise LuthierError(f"front: no configuration has a result. {next(iter(why.values()), '')}")
    return Fronted(tuple(_entrant(space, t.config) for t in found), tuple(_findings(tried, found, asked.metric)))


def with_test(home: Path, scores: Mapping[str, float]) -> None:
    """Write beside each configuration of the front what its final runs scored on the test half."""
    told = json.loads((home / FRONT_FILE).read_bytes())
    for one in told["front"]:
        one["test"] = scores.get(one["name"])
    durable.write_json(home / FRONT_FILE, told)


def _entrant(space: Space, config: Config) -> Entrant:
    settings = space.settings(config)
    return Entrant(":".join([METHOD, *(f"{name}={value}" for name, value in settings.items())]), METHOD, settings)


def _cell(spec: Any, space: Space, config: Config, home: Path) -> Cell:
    return cells_of(spec, [_entrant(space, config)], [0], home, under="front")[0]


def _plain(space: Space, one: Tried) -> dict[str, Any]:
    return {
        "name": _entrant(space, one.config).name, "trained": one.count, "score": one.score,
        "layers": [int(on) for on in one.config.layers], "sizes": list(one.config.sizes),
    }  # fmt: skip


def _before(path: Path, search: dict[str, Any]) -> list[Config]:
    """What an earlier call asked, in order."""
    if not path.is_file():
        return []
    try:
        told = json.loads(path.read_bytes())
        same = told["search"] == search
        asked = [Config(tuple(map(bool, one["layers"])), tuple(one["sizes"])) for one in told["tried"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read. Delete it; finished runs are found again.") from error
    if not same:
        raise ConfigError(
            f"{path}: is of another search (another model, metric, steps or rate). Search into another folder."
        )
    return asked


def _findings(tried: Sequence[Tried], found: Sequence[Tried], metric: str) -> list[str]:
    failed = sum(t.score is None for t in tried)
    lines = [
        f"Of {several(len(tried), 'configuration')}, {len(found)} are on the front: {human_count(found[0].count)} "
        f"trained numbers with {metric} {found[0].score:.3f} to {human_count(found[-1].count)} with "
        f"{found[-1].score:.3f}, on rows that chose them. Scores below are of the test half, which did not."
    ]
    if failed:
        lines.append(f"{several(failed, 'configuration')} failed; front.json says which.")
    return lines
