"""The small parts of the room: records, environments, memory, the tensor file, manifests."""

import json
import mmap
import os
import random
import signal
import socket
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from luthier.core import ConfigError, IntegrityError
from luthier.runs import (
    Journal,
    Record,
    RunFolder,
    differences,
    durable,
    environment,
    lock,
    peak_bytes,
    read_verified,
    reset_peak,
    resident_bytes,
)
from luthier.runs.tensorfile import TYPES, pieces, read_tensors
from luthier.testing import Template, damage

torch.set_num_threads(1)


def test_a_record_comes_back_equal_from_json() -> None:
    record = Record(
        spec={"method": {"name": "lora", "rank": 4}},
        environment=environment(),
        scores={"accuracy": 0.75},
        seconds=12.5,
        peak_bytes=10**9,
        trained=1234,
        stored=5678,
        status="finished",
        bit_exact=False,
        because=("torch 2.12.0 -> 2.13.0",),
    )
    assert Record.from_json(json.dumps(record.to_json())) == record
    assert Record.from_json(Record(spec={}, environment={}).to_json()) == Record(spec={}, environment={})


@pytest.mark.parametrize("text", ["{", "[]", '{"spec": 3}', '{"spec": {}, "environment": {}, "extra": 1}'])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(IntegrityError, match=r"record\.json"):
        Record.from_json(text)


def test_an_environment_names_versions_and_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    text = json.dumps(found)
    assert "hf_secret" not in text
    assert str(Path.home()) not in text


def test_differences_are_sentences() -> None:
    old = {"torch": "2.12.0", "threads": 1, "data": {"train": "aa", "test": "bb"}, "gone": 1}
    new = {"torch": "2.13.0", "threads": 1, "data": {"train": "aa", "test": "cc"}, "new": 2}
    assert differences(old, new) == [
        "torch 2.12.0 -> 2.13.0",
        "data.test bb -> cc",
        "gone 1 -> nothing",
        "new nothing -> 2",
    ]
    assert differences(new, new) == []


def test_peak_memory_covers_what_was_held_for_a_moment() -> None:
    reset_peak()
    before = peak_bytes()
    # Pages of its own: a block of the heap may be one that an earlier test has freed and the allocator kept.
    with mmap.mmap(-1, 64 << 20) as held:
        for page in range(0, len(held), 4096):
            held[page] = 1
    assert peak_bytes() >= before + (48 << 20)
    assert 0 < resident_bytes() <= peak_bytes()
    if reset_peak():
        assert peak_bytes() < before + (48 << 20)


def tensors() -> dict[str, torch.Tensor]:
    made = {f"of {name}": torch.arange(7).to(getattr(torch, name)) for name in TYPES}
    return {
        **made,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(15.0).view(3, 5).T,
        "part": torch.arange(40.0)[5:9],
        "conjugate": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
        "ünï ✓": torch.ones(2, 3, dtype=torch.bfloat16),
    }


def test_tensors_come_back_to_the_bit_and_the_library_reads_our_files(tmp_path: Path) -> None:
    made = tensors()
    durable.write_tensors(tmp_path / "t.safetensors", made, {"format": "pt", "a": "b"})
    ours = read_tensors((tmp_path / "t.safetensors").read_bytes())
    theirs = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert set(ours) == set(theirs) == set(made)
    for name, tensor in made.items():
        for read in (ours[name], theirs[name]):
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.contiguous().view(-1).view(torch.uint8), bits(tensor))
    with safetensors.safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().contiguous().view(-1).view(torch.uint8)


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    made = tensors()
    backwards = dict(reversed(made.items()))
    first = durable.write_tensors(tmp_path / "a", made, {"x": "1", "y": "2"})
    second = durable.write_tensors(tmp_path / "b", backwards, {"y": "2", "x": "1"})
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_tensor_that_cannot_be_stored_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'thin': torch\.sparse_coo"):
        pieces({"thin": torch.eye(3).to_sparse()}, {})
    with pytest.raises(ConfigError, match="complex128"):
        pieces({"wide": torch.ones(2, dtype=torch.complex128)}, {})


