"""Files of LyCORIS: read and written with the numbers that its own arithmetic gives."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_spec
from methods.checks import logits, stir
from safetensors.torch import load_file, save_file
from tiny import tiny

from luthier.core import CannotMerge, ConfigError, IntegrityError, ModelError
from luthier.surgery import attach, load
from luthier.surgery.lycoris_files import from_lycoris, read_back, to_lycoris
from luthier.workflow import train
from luthier.workflow.formats import export
from luthier.workflow.lycoris import import_lycoris

Q, UP = "model_layers_{}_self_attn_q_proj", "model_layers_{}_mlp_up_proj"


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 3


def added(updates: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the plain model computes with these added to its weights."""
    model = tiny("llama", "lm")
    with torch.no_grad():
        for name, update in updates.items():
            model.get_parameter(name).add_(update)
    return logits(model)


@pytest.mark.acid("lokr", 2)
def test_a_lokr_of_lycoris_is_read_as_its_kronecker_products_say(tmp_path: Path) -> None:
    held: dict[str, torch.Tensor] = {}
    updates: dict[str, torch.Tensor] = {}
    for layer in range(3):  # (48, 48) as (6, 6) and (8, 8), the larger a product of width 2: alpha / 2
        one, a, b = drawn(6, 6), drawn(8, 2) + layer, drawn(2, 8)
        stem = "lora_te_" + Q.format(layer)
        held |= {
            f"{stem}.lokr_w1": one,
            f"{stem}.lokr_w2_a": a,
            f"{stem}.lokr_w2_b": b,
            f"{stem}.alpha": torch.tensor(3.0),
        }
        updates[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.kron(one, a @ b) * 1.5
    save_file(held, tmp_path / "it.safetensors")
    tuned = from_lycoris(tiny("llama", "lm"), tmp_path / "it.safetensors")
    method: Any = tuned.tuning().method
    assert (method.rank, method.alpha, method.factor, method.sites) == (2, 3.0, 0, ("attn.q",))
    torch.testing.assert_close(logits(tuned.model), added(updates), rtol=1e-5, atol=1e-5)
    assert read_back(tuned, tmp_path / "it.safetensors") < 1e-6


@pytest.mark.acid("lokr", 2)
@pytest.mark.parametrize("settings", [{"rank": 1, "factor": 4, "both": True}, {"rank": 1}, {"rank": 30, "alpha": 12.0}])
def test_a_lokr_goes_out_and_lycoris_rule_gives_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    tuned = attach(tiny("llama", "lm"), "lokr", sites=("attn.q", "ffn.up@1"), train_head=False, **settings)
    stir(tuned)
    path = to_lycoris(tuned, tmp_path / "out")
    held, updates = load_file(path), {}
    for key, name in [(Q.format(i), f"model.layers.{i}.self_attn.q_proj.weight") for i in range(3)] + [
        (UP.format(1), "model.layers.1.mlp.up_proj.weight")
    ]:
        part = {n.rpartition(".")[2]: t for n, t in held.items() if n.startswith(f"lycoris_{key}.")}
        factors = [part[n] if n in part else part[f"{n}_a"] @ part[f"{n}_b"] for n in ("lokr_w1", "lokr_w2")]
        thin = [part[n].shape[1] for n in ("lokr_w1_a", "lokr_w2_a") if n in part]
        updates[name] = torch.kron(*factors) * (float(part["alpha"]) / thin[0] if thin else 1.0)
    assert ("lokr_w1_a" in str(held.keys())) == settings.get("both", False)
    torch.testing.assert_close(logits(tuned.model), added(updates), rtol=1e-5, atol=2e-5)
    again = from_lycoris(tiny("llama", "lm"), path)
    torch.testing.assert_close(logits(again.model), logits(tuned.model), rtol=1e-5, atol=2e-5)


def test_a_loha_goes_out_and_comes_back_as_the_product_of_two_products(tmp_path: Path) -> None:
    tuned = attach(tiny("llama", "lm"), "loha", sites=("attn.q",), rank=3, alpha=4.5, train_head=False)
    stir(tuned)
    path = to_lycoris(tuned, tmp_path / "out")
    held, updates = load_file(path), {}
    for layer in range(3):
        a1, b1, a2, b2 = (held[f"lycoris_{Q.format(layer)}.hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
        updates[f"model.layers.{layer}.self_attn.q_proj.weight"] = (a1 @ b1) * (a2 @ b2) * 1.5
    torch.testing.assert_close(logits(tuned.model), added(updates), rtol=1e-5, atol=2e-5)
    again = from_lycoris(tiny("llama", "lm"), path)
    assert torch.equal(logits(again.model), logits(tuned.model))


def test_a_run_goes_out_and_its_file_comes_in_as_the_same_tuning(tmp_path: Path) -> None:
    run = train(little_spec(tmp_path, "lokr", "llama", settings={"rank": 2}, steps=4))
    written = export(run.path, tmp_path / "out", to="lycoris")
    base = str(tmp_path / "llama")
    found = import_lycoris(tmp_path / "out" / "lycoris.safetensors", tmp_path / "tuning", model=base)
    assert written.path.name == "out" and found.method == "lokr"
    assert "it adds to the weight what the file says" in found.notes[0]
    assert load(tiny("llama", "lm"), tmp_path / "tuning").tuning().method.is_a("lokr")


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    tuned = attach(tiny("llama", "lm"), "lokr", rank=2, train_head=False)
    stir(tuned)
    path = to_lycoris(tuned, tmp_path / "out")
    good = load_file(path)

    def refused(kind: type[Exception], match: str, changed: dict[str, torch.Tensor]) -> None:
        save_file({n: t.contiguous() for n, t in changed.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(kind, match=match):
            from_lycoris(tiny("llama", "lm"), tmp_path / "bad.safetensors")

    stem = "lycoris_" + Q.format(0)
    refused(ConfigError, "dora_scale", good | {f"{stem}.dora_scale": torch.ones(48, 1)})
    refused(ConfigError, "no LoKr", {"model.q.lora_A": torch.ones(2, 2)})
    refused(ModelError, "no layer", {n.replace("layers_0", "layers_7"): t for n, t in good.items()})
    refused(IntegrityError, "lokr_w2", {n: t for n, t in good.items() if n != f"{stem}.lokr_w2_b"})
    refused(IntegrityError, "42 by 48", good | {f"{stem}.lokr_w2_a": torch.ones(7, 2)})
    with pytest.raises(CannotMerge, match="lokr and loha"):
        to_lycoris(attach(tiny("llama", "lm"), "lora"), tmp_path / "lora")
    with pytest.raises(CannotMerge, match="no head"):
        to_lycoris(attach(tiny("bert", "classification"), "lokr", rank=2), tmp_path / "head")
    shutil.rmtree(tmp_path / "out")
