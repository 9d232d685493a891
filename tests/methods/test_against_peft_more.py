"""Every method whose file says how it stands in peft's files: the same outputs, gradients, merged weights, and back."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny
from torch import nn

from luthier.core import CannotMerge, ConfigError
from luthier.surgery import METHODS, PeftWhole, attach, from_peft, to_peft
from luthier.surgery.peft_files import forms

# peft asks transformers a question by its old name, and says again that projections of VeRA's kind are drawn anew.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save"),
    pytest.mark.filterwarnings("ignore:Specified to not load"),
]

LAYERED = [(name, form) for name, form in forms().values() if not isinstance(form, PeftWhole)]  # test_peft_whole
NAMES = sorted(name for name, _ in LAYERED)
SITES = {"bert": ("attn.q", "ffn.up"), "llama": ("attn.k", "ffn.down")}
# Beside what the file calls tiny: what makes both compute the same, or a second way of the method.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lokr": [{"rank": 2}, {"rank": 1, "both": True, "factor": 8, "alpha": 3.0}],
    "oft": [{"block": 8}, {"block": 4, "terms": 5}],
    "miss": [{"rank": 8}, {"rank": 5}],  # 5 divides no width
    "osf": [{}, {"kept": 20}],
    "road": [{"variant": f"road_{n}"} for n in (1, 2, 4)],
    "waveft": [{}, {"transform": False}],
    "boft": [{"block": 4, "factors": 1}],  # peft without its CUDA code takes one factor
}
CELLS = [(name, i, arch) for name in NAMES for i in range(len(SETTINGS.get(name, [{}]))) for arch in SITES]


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft would compile BOFT's CUDA code, and does without it where it cannot."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def made(name: str, number: int, arch: str) -> tuple[Any, Any]:
    """Our tuning with numbers that are nowhere zero, and peft's model that has read it."""
    cls = METHODS.get(name)
    given = {n: v for n, v in cls.tiny.items() if n != "lr"} | SETTINGS.get(name, [{}])[number]
    model = tiny(arch)
    tuned = attach(model, name, sites=SITES[arch], train_head=False, **given)
    stir(tuned, 0.05)
    return tuned, model.eval()


@pytest.mark.parametrize(("name", "number", "arch"), CELLS)
def test_peft_computes_from_our_file_what_we_do(name: str, number: int, arch: str, tmp_path: Path) -> None:
    tuned, model = made(name, number, arch)
    to_peft(tuned, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        theirs = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "ours"), is_trainable=True).eval()
    batch = inputs(model)
    out, wanted = model(**batch), theirs(**batch)
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tiny(arch), batch), out.logits, atol=1e-4)
    out.loss.backward()
    wanted.loss.backward()
    layers = dict(theirs.base_model.model.named_modules())
    parts = METHODS.get(name).peft.parts
    compared = 0
    for site in tuned.anatomy.sites(*SITES[arch]):
        module = tuned.modules()[site.key]
        for part, short in parts.items():
            mine = getattr(module, short, None)
            # peft's gradient of C3A's input is another function's: test_peft_relatives.
            if isinstance(mine, nn.Parameter) and name != "c3a":
                held, _, behind = part.partition(".")
                other = getattr(layers[site.path], held)["default"]
                other = getattr(other, behind) if behind else other
                torch.testing.assert_close(mine.grad, other.grad.view_as(mine), rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared == (sum(n.count("@") for n in tuned.trained()) if name != "c3a" else 0)
    tuned.merging.fold()
    weights = dict(theirs.merge_and_unload().named_parameters())
    for site in tuned.anatomy.sites(*SITES[arch]):
        ours = tuned.model.get_submodule(site.path).weight
        torch.testing.assert_close(ours, weights[f"{site.path}.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "number", "arch"), [c for c in CELLS if c[2] == "llama"])
def test_what_peft_writes_comes_back_as_the_same_tuning(name: str, number: int, arch: str, tmp_path: Path) -> None:
    tuned, model = made(name, number, arch)
    to_peft(tuned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = tiny(arch)
    back = from_peft(again, tmp_path / "theirs")
    assert back.tuning().method.name == name
    ours, found = tuned.trained(), back.trained()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[n], p) for n, p in ours.items())
    assert torch.equal(logits(again, inputs(again)), logits(model, inputs(model)))


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in LAYERED if form.fixed])
def test_a_setting_that_we_do_not_compute_is_refused(name: str, form: Any, tmp_path: Path) -> None:
    tuned, _ = made(name, 0, "llama")
    to_peft(tuned, tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    facts = json.loads(path.read_text())
    for key in form.fixed:
        path.write_text(json.dumps(facts | {key: "other"}))
        with pytest.raises(ConfigError, match=f"{key} is 'other'"):
            from_peft(tiny("llama"), tmp_path / "out")


def test_layers_stored_the_other_way_round_are_refused_where_peft_has_none(tmp_path: Path) -> None:
    for name, form in LAYERED:
        if not form.transposed:
            given = {n: v for n, v in METHODS.get(name).tiny.items() if n != "lr"}
            with pytest.raises(CannotMerge, match=r"attn.o@0 stores its weight as \(d_in, d_out\)"):
                to_peft(attach(tiny("gpt2", "lm"), name, sites=("attn.o",), **given), tmp_path / name)
