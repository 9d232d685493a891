"""Benchmarks: what they say about numbers is true of the numbers. No time is measured here."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks import _floor, _growth, _machine, _page, _plan, _suite, _work
from benchmarks.__main__ import _beside, _compared
from benchmarks._plan import GROUPS, plan
from benchmarks._work import LLAMAS, PROCESSOR, now
from luthier.kernels import plain
from luthier.surgery import attach

ROOT = Path(__file__).parents[2]


def test_summary_gives_median_least_and_most_of_what_all_runs_have():
    runs = [{"a": 3.0, "b": 1, "words": "x"}, {"a": 1.0, "b": 5}, {"a": 2.0}]
    assert _suite.summary(runs) == {"n": 3, "a": {"median": 2.0, "min": 1.0, "max": 3.0}}


def test_summary_of_a_contestant_that_failed_is_its_error():
    assert _suite.summary([{"a": 1.0}, {"error": "ValueError: no"}]) == {"error": "ValueError: no"}
    assert "error" in _suite.summary([])


def test_a_contestant_that_is_asked_for_runs_beside_the_first_alone(monkeypatch, capsys):
    ran = []

    def contest(case, **given):
        ran.append([one.name for one in case.contestants])
        return {"contestants": [{"name": n, "summary": {"step_seconds": {"median": len(n)}}} for n in ran[-1]]}

    monkeypatch.setattr("benchmarks.__main__.contest", contest)
    case = _suite.Case("own", "", tuple(_suite.Contestant(name, "", "") for name in ("lora", "full", "prompts")))
    words = argparse.Namespace(contestant=["prompts"], threads=1, repeats=1, limit=1.0)
    assert _compared([case], words) == 0 and ran == [["lora", "prompts"]]
    assert "1.75 of lora's" in capsys.readouterr().out
    words.contestant = ["none"]
    assert _compared([case], words) == 2 and "no contestant is called none" in capsys.readouterr().err


def test_rates_leave_the_first_steps_out():
    found = _work.measured([0.0, 10.0, 11.0, 13.0], [(1, 7), (4, 40), (8, 50)], skip=1)
    assert found["steady_rows_per_second"] == 12 / 3
    assert found["steady_tokens_per_second"] == 90 / 3
    assert found["step_seconds"] == 1.5


def test_rates_refuse_steps_without_a_time():
    with pytest.raises(AssertionError):
        _work.measured([0.0, 1.0], [(1, 1), (1, 1)], skip=0)


def test_blocks_supervise_the_share_asked_for_at_the_end():
    ids, labels = _work.blocks(5, 30, 50_000, 1 / 3)
    assert ids.shape == labels.shape == (5, 30)
    assert (labels[:, :20] == -100).all()
    assert (labels[:, 20:] == ids[:, 20:]).all()
    assert np.array_equal(ids, _work.blocks(5, 30, 50_000, 1.0)[0]), "the same words whatever is supervised"


def test_the_fit_of_a_line_is_that_line():
    found = _growth.fit([1, 2, 5, 9], [7.0, 9.0, 15.0, 23.0])
    assert found["fixed"] == pytest.approx(5)
    assert found["slope"] == pytest.approx(2)
    assert found["worst"] == pytest.approx(0, abs=1e-9)


def test_the_fit_of_a_square_says_how_far_it_is_off():
    assert _growth.fit([1, 2, 4, 8, 16], [1.0, 4.0, 16.0, 64.0, 256.0])["worst"] > 0.3


def test_an_idle_machine_gives_no_complaint_and_a_busy_one_does():
    assert _machine.idle_complaint(0.02) is None
    assert "--busy" in str(_machine.idle_complaint(0.5))


def test_peak_memory_sees_what_was_held_and_let_go():
    before, start = _machine.peak_bytes(), _machine.held_bytes()
    big = np.ones(8_000_000)
    assert big.sum() == 8_000_000
    held = _machine.held_bytes()
    del big
    # The kernel counts pages by processor and adds up late: two readings may differ by some pages.
    assert _machine.peak_bytes() >= max(before, held) - 4_000_000
    assert held >= start + 60_000_000


@pytest.fixture
def with_a_gpu(monkeypatch):
    """What a machine with a GPU would plan."""
    monkeypatch.setattr(_machine, "gpus", lambda: ["a GPU, 80 GiB"])


@pytest.mark.usefixtures("with_a_gpu")
@pytest.mark.parametrize("quick", [True, False])
def test_every_case_of_the_plan_has_a_name_of_its_own_and_a_function_that_takes_its_arguments(quick):
    import importlib
    import inspect

    cases = [case for cases in plan(quick).values() for case in cases]
    names = [c.name for c in cases]
    assert len(names) == len(set(names))
    for case in cases:
        contestants = [c.name for c in case.contestants]
        assert len(contestants) == len(set(contestants)), case.name
        for one in case.contestants:
            function = getattr(importlib.import_module(f"benchmarks.{one.module}"), one.function)
            inspect.signature(function).bind(**one.arguments)


def test_without_a_gpu_nothing_is_planned_for_one(monkeypatch):
    monkeypatch.setattr(_machine, "gpus", list)
    assert "gpu" not in plan(False)


def test_the_random_llamas_have_the_sizes_of_their_names():
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, billions in (("llama-1b", 1.2), ("llama-8b", 7.4)):
        width, inner, layers, heads, key_heads = LLAMAS[name]
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=49152,
                    hidden_size=width,
                    intermediate_size=inner,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=key_heads,
                )
            )
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.usefixtures("with_a_gpu")
def test_the_full_plan_has_every_group_and_repeats_each_contest_three_times():
    full = plan(False)
    assert list(full) == list(GROUPS)
    for group in ("encoder", "decoder", "methods", "own", "floor", "inference", "growth"):
        assert all(case.repeats >= 3 for case in full[group]), group
    assert [c.name.rsplit("-", 1)[1] for c in full["methods"]][::2] == list(_plan.SHARED)


def test_a_single_case_is_put_beside_those_of_the_same_environment_only():
    here = {"cpu": "one", "torch": "2", "load_at_start": [0.1]}
    old = {
        "busy": False,
        "environment": {**here, "load_at_start": [0.5]},
        "cases": [{"case": "a"}, {"case": "b", "n": 1}],
    }
    new = [{"case": "b", "n": 2}]
    assert _beside(old, here, new, ["a", "b", "c"]) == [{"case": "a"}, {"case": "b", "n": 2}]
    assert _beside(old, {**here, "torch": "3"}, new, ["a", "b"]) == new
    assert _beside({**old, "busy": True}, here, new, ["a", "b"]) == new


def test_seconds_of_the_processor_leave_sleep_out_and_stand_beside_no_others(monkeypatch):
    monkeypatch.setenv(PROCESSOR, "1")
    start = now()
    time.sleep(0.2)
    assert now() - start < 0.1
    environment = dict.fromkeys(("cpu", "cpus", "threads", "luthier", "torch", "transformers", "peft"), 1)
    old = {"busy": False, "environment": environment, "cases": [{"case": "a"}]}
    new = [{"case": "b"}]
    assert _beside(old, environment, new, ["a", "b"]) == new
    assert _beside(old | {"processor": True}, environment, new, ["a", "b"]) == [{"case": "a"}, {"case": "b"}]


def test_only_the_groups_asked_for_are_planned():
    assert list(plan(True, ("floor",))) == ["floor"]


def _counted(model, tuned, batch, length) -> int:
    ids = torch.randint(0, 50, (batch, length))
    model.train()
    # The counter does not know products that add in place, so the plain definitions are counted.
    with plain(), FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids).logits
        torch.autograd.backward(out.sum())
    return counter.get_total_flops()


def test_the_decoders_floor_counts_the_operations_that_autograd_does():
    config = LlamaConfig(
        vocab_size=56,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    tuned = attach(model, "lora", seed=0, rank=4)
    got = _counted(model, tuned, 2, 10)
    shape = _floor.Shape(layers=3, width=48, inner=80, heads=6, key_heads=3, gated=True, outputs=56)
    assert got == _floor.operations(_floor.products(shape, 2, 10, head_rows=20, rank=4))


def test_the_encoders_floor_counts_the_operations_of_its_layers():
    def counted(n_layers: int) -> int:
        config = BertConfig(
            vocab_size=56,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=n_layers,
            num_attention_heads=6,
            attn_implementation="eager",
            num_labels=3,
        )
        model = BertForSequenceClassification(config)
        return _counted(model, attach(model, "lora", seed=0, rank=4), 2, 10)

    def floor(n_layers: int) -> int:
        shape = _floor.Shape(layers=n_layers, width=48, inner=80, heads=6, key_heads=6, gated=False, outputs=3)
        return _floor.operations(_floor.products(shape, 2, 10, head_rows=2, rank=4))

    # The pooler is the same for both, and its gradient of a lone first token is no part of the floor.
    assert counted(4) - counted(2) == floor(4) - floor(2)


def test_the_encoders_floor_leaves_out_what_the_first_token_alone_does_not_need():
    config = BertConfig(
        vocab_size=56,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        attn_implementation="eager",
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    tuned = attach(model, "lora", seed=0, rank=4)
    whole = _counted(model, tuned, 2, 10)
    narrow = tuned.fast.first_token()
    assert narrow is not None
    with narrow.on():
        cut = _counted(model, tuned, 2, 10)
    shape = _floor.Shape(layers=3, width=48, inner=80, heads=6, key_heads=6, gated=False, outputs=3)
    floors = [_floor.operations(_floor.products(shape, 2, 10, 2, 4, last_rows=n)) for n in (None, 2)]
    assert whole - cut == floors[0] - floors[1] > 0


def test_a_job_that_fails_gives_its_error_and_not_a_number(tmp_path):
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    job.write_text(
        json.dumps({"module": "_growth", "function": "fit", "arguments": {"sizes": [1]}, "threads": 1, "name": "x"})
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "benchmarks._child", str(job), str(result)], cwd=ROOT, env=env, check=True, timeout=120
    )
    assert json.loads(result.read_text())["error"].startswith("TypeError: ")


def _record(group: str, cases: list[dict], busy: bool = False) -> dict:
    return {
        "group": group,
        "quick": False,
        "busy": busy,
        "busy_share_at_start": 0.5,
        "started": "2026-01-02T03:04:05+00:00",
        "environment": {**_machine.environment(1), "load_at_start": [1.0, 2.0, 3.0]},
        "cases": cases,
    }


def _contestant(name: str, **numbers: float) -> dict:
    return {"name": name, "summary": _suite.summary([numbers] * 2), "runs": [numbers] * 2}


def test_the_page_shows_ratios_to_the_fastest_peer_and_judges_nothing_that_a_busy_machine_gave(tmp_path, monkeypatch):
    results, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    results.mkdir(parents=True)
    docs.mkdir()
    monkeypatch.setattr(_page, "ROOT", tmp_path)
    monkeypatch.setattr(_page, "RESULTS", results)
    monkeypatch.setattr(_page, "PAGE", docs / "benchmarks.md")
    monkeypatch.setattr(_page, "PLOTS", docs / "benchmarks")
    numbers = [("luthier", 600.0), ("peft, fp32", 100.0), ("peft, bf16", 150.0), ("peft, slow", 120.0)]
    case = {
        "case": "decoder-all",
        "title": "A <decoder>",
        "unit": "steady_tokens_per_second",
        "contestants": [
            _contestant(n, steady_tokens_per_second=v, peak_bytes=1 << 30, baseline_bytes=1 << 29) for n, v in numbers
        ]
        + [{"name": "peft, broken", "summary": {"error": "OSError: gone"}, "runs": [{"error": "OSError: gone"}]}],
    }
    (results / "decoder.json").write_text(json.dumps(_record("decoder", [case])))
    said = _page.draw()
    page = (docs / "benchmarks.md").read_text()
    assert "busy" not in said and "the machine was busy" not in page
    assert "| smollm2-135m LoRA: speed over peft tuned, steady | ≥ 3 | 4 | yes |" in page
    assert "| smollm2-135m LoRA: speed over peft's defaults, steady | ≥ 5 | 6 | yes |" in page
    assert "| smollm2-135m LoRA: peak memory over peft tuned | ≤ 0.6 | 1 | **no** |" in page
    assert "- decoder-all, peft, broken: OSError: gone" in page
    (results / "decoder.json").write_text(json.dumps(_record("decoder", [case], busy=True)))
    assert "busy" in _page.draw()
    page = (docs / "benchmarks.md").read_text()
    assert "the machine was busy" in page
    assert "| smollm2-135m LoRA: speed over peft tuned, steady | ≥ 3 | 4 | not known |" in page
    assert "A &lt;decoder&gt;" in (docs / "benchmarks" / "decoder-all.svg").read_text()
