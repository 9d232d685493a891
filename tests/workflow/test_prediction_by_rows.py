"""A finished run answers row by row: as it was trained, each row its answer or its reason, alone or in batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_prediction_reads_as_training import TEMPLATES
from little import little_data, little_model
from safetensors.torch import load_file
from tiny import tiny
from word_tables import table, word_tokenizer

from luthier.core import DataError
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.surgery import attach
from luthier.training.precision import choose_precision
from luthier.workflow import Predictor, predict, train
from luthier.workflow.generation import Generator


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _spec(home: Path, data: Path, kind: str = "bert", **changes: Any) -> RunSpec:
    given: dict[str, Any] = {
        "model": str(little_model(home / kind, kind)), "data": DataSpec(source=str(data), test_share=0),
        "method": "lora", "steps": 4, "batch": BatchSpec(size=4), "precision": "fp32", "threads": 1,
        "out": str(home / "run"),
    }  # fmt: skip
    return RunSpec(**{**given, **changes})


TAGGED = [{"tokens": ["paris", "is", w, "city"], "ner_tags": ["B-LOC", "O", "O", "O"]} for w in ("red", "a", "one")] * 4


def test_a_tagger_gives_every_word_one_tag_in_order_also_without_gold_tags(tmp_path: Path) -> None:
    train(_spec(tmp_path, _write(tmp_path / "tags.jsonl", TAGGED), max_length=16))
    asked = [
        {"tokens": ["paris", "\u200b", "is", "", "red"]},
        {"tokens": ["paris", "is", "red"]},
        {"tokens": ["paris", "is", "red", "and", "rome"] * 20},
        {"tokens": []},
    ]
    found = predict(tmp_path / "run", data=str(_write(tmp_path / "asked.jsonl", asked)))
    assert [len(answer["tags"]) for answer in found[:3]] == [5, 3, 100]
    assert found[0]["tags"][3] is None and "5 words" in found[0]["note"], "a word without a token has no tag"
    assert all(tag in ("B-LOC", "O") for tag in [*found[1]["tags"], *found[2]["tags"]])
    assert "note" not in found[1] and "note" not in found[2]
    assert found[3] == {"refused": "field 'tokens' has no words"}
    predictor = Predictor(tmp_path / "run")
    (alone,) = predictor.texts(["paris is red"])
    assert alone["tags"] == found[1]["tags"] and alone["sure"] == pytest.approx(found[1]["sure"], abs=1e-6)
    assert found[0]["sure"][3] is None and all(0.5 < share < 1 for share in found[1]["sure"]), "of two tags"


def test_a_source_is_answered_with_its_context_and_cut_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("red", "blue", "dog", "cat")
    rows = [{"instruction": "say the name", "input": w, "output": w} for w in words] * 3
    data = _write(tmp_path / "rows.jsonl", rows)
    train(_spec(tmp_path, data, "bart", max_length=8))
    predictor = Predictor(tmp_path / "run")
    seen: list[list[int]] = []
    generate = predictor.tuned.model.generate

    def watched(**given: Any) -> Any:
        seen.extend(r[m.bool()].tolist() for r, m in zip(given["input_ids"], given["attention_mask"], strict=True))
        return generate(**given)

    monkeypatch.setitem(predictor.tuned.model.__dict__, "generate", watched)
    asked = [{"instruction": "say the name", "input": w} for w in (*words, "moon " * 200)]
    found = predictor.rows(table(asked), max_new_tokens=4)
    trained = encode(
        table([{**row, "output": "red"} for row in asked]), predictor.columns, predictor.task, predictor.tokenizer,
        n_vocab=131, max_length=8,
    )  # fmt: skip
    wanted = [trained.ids[a:b].tolist() for a, b in zip(trained.offsets[:-1], trained.offsets[1:], strict=True)]
    assert all(ids in seen for ids in wanted) and len({tuple(ids) for ids in wanted}) == 5
    assert "cut to 8" in found[4]["note"]


def _of_words(folder: Path, template: str) -> Path:
    """A tiny decoder whose tokenizer has a template with special tokens of its own."""
    text, special, _ = TEMPLATES[template]
    model = little_model(folder, "llama")
    tokenizer = word_tokenizer("gpt", chat_template=text)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(model)
    return model


@pytest.mark.parametrize("template", ["gemma", "llama3"])
def test_what_a_template_ends_a_turn_with_is_stored_with_the_tuning_and_stops_generation(
    template: str, tmp_path: Path
) -> None:
    turns = [[{"role": "user", "content": f"why {w}"}, {"role": "assistant", "content": w}] for w in ("red", "blue")]
    data = _write(tmp_path / "chat.jsonl", [{"messages": each} for each in turns * 8])
    model = _of_words(tmp_path / "llama", template)
    train(_spec(tmp_path, data, "llama", model=str(model), steps=1))
    predictor = Predictor(tmp_path / "run")
    end = predictor.tokenizer.convert_tokens_to_ids(TEMPLATES[template][2])
    assert predictor.contract["stop"] == sorted({end, predictor.tokenizer.eos_token_id, 2})  # 2 is the model's own
    assert predictor.tuned.model.generation_config.eos_token_id == predictor.contract["stop"]
    assert predictor.generator.stop == tuple(predictor.contract["stop"])


def test_an_answer_ends_before_the_first_stop_token(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", "lm"), word_tokenizer("gpt")
    tuned = attach(model, "lora")
    prompts = encode(
        table([{"text": "how far is it"}]), Columns(shape="plain", text="text"), Task(name="causal_lm"), tokenizer,
        n_vocab=131, max_length=20, with_targets=False,
    )  # fmt: skip
    device = torch.device("cpu")
    options: dict[str, Any] = {"pad_id": 0, "limit": None, "tokens": 512}
    precision = choose_precision("fp32", device)
    ids = model.generate(
        input_ids=torch.from_numpy(prompts.ids.astype("int64"))[None], do_sample=False, max_new_tokens=12,
        eos_token_id=None, pad_token_id=0,
    )[0, len(prompts.ids) :].tolist()  # fmt: skip
    end = next(t for t in ids[2:] if t not in ids[:2])
    wanted = tokenizer.decode(ids[: ids.index(end)], skip_special_tokens=True).strip()
    written = Generator(tuned, tokenizer, precision, device, stop=[end], **options).write(prompts, 12)
    assert written[0].text == wanted
    without = Generator(tuned, tokenizer, precision, device, stop=[], **options).write(prompts, 12)
    assert without[0].text == tokenizer.decode(ids, skip_special_tokens=True).strip() != wanted


@pytest.mark.parametrize(("arch", "method"), [("gpt2", "lora"), ("llama", "unipelt"), ("gemma2", "prompt_tuning")])
def test_rows_of_a_batch_are_answered_as_they_are_alone(arch: str, method: str) -> None:
    model, tokenizer = tiny(arch, "lm"), word_tokenizer("gpt")
    tuned = attach(model, method)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval()
    texts = ["how far is it", "why", "who is the good dog", "the moon", "a cat is good", "it"]
    device = torch.device("cpu")

    def written(some: list[str]) -> list[str]:
        prompts = encode(
            table([{"text": t} for t in some]), Columns(shape="plain", text="text"), Task(name="causal_lm"), tokenizer,
            n_vocab=131, max_length=20, with_targets=False,
        )  # fmt: skip
        generator = Generator(
            tuned, tokenizer, choose_precision("fp32", device), device, pad_id=0, stop=[3], limit=60, tokens=512
        )
        return [each.text for each in generator.write(prompts, 8)]

    assert written(texts) == [written([text])[0] for text in texts]


def test_a_prompt_leaves_room_for_its_answer_or_says_that_there_is_none() -> None:
    model, tokenizer = tiny("gpt2", "lm"), word_tokenizer("gpt")  # 64 positions
    tuned, device = attach(model, "lora"), torch.device("cpu")
    prompts = encode(
        table([{"text": "moon " * n} for n in (64, 60, 3)]), Columns(shape="plain", text="text"),
        Task(name="causal_lm"), tokenizer, n_vocab=131, max_length=64, with_targets=False,
    )  # fmt: skip
    generator = Generator(
        tuned, tokenizer, choose_precision("fp32", device), device, pad_id=0, stop=[], limit=64, tokens=512
    )
    full, tight, roomy = generator.write(prompts, 10)
    assert full.text == "" and "64 positions" in full.note
    assert "no more positions" in tight.note and roomy.note == ""


def test_a_row_that_cannot_be_read_has_its_reason_and_the_others_their_answers(tmp_path: Path) -> None:
    train(_spec(tmp_path, little_data(tmp_path / "rows.csv")))
    asked = _write(tmp_path / "asked.jsonl", [{"text": "good dog"}, {"text": ""}, {"text": None}, {"text": "bad cat"}])
    found = predict(tmp_path / "run", data=str(asked))
    assert [set(answer) for answer in found] == [{"label", "probabilities"}, {"refused"}, {"refused"}, set(found[0])]
    assert found[1]["refused"] == "field 'text' is empty" and found[2]["refused"] == "field 'text' is missing"
    alone = predict(tmp_path / "run", texts=["good dog", "bad cat"])
    for one, other in zip([found[0], found[3]], alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    with pytest.raises(DataError, match=r"2 of 4 rows cannot be answered: .*asked\.jsonl:2: field 'text' is empty"):
        predict(tmp_path / "run", data=str(asked), strict=True)
    assert load_file(tmp_path / "run" / "tuning" / "tuning.safetensors"), "asking changes nothing"
