"""What happens around a forward pass: facts of the batch are noted, prefixes, prompts and branches take part."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor, nn

from luthier.surgery import prefix_attention
from luthier.surgery.branch import Branch
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.prefix_attention import KeysValues, Prefix
from luthier.surgery.prompts import PromptHooks, text_stack
from luthier.surgery.serving import Serving

__all__ = ["Forward", "PrefixSource"]


class PrefixSource(Protocol):
    """A module that computes prefixes; see the edit `PrependKeys`."""

    def keys_values(self, context: Any) -> list[tuple[KeysValues, KeysValues]]:
        """Keys and values for each attention, in the order of the edit."""


class Forward:
    """Hooks on the model as a whole.

    Attributes:
        prompts: puts vectors before the text; None until a tuning wants that.
        branches: tuning -> the network beside the model.
    """

    def __init__(self, edited: EditedModel, serving: Serving) -> None:
        self.edited, self.serving = edited, serving
        self.prompts: PromptHooks | None = None
        self.branches: dict[str, Branch] = {}
        self._prefixes: list[tuple[str, PrefixSource, list[Prefix]]] = []
        self._own_attention: Any = None  # what the model's configuration said before; None while it says it still
        self._inside = False  # the model's own `forward` is running
        model = edited.model
        self._names = list(inspect.signature(model.forward).parameters)
        self._hooks = [model.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        if edited.anatomy.is_encoder_decoder and hasattr(model, "get_encoder"):
            # `generate` runs the encoder on its own, before the model's first forward pass.
            self._hooks.append(model.get_encoder().register_forward_pre_hook(self._on_encoder, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._after_forward, always_call=True))
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        edited.followers.append(self.refresh)

    # ------------------------------------------------------------------ what takes part

    def route_attention(self) -> bool:
        """Send the model's attention through our own function, where all of it uses the interface. Idempotent."""
        attentions = self.edited.anatomy.attentions
        if self._own_attention is None and attentions and all(a.interface for a in attentions):
            self._own_attention = prefix_attention.install(self.edited.model)
        return self._own_attention is not None

    def checkpoint_activations(self) -> None:
        """Compute activations of the blocks twice instead of keeping them: less memory, more time, the same gradients.

        The non-reentrant kind: with a frozen base the other one has no gradient to start from.
        """
        model = self.edited.model
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # transformers before 5.20 or so
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def add_prefixes(self, tuning: str, source: PrefixSource, paths: list[str]) -> None:
        """Put the keys and values of `source` before those of the text in the attentions at `paths`."""
        prefixes = [Prefix(tuning) for _ in paths]
        for path, prefix in zip(paths, prefixes, strict=True):
            prefix_attention.add(self.edited.modules[path], prefix)
        self._prefixes.append((tuning, source, prefixes))
        self.route_attention()

    def add_branch(self, tuning: str, module: nn.Module) -> None:
        """Let `module` read the hidden states and give the last one."""
        edited = self.edited
        self.branches[tuning] = Branch(edited.model, edited.anatomy, edited.modules, module, edited.context)

    def remove(self, tuning: str) -> None:
        """Take off what the tuning has here."""
        for module in self.edited.modules.values():
            prefix_attention.remove(module, tuning)
        self._prefixes = [p for p in self._prefixes if p[0] != tuning]
        if tuning in self.branches:
            self.branches.pop(tuning).remove()

    def refresh(self) -> None:
        """Other tunings act now."""
        active = self.edited.active()
        names = {t.tuning_name for t in active}
        for name, branch in self.branches.items():
            branch.enabled = name in names
        sources = [source for tuning in active for source in tuning.prompts()]
        if sources and self.prompts is None:
            stack, embed, decoder = self._text_stack()
            self.prompts = PromptHooks(self.edited.model, stack, embed, decoder, self.edited.anatomy.max_positions)
        if self.prompts is not None:
            self.prompts.sources = sources

    def close(self) -> None:
        """Take everything off the model."""
        if self.prompts is not None:
            self.prompts.remove()
        if self._own_attention is not None:
            prefix_attention.uninstall(self._own_attention)
        for hook in self._hooks:
            hook.remove()
        self.edited.model.__dict__.pop("generate", None)

    def _text_stack(self) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        model, anatomy, modules = self.edited.model, self.edited.anatomy, self.edited.modules
        embed = modules[anatomy.sites("embed", asked_by="prompt vectors")[0].path]
        if anatomy.is_encoder_decoder:
            return model.get_encoder(), embed, model.get_decoder()
        return text_stack(modules, anatomy), embed, None

    # ------------------------------------------------------------------ a pass

    def note_batch(self, inputs: dict[str, Any]) -> None:
        """Note facts of the batch; and compute prefixes here, outside of any checkpointed block.

        Called at each start of the whole model's `forward`, and by who enters further inside.
        """
        texts = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
        text = next((t for t in texts if t is not None), None)
        cache = inputs.get("past_key_values")
        context = self.edited.context
        context.past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        context.n_tokens = int(text.shape[1]) if text is not None else 0
        context.batch = int(text.shape[0]) if text is not None else 0
        mask = inputs.get("attention_mask")
        context.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        two = self.edited.anatomy.is_encoder_decoder
        context.decoder_mask = inputs.get("decoder_attention_mask") if two else context.mask
        if context.past == 0 and not context.generating:
            context.memory.clear()
        self.serving.before_pass(inputs)
        for name, source, prefixes in self._prefixes:
            active = self.edited.tunings[name].active
            pairs = source.keys_values(context) if active else [(None, None)] * len(prefixes)
            for prefix, (keys, values) in zip(prefixes, pairs, strict=True):
                prefix.keys, prefix.values = keys, values

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        self.note_batch(dict(zip(self._names, args, strict=False)) | kwargs)

    def _on_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            names = inspect.signature(encoder.forward).parameters
            self.note_batch(dict(zip(names, args, strict=False)) | kwargs)

    def _after_forward(self, model: nn.Module, args: Any, out: Any) -> None:
        self._inside = False

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` with one memory for all its steps, also where no cache tells the first from the later ones."""
        context = self.edited.context
        model: Any = self.edited.model
        context.memory.clear()
        texts = (*args, *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds")))
        text = next((t for t in texts if isinstance(t, Tensor)), None)
        self.serving.before_generation(1 if text is None else len(text))
        context.generating = True
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            context.generating = False
            context.memory.clear()
