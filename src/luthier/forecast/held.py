"""What a method holds on a model, to the byte, from its edits on the meta device: no weight is read, nothing drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luthier.anatomy import Anatomy
from luthier.surgery import frozen_layers
from luthier.surgery.base import Base
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.edits import (
    AddBranch,
    Attach,
    Attend,
    Edit,
    Linearise,
    LookFirst,
    PrependKeys,
    PrependTokens,
    Reparametrise,
    Unfreeze,
)
from luthier.surgery.install import Installer, check, edits_of
from luthier.surgery.method import Method
from luthier.surgery.unfrozen import WORTH_HALVING

__all__ = ["Held", "Skeleton", "held"]

FP32 = 4  # trained numbers are fp32 whatever the base is held in

_MAKERS = frozenset({
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm,
    torch.arange, torch.linspace, torch.eye, torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.normal,
})  # fmt: skip
_FILLERS: frozenset[Any] = frozenset(
    {
        Tensor.uniform_,
        Tensor.normal_,
        Tensor.zero_,
        Tensor.fill_,
        nn.init.kaiming_uniform_,
        nn.init.uniform_,
        nn.init.normal_,
    }
)
_READERS: frozenset[Any] = frozenset({Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__})


class _NothingIsDrawn(TorchFunctionMode):
    """Tensors are made on the meta device even where a method asks for another: the places of fourierft take a second
    a layer to draw, and none of them is looked at here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MAKERS:
            kwargs = {**(kwargs or {}), "device": "meta"}
            kwargs.pop("generator", None)
        elif func in _FILLERS:
            tensor = args[0] if args else kwargs["tensor"]  # torch.nn.init hands its own functions on by name
            if tensor.is_meta:
                return tensor
        elif func in _READERS and args[0].is_meta:
            return 1 if func is Tensor.__int__ else 1.0
        return func(*args, **(kwargs or {}))


