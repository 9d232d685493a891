"""F38, F39, R1: a run that is stopped at every kind of place ends with the bits of the run that never was.

Dropout is on in the model and in the methods, each step has several micro-batches, and a loss is written for each step:
adapter, optimiser, saved tuning and log rows are compared by digest.
"""

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from little import Heard, at_call, little_spec, made_of

from luthier.core import AnatomyError, ConfigError, Interrupted, ModelError
from luthier.runs import RunFolder, checkpoints
from luthier.runs.spec import BatchSpec, CheckpointSpec, EvalSpec, RunSpec
from luthier.surgery import METHODS
from luthier.training.evaluate import Evaluator
from luthier.training.loop import Loop
from luthier.workflow import finish, resume, run, train, verify_resume
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

STATEFUL = ("adalora", "adamix", "diff_pruning", "propetl", "child_tuning_d", "lst")
EVAL = EvalSpec(every=4)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


@pytest.fixture(scope="session")
def whole(home: Path) -> Callable[[str, str], dict[str, str]]:
    """Digests of the run that nothing disturbs."""

    @cache
    def digests(method: str, kind: str) -> dict[str, str]:
        out = home / f"whole-{method}-{kind}"
        train(little_spec(home, method, kind, eval=EVAL, out=str(out), **made_of(method, home, kind)))
        return run_digests(out)

    return digests


def disturbed(spec: RunSpec, patch: pytest.MonkeyPatch) -> list[int]:
    """Run `spec` and stop it at every kind of place; the steps at which it stood."""
    path, stood = Path(str(spec.out)), []

    def stands() -> None:
        stood.append(int(checkpoints(RunFolder.open(path, write=False))[0].name[5:13]))

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def terminated() -> None:
        with pytest.raises(Interrupted) as caught:
            resume(path)
        assert caught.value.exit_code == 143
        stands()

    def loss(self: Loop, step: int, micro: int, batch: object) -> object:
        if (step, micro) == (1, 0):
            terminate()
        return inner(self, step, micro, batch)  # type: ignore[arg-type]

    train(spec, stop_at=0)  # at step 0
    stands()
    inner = Loop._loss
    with patch.context() as patched:  # inside the accumulation of step 2: after its first micro-batch
        patched.setattr(Loop, "_loss", loss)
        terminated()
    resume(path, stop_at=3)  # in the middle of an epoch
    stands()
    resume(path, stop_at=4)  # after an evaluation
    stands()
    resume(path, stop_at=5)  # where an epoch begins
    stands()
    with patch.context() as patched:  # inside the evaluation of step 8
        at_call(patched, Evaluator, "_one", 1, terminate)
        terminated()
    resume(path, stop_at=11)
    with patch.context() as patched:  # after the last step, before the result is written
        at_call(patched, finish, "_refuse_base", 1, terminate)
        terminated()
    resume(path)
    return stood


def check(
    method: str, kind: str, workers: int, home: Path, whole: Callable[[str, str], dict[str, str]],
    tmp_path: Path, patch: pytest.MonkeyPatch,
) -> int:  # fmt: skip
    """Returns at how many places the run was stopped."""
    try:
        expected = whole(method, kind)
    except (AnatomyError, ModelError):
        assert method not in ("lora", "full", *STATEFUL), "these know every kind of model"
        assert whole(method, "llama" if kind == "bert" else "bert"), "no method refuses both"
        return 0
    spec = little_spec(
        home,
        method,
        kind,
        eval=EVAL,
        out=str(tmp_path / "run"),
        batch=BatchSpec(size=8, tokens=48, accumulate=2, workers=workers),
        **made_of(method, home, kind),
    )
    stood = disturbed(spec, patch)
    assert stood == [0, 1, 3, 4, 5, 8, 12]
    assert run_digests(tmp_path / "run") == expected
    return len(stood)


