"""Rows of tables in peft's files: it stores the rows as they are, a tuning of ours what was added to them."""

from torch import Tensor

from luthier.surgery import PEFT_LAYERS, PeftIn, PeftOut, PeftTaken, PeftWhole

__all__ = ["rows_form"]

_THERE = ".trainable_tokens_delta"


def rows_form() -> PeftWhole:
    """The form of a method with the settings `tokens` and `output_matrix`, whose modules hold `moves`."""
    return PeftWhole("TRAINABLE_TOKENS", out=_out, back=_back, also=("token_indices",), heads=False)


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors, paths = {}, []
    for key, moves in going.stored.items():
        name = key.removeprefix("tensor/").removesuffix(".moves")
        rows = list(going.method.tokens) or list(range(len(moves)))
        paths.append(name.rpartition(".")[0])
        tensors[f"{PEFT_LAYERS}{paths[-1]}{_THERE}"] = going.own(name).detach()[rows].cpu() + moves
    return tensors, {"target_modules": paths, "token_indices": rows}


def _back(coming: PeftIn) -> PeftTaken:
    rows = [int(i) for i in coming.facts["token_indices"]]
    held = {n.removeprefix(PEFT_LAYERS).removesuffix(_THERE): t for n, t in coming.tensors.items()}
    held = {path: t for path, t in held.items() if f"{path}.weight" not in coming.anatomy.tied}  # said twice there
    stored = {
        f"tensor/{path}.weight.moves": t - coming.own(f"{path}.weight").detach()[rows].cpu() for path, t in held.items()
    }
    return PeftTaken({"tokens": rows, "output_matrix": len(held) > 1}, stored)
