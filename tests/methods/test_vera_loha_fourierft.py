"""VeRA, LoHa and FourierFT: their own tests, beside those that every method passes."""

import math
from pathlib import Path

import pytest
import torch
from methods.checks import logits, stir, train
from safetensors.torch import load_file
from tiny import tiny

from luthier.core import ConfigError, IntegrityError
from luthier.methods.parts.random_pair import RandomPair
from luthier.surgery import attach, from_peft, load, to_peft

# --- vera


@pytest.mark.acid("vera", 1, 3)
def test_one_pair_of_matrices_serves_all_places_and_is_in_no_file(tmp_path: Path) -> None:
    tuned = attach(tiny("llama"), "vera", rank=7, sites=("attn.k", "ffn.up", "ffn.down"))
    pairs = {id(m.__dict__["pair"]) for m in tuned.modules().values() if "pair" in m.__dict__}
    assert len(pairs) == 1
    pair = tuned.modules()["pair"]
    assert (pair.a.shape, pair.b.shape) == ((7, 80), (80, 7))
    stir(tuned, 0.1)
    expected = logits(tuned.model)
    tuned.save(tmp_path / "tuning")
    held = load_file(tmp_path / "tuning" / "tuning.safetensors")
    assert sum(t.numel() for t in held.values()) == sum(d + 7 for d in (24, 80, 48)) * 3
    other = tiny("llama")
    load(other, tmp_path / "tuning")
    assert torch.equal(logits(other), expected)


def test_a_seed_names_the_pair_whatever_else_is_drawn() -> None:
    torch.manual_seed(1)
    one = attach(tiny("bert"), "vera", rank=5, draw=3).modules()["pair"]
    torch.manual_seed(2)
    again = attach(tiny("bert"), "vera", rank=5, draw=3).modules()["pair"]
    other = attach(tiny("bert"), "vera", rank=5, draw=4).modules()["pair"]
    assert torch.equal(one.a, again.a) and torch.equal(one.b, again.b)
    assert not torch.equal(one.a, other.a)


@pytest.mark.acid("vera", 2)
def test_a_seed_names_the_pair_whatever_device_type_and_number_of_threads_are_the_default() -> None:
    pair = attach(tiny("bert"), "vera", rank=5, draw=3).modules()["pair"]
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    found = []
    with torch.device("meta"):  # whatever is drawn there has no numbers
        found.append(RandomPair(80, 80, 5, 3))
    try:
        torch.set_default_dtype(torch.float64)
        found.append(RandomPair(80, 80, 5, 3))
        torch.set_default_dtype(torch.bfloat16)
        torch.set_num_threads(2)
        found.append(RandomPair(80, 80, 5, 3))
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)
    found.append(attach(tiny("bert").bfloat16(), "vera", rank=5, draw=3).modules()["pair"])
    here = RandomPair(80, 80, 5, 3)
    for one in found[:3]:
        assert one.a.dtype == torch.float32 and torch.equal(one.a, here.a) and torch.equal(one.b, here.b)
    assert torch.equal(found[3].a, pair.a) and torch.equal(found[3].b, pair.b)


