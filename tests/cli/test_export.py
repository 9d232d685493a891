"""`luthier export` as a user calls it."""

from pathlib import Path

from cli.conftest import Call
from safetensors.torch import load_file


def test_a_run_of_lora_is_written_for_peft_and_never_over_something(luthier: Call, model: Path, rows: Path) -> None:
    words = ("train", model, "--data", rows, "--steps", 6, "--threads", 1, "--precision", "fp32", "--out", "run")
    assert luthier(*words).code == 0
    answer = luthier("export", "run", "adapter", "--json")
    assert answer.code == 0 and answer.json["format"] == "peft"
    assert set(answer.json["bytes"]) == {"adapter_config.json", "adapter_model.safetensors"}
    names = list(load_file("adapter/adapter_model.safetensors"))
    assert names and all(name.startswith("base_model.model.") for name in names)
    again = luthier("export", "run", "adapter")
    assert again.code == 2 and "is there already" in again.err


def test_a_method_that_peft_does_not_have_is_refused(luthier: Call, finished: Path) -> None:
    answer = luthier("export", finished, "adapter")
    assert answer.code == 3 and "lora, dora and ia3" in answer.err
    assert not Path("adapter").exists()
