"""A finished run as a plain model folder, its tuning folded into the weights: any transformers program reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from luthier.__version__ import __version__
from luthier.core import CannotMerge, ConfigError
from luthier.core.places import refuse_taken
from luthier.runs import durable
from luthier.surgery import answerers, merging, narrowing
from luthier.workflow.added_runs import add_runs
from luthier.workflow.certificate import FILE as CERTIFICATE
from luthier.workflow.certificate import called, certify_folder
from luthier.workflow.load_model import find_model, load_config, quiet
from luthier.workflow.prediction import Predictor

__all__ = ["Merged", "Written", "describe", "into_unit", "merge", "merged_model", "write_merged"]

PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
    "preference": "text-generation",
    "judged": "text-generation",
    "prompts": "text-generation",
    "reward": "text-classification",
    "masked_lm": "fill-mask",
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge(
    path: Path | str, out: Path | str, *, dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto", accept: bool = False,
    add: Sequence[Path | str] = (), say: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Write a run's model with the tuning in its weights: safetensors, configuration, tokenizer, and a model card.

    The merged model's logits are compared with the tuned one's before anything is written. The folder is then read by
    plain transformers in a fresh process, and compared with what the run kept of the model that was trained; what came
    out is in its certificate.json.

    >>> from luthier import train
    >>> result = train("sample:minilm-l6", "reviews.csv", text="review", label="stars", steps=20)
    >>> (merge(result.path, "merged-model") / "model.safetensors").exists()
    True

    Args:
        path: the folder of a finished run.
        out: the folder to write; it must not exist.
        dtype: of the weights; auto, the type in which the base is stored.
        accept: write the folder although it is not the model that was trained; its certificate says so.
        add: other finished runs on the same base. What each has changed of the base's weights is added; heads are those
            of the first run. Nobody trained such a sum, so it has no certificate: try it on rows of your own.
        say: is told what of `add` this model has no place for, which is left out; and of a pruned model what is cut
            out, or stays in it as zeros and why.

    Raises:
        ConfigError: no such run, one that is not finished, a run to add that is of another base, or `out` is there.
        CannotMerge: no weight of the model can do what the method does, or the type is too coarse for it.
        WrongBase, IntegrityError: model, tokenizer or tuning are not those of the run, or the folder, read back, is not
            the model that was trained.
    """
    out = Path(out).absolute()
    refuse_taken(out)
    if dtype != "auto" and dtype not in TYPES:
        raise ConfigError(f"dtype: got {dtype!r}; it must be auto, fp32, bf16 or fp16.")
    path, others = Path(path), [Path(other) for other in add]
    with durable.folder(out) as draft:
        written = write_merged(path, draft.path, dtype=dtype, name=out.name, add=others)
        for line in (*written.left_out, *written.cut):
            say(line)
        if not others:
            found = certify_folder(
                path, "merged", draft.path, halves=written.halves, in_unit=written.in_unit, accept=accept, shown=out,
                beside=written.beside,
            )  # fmt: skip
            draft.write_json(CERTIFICATE, found.to_plain())
        draft.write_bytes("README.md", written.card.encode())
        draft.share()
    return out


@dataclass(frozen=True)
class Written:
    """What was written of a merged model.

    Attributes:
        halves: weights in 16 bits.
        in_unit: a regression answers in the unit of its rows.
        otherwise: methods that make other answers of the model's outputs, which weights cannot.
        left_out: of what other runs add; see `add_runs`.
        cut: what was pruned and is cut out of the model, or stays in it as zeros; see `narrowing.narrow`.
    """

    halves: bool
    in_unit: bool
    card: str
    otherwise: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()

    @property
    def beside(self) -> str:
        """What a certificate of these weights says besides."""
        names = " and ".join(self.otherwise)
        return f"; these are the plain outputs: what {names} makes of them is not in the weights" if names else ""


@dataclass(frozen=True)
class Merged:
    """A run's model with the tuning in its weights, in memory; what `Written` says of a folder, and the run.

    Attributes:
        model: of transformers, without a trace of ours; configuration and tokenizer say what a pipeline needs.
        left_out: of what other runs add; see `add_runs`.
        cut: see `Written`.
    """

    model: Any
    predictor: Predictor
    halves: bool
    in_unit: bool
    otherwise: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


