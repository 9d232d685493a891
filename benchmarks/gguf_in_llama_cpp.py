"""What llama.cpp makes of a GGUF that a chat run was exported to, beside the run itself.

    python benchmarks/gguf_in_llama_cpp.py runs/chat/lora /tmp/gguf --dtype q8_0

Exports where the folder is not there yet. Each question is a turn of the run's template; the run answers greedily, and
both read question and answer: divergence in nats a position, share of positions with the same likeliest token, largest
difference of a logit, and whether both cut the question into the same tokens. Needs llama-cpp-python.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.core import build
from luthier.data.chat import Chat, ChatTemplate
from luthier.workflow.formats import export
from luthier.workflow.prediction import Predictor

QUESTIONS = (
    "What did you do last weekend?",
    "Tell me about your favourite food.",
    "Do you like music?",
    "How is the weather today?",
)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("run", type=Path)
    told.add_argument("folder", type=Path)
    told.add_argument("--dtype", default="q8_0")
    told.add_argument("--new", type=int, default=24)
    given = told.parse_args()
    from llama_cpp import Llama

    if not given.folder.exists():
        export(given.run, given.folder, to="gguf", dtype=given.dtype)
    file = next(given.folder.glob("*.gguf"))
    predictor = Predictor(given.run)
    template = build(ChatTemplate, predictor.contract["template"], "template")
    theirs: Any = Llama(str(file), n_ctx=512, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
    print(f"{file.name}: {file.stat().st_size:,} bytes")
    print("| question | same tokens | divergence | same likeliest | largest difference |")
    print("|---|---|---|---|---|")
    for question in QUESTIONS:
        with Chat(predictor.tokenizer, template=template) as chat:
            ids = chat.prompt([{"role": "user", "content": question}])
        alike = theirs.tokenize(predictor.tokenizer.decode(ids).encode(), add_bos=False, special=True) == ids
        model: Any = predictor.tuned.model
        with torch.inference_mode(), predictor.tuned.serving():
            text = torch.tensor([ids])
            whole = model.generate(
                input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=given.new, do_sample=False,
                pad_token_id=predictor.generator.pad_id,
            )  # fmt: skip
            ours = model(input_ids=whole).logits[0].float()
        theirs.reset()
        theirs.eval(whole[0].tolist())
        other = torch.tensor(np.array(theirs.scores[: len(ours)]))
        one, two = ours.log_softmax(-1), other.log_softmax(-1)
        apart = float((one.exp() * (one - two)).sum(-1).mean())
        same = float((ours.argmax(-1) == other.argmax(-1)).float().mean())
        gap = float((ours - other).abs().max())
        print(f"| {question} | {'yes' if alike else 'no'} | {apart:.4f} | {same:.1%} | {gap:.2f} |", flush=True)
    theirs.close()


if __name__ == "__main__":
    main()
