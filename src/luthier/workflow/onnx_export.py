"""A finished run as an ONNX graph: a classifier or an encoder, for programs that have no torch.

model.onnx          int64 input_ids, attention_mask and what else the tokenizer gives, (batch, tokens) of any size;
                    fp32 logits; task, labels and lengths in its metadata
config.json, ...    configuration and tokenizer, as transformers and optimum read them

The graph is that of the merged model. A method that no weight can do is traced as it stands on the model, where the
tracer can follow it with sizes left open. What came out is computed by onnxruntime on batches of several sizes, and by
a fresh process on the rows that the run kept.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.__version__ import __version__
from luthier.core import CannotMerge, ConfigError, IntegrityError, LuthierError, UsageError
from luthier.core.places import refuse_taken
from luthier.runs import durable
from luthier.surgery import answerers, load
from luthier.workflow.certificate import FILE as CERTIFICATE
from luthier.workflow.certificate import called, certify_folder
from luthier.workflow.export import Exported
from luthier.workflow.load_model import quiet
from luthier.workflow.merged_folder import Merged, describe, merged_model
from luthier.workflow.onnx_reader import GRAPH, session_of
from luthier.workflow.prediction import Predictor

__all__ = ["OPSET", "export_onnx"]

OPSET = 18
IN_ONE_FILE = 1_900_000_000  # bytes: a file of protocol buffers ends at 2 GiB
NEAR = 1e-4  # of the logits' size: other kernels, the same numbers
ANSWERS = ("classification", "regression", "token_classification", "reward", "masked_lm")


def export_onnx(path: Path | str, folder: Path | str, *, accept: bool = False) -> Exported:
    """Write a run's model as an ONNX graph that onnxruntime answers with.

    Args:
        path: the folder of a finished run.
        folder: to write; it must not exist.
        accept: write it although it is not the model that was trained; its certificate says so.

    Raises:
        ConfigError: no such run, one that is not finished, the folder is there, or a task that writes text.
        UsageError: onnx, onnxscript or onnxruntime is not installed.
        ResourceError: it cannot be written.
        CannotMerge: no weight can do what the method does, and the tracer cannot follow it.
        IntegrityError: onnxruntime computes something else.
    """
    path, target = Path(path), Path(folder).absolute()
    refuse_taken(target)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UsageError(f"--to onnx: needs {package}, which is not installed. pip install 'luthier[onnx]'.")
    found = _model(path)
    model, predictor = found.made.model, found.made.predictor
    facts = _facts(found.made)
    with durable.folder(target) as draft:
        gap = _write(found, draft.path, facts)
        model.config.save_pretrained(draft.path)
        with quiet():
            predictor.tokenizer.save_pretrained(draft.path)
        draft.write_bytes("README.md", _card(target.name, found, facts).encode())
        del model
        names = " and ".join(found.made.otherwise)
        beside = f"; these are the plain outputs: what {names} makes of them is not in the graph" if names else ""
        certificate = certify_folder(
            path, "onnx", draft.path, halves=False, in_unit=found.made.in_unit, accept=accept, shown=target,
            beside=beside,
        )  # fmt: skip
        draft.write_json(CERTIFICATE, certificate.to_plain())
        draft.share()
    notes = [f"opset {OPSET}, fp32; inputs {', '.join(found.names)} are int64, of any batch and length"]
    notes += [f"on batches of several sizes onnxruntime is {gap:.1g} from torch, of a logit's {found.size(facts):.2g}"]
    if found.attached:
        notes += [f"{predictor.spec.method} is in the graph as it stands on the model: {found.attached}"]
    if (target / f"{GRAPH}.data").exists():
        notes += [f"its weights are beyond 2 GB, and lie in {GRAPH}.data: both files go together"]
    if names:
        notes += [f"it gives the plain outputs: what {names} makes of them is not in the graph"]
    return Exported(target, _line(target), tuple(notes), certificate.steps[0])


@dataclass
class _Found:
    """The model to trace, the names of its inputs, and why it is not merged, where it is not."""

    made: Merged
    names: tuple[str, ...]
    attached: str = ""

    @property
    def vectors(self) -> bool:
        """Whether the graph gives each text's vector too: where hidden states are those of the text's tokens alone."""
        return not self.attached

    def size(self, facts: dict[str, str]) -> float:
        return float(facts["size"])


def _model(path: Path) -> _Found:
    """The merged model; or the model with the tuning on it, where none of its weights can do the same."""
    task = Predictor.task_of(path)
    if task.template or task.name not in ANSWERS:
        does = "asks for labels by a template" if task.template else f"is of task {task.name}"
        both = task.template or task.name in ("seq2seq", "span_corruption")
        instead = "--to merged" if both else "--to gguf or --to merged"
        raise ConfigError(
            f"{path}: {does}; a graph of ONNX is one pass of a classifier or an encoder here, and writes nothing. "
            f"Nearest is {instead}."
        )
    attached = ""
    try:
        made = merged_model(path, dtype="fp32")
    except CannotMerge as error:
        attached = str(error).partition("): ")[2].split(". ")[0]
        predictor = Predictor(path, dtype=torch.float32, decode=True)
        predictor.tuned = load(predictor.tuned.detach(), path / "tuning")  # without kernels that no tracer follows
        describe(predictor.tuned.model, predictor)
        in_unit = (task.scale, task.center) == (1.0, 0.0)
        otherwise = tuple(part.name for part in answerers(predictor.tuned))
        made = Merged(predictor.tuned.model, predictor, False, in_unit, otherwise)
    taken = set(inspect.signature(type(made.model).forward).parameters)
    given = (*dict.fromkeys(("input_ids", "attention_mask", *made.predictor.tokenizer.model_input_names)),)
    return _Found(made, tuple(name for name in given if name in taken), attached)


def _facts(made: Merged) -> dict[str, str]:
    """What stands in the graph's metadata, as texts."""
    task = made.predictor.task
    told: dict[str, Any] = {
        "task": task.name, "labels": json.dumps(task.labels), "max_length": made.predictor.contract["max_length"],
        "base": called(made.predictor.spec.model), "method": made.predictor.spec.method,
        "written_by": f"luthier {__version__}",
    }  # fmt: skip
    if task.thresholds:
        told["thresholds"] = json.dumps(task.thresholds)
    if not made.in_unit:
        told |= {"scale": repr(task.scale), "center": repr(task.center)}
    return {name: str(value) for name, value in told.items()}


