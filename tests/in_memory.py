"""The real loop on tiny models, with its checkpoints in memory: a cell of the contract costs some steps and no disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fillers import filler, t5, writer
from little import little_data, little_model, little_spec
from torch import Tensor
from word_tables import WORDS

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.surgery import compose
from luthier.training import STRATEGIES, Listener
from luthier.training.loop import Loop
from luthier.training.strategy import split_settings, strategies
from luthier.training.strategy_fits import refuse_task
from luthier.workflow import train
from luthier.workflow.build import build
from luthier.workflow.find_others import find_others
from luthier.workflow.load_model import empty_model
from luthier.workflow.preparation import Prepared, prepare

__all__ = ["Runs", "alike", "same"]

ASKED = {"bert": filler, "llama": writer, "t5": t5}
TEMPLATES = {"bert": "{text} ! it is {mask} .", "llama": "{text} ! it is {mask}", "t5": "{text} ! it is {mask} ."}
PIECES = BatchSpec(size=4, tokens=32, accumulate=2)  # several micro-batches to a step
State = tuple[dict[str, dict[str, Tensor]], str]


class _Nowhere:
    """A run's folder that keeps nothing but the lines of its log."""

    path = Path("nowhere")

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def event(self, kind: str, **facts: Any) -> None:
        self.rows.append({"event": kind, **facts})

    def truncate_events(self, after: int) -> None:
        pass


