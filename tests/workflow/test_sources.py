"""Runs that are made of finished runs: recorded, resumed to the bit, refused where the sources have changed."""

from pathlib import Path

import pytest
import torch
from little import little_spec

from luthier.core import ConfigError, IntegrityError
from luthier.runs.spec import RunSpec
from luthier.surgery import read_tuning
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)


def spec(home: Path, name: str, method: str = "pfeiffer_adapter", **more) -> RunSpec:
    settings = {"pfeiffer_adapter": {"reduction": 8}, "prompt_tuning": {"length": 3}, "mpt": {"distil": 0.9}}.get(
        method, {}
    )
    return little_spec(home, out=str(home / name), method=method, steps=3, settings=settings, **more)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("sources")
    train(spec(home, "a", seed=1))
    train(spec(home, "b", seed=2))
    return home


def fused(home: Path, name: str) -> RunSpec:
    return spec(home, name, "adapter_fusion", sources=(str(home / "a"), str(home / "b" / "tuning")))


def test_adapters_then_their_fusion_resumed_to_the_bits_of_an_unbroken_run(home):
    train(fused(home, "whole"))
    train(fused(home, "halves"), stop_at=2)
    resume(home / "halves")
    assert run_digests(home / "halves") == run_digests(home / "whole")
    facts = read_tuning(home / "whole" / "tuning")
    assert [s["name"] for s in facts["sources"]] == ["a", "b"]
    assert facts["settings"]["adapters"] == 2


def test_three_adapters_then_their_fusion_and_prompts_then_spot_then_attempt_go_on_to_the_bit(home):
    train(spec(home, "c", seed=3))
    for number in (1, 2, 3):
        train(spec(home, f"prompt-{number}", "prompt_tuning", seed=number))
    made = [str(home / f"prompt-{number}") for number in (1, 2)]
    chain = [
        ("fusion", "adapter_fusion", tuple(str(home / name) for name in "abc")),
        ("spot", "spot", tuple(made)),
        ("attempt", "attempt", (str(home / "spot-whole"), str(home / "prompt-3"))),
        ("mpt", "mpt", (made[0],)),  # its teacher goes on with it
    ]
    for name, method, sources in chain:
        train(spec(home, f"{name}-whole", method, sources=sources))
        for stop in (1, 2):
            train(spec(home, f"{name}-{stop}", method, sources=sources), stop_at=stop)
            resume(home / f"{name}-{stop}")
            assert run_digests(home / f"{name}-{stop}") == run_digests(home / f"{name}-whole"), (name, stop)
    assert read_tuning(home / "fusion-whole" / "tuning")["settings"]["adapters"] == 3
    assert [s["method"] for s in read_tuning(home / "attempt-whole" / "tuning")["sources"]] == ["spot", "prompt_tuning"]


def test_a_source_that_changed_meanwhile_is_refused(home):
    train(fused(home, "stopped"), stop_at=1)
    train(spec(home, "other", seed=4))
    (home / "a").rename(home / "kept")
    (home / "other").rename(home / "a")
    try:
        with pytest.raises(IntegrityError, match=r"the tunings that it is made of .* are not those it began with"):
            resume(home / "stopped")
    finally:
        (home / "a").rename(home / "other")
        (home / "kept").rename(home / "a")


def test_a_run_without_the_sources_it_needs_leaves_no_folder(home):
    with pytest.raises(ConfigError, match="adapter_fusion: is made of saved tunings of pfeiffer_adapter, at least 2"):
        train(spec(home, "none", "adapter_fusion"))
    with pytest.raises(ConfigError, match="lora takes no saved tunings"):
        train(little_spec(home, out=str(home / "none"), method="lora", sources=(str(home / "a"),)))
    assert not (home / "none").exists()
