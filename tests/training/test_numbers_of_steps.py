"""What methods are told of the step: the same number at every moment of it, from one to the last."""

from pathlib import Path
from typing import Any

import pytest
from little import little_spec

from luthier.surgery import method
from luthier.workflow import train


def test_methods_hear_the_numbers_of_their_steps_from_one_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int, int]] = []
    kind = type(method("lora"))
    for moment in ("after_backward", "on_step"):
        inner = getattr(kind, moment)

        def told(self: Any, tuned: Any, step: int, total: int, inner: Any = inner, moment: str = moment) -> None:
            heard.append((moment, step, total))
            inner(self, tuned, step, total)

        monkeypatch.setattr(kind, moment, told)
    train(little_spec(tmp_path, "lora", steps=4, out=str(tmp_path / "run")))
    assert heard == [(moment, step, 4) for step in (1, 2, 3, 4) for moment in ("after_backward", "on_step")]