def merged_model(path: Path, *, dtype: str, add: Sequence[Path] = ()) -> Merged:
    """A run's merged model.

    Raises:
        CannotMerge: see `merge`.
    """
    # A sum is computed in float32 and cast once.
    predictor = Predictor(path, dtype=torch.float32 if dtype == "auto" or add else TYPES[dtype], decode=True)
    stored = TYPES.get(dtype)
    if dtype == "auto":
        stored = getattr(load_config(find_model(predictor.spec.model)), "dtype", None)
        if stored in (torch.bfloat16, torch.float16) and not add:
            predictor = Predictor(path, dtype=stored, decode=True)
    method, unread = predictor.spec.method, narrowing.unread(predictor.tuned.edited)
    if add and unread:
        raise CannotMerge(f"{path} ({method}): what it has pruned other runs would bring back. Merge it alone.")
    otherwise = [part.name for part in answerers(predictor.tuned)]
    try:
        merging.check(predictor.tuned.edited)
        half = next(predictor.tuned.model.parameters()).dtype != torch.float32
        # Half types round the logits that are compared, too.
        model = predictor.tuned.merge(check=_a_batch(predictor), tolerance=0.5 if half else 0.25)
    except CannotMerge as error:
        raise CannotMerge(f"{path} ({method}): {error} {_instead(method, path)}") from None
    left_out: tuple[str, ...] = ()
    model, cut = narrowing.narrow(model, predictor.tuned.anatomy, unread, _a_batch(predictor))
    if add:
        left_out = add_runs(model, predictor, add)
        model.to(stored if stored in (torch.bfloat16, torch.float16) else torch.float32)
        half = stored in (torch.bfloat16, torch.float16)
    in_unit = into_unit(model, predictor)
    describe(model, predictor)
    return Merged(model, predictor, half, in_unit, tuple(otherwise), left_out, cut)


def write_merged(path: Path, folder: Path, *, dtype: str, name: str, add: Sequence[Path] = ()) -> Written:
    """Weights, configuration and tokenizer of a run's merged model, into an empty folder that will be called `name`.

    Raises:
        CannotMerge: see `merge`.
    """
    found = merged_model(path, dtype=dtype, add=add)
    with quiet():
        found.model.save_pretrained(folder)
        found.predictor.tokenizer.save_pretrained(folder)
    return Written(
        found.halves, found.in_unit, _card(path, name, found, add), found.otherwise, found.left_out, found.cut
    )


def _instead(method: str, path: Path) -> str:
    if "lora" in method or "ia3" in method or "dora" in method:
        return f"Write the weights in float32 (--dtype fp32), or export the tuning alone: luthier export {path} FOLDER."
    return "Nearest is a method that merges: luthier methods --mergeable lists them."


