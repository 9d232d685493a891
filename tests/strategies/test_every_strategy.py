"""The contract of a strategy: it runs on each file of the shelf because it is there."""

import ast
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_memory import Runs, alike, same
from little import little_spec

from luthier.core import CompositionError, ConfigError, UnknownName
from luthier.runs.spec import BatchSpec, OptimSpec
from luthier.training import STRATEGIES, Strategy
from luthier.training.strategy import ONE_OWNER
from luthier.trust import safetensors
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
EVERY = [card.name for card in STRATEGIES.cards() if card.family != "recipes"]
ARCHITECTURES = ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("strategies"))


def with_which(name, usual="lora"):
    """The method with which a strategy is tried."""
    return STRATEGIES.get(name).tiny_method or usual


def refusal(name, method, runs):
    with pytest.raises(CompositionError, match="cannot stand together") as refused:
        runs.loop(name, method, **runs.own(name))
    return str(refused.value)


@pytest.mark.parametrize("name", EVERY)
def test_a_file_registers_its_own_name_in_its_folder_and_its_page_has_its_parts(name):
    card, cls = STRATEGIES.card(name), STRATEGIES.get(name)
    path = Path(card.path)
    assert card.name == cls.name == path.stem and path.parent.name == card.family
    page = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert page.splitlines()[0].endswith(".") and any(line.startswith("    ") for line in page.splitlines())
    for part in ("Paper:", "Neutral:", "Claims:", "Pitfalls:"):
        assert any(line.startswith(part) for line in page.splitlines()), part
    assert card.paper in page
    assert ("Cost:" in page) or not (cls.extra_passes or cls.extra_forwards), "what it costs is said"
    own = {f.name for f in dataclasses.fields(cls)}
    assert not own & {n for n in dir(Strategy) if not n.startswith("_")}, "hides a moment"
    settings = {s.name for s in card.settings}
    assert set(cls.neutral or {}) <= settings and set(cls.tiny) <= settings


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", EVERY)
def test_neutral_settings_are_the_run_without_it(name, method, runs):
    neutral = STRATEGIES.get(name).neutral
    if neutral is None:
        assert "Neutral: none" in STRATEGIES.card(name).page, "the page says why there is none"
        return
    loop = runs.after(name, method, values={f"{name}.{k}": v for k, v in neutral.items()}, **runs.own(name))
    loop.moments.finish()
    assert alike(loop, runs.whole(None, method, **runs.own(name)))


@pytest.mark.parametrize("name", EVERY)
def test_it_changes_what_is_learnt(name, runs):
    method = with_which(name)
    loop = runs.after(name, method, steps=6, **runs.own(name))
    loop.moments.finish()
    assert not alike(loop, runs.whole(None, method, steps=6, **runs.own(name)), 1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_in_pieces_is_the_step_in_one(name, runs):
    # Without dropout: its draws are named by the micro-batch.
    kind, cuts = f"{runs.own(name)['kind']}-dry", [BatchSpec(size=6, tokens=tokens) for tokens in (4096, 20)]
    method = with_which(name, "ia3")
    one = runs.after(name, method, kind, batch=cuts[0])
    assert len(one.feed.cut(0)) == 1
    if STRATEGIES.get(name).whole_step:
        with pytest.raises(ConfigError, match=r"one piece. Use batch.tokens = \d+"):
            runs.loop(name, method, kind, batch=cuts[1])
        return
    many = runs.after(name, method, kind, batch=cuts[1])
    assert len(many.feed.cut(0)) > 1
    assert alike(one, many, 2e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", EVERY)
def test_a_stopped_run_ends_with_the_bits_of_the_whole_one(name, arch, runs):
    kind = runs.kind(name, arch)
    if kind is None:
        return  # refused, with its reason
    given = {"steps": 4, "batch": runs.own(name)["batch"]}
    method = with_which(name)
    whole = runs.whole(name, method, kind, **given)
    for stop in (0, 2) if arch == "bert" else (2,):
        assert same(runs.resumed(stop, name, method, kind, **given), whole)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "bitfit", "full"])
