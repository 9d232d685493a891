"""`luthier plan`: forecasts from a configuration alone, and what it refuses."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Call

from luthier.surgery import METHODS

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "torch_dtype": "float16",
}  # fmt: skip
EVERY_MAP = "lora:rank=64:sites=*"


@pytest.fixture
def llama_7b(tmp_path: Path) -> Path:
    path = tmp_path / "llama-7b" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_7B))
    return path


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are made, and not those of another test."""
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", "0")


def test_a_bare_configuration_is_enough_and_its_counts_are_those_of_the_papers(luthier: Call, llama_7b: Path) -> None:
    row = luthier("plan", llama_7b, "--method", EVERY_MAP, "--json").json["rows"][0]
    assert row["held"]["trained"] == 159_907_840
    assert row["held"]["moments"] == 2 * row["held"]["numbers"] == 2 * 4 * 159_907_840
    again = luthier("plan", llama_7b.parent, "--method", EVERY_MAP, "--json").json["rows"][0]
    assert again["held"] == row["held"]  # the peak holds this process as it is now


def test_tied_embeddings_count_once(luthier: Call, tmp_path: Path) -> None:
    small = {**LLAMA_7B, "hidden_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small))
    tied = luthier("plan", path, "--method", "full", "--json").json
    path.write_text(json.dumps({**small, "tie_word_embeddings": False}))
    apart = luthier("plan", path, "--method", "full", "--json").json
    assert apart["numbers"] - tied["numbers"] == 64 * 32_000
    assert apart["rows"][0]["held"]["numbers"] - tied["rows"][0]["held"]["numbers"] == 4 * 64 * 32_000


def test_all_methods_on_7b_in_three_seconds_of_work(luthier: Call, llama_7b: Path) -> None:
    luthier("plan", llama_7b, "--method", "lora")  # libraries are loaded once
    begun = time.process_time()
    rows = luthier("plan", llama_7b, "--json").json["rows"]
    assert time.process_time() - begun < 3
    assert {row["method"] for row in rows} == set(METHODS.names())
    by_name = {row["name"]: row for row in rows}
    assert by_name["full"]["held"]["trained"] == 6_738_415_616
    assert by_name["bitfit"]["held"] is None and "no bias" in by_name["bitfit"]["refused"]


def test_no_number_of_a_large_model_loses_its_unit_on_80_columns(luthier: Call, llama_7b: Path) -> None:
    said = luthier("plan", llama_7b).out
    table = said.split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= 80
    cells = [line.split("  ") for line in table[2:]]
    weights = [[cell for cell in line if cell.strip()][3].strip() for line in cells]
    assert len(weights) > 50 and all(cell.endswith((" GB", " MB")) for cell in weights)
    assert next(line.split() for line in table if line.startswith("beft "))[1:3] == ["131.1", "k"]


@pytest.fixture
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ways to fit take seconds on a large model, and have a test of their own."""
    from luthier.workflow import plan

    monkeypatch.setattr(plan, "TRIED", 0)
    monkeypatch.setattr(plan, "INSTEAD", ())


@pytest.mark.usefixtures("nothing_tried")
def test_a_budget_that_fits_nothing_says_so(luthier: Call, llama_7b: Path) -> None:
    said = luthier("plan", llama_7b, "--method", "lora,full", "--device", "8GB")
    assert said.code == 0
    rows = luthier("plan", llama_7b, "--method", "lora,full", "--device", "8GB", "--json").json["rows"]
    assert [row["fits"] for row in rows] == ["no", "no"]
    assert "Nothing fits" in said.out and "luthier train" not in said.out


def test_a_method_that_stands_twice_is_refused_and_settings_tell_two_apart(luthier: Call, llama_7b: Path) -> None:
    answer = luthier("plan", llama_7b, "--method", "lora,ia3,lora")
    assert answer.code == 2 and "--method lora stands twice" in answer.err
    rows = luthier("plan", llama_7b, "--method", "lora,lora:rank=4", "--json").json["rows"]
    assert [row["name"] for row in rows] == ["lora", "lora:rank=4"]


@pytest.mark.parametrize("device", ["9000", "gpu", "-3GB", "0GB", ""])
def test_an_unknown_device_is_refused(luthier: Call, llama_7b: Path, device: str) -> None:
    answer = luthier("plan", llama_7b, "--method", "lora", "--device", device)
    assert answer.code == 2 and "h100-80gb" in answer.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ("[1]", "must be an object"),
        ("{}", "model_type"),
        ('{"model_type": "llamma"}', "llama"),
        ('{"model_type": "llama", "hidden_size": "wide"}', ""),
        ('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "remote code"),
        ('{"model_type": "llama", "num_attention_heads": 0}', ""),
        ('{"model_type": "llama", "num_hidden_layers": 0}', ""),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}', "quantised by gptq"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(luthier: Call, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    answer = luthier("plan", path, "--method", "lora")
    assert answer.code in (2, 3, 4) and said in answer.err, answer.err
    assert "Traceback" not in answer.err and str(path) in answer.err


def test_settings_are_for_every_method_that_has_them_and_else_refused(luthier: Call, model: Path) -> None:
    rows = luthier("plan", model, "--method", "lora,ia3", "--set", "rank=3", "--json").json["rows"]
    assert rows[0]["held"]["trained"] == 3 * rows[0]["held"]["trained"] // 3 > 0 and rows[1]["held"] is not None
    one = luthier("plan", model, "--method", "lora:rank=3", "--json").json["rows"][0]["held"]
    assert one == rows[0]["held"]
    answer = luthier("plan", model, "--method", "lora,ia3", "--set", "rnak=3")
    assert answer.code == 2 and "rank" in answer.err


def test_rows_say_the_head_and_a_screen_is_80_columns_wide(luthier: Call, model: Path, rows: Path) -> None:
    answer = luthier("plan", model, "--data", rows)
    assert answer.code == 0, answer.err
    table = answer.out.split("\n\n")[1]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert all(name in answer.out for name in METHODS.names())
    assert luthier("plan", model, "--data", rows, "--labels", 3).code == 2


def test_a_base_in_codes_counts_as_its_codes(luthier: Call, llama_7b: Path) -> None:
    def rows(methods: str, *more: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = luthier("plan", llama_7b, "--method", methods, "--json", *more).json["rows"]
        return found

    floats, wanted = rows("lora,qlora:rank=8", "--precision", "bf16", "--batch-tokens", 128)
    assert (floats["weights_in"], wanted["weights_in"]) == ("bfloat16", "nf4")  # as a run of each takes it
    # The embedding and the head stay; of the rest 4.127 bits are left of 16.
    tables = 2 * 2 * 32_000 * 4096
    small, whole = (row["held"]["weights"] - tables for row in (wanted, floats))
    assert small / whole == pytest.approx(4.127 / 16, rel=0.01)
    assert wanted["peak"]["low"] < floats["peak"]["low"] - 8e9
    lora, full, qlora = rows("lora,full,qlora", "--store", "int8", "--precision", "bf16", "--batch-tokens", 128)
    assert wanted["held"]["weights"] < lora["held"]["weights"] < floats["held"]["weights"]
    assert lora["weights_in"] == qlora["weights_in"] == "int8" and "int8 codes" in full["refused"]
    assert "made for a base in codes" in rows("qlora", "--store", "fp32")[0]["refused"]


@pytest.mark.parametrize("method", ["lora", "qlora"])  # qlora holds the base in codes
def test_a_run_holds_what_was_forecast_and_check_compares_the_whole(
    luthier: Call, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out = tmp_path / "runs" / "one"
    words = ("--data", rows, "--method", method, "--set", "rank=3", "--steps", 2, "--threads", 1, "--out", out)
    assert luthier("train", model, *words).code == 0
    record = json.loads((out / "record.json").read_text())
    for part in ("weights", "trained", "gradients", "optimiser"):
        assert record["forecast"][part] == record["memory"][part], part
    found = luthier("plan", out.parent, "--check", "--json").json
    assert found["residuals"]["n"] == 1 and found["silent"] == {}  # judged by the grid's runs of other methods
    assert found["intervals"][0]["n"] > 19
    only = found["pairs"][0]
    program = record["memory"]["program"] + sum(record["memory"][p] for p in ("weights", "trained", "gradients"))
    activations = only["forecast"] - program - record["memory"]["optimiser"]
    assert activations == pytest.approx(record["memory"]["activations"], rel=0.1)
    said = luthier("plan", out.parent, "--check").out
    assert "off" in said and "Median error" in said and "too low" in said
    assert luthier("plan", tmp_path / "nowhere", "--check").code == 2
    # On another processor: the run's own precision and packed copies count, and not those that it would have here.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    for test in tests:
        monkeypatch.setattr(torch.cpu, test, lambda: not fast, raising=False)
    record["forecast"]["packed"] += 10**6
    (out / "record.json").write_text(json.dumps(record))
    assert luthier("plan", out.parent, "--check", "--json").json["pairs"][0]["forecast"] == only["forecast"] + 10**6


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_tasks_of_words_have_no_labels(luthier: Call, model: Path, llama_7b: Path, task: str) -> None:
    words = ("plan", model if task == "masked_lm" else llama_7b, "--method", "lora", "--task", task)
    found = luthier(*words, "--json").json
    assert found["task"]["labels"] == []
    assert (found["rows"][0]["held"]["head"] > 0) == (task == "masked_lm"), "this encoder came without a head of words"
    refused = luthier(*words, "--labels", 3)
    assert refused.code == 2 and f"the task {task} has no labels" in refused.err


def test_what_cannot_fit_is_refused_before_it_starts_and_force_starts_it(
    luthier: Call, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflow import forecasts

    monkeypatch.setattr(forecasts.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 1000})())
    words = ("train", model, "--data", rows, "--steps", 2, "--threads", 1, "--out", "run")
    refused = luthier(*words)
    assert refused.code == 5 and "1.0 kB" in refused.err and "--force" in refused.err
    assert "smaller model" in refused.err and not Path("run").exists()
    assert luthier(*words, "--force").code == 0
    room = 900_000  # full tuning of this model holds a million and more
    monkeypatch.setattr(forecasts.psutil, "virtual_memory", lambda: type("Memory", (), {"total": room})())
    monkeypatch.setattr("luthier.workflow.plan.resident_bytes", lambda: 0)
    monkeypatch.setattr("luthier.workflow.plan.LATER", 0)
    monkeypatch.setattr("luthier.workflow.plan.committed", tuple)
    refused = luthier(*words[:-1], "again", "--method", "full", "--max-length", 8, "--batch", 1)
    assert refused.code == 5 and "What would fit, with its peak: --method lora" in refused.err, refused.err


@pytest.mark.usefixtures("nothing_tried")
def test_a_forecast_of_activations_says_what_fits_and_what_would(luthier: Call, llama_7b: Path) -> None:
    row = luthier("plan", llama_7b, "--method", "lora", "--device", "24GB", "--json").json["rows"][0]
    assert row["fits"] == "maybe" and row["would"].startswith("batch.tokens=")
    assert row["peak"]["low"] <= row["peak"]["likely"] <= row["peak"]["high"]
    words = ("--method", "lora", "--device", "24GB", "--set", row["would"])
    assert luthier("plan", llama_7b, *words, "--json").json["rows"][0]["fits"] == "yes"
    leaner = luthier("plan", llama_7b, "--method", "lora", "--gradient-checkpointing", "true", "--json").json["rows"][0]
    assert leaner["activations"] < row["activations"] / 3


def test_every_way_that_is_said_to_fit_fits_by_a_forecast_of_its_own(luthier: Call, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    path.write_text(json.dumps({**LLAMA_7B, **sizes, "vocab_size": 512}))
    words = ("plan", path, "--method", "lora,full", "--max-length", 32)
    whole = luthier(*words, "--device", "24GB", "--json").json["rows"]
    assert all(row["fits"] == "yes" and row["remedies"] == [] for row in whole)
    small = f"{whole[0]['peak']['high'] * 0.7 / 1e6:.3f}MB"
    rows = luthier(*words, "--device", small, "--json").json["rows"]
    said = {row["name"]: [told["words"] for told in row["remedies"]] for row in rows}
    kinds = ("--batch-tokens", "--gradient-checkpointing true", "--store nf4", "--store int8")
    assert all(any(one.startswith(kind) for one in said["lora"]) for kind in kinds), said
    for row in rows:
        for told in row["remedies"]:
            own = () if "--method" in told["words"] else ("--method", row["name"])
            again = (*own, *told["words"].split(), "--max-length", 32, "--device", small, "--json")
            (found,) = luthier("plan", path, *again).json["rows"]
            assert found["fits"] == "yes" and found["peak"] == told["peak"], told
    screen = luthier(*words, "--device", small).out
    assert all(one in screen for one in said["lora"])


def test_what_fits_among_those_asked_about_is_named_and_a_base_in_codes_is_for_no_full_tuning(
    luthier: Call, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    path.write_text(json.dumps({**LLAMA_7B, **sizes, "vocab_size": 512}))
    words = ("plan", path, "--method", "full,bitfit,lora", "--max-length", 8, "--batch", 1)
    by_name = {row["name"]: row for row in luthier(*words, "--device", "20MB", "--json").json["rows"]}
    assert by_name["full"]["fits"] == "no" and by_name["lora"]["fits"] == "yes" and by_name["bitfit"]["refused"]
    assert [told["words"] for told in by_name["full"]["remedies"]] == ["--method lora"]
    assert by_name["full"]["remedies"][0]["peak"] == by_name["lora"]["peak"]


def test_the_next_command_is_one_that_runs(luthier: Call, llama_7b: Path, model: Path) -> None:
    assert "luthier train" not in luthier("plan", llama_7b, "--method", "lora").out, "no weights are there to train"
    assert f"luthier train {model} --data FILE --method ia3" in luthier("plan", model, "--method", "ia3").out


def test_an_unexpected_error_is_said_in_the_row_and_the_counts_stay(
    luthier: Call, llama_7b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflow import plan

    def broken(*args: object, **more: object) -> None:
        raise ZeroDivisionError("planted\nand more")

    monkeypatch.setattr(plan, "growth", broken)
    row = luthier("plan", llama_7b, "--method", "lora", "--json").json["rows"][0]
    assert row["held"]["trained"] > 0 and row["activations"] is None
    assert row["unknown"] == "unexpected, please report it: ZeroDivisionError: planted"
    assert "planted" in luthier("plan", llama_7b, "--method", "lora").out


def test_a_template_without_rows_is_refused_and_not_passed_over(luthier: Call, llama_7b: Path) -> None:
    answer = luthier("plan", llama_7b, "--template", "{text} It was {mask}.")
    assert answer.code == 2 and "Name them with --data" in answer.err


def test_a_record_that_cannot_be_read_does_not_end_the_check_of_the_others(
    luthier: Call, model: Path, rows: Path, tmp_path: Path
) -> None:
    home = tmp_path / "runs"
    words = ("--data", rows, "--method", "lora", "--steps", 2, "--threads", 1)
    assert luthier("train", model, *words, "--out", home / "old").code == 0
    assert luthier("train", model, *words, "--strategy", "stlr", "--out", home / "strategy").code == 0
    record = json.loads((home / "old" / "record.json").read_text())
    record["spec"]["of_long_ago"] = 1
    (home / "old" / "record.json").write_text(json.dumps(record))
    found = luthier("plan", home, "--check", "--json").json
    (path,) = found["silent"]
    assert "old" in path and "of_long_ago" in found["silent"][path] and len(found["pairs"]) == 1


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds are for a forecast that somebody wants to believe."""
    from luthier.workflow import durations

    whole = durations.measured_rates
    monkeypatch.setattr(durations, "measured_rates", lambda *args, **more: whole(*args, **{**more, "seconds": 0.01}))


def test_time_is_an_interval_and_rows_say_how_long_a_run_is(luthier: Call, model: Path, rows: Path) -> None:
    words = ("plan", model, "--data", rows, "--method", "lora,full", "--epochs", 5)
    found = luthier(*words, "--json").json
    assert found["steps"]["total"] == 5 * -(-39 // 16) and found["loading"]["low"] < found["loading"]["high"]
    for row in found["rows"]:
        assert row["step"]["low"] < row["step"]["likely"] < row["step"]["high"]
        assert row["training"]["high"] == pytest.approx(row["step"]["high"] * found["steps"]["total"])
    said = luthier(*words).out
    assert "15 steps" in said and "a step" in said and "loading takes" in said


def test_a_device_that_was_never_measured_has_no_time_but_a_floor(luthier: Call, llama_7b: Path) -> None:
    words = ("plan", llama_7b, "--method", "lora")
    row = luthier(*words, "--device", "h100-80gb", "--json").json["rows"][0]
    assert row["step"] is None and row["training"] is None
    # Two products with each weight, one of them on the way back, for 16 rows of 128 tokens; 990 T a second.
    assert row["at_least"] == pytest.approx(4 * 6.6e9 * 16 * 128 / 990e12, rel=0.3)
    unknown = luthier(*words, "--device", "24GB")
    assert "never measured is not known" in unknown.out and "at least" not in unknown.out
    assert luthier(*words, "--device", "24GB", "--json").json["rows"][0]["at_least"] is None


def test_real_steps_are_made_here_or_not_at_all(
    luthier: Call, model: Path, rows: Path, llama_7b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("plan", model, "--data", rows, "--method", "lora", "--probe")
    row = luthier(*words, "--json").json["rows"][0]
    assert row["probed"] and row["unprobed"] == "" and 0 < row["step"]["low"] < row["step"]["high"]
    assert "three real steps" in luthier(*words).out
    elsewhere = luthier(*words, "--device", "24GB")
    assert elsewhere.code == 2 and "another" in elsewhere.err
    assert luthier("plan", model, "--probe").code == 2, "every method of the catalogue would take an hour"
    from luthier.workflow import plan

    monkeypatch.setattr(plan._Row, "_room", lambda self: 1000)
    row = luthier(*words, "--json").json["rows"][0]
    assert not row["probed"] and "no steps were made" in row["unprobed"] and "1.0 kB are free" in row["unprobed"]
    assert "no steps were made" in luthier(*words).out


def test_rows_that_no_run_could_use_are_refused(luthier: Call, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    assert luthier("plan", model, "--data", empty, "--method", "lora").code != 0


def test_check_compares_seconds_too(luthier: Call, model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    words = ("--data", rows, "--method", "lora", "--steps", 3, "--threads", 1, "--out", out)
    assert luthier("train", model, *words).code == 0
    record = json.loads((out / "record.json").read_text())
    assert record["timing"]["steps"] == 2 and record["timing"]["seconds"] > 0
    short = luthier("plan", out.parent, "--check", "--json").json["times"]
    assert short["counted"]["pairs"] == [], "so short a run has not measured the machine"
    rates = {"rate_products": 1e9, "rate_moved": 1e9, "rate_calls": 1e5}
    record["timing"] |= {**rates, "seconds": 0.5, "loading": 0.7}
    (out / "record.json").write_text(json.dumps(record))
    times = luthier("plan", out.parent, "--check", "--probe", "--json").json["times"]
    (counted,), (probed,), (loading,) = (times[how]["pairs"] for how in ("counted", "probed", "loading"))
    assert counted["measured"] == probed["measured"] == 0.5 and loading["measured"] == 0.7
    record["timing"] |= {name: value / 2 for name, value in rates.items()}
    (out / "record.json").write_text(json.dumps(record))
    slower = luthier("plan", out.parent, "--check", "--json").json["times"]["counted"]["pairs"][0]
    assert slower["forecast"] == pytest.approx(2 * counted["forecast"])
    assert "measured / forecast" in luthier("plan", out.parent, "--check").out


def test_a_strategy_is_priced_by_its_passes_and_what_it_holds_is_said_to_be_unknown(
    luthier: Call, model: Path, rows: Path
) -> None:
    words = ("plan", model, "--method", "lora", "--task", "classification", "--device", "h100-80gb")
    plain = luthier(*words, "--json").json
    (row,) = plain["rows"]
    assert (plain["passes"], plain["forwards"], plain["aside"]) == (1.0, 0.0, "")
    freelb = luthier(*words, "--strategy", "freelb", "--json").json
    assert freelb["passes"] == 2.0 and freelb["rows"][0]["at_least"] == pytest.approx(2 * row["at_least"])
    smart = luthier(*words, "--strategy", "smart", "--json").json
    assert smart["forwards"] == 1.0
    passes = smart["passes"] + smart["forwards"] / 2  # the base is frozen
    assert smart["rows"][0]["at_least"] == pytest.approx(passes * row["at_least"])
    said = luthier(*words, "--strategy", "smart").out
    assert "1 pass forward alone" in said and "is in no forecast" in said
    assert row["fits"] == "yes" and freelb["rows"][0]["fits"] == "maybe", "what it holds is not known"
    assert luthier(*words, "--strategy", "llrd", "--json").json["rows"][0]["fits"] == "yes", "rates hold nothing"


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--strategy", "freelbb"), 2, "freelb"),
        (("--strategy", "tapt"), 3, "tapt is a recipe, a chain of runs"),
        (("--strategy", "freelb+freelb"), 2, "twice"),
        (("--strategy", "freelb", "--set", "freelb.kk=2"), 2, "no setting 'kk'"),
        (("--strategy", "freelb", "--set", "k=0"), 2, "k"),
        (("--pack",), 2, "batch.pack: it is for language models"),
    ],
)
def test_a_way_of_learning_that_no_run_could_take_is_refused(
    luthier: Call, model: Path, more: tuple[str, ...], code: int, said: str
) -> None:
    answer = luthier("plan", model, "--method", "lora", "--task", "classification", "--device", "24GB", *more)
    assert said in answer.err + answer.out and "Traceback" not in answer.err
    assert answer.code == code or "cannot be put on this model" in answer.out


def test_settings_of_a_strategy_are_no_settings_of_a_method(luthier: Call, model: Path) -> None:
    words = ("--strategy", "freelb", "--set", "k=3", "--set", "rank=2", "--task", "classification")
    (row,) = luthier("plan", model, "--method", "lora", *words, "--device", "24GB", "--json").json["rows"]
    (alone,) = luthier(
        "plan", model, "--method", "lora:rank=2", "--task", "classification", "--device", "24GB", "--json"
    ).json["rows"]
    assert row["held"] == alone["held"]


def test_words_that_would_change_nothing_are_said_or_refused(luthier: Call, model: Path, tmp_path: Path) -> None:
    for more in (("--method", "lora"), ("--device", "24GB"), ("--labels", 3), ("--batch", 4), ("--set", "rank=3")):
        answer = luthier("plan", tmp_path, "--check", *more)
        assert answer.code == 2 and "would change nothing" in answer.err, more
    absent = luthier("plan", tmp_path / "confg.json", "--method", "lora")
    assert absent.code in (2, 3) and "no such file" in absent.err
    config = json.loads((model / "config.json").read_text())
    words = ("plan", model, "--method", "lora", "--device", "24GB", "--task", "classification")
    long = luthier(*words, "--max-length", 10**6)
    assert f"the model reads {config['max_position_embeddings']} tokens" in long.err


def test_a_model_with_a_tower_beside_its_words_has_a_forecast(luthier: Call, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
        "vision_config": {**sizes, "image_size": 56, "patch_size": 14}, "mm_tokens_per_image": 4,
    }))  # fmt: skip
    words = ("plan", path, "--method", "lora", "--max-length", 16, "--task", "causal_lm")
    (row,) = luthier(*words, "--device", "h100-80gb", "--json").json["rows"]
    assert row["unknown"] == "" and row["activations"] > 0 and row["at_least"] > 0
