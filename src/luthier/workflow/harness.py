"""A finished run under the tasks of lm-evaluation-harness (the `harness` extra), by the run's own evaluator of text.

A task is a name that the harness knows, or a YAML file of one's own with its rows beside it. Such a file is read as
data: one that names functions of Python, or whose templates reach into Python, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from luthier.core import ConfigError, UsageError, build, near
from luthier.data.batches import cut
from luthier.data.chat import ChatTemplate
from luthier.data.examples import Examples, Ledger
from luthier.data.rows import Table
from luthier.trust.template import Renderer
from luthier.workflow.controls import Controls
from luthier.workflow.prediction import Predictor

__all__ = ["HarnessScores", "TextScorer", "harness", "read_task"]

_ROLLING = 1024  # tokens of a window of a long text, where nothing limits them
_MOST_BYTES = 1_000_000
_FILES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class HarnessScores:
    """What came out: task -> score -> value, and the version of the harness."""

    scores: dict[str, dict[str, float]]
    harness: str
    rows: dict[str, int]


def harness(
    path: Path | str, tasks: Sequence[str], *, limit: int | None = None, shots: int | None = None, chat: bool = False
) -> HarnessScores:
    """Score a finished run by tasks of lm-evaluation-harness.

    Args:
        path: the folder of a finished run of a language model.
        tasks: names that the harness knows, or YAML files.
        limit: rows of each task, at most.
        shots: solved examples before each question; left out, as the task says.
        chat: put each question into the run's chat template.

    Raises:
        UsageError: the harness is not installed.
        ConfigError: no such task, a task file that is no data, or a run that writes no text.
    """
    found = _library(named=any(not task.endswith(_FILES) for task in tasks))
    read = [read_task(Path(task)) if task.endswith(_FILES) else task for task in tasks]
    known = found.manager
    for task in read:
        if isinstance(task, str) and task not in known.all_tasks:
            raise ConfigError(
                f"--harness {task}: lm-evaluation-harness has no such task.{near(task, list(known.all_tasks))} Name "
                "one of its tasks, or a .yaml file of your own."
            )
    predictor = Predictor(path)
    if not predictor.task.writes or predictor.tuned.anatomy.is_encoder_decoder:
        raise ConfigError(
            f"{path}: this run learnt {predictor.task.name}, and the harness asks models that read and write text from "
            "left to right. Score it on rows: luthier evaluate RUN --data FILE."
        )
    for task, settings in zip(tasks, read, strict=True):
        if isinstance(settings, dict):
            _refuse_metrics(task, settings)
    scorer = TextScorer(predictor)
    if chat and scorer.template is None:
        raise ConfigError(f"{path}: this run learnt no chats, so it has no template. Leave --harness-chat out.")
    with predictor.tuned.serving():
        out = found.evaluate(
            model=_asked_by_harness(found.model, scorer), tasks=read, limit=limit, num_fewshot=shots,
            task_manager=known, apply_chat_template=chat, log_samples=False, bootstrap_iters=0,
        )  # fmt: skip
    scores = {task: _numbers(values) for task, values in out["results"].items()}
    rows = {task: int(n["effective"]) for task, n in out.get("n-samples", {}).items()}
    return HarnessScores(scores=scores, harness=found.version, rows=rows)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Scores under their names, without the filter where it is none: "acc,none" is acc."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "_stderr" not in name and "," in name
    }


@dataclass(frozen=True)
class _Library:
    evaluate: Any
    model: Any
    manager: Any
    version: str


def _library(named: bool) -> _Library:
    """Args: named: tasks are asked for by the harness's own names; to know them it reads some 14,000 files."""
    try:
        whole, model, tasks = (import_module(name) for name in ("lm_eval", "lm_eval.api.model", "lm_eval.tasks"))
    except ImportError as error:
        raise UsageError(
            "--harness needs lm-evaluation-harness, which is not installed. Run: pip install 'luthier[harness]'"
        ) from error
    version = str(getattr(whole, "__version__", "unknown"))
    return _Library(whole.simple_evaluate, model.LM, tasks.TaskManager(include_defaults=named), version)