@pytest.mark.fault("F39", "exact")
@pytest.mark.parametrize("method", STATEFUL)
def test_methods_with_a_state_of_their_own_resume_to_the_bit_at_every_place(
    method: str,
    home: Path,
    whole: Callable[[str, str], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(method, "bert", 0, home, whole, tmp_path, monkeypatch)


@pytest.mark.fault("F39", "exact")
@pytest.mark.fault("F38", "exact")
@pytest.mark.parametrize(("kind", "workers"), [("bert", 2), ("llama", 0)])
def test_lora_resumes_to_the_bit_at_every_place(
    kind: str, workers: int, home: Path, whole: Callable[[str, str], dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    check("lora", kind, workers, home, whole, tmp_path, monkeypatch)


@pytest.mark.fault("F39", "exact")
@pytest.mark.fault("F38", "exact")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", [*METHODS.names(), "lora+prompt_tuning"])
def test_every_method_resumes_to_the_bit_at_every_place(
    method: str, kind: str, workers: int, home: Path, whole: Callable[[str, str], dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    places = check(method, kind, workers, home, whole, tmp_path, monkeypatch)
    record_property(f"counted: runs of every method ({kind}), a stop and a resume, {workers} workers", places)


@pytest.mark.fault("F04", "the run goes on from an older one")
def test_a_run_goes_on_from_a_damaged_newest_checkpoint_to_the_same_bits(
    home: Path, whole: Callable[[str, str], dict[str, str]], tmp_path: Path
) -> None:
    spec = little_spec(home, eval=EVAL, out=str(tmp_path / "run"), checkpoint=CheckpointSpec(every_steps=2))
    train(spec, stop_at=6)
    newest = checkpoints(RunFolder.open(tmp_path / "run", write=False))[0]
    content = bytearray((newest / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "adapter.safetensors").write_bytes(content)
    heard = Heard()
    resume(tmp_path / "run", listener=heard)
    assert "step-00000006 was skipped" in heard.text
    assert run_digests(tmp_path / "run") == whole("lora", "bert")


def test_a_run_killed_before_its_first_checkpoint_begins_anew_to_the_same_bits(
    home: Path, whole: Callable[[str, str], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = little_spec(home, "child_tuning_d", eval=EVAL, out=str(tmp_path / "run"))

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        at_call(patched, run, "_look_at_data", 1, die)
        with pytest.raises(KeyboardInterrupt):
            train(spec)
    rows = (tmp_path / "run" / "rows.jsonl").read_bytes()
    resume(tmp_path / "run")
    assert run_digests(tmp_path / "run") == whole("child_tuning_d", "bert")
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == rows  # not twice


@pytest.mark.fault("F39", "finished run")
def test_a_finished_run_is_left_as_it_is_and_says_where_its_result_lies(home: Path, tmp_path: Path) -> None:
    spec = little_spec(home, steps=3, out=str(tmp_path / "run"))
    train(spec)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(ConfigError, match=r"finished; there is nothing to resume. Its result is in .*tuning"):
        resume(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(spec)
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_an_unfinished_run_is_not_written_over_and_says_how_to_go_on(home: Path, tmp_path: Path) -> None:
    spec = little_spec(home, out=str(tmp_path / "run"))
    train(spec, stop_at=1)
    with pytest.raises(ConfigError, match="Continue it with `luthier resume"):
        train(spec)


def test_verify_resume_finds_equal_digests_and_would_find_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = little_spec(home, "lora", threads=1)
    proof = verify_resume(spec, 3, tmp_path / "good")
    assert proof["equal"] and set(proof["parts"]) == {"adapter", "optimizer", "tuning", "log"}
    assert all(part["whole"] for part in proof["parts"].values())

    inner = Loop.load

    def careless(self: Loop, checkpoint: object) -> None:
        inner(self, checkpoint)  # type: ignore[arg-type]
        for moment in self.optimiser.first.values():
            moment.zero_()

    monkeypatch.setattr(Loop, "load", careless)
    proof = verify_resume(spec, 3, tmp_path / "bad")
    assert not proof["equal"]
    assert proof["parts"]["adapter"]["whole"] != proof["parts"]["adapter"]["resumed"]


@pytest.mark.fault("F49", "size")
def test_a_checkpoint_holds_what_trains_and_its_moments_and_no_frozen_weight(home: Path, tmp_path: Path) -> None:
    """F49: at most 1.1 times (trained + moments)."""
    spec = little_spec(home, "lora", steps=2, out=str(tmp_path / "run"))
    result = train(spec)
    trained = sum(p.numel() * 4 for p in result.tuned.trained().values())
    newest = checkpoints(RunFolder.open(tmp_path / "run", write=False))[0]
    stored = sum(p.stat().st_size for p in newest.glob("*.safetensors"))
    assert stored <= 1.1 * 3 * trained + 8000, (stored, trained)  # headers of many tiny tensors
    base = sum(p.numel() for p in result.tuned.model.parameters() if not p.requires_grad) * 4
    assert stored < base
