"""`torch.compile` of a tuned model gives what the model gives, for every kind of edit."""

import pytest
import torch
from kinds import KINDS, logits, shaken


# The tracer warns about itself: it instantiates our autograd functions while it traces them, reads through caches,
# breaks its graph where the table of attention is read from its file, and looks at gradients of what is no leaf.
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated.*",
    "ignore:.*lru_cache.*",
    "ignore:.*Dynamo does not know how to trace.*",
    "ignore:.*not a leaf Tensor.*",
)
@pytest.mark.parametrize("name", [n if n == "lora" else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_a_compiled_model_computes_and_learns_the_same(name: str) -> None:
    tuned, model, batch = shaken(name, "bert", "classification")
    expected = logits(model, batch)
    model(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in tuned.trained().items() if p.grad is not None}
    for p in tuned.trained().values():
        p.grad = None
    torch._dynamo.reset()
    # The tracer and the graph of gradients, without a C++ compiler behind them.
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-4)
    compiled(**batch).loss.backward()
    assert {n for n, p in tuned.trained().items() if p.grad is not None} == set(gradients)
    for n, p in tuned.trained().items():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], atol=1e-5, rtol=1e-3)
    # What is switched after compiling is switched in the compiled model too.
    with tuned.base_only():
        base = logits(model, batch)
        torch.testing.assert_close(logits(compiled, batch), base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-5, rtol=1e-4)