@pytest.mark.parametrize("name", EVERY)
def test_frozen_stays_frozen_and_detaching_gives_the_base_back(name, method, runs):
    if method == "bitfit" and not runs.own(name)["kind"].startswith("bert"):
        method = "ia3"  # it has no bias
    if method != with_which(name, method):
        assert refusal(name, method, runs), "made for one method, it says so"
        method = with_which(name)
    loop = runs.after(name, method, steps=2, **runs.own(name))
    loop.moments.finish()
    base = safetensors.read(Path(loop.spec.model) / "model.safetensors")
    model = loop.tuned.detach()
    left = {n: p for n, p in model.named_parameters() if n.removeprefix("bert.") in base or n in base}
    assert left
    for n, p in left.items():
        stored = base.get(n, base.get(n.removeprefix("bert.")))
        assert torch.equal(p.detach(), torch.as_tensor(stored)), n


@pytest.mark.parametrize("name", EVERY)
def test_a_micro_batch_costs_the_passes_that_are_stated(name, runs):
    cls, own = STRATEGIES.get(name), runs.own(name)
    given = {"batch": BatchSpec(size=6, tokens=4096), "optim": OptimSpec(lr=1e-5), "steps": 6}
    loop = runs.loop(name, with_which(name), own["kind"], values={}, **given)
    loop.moments.start()
    counted = {"graph": 0, "alone": 0, "backward": 0}
    model, block, states = loop.tuned.model, loop.tuned.anatomy.blocks[-1].path, []

    def kept(module, args, out):
        states.append(out if isinstance(out, torch.Tensor) else out[0])
        if own["kind"].endswith("-gap"):  # words are made of the gaps' states alone, past the model's own pass
            seen(None, None, SimpleNamespace(logits=states[-1]))

    def seen(module, args, out):
        (last,) = states[-1:]  # not the logits: a loss may be made of what stands below them
        counted["graph" if out.logits.requires_grad else "alone"] += 1
        if out.logits.requires_grad:
            last.register_hook(lambda slope: counted.__setitem__("backward", counted["backward"] + 1))

    handles = [model.get_submodule(block).register_forward_hook(kept)]
    handles += [] if own["kind"].endswith("-gap") else [model.register_forward_hook(seen)]
    loop._train_step(0, loop.feed.cut(0))
    for handle in handles:
        handle.remove()
    assert counted["graph"] == counted["backward"] == 1 + cls.extra_passes, counted
    assert counted["alone"] == cls.extra_forwards or cls.writes, counted


def test_two_are_composed_in_their_order_and_resume(runs, tmp_path):
    spec = little_spec(runs.home, "lora", steps=5, strategy="freelb+llrd+stlr")
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=3)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


def test_bad_specs_are_refused_before_anything_is_read(runs, tmp_path):
    def refused(error, words, **changes):
        spec = little_spec(runs.home, changes.pop("method", "lora"), out=str(tmp_path / "run"), **changes)
        spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, source=str(tmp_path / "no.csv")))
        with pytest.raises(error, match=words):
            train(spec)
        assert not (tmp_path / "run").exists()

    refused(UnknownName, "No strategy is called 'freeelb'.*freelb", strategy="freeelb")
    refused(CompositionError, "stands in it twice", strategy="llrd+llrd")
    refused(CompositionError, "freelb and lst cannot stand together", strategy="freelb", method="lst")
    refused(UnknownName, "freelb has no setting 'kk'.*k", strategy="freelb", settings={"freelb.kk": 3})
    refused(ConfigError, "k", strategy="freelb", settings={"freelb.k": 0})
    refused(UnknownName, "has no setting 'alpha_'", strategy="freelb", settings={"alpha_": 3})
    refused(ConfigError, "'alpha' is a setting of freelb and of the method", strategy="freelb", settings={"alpha": 3})
    assert {"passes", "rate"} <= set(ONE_OWNER)
