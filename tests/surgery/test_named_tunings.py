"""Several tunings on one model: what acts, what learns and what is frozen are separate facts."""

from typing import Any

import pytest
import torch
from cells import Trainer, shake, small
from kinds import KINDS, logits, make, prepared
from tiny import inputs, tiny
from torch import Tensor

from luthier.core import CompositionError, ConfigError, UnknownName
from luthier.surgery import Tuned, attach, load
from luthier.surgery.install import Installer


def two(first: str, second: str, arch: str = "bert") -> tuple[Tuned, Any, dict[str, Tensor]]:
    model = tiny(arch, "classification" if arch == "bert" else "")
    batch = inputs(model)
    tuned = attach(model, make(first), name="a", train_head=False)
    tuned.add(make(second), name="b", seed=1, train_head=False)
    prepared(tuned, batch)
    model.eval()
    return tuned, model, batch


def facts(tuned: Tuned) -> dict[str, tuple[bool, bool]]:
    return {row["tuning"]: (row["active"], row["trainable"]) for row in tuned.status()}


def values(tuned: Tuned, name: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in tuned.trained(name).items()}


def test_active_and_trainable_are_separate_and_printed() -> None:
    tuned, _, _ = two("lora", "ia3")
    assert facts(tuned) == {"a": (True, True), "b": (True, True)}
    tuned.train_only("b")
    assert facts(tuned) == {"a": (True, False), "b": (True, True)}
    tuned.activate("a")
    assert facts(tuned) == {"a": (True, False), "b": (False, True)}
    said = repr(tuned)
    assert "a: lora, active, frozen" in said and "b: ia3, inactive, trains" in said and "numbers in the base" in said
    tuned.train_only()
    assert not [n for n, p in tuned.model.named_parameters() if p.requires_grad]


def test_each_set_of_active_tunings_computes_what_it_computes_alone() -> None:
    tuned, model, batch = two("lora", "ia3")
    base = logits(tiny("bert", "classification"), batch)
    shake(tuned)
    both = logits(model, batch)
    tuned.activate("a")
    only_a = logits(model, batch)
    tuned.activate("b")
    only_b = logits(model, batch)
    with tuned.base_only():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), only_b)
    tuned.activate()
    assert torch.equal(logits(model, batch), base)
    tuned.activate("b", "a")
    assert torch.equal(logits(model, batch), both)
    assert len({t.sum().item() for t in (base, only_a, only_b, both)}) == 4
    tuned.remove("b")
    assert torch.equal(logits(model, batch), only_a)
    assert tuned.detach() is model
    assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("name", ["bitfit", "full", "child_tuning_d", "lst", "intrinsic_said", "prefix_tuning"])
def test_two_tunings_that_want_the_same_thing_take_turns(name: str) -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    base = logits(model, batch)
    chosen = small(name) if name == "full" else make(name)
    tuned = attach(model, chosen, name="a", train_head=False)
    prepared(tuned, batch)
    model.eval()
    shake(tuned)
    of_a = logits(model, batch)
    tuned.add(chosen, name="b", seed=1, train_head=False)
    prepared(tuned, batch)
    model.eval()
    assert facts(tuned)["a"] == (False, True) and facts(tuned)["b"] == (True, True)
    if chosen.starts_at_base:
        assert torch.allclose(logits(model, batch), base, atol=1e-6), "the new tuning starts from the base"
    shake(tuned, 0.1)
    of_b = logits(model, batch)
    assert not torch.allclose(of_a, of_b)
    for _ in range(2):
        tuned.activate("a")
        assert torch.equal(logits(model, batch), of_a)
        tuned.activate("b")
        assert torch.equal(logits(model, batch), of_b)
    with pytest.raises(CompositionError, match=r"a and b both want .*; one can act at a time"):
        tuned.activate("a", "b")
    assert facts(tuned) == {"a": (False, True), "b": (True, True)}, "a refused change changed something"
    tuned.remove("a")
    assert torch.equal(logits(model, batch), of_b), "removing a sleeper woke or changed the other"
    assert all(p.requires_grad for p in tuned.trained("b").values())
    tuned.remove("b")
    assert torch.equal(logits(model, batch), base)


def test_the_one_that_acts_is_removed_and_the_sleeper_keeps_its_values() -> None:
    tuned, model, batch = two("bitfit", "bitfit")
    shake(tuned)
    of_b = logits(model, batch)
    tuned.activate("a")
    shake(tuned, 0.1)
    tuned.remove("a")
    tuned.activate("b")
    assert torch.equal(logits(model, batch), of_b)


