"""QLoRA, QA-LoRA and LoftQ: what the catalogue's acid tests ask of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_data, little_model
from torch import Tensor
from unusual import learnt, llama, word_ids

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, CannotMerge, ConfigError
from luthier.kernels import FORMATS, GROUP, StoredLinear
from luthier.surgery import attach, decode_layers, encode_layers, load
from luthier.workflow import train

IDS = word_ids(2, 7)


def stored(store: str) -> Any:
    return encode_layers(llama(), store, remember=True)


def layers(model: Any) -> dict[str, StoredLinear]:
    found = {}
    for name, module in model.named_modules():
        module = getattr(module, "base", module)
        if isinstance(module, StoredLinear) and id(module) not in {id(m) for m in found.values()}:
            found[name] = module
    return found


@pytest.mark.acid("qlora", 4, 6)
def test_qlora_equals_a_model_that_is_decoded_first_and_no_gradient_of_codes_exists() -> None:
    short = stored("nf4")
    plain = decode_layers(copy.deepcopy(short))
    tuned, twin = (learnt(attach(m, "qlora", rank=3)) for m in (short, plain))
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (short, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in tuned.trained().items():
        assert parameter.grad is not None and parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, twin.trained()[name].grad, atol=1e-5, rtol=1e-3)
    assert all(not b.requires_grad and b.grad is None for b in short.buffers())
    assert len(tuned.trained()) == 2 * 7 * 2  # A and B of seven projections in two layers


@pytest.mark.parametrize(("method", "store"), [("qlora", "nf4"), ("loftq", "nf4"), ("qa_lora", "int4")])
def test_a_run_takes_the_store_of_its_method_and_floats_are_refused(tmp_path: Path, method: str, store: str) -> None:
    model, data = little_model(tmp_path / "model", "llama"), little_data(tmp_path / "rows.csv", kind="prompts")
    words: dict[str, Any] = {"steps": 2, "batch": 4, "threads": 1, "precision": "fp32", "progress": False, "rank": 2}
    found = train(model, data, method=method, out=str(tmp_path / "run"), **words).record
    assert found.status == "finished" and found.spec["store"] == store and "store" in found.spec["chosen"]
    with pytest.raises(ConfigError, match=rf"store = fp32: {method} is made for a base in codes"):
        train(model, data, method=method, store="fp32", out=str(tmp_path / "floats"), **words)


# --- QA-LoRA


@pytest.mark.acid("qa_lora", 1, 2, 3)
@pytest.mark.parametrize("store", ["int4", "int2"])
def test_qa_lora_merging_moves_offsets_alone_and_computes_the_same(store: str) -> None:
    model = stored(store)
    tuned = learnt(attach(model, "qa_lora", rank=3), 0.1)
    model.eval()
    wanted = model(input_ids=IDS).logits
    before = {n: {k: b.clone() for k, b in layer.named_buffers()} for n, layer in layers(model).items()}
    merged = tuned.merge()
    assert not [n for n, _ in merged.named_modules() if "luthier" in n]
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    after = layers(merged)
    assert len(after) == len(before) == 14
    for name, parts in before.items():
        name = name if name in after else name.removesuffix(".base")
        layer = after[name]
        for part, value in parts.items():
            assert torch.equal(layer.get_buffer(part), value) == (part != "beta"), f"{name}.{part}"
        assert on_grid(
            layer.decoded(), layer.get_buffer("alpha"), layer.get_buffer("beta"), 15 if store == "int4" else 3
        )


def on_grid(weight: Tensor, alpha: Tensor, beta: Tensor, top: int) -> bool:
    """Whether each number is beta + alpha * q, q an integer from 0 to `top`."""
    wide = (t.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]] for t in (alpha, beta))
    step, start = wide
    q = (weight - start) / step
    return bool(((q - q.round()).abs() < 1e-3).all() and (q.round() >= 0).all() and (q.round() <= top).all())


@pytest.mark.acid("qa_lora", 5)
def test_qa_lora_a_plain_lora_leaves_the_grid_and_is_refused() -> None:
    model = stored("int4")
    layer = next(iter(layers(model).values()))
    alpha, beta = layer.get_buffer("alpha"), layer.get_buffer("beta")
    assert on_grid(layer.decoded(), alpha, beta, 15)
    low_rank = 0.05 * torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
    assert not on_grid(layer.decoded() + low_rank, alpha, beta, 15)
    with pytest.raises(CannotMerge, match=r"int4 codes"):
        learnt(attach(model, "lora", rank=2)).merge()


@pytest.mark.acid("qa_lora", 4)
def test_qa_lora_has_one_input_for_each_group() -> None:
    model = stored("int4")
    anatomy = Anatomy.read(model)
    tuned = attach(model, "qa_lora", rank=3)
    for key, parameter in tuned.trained().items():
        site = next(s for s in anatomy.all_sites if s.key == key.rpartition(".")[0])
        assert parameter.shape == ((3, -(-site.d_in // GROUP)) if key.endswith(".a") else (site.d_out, 3))


def test_qa_lora_unfolds_to_the_bit_and_merges_into_floats_too() -> None:
    model = stored("int4")
    tuned = learnt(attach(model, "qa_lora", rank=3), 0.1)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    wanted = model(input_ids=IDS).logits
    tuned.merging.fold()
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    tuned.merging.unfold()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    plain = llama()
    other = learnt(attach(plain, "qa_lora", rank=3), 0.1)
    given = plain.eval()(input_ids=IDS).logits
    torch.testing.assert_close(other.merge()(input_ids=IDS).logits, given, atol=1e-5, rtol=1e-4)


# --- LoftQ


def effective(tuned: Any, model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(float weight, what the codes stand for, what acts) of each layer."""
    found = []
    places = {s.key: s.path for s in tuned.anatomy.all_sites}
    for key, module in tuned.modules().items():
        layer = tuned.edited.modules[places[key]]
        codes = layer.decoded()
        acts, _ = module.merged(codes.clone(), None)
        found.append((layer.original(), codes, acts.detach()))
    return found


