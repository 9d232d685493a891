"""Two answers to a prompt are read by one piece of code; what cannot be compared is refused row by row, with why."""

from typing import Any

import pytest
from data.test_prediction_reads_as_training import CHATML, chat_tokenizer
from word_tables import table

from luthier.core import ConfigError, DataError, ModelError
from luthier.data.batches import Collator
from luthier.data.columns import find_columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.infer_task import infer_task
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec

PAIRS = Task(name="preference")
ROW = {"prompt": "why", "chosen": "because red", "rejected": "no"}
ASKED, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "why"), ("assistant", "because red"), ("assistant", "no"))
)


def read(*rows: dict[str, Any], max_length: int = 400, **more: Any) -> tuple[Any, Examples]:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = CHATML
    data = table(list(rows))
    columns = find_columns(data, DataSpec(source="rows"), "preference")
    more = {"check": False, **more}
    return tokenizer, encode(data, columns, PAIRS, tokenizer, n_vocab=len(tokenizer), max_length=max_length, **more)


def halves(tokenizer: Any, examples: Examples, number: int = 0) -> list[tuple[str, str]]:
    """Of both answers, the whole text and what of it is compared."""
    batch = Collator(pad_id=0)(examples, examples.rows[number : number + 1] * 0 + number)
    assert batch.labels is not None
    return [
        (
            tokenizer.decode(ids[mask.bool()].tolist()),
            tokenizer.decode([t for t in labels.tolist() if t != IGNORED]),
        )
        for ids, mask, labels in zip(
            batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, strict=True
        )
    ]


def why_not(row: dict[str, Any], **more: Any) -> str:
    """The reason for which a row is refused, beside one that is read."""
    _, examples = read({**ROW, **dict.fromkeys(row.keys() - ROW.keys())}, row, **more)
    (first, second) = examples.ledger
    assert first["status"] == "used" and second["status"] == "refused", list(examples.ledger)
    assert second["place"] == examples.ledger.place(1)
    return str(second["reason"])


def test_columns_are_found_by_convention_and_the_task_follows() -> None:
    data = table([{**ROW, "margin": 1, "more": "x"}])
    columns = find_columns(data, DataSpec(source="rows"))
    assert "two answers, one better (prompt = 'prompt', chosen = 'chosen', rejected = 'rejected'" in columns.sentence()
    assert "not used: 'more'" in columns.sentence()
    assert infer_task(data, None, columns).name == "preference"
    renamed = table([{"ask": "why", "a": "x", "b": "y"}])
    named = find_columns(renamed, DataSpec(source="rows", prompt="ask", chosen="a", rejected="b"))
    assert named.used() == {"prompt": "ask", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"texts; which column is the prompt.*--prompt ask"):
        find_columns(table([{"ask": "why", "chosen": "x", "rejected": "y"}]), DataSpec(source="rows"))
    with pytest.raises(ModelError, match="task preference needs a decoder"):
        infer_task(data, None, columns, "preference", _Encoder())


class _Encoder:
    model_type = "bert"
    is_encoder_decoder = False


def test_texts_messages_and_whole_conversations_give_the_same_ids() -> None:
    tokenizer, plain = read(ROW)
    _, turns = read({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]})
    _, whole = read({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]})
    _, both = read({"prompt": "why", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]})
    for one in (turns, whole, both):
        assert one.ids.tolist() == plain.ids.tolist() and one.labels.tolist() == plain.labels.tolist()
        assert one.middles.tolist() == plain.middles.tolist()
    first, second = halves(tokenizer, plain)
    assert first[1] == "because red<|im_end|>" and second[1] == "no<|im_end|>", "the answers alone are compared"
    assert first[0].removesuffix("\n").removesuffix(first[1]) == second[0].removesuffix("\n").removesuffix(second[1])