def test_a_sleeping_tuning_is_not_trained_by_what_trains_its_tensors() -> None:
    tuned, model, batch = two("bitfit", "bitfit")
    assert all(n.startswith("b:") for n in tuned.trained()), "the sleeper's tensors are the other's now"
    asleep = {
        k: u.inactive_value.clone() for k, u in tuned.tuning("a").unfrozen.items() if u.inactive_value is not None
    }
    assert asleep
    Trainer(tuned, model, batch, total=3).run()
    held = tuned.tuning("a").unfrozen
    assert all(torch.equal(value, held[k].inactive_value) for k, value in asleep.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("first", list(KINDS))
@pytest.mark.parametrize("second", ["lora", "bitfit"])
def test_loading_a_second_tuning_leaves_the_first_as_it_was(first: str, second: str, tmp_path: Any) -> None:
    if first == "lst":
        return  # nothing stands beside it; see the rules of composition
    donor = tiny("bert", "classification")
    made = attach(donor, make(second), seed=5, train_head=False)
    shake(made)
    made.save(tmp_path / "second")
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = prepared(attach(model, make(first), name="a", train_head=False), batch)
    shake(tuned)
    model.train()
    needs = {n: p.requires_grad for n, p in model.named_parameters() if n.startswith("luthier.a.")}
    before, trained = values(tuned, "a"), set(tuned.trained())
    beside = make(first).conflicts(make(second)) is None and make(second).conflicts(make(first)) is None
    if not beside and first != second:
        with pytest.raises(CompositionError):
            load(model, tmp_path / "second", name="b")
        assert list(tuned.tunings) == ["a"] and tuned.tuning("a").active and set(tuned.trained()) == trained
        return
    again = load(model, tmp_path / "second", name="b")
    assert again is tuned and not model.training
    assert tuned.tuning("a").trainable and not tuned.tuning("b").trainable
    assert {n: p.requires_grad for n, p in model.named_parameters() if n.startswith("luthier.a.")} == needs
    assert not [n for n, p in model.named_parameters() if n.startswith("luthier.b.") and p.requires_grad]
    tuned.activate("a")
    after = values(tuned, "a")
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert {n.split(":")[-1] for n in tuned.trained()} == trained
    assert all(p.requires_grad for p in tuned.trained().values())


def test_what_a_method_holds_still_stays_still_through_every_switch() -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, make("lora"), name="a", train_head=False)
    module = tuned.modules()["attn.q@0"]
    module.a.requires_grad_(False)
    tuned.tuning("a").fixed.add("attn.q@0.a")
    tuned.add(make("ia3"), name="b", train_head=False)
    tuned.train_only("b")
    tuned.train_only("a", "b")
    assert not module.a.requires_grad and module.b.requires_grad
    assert not any("attn.q@0.a" in n for n in tuned.trained())


def test_a_failed_addition_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = attach(model, make("bitfit"), name="a")
    shake(tuned)
    mine, keys = logits(model, batch), list(model.state_dict())

    def fall(self: Any, *args: Any) -> None:
        raise RuntimeError("stopped half-way")

    monkeypatch.setattr("luthier.methods.partial.bitfit.BitFit.n_params", fall)
    calls = {"n": 0}
    real = Installer.install

    def sometimes(*args: Any) -> None:
        calls["n"] += 1
        if calls["n"] == 4:
            raise RuntimeError("stopped half-way")
        real(*args)

    monkeypatch.setattr(Installer, "install", sometimes)
    with pytest.raises(RuntimeError, match="half-way"):
        attach(model, make("bitfit"), name="b")
    assert list(tuned.tunings) == ["a"] and tuned.tuning("a").active
    assert torch.equal(logits(model, batch), mine) and list(model.state_dict()) == keys
    fresh = tiny("bert", "classification")
    before = list(fresh.state_dict())
    calls["n"] = 0
    with pytest.raises(RuntimeError, match="half-way"):
        attach(fresh, make("bitfit"))
    assert list(fresh.state_dict()) == before and Tuned.of(fresh) is None
    assert all(p.requires_grad for p in fresh.parameters()) and "save_pretrained" not in fresh.__dict__


def test_names_are_checked_and_near_ones_offered() -> None:
    tuned, model, _ = two("lora", "ia3")
    for bad in ("a", "", "x.y", "x/y", "x:y", "x|y"):
        with pytest.raises(ConfigError, match="tuning name"):
            tuned.add(make("lora"), name=bad)
    with pytest.raises(UnknownName, match="No tuning is called 'c'"):
        tuned.activate("c")
    with pytest.raises(UnknownName, match="2 tunings; name one of a, b"):
        tuned.tuning()
    assert Tuned.of(model) is tuned


def test_folded_tunings_are_unfolded_before_anything_changes() -> None:
    tuned, model, batch = two("lora", "ia3")
    shake(tuned)
    apart, base = logits(model, batch), logits(tiny("bert", "classification"), batch)
    tuned.merging.fold()
    for change in (lambda: tuned.activate("a"), lambda: tuned.remove("a"), lambda: tuned.add(make("lora"), name="c")):
        with pytest.raises(ConfigError, match=r"Call tuned.merging.unfold\(\) first"):
            change()
    with tuned.base_only():
        assert torch.equal(logits(model, batch), base)
    torch.testing.assert_close(logits(model, batch), apart, atol=1e-5, rtol=1e-5)
    tuned.merging.unfold()
    assert torch.equal(logits(model, batch), apart)