def of_tasks(path: Path) -> Path:
    """Rows of two tasks, of three labels and of two."""
    if not path.exists():
        draw = random.Random(4)
        lines = ["text,label,task"]
        for i in range(60):
            task, label = (
                ("mood", ("good", "bad", "red")[i // 2 % 3]) if i % 2 else ("time", ("sun", "moon")[i // 2 % 2])
            )
            lines.append(f"{' '.join([*draw.choices(WORDS, k=draw.randint(2, 12)), label, label])},{label},{task}")
        path.write_text("\n".join(lines) + "\n")
    return path


def found_rows(path: Path) -> Path:
    """Labelled rows, each with documents and how much each of them helped."""
    if not path.exists():
        draw, lines = random.Random(5), []
        for i in range(46):
            documents = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(2 + i % 3)]
            shares = [0.5, 0.5] if len(documents) == 2 else [0.5, 0.25, 0.25, 0.0][: len(documents)]
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))
            lines.append({"text": text, "label": "good" if i % 2 else "bad", "documents": documents, "shares": shares})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Runs:
    """Makes loops; rows are read and encoded once for each kind of model."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._prepared: dict[str, Prepared] = {}
        self._whole: dict[tuple[Any, ...], Loop] = {}

    def loop(
        self, names: str | None, method: str = "lora", kind: str = "bert", *, values: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Loop:  # fmt: skip
        """A loop before step 1, with the strategies' `tiny` settings, or with `values`."""
        given = {"steps": 3, "batch": PIECES, **changes}
        arch, _, more = kind.partition("-")
        gap = "gap" in more  # labels that are asked for by a template
        labels = "labels" in more or gap
        changed: dict[str, Any] = {"tie_word_embeddings": True} if "tied" in more else {}
        if "dry" in more and arch == "bert":
            changed |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        elif "dry" in more:
            changed |= {"attention_dropout": 0.0}
        if gap:
            given = {"model": str(ASKED[arch](self.home / kind, **changed)), **given}
        elif changed:
            given = {"model": str(little_model(self.home / kind, arch, **changed)), **given}
        if "judged" in more or "rewards" in more:
            what, task = ("judged", "judged") if "judged" in more else ("pairs", "reward")
            rows = little_data(self.home / f"{what}.csv", kind=what)
            given = {"data": DataSpec(source=str(rows)), "task": task, **given}
        elif "prompts" in more:
            rows = little_data(self.home / "turns.csv", kind="turns")
            given = {"data": DataSpec(source=str(rows)), **given}
            if names is None:  # what is learnt without rewards: the answers that stand in the rows
                kind = kind.replace("-prompts", "")
        elif "pairs" in more:
            rows = little_data(self.home / "pairs.csv", kind="pairs")
            given = {"data": DataSpec(source=str(rows)), **given}
        elif labels or arch == "t5":  # its answers, or labels in a model that writes: "llama-labels"
            rows = little_data(self.home / f"of-{kind}.csv", kind="labelled" if labels else "turns")
            asks = {"template": TEMPLATES[arch], "words": "good=good, bad=bad, red=red"} if gap else {}
            given = {"data": DataSpec(source=str(rows), **asks), **given}
        if "found" in more:
            given = {"data": DataSpec(source=str(found_rows(self.home / "found.jsonl"))), **given}
        asked = [STRATEGIES.get(name) for name in (names or "").split("+") if name]
        further = any(cls.sets for cls in asked)
        if "tasks" in more:
            column = "task" if any(cls.by_task for cls in asked) else None
            given = {"data": DataSpec(source=str(of_tasks(self.home / "tasks.csv")), row_task=column), **given}
        if further:
            what = "labelled" if labels or arch not in ("t5", "llama") else "turns"
            old = little_data(self.home / f"old-{what}.csv", rows=20, kind=what, seed=7)
            named = dict.fromkeys("old" if name == "*" else name for cls in asked for name in cls.sets)
            given = {"also": tuple(f"{name}={old}" for name in named), **given}
        spec = little_spec(self.home, method, arch, strategy=names, **given)
        own = values if values is not None else tiny_settings(names)
        own = self._roles(names, spec, more) | own
        spec = dataclasses.replace(spec, settings=spec.settings | own)
        shaped = further or any(cls.by_task for cls in asked) or ("prompts" in more and names is not None)
        read_as = f"{kind} {names if shaped else ''}"
        if read_as not in self._prepared:
            alone = dataclasses.replace(spec, strategy=None, settings={})
            alone = alone if method == "prompt_tuning" else dataclasses.replace(alone, method="lora")
            self._prepared[read_as] = prepare(
                dataclasses.replace(alone, strategy=names, settings=own) if shaped else alone
            )
        of_strategies, of_method = split_settings(names, spec.settings, compose.setting_names(method))
        made = compose.method(method, of_method)
        found = strategies(names, of_strategies, made)
        for one in found:
            one.check(spec)
        refuse_task(found, self._prepared[read_as].task)
        prepared = self._prepared[read_as]
        if prepared.task.heads:
            made = compose.for_labels(made, [len(labels) for labels in prepared.task.heads])
        n_vocab = int(empty_model(prepared.source, prepared.task).get_input_embeddings().weight.shape[0])
        others = find_others(found, prepared.task, prepared.tokenizer, n_vocab)
        prepared = dataclasses.replace(prepared, spec=spec, method=made, strategies=found, others=others)
        loop = _with_memory(build(prepared))
        if kind.startswith("llama"):  # not in chunks: rounding would tell a strategy that looks at logits from none
            loop.objective.chunked = False
        return loop

    def own(self, name: str) -> dict[str, Any]:
        """Where a strategy's cells run: labels of an encoder, or words of a decoder where it wants those; its batch."""
        cls = STRATEGIES.get(name)
        one = cls(**dict.fromkeys(cls.roles, "a model"))
        kind = cls.tiny_kind or "bert"
        kind = (
            "llama"
            if not cls.tiny_kind and one.suits(Task(name="classification", labels=("bad", "good", "red")))
            else kind
        )
        return {"kind": kind, "batch": BatchSpec(size=6, tokens=4096) if cls.whole_step else PIECES}

    def _roles(self, names: str | None, spec: RunSpec, more: str) -> dict[str, Any]:
        """A model for each role: what the run tunes where that answers, else a finished run on the same rows."""
        rewarded = [name for name in (names or "").split("+") if name and STRATEGIES.get(name).learns == "prompts"]
        if rewarded:  # what has no default, and an answer for which a tiny model has positions
            return {f"{rewarded[0]}.reward": "length", f"{rewarded[0]}.new_tokens": 4}
        wanted = [f"{name}.{role}" for name in (names or "").split("+") if name for role in STRATEGIES.get(name).roles]
        if not wanted:
            return {}
        teacher = spec.model
        if Path(spec.model).name.startswith("llama"):  # an equal one says nothing that is not rounding
            teacher = str(little_model(self.home / "teacher-llama", "llama", initializer_range=0.1))
        if spec.data.source.endswith("labels.csv") or spec.data.source.endswith("rows.csv"):
            teacher = str(self.home / f"teacher-{Path(spec.model).name}-{more}")
            if not Path(teacher).exists():
                alone = dataclasses.replace(spec, strategy=None, also=None, method="ia3", settings={}, steps=3)
                train(dataclasses.replace(alone, out=teacher))
        return dict.fromkeys(wanted, teacher)

    def kind(self, name: str, arch: str) -> str | None:
        """The architecture's own task, or labels where the strategy refuses that; its refusal says why.

        None where there is no other: an encoder has words for nobody here, and the head for labels of an
        encoder-decoder wants an end of text, which the tests' words have not.
        """
        if (wanted := STRATEGIES.get(name).tiny_kind) == f"{arch}-found":
            return wanted
        try:
            method = STRATEGIES.get(name).tiny_method or "lora"
            self.loop(name, method, arch, batch=self.own(name)["batch"]).moments.start()
        except ConfigError as error:
            assert "cannot" in str(error) and len(str(error)) > 70, error
            wanted = STRATEGIES.get(name).tiny_kind
            if wanted.endswith("-gap"):
                return f"{arch}-gap"
            if arch == "llama" and wanted:
                return wanted
            return f"{arch}-labels" if arch == "llama" else None
        return arch

    def whole(self, names: str | None, method: str = "lora", kind: str = "bert", **changes: Any) -> Loop:
        """A run that several cells look at, and none changes."""
        key = (names, method, kind, *sorted(changes.items()))
        if key not in self._whole:
            self._whole[key] = self.after(names, method, kind, **changes)
        return self._whole[key]

    def after(self, names: str | None, method: str = "lora", kind: str = "bert", **changes: Any) -> Loop:
        """The loop after its last step."""
        loop = self.loop(names, method, kind, **changes)
        loop.run_to()
        return loop

    def resumed(self, at: int, *args: Any, **changes: Any) -> Loop:
        """The same, by a loop that takes up the checkpoint of another, which was stopped after `at` steps."""
        stopped = self.loop(*args, **changes)
        stopped.run_to(at)
        tensors, state = checkpoint(stopped)
        loop = self.loop(*args, **changes)
        loop.load(SimpleNamespace(tensors=tensors, state=json.loads(state), event_rows=0))  # type: ignore[arg-type]
        loop.run_to()
        return loop


