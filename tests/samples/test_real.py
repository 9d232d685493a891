"""The real samples, from the user's cache; fetched where they are not there yet."""

from collections import Counter

import pytest

from luthier.samples import COLUMNS, SAMPLES, load_sample, model_path, verify
from luthier.samples.split import same

pytestmark = pytest.mark.samples

DATA = [name for name, sample in SAMPLES.items() if sample.kind == "data"]


def test_trec6_is_what_its_notes_say() -> None:
    data = load_sample("sample:trec6")
    verify("trec6")
    assert data.counts["shipped"] == 15_452
    # 5,381 texts differ byte for byte; one pair of them differs in case only.
    assert data.counts["unique"] == 5_380
    assert data.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert len(data.train) + len(data.test) == data.counts["unique"]
    assert not {same(row["text"]) for row in data.train} & {same(row["text"]) for row in data.test}
    everywhere = Counter(row["label"] for row in data.train + data.test)
    held = Counter(row["label"] for row in data.test)
    assert all(abs(held[label] - 0.2 * n) <= 0.5 for label, n in everywhere.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_every_data_set_has_its_columns_and_adds_up(name: str) -> None:
    data = load_sample(name)
    verify(name)
    assert data.columns == COLUMNS[SAMPLES[name].task]
    assert all(set(row) == set(data.columns) for row in data.train + data.test)
    gone = ("left_out", "dropped_within", "dropped_across", "dropped_conflicts")
    counts = data.counts
    assert counts["shipped"] == counts["train"] + counts["test"] + sum(counts[reason] for reason in gone)
    if data.label is not None:
        assert {row["label"] for row in data.test} == {row["label"] for row in data.train} == set(data.label_names)


@pytest.mark.slow
def test_smollm2_answers_a_question_and_stops() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = model_path("smollm2-135m")
    tokenizer, model = AutoTokenizer.from_pretrained(home), AutoModelForCausalLM.from_pretrained(home)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert tokenizer.convert_ids_to_tokens(out[-1].item()) == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm-l6", "minilm-l3", "mpnet-base"])
def test_encoders_put_like_sentences_together(name: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    home = model_path(name)
    tokenizer, model = AutoTokenizer.from_pretrained(home), AutoModel.from_pretrained(home)
    batch = tokenizer(
        ["A man is eating food.", "Someone has a meal.", "The stock market crashed."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.4 > 0.2 > far
