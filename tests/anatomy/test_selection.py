"""The words that choose places: what they mean, and what they say when they mean nothing."""

import pytest
from tiny import tiny

from luthier.anatomy import Anatomy, Selector
from luthier.anatomy.selection import WholeBySite, is_projection, joined
from luthier.core import AnatomyError, ConfigError


@pytest.fixture(scope="module")
def bert() -> Anatomy:
    return Anatomy.read(tiny("bert"))


@pytest.fixture(scope="module")
def t5() -> Anatomy:
    return Anatomy.read(tiny("t5"))


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["attn.q"], "attn.q@0 attn.q@1 attn.q@2"),
        (["attn.q@1"], "attn.q@1"),
        (["attn.q@0-1"], "attn.q@0 attn.q@1"),
        (["attn.q@0,2"], "attn.q@0 attn.q@2"),
        (["attn.q@0", "2"], "attn.q@0 attn.q@2"),
        (["attn.q@0", "2", "attn.v@1"], "attn.q@0 attn.v@1 attn.q@2"),
        (["attn.q@last2"], "attn.q@1 attn.q@2"),
        (["attn.q@first1,last1"], "attn.q@0 attn.q@2"),
        (["ffn@1"], "ffn.up@1 ffn.down@1"),
        (["attn.q", "attn.q@1"], "attn.q@0 attn.q@1 attn.q@2"),
        (["*@last1"], "attn.q@2 attn.k@2 attn.v@2 attn.o@2 ffn.up@2 ffn.down@2"),
    ],
)
def test_choices_mean_these_sites_in_the_models_order(bert: Anatomy, words: list[str], keys: str) -> None:
    found = [site.key for site in bert.sites(*words, fits=is_projection)]
    assert sorted(found) == sorted(keys.split())
    order = [site.key for site in bert.all_sites]
    assert found == sorted(found, key=order.index)


def test_layers_are_counted_in_each_stack(t5: Anatomy) -> None:
    assert t5.depths == {"encoder": 3, "decoder": 2}
    keys = {site.key for site in t5.sites("attn.q@last1")}
    assert keys == {"attn.q@encoder.2", "attn.q@decoder.1"}
    assert {s.key for s in t5.sites("attn.q@decoder.0-1")} == {"attn.q@decoder.0", "attn.q@decoder.1"}
    assert {s.key for s in t5.sites("attn.q@encoder")} == {f"attn.q@encoder.{n}" for n in range(3)}
    assert {s.key for s in t5.sites("attn.q@2")} == {"attn.q@encoder.2"}, "one stack that has the layer is enough"


@pytest.mark.parametrize(
    ("word", "error", "says"),
    [
        ("attn.q@9", AnatomyError, ("'attn.q@9'", "no layer 9", "0 to 2")),
        ("attn.q@1-9", AnatomyError, ("1-9", "0 to 2")),
        ("attn.q@last4", AnatomyError, ("last4", "0 to 2")),
        ("attn.q@2-1", ConfigError, ("2-1", "counts down", "1-2")),
        ("attn.q@last0", ConfigError, ("last0", "last1")),
        ("attn.q@", ConfigError, ("no layer after the @", "attn.q@0-3")),
        ("@0-1", ConfigError, ("no site", "*@0-1")),
        ("attn.q@lsat2", AnatomyError, ("'lsat2'", "last4")),
        ("attn.q@-1", ConfigError, ("'-1'",)),
        ("attn.q@0,lsat2", ConfigError, ("'lsat2'", "last4")),
        ("attn.q@0,,1", ConfigError, ("''",)),
        ("attn.q@decoder.0", AnatomyError, ("decoder",)),
        ("embed@0", AnatomyError, ("'embed@0'", "outside of the layers")),
        ("atn.q@0", AnatomyError, ("'atn.q'", "'attn.q'")),
        ("ffn.gate@0", AnatomyError, ("ffn.gate", "ffn.up")),
    ],
)
def test_a_choice_that_means_nothing_says_which_part_and_what_there_is(
    bert: Anatomy, word: str, error: type[Exception], says: tuple[str, ...]
) -> None:
    with pytest.raises(error) as raised:
        bert.sites("attn.q", word, asked_by="lora.sites")
    message = str(raised.value)
    assert message.startswith("lora.sites")
    assert all(part in message for part in says), message


def test_a_stack_may_lack_what_another_has(t5: Anatomy) -> None:
    with pytest.raises(AnatomyError, match=r"has 'cross\.q', but none in the stack 'encoder'"):
        t5.sites("cross.q@encoder.0")
    with pytest.raises(AnatomyError, match=r"no stack is called 'decoer'\. Did you mean 'decoder'"):
        t5.sites("cross.q@decoer.0")


def test_commas_inside_a_choice_and_between_choices_are_told_apart() -> None:
    assert joined(["attn.q@0", "3", "5-6", "attn.v", "ffn@last2", "first1"]) == [
        "attn.q@0,3,5-6",
        "attn.v",
        "ffn@last2,first1",
    ]
    assert Selector.read("attn.q@decoder.0, 3") == Selector("attn.q@decoder.0, 3", "attn.q", "decoder", "0,3")


# --- a value for each place


@pytest.mark.parametrize(
    "given", ["8, attn.q@0: 16", "8,attn.q@0:16", {"default": 8, "attn.q@0": 16}, {"default": "8", "attn.q@0": "16"}]
)
def test_values_by_site_are_read_from_words_and_tables(given: object) -> None:
    read = WholeBySite.from_text(given, "lora.rank")
    assert (read.default, read.rules) == (8, (("attn.q@0", 16),))
    assert WholeBySite.from_text(read.to_text(), "lora.rank") == read


def test_a_later_rule_stands_above_an_earlier_one(bert: Anatomy) -> None:
    places = bert.sites("attn.q", "attn.v")
    read = WholeBySite.from_text("8, attn.q: 4, attn.q@0,2: 16, *@last1: 2", "lora.rank")
    values = {s.key: read.resolved(places, bert.depths, "lora.rank").at(s) for s in places}
    assert values == {
        "attn.q@0": 16, "attn.q@1": 4, "attn.q@2": 2, "attn.v@0": 8, "attn.v@1": 8, "attn.v@2": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("8, attn.q@0: x", ConfigError, "'x' is no whole number"),
        ("8, attn.q@0: 2.5", ConfigError, "2.5 is no whole number"),
        ("8, attn.q@0", ConfigError, "8, attn.q@0: 16"),
        ("8, attn.q@2-1: 3", ConfigError, "counts down"),
        ("8, ffn.up: 3", AnatomyError, "'ffn.up' is none of the places that are tuned: attn.q, attn.v"),
        ("attn.q: 3", AnatomyError, "no value for attn.v@0"),
        ("8, attn.q@7: 3", AnatomyError, "0 to 2"),
    ],
)
def test_a_value_for_no_place_and_a_place_without_a_value_are_refused(
    bert: Anatomy, text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as raised:
        WholeBySite.from_text(text, "lora.rank").resolved(bert.sites("attn.q", "attn.v"), bert.depths, "lora.rank")
    assert says in str(raised.value) and "lora.rank" in str(raised.value)
