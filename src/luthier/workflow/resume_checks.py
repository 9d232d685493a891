"""What differs between two halves of a run: each field is refused or applied, each fingerprint refused or accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.core import ConfigError, IntegrityError, plain
from luthier.runs import Checkpoint, RunFolder
from luthier.runs.spec import RunSpec
from luthier.runs.spec_changes import changes
from luthier.workflow.preparation import Prepared

__all__ = ["apply", "check_changes", "compare_fingerprints"]


def apply(spec: RunSpec, changed: dict[str, Any]) -> RunSpec:
    """The spec with these dotted fields changed.

    Raises:
        ConfigError: no such field, or a value that cannot work.
    """
    values = plain(spec)
    for name, value in changed.items():
        at = values
        *parents, last = name.split(".")
        for parent in parents:
            at = at.get(parent) if isinstance(at, dict) else None
            if not isinstance(at, dict):
                raise ConfigError(f"{name!r} is no field of a run. `luthier train --help` lists them.")
        if last not in at:
            raise ConfigError(f"{name!r} is no field of a run; beside it there are {', '.join(at)}.")
        at[last] = value
        if name == "epochs" and value is not None:
            values["steps"] = None
        if name == "steps" and value is not None:
            values["epochs"] = None
    return RunSpec.from_plain(values)


def compare_fingerprints(
    run: RunFolder, prepared: Prepared, accepted: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Fingerprints of then and now; refuse what differs and was not accepted.

    Returns:
        a sentence for each difference, and the fingerprints that hold from now on.
    """
    if run.fingerprints.get("sources") != prepared.fingerprints.get("sources"):
        raise IntegrityError(
            f"{run.path}: the tunings that it is made of ({', '.join(prepared.spec.sources or ())}) are not those it "
            "began with. Restore them, or start a new run with `luthier train`."
        )
    words = {"train": "data", "select": "data", "test": "data", "model": "model", "tokenizer": "tokenizer"}
    kinds = {"model": "model", "also": "data"}
    words |= {n: kinds[kind] for n in prepared.fingerprints if (kind := n.partition(" ")[0]) in kinds}
    differs = [n for n, now in prepared.fingerprints.items() if run.fingerprints.get(n) != now]
    refused = [n for n in differs if n in words and words[n] not in accepted]
    if refused:
        named = list(dict.fromkeys(words[n] for n in refused))
        raise IntegrityError(
            f"{run.path}: {', '.join(named)} changed since the run began ({', '.join(refused)}). Restore what it was, "
            f"or go on with {' '.join(f'--accept-drift {n}' for n in named)}, which is recorded in the folder."
        )
    said = [f"{words[n]} changed since the run began ({n}): accepted" for n in differs if n in words]
    if "luthier" in differs:
        said.append(f"luthier {run.fingerprints.get('luthier')} -> {prepared.fingerprints['luthier']}")
    return said, {n: prepared.fingerprints[n] for n in differs}


def check_changes(run: RunFolder, old: RunSpec, new: RunSpec, checkpoint: Checkpoint | None) -> tuple[int, int] | None:
    """Hold every changed field against its rule.

    Returns:
        (epoch, step) from which rows are counted anew, where a field that changes the steps of an epoch has changed.

    Raises:
        ConfigError: a field that may not change, or not here.
    """
    begins = None
    for change in changes(old, new):
        if change.field == "out":
            raise ConfigError(
                f"{change}: a resumed run must keep out, its folder. Move the folder {change.old} and resume it there."
            )
        if change.rule == "exact":
            raise ConfigError(
                f"{change}: a resumed run must keep {change.field}; with another it would be another run. "
                "Start a new one with `luthier train`."
            )
        if change.rule == "boundary" and checkpoint is not None:
            state, per_epoch = checkpoint.state, int(checkpoint.state["steps_per_epoch"])
            epoch, first = state["origin"]
            epochs, inside = divmod(checkpoint.step - first, per_epoch)
            if inside:
                raise ConfigError(
                    f"{change}: may change only where an epoch begins; this run is at step {checkpoint.step}, the next "
                    f"epoch begins at {checkpoint.step - inside + per_epoch}. Leave {change.field} as it was."
                )
            begins = (int(epoch) + epochs, checkpoint.step)
    return begins
