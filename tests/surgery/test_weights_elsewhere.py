"""Weights that accelerate keeps elsewhere and brings in for each pass."""

from typing import Any

import pytest
import torch
from unusual import llama, word_ids

from luthier.core import ConfigError
from luthier.surgery import METHODS, Tuned, attach


class _Aligned:
    """As accelerate's AlignDevicesHook: weights are on the meta device between passes."""

    offload = True


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("several", [False, True])
def test_every_method_is_refused_where_the_weights_are_offloaded(name: str, several: bool) -> None:
    model = llama()
    names = list(model.state_dict())
    hook: Any = _Aligned()
    if several:
        hook = type("SequentialHook", (), {"hooks": (object(), hook)})()
    model.model.layers[1].mlp.up_proj._hf_hook = hook
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.up_proj: its weights are not here"):
        attach(model, name)
    assert list(model.state_dict()) == names and Tuned.of(model) is None
    assert all(p.requires_grad for p in model.parameters())


def test_accelerates_own_offloading_is_recognised() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="are not here"):
        attach(model, "full")
    with torch.no_grad():
        assert model(input_ids=word_ids()).logits.isfinite().all()
