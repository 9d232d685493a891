"""What is shown is for eyes, what is piped is for programs."""

import io
import re
from pathlib import Path

import pytest
from cli.conftest import Call

from luthier.cli._main import verbs
from luthier.cli._output import Screen
from luthier.cli._shelf import SHELF, STRATEGIES, facts, few_words, rates_of
from luthier.surgery import METHODS

LONG = "rows.csv: 12 rows have no label and are left out of training; a file beside the run lists them and their places"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(what: str, *given: object, stream: type[io.StringIO] = Terminal) -> str:
    out = stream()
    getattr(Screen(as_json=False, out=out, err=out), what)(*given)
    return out.getvalue()


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize("what", ["say", "show"])
def test_text_is_wrapped_at_the_terminals_width_and_hangs(what: str) -> None:
    first, *more = shown(what, LONG).splitlines()
    assert len(first) <= 60 and not first.startswith(" ") and more
    assert all(len(line) <= 60 and line.startswith("  ") for line in more)
    assert " ".join([first, *more]).split() == LONG.split()


@pytest.mark.parametrize("what", ["say", "show", "page", "headline"])
def test_a_line_that_is_piped_is_one_line_without_a_colour(what: str) -> None:
    assert shown(what, LONG, stream=io.StringIO) == LONG + "\n"


def test_a_command_that_is_offered_stays_on_one_line() -> None:
    line = 'Next: luthier predict runs/a-run-with-a-long-name/lora --text "What is the capital of Peru?"'
    assert shown("show", line) == line + "\n"


def test_a_page_is_wrapped_anew_and_its_equations_are_not() -> None:
    page = (
        "One sentence that is long enough to be wrapped, in a file\nwhich has another width than the terminal.\n\n"
        "    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          A: (rank, d_in)\n\nCount: 1.\nClaims: none."
    )
    lines = shown("page", page).splitlines()
    assert "    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          A: (rank, d_in)" in lines
    assert lines[-2:] == ["Count: 1.", "Claims: none."]
    assert lines[0].endswith("in a file") or "file which" in " ".join(lines[:2])
    assert shown("page", page, stream=io.StringIO) == page + "\n"


def test_a_table_takes_the_width_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", "word " * 30)]
    narrow = re.sub(r"\x1b\[\d+m", "", shown("table", ("name", "what"), rows)).splitlines()
    monkeypatch.setenv("COLUMNS", "120")
    wide = re.sub(r"\x1b\[\d+m", "", shown("table", ("name", "what"), rows)).splitlines()
    assert max(map(len, narrow)) <= 60 < max(map(len, wide)) <= 120


def test_an_error_has_a_colour_on_a_terminal_and_no_class_name_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown("failed", "UnknownName", "No such thing.", 2) == "\x1b[1;31merror\x1b[0m: No such thing.\n"
    assert shown("failed", "UnknownName", "No such thing.", 2, stream=io.StringIO) == "error: No such thing.\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown("failed", "UnknownName", "No such thing.", 2) == "error: No such thing.\n"


def test_cells_of_an_answer_stand_between_real_tabs_and_hold_none() -> None:
    assert shown("row", 1, "a\tb", 0.5) == "1\ta\\tb\t0.5\n"


def test_what_is_said_while_something_moves_stands_on_a_line_of_its_own() -> None:
    out = Terminal()
    screen = Screen(as_json=False, out=out, err=out)
    with screen.busy("loading") as words:
        words("scoring")
        screen.say("a fact")
    assert re.search(r"(^|\n|\r|\x1b\[[^m]*[a-zA-Z])a fact *\n", out.getvalue())
    assert "loading" in out.getvalue() or "scoring" in out.getvalue()
    quiet = io.StringIO()
    with Screen(as_json=False, out=quiet, err=quiet).busy("loading"):
        pass
    assert quiet.getvalue() == ""


# --- the command line as a whole


def test_the_version_is_printed_and_nothing_is_missing(luthier: Call) -> None:
    answer = luthier("--version")
    assert answer.code == 0 and re.fullmatch(r"luthier \d+\.\d+\.\d+\S*\n", answer.out) and not answer.err


