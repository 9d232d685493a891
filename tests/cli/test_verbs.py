"""The verbs, called as a user calls them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Call

from luthier.cli._main import verbs
from luthier.cli._shelf import SHELF, measured


def wide(text: str) -> list[str]:
    """Lines of more than 80 columns."""
    return [line for line in text.splitlines() if len(line) > 80]


def test_methods_lists_the_shelf_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom luthier.cli import main\ncode = main(['methods'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)\n"
        "assert main(['methods', 'lora']) == 0 and main(['samples']) == 0 and main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in SHELF.names())


def test_the_list_of_methods_fits_a_terminal(luthier: Call) -> None:
    answer = luthier("methods")
    assert answer.code == 0 and not wide(answer.out)
    assert "lora" in answer.out and "arXiv:2106.09685" in answer.out


def test_methods_as_json_gives_every_fact(luthier: Call) -> None:
    listed = luthier("methods", "--json").json["methods"]
    assert [m["name"] for m in listed] == SHELF.names()
    for method in listed:
        assert method["paper"] and method["family"]
        assert isinstance(method["mergeable"], bool) and isinstance(method["identity"], bool)


@pytest.mark.parametrize("name", SHELF.names())
def test_a_page_shows_idea_settings_and_what_to_try(luthier: Call, name: str) -> None:
    answer = luthier("methods", name)
    card = SHELF.card(name)
    assert answer.code == 0
    assert card.page in answer.out
    for setting in card.settings:
        assert setting.name in answer.out
    assert f"--method {name}" in answer.out
    said = measured("methods").get(name, [])
    assert answer.out.count("Measured: ") == len(said) + card.page.count("Measured: ")


def test_the_line_to_try_on_a_page_is_a_valid_setting() -> None:
    from luthier.cli._shelf import example_of
    from luthier.cli._spec_options import overlay, settings_of
    from luthier.surgery import compose

    for name in SHELF.names():
        if word := example_of(SHELF.card(name)):
            values = overlay({}, settings_of([word]))
            assert compose.method(name, values["settings"]) == compose.method(name, {}), name


def test_a_method_without_a_counted_share_shows_a_question_mark(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.cli import _shelf

    monkeypatch.setattr(_shelf, "shares", dict)
    assert "?" in luthier("methods").out
    assert luthier("methods", "lora", "--json").json["share_on_minilm_l6"] is None


def test_inspect_shows_every_site_of_a_model(luthier: Call, model: Path) -> None:
    answer = luthier("inspect", model)
    assert answer.code == 0 and not wide("\n".join(answer.out.splitlines()[1:-1]))
    for site in ("attn.q", "ffn.down", "block_out", "norm", "embed"):
        assert site in answer.out
    facts = luthier("inspect", model, "--json").json
    assert facts["n_layers"] == 3 and facts["width"] == 48
    assert {"site", "path", "shape", "count"} <= set(facts["sites"][0])


def test_samples_lists_what_can_be_fetched(luthier: Call) -> None:
    answer = luthier("samples")
    assert answer.code == 0 and "trec6" in answer.out
    assert not wide("\n".join(answer.out.splitlines()[:-2]))
    assert {"name", "kind", "download_bytes", "licence", "cached"} <= set(
        luthier("samples", "--json").json["samples"][0]
    )


@pytest.mark.parametrize("verb", verbs())
def test_help_teaches_and_costs_no_torch(luthier: Call, verb: str) -> None:
    answer = luthier(verb, "--help")
    assert answer.code == 0 and "Examples:" in answer.out and f"luthier {verb}" in answer.out
    assert not wide(answer.out)
    words = re.sub(r"[│\s]+", " ", answer.out)
    assert not re.search(r"(\[default: [^\]]*\]) \1", words), "a default stands there twice"


def test_a_run_tells_what_came_out_and_what_to_try(luthier: Call, model: Path, rows: Path) -> None:
    answer = luthier("train", model, "--data", rows, "--steps", 3, "--threads", 1, "--out", "run", "--set", "rank=3")
    assert answer.code == 0, answer.err
    for word in ("accuracy", "trained", "peak memory", "on disk", "95 % interval", "Next: "):
        assert word in answer.out
    assert "step 3/3" in answer.err
    assert not re.search(r"[0-9a-f]{32}", answer.err), "a digest is for no eyes"
    assert json.loads(Path("run/run.json").read_text())["spec"]["settings"] == {"rank": 3}
    again = luthier("train", "run/spec.toml", "--out", "again", "--json")
    assert again.code == 0
    assert again.json["scores"] == json.loads(Path("run/scores.json").read_text())


def test_a_run_as_json_is_one_object(luthier: Call, model: Path, rows: Path) -> None:
    answer = luthier("train", model, "--data", rows, "--steps", 2, "--threads", 1, "--method", "ia3", "--json")
    facts = answer.json
    assert answer.code == 0 and facts["status"] == "finished" and facts["method"] == "ia3"
    assert facts["trained"] > facts["trained_without_head"] > 0
    assert "\x1b" not in answer.err


def test_predict_answers_texts_and_files_in_their_order(luthier: Call, finished: Path, tmp_path: Path) -> None:
    texts = ["the cat is good", "it is red", "who is dog"]
    told = luthier("predict", finished, *[w for t in texts for w in ("--text", t)], "--json")
    assert told.code == 0, told.err
    table = tmp_path / "questions.csv"
    table.write_text("text\n" + "\n".join(texts) + "\n")
    read = luthier("predict", finished, "--data", table, "--json")
    assert read.json["answers"] == told.json["answers"] and len(told.json["answers"]) == 3
    plain = luthier("predict", finished, "--text", texts[0])
    assert plain.out.startswith(told.json["answers"][0]["label"])


@pytest.mark.fault("F57", "terminal of a run")
def test_what_a_row_says_cannot_drive_the_terminal(luthier: Call, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    label = "\x1b]0;owned\x07"
    lines = [f"how is cat {w},{label}\nwho is dog {w},other" for w in ("one", "two", "red", "blue", "good", "bad")]
    table.write_text("text,label\n" + "\n".join(lines) + "\n")
    words = ["train", model, "--data", table, "--steps", 2, "--threads", 1, "--out", "run"]
    answer = luthier(*words)
    told = luthier("predict", "run", "--text", "how is cat")
    assert "\x1b" not in answer.out + answer.err + told.out + told.err


def test_scan_and_convert_tell_what_they_found(luthier: Call, model: Path, tmp_path: Path) -> None:
    assert luthier("scan", model).code == 0
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "weights.bin").write_bytes(b"\x80\x04K\x01.")
    answer = luthier("scan", bad, "--json")
    assert answer.code == 4 and answer.json["error"]["type"] == "Refused"
    assert luthier("convert", bad / "weights.bin").code == 4
    assert not (bad / "weights.safetensors").exists()


def test_verify_resume_proves_that_halves_equal_the_whole(luthier: Call, finished: Path) -> None:
    answer = luthier("verify-resume", finished / "spec.toml", "--steps", 3, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["equal"] and answer.json["steps"] == 6


def test_the_demo_never_writes_over_an_old_one(tmp_path: Path) -> None:
    from luthier.cli.demo import free_folder

    assert free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-2"
    (tmp_path / "demo-2").write_text("")
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.slow
@pytest.mark.samples
def test_the_demo_reaches_what_it_promises(luthier: Call, minilm_l6: Path, trec6: Path) -> None:
    answer = luthier("demo", "--json", "--out", "demo")
    assert answer.code == 0, answer.err
    runs = {run["method"]: run for run in answer.json["runs"]}
    assert list(runs) == ["head_only", "bitfit", "ia3", "lora", "full"]
    lora, head = (runs[name]["scores"]["accuracy"] for name in ("lora", "head_only"))
    assert lora >= 0.91 and lora >= head + 0.05
    assert len(answer.json["answers"]) == 3
    assert all(run["peak_bytes"] > 0 and run["stored_bytes"] > 0 for run in runs.values())
