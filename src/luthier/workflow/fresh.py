"""One step of a certificate in a process of its own: nothing is left there of the process that trained or wrote.

    asked    JSON on standard input: the run, the step, the folder to read, rows of the user's
    answer   a folder with what the model made of the rows (`Seen`), and facts.json

A merged folder is read by transformers alone, an exported one by peft, and other formats by the programs that they are
for: no part of luthier acts in those models.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.core import IntegrityError, LuthierError
from luthier.runs import durable
from luthier.runs.parent import end_with_the_parent
from luthier.workflow.reference import NEW_TOKENS, Reader, Reference, Seen, observe, read_reference

__all__ = ["Answer", "Asked", "ask", "base_of", "look_plainly", "main"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a step is to do.

    Attributes:
        step: the name of a function of this file, or a format of ELSEWHERE.
        run: the run's folder.
        folder: of what was merged or exported.
        store: the codes to hold it in.
        prompts: rows of the user's, beside those that the run kept.
    """

    step: str
    run: str
    folder: str = ""
    store: str = ""
    prompts: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Answer:
    """What a process found: of the kept rows, of the user's rows, and of the base where the step loads it."""

    kept: Seen
    asked: Seen = field(default_factory=Seen)
    base: Seen | None = None
    base_asked: Seen | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def ask(asked: Asked) -> Answer:
    """Do a step in a new process.

    Raises:
        IntegrityError: with what went wrong there.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-certify-") as place:
        done = subprocess.run(
            [sys.executable, "-c", "from luthier.workflow.fresh import main; main()", place],
            input=json.dumps(asdict(asked)), capture_output=True, text=True, check=False, env=_surroundings(),
        )  # fmt: skip
        folder = Path(place)
        if not (folder / "facts.json").exists():
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise IntegrityError(f"the process ended before its answer: {last[:300]}")
        facts = json.loads((folder / "facts.json").read_bytes())
        if "error" in facts:
            raise IntegrityError(facts["error"])
        found = {n: Seen.load(folder / n) for n in ("kept", "asked", "base", "base_asked") if (folder / n).exists()}
        return Answer(**found, facts=facts)


def _surroundings() -> dict[str, str]:
    """This process's own, with the place where it found luthier: it may have been told by other means."""
    import luthier

    places = [str(Path(luthier.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def main() -> None:
    """What the process does: see the top of this file."""
    end_with_the_parent()
    place = Path(sys.argv[-1])
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = answer_of(Asked(**json.load(sys.stdin)))
        except Exception as error:  # whatever it is, the step has failed of it
            told = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
            durable.write_json(place / "facts.json", {"error": told.strip()[:2000]})
            return
    for name in ("kept", "asked", "base", "base_asked"):
        seen = getattr(answer, name)
        if seen is not None:
            (place / name).mkdir()
            seen.save(place / name)
    durable.write_json(place / "facts.json", answer.facts)


def answer_of(asked: Asked) -> Answer:
    """Do a step here."""
    step = STEPS.get(asked.step)
    if step is None:
        module, _, name = ELSEWHERE[asked.step].partition(":")
        step = getattr(import_module(module), name)
    answer: Answer = step(asked)
    return answer


# --- steps that luthier answers ---------------------------------------------------------------------------------------


def _of_run(asked: Asked, *, plain: bool = False) -> tuple[Any, Callable[..., tuple[Seen, Seen]]]:
    """A run as `predict` loads it, and what looks at the rows with it.

    Args:
        plain: in fp32 and without codes, as merged and exported models are looked at.
    """
    import torch

    from luthier.training.precision import Precision
    from luthier.workflow.prediction import Predictor

    predictor = Predictor(asked.run, dtype=torch.float32 if plain else None, decode=plain)
    precision = Precision("fp32", "for a certificate") if plain else predictor.precision
    if predictor.spec.threads is not None:
        torch.set_num_threads(predictor.spec.threads)
    model = predictor.tuned.model
    reader = Reader.of_run(Path(asked.run) / "tuning", predictor.tokenizer, _vocabulary(model))
    collator = predictor.collator()
    reference = _kept(asked)

    def look(of_base: bool = False) -> tuple[Seen, Seen]:
        by = (reader, collator, precision, predictor.device)
        room = predictor.generator.limit
        new = 0 if of_base else reference.new
        kept = observe(model, reference.rows, *by, room=room, new=new, numbers=reference.numbers, of_base=of_base)
        new = 1 if of_base else NEW_TOKENS
        more = observe(model, asked.prompts, *by, room=room, new=new, answered=False, of_base=of_base)
        return kept, more

    return predictor, look


def _kept(asked: Asked) -> Reference:
    return read_reference(Path(asked.run)) or Reference((), Seen(), ())


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def reloaded(asked: Asked) -> Answer:
    """The run as it lies on the disk, in the arithmetic of training; and its base."""
    predictor, look = _of_run(asked)
    kept, more = look()
    with predictor.tuned.base_only():
        base, base_more = look(of_base=True)
    return Answer(kept, more, base, base_more, {"precision": predictor.precision.name})


def in_fp32(asked: Asked) -> Answer:
    """The same in fp32 and without codes: what merged and exported weights are held against."""
    predictor, look = _of_run(asked, plain=True)
    kept, more = look()
    with predictor.tuned.base_only():
        base, base_more = look(of_base=True)
    return Answer(kept, more, base, base_more)


def served(asked: Asked) -> Answer:
    """Inside `serving()`, as `predict` answers."""
    predictor, look = _of_run(asked)
    with predictor.tuned.serving():
        return Answer(*look())


def detached(asked: Asked) -> Answer:
    """Taken off, which must leave the base bit for bit, and put on again."""
    import torch

    from luthier.surgery import load

    predictor, look = _of_run(asked)
    model, tuned = predictor.tuned.model, predictor.tuned
    with tuned.base_only():
        before = {name: value.clone() for name, value in tuned.edited.parameters.items()}
    tuned.detach()
    after = dict(model.named_parameters(remove_duplicate=False))
    strange = [n for n, value in before.items() if n not in after or not torch.equal(after[n], value)]
    if strange or "luthier" in dict(model.named_children()):
        raise IntegrityError(f"detached, the model is not its base again: {', '.join(strange[:3]) or 'luthier stays'}")
    del before
    predictor.tuned = load(model, Path(asked.run) / "tuning")
    predictor.accelerate()  # by the same kernels, so that the numbers can be the same bits
    return Answer(*look())


# --- steps that other programs answer ---------------------------------------------------------------------------------


def merged(asked: Asked) -> Answer:
    """A merged folder, read by transformers alone."""
    import transformers

    from luthier.workflow.load_model import find_model, load_config

    model, told = _transformers(asked.folder, asked, output_loading_info=True)
    strange = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, told[kind]))[:3])}" for kind in told if told[kind]
    ]
    if strange:
        raise IntegrityError(f"its tensors are not those of its model ({'; '.join(strange)})")
    base = load_config(find_model(_spec(asked)[0].model)).get_text_config()
    if base.tie_word_embeddings and not model.config.get_text_config().tie_word_embeddings:
        raise IntegrityError("its output head is no longer tied to its input embedding, as the base's is")
    return Answer(*look_plainly(model, asked), facts={"by": f"transformers {transformers.__version__}"})


