"""What held the memory of a run, as `luthier train` ends with it: one line."""

from luthier.cli._output import WIDTH
from luthier.cli._progress import _memory_line

PARTS = {
    "activations": 1_234_567_890, "gradients": 123_456_789, "logits": 402_653_184, "optimiser": 246_913_578,
    "other": 98_765_432, "program": 412_345_678, "trained": 123_456_789, "weights": 538_060_288,
}  # fmt: skip


def test_the_peak_and_its_largest_parts_stand_in_one_line() -> None:
    line = _memory_line(PARTS, sum(PARTS.values()))
    assert line == "3.18 GB (activations 1.23 GB, weights 538.1 MB, program 412.3 MB)"
    assert len(line) <= WIDTH


def test_small_parts_and_what_was_never_held_at_once_are_left_out() -> None:
    assert _memory_line({"weights": 900, "other": -50, "optimiser": 3}, 1000) == "1.0 kB (weights 900 B)"
    assert _memory_line({}, 1000) == "1.0 kB"
    assert _memory_line({}, None) == "not measured"
