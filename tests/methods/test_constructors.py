"""What `build` refuses, the constructor refuses too; names of other libraries are answered with ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier.core import ConfigError, LuthierError, UnknownName
from luthier.methods.reparameterised.lora import LoRA
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec, RunSpec
from luthier.strategies.pace.llrd import LLRD
from luthier.surgery import METHODS, attach, compose, load

ROWS = DataSpec(source="rows.csv")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RunSpec(model="m", data=ROWS, epochs=-1), ("epochs", "above 0", "-1")),
        (lambda: RunSpec(model="m", data=ROWS, seed="a"), ("seed", "whole number", "'a'")),  # type: ignore[arg-type]
        (lambda: RunSpec(model="m", data=ROWS, precision="int8"), ("precision", "'int8'", "'bf16'")),  # type: ignore[arg-type]
        (lambda: RunSpec(model="m", data="rows.csv"), ("data", "'rows.csv'", "DataSpec(source=")),  # type: ignore[arg-type]
        (lambda: OptimSpec(lr=-1), ("OptimSpec.lr", "above 0", "-1")),
        (lambda: OptimSpec(lr=float("nan")), ("lr", "nan")),
        (lambda: BatchSpec(size=0), ("BatchSpec.size", "at least 1", "0")),
        (lambda: LoRA(rank=0), ("lora.rank", "at least 1", "0")),
        (lambda: LoRA(rank="8"), ("lora.rank", "whole number", "'8'")),  # type: ignore[arg-type]
        (lambda: LoRA(rank=0, alpha=-1.0), ("lora.rank", "lora.alpha")),
        (lambda: LLRD(decay=2.0), ("llrd.decay", "at most 1", "2")),
        (lambda: METHODS["mam"](rank=3), ("mam", "'rank'")),  # type: ignore[call-arg]
        (lambda: BatchSpec(siez=3), ("'siez'", "'size'")),  # type: ignore[call-arg]
        (lambda: RunSpec(model="m"), ("data", "missing")),  # type: ignore[call-arg]
    ],
)
def test_a_constructor_refuses_at_once(make: Any, says: tuple[str, ...]) -> None:
    with pytest.raises((ConfigError, UnknownName)) as refused:
        make()
    assert all(word in str(refused.value) for word in says), refused.value


def test_a_constructor_takes_what_loses_nothing() -> None:
    method = LoRA(rank=np.int64(4), alpha=8, sites="attn.q, ffn")  # type: ignore[arg-type]
    assert method == LoRA(rank=4, alpha=8.0, sites=("attn.q", "ffn"))
    assert type(method.rank) is int and type(method.alpha) is float
    assert RunSpec(model=Path("m"), data=ROWS).model == "m"  # type: ignore[arg-type]
    assert RunSpec.from_plain({"model": "m", "data": {"source": "rows.csv"}}) == RunSpec(model="m", data=ROWS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"r": 4}, "rank=4"),
        ({"lora_alpha": 8}, "alpha=8"),
        ({"lora_dropout": 0.1}, "dropout=0.1"),
        ({"target_modules": ["q_proj", "v_proj"]}, "sites='attn.q,attn.v'"),
    ],
)
def test_names_of_peft_are_answered_with_ours(given: dict[str, Any], says: str) -> None:
    for make in (
        lambda: LoRA(**given),
        lambda: compose.method("lora", given),
        lambda: compose.method("lora+ia3", given),
    ):
        with pytest.raises(UnknownName) as refused:
            make()
        assert says in str(refused.value)


def test_a_place_by_its_name_in_a_model_is_answered_with_ours() -> None:
    from tiny import tiny

    with pytest.raises(LuthierError, match=r"'q_proj'.* Here that is 'attn.q'"):
        attach(tiny("llama", "lm"), "lora", sites=("q_proj",))


@pytest.mark.parametrize("call", [lambda name: attach(name, "lora"), lambda name: load(name, "tuning")])
def test_a_name_where_a_model_is_wanted_says_what_to_pass(call: Any) -> None:
    with pytest.raises(ConfigError, match=r"'sample:minilm-l6'.*from_pretrained\(luthier.samples.model_path"):
        call("sample:minilm-l6")


def test_a_shelf_is_looked_at_as_a_person_would() -> None:
    assert METHODS["lora"] is LoRA
    assert sorted(METHODS) == METHODS.names() and len(METHODS) == len(METHODS.names()) and "lora" in METHODS
    assert "lora" in repr(METHODS) and "additive:" in repr(METHODS)
    assert dir(luthier) == sorted(luthier.__all__)
