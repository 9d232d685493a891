"""X-LoRA: what peft computes, what its parts are, and a first pass that follows every pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from little import little_spec
from methods.checks import counted, goes_on_from_its_cache_alone, logits, stir
from methods.saved import saved
from tiny import inputs, tiny
from torch.testing import assert_close

from luthier import train as run
from luthier.core import AnatomyError, CompositionError, ConfigError
from luthier.data.tasks import Task
from luthier.forecast.growth import batch_of
from luthier.forecast.work import Counting
from luthier.methods.reparameterised.xlora import Mixed, Shares
from luthier.surgery import attach, load, open_source, to_peft
from luthier.training.objective import Objective
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

LORA = {"rank": 3, "alpha": 6.0}
QUIET = pytest.mark.filterwarnings("ignore")  # peft speaks of keys and of settings


def sources(folder: Path, n: int = 2, arch: str = "llama", **more: Any) -> list[Path]:
    return [saved(folder, seed, "lora", arch, **LORA, **more) for seed in range(n)]


def mixed(places: list[Path], arch: str = "llama", **settings: Any) -> Any:
    tuned = attach(tiny(arch), "xlora", sources=places, **settings)
    stir(tuned)
    return tuned


def one_hot(tuned: Any, which: int) -> None:
    """Shares that are one for one LoRA, whatever is read."""
    last = next(iter(tuned.modules(Shares).values())).layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.full((2,), -200.0).index_fill(0, torch.tensor(which), 200.0))


@QUIET
@pytest.mark.parametrize(
    ("arch", "how"),
    [
        ("llama", {}),
        ("llama", {"layerwise": True, "temperature": 0.5, "strength": 2.0}),
        ("llama", {"softmax": "top", "top": 2, "layerwise": True}),
        ("llama", {"softmax": "none"}),
        ("bert", {"top": 1, "depth": 3, "width": 7}),
        ("bert", {"layerwise": True}),
    ],
)
def test_peft_computes_the_same_of_the_same_numbers(
    arch: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = sources(tmp_path, 3, arch)
    tuned = mixed(places, arch, train_head=False, **how)
    folders = {}
    for i, place in enumerate(places):
        to_peft(bare(place, arch), tmp_path / f"peft-{i}")
        folders[str(i)] = str(tmp_path / f"peft-{i}")
    base = untouched(arch)
    softmax = how.get("softmax", "all")
    config = peft.XLoraConfig(
        hidden_size=48, adapters=folders, task_type="CAUSAL_LM" if arch == "llama" else "SEQ_CLS",
        enable_softmax=softmax == "all", enable_softmax_topk=softmax == "top", top_k_lora=how.get("top"),
        softmax_temperature=how.get("temperature", 1.0), layerwise_scalings=how.get("layerwise", False),
        xlora_depth=how.get("depth", 1), xlora_size=how.get("width", 2048),
        global_scaling_weight=how.get("strength", 1.0),
    )  # fmt: skip
    if arch == "bert":  # peft names LoRAs as in a model that has a `model` inside, and a BERT has none
        with pytest.raises(ValueError, match="unexpected keys"):
            peft.get_peft_model(untouched(arch), config)
        monkeypatch.setattr("peft.utils.save_and_load.load_peft_weights", lambda *args, **more: {})
    theirs = peft.get_peft_model(base, config).eval()
    copied(theirs, tuned)
    classifier = theirs.base_model.internal_xlora_classifier
    classifier.load_state_dict(next(iter(tuned.modules(Shares).values())).state_dict())
    batch = inputs(base)
    wanted = logits(tuned.model, batch)
    with torch.no_grad():
        found = theirs(**batch).logits
    assert not torch.allclose(logits(tiny(arch), batch), wanted, atol=1e-2)
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def untouched(arch: str) -> Any:
    """A model that keeps no cache: peft wants it so."""
    model = tiny(arch)
    model.config.use_cache = False
    return model


def bare(place: Path, arch: str) -> Any:
    """A saved LoRA without its head: peft finds no place for one there."""
    tuned, held = attach(tiny(arch), "lora", train_head=False, **LORA), open_source(place)
    with torch.no_grad():
        for key, module in tuned.modules().items():
            module.a.copy_(held.part(key)["a"])
            module.b.copy_(held.part(key)["b"])
    return tuned


def copied(theirs: Any, tuned: Any) -> None:
    """Our LoRAs' numbers in the places of peft's."""
    paths = {site.key: site.path for site in tuned.anatomy.all_sites}
    with torch.no_grad():
        for key, module in tuned.modules(Mixed).items():
            layer = theirs.base_model.lora_model.model.get_submodule(paths[key])
            for i in range(len(module.a)):
                layer.lora_A[str(i)].weight.copy_(module.a[i])
                layer.lora_B[str(i)].weight.copy_(module.b[i])


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_with_all_of_the_share_for_one_lora_it_is_that_lora(arch: str, tmp_path: Path) -> None:
    places = sources(tmp_path, 2, arch)
    tuned = attach(tiny(arch), "xlora", sources=places, train_head=False)
    for which in (0, 1):
        one_hot(tuned, which)
        one = tiny(arch)
        load(one, places[which])
        if arch == "bert":
            one.classifier.load_state_dict(tuned.model.classifier.state_dict())
        assert_close(logits(tuned.model), logits(one), rtol=1e-5, atol=1e-5)


def test_shares_are_those_of_the_base_alone_and_no_gradient_enters_the_first_pass(tmp_path: Path) -> None:
    tuned = mixed(sources(tmp_path))
    batch, base = inputs(tuned.model), tiny("llama").eval()
    seen: list[Any] = []
    shares = next(iter(tuned.modules(Shares).values()))
    shares.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tuned.model(**batch).loss.backward()
    with torch.no_grad():
        assert torch.equal(seen[0], base.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0])
    assert len(seen) == 1 and not seen[0].requires_grad
    assert all(p.grad is not None and p.grad.any() for p in shares.parameters())


def test_sources_are_copied_and_stay_unless_they_train_on(tmp_path: Path) -> None:
    places = sources(tmp_path)
    held = [open_source(place) for place in places]
    for train in (False, True):
        tuned = attach(tiny("llama"), "xlora", sources=places, train=train)
        assert tuned.tuning().method.loras == 2 and tuned.tuning().method.alpha == 6.0
        for key, module in tuned.modules(Mixed).items():
            for i, source in enumerate(held):
                assert torch.equal(module.a[i], source.part(key)["a"]) and torch.equal(
                    module.b[i], source.part(key)["b"]
                )
            assert module.a.requires_grad is train
        assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    tuned.save(tmp_path / "mixed")
    again = tiny("llama")
    load(again, tmp_path / "mixed")
    assert torch.equal(logits(again), logits(tuned.model))


def test_counts_of_bert_base() -> None:
    assert counted("xlora", loras=4, rank=8) == 768 * 4 + 4
    assert counted("xlora", loras=4, rank=8, layerwise=True) == (768 + 1) * 4 * 24
    assert counted("xlora", loras=4, rank=8, depth=2, width=16) == (768 + 1) * 16 + 17 * 4
    assert counted("xlora", loras=4, rank=8, train=True) == 768 * 4 + 4 + 4 * 294_912


@pytest.mark.parametrize("lazy", [True, False])
def test_a_conversation_goes_on_from_its_cache_and_another_s_cache_is_refused(lazy: bool, tmp_path: Path) -> None:
    tuned = mixed(sources(tmp_path))
    tuned.model.eval()
    goes_on_from_its_cache_alone(tuned, lazy=lazy)


def test_both_passes_are_counted_as_work(tmp_path: Path) -> None:
    work = {}
    for words in ("lora", "xlora"):
        more = {"sources": sources(tmp_path, 2, "bert")} if words == "xlora" else {}
        tuned = attach(tiny("bert"), words, **more)
        task = Task(name="classification", labels=tuple("abcde"))
        with Counting() as found, torch.no_grad():
            Objective(tuned, task)(batch_of(4, 20, task, tuned.model.config))
        work[words] = found.work.products
    assert 1.8 < work["xlora"] / work["lora"] < 2.6


def test_what_it_cannot_do_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    places = sources(tmp_path)
    with pytest.raises(ConfigError, match="no LoRAs to mix"):
        attach(tiny("llama"), "xlora")
    with pytest.raises(ConfigError, match="at least 2"):
        attach(tiny("llama"), "xlora", sources=places[:1])
    with pytest.raises(ConfigError, match=r"xlora\.top: 3 of 2"):
        attach(tiny("llama"), "xlora", sources=places, top=3)
    with pytest.raises(ConfigError, match="Set top"):
        attach(tiny("llama"), "xlora", sources=places, softmax="top")
    with pytest.raises(ConfigError, match="3, and 2 sources are given"):
        attach(tiny("llama"), "xlora", sources=places, loras=3)
    with pytest.raises(ConfigError, match="must be alike"):
        attach(tiny("llama"), "xlora", sources=[*places, saved(tmp_path / "o", 7, "lora", "llama", rank=2, alpha=6.0)])
    with pytest.raises(ConfigError, match="with a start of its own"):
        attach(tiny("llama"), "xlora", sources=[*places, saved(tmp_path / "p", 8, "pissa", "llama", rank=3)])
    with pytest.raises(CompositionError, match="puts vectors before it"):
        attach(tiny("llama"), "xlora+prompt_tuning", sources=places)
    with pytest.raises(AnatomyError, match="reads one text"):
        attach(tiny("t5"), "xlora", loras=2, rank=3)
    tuned = mixed(places)
    tuned.add("lora", name="other")
    tuned.model.eval()
    with pytest.raises(CompositionError, match="runs the whole batch twice"), tuned.rows(["default", "other"]):
        pass


def test_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    for seed in (1, 2):
        run(little_spec(tmp_path, "lora", seed=seed, out=str(tmp_path / f"lora-{seed}")))
    places = [str(tmp_path / f"lora-{seed}") for seed in (1, 2)]
    spec = little_spec(tmp_path, "xlora", sources=places, settings={"depth": 2, "width": 8}, steps=4)
    run(replace(spec, out=str(tmp_path / "whole")))
    run(replace(spec, out=str(tmp_path / "stopped")), stop_at=2)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")
