"""Tokens that are added to a model: a base of its own, whose new rows a tuning trains."""

import json

import pytest
import torch
from little import little_model, little_spec

from luthier.core import ConfigError, DataError
from luthier.runs.spec import DataSpec
from luthier.trust import safetensors
from luthier.workflow import merge, train
from luthier.workflow.load_model import find_model, load_tokenizer
from luthier.workflow.more_tokens import add_tokens, read_tokens
from luthier.workflow.prediction import Predictor

torch.set_num_threads(1)
NEW = ["[Search]", "<p>"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def weights(path):
    return safetensors.read(path / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("t5", {}), ("bart", {}), ("bert", {}), ("gpt2", {})],
)
def test_new_rows_are_the_mean_and_all_others_stay_bit_for_bit(home, kind, changes):
    name = f"{kind}-{'tied' if changes else 'plain'}"
    base, out = little_model(home / name, kind, **changes), home / f"{name}-more"
    tokenizer = load_tokenizer(find_model(str(base)))
    known = len(tokenizer)
    ids = add_tokens(str(base), NEW, out)
    assert ids == [known, known + 1]
    again, old, new = load_tokenizer(find_model(str(out))), weights(base), weights(out)
    assert again.convert_ids_to_tokens(ids) == NEW and again("how [Search] far")["input_ids"].count(ids[0]) == 1
    assert "[Search]" in again.decode(ids, skip_special_tokens=True)
    assert old.keys() == new.keys()
    grown = {n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    size = json.loads((out / "config.json").read_text())["vocab_size"]
    assert size == max(rows, known + 2) and grown
    for n in grown:
        axis = list(old[n].shape).index(rows)
        before, after = old[n].movedim(axis, 0), new[n].movedim(axis, 0)
        kept = [i for i in range(rows) if i not in ids]
        assert len(after) == size and torch.equal(after[kept], before[kept])
        assert torch.allclose(after[ids[0]], before[:known].mean(0), atol=1e-6) and torch.equal(
            after[ids[0]], after[ids[1]]
        )


def test_rows_are_added_where_the_table_is_as_long_as_the_vocabulary(home):
    base = little_model(
        home / "exact", "llama", vocab_size=len(load_tokenizer(find_model(str(little_model(home / "llama", "llama")))))
    )
    known = json.loads((base / "config.json").read_text())["vocab_size"]
    assert add_tokens(str(base), NEW, home / "exact-more") == [known, known + 1]
    assert json.loads((home / "exact-more" / "config.json").read_text())["vocab_size"] == known + 2
    assert {len(t) for n, t in weights(home / "exact-more").items() if "embed_tokens" in n or "lm_head" in n} == {
        known + 2
    }


@pytest.mark.acid("self_rag", 1)
def test_self_rag_only_the_new_rows_train_and_they_are_saved_merged_and_read_back(home, tmp_path):
    base = home / "llama-run-more"
    ids = add_tokens(str(little_model(home / "llama", "llama")), NEW, base)
    rows = [f"how far is the {w},[Search] <p> {w} <p>" for w in ("sun", "moon", "cat", "dog") for _ in range(5)]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["prompt,response", *rows]) + "\n")
    spec = little_spec(
        tmp_path, "trainable_tokens+lora", "llama", model=str(base), steps=6,
        data=DataSpec(source=str(data), test_share=0.0),
        settings={"trainable_tokens.tokens": ids, "lora.rank": 2}, out=str(tmp_path / "run"), trunk_dropout="off",
    )  # fmt: skip
    done = train(spec)
    moved = [t for n, t in safetensors.read(next((done.path / "tuning").glob("*.safetensors"))).items() if "moves" in n]
    assert len(moved) == 2 and all(t.shape[0] == 2 and bool(t.abs().sum()) for t in moved), "table and untied head"
    out = merge(done.path, tmp_path / "merged")
    old, new = weights(base), weights(out)
    for n in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (old[n] != new[n]).any(1).nonzero().flatten().tolist()
        assert changed == ids, n
    assert load_tokenizer(find_model(str(out))).convert_tokens_to_ids(NEW) == ids
    text = {"prompt": "how far is the sun"}
    from luthier.data.rows import Table

    again = Predictor(done.path).rows(Table([text], ["a"], "a"), max_new_tokens=6)
    assert again and "text" in again[0]


def test_what_cannot_be_added_is_refused_and_nothing_is_written(home, tmp_path, monkeypatch):
    base = str(little_model(home / "llama", "llama"))
    for tokens, words in (([], "no token is named"), (["moon"], r"has the token 'moon' already, with the id \d+")):
        with pytest.raises(ConfigError, match=words):
            add_tokens(base, tokens, tmp_path / "out")
    with pytest.raises(ConfigError, match="is there already"):
        add_tokens(base, NEW, tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        add_tokens(base, NEW, tmp_path / "a" / "b")
    assert not (tmp_path / "out").exists()
    file = tmp_path / "tokens.txt"
    for text, words in (
        ("", "holds no token"),
        ("a\n\nb\n", r"tokens.txt:2: '' is no token"),
        ("a\nb\na\n", r":3: 'a' stands"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            read_tokens(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_tokens(tmp_path / "none.txt")
