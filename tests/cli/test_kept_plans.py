"""Counts of a plan are read again where nothing has changed, and counted anew where anything has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Call
from cli.test_plan import LLAMA_7B

from luthier.cli import _kept_plans

MANY = "lora,ia3,bitfit,full,vera,dora,prompt_tuning,prefix_tuning,head_only,layernorm_tuning,compacter,lst,mam"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 1, "hidden_size": 64}))
    return path


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "plans").glob("*.json"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each plan that is made."""
    from luthier.cli import plan

    made, whole = [], plan._made

    def noted(*args: Any) -> Any:
        made.append(1)
        return whole(*args)

    monkeypatch.setattr(plan, "_made", noted)
    return made


def test_the_second_answer_is_the_first_and_loads_no_torch(luthier: Call, config: Path, tmp_path: Path) -> None:
    words = ("plan", config, "--method", MANY, "--device", "24GB")
    first, screen = luthier(*words, "--json"), luthier(*words).out
    code = (
        "import sys; from luthier.cli import main; main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    for more, wanted in ((("--json",), first.out), ((), screen)):
        ran = subprocess.run([sys.executable, "-c", code, *map(str, (*words, *more))], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, wanted), ran.stderr
    assert len(kept(tmp_path)) == 1
    narrow = luthier("plan", config, "--method", MANY, "--device", "1MB", "--json").json["rows"]
    assert {row["fits"] for row in narrow if row["held"]} == {"no"}, "what fits is asked of the device each time"


def test_what_differs_is_counted_anew(
    luthier: Call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, made = ("plan", config, "--method", MANY, "--json"), counted(monkeypatch)
    first = luthier(*words).json
    assert len(made) == 1 and luthier(*words).json["rows"] == first["rows"] and len(made) == 1
    luthier(*words, "--set", "rank=3")
    luthier(*words, "--optimiser", "sgd", "--lr", "0.1")
    luthier(*words, "--task", "classification", "--labels", "3")
    luthier(*words, "--task", "classification", "--labels", "4")
    luthier("plan", config, "--method", f"{MANY},lora:rank=3", "--json")
    assert len(made) == 6
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    luthier(*words)
    assert len(made) == 7
    monkeypatch.setattr(_kept_plans, "version", lambda name: "0.0")
    luthier(*words)
    assert len(made) == 8
    config.write_text(config.read_text().replace('"vocab_size": 32000', '"vocab_size": 999'))
    assert luthier(*words).json["numbers"] < first["numbers"] and len(made) == 9


@pytest.mark.parametrize("damage", ["half", "number", "nothing", "list"])
def test_a_damaged_file_is_counted_anew_and_mended(
    luthier: Call, config: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, made = ("plan", config, "--method", MANY, "--device", "24GB", "--json"), counted(monkeypatch)
    whole = luthier(*words).out
    (path,) = kept(tmp_path)
    text = path.read_text()
    trained = json.loads(text)["rows"]["lora"]["row"]["held"]["trained"]
    other = {"half": text[: len(text) // 2], "nothing": "", "list": "[1]"}
    path.write_text(other.get(damage, text.replace(f'"trained": {trained}', f'"trained": {trained + 1}')))
    assert path.read_text() != text
    assert luthier(*words).out == whole and len(made) == 2
    assert luthier(*words).out == whole and len(made) == 2, "it was not mended"


def test_nothing_is_kept_where_that_was_asked_or_cannot_be(
    luthier: Call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("plan", config, "--method", MANY, "--json")
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", "0")
    assert luthier(*words).code == 0 and not kept(tmp_path)
    monkeypatch.delenv("LUTHIER_ENCODED_GIB")
    monkeypatch.setenv("LUTHIER_PLAIN", "1")
    assert luthier(*words).code == 0 and not kept(tmp_path)
    monkeypatch.delenv("LUTHIER_PLAIN")
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert luthier(*words).code == 0
    monkeypatch.setattr(_kept_plans, "may_have_gpu", lambda: True)
    from luthier.runs.devices import device_of
    from luthier.runs.spec import RunSpec

    spec = RunSpec.from_plain({"model": str(config), "data": {"source": "-"}})
    assert _kept_plans.address(str(config), ["lora"], spec, device_of("this"), None) is None
    assert _kept_plans.address(str(config), ["lora"], spec, device_of("24GB"), None) is not None
    assert _kept_plans.address(str(config), ["lora+mine"], spec, device_of("24GB"), None) is None


def test_what_is_said_and_refused_is_so_again(
    luthier: Call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.cli import plan

    monkeypatch.setattr(plan, "MOST", 1)
    words = ("plan", config, "--device", "24GB", "--max-length", "9999")
    first, second = (luthier(*words, "--method", "bitfit,ia3") for _ in range(2))
    assert "--max-length 9999: the model reads 2048 tokens" in first.err and second.err == first.err
    assert luthier(*words, "--method", "bitfit,ia3,lora", "--set", "rank=3").code == 0
    refused = luthier(*words, "--method", "bitfit,ia3", "--set", "rank=3")
    assert refused.code == 2 and "no method that is asked about has a setting 'rank'" in refused.err


def test_nothing_is_kept_of_a_strategy_of_ones_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.runs.devices import device_of
    from luthier.runs.spec import RunSpec

    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "mine.py").write_text(
        'from luthier.training.strategy import STRATEGIES, Strategy\n\n\n@STRATEGIES.register("mine", family="loss")\n'
        "class Mine(Strategy):\n    extra_passes = 1.0\n"
    )
    monkeypatch.setenv("LUTHIER_SHELF", str(tmp_path / "shelf"))
    assert _kept_plans.STRATEGIES.places()["mine"].origin.startswith("folder")
    for strategy, is_kept in (("l2_sp", True), ("mine", False), ("l2_sp+mine", False)):
        spec = RunSpec.from_plain({"model": str(config), "data": {"source": "-"}, "strategy": strategy})
        found = _kept_plans.address(str(config), ["lora"], spec, device_of("24GB"), None)
        assert (found is not None) == is_kept


def test_old_files_go(luthier: Call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept_plans, "MOST", 2)
    for rank in (1, 2, 3):
        assert luthier("plan", config, "--method", MANY, "--set", f"rank={rank}").code == 0
    assert len(kept(tmp_path)) == 2