def exported(asked: Asked) -> Answer:
    """An exported folder, read by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    import transformers
    from safetensors import safe_open

    folder = Path(asked.folder)
    base, beside = base_of(asked)
    if (folder / "generation_config.json").exists():  # as the folder's README says
        base.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        held = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
        there = set(opened.keys())
    if strange := sorted(held ^ there):
        raise IntegrityError(
            f"peft has tensors that the file does not, or the other way round: {', '.join(strange[:3])}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = look_plainly(model, asked)
    return Answer(*answer, facts={"by": f"peft {peft.__version__}{beside}"})


def base_of(asked: Asked) -> tuple[Any, str]:
    """The base beside which an export is read, in fp32; and what is to be said of it."""
    import torch

    from luthier.surgery import decode_layers
    from luthier.training.precision import choose_device
    from luthier.workflow.load_model import find_model, load_model

    spec, task = _spec(asked)
    if spec.codes is not None:
        base, _ = load_model(
            find_model(spec.model), task, dtype=torch.float32, device=choose_device(spec.device), seed=spec.seed,
            store=spec.codes,
        )  # fmt: skip
        decode_layers(base)
        return base, f", beside the weights that its {spec.codes} codes stand for"
    if (Path(asked.folder) / "base").is_dir():
        return _transformers(str(Path(asked.folder) / "base"), asked)[0], ""
    return _transformers(str(find_model(spec.model).path), asked, head=True)[0], ""


def quantised(asked: Asked) -> Answer:
    """A merged folder held in codes; and the run's base held so, which says what the codes alone cost."""
    import torch

    from luthier.workflow.load_model import find_model, load_model

    spec, task = _spec(asked)
    found = []
    for place in (asked.folder, spec.model):
        model, _ = load_model(
            find_model(place), task, dtype=torch.float32, device=torch.device("cpu"), seed=spec.seed, store=asked.store
        )
        found.append(look_plainly(model, asked))
        del model
    return Answer(*found[0], *found[1])


