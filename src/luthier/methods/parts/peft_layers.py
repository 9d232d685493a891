"""Files of peft whose layers share numbers: tensors of each layer, and some that the whole model has once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge
from luthier.surgery import PeftIn, PeftOut, PeftTaken, PeftWhole

__all__ = ["check_order", "shared_form"]


def check_order(anatomy: Anatomy, paths: Iterable[str], name: str) -> None:
    """Refuse a method whose draws follow the order of the layers, where peft meets them in another one.

    Raises:
        CannotMerge: with the layer that stands elsewhere.
    """
    order = {path.rpartition(".")[0]: i for i, path in enumerate(reversed(list(anatomy.tensors)))}
    listed = list(paths)
    there = sorted(listed, key=lambda path: -order.get(path, 0))
    strange = next((path for path, other in zip(listed, there, strict=True) if path != other), None)
    if strange is not None:
        raise CannotMerge(
            f"{name}: what is drawn follows the order of the layers, and {strange} stands elsewhere in peft's. Export "
            "the merged model instead."
        )


def shared_form(
    type_: str,
    parts: Mapping[str, str],
    once: Mapping[str, str],
    said: Callable[[Any], dict[str, Any]] = lambda method: {},
    *,
    in_order: bool = False,
    **form: Any,
) -> PeftWhole:
    """The form of a method with tensors of its layers and of all of them together.

    Args:
        parts: our name at a layer -> peft's; none where the layers have none of their own.
        once: our canonical name -> peft's whole name.
        said: what peft's configuration says beside the settings.
        in_order: what is drawn follows the order of the layers.
        form: of `PeftForm`.
    """

    def out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if in_order:
            check_order(going.anatomy, (site.path for site in going.sites.values()), going.method.name)
        shared = {theirs: going.stored[ours] for ours, theirs in once.items()}
        return {**going.by_layer(parts), **shared}, said(going.method)

    def back(coming: PeftIn) -> PeftTaken:
        if parts:
            words, stored = coming.by_layer({theirs: ours for ours, theirs in parts.items()})
        else:
            words, stored = coming.by_target(), {}
        return PeftTaken({"sites": words}, {**stored, **{o: coming.tensor(t) for o, t in once.items()}})

    return PeftWhole(type_, out=out, back=back, **form)
