"""What a method attaches, by shape, without a model: built once on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from luthier.anatomy import Anatomy, Site
from luthier.core import CompositionError
from luthier.surgery.base import Base
from luthier.surgery.edits import Attach, Edit, LookFirst, PrependKeys, PrependTokens, Reparametrise
from luthier.surgery.method import Method

__all__ = ["matrices", "numbers", "reserved_positions"]


def matrices(method: Method, anatomy: Anatomy) -> list[tuple[int, ...]]:
    """Shapes of all trained tensors of two dimensions or more that `method` puts beside the model; shared ones once.

    Raises:
        CompositionError: the method attaches something that only a model can tell.
    """
    found: list[tuple[int, ...]] = []
    shared: set[str] = set()
    with torch.device("meta"):
        for edit in method.edits(anatomy):
            for key, module in getattr(edit, "shared", {}).items():
                if key not in shared:
                    shared.add(key)
                    found += _of(module)
            found += [shape for module in _made(edit, method, anatomy) for shape in _of(module)]
    return [shape for shape in found if len(shape) > 1]


def reserved_positions(method: Method, anatomy: Anatomy) -> int:
    """Positions that `method` takes for tokens of its own."""
    with torch.device("meta"):
        return sum(edit.length for edit in method.edits(anatomy) if isinstance(edit, PrependTokens))


def numbers(method: Method, anatomy: Anatomy, which: Callable[[Edit], bool]) -> int:
    """Trained numbers of what `method` attaches by the edits that `which` is true of, shared ones left out."""
    with torch.device("meta"):
        made = [m for edit in method.edits(anatomy) if which(edit) for m in _made(edit, method, anatomy)]
    return sum(math.prod(shape) for module in made for shape in _of(module))


def _of(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters() if p.requires_grad]


def _made(edit: Edit, method: Method, anatomy: Anatomy) -> list[nn.Module]:
    if isinstance(edit, Attach):
        return [edit.build(_base(edit.site, anatomy))]
    if isinstance(edit, Reparametrise | LookFirst):
        return [edit.module]
    if isinstance(edit, PrependKeys | PrependTokens):
        return [edit.source]
    if type(edit).__name__ == "AddBranch":
        raise CompositionError(f"{method.name} puts a network beside the model; its matrices cannot be masked.")
    return []


def _base(site: Site, anatomy: Anatomy) -> Base:
    def beside(kind: str, part: str) -> Base:
        block = (s for s in anatomy.all_sites if (s.stack, s.layer) == (site.stack, site.layer))
        return _base(next(s for s in block if s.kind == kind and part in ("", s.part)), anatomy)

    return Base(_layer(site, anatomy), site, beside)


def _layer(site: Site, anatomy: Anatomy) -> nn.Module:
    """Something with a weight and a bias of the right shapes."""
    layer = nn.Module()
    for short in (site.param, site.bias):
        name = f"{site.path}.{short}"
        shape = anatomy.tensors.get(anatomy.tied.get(name, name))
        if short is not None and shape is not None:
            layer.register_parameter(short, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return layer