def _a_batch(predictor: Predictor) -> dict[str, Any]:
    """Some ids of the vocabulary: what merged and tuned weights are compared on."""
    n_vocab = int(predictor.tuned.model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(24, device=predictor.device).reshape(2, 12) * max(1, n_vocab // 24) % n_vocab
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if predictor.task.decodes or predictor.task.asks == "both":
        batch["decoder_input_ids"] = ids[:, :6]
    return batch


def into_unit(model: nn.Module, predictor: Predictor) -> bool:
    """A regression's answers in the unit of the rows: its last layer, if it has a bias, takes over scale and centre."""
    task = predictor.task
    if task.name != "regression" or (task.center, task.scale) == (0.0, 1.0):
        return True
    path = last_with_bias(model)
    if path is None:
        return False
    last: Any = model.get_submodule(path)
    with torch.no_grad():
        last.weight.mul_(task.scale)
        last.bias.mul_(task.scale).add_(task.center)
    return True


def last_with_bias(model: nn.Module) -> str | None:
    """The path of the layer that gives a regression's number, where it has a bias that can take over a centre."""
    last = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return last[-1] if last and model.get_submodule(last[-1]).bias is not None else None


def describe(model: Any, predictor: Predictor) -> None:
    """Configuration and tokenizer say what a pipeline needs to know, and no place on this disk."""
    model.config._name_or_path = called(predictor.spec.model)
    if predictor.task.name == "regression":
        model.config.id2label, model.config.label2id = {0: "value"}, {"value": 0}
    tokenizer = predictor.tokenizer
    tokenizer.name_or_path = model.config._name_or_path
    tokenizer.init_kwargs.pop("name_or_path", None)
    if not predictor.task.of_turns:
        tokenizer.model_max_length = int(predictor.contract["max_length"])
    template = predictor.contract["template"]
    if template is not None:
        tokenizer.chat_template = template["text"]


def _card(path: Path, out: str, found: Merged, added: Sequence[Path]) -> str:
    model, predictor, otherwise = found.model, found.predictor, found.otherwise
    spec, task = predictor.spec, predictor.task
    pipeline = PIPELINES.get(task.name)
    if task.template:
        pipeline = {"encoder": "fill-mask", "decoder": "text-generation"}.get(task.asks)
    scores = path / "scores.json"
    told = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {}
    lines = ["---", "library_name: transformers", *([f"pipeline_tag: {pipeline}"] if pipeline else []), "---", ""]
    lines += [
        f"# {out}", "",
        f"`{model.config._name_or_path}` tuned with {spec.method} by luthier {__version__}; the tuning is in the "
        "weights, so that nothing but transformers is needed.", "", "```python",
    ]  # fmt: skip
    if pipeline is None:
        lines += [
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", "",
            f"tokenizer = AutoTokenizer.from_pretrained({out!r})",
            f"model = AutoModelForSeq2SeqLM.from_pretrained({out!r})",
            'answer = model.generate(**tokenizer("...", return_tensors="pt"))',
            "print(tokenizer.decode(answer[0], skip_special_tokens=True))", "```", "",
        ]  # fmt: skip
    else:
        more = ", function_to_apply='none'" if task.name == "regression" else ""
        asked = '[{"role": "user", "content": "..."}]' if predictor.contract["template"] is not None else '"..."'
        lines += [
            "from transformers import pipeline", "", f"answer = pipeline({pipeline!r}, model={out!r}{more})",
            f"print(answer({asked}))", "```", "",
        ]  # fmt: skip
    if spec.codes is not None:
        lines += [
            f"It was trained on a base whose linear layers are held as {spec.codes}. These weights are what the codes "
            "stand for, with the tuning added: not the weights that the codes were made of.",
        ]  # fmt: skip
    lines += [f"{line[0].upper()}{line[1:]}." for line in found.cut]
    lines += [f"Task: {task.name.replace('_', ' ')}."]
    if task.template:
        lines += [f"Labels are asked for by the words {', '.join(task.words)} in {task.template!r}."]
    if task.labels:
        lines += [f"Labels: {', '.join(task.labels)}."]
    if task.thresholds:
        labels = task.labels if task.multi_label else task.labels[1:]
        each = ", ".join(f"{name} from {at:.4g}" for name, at in zip(labels, task.thresholds, strict=True))
        lines += [f"Probability from which a label is answered, which a pipeline does not know: {each}."]
    lines += [predictor.length_said]
    if not found.in_unit:
        lines += [f"The last layer has no bias: multiply an answer by {task.scale!r} and add {task.center!r}."]
    if otherwise:
        lines += [
            f"What {' and '.join(otherwise)} makes of the model's outputs is not in these weights: they give the plain "
            "outputs, and luthier's answers and the scores below are others.",
        ]  # fmt: skip
    if added:
        names = ", ".join(other.name for other in added)
        lines += [
            f"To the weights is added what other runs have learnt of the same base ({names}), without their heads. "
            "Nobody trained this sum: the scores of its parts are not its own. Try it on rows of your own.",
            *(f"{line[0].upper()}{line[1:]}." for line in found.left_out),
        ]  # fmt: skip
    elif told:
        shown = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in told.items()
        ]
        lines += ["", f"On held-out rows: {', '.join(shown)}."]
    return "\n".join(lines) + "\n"
