"""A saved tuning: bound to its base, refused when damaged, and bit-equal in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import shake
from kinds import KINDS, logits, make, prepared
from tiny import inputs, tiny
from unusual import llama

from luthier.core import IntegrityError, LuthierError, UnknownName, WrongBase
from luthier.surgery import Tuned, attach, load, read_tuning


def saved(folder: Path, name: str = "lora", arch: str = "bert") -> Any:
    model = tiny(arch, "classification")
    batch = inputs(model)
    tuned = prepared(attach(model, make(name)), batch)
    model.eval()
    shake(tuned)
    tuned.save(folder)
    return logits(model, batch), batch


def untouched(model: Any) -> bool:
    fresh = tiny("bert", "classification")
    return (
        Tuned.of(model) is None
        and list(model.state_dict()) == list(fresh.state_dict())
        and all(p.requires_grad for p in model.parameters())
        and "generate" not in model.__dict__
        and model.config._attn_implementation == fresh.config._attn_implementation
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    )


FRESH = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from kinds import logits
from tiny import inputs, tiny
from luthier.surgery import load
for folder in {folders!r}:
    model = tiny("bert", "classification")
    load(model, folder)
    print(logits(model, inputs(model)).double().flatten().tolist())
"""


@pytest.mark.fault("F64", "our own format")
def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    names, threads = ["lora", "prefix_tuning", "bitfit", "lst"], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = {name: saved(tmp_path / name, name)[0] for name in names}
    finally:
        torch.set_num_threads(threads)
    here = Path(__file__).parent.parent
    paths = [str(here), str(here / "contracts")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH.format(paths=paths, folders=[str(tmp_path / n) for n in names])],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines()[-len(names) :], strict=True):
        found = torch.tensor(json.loads(line), dtype=torch.float64)
        assert torch.equal(found, expected[name].double().flatten()), name


@pytest.mark.parametrize("name", list(KINDS))
def test_another_base_is_told_apart_by_its_shape_and_by_its_weights(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "t", name)
    wider = tiny("bert", "classification", hidden_size=56)
    with pytest.raises(WrongBase, match="d 48 here 56"):
        load(wider, tmp_path / "t")
    with pytest.raises(WrongBase, match="layers 3 here 2"):
        load(tiny("bert", "classification", num_hidden_layers=2), tmp_path / "t")
    with pytest.raises(WrongBase, match="model_type 'bert' here 'roberta'"):
        load(tiny("roberta", "classification"), tmp_path / "t")
    other = tiny("bert", "classification", seed=1)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(WrongBase, match="made for bert with weights"):
        load(other, tmp_path / "t")
    assert untouched(other) and all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_the_precision_of_the_base_and_its_head_do_not_change_its_digest(tmp_path: Path) -> None:
    saved(tmp_path / "t")
    low = tiny("bert", "classification").to(torch.bfloat16)
    load(low, tmp_path / "t")
    model = tiny("bert", "classification")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)  # a new head is random, and comes from the tuning
    load(model, tmp_path / "t")


