"""Every row of a batch with its own tuning gives what that tuning gives alone; what cannot is refused before work."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cells import shake
from tiny import inputs, tiny
from torch import Tensor

from luthier import kernels
from luthier.core import CompositionError, ConfigError, UnknownName
from luthier.surgery import Tuned, attach, method

OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
SITES = ("attn.q", "attn.v", "ffn.up", "ffn.down")


def some(arch: str, methods: Sequence[tuple[str, dict[str, Any]]], task: str = "", head: bool = False) -> Tuned:
    """A tiny model in float64 with tunings a, b, c, ..., every trained number moved off its start."""
    tuned: Tuned | None = None
    for i, (words, settings) in enumerate(methods):
        chosen = method(words, settings)
        if tuned is None:
            tuned = attach(tiny(arch, task), chosen, name="a", train_head=head)
        else:
            tuned.add(chosen, name="abcdef"[i], seed=i, train_head=head)
        tuned.activate("abcdef"[i])
        shake(tuned)
    assert tuned is not None
    tuned.model.double().eval()
    return tuned


def batch_of(tuned: Tuned, n: int, **more: Any) -> dict[str, Tensor]:
    made = inputs(tuned.model, batch=n, **more)
    return {k: v for k, v in made.items() if k != "labels" or tuned.model.config.is_encoder_decoder}


def alone(tuned: Tuned, names: Sequence[str | None], batch: dict[str, Tensor]) -> Tensor:
    """What each row's own tuning gives for the whole batch, row by row."""
    rows = []
    for i, name in enumerate(names):
        tuned.activate(*([] if name is None else [name]))
        with torch.no_grad():
            rows.append(tuned.model(**batch).logits[i])
    return torch.stack(rows)


def off(tuned: Tuned, names: Sequence[str | None]) -> float:
    batch = batch_of(tuned, len(names))
    expected = alone(tuned, names, batch)
    assert len({r.sum().item() for r in expected}) == len(names)
    with tuned.rows(names):
        return float((tuned.model(**batch).logits - expected).abs().max())


LORAS = [
    ("lora", {"rank": 3, "sites": SITES}),
    ("lora", {"rank": 5, "alpha": 7.0, "sites": SITES}),
    ("lora", {"rank": 2, "sites": ("attn.q",)}),
]


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama", "opt", "t5", "bart", "vit", "modernbert", "gpt-neox"])
def test_each_row_gets_its_own_lora_whatever_the_ranks(arch: str) -> None:
    task = "classification" if arch in ("bert", "vit", "modernbert") else ""
    tuned = some(arch, LORAS, task)
    for names in (["a", "b", None, "c"], ["c", "a", "a", "b", None], ["b", None]):
        assert off(tuned, names) < 1e-10
    with kernels.plain():
        assert off(tuned, ["a", "b", None, "c"]) < 1e-10


@pytest.mark.parametrize(
    "methods",
    [
        [("dora", {"rank": 3}), ("dora", {"rank": 2})],
        [("ia3", {}), ("ia3", {})],
        [("adalora", {}), ("adalora", {})],
        [("lora", {"rank": 3}), ("dora", {"rank": 2})],
        [("lora", {"rank": 3}), ("ia3", {})],
        [("lora+ia3", {"rank": 3}), ("lora", {"rank": 2})],
        [("parallel_adapter", {"width": 6}), ("lora", {"rank": 2})],
    ],
)
@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_other_attachments_and_mixtures_of_them_too(methods: list[tuple[str, dict[str, Any]]], arch: str) -> None:
    tuned = some(arch, methods, "classification" if arch == "bert" else "")
    assert off(tuned, ["a", "b", None, "b"]) < 1e-10


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("bert", "float64"),
        ("roberta", "float64"),
        ("modernbert", "float64"),  # a norm is part of its head
        ("bert", "bfloat16"),
    ],
)
def test_each_row_gets_the_head_that_its_tuning_trained(arch: str, dtype: str) -> None:
    model = tiny(arch, "classification").to(getattr(torch, dtype))
    tuned = attach(model, method("lora", {"rank": 3}), name="a")
    shake(tuned)
    tuned.add(method("ia3"), name="b", seed=1)
    shake(tuned, 0.2)
    if dtype == "float64":
        model.double()
    model.eval()
    names = ["b", None, "a", "a"]
    batch = batch_of(tuned, 4)
    expected = alone(tuned, names, batch)
    with tuned.rows(names):
        found = tuned.model(**batch).logits
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) < (1e-10 if dtype == "float64" else 2e-2)
    tuned.activate("b")
    with tuned.rows(["a"] * 4):
        assert torch.allclose(tuned.model(**batch).logits[2:], expected[2:], atol=2e-2)
    with torch.no_grad():
        assert torch.allclose(tuned.model(**batch).logits[0], expected[0], atol=2e-2), "b acts again"