def test_a_file_of_peft_with_another_pair_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tuned = attach(tiny("llama"), "vera", rank=7, train_head=False)
    to_peft(tuned, tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    pair = tuned.modules()["pair"]
    save_file(load_file(path) | {"base_model.vera_A": pair.a + 0.1, "base_model.vera_B": pair.b.clone()}, path)
    model = tiny("llama")
    before = list(model.state_dict())
    with pytest.raises(IntegrityError, match=r"base_model.vera_A is not what it is on this model"):
        from_peft(model, tmp_path / "out")
    assert list(model.state_dict()) == before


# --- loha


@pytest.mark.acid("loha", 1, 2)
def test_the_rank_of_the_hadamard_product_is_above_twice_the_rank_and_all_factors_learn() -> None:
    tuned = attach(tiny("llama"), "loha", rank=3, sites=("ffn.up",))
    start = {n: p.detach().clone() for n, p in tuned.trained().items() if "@" in n}
    train(tuned, 3, decay=0.0)
    assert len(start) == 4 * 3 and all(not torch.equal(tuned.trained()[n], p) for n, p in start.items())
    module = next(iter(tuned.modules().values()))
    stir(tuned)
    update = module.merged(torch.zeros(80, 48), None)[0]
    assert 6 < torch.linalg.matrix_rank(update) <= 9


@pytest.mark.parametrize("zeroed", [("a2",), ("a1", "a2"), ("a2", "b2")])
def test_what_starts_at_zero_decides_which_factors_learn(zeroed) -> None:
    tuned = attach(tiny("bert"), "loha", rank=3, sites=("ffn.up",), train_head=False)
    modules = list(tuned.modules().values())
    with torch.no_grad():
        for module in modules:
            for name in zeroed:
                getattr(module, name).zero_()
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    train(tuned, 3, decay=0.0)
    moved = {n.rpartition(".")[2] for n, p in tuned.trained().items() if not torch.equal(p, start[n])}
    # One factor: all move by the third step. A whole pair, or one of each: none ever does.
    assert moved == ({"a1", "b1", "a2", "b2"} if zeroed == ("a2",) else set())


# --- fourierft


@pytest.mark.acid("fourierft", 1)
def test_the_update_is_the_sum_of_cosines_written_out() -> None:
    tuned = attach(tiny("bert"), "fourierft", n=3, sites=("ffn.up",), alpha=20.0)
    module = next(iter(tuned.modules().values()))
    with torch.no_grad():
        module.c.copy_(torch.tensor([1.0, -2.0, 0.5]))
    o, i = torch.meshgrid(torch.arange(80).double(), torch.arange(48).double(), indexing="ij")
    wanted = torch.zeros(80, 48, dtype=torch.float64)
    for place, c in zip(module.index.tolist(), module.c.tolist(), strict=True):
        row, column = divmod(place, 48)
        wanted += c * torch.cos(2 * math.pi * (row * o / 80 + column * i / 48))
    torch.testing.assert_close(module.update().double(), 20 * wanted / (80 * 48), rtol=1e-5, atol=1e-6)


@pytest.mark.acid("fourierft", 3)
def test_a_file_holds_its_numbers_and_no_places(tmp_path: Path) -> None:
    tuned = attach(tiny("bert"), "fourierft", n=9, train_head=False)
    stir(tuned)
    expected = logits(tuned.model)
    tuned.save(tmp_path / "tuning")
    held = load_file(tmp_path / "tuning" / "tuning.safetensors")
    assert [t.numel() for t in held.values()] == [9] * len(tuned.modules())
    other = tiny("bert")
    load(other, tmp_path / "tuning")
    assert torch.equal(logits(other), expected)


@pytest.mark.acid("fourierft", 2)
def test_layers_of_one_shape_share_their_places_and_another_seed_has_others() -> None:
    first, other = (attach(tiny("bert"), "fourierft", n=9, draw=s) for s in (777, 778))
    places = [m.index for m in first.modules().values()]
    assert all(torch.equal(p, places[0]) for p in places) and len(set(places[0].tolist())) == 9
    assert not torch.equal(next(iter(other.modules().values())).index, places[0])
    updates = []
    for tuned in (first, other):
        module = next(iter(tuned.modules().values()))
        module.c.data.fill_(1.0)
        updates.append(module.update())
    assert (updates[0] - updates[1]).abs().max() > 0.1 * updates[0].abs().max()
    drawn = attach(tiny("bert"), "fourierft", n=9, start="normal")
    assert not drawn.tuning().method.starts_at_base
    assert all(bool(m.c.any()) for m in drawn.modules().values())


def test_more_coefficients_than_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fourierft.n: 3000 coefficients are more than the 2304 of attn.q@0"):
        attach(tiny("bert"), "fourierft", n=3000)