@pytest.mark.parametrize("verb", ["predict", "train", "resume", "scan"])
def test_help_is_printed_once_where_words_are_missing_and_standard_output_stays_empty(luthier: Call, verb: str) -> None:
    answer = luthier(verb)
    assert answer.code == 2 and not answer.out
    assert answer.err.count("Usage: ") == 1


def test_a_default_in_brackets_is_not_taken_for_a_colour(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = " ".join(luthier("train", "--help").out.replace("│", " ").split())
    assert "[default: auto]" in words and "[default: lora]" in words and "[default: 16]" in words
    words = " ".join(luthier("demo", "--help").out.replace("│", " ").split())
    assert "[default: runs/demo, or the next free]" in words


@pytest.mark.parametrize("verb", verbs())
def test_at_80_columns_no_name_and_no_word_of_a_help_text_is_cut(
    luthier: Call, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = luthier(verb, "--help").out
    assert "Usage: " in shown and "…" not in shown
    assert verb != "train" or "--gradient-checkpointing " in shown


def test_what_each_entry_is_begins_with_a_capital_and_is_a_whole_sentence() -> None:
    told = {card.name: few_words(card) for shelf in (SHELF, STRATEGIES) for card in shelf.cards()}
    assert [name for name, words in told.items() if words[0].islower()] == []
    assert told["label_smoothing"].startswith("The wanted answer is not quite certain: a small share of it")
    assert told["ia3"].startswith("Three learned vectors") and told["adapter_fusion"].startswith("In each block")


def test_answers_in_a_pipe_are_rows_between_tabs(luthier: Call, finished: Path) -> None:
    answer = luthier("predict", finished, "--text", "the cat is good", "--text", "it is red")
    rows = [line.split("\t") for line in answer.out.splitlines()]
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(row[1] in ("animal", "colour") and 0.5 <= float(row[2]) <= 1 for row in rows)


def test_methods_say_what_they_are_and_are_filtered(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    listed = " ".join(luthier("methods").out.split())
    assert "Train the bias vectors and nothing else" in listed
    few = luthier("methods", "--family", "additive", "--no-mergeable", "--json").json["methods"]
    assert few and all(m["family"] == "additive" and not m["mergeable"] for m in few)
    merging = luthier("methods", "--mergeable", "--json").json["methods"]
    assert "lora" in [m["name"] for m in merging] and all(m["mergeable"] for m in merging)
    misspelt = luthier("methods", "--family", "aditive")
    assert misspelt.code == 2 and "'additive'" in misspelt.err


def test_scan_says_so_where_it_judges_nothing(luthier: Call) -> None:
    Path("notes.md").write_text("mine")
    answer = luthier("scan", "notes.md")
    assert answer.code == 0 and "not judged" in answer.out and "Nothing here is of a kind" in answer.out
    assert luthier("scan", "notes.md", "--json").json["counts"]["unjudged"] == 1


def test_no_cell_that_stays_whole_loses_its_end_however_narrow_the_screen() -> None:
    screen = Screen(as_json=False, out=(out := io.StringIO()), err=io.StringIO())
    head = ("name", *"abcdefgh")
    rows = [("a_method_of_a_long_name", *["131.1 kB"] * 8), ("x", *["13.49 GB"] * 8)]
    screen.table(head, rows, right=head[1:], whole=head)
    for line, row in zip(out.getvalue().splitlines()[2:], rows, strict=True):
        assert line.split() == " ".join(row).split()


def test_a_page_says_the_rates_that_the_method_learns_at() -> None:
    for name in METHODS.ours():
        made, said = METHODS.get(name)(), facts(SHELF.card(name))
        rates = made.default_lr, made.default_head_lr or made.default_lr
        assert (said["default_lr"], said["default_head_lr"]) == rates, name
    assert rates_of(SHELF.card("prefix_tuning")).endswith(" given: 5e-05; 0.005 for a new head")
    assert rates_of(SHELF.card("bitfit")).endswith(" given: 0.004")
