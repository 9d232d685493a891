"""The walls of the child process, each tried by something that runs into it."""

import time
from pathlib import Path

import pytest

from luthier.core import Refused
from luthier.trust import jail


@pytest.mark.parametrize(
    "function, args, wall",
    [
        ("os:system", "true", "os.system"),
        ("socket:socket", 2, "socket"),
        ("subprocess:Popen", ["true"], "subprocess"),
        ("importlib:import_module", "wave", "wave"),
        ("builtins:open", "/etc/passwd", "opening '/etc/passwd'"),
        ("os:mkdir", "/tmp/CANARY", "os.mkdir"),
        ("os:remove", "/tmp/CANARY", "os.remove"),
        ("shutil:rmtree", "/tmp/CANARY", "shutil"),
        ("pickle:loads", [], "cannot be read"),
    ],
)
def test_a_wall_stops_what_reading_never_needs(function: str, args: object, wall: str) -> None:
    with pytest.raises(Refused, match=wall):
        jail.run(function, args, what="the file")
    assert not Path("/tmp/CANARY").exists()


def test_only_named_files_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(Refused, match="opening"):
        jail.run("io:FileIO", str(tmp_path / "b"), what="f", readable=[str(tmp_path / "a")])
    # The handler of a question must be callable; a file object is none, so the open itself has passed the wall.
    with pytest.raises(Refused, match="not callable"):
        jail.run("io:FileIO", str(tmp_path / "a"), what="f", readable=[str(tmp_path / "a")])


def test_processor_time_is_limited_even_inside_one_long_operation() -> None:
    with pytest.raises(Refused, match=r"more than 0\.2 s of processor time"):
        jail.run("math:factorial", 2_000_000, what="the file", seconds=0.2)


def test_memory_is_limited() -> None:
    with pytest.raises(Refused, match=r"more than 100\.0 MB of memory"):
        jail.run("builtins:bytearray", 300_000_000, what="the file", bytes_=100_000_000)


def test_the_child_ends_with_its_owner_and_leaves_no_process() -> None:
    child = jail.Child("operator:itemgetter", 0, what="x")
    assert child.ask([7]) == 7 and child.ask(["y"]) == "y" and child.alive
    child.close()
    assert not child.alive
    child.close()
    with pytest.raises(Refused, match="ended with code"), jail.Child("operator:itemgetter", 0, what="x") as other:
        other._process.kill()
        other._process.wait()
        other.ask([7])


def test_a_question_larger_than_a_pipe_gets_through() -> None:
    with jail.Child("operator:itemgetter", 0, what="x") as child:
        assert child.ask(["z" * 1_000_000]) == "z" * 1_000_000


def test_a_start_costs_little() -> None:
    # Processor time of this process only: it must not read anything heavy to start a child.
    before = time.process_time()
    jail.run("operator:itemgetter", 0, [1], what="x")
    assert time.process_time() - before < 0.5
