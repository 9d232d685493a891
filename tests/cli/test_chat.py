"""`luthier chat`: turns that remember one another, drawn by named seeds, beside the base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Call
from little import little_spec

from luthier.core import ConfigError, DataError
from luthier.data.tasks import Task
from luthier.workflow import Predictor, train
from luthier.workflow.controls import Controls, Repeats, controls_for, own_changes
from luthier.workflow.conversation import Conversation


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt turns."""
    home = tmp_path_factory.mktemp("talker")
    train(little_spec(home, "lora", "llama", steps=40))
    return home / "run"


@pytest.fixture(scope="module")
def predictor(talker: Path) -> Predictor:
    return Predictor(talker)


def test_a_turn_is_what_predict_answers_and_is_written_piece_by_piece(predictor: Predictor) -> None:
    talk = Conversation(predictor, Controls(max_new_tokens=8))
    pieces: list[str] = []
    answer, of_base = talk.say("how far is the moon", pieces.append)
    assert "".join(pieces).strip() == answer.text and of_base is None
    (wanted,) = predictor.texts(["how far is the moon"], max_new_tokens=8)
    assert answer.text == wanted["text"]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_turns_are_remembered_until_they_are_reset(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(predictor, Controls(max_new_tokens=2), system="be good")
    talk.say("who is it")
    talk.say("what is it")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    talk.reset("be bad")
    assert talk.messages == [{"role": "system", "content": "be bad"}]
    monkeypatch.setattr(predictor.generator, "limit", 4)
    with pytest.raises(DataError, match="fills all 4 positions"):
        talk.say("how far")
    assert len(talk.messages) == 1, "a turn without an answer is not remembered"


def test_a_run_whose_rows_say_their_task_holds_no_conversation(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "columns", replace(predictor.columns, row_task="kind"))
    with pytest.raises(ConfigError, match="which task it is of"):
        Conversation(predictor, Controls())


def test_draws_follow_the_seed_and_the_likeliest_needs_none(predictor: Predictor) -> None:
    def said(**controls: float) -> str:
        made = Controls(max_new_tokens=8, **controls)  # type: ignore[arg-type]
        return Conversation(predictor, made).say("how far is the moon")[0].text

    assert said(temperature=3, seed=1) == said(temperature=3, seed=1)
    assert len({said(temperature=3, seed=n) for n in range(6)}) > 1
    assert said(temperature=3, top_p=1e-9) == said(), "the likeliest alone is left to draw from"
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Controls(**wrong)  # type: ignore[arg-type]


def test_predict_draws_each_row_by_its_own_name_whatever_stands_beside_it(predictor: Predictor) -> None:
    texts = ["how far is the moon", "who is it", "what is red", "one two three four five six seven"]

    def said(texts: list[str], **controls: Any) -> list[str]:
        return [row["text"] for row in predictor.texts(texts, controls=Controls(max_new_tokens=8, **controls))]

    together = said(texts, temperature=2.0, seed=3)
    assert said(texts[:1], temperature=2.0, seed=3) == together[:1] and said(texts, temperature=2.0, seed=3) == together
    assert said(texts, temperature=2.0, seed=4) != together
    plain = [row["text"] for row in predictor.rows(predictor.table_of(texts), max_new_tokens=8)]
    assert said(texts) == plain == said(texts, temperature=5.0, top_k=1)
    drawn = said(texts, temperature=0.05, seed=1, repetition=10.0)
    assert all(len(set(row.split())) == len(row.split()) for row in drawn), "nothing is said twice"


def test_a_penalty_of_the_models_own_files_is_said_and_repetition_stands_in_its_place(
    luthier: Call, talker: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["how far is the moon", "one two three four five six seven"]

    def said(**controls: Any) -> list[str]:
        return [row["text"] for row in predictor.texts(texts, controls=Controls(max_new_tokens=8, **controls))]

    def turn(**controls: Any) -> str:
        return Conversation(predictor, Controls(max_new_tokens=8, **controls)).say(texts[0])[0].text

    plain, plain_turn = said(), turn()
    assert own_changes(predictor.tuned.model) == {} and Conversation(predictor, Controls()).own_words == ""
    monkeypatch.setattr(predictor.tuned.model.generation_config, "repetition_penalty", 0.01)  # says the prompt again
    assert said() != plain and turn() != plain_turn, "the penalty is obeyed"
    assert said(repetition=1.0) == plain and turn(repetition=1.0) == plain_turn
    talk = Conversation(predictor, Controls())
    assert talk.own == {"repetition_penalty": 0.01}
    assert "repetition_penalty = 0.01; --repetition 1 takes the penalty out" in talk.own_words
    replaced = Conversation(predictor, Controls(repetition=1.0))
    assert replaced.own == {} and replaced.own_words == "", "what is replaced changes nothing"
    monkeypatch.setattr(predictor.tuned.model.generation_config, "suppress_tokens", [5])
    assert "suppress_tokens = [5]" in Conversation(predictor, Controls(repetition=1.0)).own_words
    monkeypatch.setattr("luthier.workflow.Predictor", lambda run: predictor)
    told = luthier("predict", talker, "--text", "how far", "--max-new-tokens", "2", "--json")
    assert told.json["generation_config"]["repetition_penalty"] == 0.01 and "changes what is written" in told.err
    told = luthier("predict", talker, "--text", "how far", "--max-new-tokens", "2", "--repetition", "1", "--json")
    assert told.json["generation_config"] == {"suppress_tokens": [5]}


def test_what_an_answer_has_said_is_less_likely_and_its_prompt_does_not_count() -> None:
    repeats = Repeats(2.0)
    ids, scores = torch.tensor([[5, 1], [0, 2]]), torch.tensor([[1.0, -1.0, 3.0, 0.5, 2.0, 4.0]] * 2)
    assert torch.equal(repeats(ids, scores), scores)
    longer = torch.cat([ids, torch.tensor([[5], [1]])], 1)
    assert repeats(longer, scores).tolist() == [[1.0, -1.0, 3.0, 0.5, 2.0, 2.0], [1.0, -2.0, 3.0, 0.5, 2.0, 4.0]]


def test_controls_that_would_do_nothing_or_cannot_work_are_refused(luthier: Call, talker: Path) -> None:
    said = luthier("predict", talker, "--text", "how far", "--top-p", "0.9")
    assert said.code == 2 and "at temperature 0 nothing is drawn" in said.err
    assert "repetition: got 0.5; it must be from 1" in luthier("chat", talker, "--repetition", "0.5").err
    with pytest.raises(ConfigError, match="learnt classification and writes no text"):
        controls_for(Task(name="classification", labels=("a", "b")), Controls(temperature=1.0), 64)
    assert controls_for(Task(name="classification"), Controls(max_new_tokens=9), 64) == Controls(max_new_tokens=9)


def test_the_base_answers_the_same_conversation_and_leaves_no_trace(predictor: Predictor) -> None:
    talk = Conversation(predictor, Controls(max_new_tokens=8))
    answer, of_base = talk.say("how far is the moon", write_base=lambda piece: None)
    assert of_base is not None and of_base.text != answer.text
    assert Conversation(predictor, Controls(max_new_tokens=8)).say("how far is the moon")[0] == answer


def test_from_the_command_line(luthier: Call, talker: Path) -> None:
    words = ("chat", talker, "--text", "how far is the moon", "--text", "who is it", "--max-new-tokens", 6)
    told = luthier(*words, "--compare-base", "--json").json
    assert [turn["user"] for turn in told["turns"]] == ["how far is the moon", "who is it"]
    assert all({"answer", "base", "ended"} <= set(turn) for turn in told["turns"])
    shown = luthier(*words, "--compare-base")
    assert shown.code == 0 and "run:  " in shown.out and "base: " in shown.out
    assert luthier("chat", talker, "--text", "x", "--top-p", 0).code == 2


def test_a_run_without_turns_is_not_talked_with(luthier: Call, finished: Path) -> None:
    answer = luthier("chat", finished, "--text", "hello")
    assert answer.code == 2 and "without turns" in answer.err and "luthier predict" in answer.err
