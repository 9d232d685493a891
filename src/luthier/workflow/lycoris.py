"""LoKr and LoHa between a run of ours and a file of LyCORIS; what the file adds to each weight is compared first."""

from __future__ import annotations

from pathlib import Path

from luthier.core import BadInput, ConfigError, IntegrityError
from luthier.core.places import refuse_taken
from luthier.surgery.compose import spell
from luthier.surgery.lycoris_files import from_lycoris, read_back, to_lycoris
from luthier.workflow.export import Exported
from luthier.workflow.import_peft import Imported, base_of
from luthier.workflow.load_model import find_model
from luthier.workflow.prediction import Predictor

__all__ = ["export_lycoris", "import_lycoris"]

ROUNDING = 1e-5  # of the largest entry of an update


def export_lycoris(run: Path | str, folder: Path | str) -> Exported:
    """Write a finished run of lokr or loha as a file of LyCORIS.

    Raises:
        CannotMerge: another method, or a run with a head of its own.
        IntegrityError: read again, the file adds something else.
    """
    predictor = Predictor(Path(run))
    path = to_lycoris(predictor.tuned, folder)
    gap = _checked(read_back(predictor.tuned, path), path)
    line = f"lycoris.create_lycoris_from_weights(1.0, {str(path)!r}, model)"
    return Exported(Path(folder), line, (f"read again, it adds what the tuning adds, to {gap:.1g} of its size",))


def import_lycoris(file: Path | str, out: Path | str, *, model: str | None) -> Imported:
    """Write a file of LyCORIS as a tuning that `luthier.load` reads.

    Raises:
        ConfigError: `out` is there, no base is named, or something that we do not compute.
        BadInput, Refused: a file or base that cannot be used.
        IntegrityError: tensors are missing or of other shapes, or add something else.
    """
    file, out = Path(file), Path(out)
    refuse_taken(out, deep=True)
    if not file.is_file():
        raise BadInput(f"{file}: is no file.")
    if not model:
        raise ConfigError(f"{file}: a file of LyCORIS names no base. Name it: --model.")
    tuned = from_lycoris(base_of(find_model(model).path), file)
    gap = _checked(read_back(tuned, file), file)
    tuned.save(out)
    said = f"at every layer it adds to the weight what the file says, to {gap:.1g} of its size"
    return Imported(out, spell(tuned.tuning().method), model, None, 0.0, (said,))


def _checked(gap: float, path: Path) -> float:
    if not gap <= ROUNDING:
        raise IntegrityError(
            f"{path}: by the rule of LyCORIS it adds something else, off by {gap:.2g}. Please report it."
        )
    return gap
