"""What should happen: one frozen object that holds every choice of a run, and goes to a TOML file and back.

No torch here: the command line reads and checks a spec before anything heavy is imported.
"""

import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import tomli_w

from luthier.core import ConfigError, Flag, Switch, UnknownName, above, at_least, between, build, checked, plain

__all__ = [
    "TASKS",
    "BatchSpec",
    "CheckpointSpec",
    "DataSpec",
    "EvalSpec",
    "OptimSpec",
    "RunSpec",
]

DEFAULT_EPOCHS = 3.0
MAX_SPEC_BYTES = 1_000_000
MOST_FOLDS = 20
NEAR = " near"
GENERATED = ("rouge_l", "bleu", "exact_match", "token_f1")
"""Scores of written text against the response of its row."""

Task = Literal[
    "auto", "classification", "regression", "token_classification", "causal_lm", "seq2seq", "masked_lm",
    "span_corruption", "preference", "judged", "reward", "prompts",
]  # fmt: skip
TASKS: tuple[str, ...] = get_args(Task)


@checked
@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which rows, which of their columns, and what to do with rows that cannot be used.

    >>> DataSpec(source="questions.csv", text="question", label="kind").test_share
    0.2
    """

    says: ClassVar[str] = 'a DataSpec, such as DataSpec(source="rows.csv")'

    source: Annotated[
        str,
        "training rows: a .csv, .tsv, .jsonl or .parquet file, a folder of .txt, sample:NAME, a hub name",
        Flag("data"),
    ]
    test: Annotated[
        str | None, "held-out rows, named like the source; without it a share of the source is held out"
    ] = None
    test_share: Annotated[float, "share of the rows held out when the data has no test half", between(0, 0.9)] = 0.2
    fold: Annotated[
        str | None,
        "hold out this fold of the rows, such as 2/5, the second of five; --cv does so with each in turn; with '2/5 "
        "near' rows that differ only in case, digits or punctuation are in one fold",
    ] = None
    split_seed: Annotated[int, "names the split; runs with other seeds keep the same held-out rows"] = 0
    delimiter: Annotated[str | None, "what parts the columns of a .csv file; left out, what its lines show"] = None
    encoding: Annotated[str | None, "how a .csv file is written, such as latin-1; left out, what its bytes show"] = None
    text: Annotated[str | None, "column with the text"] = None
    pair: Annotated[str | None, "column with the second text of a pair"] = None
    label: Annotated[str | None, "column with the label, the list of labels, or the number"] = None
    prompt: Annotated[str | None, "column with the prompt or instruction"] = None
    context: Annotated[str | None, "column with further input that follows the prompt"] = None
    response: Annotated[str | None, "column with the wanted answer"] = None
    messages: Annotated[str | None, "column with a list of chat messages"] = None
    chosen: Annotated[str | None, "column with the better of two answers to a prompt"] = None
    rejected: Annotated[str | None, "column with the worse of two answers to a prompt"] = None
    tokens: Annotated[str | None, "column with a list of words, for token classification", Flag("tokens")] = None
    tags: Annotated[str | None, "column with one tag for each word"] = None
    template: Annotated[
        str | None,
        "ask for the label by a gap in a text, such as '{text} It was {mask}.'; no new head then; {shown:16} shows "
        "a labelled row of each label, in 16 versions whose answers are averaged, and keeps such rows in the tuning; "
        "{soft:5} stands for five words that a method such as warp trains",
    ] = None
    words: Annotated[
        str | None, "the word of each label that fills the gap, as LABEL=WORD,...; left out, the labels themselves"
    ] = None
    row_task: Annotated[
        str | None, "column that says which task a row is of, for methods that keep numbers for each task"
    ] = None
    loss_on: Annotated[Literal["response", "all"], "which tokens of a prompt-response or chat row carry loss"] = (
        "response"
    )
    strict: Annotated[bool, "stop when rows of the test half also stand in the training half"] = False
    accept_refused: Annotated[
        float,
        "share of rows that may be unusable before the run stops",
        between(0, 1),
        Switch("skip-bad", 1.0, "go on without all rows that cannot be used, however many"),
    ] = 0.05

    def __post_init__(self) -> None:
        if self.fold is None:
            return
        number, _, folds = self.fold.removesuffix(NEAR).partition("/")
        right = number.isdecimal() and folds.isdecimal() and 1 <= int(number) <= int(folds) <= MOST_FOLDS
        if not right or int(folds) < 2:
            raise ConfigError(
                f"data.fold: got {self.fold!r}; it is a number of as many, such as 2/5 or '2/5{NEAR}': at most "
                f"{MOST_FOLDS} folds."
            )
        if self.test is not None:
            raise ConfigError("data.fold and data.test both say which rows are held out. Give one of the two.")

    def stored(self, source: str) -> dict[str, Any]:
        """What `delimiter` and `encoding` say of a source that stands beside the rows: nothing, where it has neither.

        >>> DataSpec(source="rows.csv", delimiter=";").stored("test.CSV.gz")
        {'delimiter': ';', 'encoding': None}
        >>> DataSpec(source="rows.csv", delimiter=";").stored("test.jsonl")
        {'delimiter': None, 'encoding': None}
        """
        has = Path(source.lower().removesuffix(".gz")).suffix in (".csv", ".tsv")
        return {"delimiter": self.delimiter if has else None, "encoding": self.encoding if has else None}

    def fold_of(self) -> tuple[int, int, bool] | None:
        """The fold that is held out, of how many, and whether near copies stay together.

        >>> DataSpec(source="rows.csv", fold="2/5 near").fold_of()
        (2, 5, True)
        """
        if self.fold is None:
            return None
        number, _, folds = self.fold.removesuffix(NEAR).partition("/")
        return int(number), int(folds), self.fold.endswith(NEAR)


@checked
@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """What moves the trained numbers, and how its learning rate moves."""

    name: Annotated[
        Literal["adamw", "sgd", "lomo"],
        "adamw; sgd, plain gradient descent; lomo, the same inside the backward pass, for the least memory",
        Flag("optimiser"),
    ] = "adamw"
    lr: Annotated[float | None, "peak learning rate; left out, the method's own default", above(0)] = None
    head_lr: Annotated[
        float | None, "peak learning rate of a new task head; left out, lr where that is given", above(0)
    ] = None
    schedule: Annotated[Literal["linear", "cosine", "constant"], "how the rate falls after the warm-up"] = "linear"
    warmup: Annotated[float, "share of the steps spent rising to the peak", between(0, 1)] = 0.06
    betas: Annotated[tuple[float, float], "decay of AdamW's two moments", between(0, 0.999999)] = (0.9, 0.999)
    eps: Annotated[float, "added to AdamW's denominator", above(0)] = 1e-8
    weight_decay: Annotated[float, "AdamW's decoupled decay, per unit of learning rate", at_least(0)] = 0.0
    clip: Annotated[float, "largest allowed gradient norm; 0, no clipping", at_least(0)] = 1.0

    def __post_init__(self) -> None:
        if self.name != "adamw" and self.lr is None:
            raise ConfigError(
                f"optim.lr: {self.name} is plain gradient descent, for which the methods' own rates are far too small. "
                "Give one, such as --lr 0.03."
            )


@checked
@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How many rows make one optimiser step, and how they are cut into pieces that fit in memory."""

    size: Annotated[int, "rows in one optimiser step", at_least(1), Flag("batch")] = 16
    tokens: Annotated[int, "padded tokens in one micro-batch, at most; changes memory and speed only", at_least(1)] = (
        4096
    )
    accumulate: Annotated[int, "micro-batches in one optimiser step, at least", at_least(1)] = 1
    group_by_length: Annotated[bool, "put rows of like length in one step, which saves padding"] = True
    pack: Annotated[
        bool, "put several short rows in one line, in place of padding; each sees itself alone, and learns the same"
    ] = False
    pad_to: Annotated[int, "pad lengths up to a multiple of this many tokens", at_least(1)] = 1
    workers: Annotated[
        int, "threads that prepare batches ahead; the batches are the same for any number", between(0, 64)
    ] = 0


