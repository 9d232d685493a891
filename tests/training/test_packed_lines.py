"""Several rows in one line learn what they learn alone; what lets them see one another is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little import Heard, little_spec
from tiny import tiny
from torch.testing import assert_close
from unusual import learnt, qwen3_next
from word_tables import table

from luthier.core import ConfigError
from luthier.data.batches import Batch, Batches, Collator
from luthier.data.examples import IGNORED, Examples, Ledger
from luthier.data.order import Order
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import attach
from luthier.training.objective import Objective
from luthier.training.packed_lines import padding_said, refuse_packing, why_not_packed
from luthier.training.strategy import strategies
from luthier.workflow import resume, train

LENGTHS = np.asarray([9, 4, 5, 3, 2, 7])


def rows() -> Examples:
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids = np.random.default_rng(0).integers(4, 120, offsets[-1]).astype(np.int32)
    labels = ids.copy()
    labels[offsets[:-1]] = IGNORED
    labels[7] = IGNORED
    some = table([{"text": "x"}] * len(LENGTHS))
    told = np.asarray([int((part != IGNORED).sum()) for part in np.split(labels, offsets[1:-1])])
    return Examples(
        ids=ids, offsets=offsets, rows=np.arange(len(LENGTHS)), n_targets=told, labels=labels, ledger=Ledger(some)
    )


def losses_of(objective: Objective, batch: Batch) -> dict[tuple[int, int, int], float]:
    """The loss of each target, by its row and the place in it."""
    logits, labels = objective(batch).logits[:, :-1].float(), batch.labels[:, 1:]
    told = labels != IGNORED
    values = torch.nn.functional.cross_entropy(logits[told], labels[told], reduction="none").tolist()
    here = zip(batch.inputs["input_ids"][:, :-1][told].tolist(), labels[told].tolist(), values, strict=True)
    found: dict[tuple[int, int, int], float] = {}
    for before, target, value in here:
        again = sum(key[:2] == (before, target) for key in found)
        found[before, target, again] = value
    return found


DECODERS = ["llama", "gpt2", "gpt-neox", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "olmo2"]


@pytest.mark.acid("packing", 1)
@pytest.mark.parametrize("arch", DECODERS)
def test_each_token_has_the_loss_that_it_has_without_packing(arch: str) -> None:
    tuned = learnt(attach(tiny(arch, "lm"), "lora"))
    tuned.forward.route_attention()
    assert why_not_packed(tuned) == ""
    objective = Objective(tuned, Task(name="causal_lm"), full_logits=True)
    collator, everything = Collator(pad_id=0), np.arange(len(LENGTHS))
    with torch.no_grad():
        alone = losses_of(objective, collator(rows(), everything))
        packed = losses_of(objective, collator.packed(rows(), everything))
        chunked = Objective(tuned, Task(name="causal_lm"))(collator.packed(rows(), everything)).loss
    assert alone.keys() == packed.keys() and len(alone) == rows().n_targets.sum()
    assert max(abs(alone[key] - packed[key]) for key in alone) < 1e-5
    assert_close(float(chunked), sum(alone.values()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "bitfit", "sequential_adapter"])
def test_a_step_in_lines_has_the_gradient_of_the_padded_step(method: str) -> None:
    found = []
    for pack in (False, True):
        tuned = learnt(attach(tiny("llama", "lm"), method), 0.05)
        tuned.forward.route_attention()
        collator, everything = Collator(pad_id=0), np.arange(len(LENGTHS))
        batch = collator.packed(rows(), everything) if pack else collator(rows(), everything)
        Objective(tuned, Task(name="causal_lm"))(batch).loss.backward()
        found.append([p.grad for p in tuned.trained().values()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "method", "why"),
    [
        (lambda: tiny("bloom", "lm"), "lora", "BloomForCausalLM lets the rows of a line see one another"),
        (qwen3_next, "lora", "Qwen3NextForCausalLM lets the rows"),
        (lambda: tiny("llama", "lm"), "prompt_tuning", "prompt_tuning on LlamaForCausalLM cannot read several rows"),
        (lambda: tiny("llama", "lm"), "unipelt", "unipelt on LlamaForCausalLM cannot"),
    ],
)
def test_what_reads_more_than_its_own_text_is_refused_and_named(make, method: str, why: str) -> None:
    tuned = attach(make(), method)
    with pytest.raises(ConfigError, match=why) as caught:
        refuse_packing(tuned, Task(name="causal_lm"), rows(), [])
    assert "Leave --pack out" in str(caught.value)


def test_the_trial_leaves_no_trace() -> None:
    tuned = attach(tiny("llama", "lm"), "lora")
    tuned.model.train()
    before = {name: p.detach().clone() for name, p in tuned.trained().items()}
    state = torch.get_rng_state()
    assert why_not_packed(tuned) == ""
    assert all(torch.equal(p, before[name]) for name, p in tuned.trained().items())
    assert torch.equal(torch.get_rng_state(), state) and tuned.model.training


def test_other_tasks_facts_of_rows_and_strategies_that_see_rows_are_refused() -> None:
    tuned = attach(tiny("llama", "lm"), "lora")
    with pytest.raises(ConfigError, match="this task is preference"):
        refuse_packing(tuned, Task(name="preference"), rows(), [])
    with pytest.raises(ConfigError, match="which task it is of"):
        refuse_packing(tuned, Task(name="causal_lm"), replace(rows(), facts={"task": np.zeros(6, dtype=np.int64)}), [])
    focal = strategies("label_smoothing", {}, tuned.tuning().method)
    with pytest.raises(ConfigError, match="strategy label_smoothing looks at single rows"):
        refuse_packing(tuned, Task(name="causal_lm"), rows(), focal)


def test_a_run_says_what_packing_would_save_where_that_is_much() -> None:
    made = [
        Batches(rows(), Order(LENGTHS, size, 0), Collator(pad_id=0), 400, pack=pack)
        for size, pack in ((1, False), (6, False), (6, True))
    ]
    saves_little, saves_much, packs = map(padding_said, made)
    assert saves_little == ""
    assert "of a step's tokens are padding; with --pack it would be" in saves_much
    assert packs.startswith("rows share lines (--pack): ")


class Losses(Heard):
    """Keeps the loss and the tokens of each step too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int]] = []

    def step(self, number: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self.seen.append((row["loss"], tokens))


def test_a_packed_run_learns_the_same_goes_on_to_the_bit_and_says_what_it_saves(tmp_path: Path) -> None:
    def spec(name: str, pack: bool) -> RunSpec:
        made = little_spec(tmp_path, kind="llama", out=str(tmp_path / name), trunk_dropout="off", steps=6)
        return replace(made, batch=replace(made.batch, pack=pack, group_by_length=False), settings={"rank": 2})

    padded, packed, first, second = (Losses() for _ in range(4))
    train(spec("padded", False), listener=padded)
    train(spec("packed", True), listener=packed)
    train(spec("stopped", True), stop_at=3, listener=first)
    resume(tmp_path / "stopped", listener=second)
    np.testing.assert_allclose(padded.seen, packed.seen, atol=1e-4)
    assert first.seen + second.seen == packed.seen
    assert "rows share lines (--pack): " in packed.text
    one, other = ((tmp_path / n / "tuning" / "tuning.safetensors").read_bytes() for n in ("packed", "stopped"))
    assert one == other
