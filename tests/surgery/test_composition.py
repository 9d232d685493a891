"""Methods spelt together: what stands together, in which order, and why the rest is refused."""

from typing import Any

import pytest
import torch
from cells import Trainer, shake
from kinds import logits
from tiny import inputs, tiny
from torch import Tensor

from luthier.core import AnatomyError, CannotMerge, CompositionError, ConfigError, UnknownName
from luthier.surgery import Attachment, Tuned, attach, load, method

SIZES = {
    "lora.rank": 3,
    "dora.rank": 3,
    "prefix_tuning.length": 3,
    "prompt_tuning.length": 3,
    "sequential_adapter.width": 6,
    "mam.length": 3,
    "mam.width": 5,
    "unipelt.length": 3,
    "adalora.rank": 4,
    "adalora.target_rank": 2,
    "parallel_adapter.width": 5,
}


def combined(words: str, arch: str = "bert", **more: Any) -> tuple[Tuned, Any, dict[str, Tensor]]:
    model = tiny(arch, "classification")
    names = words.split("+")
    settings = {k: v for k, v in SIZES.items() if k.split(".")[0] in names} | more
    return attach(model, method(words, settings)), model, inputs(model)


@pytest.mark.parametrize(
    "arch", ["bert", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("llama", "gpt2", "opt", "bart", "t5"))]
)
@pytest.mark.parametrize(
    "words",
    [
        "lora+prefix_tuning",
        "lora+bitfit",
        "lora+prompt_tuning",
        "ia3+lora+sequential_adapter",
        "prompt_tuning+prefix_tuning",
        "dora+bitfit",
        "adalora+ia3",
        "lora+mam",
        "lora+parallel_adapter+bitfit",
        "intrinsic_said+lora",
    ],
)
def test_what_may_stand_together_trains_and_is_stored(words: str, arch: str, tmp_path: Any) -> None:
    more = {"intrinsic_said.dimension": 600} if "intrinsic" in words else {}
    try:
        tuned, model, batch = combined(words, arch, **more)
    except AnatomyError as error:
        assert arch == "t5" and "bias" in str(error), str(error)
        return
    whole = tuned.tuning().method
    assert tuned.n_trained() == whole.n_params(tuned.anatomy)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    # A gradient for every part, through all the others.
    losses = Trainer(tuned, model, batch, total=8).run().losses
    assert losses[-1] < losses[0]
    for part in whole.parts():
        assert any(not torch.equal(p, start[n]) for n, p in tuned.trained().items() if n.startswith(f"{part.name}:")), (
            f"{part.name} did not move"
        )
    assert all(torch.equal(dict(model.named_parameters())[n], t) for n, t in frozen.items())
    tuned.finish()
    model.eval()
    expected = logits(model, batch)
    tuned.save(tmp_path / "t")
    fresh = tiny(arch, "classification")
    load(fresh, tmp_path / "t")
    assert torch.equal(logits(fresh, batch), expected)
    if whole.mergeable:
        torch.testing.assert_close(logits(tuned.merge(), batch), expected, atol=2e-5, rtol=1e-4)
    else:
        stuck = [p.name for p in whole.parts() if not p.mergeable]
        with pytest.raises(CannotMerge, match=", ".join(stuck)):
            tuned.merge()


@pytest.mark.parametrize("words", [("lora", "ia3", "sequential_adapter"), ("prefix_tuning", "prompt_tuning", "lora")])
def test_the_order_of_spelling_changes_nothing(words: tuple[str, ...]) -> None:
    found = []
    for spelt in ("+".join(words), "+".join(reversed(words)), "+".join([words[1], words[0], words[2]])):
        tuned, model, batch = combined(spelt)
        with torch.no_grad():
            for _, parameter in sorted(tuned.trained().items()):
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        found.append((logits(model, batch), sorted(tuned.trained())))
    assert all(names == found[0][1] for _, names in found)
    assert all(torch.equal(result, found[0][0]) for result, _ in found)


class Note(Attachment):
    """Writes down that it was called; adds a number of its own so that order can be seen in the result too."""

    def __init__(self, word: str, calls: list[str], add: float, times: float) -> None:
        super().__init__()
        self.word, self.calls, self.add, self.times = word, calls, add, times

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls.append(self.word)
        return y * self.times + self.add