@contextmanager
def _only_shapes() -> Iterator[None]:
    """Entered where something is made, and left before it is counted: each look at a tensor costs ten times in it."""
    with _NothingIsDrawn(), torch.device("meta"):
        yield


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes by part, counted as `luthier.training.memory_parts` counts them in a run.

    Attributes:
        trained: numbers that may move, a new head's left out; a mask counts what it lets move.
        head: numbers of a new task head, or of what else no checkpoint filled.
        stored: bytes of the tensors that are saved.
        weights: of the base, what a method adds to it and keeps still, and the values that are given back.
        numbers: of the tensors that train.
        gradients, moments: of the same, gradients at most.
        packed: copies of frozen weights that a CPU with fast bf16 products is given (`luthier.kernels.packed`), where
            the base is held in bf16. No part of `bytes`: elsewhere there are none.
    """

    trained: int
    head: int
    stored: int
    weights: int
    numbers: int
    gradients: int
    moments: int
    packed: int = 0

    @property
    def bytes(self) -> int:
        """All of it together, as if it were held at one time."""
        return self.weights + self.numbers + self.gradients + self.moments

    @property
    def standing(self) -> int:
        """What is held at every moment of a step: gradients come and go."""
        return self.weights + self.numbers + self.moments


class Skeleton:
    """A model on the meta device that many methods are counted on.

    Args:
        halves: the base's numbers were stored in bf16, so what is kept of them is.
        fresh: tensors that no checkpoint fills, beside a head's.
    """

    def __init__(self, model: Any, *, halves: bool = False, fresh: tuple[str, ...] = ()) -> None:
        self.edited = EditedModel(model, fresh)
        self.anatomy, self.halves = self.edited.anatomy, halves
        self.bytes = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
        self.linear = list(_linear(self.edited))
        self._installer = Installer(self.edited, None)  # type: ignore[arg-type]  # nothing is installed by it

    def base(self, site: Any) -> Base:
        """The layer of a site."""
        return Base(self.edited.modules[site.path], site, partial(self._installer.beside, site))

    def query(self, edit: Attend) -> Any:
        """The site whose layer an attention of one's own is built from.

        Raises:
            AnatomyError: its projections are not told apart.
        """
        return self._installer.query_of(edit.attention, "this method")


def held(method: Method, skeleton: Skeleton, optimiser: str = "adamw") -> Held:
    """Count what `method` holds on the model.

    Args:
        optimiser: adamw, sgd or lomo.

    Raises:
        LuthierError: the method cannot be put on this model; the reason.
    """
    anatomy = skeleton.anatomy
    with _only_shapes():
        edits = edits_of(method, skeleton.edited, 0, train_head=True)
        trained = method.n_params(anatomy)
    check(skeleton.edited, edits, method)
    found = _Count(skeleton, edits, alike=True)
    if found.attached + found.unfrozen != trained:
        found = _Count(skeleton, edits, alike=False)  # sites of one shape are not alike: every one is made
    return Held(
        trained=trained,
        head=found.head,
        stored=_stored(method, anatomy, found),
        weights=skeleton.bytes - found.taken + found.fixed + found.kept + FP32 * _beside(method, anatomy),
        numbers=found.numbers,
        gradients=max(found.sizes, default=0) if optimiser == "lomo" else found.numbers,
        moments=2 * found.numbers if optimiser == "adamw" else 0,
        packed=_packed(skeleton, found.freed),
    )


def _linear(edited: EditedModel) -> Iterable[tuple[str, str, int]]:
    """(name of the weight, of the bias, bytes) of the layers that may be packed, in the order of `accelerate`."""
    head, done = edited.model.get_output_embeddings(), set[int]()
    for path, module in edited.modules.items():
        if type(module) is not nn.Linear or module is head or id(module) in done:
            continue
        done.add(id(module))
        weight = module.weight
        if min(weight.shape) >= frozen_layers.MIN_WIDTH and weight.dtype == torch.bfloat16:
            yield edited.anatomy.tied.get(f"{path}.weight", f"{path}.weight"), f"{path}.bias", weight.nbytes


def _packed(skeleton: Skeleton, trained: set[str]) -> int:
    """Bytes of the layers that `FastPath.accelerate` packs, in its order and as far as its budget goes."""
    left = frozen_layers.BUDGET_BYTES
    for weight, bias, n_bytes in skeleton.linear:
        if n_bytes <= left and not {weight, bias} & trained:
            left -= n_bytes
    return frozen_layers.BUDGET_BYTES - left


def _beside(method: Method, anatomy: Anatomy) -> int:
    """Numbers that modifiers put on the attachments of the others, once these are there."""
    acting = [part for part in method.parts() if not part.modifies]
    return sum(part.n_beside(acting, anatomy) for part in method.parts() if part.modifies)


def _stored(method: Method, anatomy: Anatomy, found: _Count) -> int:
    """Numbers as wide as each method stores them, the head's, and a bit for each that a modifier can hold at zero."""
    parts = method.parts()
    own = (Method.leaves_out, Method.n_beside)
    if any(part.modifies and (type(part).leaves_out, type(part).n_beside) == own for part in parts):
        return FP32 * (method.n_stored(anatomy) + found.head) + -(-found.attached // 8)
    own_width = sum(part.stored_width * part.n_stored(anatomy) for part in parts)
    return own_width + FP32 * (found.head + _beside(method, anatomy))


class _Count:
    """Bytes of the modules and tensors that a list of edits asks for.

    Args:
        alike: make one attachment for all sites of one kind and shape, and count it as often.

    Attributes:
        attached, unfrozen, head: numbers that train.
        numbers, fixed: bytes of tensors that train, and of those of modules that do not.
        taken, kept: bytes of the base's tensors that train, and of the values that they are given back.
        sizes: bytes of each tensor that trains.
        freed: names of the base's tensors that train.
    """

    def __init__(self, skeleton: Skeleton, edits: Iterable[tuple[str, Edit]], *, alike: bool) -> None:
        self._skeleton, self._alike = skeleton, alike
        self._seen: dict[int, Tensor] = {}  # held, so that no other gets its id
        self._made: dict[Any, tuple[int, int, int]] = {}
        self.attached = self.unfrozen = self.head = 0
        self.numbers = self.fixed = self.taken = self.kept = 0
        self.sizes: list[int] = []
        self.freed: set[str] = set()
        for prefix, edit in edits:
            for shared in getattr(edit, "shared", {}).values():
                self._add(shared)
            if isinstance(edit, Unfreeze):
                self._unfreeze(prefix, edit)
            elif isinstance(edit, Attach | Attend):
                self._attach(prefix, edit)
            elif not isinstance(edit, Linearise):
                self._add(self._module_of(edit))

    def _module_of(self, edit: Reparametrise | PrependTokens | PrependKeys | AddBranch | LookFirst) -> nn.Module:
        if isinstance(edit, AddBranch):
            with _only_shapes():
                return edit.build(self._skeleton.edited.model, self._skeleton.anatomy)
        return edit.module if isinstance(edit, Reparametrise | LookFirst) else edit.source

    def _attach(self, prefix: str, edit: Attach | Attend) -> None:
        site = edit.site if isinstance(edit, Attach) else self._skeleton.query(edit)
        kind = (prefix, type(edit), site.kind, site.part, site.d_in, site.d_out, site.bias is None)
        if self._alike and kind in self._made:
            attached, numbers, fixed = self._made[kind]
            self.attached += attached
            self.numbers += numbers
            self.fixed += fixed
            return
        before = self.attached, self.numbers, self.fixed
        with _only_shapes():
            made = edit.build(self._skeleton.base(site))
        self._add(made)
        after = self.attached, self.numbers, self.fixed
        self._made[kind] = tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[assignment]

    def _add(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in self._seen:
                continue
            self._seen[id(tensor)] = tensor
            if not tensor.requires_grad:
                self.fixed += tensor.nbytes
                continue
            self.attached += tensor.numel()
            self.numbers += FP32 * tensor.numel()
            self.sizes.append(FP32 * tensor.numel())

    def _unfreeze(self, prefix: str, edit: Unfreeze) -> None:
        edited = self._skeleton.edited
        name = edited.anatomy.tied.get(edit.name, edit.name)
        parameter = edited.parameters[name]
        self.freed.add(name)
        n = parameter.numel()
        if prefix == "head":
            self.head += n
        else:
            self.unfrozen += n
        self.taken += parameter.nbytes
        self.numbers += FP32 * n
        self.sizes.append(FP32 * n)
        half = parameter.dtype == torch.float32 and self._skeleton.halves and prefix != "head" and edit.mask is None
        self.kept += 2 * n if half and n >= WORTH_HALVING else parameter.nbytes
