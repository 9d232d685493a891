"""A merged encoder-decoder is a plain folder whose model writes what the run writes."""

import json
from pathlib import Path

import torch
from little import little_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.workflow import Predictor, merge, train


def test_a_merged_seq2seq_model_writes_as_the_run_does_without_luthier(tmp_path: Path) -> None:
    words = ("red", "blue", "dog", "cat")
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {w}", "response": f"{w} {w}"} for w in words] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        RunSpec(
            model=str(little_model(tmp_path / "bart", "bart")), data=DataSpec(source=str(data), test_share=0),
            method="lora", steps=12, batch=BatchSpec(size=8), precision="fp32", threads=1, out=str(tmp_path / "run"),
        )
    )  # fmt: skip
    predictor = Predictor(tmp_path / "run")
    asked = [f"say {w}" for w in words]
    ours = [answer["text"] for answer in predictor.texts(asked, max_new_tokens=6)]
    merge(tmp_path / "run", tmp_path / "plain")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain").eval()
    assert not hasattr(model, "luthier")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    for text, wanted in zip(asked, ours, strict=True):
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=6,
                do_sample=False, num_beams=1,
            )[0]  # fmt: skip
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == wanted.strip()
    assert "AutoModelForSeq2SeqLM.from_pretrained('plain')" in (tmp_path / "plain" / "README.md").read_text()