def test_rows_in_bf16_are_those_of_each_tuning_alone_to_rounding() -> None:
    tuned = some("llama", LORAS)
    exact = batch_of(tuned, 4)
    names = ["a", "b", None, "c"]
    expected = alone(tuned, names, exact)
    tuned.model.bfloat16()
    with tuned.rows(names):
        found = tuned.model(**exact).logits
    base = alone(tuned, [None] * 4, exact).double()
    moved = (expected - base)[[0, 1, 3]].norm()
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected)[[0, 1, 3]].norm() < 0.3 * moved, "further off than rounding explains"


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_generating_gives_each_row_the_words_of_its_tuning(arch: str) -> None:
    tuned = some(arch, LORAS[:2])
    names = ["b", None, "a"]
    batch = batch_of(tuned, 3, side="left")
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for more in ({}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = []
        each = more.get("num_return_sequences", 1)
        for i, name in enumerate(names):
            tuned.activate(*([] if name is None else [name]))
            expected.append(tuned.model.generate(**given, **OPTIONS, **more)[i * each : (i + 1) * each])
        with tuned.rows(names):
            assert torch.equal(tuned.model.generate(**given, **OPTIONS, **more), torch.cat(expected))


def test_a_block_that_serves_changes_names_cheaply_and_follows_activate() -> None:
    tuned = some("bert", LORAS, "classification")
    batch = batch_of(tuned, 4)
    orders: list[list[str | None]] = [["a", "b", None, "c"], ["b", "b", "a", None], [None] * 4, ["c"] * 4]
    expected = [alone(tuned, names, batch) for names in orders]
    tuned.activate("a", "b")
    with torch.no_grad():
        both = tuned.model(**batch).logits
    with tuned.serving():
        for names, wanted in zip(orders, expected, strict=True):
            with tuned.rows(names):
                assert torch.allclose(tuned.model(**batch).logits, wanted, atol=1e-10)
            assert torch.allclose(tuned.model(**batch).logits, both, atol=1e-10)
        tuned.activate("c")
        assert torch.allclose(tuned.model(**batch).logits, expected[3], atol=1e-10)
    assert torch.is_grad_enabled() and all(s.route is None for s in tuned.edited.sockets())
    assert torch.allclose(tuned.model(**batch).logits, expected[3], atol=1e-10)


def test_numbers_are_read_anew_by_every_block() -> None:
    tuned = some("bert", LORAS[:2], "classification")
    batch = batch_of(tuned, 2)
    for scale in (0.0, 0.3):
        tuned.activate("b")
        shake(tuned, scale)
        expected = alone(tuned, ["a", "b"], batch)
        with tuned.rows(["a", "b"]):
            assert torch.allclose(tuned.model(**batch).logits, expected, atol=1e-10)
        tuned.activate("b")
        with tuned.serving():
            assert torch.allclose(tuned.model(**batch).logits[1], expected[1], atol=1e-10)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("prompt_tuning", "puts vectors before the text"),
        ("prefix_tuning", "puts keys before those of the text"),
        ("bitfit", "changes tensors of the model itself"),
        ("intrinsic_said", "computes tensors of the model anew"),
        ("lst", "adds a network beside the whole model"),
    ],
)
def test_methods_that_act_on_all_rows_are_refused_beside_others_and_served_alone(name: str, why: str) -> None:
    from kinds import make

    model = tiny("bert", "classification")
    tuned = attach(model, make(name), name="b", train_head=False)
    tuned.activate()
    tuned.add(make("lora"), name="a", train_head=False)
    tuned.activate("b")
    model.eval()
    shake(tuned)
    batch = batch_of(tuned, 3)
    expected = alone(tuned, ["b"] * 3, batch)
    base = alone(tuned, [None] * 3, batch)
    tuned.activate("b")
    said = rf"'b' is {name}, which {why}.*tuned.activate\('b'\)"
    with pytest.raises(CompositionError, match=said), tuned.rows(["a", "b", None]):
        raise AssertionError("not refused")
    with tuned.rows(["b"] * 3):
        assert torch.allclose(tuned.model(**batch).logits, expected, atol=1e-6)
    with tuned.rows(["a", None, None]):
        assert torch.allclose(tuned.model(**batch).logits[1:], base[1:], atol=1e-5), "b was heard in a row of the base"
    with torch.no_grad():
        assert torch.allclose(tuned.model(**batch).logits, expected, atol=1e-6), "b acts again"


