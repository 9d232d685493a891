"""A model whose weights one file of protocol buffers cannot hold, as a graph for onnxruntime.

    OMP_NUM_THREADS=1 python benchmarks/onnx_beyond_2gb.py --layers 20

Makes a BERT of random numbers with a vocabulary of words, 1,536 wide, in a temporary folder; trains lora for one step;
exports it, which compares the logits of onnxruntime with torch's on batches of several sizes and, in a process of its
own, on the rows that the run kept. Then exports once more and fails after the weights were written: nothing may stay.
6 GB of memory, as much again in the process that reads it back, and 10 GB of disk; --layers 2 tries the command itself.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from luthier import train
from luthier.workflow import onnx_export
from luthier.workflow.formats import export

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "cat", "dog", "is", "the", "a"]


def model_at(folder: Path, layers: int, width: int) -> int:
    """Write the model and its tokenizer; returns the bytes of its numbers in fp32."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=4 * width, max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.parameters())


def left_by_a_failure(run: Path, home: Path) -> list[str]:
    """What an export leaves in `home` that fails once its files are written."""
    before, whole = set(home.iterdir()), onnx_export.session_of

    def fails(folder: Path) -> Any:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        raise OSError(f"failed on purpose, with {sum(sizes.values()):,} bytes written")

    onnx_export.session_of = fails
    try:
        export(run, home / "half", to="onnx")
        raise SystemExit("the export that has to fail did not")
    except Exception as error:  # it is told as whatever the exporter makes of it
        print(f"failed: {str(error)[:160]}")
    finally:
        onnx_export.session_of = whole
    return sorted(path.name for path in set(home.iterdir()) - before)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--layers", type=int, default=20)
    told.add_argument("--width", type=int, default=1536)
    given = told.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        size = model_at(home / "model", given.layers, given.width)
        print(f"{size:,} bytes of numbers", flush=True)
        rows = [{"text": f"{' '.join(WORDS[7 : 8 + n])} {c}", "label": c} for c in WORDS[4:7] for n in range(5)]
        train(str(home / "model"), rows, steps=1, batch=4, out=home / "run", precision="fp32")
        written = export(home / "run", home / "graph", to="onnx")
        for path in sorted((home / "graph").iterdir()):
            print(f"{path.name}: {path.stat().st_size:,} bytes")
        step = written.step
        print(*written.notes, sep="\n")
        print("certificate:", None if step is None else (step.status, step.gap, step.tolerance))
        print("left by an export that failed:", left_by_a_failure(home / "run", home) or "nothing")


if __name__ == "__main__":
    main()
