"""What happens around a forward pass: facts of the batch are noted, prefixes, prompts and branches take part."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.core import ConfigError, ModelError
from luthier.surgery import prefix_attention
from luthier.surgery.branch import Branch
from luthier.surgery.checkpointing import Checkpointing, Restore
from luthier.surgery.context import ROW, may_leave_out, packed, read_mask
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.first_order import FirstOrder
from luthier.surgery.first_pass import FirstPass
from luthier.surgery.first_token import FirstTokenCut
from luthier.surgery.picture_prompts import PicturePrompts, reads_pictures
from luthier.surgery.prefix_attention import Attending, KeysValues, Own, Pairs, Prefix, Prefixes
from luthier.surgery.prompts import PromptHooks, leading_pads, text_stack
from luthier.surgery.serving import Serving

__all__ = ["Forward", "PrefixSource"]


class PrefixSource(Protocol):
    """A module that computes prefixes; see the edit `PrependKeys`."""

    def keys_values(self, context: Any) -> list[tuple[KeysValues, KeysValues]]:
        """Keys and values for each attention, in the order of the edit."""


class Forward:
    """Hooks on the model, and on whatever holds its blocks: a pass begins where the outermost of them is called.

    Attributes:
        prompts: puts vectors before the text; None until a tuning wants that.
        branches: tuning -> the network beside the model.
        looks: tuning -> the pass before each pass, or what makes each pass one to first order.
    """

    def __init__(self, edited: EditedModel, serving: Serving) -> None:
        self.edited, self.serving = edited, serving
        self.prompts: PromptHooks | PicturePrompts | None = None
        self.branches: dict[str, Branch] = {}
        self.looks: dict[str, FirstPass | FirstOrder] = {}
        self.cut: FirstTokenCut | None = None  # of the last block
        self._prefixes: list[Prefixes] = []
        self._route: prefix_attention.Route | None = None
        self._twice = False  # activations are computed twice
        self._watched = False  # blocks note their cache
        self._open: list[nn.Module] = []  # hooked modules whose `forward` is running, outermost first
        # What attachments kept for the texts of a cache; a conversation may be taken up again after another.
        self._memories: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
        model = edited.model
        self._hooks: list[Any] = []
        for path, stack in _entrances(edited).items():
            module = edited.modules[path]
            self._hooks.append(module.register_forward_pre_hook(self._enter(module, stack), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._checkpointing = Checkpointing(model, self._note)
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        if hasattr(model, "resize_token_embeddings"):
            model.__dict__["resize_token_embeddings"] = self._resize
        edited.followers.append(self.refresh)

    # ------------------------------------------------------------------ what takes part

    def route_attention(self) -> bool:
        """Send the model's attention through our own function, where all of it uses the interface. Idempotent."""
        attentions = self.edited.anatomy.attentions
        if self._route is None and attentions and all(a.interface for a in attentions):
            self._route = prefix_attention.Route(self.edited.model)
        return self._route is not None

    def checkpoint_activations(self) -> None:
        """Compute activations of the blocks twice instead of keeping them: less memory, more time, the same gradients.

        The non-reentrant kind: with a frozen base the other one has no gradient to start from.
        """
        model, self._twice = self.edited.model, True
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # transformers before 5.20 or so
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def add_prefixes(self, tuning: str, source: PrefixSource, paths: list[str]) -> None:
        """Put the keys and values of `source` before those of the text in the attentions at `paths`."""

        def compute() -> Pairs:
            return source.keys_values(self.edited.context) if self.edited.tunings[tuning].active else ()

        whole = Prefixes(tuning, compute)
        for index, path in enumerate(paths):
            prefix_attention.add(self.edited.modules[path], Prefix(whole, index))
        self._prefixes.append(whole)
        self.route_attention()

    def add_own_attention(self, tuning: str, attending: Attending, path: str) -> None:
        """Let `attending` give what the attention at `path` gives, while the tuning acts."""
        acts = self.edited.tunings[tuning]
        prefix_attention.add_own(self.edited.modules[path], Own(tuning, attending, lambda: acts.active))
        self.route_attention()

    def watch_cache(self) -> None:
        """Let `context.cache` be the key/value cache that the running block is given. Idempotent."""
        blocks, self._watched = () if self._watched else self.edited.anatomy.blocks, True
        for module in (self.edited.modules[block.path] for block in blocks):
            note = partial(self._note_cache, list(inspect.signature(module.forward).parameters))
            self._hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))

    def _note_cache(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        self.edited.context.cache = next((given[n] for n in _CACHES if given.get(n) is not None), None)

    def add_branch(self, tuning: str, module: nn.Module) -> None:
        """Let `module` read the hidden states and give the last one."""
        edited = self.edited
        self.branches[tuning] = Branch(edited.model, edited.anatomy, edited.modules, module, edited.context)

    def add_first_pass(self, tuning: str, module: nn.Module) -> None:
        """Let `module` see what a pass gives without the tuning, before each pass."""
        stack = text_stack(self.edited.modules, self.edited.anatomy)
        self.looks[tuning] = FirstPass(stack, module, self.edited.context, partial(_uncut, self))

    def add_first_order(self, tuning: str) -> None:
        """Let every pass be one to first order in what the tuning moves."""
        stack = text_stack(self.edited.modules, self.edited.anatomy)
        self.looks[tuning] = FirstOrder(stack, partial(_uncut, self))

    def remove(self, tuning: str) -> None:
        """Take off what the tuning has here."""
        for module in self.edited.modules.values():
            prefix_attention.remove(module, tuning)
        self._prefixes = [p for p in self._prefixes if p.tuning != tuning]
        if tuning in self.branches:
            self.branches.pop(tuning).remove()
        if tuning in self.looks:
            self.looks.pop(tuning).remove()

    def refresh(self) -> None:
        """Other tunings act now."""
        active = self.edited.active()
        names = {t.tuning_name for t in active}
        for name, branch in self.branches.items():
            branch.enabled = name in names
        for name, look in self.looks.items():
            look.enabled = name in names
        sources = [source for tuning in active for source in tuning.prompts()]
        if sources and self.prompts is None and reads_pictures(self.edited.modules, self.edited.anatomy):
            self.prompts = PicturePrompts(self.edited.modules, self.edited.anatomy, self.edited.context)
        elif sources and self.prompts is None:
            stack, embed, decoder = self._text_stack()
            limit = self.edited.anatomy.max_positions
            self.prompts = PromptHooks(self.edited.model, stack, embed, decoder, limit, self.edited.context)
        if self.prompts is not None:
            self.prompts.sources = sources

    def close(self) -> None:
        """Take everything off the model."""
        if self.prompts is not None:
            self.prompts.remove()
        if self._route is not None:
            self._route.close()
        self._checkpointing.close()
        for hook in self._hooks:
            hook.remove()
        for given in ("generate", "resize_token_embeddings"):
            self.edited.model.__dict__.pop(given, None)

    def _text_stack(self) -> tuple[nn.Module, Callable[[Tensor], Tensor], nn.Module | None]:
        model, anatomy, modules = self.edited.model, self.edited.anatomy, self.edited.modules
        path = anatomy.sites("embed", asked_by="prompt vectors")[0].path

        def embed(ids: Tensor) -> Tensor:
            # Where something sits at the embedding, it acts on the text behind a prompt too.
            out: Tensor = (self.edited.plugged(path) or modules[path])(ids)
            return out

        if anatomy.is_encoder_decoder:
            return model.get_encoder(), embed, model.get_decoder()
        return text_stack(modules, anatomy), embed, None

    # ------------------------------------------------------------------ a pass

    def _enter(self, module: nn.Module, stack: str) -> Any:
        names = list(inspect.signature(module.forward).parameters)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if module in self._open:  # a pass ended in an error that closed nothing
                del self._open[self._open.index(module) :]
            outermost = not self._open
            self._open.append(module)
            if not outermost:
                if stack:
                    self._note_mask(given, stack)
                return None
            facts = {n: kwargs[n] for n in kwargs if n.startswith(ROW) and n not in names}
            if facts:
                kwargs = {n: value for n, value in kwargs.items() if n not in facts}
                given = {n: value for n, value in given.items() if n not in facts}
            if not self.edited.context.generating:
                self.edited.context.rows = _numbers(facts)
            self._begin(given, stack)
            more: dict[str, Any] = {}
            if "position_ids" in names and (positions := self._positions(given)) is not None:
                more["position_ids"] = positions
            if self._twice and "use_cache" in names and given.get("use_cache") is None and torch.is_grad_enabled():
                more["use_cache"] = False  # a block that is computed again would put its keys there again
            return (args, kwargs | more) if more or facts else None

        return hook

    def _positions(self, inputs: dict[str, Any]) -> Tensor | None:
        """Positions that count from the first real token, where padding stands before it and nobody gave any.

        A prefix has no position of its own, so with it positions are no longer relative.
        """
        mask, n = inputs.get("attention_mask"), self.edited.context.n_tokens
        if not any(whole.pairs for whole in self._prefixes) or inputs.get("position_ids") is not None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or leading_pads(mask) is None:
            return None
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if module in self._open:
            del self._open[self._open.index(module) :]
            if not self._open:
                self._end(out)

    def _begin(self, inputs: dict[str, Any], stack: str) -> None:
        """Note facts of the batch; and compute prefixes here, outside of any checkpointed block."""
        if self._route is not None:
            self._route.keep()
        cache = inputs.get("past_key_values")
        context = self.edited.context
        context.past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        given = (inputs.get(name) for name in (_TEXTS if context.past == 0 else _LATER_TEXTS))
        text = next((t for t in given if isinstance(t, Tensor)), None)
        first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 0), None)
        # `shape`, not `len` or `int`: under a tracer a size is a symbol, and must stay one
        context.n_tokens = text.shape[1] if text is not None else 0
        context.batch = text.shape[0] if text is not None else 0 if first is None else first.shape[0]
        context.packed = packed(inputs)
        ids = inputs.get("input_ids") if stack != "decoder" else None
        context.ids = ids if isinstance(ids, Tensor) else None
        mask = read_mask(inputs.get("attention_mask"), context.past, context.n_tokens)
        if self.edited.anatomy.is_encoder_decoder and stack == "decoder":
            context.masks = {"encoder": read_mask(inputs.get("encoder_attention_mask"), 0, 0), "decoder": mask}
        elif self.edited.anatomy.is_encoder_decoder:
            written = next((inputs[n] for n in _LATER_TEXTS[:2] if isinstance(inputs.get(n), Tensor)), None)
            n_written = written.shape[1] if written is not None else 0
            seen = read_mask(inputs.get("decoder_attention_mask"), context.past, n_written)
            context.masks = {"": mask, "decoder": seen}
        else:
            context.masks = {"": mask}
        if not context.generating:
            context.memory = self._memory_of(cache) if context.past > 0 else {}
        self.serving.before_pass(inputs)
        self._check_rows()
        for whole in self._prefixes:
            whole.pairs = whole.compute()

    def _check_rows(self) -> None:
        """Refuse a pass that does not say of its rows what those that act have to know.

        Raises:
            ModelError: a fact is missing, or has a value for which nothing was made.
        """
        context, by_row = self.edited.context, self.serving.rows
        acting = [t for t in self.edited.tunings.values() if (t.tuning_name in by_row.names if by_row else t.active)]
        for part in (part for tuning in acting for part in tuning.method.parts()):
            for fact in part.reads_rows:
                n, given = part.values_of(fact), context.rows.get(fact)
                if given is None and n > 1 and not may_leave_out():
                    raise ModelError(
                        f"{part.name} keeps numbers for {n} {fact}s, and this batch does not say which {fact} each row "
                        f"is of. Give {ROW}{fact}=[...], a whole number from 0 to {n - 1} for every row."
                    )
                if given is None:
                    context.rows[fact] = torch.zeros(context.batch, dtype=torch.long)
                elif len(given) and not 0 <= int(given.min()) <= int(given.max()) < n:
                    raise ModelError(
                        f"{ROW}{fact}: {part.name} knows the {fact}s 0 to {n - 1}, and the batch has "
                        f"{int(given.min())} to {int(given.max())}."
                    )
                context.row(fact)

    def _note_mask(self, inputs: dict[str, Any], stack: str) -> None:
        """The mask of one stack, where the model hands it its own."""
        context = self.edited.context
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            context.masks[stack] = mask
        elif any(isinstance(inputs.get(name), Tensor) for name in ("pixel_values", "input_features", "input_values")):
            context.masks[stack] = None

    def _end(self, out: Any) -> None:
        context = self.edited.context
        context.looked = {}
        context.cache = None  # who made it decides how long it lives
        for whole in self._prefixes:
            whole.pairs = None
        cache = getattr(out, "past_key_values", None)
        if cache is not None and context.memory and not context.generating:
            self._memories[cache] = context.memory

    def _memory_of(self, cache: Any) -> dict[Any, Any]:
        return self._memories.get(cache, {}) if cache is not None else {}

    def _note(self) -> Restore:
        """The state of the pass that is running, to be put back when a block of it is computed again."""
        edited = self.edited
        active = [t.tuning_name for t in edited.active()]
        pairs = [(whole, whole.pairs) for whole in self._prefixes]
        context, fast = replace(edited.context, memory=dict(edited.context.memory)), kernels.fast()
        cut = nullcontext if self.cut is None else self.cut.as_now()

        @contextmanager
        def restore() -> Iterator[None]:
            now_active = [t.tuning_name for t in edited.active()]
            now_pairs = [(whole, whole.pairs) for whole, _ in pairs]
            now = dict(vars(edited.context))
            if now_active != active:
                edited.set_active(active)
            for whole, then in pairs:
                whole.pairs = then
            vars(edited.context).update(vars(context))
            try:
                with kernels.plain(not fast), cut():
                    yield
            finally:
                vars(edited.context).update(now)
                for whole, then in now_pairs:
                    whole.pairs = then
                if now_active != active:
                    edited.set_active(now_active)

        def give() -> AbstractContextManager[None]:
            return restore()

        return give

    def _resize(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refuse other tables of words under a tuning: it would be saved for a base that is nowhere."""
        model: Any = self.edited.model
        table = model.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == table.weight.shape[0]:
            return table
        raise ConfigError(
            f"resize_token_embeddings: {new_num_tokens} tokens for {table.weight.shape[0]} while a tuning stands on "
            "the model: what is saved would fit no base, and new rows would not train. Detach, add the tokens, attach."
        )

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` with one memory for all its steps, also where no cache tells the first from the later ones."""
        context, model = self.edited.context, self.edited.model
        written: Any = type(model)
        texts = (*args, *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds")))
        text = next((t for t in texts if isinstance(t, Tensor)), None)
        self.serving.before_generation(1 if text is None else len(text))
        settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        in_pieces = kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
        plugs = [p for s in self.edited.sockets() for p in (*s.live.whole, *(p for _, ps in s.live.parts for p in ps))]
        readers = [plug.attachment for plug in plugs] + (self.prompts.sources if self.prompts is not None else [])
        if in_pieces and any(getattr(reader, "reads_whole_text", False) for reader in readers):
            warnings.warn(
                f"prefill_chunk_size={in_pieces} is left out: what acts here is computed from the prompt as a whole.",
                stacklevel=2,
            )
            kwargs["prefill_chunk_size"] = None
        context.rows = _numbers({n: kwargs.pop(n) for n in list(kwargs) if n.startswith(ROW)})
        context.memory, context.generating = self._memory_of(kwargs.get("past_key_values")), True
        try:
            return written.generate(model, *args, **kwargs)
        finally:
            context.memory, context.rows, context.generating = {}, {}, False


def _uncut(forward: Forward) -> AbstractContextManager[None]:
    return nullcontext() if forward.cut is None else forward.cut.on(active=False)


def _numbers(facts: dict[str, Any]) -> dict[str, Tensor]:
    """Facts of rows by name, as whole numbers. {"row_task": [0, 2]} -> {"task": tensor([0, 2])}."""
    found = {}
    for name, value in facts.items():
        numbers = torch.as_tensor(value)
        if numbers.dim() != 1 or numbers.is_floating_point():
            raise ModelError(
                f"{name}: wants one whole number for each row, and got {tuple(numbers.shape)} {value!r:.60}."
            )
        found[name.removeprefix(ROW)] = numbers.long()
    return found


_CACHES = ("past_key_values", "past_key_value", "layer_past")
_TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "hidden_states")
_LATER_TEXTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "hidden_states")


def _entrances(edited: EditedModel) -> dict[str, str]:
    """Paths of the model and of all that holds its blocks, with the stack that each belongs to ("" for several)."""
    found: dict[str, set[str]] = {"": {b.stack for b in edited.anatomy.blocks}}
    for block in edited.anatomy.blocks:
        path = block.path.rpartition(".")[0].rpartition(".")[0]
        while path:
            if not isinstance(edited.modules[path], nn.ModuleList | nn.ModuleDict):
                found.setdefault(path, set()).add(block.stack)
            path = path.rpartition(".")[0]
    return {path: next(iter(stacks)) if path and len(stacks) == 1 else "" for path, stacks in found.items()}
