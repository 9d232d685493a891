"""What held the memory of a run, as `luthier train` ends with it."""

import io

from luthier.cli._output import WIDTH, Screen
from luthier.cli._progress import _memory_rows

PARTS = {
    "activations": 1_234_567_890, "gradients": 123_456_789, "logits": 402_653_184, "optimiser": 246_913_578,
    "other": 98_765_432, "program": 412_345_678, "trained": 123_456_789, "weights": 538_060_288,
}  # fmt: skip


def drawn(memory: dict[str, int]) -> list[str]:
    out = io.StringIO()
    peak = sum(memory.values())
    Screen(as_json=False, out=out, err=out).table(
        ("peak memory", "held", ""), _memory_rows(memory, peak), right=("held",)
    )
    return out.getvalue().splitlines()


def test_every_part_has_one_line_of_at_most_80_columns() -> None:
    lines = drawn(PARTS)
    assert len(lines) == 2 + len(PARTS) + 1  # head, rule, the parts and their sum
    assert max(map(len, lines)) <= WIDTH
    names = [line.split()[0] for line in lines[2:]]
    assert names == [
        "program", "weights", "trained", "gradients", "optimiser", "activations", "logits", "other", "together",
    ]  # fmt: skip


def test_parts_that_come_to_more_than_the_peak_say_so() -> None:
    lines = drawn({**PARTS, "other": -5_000_000})
    assert any("-5.0 MB" in line and "never held all at once" in line for line in lines)


def test_a_gpus_memory_holds_no_program() -> None:
    lines = drawn({n: b for n, b in PARTS.items() if n != "program"})
    assert "GPU" in lines[-1] and not any("program" in line for line in lines)
