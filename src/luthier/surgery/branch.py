"""A network beside the frozen model: it reads the hidden states of every block and gives the last one anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core.protocols import Model
from luthier.surgery.context import Context
from luthier.surgery.prompts import text_stack

__all__ = ["BlockCall", "Branch"]


@dataclass(eq=False)
class BlockCall:
    """What one block of the frozen model received and gave; every tensor is detached.

    Attributes:
        stack, layer: which block.
        before, after: hidden states, (batch, tokens, d).
        args, kwargs: the rest of the call: masks, rotary angles, cache.
        outputs: what it gave besides `after`, such as T5's position biases.
    """

    stack: str
    layer: int
    before: Tensor
    after: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...] = ()


def _still(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple | list):
        return type(value)(_still(v) for v in value)
    return value


class Branch:
    """Hooks that run the frozen blocks without a graph and hand their calls to `module`."""

    def __init__(
        self, model: Model, anatomy: Anatomy, modules: dict[str, nn.Module], module: nn.Module, context: Context
    ) -> None:
        self.enabled = True
        self.module, self.context = module, context
        self.calls: dict[str, list[BlockCall]] = {}
        self._pending: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._handles: list[Any] = []
        self._grad: bool | None = None
        for block in anatomy.blocks:
            target = modules[block.path]
            self._handles.append(target.register_forward_pre_hook(self._before(block.path), with_kwargs=True))
            self._handles.append(
                target.register_forward_hook(self._after(block.path, block.stack, block.layer), with_kwargs=True)
            )
        self._stacks = {b.stack for b in anatomy.blocks}
        if anatomy.is_encoder_decoder:
            ends = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
        else:
            ends = {next(iter(self._stacks)): text_stack(modules, anatomy)}
        for stack, end in ends.items():
            self._handles.append(end.register_forward_pre_hook(self._start(stack), with_kwargs=True))
            self._handles.append(end.register_forward_hook(self._end(stack)))
            pooler = getattr(end, "pooler", None)
            if isinstance(pooler, nn.Module):
                self._handles.append(pooler.register_forward_pre_hook(self._pool(stack)))

        if anatomy.is_encoder_decoder:
            self._handles.append(model.register_forward_hook(self._cut_states(anatomy.d)))

    def _cut_states(self, d: int) -> Any:
        def hook(model: nn.Module, args: Any, out: Any) -> None:
            # What the branch's encoder sends to its decoder travels beside the frozen encoder's states; not further.
            states = getattr(out, "encoder_last_hidden_state", None)
            if self.enabled and states is not None and states.shape[-1] > d:
                out.encoder_last_hidden_state = states[..., :d]

        return hook

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    def _start(self, stack: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            self.calls[stack] = []
            enter = getattr(self.module, "enter", None)
            return (args, enter(stack, kwargs)) if enter is not None and self.enabled else None

        return hook

    def _before(self, path: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.enabled:
                return None
            self._pending[id(block)] = (args, kwargs)
            # Detached inputs and frozen weights: the block runs without a graph, whatever is before it.
            return _still(args), {k: _still(v) for k, v in kwargs.items()}

        return hook

    def _after(self, path: str, stack: str, layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if self.enabled:
                states = args[0] if args else kwargs["hidden_states"]
                given = out[0] if isinstance(out, tuple | list) else out
                rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                more = _still(tuple(out[1:])) if isinstance(out, tuple | list) else ()
                self.calls[stack].append(BlockCall(stack, layer, states.detach(), given.detach(), args[1:], rest, more))

        return hook

    def _result(self, stack: str, last: Tensor) -> Tensor:
        result = self.module(stack, self.calls[stack], self.context, last.detach())
        assert isinstance(result, Tensor)
        return result

    def _pool(self, stack: str) -> Any:
        def hook(pooler: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self.enabled:
                return None
            # Computed once here and used again at the end of the stack.
            self.context.memory[("branch", stack)] = self._result(stack, args[0]).to(args[0].dtype)
            return (self.context.memory[("branch", stack)], *args[1:])

        return hook

    def _end(self, stack: str) -> Any:
        def hook(end: nn.Module, args: Any, out: Any) -> Any:
            if not self.enabled:
                return out
            result = self.context.memory.pop(("branch", stack), None)
            result = self._result(stack, out[0]) if result is None else result
            self.calls[stack] = []
            if isinstance(out, tuple):
                return (result.to(out[0].dtype), *out[1:])
            out.last_hidden_state = result.to(out.last_hidden_state.dtype)
            if getattr(out, "hidden_states", None):  # its last entry is the same states
                out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
            return out

        return hook
