"""Tables of experiments: counts of known shapes, and a page from a part of its results."""

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.plan_grid import of_part
from experiments.chat import page as chat_page
from experiments.methods import page as methods_page
from experiments.parameters.__main__ import MODELS, SHAPES, table
from experiments.results import known, once, tried, words_of
from experiments.size_lora.page import SETS, WAYS, write
from experiments.strategies.page import MEASURED, measured
from luthier.core import ConfigError, Interrupted
from luthier.surgery import METHODS

RESULTS = ("experiments", "strategies", "results.jsonl")


def test_counts_of_known_shapes_are_those_that_follow_from_their_sizes() -> None:
    lines = table(["lora:rank=64:sites=*", "full", "bitfit", "spot"], ("llama-7b",)).splitlines()
    by_name = {line.split("|")[1].strip().partition("]")[0].lstrip("["): line.split("|")[2] for line in lines[2:]}
    # r (d_in + d_out) for four maps of 4096 x 4096 and three of 4096 x 11008, in 32 layers; the head has none.
    assert 32 * 64 * (4 * 8192 + 3 * (4096 + 11008)) == 159_907_840
    assert by_name["lora:rank=64:sites=*"].split()[0] == "159,907,840"
    assert by_name["the model itself"].split()[0] == by_name["full"].split()[0] == "6,738,415,616"
    assert by_name["full"].split()[1] == "(100"
    assert by_name["bitfit"].strip() == by_name["spot"].strip() == "-"


def test_every_shape_is_there_and_holds_no_more_than_a_shape() -> None:
    for model in MODELS:
        values = json.loads((SHAPES / f"{model}.json").read_text())
        assert values["model_type"] in ("roberta", "t5", "llama") and "auto_map" not in values