@pytest.mark.parametrize("n", [10, durable.THREADED_FROM // 4 + 13, 3 * durable.CHUNK // 4])
def test_a_folder_is_verified_whatever_its_size(tmp_path: Path, n: int) -> None:
    weights = {"a": torch.randn(n), "b": torch.randn(17)}
    with durable.folder(tmp_path / "tuning", {"format": "luthier-tuning", "version": 1}) as draft:
        draft.write_tensors("adapter.safetensors", weights)
        draft.write_json("method.json", {"rank": 4})
    found = read_verified(tmp_path / "tuning")
    assert found.facts == {"format": "luthier-tuning", "version": 1}
    assert found.extra == ()
    assert set(found.files) == {"adapter.safetensors", "method.json"}
    assert torch.equal(read_tensors(found.files["adapter.safetensors"])["a"], weights["a"])
    done = damage([tmp_path / "tuning" / "adapter.safetensors"], random.Random(3))
    with pytest.raises(IntegrityError, match=r"adapter\.safetensors is damaged"):
        read_verified(tmp_path / "tuning")
    assert done.kind == "flip"


def test_a_folder_whose_making_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JSON"), durable.folder(tmp_path / "tuning", {}) as draft:
        draft.write_bytes("one", b"1")
        draft.write_json("two", {"value": float("nan")})
    with pytest.raises(ValueError, match="plain new file name"), durable.folder(tmp_path / "tuning", {}) as draft:
        draft.write_bytes("../escape", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_spec_with_nothing_in_it_is_written_as_toml_and_the_nothing_is_named(tmp_path: Path) -> None:
    spec = {"seed": 7, "limit": None, "method": {"name": "lora", "layers": None, "sites": ["attn.q"]}}
    with RunFolder.create(tmp_path / "run", spec) as run:
        assert run.spec == spec
    text = (tmp_path / "run" / "spec.toml").read_text()
    assert text.startswith("# limit: nothing\n# method.layers: nothing\n")
    assert 'sites = [\n    "attn.q",\n]' in text


def say(word: str) -> None:
    print(word)


def refuse() -> None:
    raise ConfigError("no")


def wait_for_ever() -> None:
    signal.pause()


def test_a_fork_of_the_template_reports_status_and_output() -> None:
    with Template() as template:
        said = template.run(__file__, "say", {"word": "✓"})
        assert (said.status, said.output) == (0, "✓\n")
        refused = template.run(__file__, "refuse")
        assert refused.status == ConfigError.exit_code
        assert "ConfigError: no" in refused.output
        assert template.run(__file__, "nowhere").status == 1
        assert template.run(__file__, "wait_for_ever", timeout_s=0.05).status == -9


def test_the_processors_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert environment()["cpus"] == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert environment()["cpus"] == 7


def test_where_the_system_keeps_no_status_the_peak_is_read_in_its_own_unit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("luthier.runs.peak_memory._STATUS", tmp_path / "none")
    used = type("Used", (), {"ru_maxrss": 3000})
    monkeypatch.setattr("resource.getrusage", lambda who: used)
    for system, wanted in (("linux", 3000 * 1024), ("darwin", 3000)):
        monkeypatch.setattr("sys.platform", system)
        assert peak_bytes() == wanted


@pytest.mark.parametrize(("late", "dead"), [(0.0, False), (0.03, False), (0.07, True), (40.0, True)])
def test_without_ticks_a_holder_is_known_by_when_it_started(
    late: float, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = psutil.Process().create_time()
    monkeypatch.setattr(lock, "_ticks", lambda pid: None)
    holder = {**lock.myself(), "ticks": None, "started": started - late}
    assert lock.holder_is_dead(holder) is dead


def test_a_lock_that_a_longer_note_was_left_in_is_read_as_its_new_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"boot": "another", "host": socket.gethostname(), "note": "x" * 900}))
    held = lock.Lock(path)
    held.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()


def test_a_child_lets_go_of_the_lock_once_and_its_own_child_finds_nothing_to_let_go(tmp_path: Path) -> None:
    held = lock.Lock(tmp_path / "run.lock")
    held.acquire()
    child = os.fork()
    if not child:
        os._exit(len(lock._held))
    assert os.waitpid(child, 0)[1] == 0
    assert len(lock._held) == 1
    held.release()


def test_rows_are_counted_and_facts_are_not_whichever_way_they_are_written(tmp_path: Path) -> None:
    log = Journal(tmp_path / "rows.jsonl")
    log.append_rows([b'{"row": 0}\n', b'{"row": 1}\n'])  # opens it
    assert log.n_rows() == 2
    log.append({"row": 2}, fact=False)
    log.append({"event": "saved"}, fact=True)
    log.append_rows([b'{"row": 3}\n'])
    assert log.n_rows() == len(log.rows()) == 4
    log.close()
    again = Journal(tmp_path / "rows.jsonl")
    assert again.keep_rows(3) == (1, 0)
    assert len(again.rows()) == 3
    again.close()
