"""Ways that score labels, as functions of a machine that is a rule."""

import math

import numpy as np
import pytest
from asking.stub import Stub, asked, desk, query, shown

from luthier.asking import WAYS
from luthier.asking.desk import Desk
from luthier.asking.machine import Cost
from luthier.asking.shots import beside, drawn, longest_option
from luthier.core import ConfigError
from luthier.data.retrieval import Vectors, Words

ICL, Retrieval, Calibrated, PMI = (WAYS.get(n) for n in ("icl", "icl_retrieval", "contextual_calibration", "pmi_dc"))
WORDS = {"N": "number", "P": "place", "H": "human"}
POOL = [shown(f"text {c}{i}", c, i) for c in "NPH" for i in range(5)]


def probabilities(table):
    """A machine by prompt's last text: text -> chances of the labels' words."""

    def chance(prompt, option):
        text = prompt.rpartition("Text: ")[2].partition("\nAnswer:")[0]
        return math.log(table[text][list(WORDS.values()).index(option.strip())])

    return chance


@pytest.mark.acid("icl", 1)
def test_a_row_is_never_shown_beside_itself_or_a_copy_of_it():
    on = desk([*POOL, shown("TEXT  n1", "N", 20)], WORDS)
    for way in (ICL(k=14), Retrieval(k=14), Calibrated(k=14), PMI(k=14)):
        machine = Stub()
        with_words = Desk(**{**vars(on), "find": lambda by: Words([row.texts[0] for row in on.pool])})
        for told in asked(way, ["text N1", "text P4"], with_words, machine):
            shots = told.prompts[0].split("\n\n")[:-1]
            assert len(shots) == way.k
            assert not [s for s in shots if told.query.texts[0].lower() in " ".join(s.lower().split())], way.name