class _Graph(nn.Module):
    """What is traced: texts in, logits out, and beside them each text's vector."""

    def __init__(self, model: Any, names: Sequence[str], vectors: bool) -> None:
        super().__init__()
        self.model, self.names, self.vectors = model, tuple(names), vectors

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, given, strict=True))
        out = self.model(**inputs, **({"output_hidden_states": True} if self.vectors else {}))
        if not self.vectors:
            return (out.logits,)
        last = out.hidden_states[-1]  # (b, t, d)
        real = inputs["attention_mask"].to(last.dtype)[..., None]
        return out.logits, (last * real).sum(1) / real.sum(1).clamp(min=1)


@contextmanager
def _calm() -> Iterator[None]:
    """Inside, torch's exporter says nothing of packages that it could use."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # what cannot be followed is printed, graph and all
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(found: _Found, folder: Path, facts: dict[str, str]) -> float:
    """Write the graph, and compare what onnxruntime makes of it; the largest difference of a logit.

    Raises:
        CannotMerge: the tracer cannot follow the method, or only at one size.
        IntegrityError: onnxruntime computes something else.
    """
    model = found.made.model.to("cpu").eval()
    graph = _Graph(model, found.names, found.vectors)
    n_vocab = int(model.get_input_embeddings().weight.shape[0])
    large = sum(p.numel() for p in model.parameters()) * 4 > IN_ONE_FILE
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    outputs = ["logits", "vectors"] if found.vectors else ["logits"]
    try:
        with _calm():
            program = torch.onnx.export(
                graph, _rows(found.names, n_vocab, 2, 12), input_names=list(found.names), output_names=outputs,
                dynamo=True, dynamic_shapes={"given": (sizes,) * len(found.names)}, opset_version=OPSET, verbose=False,
            )  # fmt: skip
            assert program is not None
            program.model.metadata_props.update(facts)
            try:
                program.save(str(folder / GRAPH), external_data=large)
            except OSError as error:
                raise durable.explain(error, folder.parent, f"writing {GRAPH}") from error
        session = session_of(folder)
        fixed = [i.name for i in session.get_inputs() if any(isinstance(n, int) for n in i.shape)]
        if fixed:
            raise RuntimeError(f"the sizes of {', '.join(fixed)} became fixed")
    except LuthierError:
        raise
    except Exception as error:  # the exporter's own are of many classes
        raise _cannot(found, error) from error
    gap = size = 0.0
    for rows, tokens in ((2, 12), (1, 5), (3, 9)):
        batch = _rows(found.names, n_vocab, rows, tokens)
        with _calm():
            wanted = graph(*batch)
        got = session.run(None, {n: t.numpy() for n, t in zip(found.names, batch, strict=True)})
        for name, ours, theirs in zip(outputs, wanted, got, strict=True):
            off, large_as = float((torch.tensor(theirs) - ours).abs().max()), float(ours.abs().max())
            if not off <= NEAR * max(large_as, 1e-6):
                raise IntegrityError(
                    f"onnxruntime gives other {name} than torch for {rows} rows of {tokens} tokens: {off:.2g} apart, "
                    f"of {large_as:.2g}. Nothing was written. Please report model and method."
                )
            if name == "logits":
                gap, size = max(gap, off), max(size, large_as)
    facts["size"] = repr(size)
    return gap


def _rows(names: Sequence[str], n_vocab: int, rows: int, tokens: int) -> tuple[Tensor, ...]:
    """Some ids, the last row ending in padding where there are several."""
    ids = (torch.arange(rows * tokens) * 7919 % n_vocab).reshape(rows, tokens)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, tokens // 2 :] = 0
    known = {"input_ids": ids, "attention_mask": mask}
    return tuple(known.get(name, torch.zeros_like(ids)) for name in names)


def _cannot(found: _Found, error: Exception) -> CannotMerge:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = next((line for line in reversed(lines) if line.startswith("<class")), lines[0] if lines else repr(error))
    what, spec = (f"{type(found.made.model).__name__}", found.made.predictor.spec)
    if found.attached:
        return CannotMerge(
            f"{spec.method} cannot be put into a graph of ONNX. Merged: {found.attached}. Traced as it stands: "
            f"{why[:300]}. Nearest is a method that merges: luthier methods --mergeable lists them."
        )
    return CannotMerge(f"{what} cannot be put into a graph of ONNX: {why[:300]}. Nearest is luthier merge.")


def _line(target: Path) -> str:
    return f"onnxruntime.InferenceSession({str(target / GRAPH)!r})"


def _card(name: str, found: _Found, facts: dict[str, str]) -> str:
    task, spec = found.made.predictor.task, found.made.predictor.spec
    reads = [
        "import json, onnxruntime, transformers", "",
        f'session = onnxruntime.InferenceSession("{name}/{GRAPH}")',
        f'tokenizer = transformers.AutoTokenizer.from_pretrained("{name}")',
        'rows = tokenizer(["..."], padding=True, truncation=True, return_tensors="np")',
        'given = {i.name: rows[i.name].astype("int64") for i in session.get_inputs()}',
        'logits = session.run(["logits"], given)[0]',
    ]  # fmt: skip
    if task.labels:
        reads += ['labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])']
        answers = "logits[0]" if task.name == "token_classification" else "logits"
        reads += [f"print([labels[i] for i in {answers}.argmax(-1)])"]
    else:
        reads += ["print(logits)"]
    said = [
        "---", "library_name: onnx", "---", "", f"# {name}", "",
        f"`{facts['base']}` tuned with {spec.method} by luthier {__version__}, as a graph of ONNX (opset {OPSET}, "
        "fp32).", "", "```python", *reads, "```", "",
        f"Inputs: {', '.join(found.names)}, int64, (batch, tokens); another type is refused by onnxruntime. "
        f"attention_mask is 1 where a token is real. Task: {task.name.replace('_', ' ')}.",
    ]  # fmt: skip
    if found.vectors:
        said += ["Output `vectors` is each text's mean last hidden state over its real tokens, (batch, width)."]
    if task.labels:
        said += [f"Labels: {', '.join(task.labels)}; they stand in the graph's metadata too."]
    if task.thresholds:
        said += [f"Probabilities from which a label is answered: {facts['thresholds']}, in the order of the labels."]
    if not found.made.in_unit:
        said += [f"The last layer has no bias: multiply an answer by {task.scale!r} and add {task.center!r}."]
    said += [found.made.predictor.length_said]
    if found.attached:
        said += [f"{spec.method} stands in the graph beside the weights: {found.attached}."]
    return "\n".join(said) + "\n"
