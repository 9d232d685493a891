"""The contract of a strategy: it runs on each file of the shelf because it is there."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from little import little_spec

from luthier.core import CompositionError, ConfigError, UnknownName
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.training.strategy import ONE_OWNER
from luthier.trust import safetensors
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
EVERY = STRATEGIES.names()


def trained(run: Path) -> dict[str, torch.Tensor]:
    return {n: torch.as_tensor(t) for n, t in safetensors.read(run / "tuning" / "tuning.safetensors").items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], bound: float = 2e-6) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[n].double(), other[n].double(), rtol=0, atol=bound) for n in one
    )


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="session")
def plain_run(home):
    made = {}

    def run(method, kind):
        if (method, kind) not in made:
            out = home / f"plain-{method}-{kind}"
            train(little_spec(home, method, kind, steps=3, out=str(out)))
            made[method, kind] = trained(out)
        return made[method, kind]

    return run


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
    own = {f.name for f in dataclasses.fields(cls)}
    assert not own & {n for n in dir(STRATEGIES.get("stlr").__mro__[1]) if not n.startswith("_")}, "hides a moment"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", EVERY)
def test_neutral_settings_are_the_run_without_it(name, method, home, plain_run, tmp_path):
    neutral = STRATEGIES.get(name).neutral
    if neutral is None:
        assert "Neutral: none" in STRATEGIES.card(name).page, "the page says why there is none"
        return
    spec = little_spec(home, method, steps=3, strategy=name, out=str(tmp_path / "run"))
    spec = dataclasses.replace(spec, settings=spec.settings | {f"{name}.{k}": v for k, v in neutral.items()})
    train(spec)
    assert alike(trained(tmp_path / "run"), plain_run(method, "bert"))


@pytest.mark.parametrize("name", EVERY)
def test_it_changes_what_is_learnt(name, home, plain_run, tmp_path):
    train(little_spec(home, "lora", steps=3, strategy=name, out=str(tmp_path / "run")))
    assert not alike(trained(tmp_path / "run"), plain_run("lora", "bert"), 1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_in_pieces_is_the_step_in_one(name, home, tmp_path):
    for pieces, batch in (("one", BatchSpec(size=8, tokens=4096)), ("many", BatchSpec(size=8, tokens=24))):
        out = tmp_path / pieces
        # Without dropout: its draws are named by the micro-batch.
        spec = little_spec(home, "ia3", steps=3, strategy=name, batch=batch, trunk_dropout="off", out=str(out))
        train(spec)
    assert alike(trained(tmp_path / "one"), trained(tmp_path / "many"), 2e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", EVERY)
def test_a_stopped_run_ends_with_the_bits_of_the_whole_one(name, kind, home, tmp_path):
    spec = little_spec(home, "lora", kind, steps=6, strategy=name)
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=2)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "bitfit", "full"])
@pytest.mark.parametrize("name", EVERY)
def test_frozen_stays_frozen_and_detaching_gives_the_base_back(name, method, home, tmp_path):
    spec = little_spec(home, method, steps=2, strategy=name, out=str(tmp_path / "run"))
    result = train(spec)
    base = safetensors.read(Path(spec.model) / "model.safetensors")
    model = result.tuned.detach()
    left = {n: p for n, p in model.named_parameters() if n.removeprefix("bert.") in base or n in base}
    assert left
    for n, p in left.items():
        stored = base.get(n, base.get(n.removeprefix("bert.")))
        assert torch.equal(p.detach(), torch.as_tensor(stored)), n


def test_two_are_composed_in_their_order_and_resume(home, tmp_path):
    spec = little_spec(home, "lora", steps=5, strategy="freelb+llrd+stlr")
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=3)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


def test_bad_specs_are_refused_before_anything_is_read(home, tmp_path):
    def refused(error, words, **changes):
        spec = little_spec(home, changes.pop("method", "lora"), out=str(tmp_path / "run"), **changes)
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
    assert ONE_OWNER == ("passes", "rate")
