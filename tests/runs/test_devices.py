"""How much memory there is."""

from pathlib import Path

from luthier.runs.devices import _left_of_group


def test_a_control_group_leaves_what_it_does_not_use_and_what_it_would_give_up(tmp_path: Path) -> None:
    for name, text in {
        "memory.max": "16000\n",
        "memory.current": "12000\n",
        "memory.stat": "anon 5000\nfile 7000\nactive_file 2000\ninactive_file 4500\nshmem 500\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert _left_of_group(tmp_path) == 16000 - 12000 + 2000 + 4500


def test_without_a_limit_or_a_group_there_is_no_bound(tmp_path: Path) -> None:
    assert _left_of_group(tmp_path) == 2**62
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_of_group(tmp_path) == 2**62