def test_earlier_turns_of_the_assistant_are_no_answer() -> None:
    before = [ASKED, {"role": "assistant", "content": "well"}, ASKED]
    tokenizer, examples = read({"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert [told for _, told in halves(tokenizer, examples)] == ["because red<|im_end|>", "no<|im_end|>"]


def test_padding_lengths_and_marks() -> None:
    _, examples = read(ROW, {"prompt": "why why why", "chosen": "no", "rejected": "because red"})
    edges = zip(examples.offsets, examples.middles, examples.offsets[1:], strict=False)
    widths = [max(middle - start, end - middle) for start, middle, end in edges]
    assert examples.lengths.tolist() == [2 * w for w in widths], "both halves are padded to the longer one"
    batch = Collator(pad_id=0)(examples, examples.rows)
    assert batch.inputs["input_ids"].shape == (4, max(widths)) and batch.n_targets == 2
    assert batch.n_tokens == len(examples.ids)
    assert batch.marks is not None and batch.marks.tolist() == [[1, 0], [1, 0]]
    _, marked = read({**ROW, "share": 0.75, "margin": "2"}, {**ROW, "prompt": "so", "share": None, "margin": 0.5})
    assert marked.marks.tolist() == [[0.75, 2], [1, 0.5]]


def test_rows_that_cannot_be_compared_are_refused_with_their_reason() -> None:
    assert "both answers are the same" in why_not({**ROW, "rejected": " because red "})
    assert "field 'chosen' is empty" in why_not({**ROW, "chosen": " "})
    assert "field 'rejected' is missing" in why_not({**ROW, "rejected": None})
    assert "field 'prompt' is missing" in why_not({**ROW, "prompt": None})
    other = {"role": "user", "content": "what"}
    assert "share no prompt" in why_not({**ROW, "chosen": [ASKED, GOOD], "rejected": [other, BAD]})
    longer = [ASKED, BAD, ASKED, BAD]
    assert "only the last answer may differ" in why_not(
        {**ROW, "chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": longer}
    )
    ends = why_not({**ROW, "chosen": [ASKED, GOOD], "rejected": [ASKED, ASKED]})
    assert "the rejected conversation ends in no answer of the assistant" in ends
    assert "field 'share' is 2; it must be a number between 0 and 1" in why_not({**ROW, "share": 2})
    assert "field 'margin' is 'wide'; it must be a number of at least 0" in why_not({**ROW, "margin": "wide"})


def test_a_prompt_beyond_the_context_is_refused_and_a_long_answer_is_cut_and_said() -> None:
    why = why_not({**ROW, "prompt": "why " * 30}, max_length=20)
    assert "tokens, and 20 fit with an answer (max_length)" in why
    _, examples = read({**ROW, "chosen": "because " * 30}, max_length=20)
    (only,) = examples.ledger
    assert only["status"] == "truncated" and only["reason"].startswith("the chosen answer ends at token")
    same = {**ROW, "chosen": "because " * 30 + "red", "rejected": "because " * 30 + "no"}
    assert "the same in their first 20 tokens" in why_not(same, max_length=20)


def test_no_row_is_left_out_silently_and_loss_on_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used.*both answers are the same.*--skip-bad"):
        read(ROW, {**ROW, "rejected": "because red"}, check=True)
    with pytest.raises(ConfigError, match=r"loss_on.*the prompt says nothing"):
        read(ROW, loss_on="all")


def test_what_is_predicted_from_is_the_prompt_of_training() -> None:
    tokenizer, learnt = read(ROW)
    first = learnt.ids[: learnt.middles[0]].tolist()
    for row in (ROW, {"prompt": "why"}, {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}):
        data = table([row])
        whole = {"chosen": "", "rejected": "", **row} if "prompt" in row else row
        columns = find_columns(table([whole]), DataSpec(source="rows"), "preference")
        asked = encode(
            data, columns, PAIRS, tokenizer, n_vocab=len(tokenizer), max_length=400, with_targets=False
        )  # fmt: skip
        assert asked.ids.tolist() == first[: len(asked.ids)] and "assistant" in tokenizer.decode(asked.ids.tolist())