def test_what_cannot_be_is_refused_before_any_work() -> None:
    tuned = some("gpt2", LORAS[:2])
    batch = batch_of(tuned, 3)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with pytest.raises(UnknownName, match="No tuning is called 'bb'"), tuned.rows(["a", "bb"]):
        raise AssertionError("not refused")
    for wrong in ([], "ab"):
        with pytest.raises(ConfigError, match="give a list that names one tuning"), tuned.rows(wrong):
            raise AssertionError("not refused")
    for n in (2, 6):
        with tuned.rows(["a", "b", None][:n] * max(1, n // 3)):
            with pytest.raises(ConfigError, match=f"{n} tunings are named, and the batch has 3 rows"):
                tuned.model(**given)
            with pytest.raises(ConfigError, match=f"{n} tunings are named, and the batch has 3 rows"):
                tuned.model.generate(**given, **OPTIONS)
    with tuned.rows(["a"]), pytest.raises(ConfigError, match="1 tunings are named, and the batch has 3 rows"):
        tuned.model.generate(**given, **OPTIONS)
    with tuned.rows(["a", "b", "a"]):
        with pytest.raises(ConfigError, match="already inside"), tuned.rows(["a"]):
            raise AssertionError("not refused")
        with pytest.raises(ConfigError, match="Leave the block"):
            tuned.activate("a")
        with pytest.raises(ConfigError, match="Leave the block"):
            tuned.add("lora", name="late")
        with pytest.raises(ConfigError, match="Leave the block"):
            tuned.remove("a")
        with pytest.raises(ConfigError, match="Leave the block"):
            tuned.merging.fold()
        with torch.enable_grad(), pytest.raises(ConfigError, match="give no gradient"):
            tuned.model(**given)
        tuned.model.train()
        with pytest.raises(ConfigError, match="training mode"):
            tuned.model(**given)
    with pytest.raises(ConfigError, match="training mode"), tuned.rows(["a", "b", "a"]):
        raise AssertionError("not refused")
    tuned.model.eval()
    tuned.activate("a")
    tuned.merging.fold()
    with pytest.raises(ConfigError, match=r"Call tuned.merging.unfold\(\) first"), tuned.rows(["a", "b", "a"]):
        raise AssertionError("not refused")


def test_a_layer_that_reads_no_rows_is_named() -> None:
    sites = {"rank": 2, "sites": ("attn.q", "attn.k")}
    tuned = some("deberta-v2", [("lora", sites), ("lora", sites)], "classification")
    with tuned.rows(["a", "b", None]), pytest.raises(CompositionError, match=r"attn\.[qk].*no 3 rows of its own"):
        tuned.model(**batch_of(tuned, 3))
