"""Which strategy is tried in which scene, and with how many times the passes of a plain step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments.strategies.scenes import SMALL, further, old_rows, old_run, set_rows, target, teacher

__all__ = ["FURTHER", "NOT_TRIED", "TRIALS", "Trial", "every_trial"]

Given = Callable[[str, int], list[str]]
Rows = Mapping[str, Callable[[], Path]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A strategy in a scene.

    Attributes:
        scene: its name.
        passes: whole times a plain step's passes; plain training makes as many times its steps to be compared with it.
        longer: times the scene's steps that it makes itself.
        given: fields as FIELD=VALUE.
        runs: further fields, that name runs which are made first; called with method and seed.
        also: further sets of rows.
    """

    scene: str = "few"
    passes: int = 1
    longer: int = 1
    given: tuple[str, ...] = ()
    runs: Given = lambda method, seed: []
    also: Rows = field(default_factory=dict)


SETS: Rows = {"headlines": lambda: set_rows("sarcasm", 96), "messages": lambda: set_rows("sms-spam", 96)}
"""As many rows as the questions have. A step then holds a third of each, so such a run makes three times the steps."""

TRIALS: dict[str, Trial] = {
    "adaptive_freeze": Trial(given=("adaptive_freeze.every=20",)),
    "class_weights": Trial(scene="many"),
    "clr": Trial(),
    "cosine_ws": Trial(scene="weak", passes=2, given=("cosine_ws.init=0.5", "cosine_ws.refresh=20")),
    "curriculum": Trial(scene="many"),
    "data_select": Trial(scene="many"),
    "early_exit": Trial(),
    "ema": Trial(given=("ema.decay=0.98",)),
    "ewc": Trial(
        scene="then", given=("ewc.rows=200", "ewc.weight=1e8", "ewc.answers=labels"), also={"old": old_rows}
    ),
    "focal": Trial(),
    "freelb": Trial(passes=2),
    "gradual_unfreeze": Trial(scene="few-full", given=("gradual_unfreeze.every=12",)),
    "kd_logits": Trial(scene="student", runs=lambda m, s: [f"kd_logits.teacher={teacher()}"]),
    "kd_ensemble": Trial(
        scene="student", runs=lambda m, s: [f"kd_ensemble.teachers={teacher()},{teacher(SMALL)}"]
    ),
    "kd_minilm": Trial(scene="student", runs=lambda m, s: [f"kd_minilm.teacher={teacher(SMALL)}"]),
    "kd_tinybert": Trial(scene="student", runs=lambda m, s: [f"kd_tinybert.teacher={teacher(SMALL)}"]),
    "l2_sp": Trial(scene="few-full"),
    "label_smoothing": Trial(),
    "lisa": Trial(scene="few-full"),
    "llrd": Trial(scene="few-full"),
    "lomo": Trial(scene="few-full", passes=2, given=("lomo.form=adalomo", "optim.lr=5e-4")),
    "loss_weighting": Trial(passes=6, longer=3, also=SETS),
    "lwf": Trial(scene="then", runs=lambda m, s: [f"lwf.old={old_run(m, s)}"]),
    "mezo": Trial(scene="few-full", given=("optim.lr=1e-6",)),
    "mixout": Trial(scene="few-full"),
    "mtl_sampling": Trial(passes=3, longer=3, also=SETS),
    "pcgrad": Trial(passes=6, longer=3, also=SETS),
    "r_drop": Trial(passes=2),
    "recadam": Trial(scene="few-full", given=("recadam.t0=40",)),
    "replay": Trial(scene="then", also={"old": old_rows}),
    "scl": Trial(),
    "self_ensemble": Trial(passes=2),
    "setfit": Trial(),
    "smart": Trial(passes=3),
    "stlr": Trial(),
    "tapt": Trial(given=("tapt.texts_epochs=3",)),
    "uda": Trial(passes=4, also={"unlabelled": further}),
    "ulmfit": Trial(),
    "aux_lm": Trial(scene="decoder"),
    "kd_views": Trial(
        passes=3, runs=lambda m, s: [f"kd_views.teacher={teacher()}"], also={"unlabelled": further}
    ),
    "less": Trial(
        scene="many", passes=2, given=("less.share=0.3",), also={"target": target}
    ),
    "mt_dnn": Trial(scene="tasks", given=("data.row_task=task",)),
    "startup": Trial(passes=4, also={"source": lambda: set_rows("sarcasm"), "unlabelled": further}),
    "pouf": Trial(scene="decoder-words"),
    "autoprompt": Trial(scene="decoder-prompt", passes=3, given=("autoprompt.candidates=5",)),
}  # fmt: skip

FURTHER: dict[str, Trial] = {
    "lisa": Trial(scene="decoder-full"),
    "mezo": Trial(scene="decoder-full", given=("optim.lr=1e-6",)),
    "replay+ewc": Trial(
        scene="then", given=("ewc.rows=200", "ewc.weight=1e8", "ewc.answers=labels"), also={"old": old_rows}
    ),
}
"""Strategies that are tried in a second scene, and some together."""


def every_trial() -> Iterator[tuple[str, Trial]]:
    """Each strategy, or several together, with a scene that it is tried in."""
    yield from TRIALS.items()
    yield from FURTHER.items()


_GAPS = (
    "asks a model that fills gaps, of which the samples have the decoder alone: its chain of runs comes to several "
    "times the passes of a plain run, which is minutes already"
)
_WRITES = "writes its rows with a model, minutes of it on a CPU, and no score of this table is of texts"
_AGENT = "of traces, documents or extraction: docs/howto/agents-and-retrieval.md"
_REWARDS = "of rewards: docs/howto/rollouts.md"
_TEXT = "of language models: a score of their texts is not part of this table"
_PAIRS = "of answers that are preferred: docs/howto/align.md"

NOT_TRIED = {
    "agent_sft": _AGENT,
    "cai": _PAIRS,
    "contrastive": "its head does not learn; setfit is contrastive with a head behind it",
    "cpo": _PAIRS,
    "dapt": "tapt is the same on other texts",
    "dft": _TEXT,
    "dpo": _PAIRS,
    "grpo": _REWARDS,
    "instruct_sft": "is plain training on answers",
    "instruct_uie": _AGENT,
    "ipet": _GAPS,
    "kd_onpolicy": _TEXT,
    "kd_sequence": _TEXT,
    "kto": _PAIRS,
    "label_words": _GAPS,
    "lm_bff": _GAPS,
    "maml": "gives a start and not an end",
    "nash_md": _REWARDS,
    "orpo": _PAIRS,
    "pet": _GAPS,
    "ppo": _REWARDS,
    "ra_dit": _AGENT,
    "raft": _AGENT,
    "rejection_sft": _REWARDS,
    "reptile": "gives a start and not an end",
    "reward_model": _PAIRS,
    "retriever_kl": "is a phase of ra_dit",
    "rlaif": _PAIRS,
    "rloo": _REWARDS,
    "self_instruct": _WRITES,
    "self_rag": _AGENT,
    "simpo": _PAIRS,
    "task_mixture": _TEXT,
}
"""Strategy -> why it has no row."""
