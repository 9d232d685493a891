"""`luthier look`: what is shown of rows is what the model is trained on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Call
from little import little_data, little_model

from luthier.core import DataError
from luthier.data.infer_task import kind_of_model
from luthier.data.known_config import READ, KnownConfig
from luthier.data.tokenizer import position_limit
from luthier.runs.spec import DataSpec, RunSpec
from luthier.workflow.known_models import known_model
from luthier.workflow.look_at_rows import LookedAt, look_at
from luthier.workflow.model_files import find_model


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


# What looks at rows in a process of its own, and says whether torch came with it.
ALONE = """
import sys
from luthier.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was loaded"
sys.exit(code)
"""


def test_a_model_that_was_looked_at_before_is_looked_at_without_torch(
    luthier: Call, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    model = little_model(tmp_path / "llama", "llama")
    first = luthier("look", model, "--data", chats, "--json")
    again = subprocess.run(
        [sys.executable, "-c", ALONE, "look", str(model), "--data", str(chats), "--json"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (again.returncode, again.stdout, again.stderr) == (first.code, first.out, first.err)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama", "gpt2"])
def test_what_is_kept_of_a_model_answers_as_the_model_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    source = find_model(str(little_model(tmp_path / kind, kind)))
    asked, kept = known_model(source), known_model(source)
    assert not isinstance(asked[0], KnownConfig) and isinstance(kept[0], KnownConfig)
    assert kind_of_model(kept[0]) == kind_of_model(asked[0])
    assert position_limit(kept[0]) == position_limit(asked[0])
    for part, other in (kept[0], asked[0]), (kept[0].get_text_config(), asked[0].get_text_config()):
        assert [getattr(part, name, "none") for name in READ] == [getattr(other, name, "none") for name in READ]
    assert getattr(kept[0], "hidden_size", 0) == asked[0].hidden_size, "not kept: the configuration is asked"
    assert type(kept[1]) is type(asked[1]) and kept[1].init_kwargs == asked[1].init_kwargs
    assert kept[1].backend_tokenizer.to_str() == asked[1].backend_tokenizer.to_str()
    assert kept[1].chat_template == asked[1].chat_template


def test_what_was_kept_of_a_model_is_asked_for_anew_where_it_is_damaged_or_the_model_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    folder = little_model(tmp_path / "llama", "llama")
    known_model(find_model(str(folder)))
    (file,) = (tmp_path / "cache" / "models").iterdir()
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"tokenizer": ["os", "system"]}))
    assert not isinstance(known_model(find_model(str(folder)))[0], KnownConfig)
    assert json.loads(file.read_text()) == whole, "kept again"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33}))
    assert position_limit(known_model(find_model(str(folder)))[0]) == 33
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", "0.00")
    assert not isinstance(known_model(find_model(str(folder)))[0], KnownConfig), "nothing is kept, nothing is read"
