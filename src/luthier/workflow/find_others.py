"""Models that strategies ask beside the one that trains: found, held to their digest, refused where they do not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.surgery import read_tuning, tuning_files
from luthier.training.strategy import Strategy
from luthier.workflow.load_model import Source, find_model, load_config, load_tokenizer

__all__ = ["LABELLED", "Other", "find_others"]

LABELLED = ("classification", "regression")
"""Tasks in which a row has one answer: it is asked once, in the words of the other model's own tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Other:
    """One model that a strategy asks.

    Attributes:
        owner, role: the strategy, and the setting that names the model.
        run: the finished run that it is, where it is one.
        live: whether it is asked in every step, in the run's own tokens.
    """

    owner: str
    role: str
    name: str
    digest: str
    source: Source
    run: Path | None = None
    live: bool = False

    @property
    def setting(self) -> str:
        """The setting, as a spec has it."""
        return f"{self.owner}.{self.role}"


def find_others(strategies: Iterable[Strategy], task: Task, tokenizer: Any, n_vocab: int) -> tuple[Other, ...]:
    """Find every model that the strategies name. No weight is read.

    Raises:
        ConfigError: an unfinished run, other labels, another vocabulary.
        Any LuthierError: no such model.
    """
    found = []
    if task.template and any(one.models() for one in strategies):
        raise ConfigError(
            "a model beside the one that trains is asked for labels, and this run for words (data.template). Leave the "
            "template or the other model out."
        )
    for one in strategies:
        for role, name in one.models().items():
            other = _found(one.name, role, name, task)
            other = replace(other, live=one.live or task.name not in LABELLED)
            if other.live:
                _refuse_vocabulary(other, tokenizer, n_vocab)
            found.append(other)
    return tuple(found)


def _found(owner: str, role: str, name: str, task: Task) -> Other:
    setting, path = f"{owner}.{role}", Path(name).expanduser()
    if not (path / "run.json").is_file():
        source = find_model(name)
        if task.name in LABELLED or task.name == "token_classification":
            labels = tuple((getattr(load_config(source), "id2label", None) or {}).values())
            _refuse_labels(setting, name, labels, task)
        other = Other(owner=owner, role=role, name=name, digest=source.digest, source=source)
    else:
        run = RunFolder.open(path, write=False)
        if not run.tuning.exists():
            raise ConfigError(f"{setting}: {name} has no result yet. Go on with `luthier resume {name}`.")
        theirs = read_tuning(run.tuning)["task"]
        if theirs["name"] != task.name:
            raise ConfigError(
                f"{setting}: {name} learnt the task {theirs['name']}, and this run learns {task.name}. Name a run of "
                "the same task."
            )
        _refuse_labels(setting, name, tuple(theirs.get("labels", ())), task)
        source = find_model(RunSpec.from_plain(run.spec, where=f"{name}/run.json").model)
        digest = hashlib.sha256(f"{source.digest} {tuning_files.weights_digest(run.tuning)}".encode()).hexdigest()
        other = Other(owner=owner, role=role, name=name, digest=digest, source=source, run=path)
    return other


def _refuse_labels(setting: str, name: str, theirs: tuple[str, ...], task: Task) -> None:
    if theirs != task.labels:
        raise ConfigError(
            f"{setting}: {name} answers with the labels {', '.join(map(str, theirs[:8])) or 'none'}, and this run "
            f"learns {', '.join(task.labels[:8])}. Name a run on the same labels."
        )


def _refuse_vocabulary(other: Other, tokenizer: Any, n_vocab: int) -> None:
    """Token by token, answers can be compared only where tokens mean the same."""
    theirs = load_tokenizer(other.source).get_vocab()
    ours = tokenizer.get_vocab()
    differs = {word for word, _ in theirs.items() ^ ours.items()} - {tokenizer.pad_token}
    if differs:
        raise ConfigError(
            f"{other.setting}: {other.name} has another vocabulary ({len(differs)} tokens differ, such as "
            f"{min(differs)!r}), so its answers are about other tokens. Name a model of the same tokenizer."
        )
    size = getattr(load_config(other.source), "vocab_size", n_vocab)
    if size != n_vocab:
        raise ConfigError(
            f"{other.setting}: {other.name} gives {size} words a chance, and this model {n_vocab}. Name a model of the "
            "same vocabulary."
        )