def test_the_order_at_one_site_is_that_of_the_kinds() -> None:
    from luthier.surgery.base import Base
    from luthier.surgery.socket import ORDER, Plug, Socket

    layer = torch.nn.Linear(4, 6)
    anatomy = attach(tiny("bert", "classification"), method("lora")).anatomy
    site = anatomy.sites("attn.q")[0]
    found = []
    for words in (list(ORDER), list(reversed(ORDER)), ["scale", "sequential", "delta", "parallel"]):
        calls: list[str] = []
        socket = Socket(layer)
        for word in words:
            kind = type(word.title(), (Note,), {"kind": word})
            note = kind(word, calls, float(len(word)), 1.0 + ORDER[word])
            socket.plugs.append(Plug("t", site, note, Base(layer, site)))
        socket.refresh({"t"})
        found.append(socket(torch.ones(2, 4)))
        assert calls == ["delta", "scale", "parallel", "sequential"]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_dora_beside_bitfit_gives_the_bias_the_gradient_of_the_formula() -> None:
    for arch in ("bert", "gpt2"):  # a layer of its own, and a part of a fused one
        tuned, model, batch = combined("dora+bitfit", arch)
        shake(tuned, 0.1)
        model.eval()
        model(**batch).loss.backward()
        name = next(n for n in tuned.anatomy.bias_tensors("attn.v"))
        parameter = tuned.trained()[f"bitfit:model/{name}"]
        assert parameter.grad is not None
        # Against differences of the loss, in double precision.
        model.double()
        _, gradient = parameter, parameter.grad.double()
        at = int(gradient.abs().argmax())
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                values.append(float(model(**batch).loss.detach()))
                parameter.view(-1)[at] -= step
        measured = (values[0] - values[1]) / 2e-4
        assert abs(measured - float(gradient.view(-1)[at])) < 2e-3 * abs(measured), arch


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("full+lora", "already trains every number"),
        ("ia3+full", "already trains every number"),
        ("full+head_only", "already trains every number"),
        ("lst+lora", "no gradient enters the frozen model"),
        ("bitfit+lst", "no gradient enters the frozen model"),
        ("lst+prefix_tuning", "no gradient enters the frozen model"),
        ("lora+dora", "both attach a 'delta' at attn.q"),
        ("adalora+lora", "both attach a 'delta' at attn.q"),
        ("unipelt+lora", "both attach a 'delta' at attn.q"),
        ("mam+prefix_tuning", "both want the keys before those of the text"),
        ("unipelt+prefix_tuning", "both want the keys before those of the text"),
        ("mam+parallel_adapter", "both attach a 'parallel' at ffn_out"),
        ("adamix+propetl", "masks over a mixture of experts"),
        ("sequential_adapter+adamix", "both attach a 'sequential' at ffn_out"),
        ("bitfit+child_tuning_d", "without a mask"),
        ("bitfit+sequential_adapter", "both want the tensor"),
        ("intrinsic_said+bitfit", "both want the tensor"),
        ("diff_pruning+child_tuning_d", "."),
    ],
)
def test_what_may_not_stand_together_says_why_and_touches_nothing(words: str, why: str) -> None:
    model = tiny("bert", "classification")
    before = list(model.state_dict())
    one, other = words.split("+")
    with pytest.raises(CompositionError, match=why) as caught:
        attach(model, words)
    assert one in str(caught.value) and other in str(caught.value), str(caught.value)
    assert list(model.state_dict()) == before and Tuned.of(model) is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("first", "second"), [("full", "lora"), ("lst", "ia3"), ("lora", "full")])
def test_methods_that_cannot_stand_together_may_still_take_turns(first: str, second: str) -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, first, name="a")
    with pytest.raises(CompositionError, match=r"tuned.activate"):
        tuned.add(second, name="b")
    assert list(tuned.tunings) == ["a"]
    tuned.activate()
    tuned.add(second, name="b")
    with pytest.raises(CompositionError):
        tuned.activate("a", "b")
    tuned.activate("a")
    assert [(r["tuning"], r["active"]) for r in tuned.status()] == [("a", True), ("b", False)]


def test_words_and_settings_are_checked_with_near_names() -> None:
    with pytest.raises(UnknownName, match=r"'lroa'.* 'lora'"):
        method("ia3+lroa")
    with pytest.raises(UnknownName, match=r"no setting 'rnak'.* 'rank'"):
        method("lora", {"rnak": 4})
    with pytest.raises(UnknownName, match=r"lora\.rank"):
        method("lora+ia3", {"lroa.rank": 4})
    with pytest.raises((UnknownName, ConfigError), match="rnak"):
        method("lora+ia3", {"lora.rnak": 4})
    with pytest.raises(ConfigError, match=r"'rank' is a setting of lora and of dora: write lora\.rank or dora\.rank"):
        method("lora+dora", {"rank": 4})
    with pytest.raises(CompositionError, match="stands in it twice"):
        method("lora+lora")
    with pytest.raises(UnknownName):
        method("lora+")
    for bad in ({"rank": "eight"}, {"rank": 2.5}, {"rank": 0}, {"rank": True}, {"sites": 3}, {"alpha": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            method("lora", bad)
    with pytest.raises(ConfigError, match="pass them to the method itself"):
        attach(tiny("bert"), method("lora"), rank=4)
    assert method("lora+ia3", {"rank": 4}).settings()["lora.rank"] == 4


def test_a_site_that_the_model_lacks_is_refused_before_anything_is_touched() -> None:
    model = tiny("bert", "classification")
    before = list(model.state_dict())
    with pytest.raises(AnatomyError, match=r"lora\.sites: .*no site 'ffn.gate'.* attn.q"):
        attach(model, "lora", sites=("attn.q", "ffn.gate"))
    with pytest.raises(AnatomyError, match=r"attn\.qq"):
        attach(model, "lora", sites=("attn.q", "attn.qq"))
    assert list(model.state_dict()) == before and Tuned.of(model) is None


def test_the_edits_of_a_combination_are_those_of_its_parts_but_for_what_one_of_them_leaves_out() -> None:
    anatomy = attach(tiny("bert"), "lora").anatomy
    parts = [len(list(method(words).edits(anatomy))) for words in ("lora", "ia3")]
    assert min(parts) > 0 and len(list(method("lora+ia3").edits(anatomy))) == sum(parts)
    fewer = method("pfeiffer_adapter+adapterdrop", {"training": "specialised", "without": 1})
    whole = len(list(method("pfeiffer_adapter").edits(anatomy)))
    assert len(list(fewer.edits(anatomy))) * 3 == whole * 2  # two of three blocks
