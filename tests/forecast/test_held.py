"""What a method holds, counted on the meta device, is what is held when it is attached: byte for byte."""

from typing import Any

import pytest
import torch
from cells import ARCHITECTURES, fresh, task_of
from tiny_methods import small

from luthier.core import LuthierError
from luthier.forecast import Skeleton, held
from luthier.runs.spec import OptimSpec
from luthier.surgery import METHODS, attach, frozen_layers
from luthier.surgery.tuning_files import stored_tensors
from luthier.training.memory_parts import Parts
from luthier.training.optimiser import Optimiser

torch.set_num_threads(1)

# What these store follows from training, or from the places they choose: their own counts are of the paper's numbers.
STORED_OTHERWISE = {
    "adalora", "bipeft", "delta_lora", "increlora", "loraprune", "lt_sft", "pafi", "propetl", "s3delta_m", "saliency",
    "u_mam",
}  # fmt: skip


def bare(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS.ours())
def test_every_part_is_what_the_attached_method_holds(name: str, arch: str) -> None:
    model, method = fresh(arch, task_of(name, arch)), small(name)
    skeleton = Skeleton(bare(model))
    try:
        tuned = attach(model, method, seed=0)
    except LuthierError as error:
        with pytest.raises(type(error)) as refused:
            held(method, skeleton)
        assert str(refused.value) == str(error)
        return
    found = held(method, skeleton)
    counted = Parts(tuned, Optimiser(tuned.trained(), [], OptimSpec(), 1e-3), torch.device("cpu")).counted()
    assert found.weights == counted["weights"]
    assert found.numbers == found.gradients == counted["trained"]
    assert found.moments == counted["optimiser"]
    assert found.trained == method.n_params(skeleton.anatomy)
    if name not in STORED_OTHERWISE and not any(part.looks_at_data for part in method.parts()):
        tuned.finish()
        assert found.stored == sum(t.nbytes for t in stored_tensors(tuned.tuning()).values())


def test_the_counting_leaves_the_model_as_it_was() -> None:
    skeleton = Skeleton(bare(fresh("bert", "classification")))
    before = [(n, p.requires_grad, p.shape) for n, p in skeleton.edited.model.named_parameters()]
    first = held(small("full"), skeleton)
    held(small("lora"), skeleton)
    assert held(small("full"), skeleton) == first
    assert [(n, p.requires_grad, p.shape) for n, p in skeleton.edited.model.named_parameters()] == before


def test_optimisers_and_a_base_stored_in_bf16() -> None:
    model = fresh("llama", "lm")
    whole, halves = (Skeleton(bare(model), halves=h) for h in (False, True))
    full = held(small("full"), whole)
    assert held(small("full"), whole, "sgd").moments == 0
    lomo = held(small("full"), whole, "lomo")
    assert lomo.gradients == max(p.nbytes for p in model.parameters()) and lomo.moments == 0
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tuned = attach(model, small("full"), seed=0)
    counted = Parts(tuned, Optimiser(tuned.trained(), [], OptimSpec(), 1e-3), torch.device("cpu")).counted()
    assert held(small("full"), halves).weights == counted["weights"] < full.weights


@pytest.mark.parametrize("budget", [2**30, 3 * 1024 * 1024 * 2])
@pytest.mark.parametrize("name", ["lora", "ia3", "bitfit", "sequential_adapter", "full", "top_k_layers"])
def test_packed_copies_are_those_that_a_run_makes(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    made: list[int] = []

    def packed(weight: Any) -> Any:  # no processor with fast bf16 products is needed
        made.append(weight.nbytes)
        return object()

    monkeypatch.setattr(frozen_layers, "BUDGET_BYTES", budget)
    monkeypatch.setattr(frozen_layers, "can_pack", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(frozen_layers, "Packed", packed)
    config = BertConfig(
        vocab_size=90, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertForSequenceClassification(config).to(torch.bfloat16)
    skeleton, method = Skeleton(bare(model).to(torch.bfloat16)), small(name)
    attach(model, method, seed=0).fast.accelerate()
    assert held(method, skeleton).packed == sum(made)
    assert (sum(made) > 0) == (name not in ("full", "bitfit"))  # these train the weights, or the biases
    assert held(method, Skeleton(bare(model).float())).packed == 0
