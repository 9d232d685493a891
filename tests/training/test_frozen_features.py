"""Features of a frozen trunk: the logits of the model, the same bits wherever a run stops, only where it is right."""

import dataclasses

import numpy as np
import pytest
import torch
from little import Heard, little_data, little_model
from safetensors.torch import load_file
from tiny import tiny
from word_tables import table, word_tokenizer

from luthier.data.batches import Batches, Collator
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.order import Order
from luthier.data.tasks import Task
from luthier.kernels import plain
from luthier.runs.spec import BatchSpec, CheckpointSpec, DataSpec, RunSpec
from luthier.surgery import attach
from luthier.training import frozen_features as kept
from luthier.training.frozen_features import Features
from luthier.training.objective import Objective
from luthier.workflow import resume, train

TASK = Task(name="classification", labels=("a", "b", "c"))
COLUMNS = Columns(shape="labelled", text="text", label="label")
WORDS = ["how", "far", "is", "it", "moon", "sun", "cat", "dog", "red", "blue"]


def _batches(kind: str, pad_id: int) -> Batches:
    made = np.random.default_rng(1)
    rows = [
        {
            "text": " ".join(WORDS[int(k)] for k in made.integers(0, 10, size=int(made.integers(1, 14)))),
            "label": "abc"[i % 3],
        }
        for i in range(23)
    ]
    tokenizer = word_tokenizer("bert" if kind in ("bert", "roberta", "distilbert") else "gpt")
    examples = encode(table(rows), COLUMNS, TASK, tokenizer, n_vocab=len(tokenizer), max_length=20)
    return Batches(examples, Order(examples.lengths, 5, 0), Collator(pad_id=pad_id), tokens=40)


def _tuned(kind: str, method: str = "head_only", dtype: torch.dtype = torch.float64, **settings):
    torch.manual_seed(0)
    model = tiny(kind, "classification", num_labels=3).eval().to(dtype)
    model.config.pad_token_id = 0
    return attach(model, method, seed=0, **settings)


KINDS = ["bert", "roberta", "distilbert", "gpt2", "llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_model_in_float64(kind):
    tuned, batches = _tuned(kind), _batches(kind, 0)
    if kind in ("bert", "roberta", "distilbert"):
        assert not tuned.model.training
    objective = Objective(tuned, TASK)
    assert isinstance(objective.keep_features(batches), Features), "features may be kept here"
    for step in range(3):
        for batch in batches.step(0, step):
            results = []
            for slow in (False, True):
                with plain(slow):
                    result = objective(batch)
                result.loss.backward()
                grads = [p.grad.clone() for p in tuned.trained().values()]
                for p in tuned.trained().values():
                    p.grad = None
                results.append((result.logits.detach(), float(result.loss.detach()), grads))
            (logits, loss, grads), (logits_p, loss_p, grads_p) = results
            assert torch.allclose(logits, logits_p, rtol=1e-9, atol=1e-11)
            assert abs(loss - loss_p) < 1e-9
            assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(grads, grads_p, strict=True))
            assert any(float(g.abs().max()) > 0 for g in grads)


def test_a_pooler_that_trains_gets_its_gradient():
    tuned, batches = _tuned("bert", pooler=True), _batches("bert", 0)
    objective = Objective(tuned, TASK)
    assert objective.keep_features(batches) is not None
    objective(batches.step(0, 0)[0]).loss.backward()
    moved = [n for n, p in tuned.trained().items() if p.grad is not None and float(p.grad.abs().max()) > 0]
    assert any("pooler" in n for n in moved) and len(moved) == len(tuned.trained())


def test_each_group_is_computed_once_whatever_rows_are_asked_for_first():
    found = []
    for steps in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        tuned, batches = _tuned("bert", dtype=torch.bfloat16), _batches("bert", 0)
        objective = Objective(tuned, TASK)
        features = objective.keep_features(batches)
        calls = []
        handle = tuned.model.base_model.encoder.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        for _ in range(2):
            for step in steps:
                for batch in batches.step(0, step):
                    objective(batch)
        handle.remove()
        assert len(calls) == len(features._groups._groups)
        found.append(features._kept)
    assert torch.equal(*found)