def test_the_whole_model_may_be_cast_while_it_is_tuned() -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = prepared(attach(model, make("child_tuning_d"), name="a", train_head=False), batch)
    tuned.add(make("lora"), name="b", train_head=False)
    shake(tuned)
    model.eval()
    expected = logits(model, batch)
    model.double()
    assert logits(model, batch).dtype == torch.float64
    torch.testing.assert_close(logits(model, batch).float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_what_lies_beside_the_model_moves_with_it() -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = prepared(attach(model, make("child_tuning_d"), name="a", train_head=False), batch)
    shake(tuned)
    model.eval()
    expected = logits(model, batch)
    model.cuda()
    batch = {k: v.cuda() for k, v in batch.items()}
    torch.testing.assert_close(logits(model, batch).cpu(), expected, atol=1e-3, rtol=1e-3)
    for unfrozen in tuned.tuning("a").unfrozen.values():
        assert unfrozen.original.is_cuda and (unfrozen.mask is None or unfrozen.mask.is_cuda)
    Trainer(tuned, model, batch, total=2).run()
    with tuned.base_only():
        assert not torch.allclose(logits(model, batch).cpu(), expected)


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_given_back_is_kept_in_half_the_bytes_where_that_loses_nothing(exact: bool) -> None:
    model = tiny("bert", "classification")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float() + (0.0 if exact else 1e-4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = attach(model, "full", seed=0)
    found = {u.name: u for u in tuned.tuning().unfrozen.values()}
    word = found["bert.embeddings.word_embeddings.weight"]
    assert word.kept.dtype == (torch.bfloat16 if exact else torch.float32)
    assert all(torch.equal(u.original, before[u.name]) for u in found.values() if u.name in before)
    with torch.no_grad():
        for u in found.values():
            u.parameter.add_(1.0)
    with tuned.base_only():
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    word.mask = torch.zeros_like(word.parameter, dtype=torch.bool)
    assert word.kept.dtype == torch.float32  # read in every step from now on
    tuned.state.constrain()
    assert torch.equal(word.parameter.detach(), word.original)
    assert all(torch.equal(p, before[n]) for n, p in tuned.detach().named_parameters())


def test_what_learns_is_what_acts_and_trains_and_a_head_is_counted_where_it_is_asked_for() -> None:
    tuned = attach(tiny("bert", "classification"), "lora", name="one", rank=2)
    one = tuned.n_trained()
    head = sum(u.parameter.numel() for u in tuned.tuning("one").unfrozen.values())
    assert head and tuned.n_trained(head=True) == one + head
    tuned.add("lora", name="two", train_head=False)
    two = sum(p.numel() for p in tuned.trained("two").values())
    tuned.activate("one", "two")
    assert {n.partition(":")[0] for n in tuned.trained()} == {"one", "two"}
    tuned.train_only("two")  # one acts and does not learn
    assert {n.partition(":")[0] for n in tuned.trained()} == {"two"}
    assert tuned.n_trained(head=True) == tuned.n_trained() == two
    tuned.activate("one")  # two would learn and does not act
    assert not tuned.trained()
    assert tuned.n_trained(head=True) == 0


def test_the_seed_of_what_is_drawn_is_the_one_that_was_given() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        tuned = attach(tiny("bert"), "lora", seed=seed, train_head=False)
        return {n: p.detach() for n, p in tuned.trained().items() if p.any()}

    first, other, again = start(0), start(5), start(5)
    assert first.keys() == other.keys() and len(first) > 1
    assert all(torch.equal(other[n], again[n]) and not torch.equal(other[n], first[n]) for n in first)
    added = attach(tiny("bert"), "lora", name="before", train_head=False)
    added.add("lora", name="after", seed=5, train_head=False)
    drawn = added.trained("after")
    assert all(torch.equal(drawn[n], other[n]) for n in other)


def test_the_status_counts_places_and_numbers_of_what_is_attached_and_what_is_unfrozen() -> None:
    tuned = attach(tiny("bert", "classification"), "lora", name="one", rank=2)
    tuned.add("bitfit", name="two", train_head=False)
    for row, name in zip(tuned.status(), ("one", "two"), strict=True):
        held = tuned.trained(name)
        assert row["tuning"] == name and row["numbers"] == sum(p.numel() for p in held.values())
    places = [row["places"] for row in tuned.status()]
    head = sum(n.startswith("head/") for n in tuned.trained("one"))
    assert places == [6 + head, len(tuned.trained("two"))] and head == 2  # queries and values of three blocks


def test_a_place_knows_from_then_on_that_another_tuning_trains_its_weight() -> None:
    tuned = attach(tiny("bert"), "dora", name="a", train_head=False)
    moving = [p.base.moves for s in tuned.edited.sockets() for p in s.plugs]
    assert moving and not any(moving)
    tuned.add("bitfit", name="b", train_head=False)
    assert not any(p.base.moves for s in tuned.edited.sockets() for p in s.plugs if p.tuning == "a")
    tuned.activate()
    tuned.add("full", name="c", train_head=False)
    assert all(p.base.moves for s in tuned.edited.sockets() for p in s.plugs if p.tuning == "a")


def test_what_holds_the_tunings_is_a_module_that_casts_and_moves_as_any_other() -> None:
    holder = attach(tiny("bert"), "lora").model.luthier
    assert holder.double() is holder and all(p.dtype == torch.float64 for p in holder.parameters())
