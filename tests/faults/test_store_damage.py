"""Damage to files at rest, other formats, and what a checkpoint may weigh."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core import DiskFull, Diverged, IntegrityError, ModelError
from luthier.runs import RunFolder, checkpoint, durable, gate_finite, load_newest, preflight, prune, save_checkpoint
from luthier.runs import store as run_store
from luthier.testing import damage

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("flip", "byte", "cut", "grow", "zero", "remove")


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(step)
    return {
        "adapter": {"a": torch.randn(3, 5, generator=made), "b": torch.randn(7, 3, generator=made).bfloat16()},
        "optimizer": {"a.m": torch.randn(3, 5, generator=made), "steps": torch.tensor(step)},
    }


def is_what_was_saved(found: checkpoint.Checkpoint) -> bool:
    expected = tensors_of(found.step)
    return (
        found.state == {"lr": 0.5, "step": found.step}
        and {stem: set(group) for stem, group in found.tensors.items()} == {s: set(g) for s, g in expected.items()}
        and all(torch.equal(found.tensors[s][name], t) for s, group in expected.items() for name, t in group.items())
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    with RunFolder.create(folder, {"seed": 7}) as run:
        for step in (1, 2):
            save_checkpoint(run, step, tensors_of(step), {"lr": 0.5, "step": step})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def damaged_loads(folder: Path, files: list[Path], n: int, kinds: tuple[str, ...]) -> int:
    """Damage the newest checkpoint `n` times, each time afresh; how often it was found and the older one used."""
    source, found_times = random.Random(11), 0
    newest = folder / "ckpt" / "step-00000002"
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    run = RunFolder.open(folder, write=False)
    for _ in range(n):
        done = damage(files, source, kinds)
        found, skipped = load_newest(run)
        assert found is not None
        assert found.step == 1, f"used in spite of {done}"
        assert is_what_was_saved(found)
        assert [path for path, _ in skipped] == [newest]
        assert done.path.name in skipped[0][1], "the reason names the file"
        found_times += 1
        for path, content in whole.items():
            path.write_bytes(content)
        found, skipped = load_newest(run)
        assert found is not None
        assert found.step == 2, "undamaged again"
        assert is_what_was_saved(found)
    return found_times


@pytest.mark.fault("F04", "found before use")
def test_f04_a_flipped_bit_in_weights_is_found_before_use(copied: Path) -> None:
    files = [copied / "ckpt" / "step-00000002" / "adapter.safetensors"]
    assert damaged_loads(copied, files, 60, ("flip",)) == 60


@pytest.mark.fault("F05", "found before use")
def test_f05_a_flipped_bit_in_optimizer_state_or_manifest_is_found_before_use(copied: Path) -> None:
    names = ("optimizer.safetensors", "state.json", "MANIFEST.json")
    files = [copied / "ckpt" / "step-00000002" / name for name in names]
    assert damaged_loads(copied, files, 60, ("flip",)) == 60


@pytest.mark.fault("F06", "not whole")
@pytest.mark.fault("F05", "found before use")
@pytest.mark.fault("F04", "found before use")
@pytest.mark.slow
def test_f04_to_f06_a_thousand_random_damages_are_all_found(
    copied: Path, record_property: Callable[[str, object], None]
) -> None:
    files = sorted((copied / "ckpt" / "step-00000002").iterdir())
    n = damaged_loads(copied, files, 1000, KINDS)
    assert n == 1000
    record_property("counted: a checkpoint at rest, random flips, bytes, cuts, growth, zeros, removals", n)


def test_every_single_bit_of_a_manifest_counts(copied: Path, record_property: Callable[[str, object], None]) -> None:
    path = copied / "ckpt" / "step-00000002" / "MANIFEST.json"
    content = path.read_bytes()
    run = RunFolder.open(copied, write=False)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(changed))
        found, _ = load_newest(run)
        assert found is not None
        assert found.step == 1, f"byte {at}"
    record_property("counted: a manifest at rest, one bit flipped in each byte", len(content))


@pytest.mark.fault("F06", "not whole")
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("fault", ["cut", "empty", "missing", "link", "folder", "pipe"])
def test_f06_a_file_that_is_not_whole_is_found_and_recorded(copied: Path, name: str, fault: str) -> None:
    path = copied / "ckpt" / "step-00000002" / name
    content = path.read_bytes()
    path.unlink()
    if fault == "cut":
        path.write_bytes(content[:-1])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "link":
        (copied / "elsewhere").write_bytes(content)
        path.symlink_to(copied / "elsewhere")
    elif fault == "folder":
        path.mkdir()
    elif fault == "pipe":
        os.mkfifo(path)
    with RunFolder.open(copied) as run:
        found, skipped = load_newest(run)
        assert found is not None
        assert found.step == 1
        assert len(skipped) == 1
        assert name in skipped[0][1]
        recorded = [line for line in run.events() if line["event"] == "checkpoint_skipped"]
        assert [line["name"] for line in recorded] == ["step-00000002"]
        assert recorded[0]["reason"] == skipped[0][1]


@pytest.mark.fault("F06", "extra")
def test_f06_an_extra_file_is_ignored_and_reported(copied: Path) -> None:
    (copied / "ckpt" / "step-00000002" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with RunFolder.open(copied) as run:
        found, skipped = load_newest(run)
        assert found is not None
        assert found.step == 2
        assert skipped == []
        assert found.extra == ("pytorch_model.bin",)
        assert set(found.tensors) == {"adapter", "optimizer"}
        assert [e["files"] for e in run.events() if e["event"] == "extra_files_ignored"] == [["pytorch_model.bin"]]


def test_f06_a_checkpoint_under_another_name_is_refused(copied: Path) -> None:
    (copied / "ckpt" / "step-00000002").rename(copied / "ckpt" / "step-00000009")
    found, skipped = load_newest(RunFolder.open(copied, write=False))
    assert found is not None
    assert found.step == 1
    assert "step-00000002" in skipped[0][1]


@pytest.mark.fault("F07", "the store stops")
def test_f07_when_no_checkpoint_verifies_the_run_stops(copied: Path) -> None:
    for path in (copied / "ckpt").glob("step-*/adapter.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with RunFolder.open(copied) as run, pytest.raises(IntegrityError, match="none of the 2 checkpoints verifies"):
        load_newest(run)


def test_a_run_without_candidates_starts_at_step_0(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        assert load_newest(run) == (None, [])


@pytest.mark.fault("F02", "damaged ones do not count")
def test_f02_damaged_checkpoints_do_not_count_as_kept(copied: Path) -> None:
    with RunFolder.open(copied) as run:
        for step in (3, 4):
            save_checkpoint(run, step, tensors_of(step), {"lr": 0.5, "step": step})
        for name in ("step-00000003", "step-00000004"):
            path = run.ckpt / name / "state.json"
            path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))
        prune(run, keep_last=2, powers_of_two=False)
        assert sorted(p.name for p in run.ckpt.iterdir()) == ["step-00000001", "step-00000002"]


def test_pruning_keeps_the_last_the_best_and_one_of_each_power_of_two_age(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        most = 0
        for step in range(1, 65):
            save_checkpoint(run, step, {"adapter": {"a": torch.ones(1)}}, {})
            prune(run, keep_last=2, keep_best=13 if step >= 13 else None)
            kept = [int(p.name[5:]) for p in run.ckpt.iterdir()]
            most = max(most, len(kept))
            assert {step, max(1, step - 1)} <= set(kept)
            assert step < 13 or 13 in kept
        assert most <= 2 + 1 + 7, "a number that grows with the logarithm of the steps"
        assert min(kept) <= 32, "and one of them is old"


def test_a_second_checkpoint_of_one_step_never_replaces_the_first(copied: Path) -> None:
    with RunFolder.open(copied) as run:
        again = save_checkpoint(run, 2, {"adapter": {"a": torch.full((2,), 9.0)}}, {"second": True})
        assert again.path.name == "step-00000002-r2"
        found, _ = load_newest(run)
        assert found is not None
        assert found.state == {"second": True}
        (again.path / "state.json").unlink()
        found, skipped = load_newest(run)
        assert found is not None
        assert is_what_was_saved(found)
        assert [path.name for path, _ in skipped] == ["step-00000002-r2"]


@pytest.mark.fault("F09", "refused before step 1")
def test_f09_too_little_disk_is_refused_with_need_and_have(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        preflight(run, 1000)
        with pytest.raises(DiskFull, match=r"need 1000000000\.00 GB, and the disk has [\d.]+ [kMG]B free"):
            preflight(run, 10**18)


@pytest.mark.fault("F21", "checkpoint")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_f21_a_number_that_is_not_finite_is_refused_by_name(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[1, 2] = value
    with pytest.raises(ModelError, match=r"model folder: tensor 'attn.q@0.a' holds 1 of 15"):
        gate_finite({"fine": torch.ones(2), "attn.q@0.a": tensor}, "model folder", ModelError)


def test_f21_numbers_whose_sum_overflows_are_still_finite() -> None:
    gate_finite({"a": torch.full((1000,), 6e4, dtype=torch.float16), "b": torch.full((9,), 3e38)}, "adapter")
    gate_finite({"n": torch.ones(3, dtype=torch.int64), "none": torch.zeros(0)}, "adapter")


@pytest.mark.fault("F21", "checkpoint")
def test_r7_a_checkpoint_with_nan_is_not_written(copied: Path) -> None:
    with RunFolder.open(copied) as run:
        with pytest.raises(Diverged, match="step 3, optimizer: tensor 'm'"):
            save_checkpoint(run, 3, {"adapter": {}, "optimizer": {"m": torch.tensor([float("nan")])}}, {})
        assert sorted(p.name for p in run.ckpt.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.fault("F49", "size")
def test_f49_a_checkpoint_weighs_what_is_trained_and_its_moments(tmp_path: Path) -> None:
    weights = {"a": torch.randn(300, 211), "b": torch.randn(97, 130)}
    moments = {f"{name}.{m}": torch.randn_like(t) for name, t in weights.items() for m in ("m", "v")}
    n_bytes = 3 * sum(t.numel() * 4 for t in weights.values())
    with RunFolder.create(tmp_path / "run", {}) as run:
        made = save_checkpoint(run, 1, {"adapter": weights, "optimizer": moments}, {"cursor": 12})
    assert sum(p.stat().st_size for p in made.path.iterdir()) <= 1.1 * n_bytes


def test_f49_a_view_of_a_large_tensor_is_stored_without_the_rest(tmp_path: Path) -> None:
    large = torch.randn(1000, 64)
    with RunFolder.create(tmp_path / "run", {}) as run:
        made = save_checkpoint(run, 1, {"adapter": {"rows": large[3:5], "turned": large[:2].T}}, {})
        found, _ = load_newest(run)
    assert (made.path / "adapter.safetensors").stat().st_size < 2000
    assert found is not None
    assert torch.equal(found.tensors["adapter"]["rows"], large[3:5])
    assert torch.equal(found.tensors["adapter"]["turned"], large[:2].T)


# --- F40: formats ----------------------------------------------------------------------------------------------------


def with_version(folder: Path, version: Any) -> None:
    """Rewrite the newest checkpoint as one of another format version, whole in itself."""
    path = folder / "ckpt" / "step-00000002" / "MANIFEST.json"
    manifest = {**json.loads(path.read_bytes()), "version": version}
    del manifest["digest"]
    manifest["digest"] = hashlib.sha256(durable.encode(manifest)).hexdigest()
    path.write_bytes(durable.encode(manifest))


@pytest.mark.fault("F40", "newer")
def test_f40_a_newer_format_is_refused_and_not_passed_over(copied: Path) -> None:
    with_version(copied, 2)
    with pytest.raises(IntegrityError, match=r"format version 2 is newer than the 1.*Update luthier"):
        load_newest(RunFolder.open(copied, write=False))


@pytest.mark.fault("F40", "older")
def test_f40_a_format_older_than_any_known_is_refused(copied: Path) -> None:
    with_version(copied, 0)
    with pytest.raises(IntegrityError, match="format version 0 is older than any"):
        load_newest(RunFolder.open(copied, write=False))


@pytest.mark.fault("F40", "older")
def test_f40_an_older_format_is_migrated_and_its_files_stay_as_they_are(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename_lr(content: dict[str, Any]) -> dict[str, Any]:
        state = dict(content["state"])
        return {**content, "state": {**state, "learning_rate": state.pop("lr")}}

    monkeypatch.setattr(checkpoint, "VERSION", 2)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {1: rename_lr})
    before = {p: p.read_bytes() for p in (copied / "ckpt").rglob("*") if p.is_file()}
    with RunFolder.open(copied) as run:
        found, skipped = load_newest(run)
        assert found is not None
        assert found.step == 2
        assert found.state["learning_rate"] == 0.5
        assert skipped == []
        made = save_checkpoint(run, 3, tensors_of(3), found.state)
    assert json.loads((made.path / "MANIFEST.json").read_bytes())["version"] == 2
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.fault("F40", "newer", "older")
def test_f40_run_json_of_another_version_is_refused_or_migrated(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / "run.json"
    old = json.loads(path.read_bytes())
    path.write_bytes(durable.encode({**old, "version": 2}))
    with pytest.raises(IntegrityError, match="newer"):
        RunFolder.open(copied, write=False)
    monkeypatch.setattr(run_store, "RUN_VERSION", 3)
    monkeypatch.setattr(run_store, "RUN_MIGRATIONS", {2: lambda facts: {**facts, "spec": {"key": 7}}})
    assert RunFolder.open(copied, write=False).spec == {"key": 7}
    path.write_bytes(durable.encode({**old, "version": "one"}))
    with pytest.raises(IntegrityError, match="says no format version"):
        RunFolder.open(copied, write=False)


@pytest.mark.fault("F40", "golden checkpoint")
def test_f40_the_golden_run_of_format_1_still_loads(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-1", tmp_path / "run")
    with RunFolder.open(tmp_path / "run") as run:
        assert run.spec == {"model": "minilm-l6", "method": {"name": "lora", "rank": 2}, "seed": 7}
        found, skipped = load_newest(run)
        assert skipped == []
        assert found is not None
        assert found.step == 3
        assert found.event_rows == 3
        assert found.state == {"cursor": 24, "lr": 0.0002}
        assert found.tensors["adapter"]["attn.q@0.a"].tolist() == [[0.5, -1.0, 2.0]]
        assert found.tensors["adapter"]["attn.q@0.b"].dtype == torch.bfloat16
        assert found.tensors["optimizer"]["attn.q@0.a.m"].shape == (1, 3)
        assert [row["loss"] for row in run.journal.rows()] == [1.0, 0.5, 0.25]