def test_the_kept_bits_do_not_depend_on_how_a_step_is_cut():
    tuned, batches = _tuned("bert", dtype=torch.float32), _batches("bert", 0)
    objective = Objective(tuned, TASK)
    objective.keep_features(batches)
    whole = batches.step(0, 0, tokens=1000)
    logits = {int(r): row for b in whole for r, row in zip(b.rows, objective(b).logits.detach(), strict=True)}
    features = {r: objective.features._kept[r].clone() for r in logits}
    for b in batches.step(0, 0, tokens=1):
        objective(b)
    assert all(torch.equal(objective.features._kept[r], row) for r, row in features.items())


def test_dropout_in_the_trunk_and_the_plain_switch_turn_it_off():
    tuned, batches = _tuned("bert"), _batches("bert", 0)
    objective = Objective(tuned, TASK)
    features = objective.keep_features(batches)
    assert features.usable()
    tuned.model.train()
    assert not features.usable()
    tuned.model.eval()
    with plain():
        assert not features.usable()


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "prompt_tuning", "prefix_tuning", "lst", "ia3"])
def test_nothing_is_kept_where_a_method_lies_in_the_trunk(method):
    settings = {"rank": 2} if method == "lora" else {}
    tuned = _tuned("bert", method, dtype=torch.float32, **settings)
    assert Objective(tuned, TASK).keep_features(_batches("bert", 0)) is None


def test_nothing_is_kept_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(kept, "LIMIT_BYTES", 100)
    assert Objective(_tuned("bert"), TASK).keep_features(_batches("bert", 0)) is None


def test_a_head_that_reads_all_tokens_is_left_alone():
    tuned = _tuned("roberta")

    class Mean(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states, **more):
            return self.inner(states.mean(1, keepdim=True))

    tuned.model.classifier = Mean(tuned.model.classifier)
    assert Objective(tuned, TASK).keep_features(_batches("roberta", 0)) is None


def test_memory_that_runs_out_in_a_group_halves_the_group(monkeypatch):
    tuned, batches = _tuned("bert"), _batches("bert", 0)
    objective = Objective(tuned, TASK)
    objective.keep_features(batches)
    real = kept.Trunk.states

    def narrow(self, inputs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no more")
        return real(self, inputs)

    monkeypatch.setattr(kept.Trunk, "states", narrow)
    batch = batches.step(0, 0)[0]
    quick = objective(batch).logits
    with plain():
        assert torch.allclose(quick, objective(batch).logits, rtol=1e-9, atol=1e-11)


def _spec(tmp_path, name, **changes) -> RunSpec:
    data = little_data(tmp_path / "rows.csv")
    spec = RunSpec(
        model=str(little_model(tmp_path / "model")),
        data=DataSpec(source=str(data)),
        method="head_only",
        epochs=3,
        batch=BatchSpec(size=8, tokens=64),
        checkpoint=CheckpointSpec(every_steps=1, keep=50),
        precision="bf16",
        threads=1,
        out=str(tmp_path / name),
    )
    return dataclasses.replace(spec, **changes)


def _tuning(path):
    return load_file(next((path / "tuning").glob("*.safetensors")))


def test_a_run_says_that_features_are_kept_and_one_epoch_keeps_none(tmp_path):
    heard = Heard()
    train(_spec(tmp_path, "three"), listener=heard)
    assert "computed once and kept" in heard.text
    for name, changes in (("one", {"epochs": 1}), ("slow", {"fast": False})):
        heard = Heard()
        train(_spec(tmp_path, name, **changes), listener=heard)
        assert "computed once" not in heard.text


@pytest.mark.parametrize("stop", [1, 5, 7, 12])
def test_a_resumed_run_ends_with_the_same_bits(stop, tmp_path):
    whole = train(_spec(tmp_path, "whole"))
    train(_spec(tmp_path, "halves"), stop_at=stop)
    halves = resume(tmp_path / "halves")
    one, other = _tuning(tmp_path / "whole"), _tuning(tmp_path / "halves")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert whole.scores == halves.scores
