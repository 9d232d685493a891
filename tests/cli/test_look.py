"""`luthier look`: what is shown of rows is what the model is trained on."""

import json
from pathlib import Path

import pytest
from cli.conftest import Call
from little import little_data, little_model

from luthier.core import DataError
from luthier.runs.spec import DataSpec, RunSpec
from luthier.workflow.look_at_rows import LookedAt, look_at


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Rows of two turns, short and long."""
    file = tmp_path / "turns.jsonl"
    rows = [{"prompt": f"how far is the {w}", "response": f"{w} is far " * n} for n, w in ((1, "moon"), (9, "sun"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    return file


def _look(model: Path, data: Path, **more: object) -> LookedAt:
    return look_at(RunSpec(model=str(model), data=DataSpec(source=str(data)), **more))  # type: ignore[arg-type]


def test_tokens_that_carry_loss_spell_the_answer_with_its_stop_token(chats: Path, tmp_path: Path) -> None:
    found = _look(little_model(tmp_path / "llama", "llama"), chats)
    row = found.shown[0]
    assert row.place == "turns.jsonl:1" or row.place.endswith("turns.jsonl:1")
    loss = [p for p in row.pieces if p.kind == "loss"]
    assert "".join(p.text for p in loss[:-1]).split() == ["moon", "is", "far"]
    assert loss[-1].special and loss[-1].text.strip() in found.stop and found.stopping == 1.0
    assert len(loss) == row.targets and len(row.pieces) == row.tokens
    assert found.template[0].startswith("luthier's default") and len(found.template[1]) == 64
    assert found.rows == found.sampled == 20 and sum(n for _, n in found.bars) == 20
    assert found.supervised is not None and 0 < found.supervised < 1
    assert 0.5 < found.full <= 1


def test_what_is_cut_is_shown_and_never_what_is_kept(chats: Path, tmp_path: Path) -> None:
    found = _look(little_model(tmp_path / "llama", "llama"), chats, max_length=24)
    long = next(r for r in found.shown if r.status == "truncated")
    kept = [p for p in long.pieces if p.kind != "cut"]
    assert len(kept) == 24 and any(p.kind == "cut" for p in long.pieces)
    assert "cut to 24" in long.reason and found.stopping == 0.5
    whole = next(r for r in found.shown if r.status == "used")
    assert not any(p.kind == "cut" for p in whole.pieces)


def test_rows_that_never_show_where_to_stop_are_refused(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teaches the model to stop.*max-length"):
        _look(little_model(tmp_path / "llama", "llama"), chats, max_length=20)


@pytest.mark.parametrize(("kind", "task"), [("pairs", "preference"), ("judged", "judged")])
def test_the_tokens_of_weighed_answers_are_counted_and_not_the_answers(kind: str, task: str, tmp_path: Path) -> None:
    data = little_data(tmp_path / "rows.csv", kind=kind)
    found = _look(little_model(tmp_path / "llama", "llama"), data, task=task)
    for row in found.shown:
        assert row.targets == sum(p.kind == "loss" for p in row.pieces) > 1
    assert found.supervised is not None and found.supervised > 0.06


def test_a_reward_is_one_number_of_all_tokens(tmp_path: Path) -> None:
    data = little_data(tmp_path / "rows.csv", kind="pairs")
    found = _look(little_model(tmp_path / "llama", "llama"), data, task="reward")
    assert found.supervised is None and not any(p.kind == "loss" for row in found.shown for p in row.pieces)


def test_labelled_rows_show_their_label_and_a_page_loads_nothing(luthier: Call, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "how good is it,good\nhow bad is it,<b>bad</b>\n" * 10)
    answer = luthier("look", model, "--data", data, "--html", "rows.html")
    assert answer.code == 0 and "label: good" in answer.out and "[CLS]" in answer.out
    page = Path("rows.html").read_text()
    assert "&lt;" in page and "<b>bad" not in page
    assert "http" not in page and "<script" not in page
    again = luthier("look", model, "--data", data, "--html", "rows.html")
    assert again.code == 2 and "is there already" in again.err
    told = luthier("look", model, "--data", data, "--rows", 2, "--json").json
    assert len(told["shown"]) == 2 and told["supervised"] is None and told["rows"] == 20
    assert luthier("look", model, "--data", "nothing.csv").code == 3