@pytest.mark.acid("loftq", 1, 3)
@pytest.mark.parametrize("store", ["nf4", "int2"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_loftq_one_round_leaves_the_smallest_singular_values_whatever_the_scale(store: str, scale: float) -> None:
    model = stored(store)
    tuned = attach(model, "loftq", rank=4, alpha=4 * scale)
    for whole, codes, acts in effective(tuned, model):
        left = torch.linalg.svdvals(whole - codes)[4:].square().sum().sqrt()
        torch.testing.assert_close((whole - acts).norm(), left, rtol=1e-3, atol=1e-5)
        assert left < 0.99 * (whole - codes).norm()


@pytest.mark.acid("loftq", 2, 3)
@pytest.mark.parametrize("store", ["nf4", "int4", "int2"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_loftq_five_rounds_are_nearer_than_the_codes_at_every_matrix(store: str, scale: float) -> None:
    model = stored(store)
    tuned = attach(model, "loftq", rank=4, alpha=4 * scale, rounds=5)
    found = effective(tuned, model)
    assert len(found) == 14
    assert all((whole - acts).norm() < (whole - codes).norm() for whole, codes, acts in found)


@pytest.mark.acid("loftq", 4)
@pytest.mark.parametrize("rounds", [1, 5])
def test_loftq_saved_and_loaded_has_the_same_effective_weight(tmp_path: Path, rounds: int) -> None:
    model = stored("nf4")
    fresh = copy.deepcopy(model)
    tuned = learnt(attach(model, "loftq", rank=3, rounds=rounds))
    tuned.save(tmp_path / "tuning")
    wanted = model.eval()(input_ids=IDS).logits
    again = load(fresh, tmp_path / "tuning")
    assert torch.equal(fresh(input_ids=IDS).logits, wanted)
    for (_, _, one), (_, _, two) in zip(effective(tuned, model), effective(again, fresh), strict=True):
        assert torch.equal(one, two)


@pytest.mark.acid("loftq", 5)
@pytest.mark.parametrize("rounds", [1, 5])
def test_loftq_at_two_bits_starts_nearer_to_the_float_model_than_qlora(rounds: int) -> None:
    wanted = llama()(input_ids=IDS).logits
    off = []
    for name, more in (("qlora", {}), ("loftq", {"rounds": rounds})):
        model = stored("int2")
        attach(model, name, rank=8, **more)
        off.append(float((model.eval()(input_ids=IDS).logits - wanted).detach().norm()))
    assert off[1] < 0.9 * off[0]


def test_loftq_trains_with_codes_of_its_own_as_the_decoded_model_does() -> None:
    model = stored("nf4")
    tuned = learnt(attach(model, "loftq", rank=3, rounds=3))
    loss = model.eval()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trained().values())
    plain = copy.deepcopy(llama())
    with torch.no_grad():
        for (_, _, acts), path in zip(effective(tuned, model), paths(tuned), strict=True):
            plain.get_submodule(path).weight.copy_(acts)
    torch.testing.assert_close(plain.eval()(input_ids=IDS, labels=IDS).loss, loss, atol=1e-5, rtol=1e-4)


def paths(tuned: Any) -> list[str]:
    places = {s.key: s.path for s in tuned.anatomy.all_sites}
    return [places[key] for key in tuned.modules()]


def test_loftq_without_the_float_weights_says_what_to_do() -> None:
    with pytest.raises(AnatomyError, match=r"its float weight is needed and not at hand"):
        attach(encode_layers(llama(), "nf4"), "loftq", rank=3)
    assert set(FORMATS) == {"nf4", "int8", "int4", "int2"}