def _spec(asked: Asked) -> tuple[Any, Any]:
    from luthier.core import build
    from luthier.data.tasks import Task
    from luthier.runs import RunFolder
    from luthier.runs.spec import RunSpec
    from luthier.surgery import read_tuning

    run = RunFolder.open(Path(asked.run), write=False)
    facts = dict(read_tuning(run.tuning)["task"])
    facts.pop("columns")
    return RunSpec.from_plain(run.spec, where=f"{asked.run}/run.json"), build(Task, facts, "tuning.json task")


def _transformers(path: str, asked: Asked, *, head: bool = False, **more: Any) -> Any:
    """A model in fp32, by the class of its task; (model, what loading said).

    Args:
        head: the folder is a base that knows nothing of the run's labels.
    """
    import torch
    import transformers

    from luthier.training.precision import choose_device
    from luthier.workflow.load_model import quiet, with_head

    spec, task = _spec(asked)
    with quiet():
        if head:
            more["config"] = with_head(transformers.AutoConfig.from_pretrained(path, local_files_only=True), task)
        found = getattr(transformers, task.auto_class).from_pretrained(
            path, dtype=torch.float32, local_files_only=True, **more
        )
    model, told = found if isinstance(found, tuple) else (found, {})
    return model.to(choose_device(spec.device)).eval(), told


def look_plainly(model: Any, asked: Asked, tokenizer: Any = None) -> tuple[Seen, Seen]:
    """The rows, read by the folder's own tokenizer and template, and what a model without luthier makes of them.

    Args:
        tokenizer: the folder's own, where it is not in files of transformers.
    """
    import transformers

    from luthier.data.tokenizer import position_limit
    from luthier.training.precision import Precision
    from luthier.workflow.load_model import collator_of, quiet

    if tokenizer is None:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(asked.folder, local_files_only=True)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    reader = Reader.of_run(Path(asked.run) / "tuning", tokenizer, _vocabulary(inner), own_template=True)
    pad = int(reader.contract["pad"]["id"])
    collator = collator_of(reader.task, inner, tokenizer, pad_id=pad, pad_to=1, seed=0)
    device = next(model.parameters()).device
    precision = Precision("fp32", "for a certificate")

    room, kept = position_limit(inner.config), _kept(asked)
    by = (reader, collator, precision, device)
    return (
        observe(model, kept.rows, *by, room=room, new=kept.new, numbers=kept.numbers, facts=False),
        observe(model, asked.prompts, *by, room=room, answered=False, facts=False),
    )


STEPS: dict[str, Callable[[Asked], Answer]] = {
    step.__name__: step for step in (reloaded, in_fp32, served, detached, merged, exported, quantised)
}

# Formats of other programs: the file, and the function in it.
ELSEWHERE = {
    "onnx": "luthier.workflow.onnx_reader:answer",
    "gguf": "luthier.workflow.gguf_reader:answer",
    "gguf_adapter": "luthier.workflow.gguf_reader:answer_of_adapter",
}