@checked
@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """When to score rows that are not learnt from, and what follows from the score.

    What is selected by a score cannot be measured by it: with `best`, `patience`, `thresholds` or `calibrate`, a part
    of the training rows is held out for that, and the test half is scored once, at the end.
    """

    every: Annotated[
        int | None,
        "steps between evaluations; left out, after each epoch if best or patience need it; 0, only at the end",
        at_least(0),
        Flag("eval-every"),
    ] = None
    metric: Annotated[str | None, "score that decides what is best; left out, the task's own"] = None
    patience: Annotated[int | None, "evaluations without a better score before stopping early", at_least(1)] = None
    best: Annotated[bool, "keep the tuning with the best score rather than the last one"] = False
    share: Annotated[
        float,
        "share of the training rows held out to select by, where best, patience, thresholds or calibrate ask for it",
        between(0, 0.5),
        Flag("eval-share"),
    ] = 0.1
    thresholds: Annotated[
        bool,
        "choose, on rows held out to select by, from which probability on a label is answered; for several labels and "
        "for two classes",
    ] = False
    calibrate: Annotated[
        bool, "fit a temperature to the certainty of answers, on rows held out to select by; no answer changes"
    ] = False
    rows: Annotated[
        int | None,
        "test rows that are scored, drawn by data.split_seed; left out, all, or 200 for a language model",
        at_least(1),
        Flag("eval-rows"),
    ] = None

    written: Annotated[
        int | None,
        "held-out rows to which answers are written and compared with their own; left out, 32 where metric is of "
        "written text",
        at_least(1),
        Flag("eval-written"),
    ] = None
    new_tokens: Annotated[int, "tokens of an answer that is written to be scored, at most", at_least(1)] = 64
    forgetting: Annotated[bool, "score a general text with and without the tuning, to see what is forgotten"] = False

    def __post_init__(self) -> None:
        if self.selects and (self.every == 0 or self.share == 0):
            wanted = "best" if self.best else "patience"
            raise ConfigError(
                f"eval.{wanted} needs evaluations during training: leave eval.every and eval.share out, or above 0."
            )
        if self.holds_out and self.share == 0:
            wanted = "thresholds" if self.thresholds else "calibrate"
            raise ConfigError(f"eval.{wanted} goes by rows held out for it: leave eval.share out, or above 0.")

    @property
    def selects(self) -> bool:
        """Whether a score decides which step is kept, or when to stop."""
        return self.best or self.patience is not None

    @property
    def writes(self) -> bool:
        """Whether answers are written to held-out rows."""
        return self.written is not None or self.metric in GENERATED

    @property
    def holds_out(self) -> bool:
        """Whether training rows are held out to select by."""
        return self.selects or self.thresholds or self.calibrate


