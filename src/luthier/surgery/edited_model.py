"""The state that all of surgery shares: a model, its own layers and tensors by name, and what stands on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, UnknownName, near
from luthier.core.protocols import Model
from luthier.kernels import StoredLinear
from luthier.surgery.context import Context
from luthier.surgery.socket import Socket
from luthier.surgery.tuning import Tuning

__all__ = ["EditedModel"]


class EditedModel:
    """A model whose layers can be edited, and the tunings on it.

    Attributes:
        modules, parameters: the model's own, by every name they have, as they were before the first edit.
        stored: layers whose weight is held in codes, by the name of the weight.
        context: facts of the current forward pass.
        base_copies: while folded, tensors of the base and their values before.
        digests: of the base or its trunk, rounded to each type that somebody asked for; see tuning_files.py.
        followers: called after each change of what acts, when the sockets know of it.
    """

    def __init__(self, model: Model, new_tensors: Sequence[str] = ()) -> None:
        self.model = model
        anatomy = Anatomy.read(model)
        # A pooler that the checkpoint lacks is random: it has to learn, whatever the method.
        fresh = tuple(n for n in new_tensors if n not in anatomy.head_tensors)
        self.anatomy = replace(anatomy, head_tensors=anatomy.head_tensors + fresh)
        self.context = Context()
        self.tunings: dict[str, Tuning] = {}
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        self.stored: dict[str, StoredLinear] = {
            f"{path}.weight": module for path, module in self.modules.items() if isinstance(module, StoredLinear)
        }
        self.base_copies: list[tuple[Tensor, Tensor]] | None = None
        self.digests: dict[tuple[torch.dtype, bool], str] = {}
        self.followers: list[Callable[[], None]] = []
        self._required = {name: p.requires_grad for name, p in self.parameters.items()}
        self._sockets: dict[str, Socket] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}  # where each socket stands: (parent, name in it)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.add_module("luthier", _TuningModules(self))

    def __deepcopy__(self, memo: Any) -> Any:
        raise ConfigError(
            "a tuned model cannot be copied: its hooks would act on the original. Copy the base before attaching (or "
            "load it again) and attach or load the tuning there; tuned.base_only() gives the base as a reference."
        )

    # ------------------------------------------------------------------ tunings

    @property
    def folded(self) -> bool:
        """Whether the weights hold what the active tunings do."""
        return self.base_copies is not None

    def refuse_folded(self, doing: str) -> None:
        """Raises: ConfigError, while the tunings are folded into the weights."""
        if self.folded:
            raise ConfigError(f"{doing}: the tunings are folded into the weights. Call tuned.merging.unfold() first.")

    def tuning(self, name: str | None = None) -> Tuning:
        """The tuning called `name`; with one tuning on the model the name may be left out.

        Raises:
            UnknownName: none is called so, or the name is missing where there are several.
        """
        if name is None and len(self.tunings) == 1:
            return next(iter(self.tunings.values()))
        if name is None:
            raise UnknownName(f"the model has {len(self.tunings)} tunings; name one of {', '.join(self.tunings)}.")
        if name not in self.tunings:
            known = list(self.tunings)
            raise UnknownName(
                f"No tuning is called {name!r}.{near(name, known)} The model has {', '.join(known) or 'none'}."
            )
        return self.tunings[name]

    def active(self) -> list[Tuning]:
        """The tunings that act."""
        return [t for t in self.tunings.values() if t.active]

    def set_active(self, names: Collection[str]) -> None:
        """Let exactly these tunings act. Whether they may act together has been asked before."""
        for tuning in self.tunings.values():
            if tuning.tuning_name not in names:
                tuning.deactivate()
        for name in names:
            self.tunings[name].activate()
        self.refresh()

    def let_rest(self, tuning: str, modules: Collection[Any]) -> None:
        """Let exactly these attachments of a tuning sit out from now on."""
        resting = {id(module) for module in modules}
        for socket in self.sockets():
            for plug in socket.plugs:
                if plug.tuning == tuning:
                    plug.rests = id(plug.attachment) in resting
        self.refresh()

    def resting(self) -> list[Any]:
        """The attachments that sit out."""
        return [plug.attachment for socket in self.sockets() for plug in socket.plugs if plug.rests]

    def refresh(self) -> None:
        """Other tunings act by now, or others stand on the model: let everybody know."""
        active = {t.tuning_name for t in self.active()}
        for socket in self.sockets():
            socket.refresh(active, folded=self.folded)
        for follower in self.followers:
            follower()

    # ------------------------------------------------------------------ layers

    def sockets(self) -> list[Socket]:
        """Every socket once."""
        return list({id(s): s for s in self._sockets.values()}.values())

    def socket(self, path: str) -> Socket:
        """The socket around the layer at `path`; made where there is none yet."""
        if path not in self._sockets:
            module = self.modules[path]
            socket = Socket(module)
            places: list[tuple[nn.Module, str]] = []
            for parent in self.modules.values():
                for child_name, child in parent._modules.items():
                    if child is module and (parent, child_name) not in places:
                        places.append((parent, child_name))
            for parent, child_name in places:
                parent._modules[child_name] = socket
            for alias, known in self.modules.items():
                if known is module:
                    self._sockets[alias] = socket
            self._places[path] = places
        return self._sockets[path]

    def sockets_within(self, path: str) -> list[Socket]:
        """The sockets whose paths begin with `path`."""
        return [socket for at, socket in self._sockets.items() if at.startswith(path)]

    def plugged(self, path: str) -> Socket | None:
        """The socket around the layer at `path`, if there is one."""
        return self._sockets.get(path)

    def owners(self, name: str) -> list[tuple[str, str]]:
        """(module path, name inside it) of a tensor and of all its aliases."""
        parameter = self.parameters[name]
        found: list[tuple[str, str]] = []
        seen: set[tuple[int, str]] = set()
        for full, other in self.parameters.items():
            if other is parameter:
                path, _, short = full.rpartition(".")
                mark = (id(self.modules[path]), short)
                if mark not in seen:
                    seen.add(mark)
                    found.append((path, short))
        return found

    def restore(self) -> None:
        """Every layer takes its place again, and every tensor learns or not as it did."""
        for path, places in self._places.items():
            for parent, child_name in places:
                parent._modules[child_name] = self._sockets[path].base
        for name, required in self._required.items():
            self.parameters[name].requires_grad_(required)
        del self.model._modules["luthier"]


class _TuningModules(nn.ModuleDict):
    """The tunings, where the model registers them. What is moved or cast takes along what lies beside it."""

    def __init__(self, edited: EditedModel) -> None:
        super().__init__()
        # A module begins in training mode, and a loaded model in evaluation: whoever asks this one for all that is
        # attached would be told the wrong thing.
        self.train(edited.model.training)
        self.edited = edited

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tuning in self.edited.tunings.values():
            for unfrozen in tuning.unfrozen.values():
                unfrozen.follow(fn)
        for socket in self.edited.sockets():
            for plug in socket.plugs:
                plug.read_dtype()
            for substitute in socket.substitutes:
                substitute.follow(fn)
        return self
