"""setfit: pairs of rows, then a head that learns on what they made."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from fillers import encoder
from in_memory import Runs
from little import little_data, little_spec
from word_tables import WORDS

from luthier.core import CompositionError, ConfigError
from luthier.runs import RunFolder
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec
from luthier.surgery import is_head
from luthier.training import STRATEGIES
from luthier.trust import safetensors
from luthier.workflow import train
from luthier.workflow.recipes import follow

torch.set_num_threads(1)
Contrastive = STRATEGIES.get("contrastive")


def spec_of(home, out, **changes):
    rows = little_data(home / "few.csv", rows=60)
    given = {
        "model": str(encoder(home / "encoder")), "data": DataSpec(source=str(rows)), "method": "full", "settings": {},
        "strategy": "setfit", "batch": BatchSpec(size=24, tokens=4096), "steps": 40, "optim": OptimSpec(lr=2e-3),
        "trunk_dropout": "off",
    }  # fmt: skip
    return little_spec(home, out=str(out), **{**given, **changes})


def test_setfit_pairs_of_both_kinds_count_alike():
    states = torch.eye(4)[[0, 0, 1, 1]] + 0.1 * torch.eye(4)[[2, 3, 2, 3]]
    labels = torch.tensor([0, 0, 1, 1])
    h = torch.nn.functional.normalize(states, dim=-1)
    cosine = h @ h.T
    same = ((cosine[0, 1] - 1) ** 2 + (cosine[2, 3] - 1) ** 2) / 2
    other = sum(cosine[i, j] ** 2 for i in (0, 1) for j in (2, 3)) / 4
    torch.testing.assert_close(Contrastive().pairs(states, labels), (same + other) / 2)
    # Twice as many rows of one label change the number of pairs, and not what a kind counts.
    perfect = torch.eye(2)[[0, 0, 0, 0, 1]]
    assert float(Contrastive().pairs(perfect, torch.tensor([0, 0, 0, 0, 1]))) == 0.0
    assert float(Contrastive().pairs(perfect[:1], labels[:1])) == 0.0, "one row has no pair"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_setfit_the_head_rests_while_pairs_are_learnt(tmp_path, method):
    given = {"batch": BatchSpec(size=8, tokens=4096), "optim": OptimSpec(lr=1e-2, weight_decay=0.5)}
    loop = Runs(tmp_path).loop("contrastive", method, "bert-dry", **given)
    start = {n: p.detach().clone() for n, p in loop.optimiser.named.items()}
    loop.run_to()
    heads = {n for n in start if is_head(n)}
    assert heads and loop.moments.resting == heads
    still = {n for n, p in loop.optimiser.named.items() if torch.equal(p.detach(), start[n])}
    assert still == heads | {n for n in start if "pooler" in n}, "what reads the states does not learn"


def test_setfit_body_changes_in_phase_1_and_is_fixed_in_phase_2(tmp_path):
    done = follow(spec_of(tmp_path, tmp_path / "out", steps=4))
    assert list(done.phases) == ["pairs", "head"] and done.phases["pairs"] == {}
    pairs, head = tmp_path / "out" / "1-pairs", tmp_path / "out" / "2-head"
    assert RunFolder.open(head, write=False).spec["method"] == "head_only"
    kept = safetensors.read(head / "tuning" / "tuning.safetensors")
    assert kept and not [n for n in kept if "encoder.layer" in n], "phase 2 holds a head and no body"
    merged = safetensors.read(tmp_path / "out" / "1-pairs-merged" / "model.safetensors")
    base = safetensors.read(tmp_path / "encoder" / "model.safetensors")
    moved = [n for n in merged if "query.weight" in n and not np.array_equal(
        np.asarray(merged[n]), np.asarray(base[n.removeprefix("bert.")])
    )]  # fmt: skip
    assert len(moved) == 3
    learnt = json.loads((pairs / "rows.jsonl").read_text().splitlines()[0])
    assert learnt["half"] == "train"


def hidden_words(path):
    """Rows whose label is one word among ten, anywhere."""
    draw = random.Random(3)
    with path.open("w") as file:
        file.write("text,label\n")
        for i in range(120):
            label = ("good", "bad", "red")[i % 3]
            words = draw.choices(WORDS[:14], k=9)
            words.insert(draw.randrange(10), label)
            file.write(f"{' '.join(words)},{label}\n")
    return DataSpec(source=str(path), test_share=0.5)


def test_setfit_beats_a_frozen_encoder_with_the_same_head(tmp_path):
    spec = spec_of(
        tmp_path, tmp_path / "out", data=hidden_words(tmp_path / "hidden.csv"), steps=80,
        settings={"setfit.head_epochs": 16.0},
    )  # fmt: skip
    ours = follow(spec).phases["head"]["accuracy"]
    plain = dataclasses.replace(
        spec, strategy=None, settings={}, method="head_only", steps=None, epochs=16.0, optim=OptimSpec(),
        out=str(tmp_path / "plain"),
    )  # fmt: skip
    frozen = train(plain).scores["accuracy"]
    assert ours > frozen + 0.1, (ours, frozen)


def test_setfit_is_refused_where_nothing_could_part_the_states(tmp_path):
    with pytest.raises(ConfigError, match="does not merge"):
        follow(spec_of(tmp_path, tmp_path / "out", method="prefix_tuning"))
    with pytest.raises(CompositionError, match="does not move the trunk"):
        follow(spec_of(tmp_path, tmp_path / "out", method="head_only"))
    for beside in ("contrastive+focal", "scl+contrastive"):
        with pytest.raises(CompositionError, match="changes the task's loss, and in its place pairs are learnt"):
            train(spec_of(tmp_path, tmp_path / "out", strategy=beside))
    assert not (tmp_path / "out").exists()
