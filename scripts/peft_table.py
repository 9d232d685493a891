"""Write docs/peft.md: what of the installed peft library we have, and how far apart the two compute.

    PYTHONPATH=src:tests python scripts/peft_table.py

For each method that both have in files: a tiny Llama is tuned with numbers that are nowhere zero, written for peft,
read by peft's own loader and read back; the gap is the largest difference between two logits.
"""

import re
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from methods import test_peft_whole as whole
from methods.checks import logits, stir
from peft import PeftType
from tiny import inputs, tiny

from luthier.surgery import METHODS, PeftWhole, attach, from_peft, to_peft
from luthier.surgery.peft_files import forms

PAGE = Path(__file__).resolve().parent.parent / "docs" / "peft.md"
SITES = ("attn.k", "ffn.down")
# peft's type -> our method of the same idea, where no files pass between them, and why.
APART: dict[str, tuple[str, str]] = {
    "ADAMSS": (
        "adamss",
        "which rows of a weight belong to which subspace is not in its file: the k-means of scikit-learn finds it "
        "again from the base, and another version or machine may find other rows for the same numbers; ours "
        "keeps them, and the same numbers give the same answers (`tests/methods/test_adamss.py`)",
    ),
    "XLORA": (
        "xlora",
        "its file holds the shares' network and absolute paths of LoRAs elsewhere, whose names it reads as those of a "
        "model with a `model` inside (a BERT's are refused) and only where they are called 0, 1, ...; the LoRAs go out "
        "one by one, and the same numbers give the same answers (`tests/methods/test_xlora.py`)",
    ),
    "FROD": (
        "frod",
        "the same from the same basis (`tests/methods/test_frod.py`); peft's file holds V, and its loader makes U of a "
        "V of its own, which on another machine need not be that of the file",
    ),
    "LILY": (
        "lily",
        "the same for one row without pads (`tests/methods/test_lily.py`); peft mixes by the mean over the whole batch,"
        " so that a row's answer depends on its neighbours, and a file would be answered otherwise there",
    ),
}
# What is to be known of a pair whose files do pass.
NOTES = {
    "prefix_tuning": "models of llama, mistral, qwen2 and qwen3: keys are turned on their way, as peft moves the text",
    "cartridge": "as `prefix_tuning`; its first word stays",
    "llama_adapter": "with `gate=layer`, where the output projection has no bias: peft adds it twice",
    "prompt_tuning": "not for classifiers of encoders: peft reads the first vector there",
    "p_tuning": "the vectors that the network gave; none of them behind the text",
    "mpt": "peft's `num_ranks=1`",
    "trainable_tokens": "peft keeps the new vectors, ours what was added to them: the same up to rounding",
    "cpt": "language models alone; its vectors, from which the offsets follow on the same base",
    "adalora": "pruned triplets go out as zeros",
    "glora": "the way of each place goes out as the richest one, which holds it exactly",
    "shadow": "language models of llama, mistral, qwen2 and qwen3, with one block beside of the model's width",
    "layernorm_tuning": "all norms, or all of the blocks",
}
# peft's types that are not built here, and the reason where it is one.
WHY_NOT: dict[str, str] = {}
HEAD = """# What peft has and we have

Written by `PYTHONPATH=src:tests python scripts/peft_table.py`, against peft {version}. The gap is the largest
difference between a logit of ours and of peft's, on a tiny Llama in fp32 whose tuned numbers are nowhere zero, after
peft's own loader has read our file. "Back": our reader gave the same bits from the file that peft wrote, or
the same logits within 1e-6 where a file holds the numbers in another form.

Same outputs, gradients and merged weights, on an encoder and a decoder, are tested in
`tests/methods/test_against_peft_more.py`. Known differences: peft's OFT turns the other way round in its
Neumann series than in its exact path (ours does both: `terms`; `tests/methods/test_orthogonal.py`);
peft's BOFT takes one factor, whatever its settings say, where its CUDA code is missing; peft's C3A hands the
layers below the gradient of a mirrored kernel (`tests/methods/test_peft_relatives.py`).
A PiSSA, OLoRA or other start of LoRA goes out as a LoRA of twice the rank, and comes in as that.

| peft | ours | gap | out | back | note |
| --- | --- | --- | --- | --- | --- |
"""


def measured(name: str, folder: Path) -> tuple[float, bool]:
    """How far apart the logits are, and whether what peft writes comes back as the same bits."""
    cls = METHODS.get(name)
    given = {n: v for n, v in cls.tiny.items() if n != "lr"} | ({"factors": 1} if name == "boft" else {})
    places = {} if name == "ia3" else {"sites": SITES}
    model = tiny("llama")
    tuned = attach(model, name, train_head=False, **places, **given)
    stir(tuned, 0.05)
    to_peft(tuned, folder / "ours")
    other = peft.PeftModel.from_pretrained(tiny("llama"), str(folder / "ours")).eval()
    batch = inputs(model)
    gap = float((logits(other, batch) - logits(model, batch)).abs().max())
    other.save_pretrained(str(folder / "theirs"))
    again = tiny("llama")
    from_peft(again, folder / "theirs")
    return gap, torch.equal(logits(again, batch), logits(model, batch))


def measured_whole(name: str, folder: Path) -> tuple[float, bool]:
    """The same for a method whose file is more than the same tensors at each layer."""
    tuned, model = whole.made(name, 0, "llama", "lm")
    batch, tasks = whole.whole_rows(model), whole.SETTINGS[name][0].get("tasks", 0)
    of_tasks = {"row_task": torch.arange(len(batch["input_ids"])) % tasks} if tasks else {}
    with torch.no_grad():
        ours = model(**batch, **of_tasks).logits
    to_peft(tuned, folder / "ours")
    other = peft.PeftModel.from_pretrained(whole.fresh(name, "llama", "lm"), str(folder / "ours"))
    gap = float((whole.answers(other, {n: t for n, t in batch.items() if n != "labels"}, tasks) - ours).abs().max())
    other.save_pretrained(str(folder / "theirs"))
    again = whole.fresh(name, "llama", "lm")
    from_peft(again, folder / "theirs")
    with torch.no_grad():
        return gap, torch.allclose(again(**batch, **of_tasks).logits, ours, atol=1e-6)


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    peft.tuners.boft.layer.get_fbd_cuda = lambda: None
    both = {form: name for form, (name, _) in forms().items()} | {"IA3": "ia3"}
    rows = []
    for kind in sorted(t.value for t in PeftType):
        names = ["lora", "dora", "rslora", "pissa"] if kind == "LORA" else [both[kind]] if kind in both else []
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                measure = measured_whole if isinstance(METHODS.get(name).peft, PeftWhole) else measured
                gap, back = measure(name, Path(folder))
            note = NOTES.get(name, "") if back else "comes back as the `lora` that computes the same"
            rows.append(f"| {kind} | `{name}` | {gap:.0e} | yes | {'yes' if back else 'as lora'} | {note} |")
        if not names:
            name, why = APART.get(kind, ("", ""))
            known = name in METHODS
            ours = f"`{name}`" if known else "-"
            rows.append(f"| {kind} | {ours} | - | no | no | {why if known else WHY_NOT.get(kind, 'not built')} |")
    text = HEAD.format(version=re.sub(r"[^0-9.].*", "", peft.__version__)) + "\n".join(rows) + "\n"
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(rows)} rows")


if __name__ == "__main__":
    main()