def tiny_settings(names: str | None) -> dict[str, Any]:
    """The settings at which the contract runs, under their owners' names."""
    words = names.split("+") if names else []
    return {f"{name}.{k}": v for name in words for k, v in STRATEGIES.get(name).tiny.items()}


def _with_memory(make: Callable[..., Loop]) -> Loop:
    loop = make(_Nowhere(), Listener())
    loop.save = lambda: setattr(loop, "_saved", loop.state())  # type: ignore[method-assign]
    loop._go_back = None  # type: ignore[method-assign,assignment]  # nothing to go back to
    return loop


def checkpoint(loop: Loop) -> State:
    """What a checkpoint would hold, as it would be read back."""
    tensors = {"adapter": loop.tuned.state.tensors(), "optimizer": loop.optimiser.tensors(), **loop.moments.tensors()}
    state = {k: v for k, v in loop.state().items() if k != "memory"}  # of bytes that a pass held
    return copy.deepcopy({k: {n: t.detach() for n, t in v.items()} for k, v in tensors.items()}), json.dumps(state)


def same(one: Loop, other: Loop) -> bool:
    """Whether two loops hold the same state, bit for bit."""
    (tensors, state), (others, other_state) = checkpoint(one), checkpoint(other)
    return state == other_state and all(
        tensors[part].keys() == others[part].keys()
        and all(torch.equal(t, others[part][name]) for name, t in tensors[part].items())
        for part in (*tensors, *others)
    )


def alike(one: Loop, other: Loop, bound: float = 2e-6) -> bool:
    """Whether two loops have come to the same trained numbers, to rounding."""
    trained, others = one.tuned.trained(), other.tuned.trained()
    return trained.keys() == others.keys() and all(
        torch.allclose(p.detach().double(), others[n].detach().double(), rtol=0, atol=bound) for n, p in trained.items()
    )
