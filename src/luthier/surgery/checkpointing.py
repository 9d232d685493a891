"""Blocks that are computed again for the backward pass find the model as it was when they were computed first.

Between the two another tuning may have become active, a pass without any may have been made, prefixes and facts of the
batch are those of another pass. transformers hands every block to one function; ours notes the state of the pass at the
first computation and puts it back around the second.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

__all__ = ["Checkpointing", "checkpoints_itself"]

_SET = "_set_gradient_checkpointing"

Restore = Callable[[], AbstractContextManager[None]]


class Checkpointing:
    """Stands between a model and the function that checkpoints its blocks, however that is switched on.

    Args:
        note: notes the state of the current pass, and gives what puts it back for the length of a `with` block.
    """

    def __init__(self, model: Any, note: Callable[[], Restore]) -> None:
        self.model, self.note = model, note
        self._set = getattr(type(model), _SET, None)
        if self._set is None or "gradient_checkpointing_func" not in inspect.signature(self._set).parameters:
            self._set = None  # a class of an older make, which checkpoints by means of its own
            return
        model.__dict__[_SET] = self._enable
        for module in model.modules():  # switched on before
            given = module.__dict__.get("_gradient_checkpointing_func")
            if given is not None:
                module.__dict__["_gradient_checkpointing_func"] = self._around(given)

    def close(self) -> None:
        """Give every block its own function back."""
        if self._set is None:
            return
        self.model.__dict__.pop(_SET, None)
        for module in self.model.modules():
            given = getattr(module.__dict__.get("_gradient_checkpointing_func"), "given", None)
            if given is not None:
                module.__dict__["_gradient_checkpointing_func"] = given

    def _enable(self, *args: Any, **kwargs: Any) -> Any:
        assert self._set is not None
        bound = inspect.signature(self._set).bind(self.model, *args, **kwargs)
        bound.apply_defaults()
        bound.arguments["gradient_checkpointing_func"] = self._around(bound.arguments["gradient_checkpointing_func"])
        return self._set(*bound.args, **bound.kwargs)

    def _around(self, given: Any) -> Callable[..., Any]:
        """The function that is called with a block and its arguments, in place of `given`."""
        if getattr(given, "given", None) is not None:
            return given  # type: ignore[no-any-return]
        ours = given
        settings = dict(getattr(given, "keywords", None) or {})
        if settings.get("use_reentrant"):
            warnings.warn(
                "use_reentrant=True was asked for. A tuned model is checkpointed by the other kind, with the same "
                "gradients: this one has none to start from where the base is frozen.",
                stacklevel=4,
            )
            ours = functools.partial(given.func, **{**settings, "use_reentrant": False})
        elif "use_reentrant" not in settings:
            ours = functools.partial(given, use_reentrant=False)

        def run(block: Any, *args: Any) -> Any:
            restore = self.note()
            block = _as_trained(block, self.model)
            return ours(block, *args, context_fn=lambda: (nullcontext(), _EveryTime(restore)))

        run.given = given  # type: ignore[attr-defined]
        return run


class _EveryTime(AbstractContextManager[None]):
    """A context that is made anew whenever it is entered: a graph that is kept goes back more than once."""

    def __init__(self, make: Restore) -> None:
        self.make = make
        self.made: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.made.append(self.make())
        self.made[-1].__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self.made.pop().__exit__(*raised)


def _as_trained(block: Any, model: nn.Module) -> Any:
    """The block in the mode of the model: to be checkpointed it has to call itself training, and draws dropout then."""
    module = block.args[0] if isinstance(block, functools.partial) and block.args else getattr(block, "__self__", None)
    if not isinstance(module, nn.Module) or module.training == model.training:
        return block
    mode = model.training

    def run(*args: Any) -> Any:
        with _mode(module, mode):
            return block(*args)

    return run


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before, module.training = module.training, training
    try:
        yield
    finally:
        module.training = before


def checkpoints_itself(module: nn.Module) -> bool:
    """Whether a module asks its own training mode before it checkpoints: a block, or a stack of an older make."""
    if not hasattr(module, "gradient_checkpointing"):
        return False
    if "GradientCheckpointingLayer" in {cls.__name__ for cls in type(module).__mro__}:
        return True
    try:
        return "_gradient_checkpointing_func" in inspect.getsource(type(module))
    except (OSError, TypeError):
        return True