def whole(dtype: torch.dtype, stored_in: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A base whose checkpoint holds `stored_in`, loaded in `dtype`; small numbers and large ones in it."""
    model = tiny("llama", "lm", seed=seed)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] *= 1e-6
    return model.to(stored_in).to(dtype)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tuning_loads_beside_its_base_in_every_precision(
    method: str, made_in: torch.dtype, loaded_in: torch.dtype, tmp_path: Path
) -> None:
    tuned = attach(whole(made_in), method)
    shake(tuned)
    tuned.save(tmp_path / "t")
    other = whole(loaded_in, seed=1)
    with pytest.raises(WrongBase):
        load(other, tmp_path / "t")
    if {made_in, loaded_in} == {torch.float16, torch.bfloat16}:
        # Neither knows what the other rounded away. The message names the way.
        with pytest.raises(WrongBase, match=r"Load it in (b?float16) or float32"):
            load(whole(loaded_in), tmp_path / "t")
        load(whole(torch.float32), tmp_path / "t")
    else:
        load(whole(loaded_in), tmp_path / "t")


def test_a_checkpoint_in_bf16_is_recognised_between_the_two_short_precisions(tmp_path: Path) -> None:
    attach(whole(torch.float16, torch.bfloat16), make("lora")).save(tmp_path / "t")
    load(whole(torch.bfloat16, torch.bfloat16), tmp_path / "t")
    attach(whole(torch.bfloat16, torch.bfloat16), make("lora")).save(tmp_path / "u")
    load(whole(torch.float16, torch.bfloat16), tmp_path / "u")


def test_a_tuning_of_an_older_version_is_recognised_as_before_and_told_the_way_to_float16(tmp_path: Path) -> None:
    attach(whole(torch.float32), make("lora")).save(tmp_path / "t")
    facts = read_tuning(tmp_path / "t")
    del facts["base"]["sha256_fp16"], facts["base"]["loaded_in"]
    (tmp_path / "t" / "tuning.json").write_text(json.dumps(facts))
    for dtype in (torch.float32, torch.bfloat16):
        load(whole(dtype), tmp_path / "t")
    with pytest.raises(WrongBase, match="save it again"):
        load(whole(torch.float16), tmp_path / "t")


def test_the_digest_is_that_of_the_base_while_the_tuning_is_folded(tmp_path: Path) -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = attach(model, make("lora"))
    shake(tuned)
    expected = logits(model, batch)
    tuned.merging.fold()
    tuned.save(tmp_path / "t")
    fresh = tiny("bert", "classification")
    load(fresh, tmp_path / "t")
    assert torch.equal(logits(fresh, batch), expected)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def change(path: Path, **more: Any) -> None:
    facts = json.loads(path.read_text())
    facts.update(more)
    path.write_text(json.dumps(facts))


DAMAGE: dict[str, Any] = {
    "a byte of the weights": lambda d: flip(d / "tuning.safetensors", -3),
    "a byte of the header": lambda d: flip(d / "tuning.safetensors", 20),
    "weights cut short": lambda d: (d / "tuning.safetensors").write_bytes(
        (d / "tuning.safetensors").read_bytes()[:-100]
    ),
    "empty weights": lambda d: (d / "tuning.safetensors").write_bytes(b""),
    "no weights": lambda d: (d / "tuning.safetensors").unlink(),
    "no manifest": lambda d: (d / "MANIFEST.json").unlink(),
    "another manifest": lambda d: (d / "MANIFEST.json").write_text("{}"),
    "facts that are no JSON": lambda d: (d / "tuning.json").write_text("{"),
    "facts that are a list": lambda d: (d / "tuning.json").write_text("[]"),
    "an unknown key": lambda d: change(d / "tuning.json", surprise=1),
    "another format": lambda d: change(d / "tuning.json", format=99),
    "no facts": lambda d: (d / "tuning.json").unlink(),
    "a tensor of another shape": lambda d: change(d / "tuning.json", tensors={"attn.q@0.a": [1, 1]}),
    "base that is no table": lambda d: change(d / "tuning.json", base=3),
    "settings that are no table": lambda d: change(d / "tuning.json", settings=[]),
    "heads that the model lacks": lambda d: change(d / "tuning.json", head=["head/nothing.weight"]),
}


@pytest.mark.parametrize("how", list(DAMAGE))
def test_a_damaged_tuning_is_refused_and_leaves_nothing_behind(how: str, tmp_path: Path) -> None:
    saved(tmp_path / "t")
    DAMAGE[how](tmp_path / "t")
    model = tiny("bert", "classification")
    with pytest.raises(IntegrityError) as caught:
        load(model, tmp_path / "t")
    assert str(tmp_path / "t") in str(caught.value), "the message names no file"
    assert untouched(model)


def test_an_unknown_method_or_setting_of_a_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "t")
    for more in ({"method": "lroa"}, {"settings": {"rnak": 3}}, {"settings": {"rank": "three"}}, {"method": 3}):
        facts = json.loads((tmp_path / "t" / "tuning.json").read_text())
        change(tmp_path / "t" / "tuning.json", **more)
        model = tiny("bert", "classification")
        with pytest.raises(LuthierError) as caught:
            load(model, tmp_path / "t")
        assert str(tmp_path / "t") in str(caught.value)
        assert untouched(model)
        (tmp_path / "t" / "tuning.json").write_text(json.dumps(facts))
    assert read_tuning(tmp_path / "t")["method"] == "lora"


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, make("lora"))
    with torch.no_grad():
        tuned.modules()["attn.q@0"].b.fill_(float("inf"))
    with pytest.raises(IntegrityError, match=r"attn\.q@0\.b is not finite"):
        tuned.save(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_failed_load_beside_another_tuning_leaves_that_one_awake(tmp_path: Path) -> None:
    saved(tmp_path / "t", "bitfit")
    flip(tmp_path / "t" / "tuning.safetensors", -3)
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = attach(model, make("bitfit"), name="mine")
    shake(tuned)
    mine, learns = logits(model, batch), set(tuned.trained())
    with pytest.raises(IntegrityError):
        load(model, tmp_path / "t", name="other")
    assert list(tuned.tunings) == ["mine"] and torch.equal(logits(model, batch), mine)
    assert set(tuned.trained()) == learns and all(p.requires_grad for p in tuned.trained().values())


def test_a_tuning_learns_on_where_asked(tmp_path: Path) -> None:
    expected, batch = saved(tmp_path / "t")
    model = tiny("bert", "classification")
    tuned = load(model, tmp_path / "t", trainable=True)
    assert torch.equal(logits(model, batch), expected) and not model.training
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in tuned.trained().values())
    assert UnknownName.exit_code == 2


def test_a_base_that_is_all_trunk_is_read_once_for_each_type(tmp_path: Path) -> None:
    for tied in (True, False):
        tuned = attach(llama(tie_word_embeddings=tied), "lora")
        tuned.save(tmp_path / str(tied))
        base = read_tuning(tmp_path / str(tied))["base"]
        assert (base["trunk_bf16"] == base["sha256_bf16"]) == tied  # a head of its own is no part of the trunk
        assert len(tuned.edited.digests) == (2 if tied else 3)