def read_task(path: Path) -> dict[str, Any]:
    """The settings of a task from a YAML file; files of rows that it names are found beside it.

    Raises:
        ConfigError: no such file, no mapping, or more than data: a function of Python, a template that reaches for one.
    """
    import yaml

    if not path.is_file():
        raise ConfigError(f"--harness {path}: no such file. Name a task of the harness, or a .yaml file.")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"--harness {path}: {path.stat().st_size} bytes is no task; a task has a few thousand.")
    text = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        why = "it names a function of Python (!function), which would be run" if "!function" in text else str(error)
        raise ConfigError(f"--harness {path}: cannot be read as data: {why.splitlines()[0]}. Mend it.") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise ConfigError(f"--harness {path}: is no task: it has no field `task` with a name.")
    for word in _texts(settings):
        if reason := _wild(word):
            raise ConfigError(
                f"--harness {path}: the template {word[:60]!r} {reason}. Templates of a file may read fields of a row, "
                f"join and compare them, and use {', '.join(sorted(_METHODS))}."
            )
    if any(isinstance(one, dict) and one.get("hf_evaluate") for one in settings.get("metric_list") or ()):
        raise ConfigError(f"--harness {path}: hf_evaluate would load a program that computes the score. Leave it out.")
    if settings.get("unsafe_code"):
        raise ConfigError(f"--harness {path}: unsafe_code would run what the model writes. Leave it out.")
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        settings["dataset_kwargs"]["data_files"] = _beside(files, path.parent)
    return settings


def _refuse_metrics(task: str, settings: Mapping[str, Any]) -> None:
    """Refuse scores that the harness does not know itself: it would load a program of that name, from here or a hub."""
    import_module("lm_eval.api.metrics")
    known = sorted(import_module("lm_eval.api.registry").metric_registry)
    for entry in settings.get("metric_list") or ():
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or name not in known:
            raise ConfigError(
                f"--harness {task}: the harness has no score {name!r} of its own, and would load a program of that "
                f"name.{near(str(name), known)} There are {', '.join(known)}."
            )


def _wild(template: str) -> str:
    """Why a template may do more than lay out the fields of a row, in words; empty where it may not. It is only parsed:
    the harness renders templates without a sandbox.
    """
    if "{" not in template:
        return ""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(autoescape=True).parse(template)
    except TemplateSyntaxError as error:
        return f"cannot be read: {error.message}"
    for node in tree.find_all(nodes.Node):
        name = type(node).__name__
        if name not in _NODES:
            return f"has a part of the kind {name}"
        if isinstance(node, nodes.Getattr) and node.attr not in _METHODS:
            return f"reads .{node.attr}"
        if isinstance(node, nodes.Getitem) and not (
            isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, int)
        ):
            return "looks things up by more than a number"
        if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            return f"uses the filter {node.name}"
        if isinstance(node, nodes.Call) and not isinstance(node.node, nodes.Getattr):
            return "calls a function"
    return ""