@checked
@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """How often the state of training is made safe, and how many such states are kept."""

    every_steps: Annotated[int | None, "optimiser steps between checkpoints", at_least(1), Flag("checkpoint-steps")] = (
        None
    )
    every_seconds: Annotated[
        float, "seconds between checkpoints; 0, never by time", at_least(0), Flag("checkpoint-seconds")
    ] = 300.0
    keep: Annotated[int, "verified checkpoints to keep", at_least(1), Flag("checkpoint-keep")] = 2


@checked
@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything one run depends on.

    >>> spec = RunSpec(model="sample:minilm-l6", data=DataSpec(source="sample:trec6"), steps=20)
    >>> spec.method, spec.batch.size
    ('lora', 16)
    >>> print(spec.to_toml().splitlines()[0])
    model = "sample:minilm-l6"
    """

    model: Annotated[str, "model to tune: a folder, sample:NAME, or a hub name"]
    data: Annotated[DataSpec, "rows to learn from"]
    task: Annotated[Task, "what is learnt; auto reads it from the columns"] = "auto"
    method: Annotated[str, "how the model is tuned, such as lora or lora+ia3"] = "lora"
    strategy: Annotated[str | None, "how it is learnt, such as llrd or freelb+llrd; left out, plainly"] = None
    settings: Annotated[
        dict[str, Any],
        "settings of the method and of the strategy, such as rank, or lora.rank where methods are composed",
    ] = field(default_factory=dict)
    also: Annotated[
        tuple[str, ...] | None, "further rows for a strategy that asks for some, as NAME=FILE, such as old=before.csv"
    ] = None
    sources: Annotated[
        tuple[str, ...] | None,
        "finished runs, or their tunings, that the method is made of: adapters to fuse, prompts to start from",
        Flag("source"),
    ] = None
    optim: Annotated[OptimSpec, "optimiser"] = OptimSpec()
    epochs: Annotated[
        float | None,
        "passes over the training rows; where neither epochs nor steps is given, 3, and more where rows are few",
        above(0),
    ] = None
    steps: Annotated[int | None, "optimiser steps, in place of epochs", at_least(1)] = None
    batch: Annotated[BatchSpec, "batches"] = BatchSpec()
    max_length: Annotated[int | None, "longest row in tokens; left out, what model and task allow", at_least(1)] = None
    long: Annotated[
        Literal["cut", "windows"] | None,
        "longer rows: cut, or read in windows whose answers are averaged; left out, cut",
    ] = None
    precision: Annotated[
        Literal["auto", "bf16", "fp32", "fp16"],
        "arithmetic of the forward pass; auto takes what the hardware does fast",
    ] = "auto"
    store: Annotated[
        Literal["nf4", "int8", "int4", "int2", "bf16", "fp32"] | None,
        "how the frozen base is held: in codes of 4, 8 or 2 bits, or in floats; left out, as precision and method take "
        "it",
    ] = None
    trunk_dropout: Annotated[
        Literal["auto", "on", "off"], "dropout inside the model; auto is off where its weights are frozen"
    ] = "auto"
    eval: Annotated[EvalSpec, "evaluation"] = EvalSpec()
    checkpoint: Annotated[CheckpointSpec, "checkpoints"] = CheckpointSpec()
    seed: Annotated[int, "names every random draw of the run", at_least(0)] = 0
    threads: Annotated[int | None, "CPU threads; left out, as many as torch takes", at_least(1)] = None
    device: Annotated[str, "where to compute: auto, cpu, cuda, cuda:1, mps"] = "auto"
    gradient_checkpointing: Annotated[
        bool | Literal["auto"], "compute activations twice to save memory; auto, once memory has run out"
    ] = "auto"
    fast: Annotated[
        bool, "fused computations, packed layers, and on a CPU freed memory that stays for the next step"
    ] = True
    recheck: Annotated[
        int, "steps from one gradient that is computed twice and compared bit by bit to the next; 0, never", at_least(0)
    ] = 0
    force: Annotated[bool, "start although weights, trained numbers and moments are more than the device has"] = False
    out: Annotated[str | None, "folder of the run; left out, runs/ and a name made of model, data and method"] = None
    chosen: Annotated[
        tuple[str, ...], "fields that nobody gave and the run chose from its rows and method; written by the run"
    ] = ()

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(
                f"epochs is {self.epochs:g} and steps is {self.steps}: give one of the two,"
                " the other follows from the data."
            )
        if self.optim.name == "lomo" and (self.precision == "fp16" or self.recheck):
            field = "precision fp16" if self.precision == "fp16" else f"recheck = {self.recheck}"
            reason = "scales the loss and must see all gradients" if self.precision == "fp16" else "compares gradients"
            raise ConfigError(
                f"{field} {reason}, and optim.name = lomo drops each one as it comes. Use "
                f"{'bf16 or fp32' if self.precision == 'fp16' else 'recheck = 0'}, or optim.name = sgd."
            )
        if self.data.test is not None and self.data.test == self.data.source:
            raise ConfigError(
                f"data.test: {self.data.test!r} is also data.source, so the score would be of rows that were learnt."
                " Name another file, or leave test out to hold out a share of the rows (test_share)."
            )

    @property
    def codes(self) -> str | None:
        """The format in which the base's linear layers are held, such as nf4; None where they are floats."""
        return None if self.store in ("bf16", "fp32") else self.store

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run, at least one."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs if self.epochs is not None else DEFAULT_EPOCHS) * steps_per_epoch))

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of every field but `out`, `chosen` and `force`: none changes what is computed."""
        values = _without_nothing(plain(self))
        values.pop("out", None)
        values.pop("chosen", None)
        values.pop("force", None)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_toml(self) -> str:
        """The spec as a file; fields that are left out (`None`) do not appear."""
        return tomli_w.dumps(_without_nothing(plain(self)))

    @classmethod
    def from_toml(cls, path: str | Path) -> "RunSpec":
        """Read a spec file.

        Raises:
            ConfigError: no such file, no valid TOML, or values that cannot work; each complaint names file and field.
            UnknownName: a field that no spec has.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}). Name a .toml file that a run wrote."
            ) from error
        if len(raw) > MAX_SPEC_BYTES:
            raise ConfigError(
                f"{path}: {len(raw)} bytes is no spec; a spec has a few hundred. Name the spec.toml of a run."
            )
        try:
            values = tomllib.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}. Correct that line.") from error
        return cls.from_plain(values, where=str(path))

    @classmethod
    def from_plain(cls, values: dict[str, Any], where: str = "") -> "RunSpec":
        """Make a spec from plain values, as `build` does; `where` names their file in complaints.

        Raises:
            ConfigError: values that cannot work, all named together.
            UnknownName: a field that no spec has.
        """
        prefix = f"{where}: " if where else ""
        try:
            return build(cls, values, where=f"{prefix}run")
        except (ConfigError, UnknownName) as error:
            if prefix and not str(error).startswith(prefix):  # a complaint of `__post_init__`, which knows no file
                raise type(error)(prefix + str(error)) from error
            raise


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nothing(v) for k, v in value.items() if v is not None}
    return value