def planted(path: Path, n_sets: int) -> Path:
    lines = [
        {"model": "minilm-l3", "set": name, "way": way, "seed": seed, "accuracy": 0.5 + 0.1 * seed, "seconds": 36.0}
        for name in SETS[:n_sets] for way in WAYS for seed in range(3)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("n_sets", [6, 1])
def test_a_part_of_the_results_is_a_table_and_says_what_is_missing(tmp_path: Path, n_sets: int) -> None:
    write(planted(tmp_path / "results.jsonl", n_sets), tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"{15 * n_sets} of 210 runs are finished" in text
    assert f"about {(210 - 15 * n_sets) * 36 / 3600:.1f} hours" in text
    of_all = text.partition("## Mean over the sets")[2].partition("##")[0]
    assert ("| minilm-l3 | 0.600 | 0.600" in of_all) == (n_sets == 6)
    assert "| minilm-l3 | 0.600" in text and "| mpnet-base | - |" in text


def line_of(strategy: str | None, passes: int, seed: int, accuracy: float, **more: float) -> dict[str, object]:
    scene = "then" if more else "few"
    return {"scene": scene, "strategy": strategy, "passes": passes, "seed": seed, "accuracy": accuracy, **more}


def test_a_strategys_page_says_what_came_out_beside_plain_training() -> None:
    rows = [
        *(line_of(None, times, seed, 0.7 + 0.01 * times) for times in (1, 2) for seed in (0, 1)),
        *(line_of("freelb", 2, seed, 0.75 + 0.01 * seed) for seed in (0, 1)),
        *(line_of("focal", 1, seed, 0.70 + 0.02 * seed) for seed in (0, 1)),
        line_of("ema", 1, 0, 0.5), line_of(None, 1, 0, 0.9, old=0.6), line_of("replay+ewc", 1, 0, 0.8, old=0.75),
    ]  # fmt: skip
    said = measured(rows)
    (freelb,), (focal,), (ema,), (ewc,) = (said[name] for name in ("freelb", "focal", "ema", "ewc"))
    assert "LoRA on minilm-l6, 2 seeds: accuracy 0.755, plain training 0.710, with as many passes 0.720." in freelb
    assert freelb.endswith(
        "Higher than training with as many passes with each of 2 seeds (by chance alone: 50% of the time)."
    )
    assert focal.endswith("0.710, plain training 0.710. Not told apart from plain training.")
    assert "decay=0.98, 1 seed:" in ema and ema.endswith("One seed says little.")
    assert "replay with ewc, " in ewc and "of the first task 0.750 is left, plainly 0.600" in ewc
    assert said["replay"] == said["ewc"] and "lora" not in said


def test_what_the_package_says_of_strategies_is_what_the_results_give() -> None:
    assert json.loads(MEASURED.read_text()) == measured(known(Path(MEASURED.parents[3], *RESULTS)))


def test_what_the_package_says_of_methods_is_what_the_results_give() -> None:
    home = methods_page.MEASURED.parents[3]
    found = methods_page.measured(known(home / "experiments" / "methods" / "results.jsonl"))
    assert json.loads(methods_page.MEASURED.read_text()) == found


def test_a_method_is_measured_beside_the_head_alone_and_lora_over_its_seeds() -> None:
    scores = [("lora", 0, 0.9), ("lora", 1, 0.92), ("lora", 2, 0.88), ("head_only", 0, 0.4), ("ia3", 0, 0.85)]
    rows = [{"set": "trec6", "method": name, "seed": seed, "accuracy": score} for name, seed, score in scores]
    said = methods_page.measured([*rows, {"set": "trec6", "method": "warp", "seed": 0, "refused": "AnatomyError: no."}])
    assert said["lora"] == [
        "minilm-l6 on 600 rows of trec6, at the defaults: accuracy 0.900 (3 seeds: 0.880 to 0.920); head_only 0.400."
    ]
    assert said["ia3"][0].endswith("accuracy 0.850 (one seed); head_only 0.400, lora 0.900.")
    assert "warp" not in said


def test_what_was_refused_is_said_and_is_no_result(tmp_path: Path) -> None:
    path = planted(tmp_path / "results.jsonl", 1)
    with path.open("a") as file:
        refused = {"model": "mpnet-base", "set": "trec6", "way": "full", "seed": 0, "refused": "ResourceError: none"}
        file.write(json.dumps(refused) + "\n")
    write(path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "mpnet-base, trec6, full, seed 0: ResourceError: none" in text and "15 of 210" in text


def test_a_run_that_breaks_is_a_line_and_one_that_is_interrupted_ends_all(tmp_path: Path) -> None:
    seen = []

    def run(error: Exception | None, out: str) -> tuple[list[bool], dict[str, int]]:
        Path(out).mkdir()
        seen.append(Path(out))
        if error is not None:
            raise error
        return [True, False], {"steps": 3}

    assert tried(partial(run, None)) == {"accuracy": 0.5, "rows": 2, "steps": 3}
    assert tried(partial(run, ConfigError("lora: no."))) == {"refused": "ConfigError: lora: no."}
    with pytest.raises(Interrupted):
        tried(partial(run, Interrupted("stopped", 2)))
    assert not any(path.exists() for path in seen), "no folder is left"
    once(tmp_path / "results.jsonl", {"seed": 0}, partial(tried, partial(run, None)))
    (line,) = known(tmp_path / "results.jsonl")
    assert {"seed", "accuracy", "rows", "steps", "seconds"} == set(line)


def test_a_chat_page_sets_each_perplexity_against_the_model_as_it_is(tmp_path: Path) -> None:
    facts = {"seed": 0, "trained": 1234, "stored": 2**20, "held": 2**21, "cpu_seconds": 3.0}
    rows: list[dict[str, object]] = [
        {"method": chat_page.BASE, "seed": 0, "perplexity": 40.0},
        {"method": "lora", "perplexity": 30.0, **facts},
        {"method": "ia3", "perplexity": 41.0, **facts},
        {"method": "coda", "seed": 0, "refused": "AnatomyError: none"},
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat_page.write(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "The model as it is: 40.00." in text
    assert "| [lora](methods/lora.md) | 30.00 | -25.0% | 1,234 | 1 MiB | 2 MiB | 3 |" in text
    assert "Not better than the model as it is: ia3." in text and "- coda: AnatomyError: none" in text
    assert f"Not run: {len(METHODS.ours()) - 3} of" in text


def test_a_name_that_is_none_and_a_part_that_is_none_are_answered_in_a_line(capsys) -> None:  # type: ignore[no-untyped-def]
    words = words_of("methods", "method", Path("none.jsonl"), None, METHODS.get)
    for wrong, said in ((["--only", "loar"], "Did you mean 'lora'"), (["--part", "3/2"], "the first half is 1/2")):
        with pytest.raises(SystemExit) as stopped:
            words.parse_args(wrong)
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_parts_of_a_table_are_the_table() -> None:
    rows = list(range(7))
    assert sorted([*of_part(rows, (1, 2)), *of_part(rows, (2, 2))]) == rows
