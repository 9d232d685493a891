"""Counts that a plan made, kept between calls: the same question about the same configuration loads no library.

<cache>/plans/<digest>.json    {"digest": of the rest, "answer": ..., "rows": {method: ...}}

The name is a digest of everything that a count depends on: the configuration, the weights' names and types, the task,
the spec, the kind of device, this processor, the environment's switches, the versions of the libraries and the text of
every file of ours. What differs has another name, so nothing stale can be read; what is damaged is counted anew. No
torch here.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import luthier
from luthier.cli._shelf import SHELF, STRATEGIES
from luthier.core import Catalogue, plain
from luthier.core.shelves import OURS
from luthier.runs import kept_json
from luthier.runs.devices import Device, may_have_gpu
from luthier.runs.spec import RunSpec
from luthier.trust.model import cache_folder, check_config, check_folder

__all__ = ["Kept", "address", "keep", "read"]

MOST = 64  # files; what was written longest ago goes first
SWITCHES = ("LUTHIER_", "ATEN_", "DNNL_", "ONEDNN_", "MKL_", "PYTORCH_", "TORCH_", "TRANSFORMERS_")
PLACES = ("LUTHIER_CACHE", "LUTHIER_COMPLETE", "LUTHIER_FAULT")  # begin as switches do, and change no count
LIBRARIES = ("torch", "transformers", "numpy")
FORMAT = 2


class Kept(SimpleNamespace):
    """What was kept of a plan, by the names that it has itself, and what the screen asks of it beside.

    Attributes:
        plain: as `--json` has it.
        outputs: of the task's head; None where it has none of its own.
        has_weights: whether there are files of weights.
        said: what was said while it was made.
    """


def address(model: str, names: Sequence[str], spec: RunSpec, device: Device, labels: int | None) -> Path | None:
    """The file for these counts; None where they are counted anew each time.

    They are for methods and strategies of one's own, whose files may import others; for names of the hub; where a GPU
    may be, which torch alone can tell; and where LUTHIER_PLAIN or LUTHIER_ENCODED_GIB=0 say that nothing is to be kept.

    Raises:
        ModelError, Refused: there is such a model, and it cannot or must not be used.
    """
    if os.environ.get("LUTHIER_PLAIN") == "1" or os.environ.get("LUTHIER_ENCODED_GIB") in ("0", "0.0"):
        return None
    methods = {part for name in names for part in name.partition(":")[0].split("+")}
    followed = {word.strip() for word in (spec.strategy or "").split("+") if word.strip()}
    if not (_all_ours(SHELF, methods) and _all_ours(STRATEGIES, followed)) or (device.here and may_have_gpu()):
        return None
    told = _of_model(model)
    if told is None:
        return None
    run = {k: v for k, v in plain(spec).items() if k not in ("data", "model", "method", "out", "seed")}
    # A setting that none of them has is refused, however many are kept.
    asked = sorted(names) if spec.settings else None
    facts = {
        "format": FORMAT, "asked": asked, "model": [model, *told], "run": run, "labels": labels,
        "device": [device.kind, device.here, device.bf16], "made_by": _makers(),
    }  # fmt: skip
    text = json.dumps(facts, ensure_ascii=True)  # unsorted: the order of a configuration's labels is theirs
    return cache_folder().expanduser() / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


def _all_ours(shelf: Catalogue[Any], names: set[str]) -> bool:
    places = shelf.places() if names else {}
    return all(name in places and places[name].origin == OURS for name in names)


def _of_model(name: str) -> list[Any] | None:
    """What the model's own files tell a count; None where they are not here."""
    path = Path(name).expanduser()
    if name.startswith("sample:"):
        from luthier import samples

        short = name.removeprefix("sample:")
        if not samples.is_cached(short):
            return None
        path = samples.model_path(short)
    if path.is_dir() and any(path.glob("*.safetensors")):
        folder = check_folder(path)
        return [dict(folder.config), sorted(folder.shapes), sorted(set(folder.dtypes.values()))]
    path = path / "config.json" if path.is_dir() else path
    return [check_config(path)] if path.is_file() and path.suffix.lower() == ".json" else None


def _makers() -> list[str]:
    """Who counts: our own text, the libraries, this processor, and the switches of the environment."""
    summed = hashlib.sha256()
    for path in sorted(Path(str(luthier.__file__)).parent.rglob("*.py")):
        summed.update(path.read_bytes())
    versions = []
    for library in LIBRARIES:
        try:
            versions.append(f"{library} {version(library)}")
        except PackageNotFoundError:  # imported from a folder: nothing tells which it is
            versions.append(f"{library} {os.urandom(8).hex()}")
    switches = [
        f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(SWITCHES) and not k.startswith(PLACES)
    ]
    return [summed.hexdigest(), *versions, sys.version, platform.machine(), _processor(), *switches]


def _processor() -> str:
    """What decides how this machine multiplies."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return line.partition(":")[2].strip()
    return platform.processor()


def read(path: Path, names: Sequence[str], device: Device) -> Kept | None:
    """The plan for these methods; None where one of them was not counted yet, or the file is damaged."""
    content = kept_json.kept(path)
    if not content or any(name not in content["rows"] for name in names):
        return None
    rows = [content["rows"][name] for name in names]
    values, outputs, weights, said = (content[key] for key in ("answer", "outputs", "weights", "said"))
    answer = values | {"device": plain(device), "rows": [_fitted(row, device) for row in rows]}
    answer = {key: answer[key] for key in content["order"]}
    found = json.loads(json.dumps(answer), object_hook=lambda one: SimpleNamespace(**one))
    return Kept(**vars(found), plain=answer, outputs=outputs, has_weights=weights, said=said)


def _fitted(row: dict[str, Any], device: Device) -> dict[str, Any]:
    standing = row["standing"]
    fits = "no" if standing is not None and standing > device.memory else "?"
    return {key: fits if key == "fits" else value for key, value in row["row"].items()}


def keep(path: Path, found: Any, has_weights: bool, said: Sequence[str]) -> None:
    """Keep a plan beside what is kept already. Where it cannot be written, the next call counts anew.

    Args:
        found: a plan without activations: nothing in it depends on what else this machine does.
        said: what was said while it was made.
    """
    whole = plain(found)
    rows = {
        row.name: {"row": told, "standing": row.held.standing if row.held is not None else None}
        for row, told in zip(found.rows, whole["rows"], strict=True)
    }
    content = {
        "order": list(whole), "answer": {k: v for k, v in whole.items() if k not in ("rows", "device")},
        "outputs": found.task.n_outputs, "weights": has_weights, "said": list(said),
        "rows": kept_json.kept(path).get("rows", {}) | rows,
    }  # fmt: skip
    kept_json.keep(path, content, MOST)
