"""self_rag: tokens of reflection, learnt in the model's own turns, and answers that are chosen by them."""

import json

import pytest
import torch
from little import little_spec
from recipe_rows import ROWS, write_lines

from luthier.core import ConfigError, DataError
from luthier.data.encode import encode
from luthier.data.encode_language import loss_view
from luthier.data.reflection import RETRIEVE, TOKENS, Judged, chat_of, read_judged
from luthier.data.retrieval import Words
from luthier.data.rows import load_rows
from luthier.runs.spec import DataSpec
from luthier.workflow.prediction import Predictor
from luthier.workflow.recipes import follow
from luthier.workflow.reflection import reflect, worth
from luthier.workflow.speaker import Speaker

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("reflection")


def spec_of(home, out, **changes):
    given = {**ROWS["self_rag"](home), "steps": 8, "strategy": "self_rag"}
    given["settings"] = given.pop("settings", {}) | changes.pop("settings", {})
    return little_spec(home, out=str(out), **{**given, **changes})


@pytest.fixture(scope="module")
def done(home):
    return follow(spec_of(home, home / "done"))


@pytest.mark.acid("self_rag", 2)
def test_self_rag_what_was_looked_up_carries_no_loss(home, done):
    run, (rows, _) = Predictor(done.result), load_rows(str(done.path / "rows-answers.jsonl"))
    examples = encode(rows, run.columns, run.task, run.tokenizer, n_vocab=run._vocabulary(), max_length=200)
    seen = set()
    for i, row in enumerate(rows.rows):
        learnt = " ".join(word for word, loss in loss_view(examples, i, run.tokenizer) if loss)
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert "paragraph" not in learnt and all(text.split()[0] in learnt for text in said)
        seen |= {token for token in TOKENS if token in learnt}
        assert len(said) == (2 if RETRIEVE[0] in learnt else 1)
    assert {"[Retrieval]", "[No Retrieval]", "[Relevant]", "[Fully supported]", "[Utility:5]"} <= seen


@pytest.mark.acid("self_rag", 3, 4)
def test_self_rag_looks_up_above_a_bound_and_without_weights_the_likeliest_is_chosen(home, done):
    run = Speaker(str(done.result))
    texts = [row["text"] for row in load_rows(str(home / "documents.jsonl"))[0].rows]
    asked, of = "how is the moon", Words(texts)
    found = reflect(run, asked, texts, of, k=3, max_new_tokens=6)
    assert 0 < found.looked_up < 1
    above = reflect(run, asked, texts, of, k=3, bound=found.looked_up + 1e-4, max_new_tokens=6)
    below = reflect(run, asked, texts, of, k=3, bound=found.looked_up - 1e-4, max_new_tokens=6)
    assert above.document is None and len(above.tried) == 1
    assert below.document is not None and len(below.tried) == 3
    plain = reflect(run, asked, texts, of, k=3, bound=0.0, weights=(0.0, 0.0, 0.0), max_new_tokens=6)
    ids = {token: run.tokenizer.get_vocab()[token] for token in TOKENS}
    talk = [{"role": "user", "content": asked}]
    one = worth(run, talk, "red moon", ids, (0, 0, 0), beside=True)
    assert one == pytest.approx(-run.loss_of([(talk, "red moon")]), abs=2.0), "of its tokens, without the end"
    assert plain.score == max(score for _, score in plain.tried) < 0
    more = worth(run, talk, "red moon", ids, (1, 0, 0), beside=True) - one
    assert 0 < more < 1 and worth(run, talk, "red moon", ids, (1, 1, 0), beside=False) == pytest.approx(one)
    with pytest.raises(ConfigError, match="bound: got 2"):
        reflect(run, asked, texts, of, bound=2)


def test_self_rag_what_cannot_be_learnt_is_refused_before_anything_is_written(home, tmp_path):
    ROWS["self_rag"](home)
    rows = [json.loads(line) for line in (home / "judged.jsonl").read_text().splitlines()]
    for changes, words in (
        ({"utility": 9}, "field 'utility' is 9"),
        ({"support": "ful"}, r"field 'support' is 'ful'; it must be full, partial, none. Did you mean 'full'"),
        ({"relevant": "well"}, "field 'relevant' is 'well'"),
        ({"passage": "nowhere"}, "field 'passage' is 'nowhere', which is neither"),
    ):
        bad = write_lines(tmp_path / "bad.jsonl", [{**rows[0], **changes}, *rows[1:]])
        with pytest.raises(DataError, match=f"bad.jsonl:1: {words}"):
            follow(spec_of(home, tmp_path / "out", data=DataSpec(source=str(bad), test_share=0.0)))
    for changes, words in (
        ({"model": ROWS["raft"](home)["model"]}, r"has not the token '\[Retrieval\]', and lacks 14 of 14"),
        ({"settings": {"self_rag.documents": None}}, "needs documents"),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    without = Judged("a", "b", None, False, "", 2)
    assert [m["content"] for m in chat_of(without)] == ["a", "[No Retrieval] b [Utility:2]"]
    assert read_judged({"utility": "2"}, "r", "a", "b", None) == without
    assert read_judged({"utility": 2.0}, "r", "a", "b", None) == without
    for told in ("", None, "12", 12, 4.7, True, "5 of 5"):
        with pytest.raises(DataError, match=r"r: field 'utility' is .* from 1 to 5"):
            read_judged({"utility": told}, "r", "a", "b", None)