def test_the_likeliest_label_is_answered_whole_or_by_token_or_byte():
    words = {"A": "a long answer", "B": "yes"}
    machine = Stub(lambda prompt, option: -3.0 if "long" in option else -2.0)
    said = {
        length: asked(ICL(k=0, length=length), ["x"], desk((), words), machine)[0].answer
        for length in ("sum", "token", "byte")
    }
    assert {n: a.said for n, a in said.items()} == {"sum": "B", "token": "A", "byte": "A"}
    assert said["sum"].shares["B"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert machine.requests[0].prompt == "Text: x\nAnswer:" and machine.requests[0].options == (
        " a long answer",
        " yes",
    )


def test_shots_are_drawn_by_the_seed_balanced_and_ordered():
    on = desk(POOL, WORDS)
    rows = [row.texts for row in drawn(on, 6, balanced=True, order=0)[:6]]
    again = [row.texts for row in drawn(on, 6, balanced=True, order=3)[:6]]
    other = [row.texts for row in drawn(desk(POOL, WORDS, seed=1), 6, balanced=True, order=0)[:6]]
    assert rows != again and sorted(rows) == sorted(again) and sorted(rows) != sorted(other)
    assert sorted(row.answer for row in drawn(on, 6, balanced=True, order=0)[:6]) == list("HHNNPP")
    uneven = desk([*POOL[:5], *(shown(f"more {i}", "N", i) for i in range(90))], WORDS)
    assert {row.answer for row in drawn(uneven, 4, balanced=False, order=0)[:4]} == {"N"}
    assert beside(query("text N0"), drawn(on, 15, balanced=True, order=0), 14)


def test_the_label_of_the_last_shot_is_drawn_and_each_turn_has_every_label_once():
    last, firsts = set(), set()
    for seed in range(12):
        found = [row.answer for row in drawn(desk(POOL, WORDS, seed=seed), 6, balanced=True, order=0)[:6]]
        assert sorted(found[:3]) == sorted(found[3:]) == ["H", "N", "P"]
        last.add(found[-1])
        firsts.add(drawn(desk(POOL, WORDS, seed=seed), 1, balanced=True, order=0)[0].answer)
    assert last == firsts == {"H", "N", "P"}, "one order of labels for all seeds"


@pytest.mark.acid("icl", 3)
def test_what_does_not_fit_is_refused_with_the_number_that_fits_or_whole_shots_are_dropped():
    machine = Stub(limit=30)  # a shot has 5 words, a query 4, an option 1
    on = desk(POOL, WORDS, limit=30, count=machine.count)
    turned = desk(POOL, WORDS, count=lambda text: 20 + machine.count(text), size=machine.size)
    assert longest_option(turned) == longest_option(on) == 1, "what is laid around a prompt is not around an option"
    with pytest.raises(
        ConfigError, match=r"icl: 8 shots do not fit beside rows.csv:1: 44 tokens and 1 .* 5 would fit: --set icl.k=5"
    ):
        ICL(k=8).refuse(on, [query("one two")])
    [told] = asked(ICL(k=8, overflow="drop"), ["one two"], on, machine)
    assert told.answer.note == "5 of 8 shots fit"
    all_of_them = asked(ICL(k=8), ["one two"], desk(POOL, WORDS), Stub())[0].prompts[0].split("\n\n")
    assert told.prompts[0].split("\n\n") == all_of_them[3:], "the first go: the last stand nearest"
    with pytest.raises(ConfigError, match="its prompt has 33 tokens without any row beside it"):
        ICL(k=0, overflow="drop").refuse(on, [query("word " * 31)])
    with pytest.raises(ConfigError, match="16 shots, and there are 15 rows to show"):
        ICL(k=16).refuse(on, [])


@pytest.mark.acid("icl_retrieval", 2)
def test_a_training_row_is_left_out_of_what_is_found_for_itself():
    texts = [row.texts[0] for row in POOL]
    on = Desk(**{**vars(desk(POOL, WORDS)), "find": lambda by: Words(texts)})
    for told in asked(Retrieval(k=3), texts[:4], on, Stub()):
        assert told.query.texts[0] not in told.prompts[0].rpartition("\n\n")[0]
        assert len(told.prompts[0].split("\n\n")) == 4


@pytest.mark.acid("icl_retrieval", 4)
def test_the_nearest_stands_last_or_first_as_it_is_asked():
    vectors = {row.texts[0]: np.array([1.0, i / 10], dtype=np.float32) for i, row in enumerate(POOL)} | {
        "q": np.array([1.0, 0.0])
    }
    find = Vectors([row.texts[0] for row in POOL], lambda texts: np.stack([vectors[t] for t in texts]))
    on = Desk(**{**vars(desk(POOL, WORDS)), "find": lambda by: find})
    for order, wanted in (("nearest_last", [2, 1, 0]), ("nearest_first", [0, 1, 2])):
        [told] = asked(Retrieval(k=3, by="vectors", order=order), ["q"], on, Stub())
        assert [s.partition("\n")[0] for s in told.prompts[0].split("\n\n")[:3]] == [
            f"Text: {POOL[i].texts[0]}" for i in wanted
        ]


@pytest.mark.acid("contextual_calibration", 1)
def test_a_model_that_does_not_read_the_row_is_uniform_after_calibration():
    machine = Stub(lambda prompt, option: {"number": -0.2, "place": -2.0, "human": -3.0}[option.strip()])
    told = asked(Calibrated(k=2), ["one", "two"], desk(POOL, WORDS), machine)
    for one in told:
        assert list(one.answer.shares.values()) == pytest.approx([1 / 3] * 3)
    assert asked(ICL(k=2), ["one"], desk(POOL, WORDS), machine)[0].answer.shares["N"] > 0.7


@pytest.mark.acid("contextual_calibration", 2)
def test_content_free_texts_stand_behind_the_very_same_shots():
    on = desk(POOL, WORDS)
    for told in asked(Calibrated(k=4), ["text N1", "new"], on, Stub()):
        own, *nothing = told.prompts
        shots = own.rpartition("\n\n")[0]
        assert shots and nothing == [f"{shots}\n\nText: {t}\nAnswer:" for t in ("N/A", "", "[MASK]")]


@pytest.mark.acid("contextual_calibration", 3)
def test_shares_are_normalised_over_the_labels_before_they_are_divided():
    table = {"x": (0.02, 0.05, 0.01), "N/A": (0.3, 0.1, 0.1), "": (0.004, 0.004, 0.002), "[MASK]": (0.1, 0.1, 0.2)}
    [told] = asked(Calibrated(k=0), ["x"], desk((), WORDS), Stub(probabilities(table)))
    of = {text: np.array(row) / sum(row) for text, row in table.items()}
    free = np.mean([of["N/A"], of[""], of["[MASK]"]], axis=0)
    wanted = of["x"] / free / (of["x"] / free).sum()
    assert list(told.answer.shares.values()) == pytest.approx(wanted.tolist())
    raw = np.mean([table["N/A"], table[""], table["[MASK]"]], axis=0)
    assert np.abs(wanted - np.array(table["x"]) / raw / (np.array(table["x"]) / raw).sum()).max() > 0.01


@pytest.mark.acid("contextual_calibration", 4)
def test_a_prompt_without_bias_is_left_as_it_is():
    table = {"x": (0.2, 0.5, 0.1), "N/A": (0.1, 0.1, 0.1), "": (0.3, 0.3, 0.3), "[MASK]": (0.2, 0.2, 0.2)}
    machine = Stub(probabilities(table))
    plain, calibrated = (
        asked(way, ["x"], desk((), WORDS), machine)[0].answer.shares for way in (ICL(k=0), Calibrated(k=0))
    )
    assert list(plain.values()) == pytest.approx(list(calibrated.values()))


@pytest.mark.acid("pmi_dc", 1)
def test_where_the_row_is_the_domain_no_answer_gains_anything():
    machine = Stub(lambda prompt, option: -float(len(option)) * len(prompt))
    [told] = asked(PMI(domain="Text: x\nAnswer:"), ["x"], desk((), WORDS), machine)
    assert list(told.answer.shares.values()) == pytest.approx([1 / 3] * 3)


@pytest.mark.acid("pmi_dc", 2)
def test_an_answer_spelt_in_two_ways_loses_its_likelihood_but_not_its_information():
    # The row makes "bath" three times likelier than the domain does, half of it spelt "tub"; "pool" not at all.
    row, alone = {"bath": 0.3, "pool": 0.35}, {"bath": 0.1, "pool": 0.35}
    for share in (1.0, 0.5):  # of bath's mass, what the spelling that is asked about has
        words = {"B": "bath", "P": "pool"}
        machine = Stub(
            lambda prompt, option, share=share: math.log(
                (row if "Text" in prompt else alone)[option.strip()] * (share if "bath" in option else 1.0)
            )
        )
        answers = [asked(way, ["x"], desk((), words), machine)[0].answer.said for way in (ICL(k=0), PMI())]
        assert answers[1] == "B"
        assert answers[0] == "P"
    # With the whole mass of a common word the likelihood is right as well: the split alone turned it.
    row["pool"] = alone["pool"] = 0.2
    whole, split = (
        Stub(lambda p, o, s=s: math.log((row if "Text" in p else alone)[o.strip()] * (s if "bath" in o else 1)))
        for s in (1.0, 0.5)
    )
    ranked = [
        [asked(way, ["x"], desk((), words), m)[0].answer.said for m in (whole, split)] for way in (ICL(k=0), PMI())
    ]
    assert ranked == [["B", "P"], ["B", "B"]]


@pytest.mark.acid("pmi_dc", 3)
def test_the_domain_is_not_the_empty_context():
    def chance(prompt, option):
        return {"": [-1.0, -5.0, -9.0], "Answer:": [-4.0, -4.0, -1.0]}.get(prompt, [-2.0, -2.5, -3.0])[
            list(WORDS.values()).index(option.strip())
        ]

    machine = Stub(chance)
    domain, empty = (asked(way, ["x"], desk((), WORDS), machine)[0].answer.said for way in (PMI(), PMI(domain="")))
    assert (domain, empty) == ("N", "H")
    assert "Answer:" in [r.prompt for r in machine.requests] and "" in [r.prompt for r in machine.requests]


@pytest.mark.parametrize("name", ["contextual_calibration", "pmi_dc"])
def test_ways_of_labels_refuse_rows_without(name):
    with pytest.raises(ConfigError, match=r"have none\. Use icl or cot"):
        WAYS.get(name)().refuse(desk(POOL), [])


def test_rows_that_differ_in_numbers_alone_are_no_copies_where_answers_are_texts():
    from luthier.asking.scoring import _copies

    assert _copies(["how is 3 + 4", "how is 5 + 4", "how is 3 + 4"], False).tolist() == [0, 1, 0]
    assert _copies(["how is 3", "how is 5", "who"], True).tolist() == [0, 0, 1]


def test_a_label_that_is_called_no_answer_is_not_what_a_row_without_one_says():
    from luthier.asking.engine import Of, Told
    from luthier.asking.requests import Answer
    from luthier.asking.scoring import judged

    said = ["no answer", None, "yes", None]
    told = tuple(Told(query=query(f"row {n}", n), answer=Answer(said=s), prompts=()) for n, s in enumerate(said))
    found = judged(
        ["icl"], [Of(name="icl", seed=0, told=told, cost=Cost())], ["no answer", "no answer", "yes", "yes"],
        ["how is it"] * 4, labels=["no answer", "yes"], common="yes", metric="accuracy", seeds=[0],
    )  # fmt: skip
    assert found.standings[0].score == 0.5 and found.standings[0].unanswered == 2
    assert found.standings[0].low < 0.5 < found.standings[0].high, "all rows are copies: each is drawn alone"


def test_requests_of_many_rows_are_put_together_and_the_same_one_once():
    machine = Stub()
    told = asked(Calibrated(k=2), ["a", "b", "c", "d"], desk(POOL, WORDS), machine)
    assert [len(r) for r in machine.rounds] == [6, 1], "3 rows and 3 content-free texts; then 1 row of the next wave"
    assert [one.query.number for one in told] == [0, 1, 2, 3] and len(set(told[0].digests)) == 4
