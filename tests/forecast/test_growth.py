"""What a pass keeps is followed from few rows to many, and is what a real step of the whole keeps."""

from typing import Any

import pytest
import torch
from cells import fresh
from tiny_methods import small

from luthier.data.tasks import Task
from luthier.forecast import growth
from luthier.forecast.growth import Growth, batch_of
from luthier.kernels import attention, attention_products
from luthier.methods.unified.adamix import AdaMix
from luthier.runs.spec import OptimSpec
from luthier.surgery import attach
from luthier.training.memory_parts import Parts
from luthier.training.objective import Objective
from luthier.training.optimiser import Descent
from luthier.training.precision import Precision

torch.set_num_threads(1)
TASK = Task(name="classification", labels=("a", "b"))
HALF = Precision("bf16", "as asked")


def parts() -> tuple[Any, Any]:
    """A configuration for rows of up to 512 tokens, and what makes a model of it."""
    model = fresh("bert", "classification")
    model.config.max_position_embeddings = 512
    return model.config, lambda config, dtype: type(model)(config).to(dtype)


def forecast(name: str, rows: int, tokens: int) -> int:
    config, make = parts()
    found = growth(small(name), config, TASK, make, tokens, rows=rows, dtype=torch.bfloat16, precision=HALF)
    return found.at(rows)


def measured(name: str, rows: int, tokens: int) -> int:
    """A real step of the whole model, all its rows."""
    config, make = parts()
    tuned = attach(make(config, torch.bfloat16).eval(), small(name), seed=0)
    tuned.forward.route_attention()
    tuned.fast.accelerate(dropout=False)
    tuned.model.luthier.train(True)
    counted = Parts(tuned, Descent(tuned.trained(), [], OptimSpec(name="sgd", lr=1.0), 1.0), torch.device("cpu"))
    with counted.watching(), HALF.autocast(torch.device("cpu")):
        loss = Objective(tuned, TASK)(batch_of(rows, tokens, TASK, config)).loss
    loss.backward()
    return counted.counted()["activations"]


@pytest.fixture(autouse=True)
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as it is computed on a processor, whichever one runs the tests."""
    monkeypatch.setattr(attention, "way", lambda *a: "products")


@pytest.mark.parametrize(("name", "limit"), [("bitfit", 0), ("bitfit", 3), ("lora", 3), ("bitfit", 6)])
def test_rows_of_512_tokens_keep_what_was_forecast_whether_or_not_attention_computes_again(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    config, _ = parts()
    of_a_row = 2 * int(config.num_attention_heads) * 512 * 512
    monkeypatch.setattr(attention_products, "KEEP_BYTES", limit * of_a_row)
    real = measured(name, 5, 512)
    assert forecast(name, 5, 512) == pytest.approx(real, rel=0.02)
    assert (real > 5 * of_a_row) is (limit > 5), "the limit decides, or this test shows nothing"


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_what_as_many_rows_keep_never_falls_with_their_length(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(attention_products, "KEEP_BYTES", limit)
    found = [forecast("bitfit", 8, tokens) for tokens in (16, 41, 64, 128, 256)]
    assert found == sorted(found) and found[-1] > 10 * found[0]


def test_a_pass_that_is_a_share_keeps_as_the_whole_would() -> None:
    before = attention_products._share
    with attention_products.share_of_a_pass(0.5):
        assert attention_products._share == 0.5
    assert attention_products._share == before == 1.0


def test_the_passes_that_a_method_makes_in_a_step_are_all_counted() -> None:
    config, make = parts()

    def found(gamma: float) -> Growth:
        method = AdaMix(gamma=gamma)
        return growth(method, config, TASK, make, 32, rows=4, dtype=torch.bfloat16, precision=HALF)

    one, two = found(0.0), found(1.0)
    assert 1.9 < two.row_work.products / one.row_work.products < 2.1
    assert two.row > 1.8 * one.row, "both passes are kept until the step goes back"