_METHODS = frozenset({"strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "replace", "index"})
_FILTERS = frozenset({"trim", "lower", "upper", "title", "capitalize", "length", "join", "replace"})
_NODES = frozenset({
    "Template", "Output", "TemplateData", "Name", "Const", "Getattr", "Getitem", "Call", "Filter", "Compare", "Operand",
    "CondExpr", "Add", "Sub", "Concat", "List", "And", "Or", "Not", "If",
})  # fmt: skip


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {name: _beside(one, folder) for name, one in files.items()}
    if isinstance(files, list):
        return [_beside(one, folder) for one in files]
    return str(files if Path(files).is_absolute() else (folder / files).absolute())


class TextScorer:
    """How likely a run holds texts, and what it writes after them."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        stored = predictor.contract["template"]
        self.template = None if stored is None else build(ChatTemplate, stored, "template")
        tokenizer = predictor.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.first = int(first if first is not None else predictor.contract["pad"]["id"])
        self.limit = predictor.generator.limit

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, as training read texts without a template."""
        found: list[int] = self.predictor.tokenizer(text, verbose=False)["input_ids"]
        eos = self.predictor.tokenizer.eos_token_id
        return found[:-1] if found and found[-1] == eos else list(found)

    def halves(self, before: str, after: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows. Blanks at its end belong to what follows: words begin with them."""
        blanks = len(before) - len(before.rstrip())
        if blanks:
            before, after = before[:-blanks], before[-blanks:] + after
        context = self.ids(before) if before else []
        whole = self.ids(before + after)
        return context or [self.first], whole[len(context) :]

    def likely(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each context and continuation: its log-probability, and whether each of its tokens is the likeliest.

        A context is cut from its beginning where both are longer than the model reads.
        """
        lines = []
        for context, after in pairs:
            whole = [*context, *after]
            lines.append(whole if self.limit is None else whole[-self.limit :])
        lengths = np.asarray([len(line) for line in lines], dtype=np.int64)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(lines)
        everything = np.arange(len(lines), dtype=np.int64)
        for piece in cut(everything, lengths, 2 * self.predictor.spec.batch.tokens, 64):
            width = int(lengths[piece].max())
            ids = torch.zeros(len(piece), width, dtype=torch.long)
            for line, i in enumerate(piece.tolist()):
                ids[line, : lengths[i]] = torch.tensor(lines[i])
            mask = torch.arange(width)[None, :] < torch.from_numpy(lengths[piece])[:, None]
            logits = self._logits(ids, mask.long())
            for line, i in enumerate(piece.tolist()):
                n, end = min(len(pairs[i][1]), int(lengths[i]) - 1), int(lengths[i])
                wanted = ids[line, end - n : end].to(logits.device)
                chances = F.log_softmax(logits[line, end - n - 1 : end - 1].float(), -1)
                value = float(chances.gather(1, wanted[:, None]).sum())
                found[i] = (value, bool((chances.argmax(-1) == wanted).all()))
        return found

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        predictor = self.predictor
        with predictor.precision.autocast(predictor.device):
            out = predictor.tuned.model(
                input_ids=ids.to(predictor.device), attention_mask=mask.to(predictor.device), use_cache=False
            )
        logits: torch.Tensor = out.logits
        return logits

    def rolling(self, text: str) -> float:
        """The log-probability of a whole text, in windows where it is long."""
        ids = self.ids(text)
        size = min(_ROLLING, self.limit or _ROLLING) - 1
        starts = range(0, len(ids), size)
        return sum(
            value for value, _ in self.likely([(ids[s - 1 : s] or [self.first], ids[s : s + size]) for s in starts])
        )

    def written(self, contexts: Sequence[str], controls: Controls) -> list[str]:
        """What is written after texts, each to a stop token or to the longest answer."""
        ids = [self.ids(text) or [self.first] for text in contexts]
        if self.limit is not None:
            ids = [some[-max(1, self.limit - controls.max_new_tokens) :] for some in ids]
        table = Table([{}] * len(ids), [f"prompt {n}" for n in range(1, len(ids) + 1)], "prompts")
        prompts = Examples(
            ids=np.asarray([t for some in ids for t in some], dtype=np.int32),
            offsets=np.concatenate([[0], np.cumsum([len(some) for some in ids])]).astype(np.int64),
            rows=np.arange(len(ids)), n_targets=np.zeros(len(ids), dtype=np.int64), ledger=Ledger(table),
        )  # fmt: skip
        sampling = controls.sampling([f"row {n}" for n in range(len(ids))])
        return [w.text for w in self.predictor.generator.write(prompts, controls.max_new_tokens, sampling=sampling)]

    def laid_out(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation in the run's template."""
        assert self.template is not None
        with Renderer(self.template.text, self.template.special_tokens) as renderer:
            given = [dict(message) for message in messages]
            return renderer.render(given, add_generation_prompt=add_generation_prompt, must_keep=False).text


def _asked_by_harness(base: Any, scorer: TextScorer) -> Any:
    """The run as the harness asks a model: an object of a class of its own."""

    class Asked(base):  # type: ignore[misc]
        tokenizer_name = "run"

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.likely([scorer.halves(*request.args) for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            return [scorer.rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            found: list[str] = [""] * len(requests)
            kinds: dict[Controls, list[int]] = {}
            for number, request in enumerate(requests):
                kinds.setdefault(_controls(request.args[1]), []).append(number)
            for controls, numbers in kinds.items():
                texts = scorer.written([requests[n].args[0] for n in numbers], controls)
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = _until(text, requests[number].args[1].get("until"))
            return found

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return scorer.laid_out(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: Any = False) -> str:
            return "" if scorer.template is None or not chat_template else scorer.template.text

    return Asked()


def _controls(given: Mapping[str, Any]) -> Controls:
    temperature = float(given.get("temperature") or 0.0) if given.get("do_sample") else 0.0
    drawn: dict[str, Any] = (
        {"top_p": float(given.get("top_p", 1.0)), "top_k": int(given.get("top_k", 0))} if temperature else {}
    )
    most = int(given.get("max_gen_toks", given.get("max_new_tokens", 256)))
    return Controls(temperature=temperature, max_new_tokens=most, **drawn)


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    for end in [ends] if isinstance(ends, str) else ends or ():
        if end:
            text = text.split(end)[0]
    return text
