"""A model with its edits in place: several named tunings, of which some are active and some train."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge, CompositionError, ConfigError, UnknownName, human_count, near
from luthier.surgery import compose, frozen_layers, install, merging, other_trainers, prefix_attention
from luthier.surgery.attachment import Attachment
from luthier.surgery.base import Base
from luthier.surgery.branch import Branch
from luthier.surgery.context import Context
from luthier.surgery.edits import Reparametrise, Unfreeze
from luthier.surgery.first_token import Narrow, first_token_place, head_reads_first_token
from luthier.surgery.method import METHODS, Group, Method
from luthier.surgery.prompts import PromptHooks, text_stack
from luthier.surgery.serving import RowNames, Serving
from luthier.surgery.socket import Socket
from luthier.surgery.tuning import Tuning, keyed

__all__ = ["Tuned", "attach"]


class Tuned:
    """A model and the tunings on it. Made by `attach`.

    *active*, *trainable* and *frozen* are three separate facts: `activate` says which tunings act, `train_only` which
    of them learn; `print(tuned)` shows both.
    """

    def __init__(self, model: Any, new_tensors: Sequence[str] = ()) -> None:
        self.model = model
        anatomy = Anatomy.read(model)
        # A pooler that the checkpoint lacks is random: it has to learn, whatever the method.
        fresh = tuple(n for n in new_tensors if n not in anatomy.head_tensors)
        self.anatomy = replace(anatomy, head_tensors=anatomy.head_tensors + fresh)
        self.context = Context()
        self.tunings: dict[str, Tuning] = {}
        self._required = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._sockets: dict[str, Socket] = {}
        self._sites: dict[str, list[tuple[nn.Module, str]]] = {}
        self._taps: list[Any] = []
        self._prompts: PromptHooks | None = None
        self._prefixes: list[tuple[str, nn.Module, list[prefix_attention.Prefix]]] = []
        self._attention: Any = None
        self._branches: dict[str, Branch] = {}
        self._narrow: tuple[Narrow | None] | None = None  # None until it was tried
        self._digest: dict[torch.dtype, str] = {}
        self._folded: list[tuple[Tensor, Tensor]] | None = None
        self._serving: Serving | None = None
        self._names = list(inspect.signature(model.forward).parameters)
        self._hooks = [model.register_forward_pre_hook(self._listen, with_kwargs=True)]
        if self.anatomy.is_encoder_decoder and hasattr(model, "get_encoder"):
            # `generate` runs the encoder on its own, before the model's first forward pass.
            self._hooks.append(model.get_encoder().register_forward_pre_hook(self._listen_encoder, with_kwargs=True))
        self._inside = False
        self._hooks.append(model.register_forward_hook(self._leave, always_call=True))
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate
        model.__dict__["save_pretrained"] = self._save_pretrained
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.add_module("luthier", _Shelf(self))
        model.__dict__["_luthier_tuned"] = self
        self.calls_hooks = False  # a loop of one's own that calls the methods' hooks says so here
        other_trainers.watch(self)

    # ------------------------------------------------------------------ looking

    @staticmethod
    def of(model: Any) -> Tuned | None:
        """The `Tuned` that holds `model`, if one does."""
        found = model.__dict__.get("_luthier_tuned")
        return found if isinstance(found, Tuned) else None

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

    def trained(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Canonical name -> trained tensor, of the tuning called `name`, or of all that act and train.

        A tuning that sleeps gets no gradient, and a tensor of the model that it trains holds another value meanwhile.
        """
        found: dict[str, nn.Parameter] = {}
        many = len(self.tunings) > 1 and name is None
        for tuning in self.tunings.values():
            learns = tuning.active and tuning.trainable
            if (name is None and not learns) or (name is not None and tuning.tuning_name != name):
                continue
            prefix = f"{tuning.tuning_name}:" if many else ""
            for key_, module in tuning.modules_by_key().items():
                for short, parameter in module.named_parameters():
                    if f"{key_}.{short}" not in tuning.fixed:
                        found[f"{prefix}{key_}.{short}"] = parameter
            for key_, unfrozen in tuning.unfrozen.items():
                found[f"{prefix}{key_}"] = unfrozen.parameter
        return found

    def n_trained(self, *, head: bool = False) -> int:
        """Trained numbers; with `head`, those of a new task head too. A mask counts only what it lets move."""
        total = 0
        for tuning in self.tunings.values():
            if tuning.active and tuning.trainable:
                total += sum(p.numel() for m in tuning.parts.values() for p in m.parameters() if p.requires_grad)
                for key_, unfrozen in tuning.unfrozen.items():
                    if head or not key_.startswith("head/"):
                        mask = unfrozen.mask
                        total += unfrozen.parameter.numel() if mask is None else int(mask.sum())
        return total

    def groups(self) -> list[Group]:
        """The methods' own learning rates and decays, of all tunings that train."""
        return [g for t in self._active() if t.trainable for part in t.method.parts() for g in part.groups(self)]

    def modules(self, kind: type[nn.Module] = nn.Module, *, name: str | None = None) -> dict[str, Any]:
        """Canonical key -> module of the given class, of one tuning or all."""
        return {
            k: m
            for t in self.tunings.values()
            if name is None or t.tuning_name == name
            for k, m in t.modules_by_key().items()
            if isinstance(m, kind)
        }

    def tensor(self, name: str) -> nn.Parameter:
        """The model's own tensor of a canonical name, whatever stands around its layer by now."""
        found: nn.Parameter = self._parameters[name]
        return found

    def status(self) -> list[dict[str, Any]]:
        """One row per tuning: name, method, active, trainable, trained numbers, places."""
        return [
            {
                "tuning": t.tuning_name,
                "method": compose.spell(t.method),
                "active": t.active,
                "trainable": t.trainable,
                "numbers": sum(p.numel() for m in t.parts.values() for p in m.parameters())
                + sum(u.parameter.numel() for u in t.unfrozen.values()),
                "places": len(t.keys) + len(t.unfrozen),
            }
            for t in self.tunings.values()
        ]

    def __repr__(self) -> str:
        lines = [f"{type(self.model).__name__}, {human_count(self.anatomy.n_params)} numbers in the base"]
        for row in self.status():
            facts = f"{'active' if row['active'] else 'asleep'}, {'trains' if row['trainable'] else 'frozen'}"
            lines.append(
                f"  {row['tuning']}: {row['method']}, {facts}, {human_count(row['numbers'])} in {row['places']} places"
            )
        return "\n".join(lines)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ adding

    def add(self, method: Method | str, *, name: str = "default", seed: int = 0, train_head: bool = True) -> Tuning:
        """Carry out a method's edits under a new name; it becomes active and trainable beside the others.

        A tuning of the same method that holds what the new one needs (the same tensor, the attention's prefix, the one
        side network) is put to sleep; `activate` changes between them.

        Raises:
            ConfigError: the name is taken.
            AnatomyError: the model lacks a site that the method asks for.
            CompositionError: the method cannot stand beside what is active. Nothing has been changed then.
        """
        if isinstance(method, str):
            method = compose.method(method)
        if name in self.tunings or not name or "." in name or "/" in name or ":" in name or "|" in name:
            raise ConfigError(
                f"tuning name {name!r}: it must be new, not empty, and hold none of . / : | on this model."
            )
        self._refuse_folded("adding a tuning")
        self._refuse_serving("adding a tuning")
        label = compose.spell(method)
        for other in self._active():
            if compose.spell(other.method) != label:
                self._stand_together(other.method, method, f"{name} and {other.tuning_name}: ")
        tuning = Tuning(name, method)
        parts = method.parts()
        edits: list[tuple[str, Any]] = []
        for part in parts:
            prefix = f"{part.name}:" if len(parts) > 1 else ""
            with keyed(seed, "edits", part.name):
                edits += [(prefix, edit) for edit in part.edits(self.anatomy)]
        if train_head:
            install.require_known_head(self.model, self.anatomy)
            owned = {e.name for _, e in edits if isinstance(e, Unfreeze | Reparametrise)}
            edits += [("head", Unfreeze(t)) for t in self.anatomy.head_tensors if t not in owned]
        tuning.claims = install.check(self, edits, method)
        tuning.train(self.model.training)
        awake = [t.tuning_name for t in self._active()]
        self.tunings[name] = tuning
        self.model.luthier[name] = tuning
        try:
            for awake_name in awake:
                if self._shared(self.tunings[awake_name], tuning):
                    self._park(self.tunings[awake_name])
            for prefix, edit in edits:
                install.install(self, tuning, prefix, edit, seed)
        except BaseException:
            self.remove(name)
            self.activate(*awake)
            raise
        tuning.fixed = {
            f"{k}.{n}"
            for k, m in tuning.modules_by_key().items()
            for n, p in m.named_parameters()
            if not p.requires_grad
        }
        self._refresh()
        return tuning

    def _active(self) -> list[Tuning]:
        return [t for t in self.tunings.values() if t.active]

    def _stand_together(self, one: Method, other: Method, who: str) -> None:
        try:
            compose.check([*one.parts(), *other.parts()])
        except CompositionError as error:
            raise CompositionError(
                f"{who}{error} Or let one act at a time: tuned.activate(...) names those that do."
            ) from error

    def _shared(self, one: Tuning, other: Tuning) -> str | None:
        """What both hold and only one active tuning may, or None."""
        return next((claim for claim in one.claims if claim in other.claims), None)

    def _refuse_folded(self, doing: str) -> None:
        if self._folded is not None:
            raise ConfigError(f"{doing}: the tunings are folded into the weights. Call unfold() first.")

    def _refuse_serving(self, doing: str) -> None:
        if self._serving is not None:
            raise ConfigError(f"{doing}: not inside serving() or rows(), which read all numbers once. Leave the block.")

    def _socket(self, path: str) -> Socket:
        if path not in self._sockets:
            module = self._modules[path]
            socket = Socket(module)
            places = []
            for parent_path, parent in self._modules.items():
                for child_name, child in parent._modules.items():
                    if child is module and (parent, child_name) not in places:
                        places.append((parent, child_name))
                del parent_path
            for parent, child_name in places:
                parent._modules[child_name] = socket
            for alias, known in self._modules.items():
                if known is module:
                    self._sockets[alias] = socket
            self._sites[path] = places
        return self._sockets[path]

    def _owners(self, name: str) -> list[tuple[str, str]]:
        """(module path, name inside it) of a tensor and of all its aliases."""
        parameter = self._parameters[name]
        owners: list[tuple[str, str]] = []
        seen: set[tuple[int, str]] = set()
        for full, held in self._parameters.items():
            if held is parameter:
                path, _, short = full.rpartition(".")
                mark = (id(self._modules[path]), short)
                if mark not in seen:
                    seen.add(mark)
                    owners.append((path, short))
        return owners

    def quicken(self, *, training: bool = True, dropout: bool = False) -> int:
        """Compute frozen layers of the trunk by functions that equal them but are faster; returns how many.

        Linear layers are packed for the CPU as far as `frozen_layers.BUDGET_BYTES` goes. Weights, names and results to
        rounding stay what they are.

        Args:
            training: leave out what pays only where no gradient is wanted: narrow layers.
            dropout: the trunk's dropout will be on, so draw it faster. It has other numbers then.
        """
        budget, count = frozen_layers.BUDGET_BYTES, 0
        done: set[int] = set()
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        for path, module in self._modules.items():
            if id(module) in done or module is head:
                continue  # the loss reads an output matrix by itself
            done.add(id(module))
            drop = frozen_layers.quick_dropout(module) if dropout else None
            if drop is not None:
                self._socket(path).__dict__["quick"] = drop
                count += 1
                continue
            weight = module._parameters.get("weight")
            if weight is None or weight.requires_grad:
                continue
            if type(module) is nn.Linear and weight.numel() * weight.element_size() <= budget:
                found = frozen_layers.quick_linear(module, frozen_layers.MIN_WIDTH if training else 1)
                if found is None:
                    continue
                budget -= weight.numel() * weight.element_size()
                quick, packed = found
                for plug in self._socket(path).plugs:
                    if plug.site.rows is None and plug.site.expert is None:
                        plug.base.packed = packed
            else:
                norm = frozen_layers.quick_norm(module)
                if norm is None:
                    continue
                quick = norm
            self._socket(path).__dict__["quick"] = quick
            count += 1
        self._refresh()
        return count

    def route_attention(self) -> bool:
        """Send the model's attention through our own function, where all of it uses the interface. Idempotent."""
        if self._attention is None and self.anatomy.attentions and all(a.interface for a in self.anatomy.attentions):
            self._attention = prefix_attention.install(self.model)
        return self._attention is not None

    def narrow(self) -> Narrow | None:
        """Compute the last block for the first token alone where the head reads no other; None where it may not be.

        Not with prompts or a branch on the model, nor where something in the last block needs all tokens.
        """
        place = first_token_place(self.anatomy, self._modules)
        if place is None or self._prompts is not None or self._branches:
            return None
        block = self.anatomy.blocks[-1]
        plugs = [p for path, s in self._sockets.items() if path.startswith(block.path) for p in s.plugs]
        for plug in plugs:
            # What these read lies before the cut, and what they change behind it.
            across = plug.site.kind in ("attn_out", "block_out") and plug.attachment.needs_input
            if across or not plug.attachment.per_token:
                return None
        if self._narrow is None:  # tried once: the head stays what it is, and one hook serves all who ask
            reads = head_reads_first_token(self.model, self._modules[block.path], self.anatomy.vocab_size or 2)
            self._narrow = (Narrow(place) if reads else None,)
            self._hooks += [n.handle for n in self._narrow if n is not None]
        return self._narrow[0]

    # ------------------------------------------------------------------ listening

    def checkpoint_activations(self) -> None:
        """Compute activations of the blocks twice instead of keeping them: less memory, more time, the same gradients.

        The non-reentrant kind: with a frozen base the other one has no gradient to start from.
        """
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # transformers before 5.20 or so
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def listen(self, inputs: dict[str, Any]) -> None:
        """Note the batch before a pass that does not enter through the whole model's `forward`."""
        self._listen(self.model, (), inputs)
        self._inside = False

    def _listen(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the start of each forward pass: facts of the batch, and prefixes outside any checkpointed block."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        text = next(
            (given[n] for n in ("input_ids", "inputs_embeds", "decoder_input_ids") if given.get(n) is not None), None
        )
        cache = given.get("past_key_values")
        context = self.context
        context.past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        context.n_tokens = int(text.shape[1]) if text is not None else 0
        context.batch = int(text.shape[0]) if text is not None else 0
        mask = given.get("attention_mask")
        context.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        context.decoder_mask = given.get("decoder_attention_mask") if self.anatomy.is_encoder_decoder else context.mask
        if context.past == 0 and not context.generating:
            context.memory.clear()
        self._inside = True
        if self._serving is not None:
            self._serve(given)
        for name, source, prefixes in self._prefixes:
            live = self.tunings[name].active
            pairs = source.keys_values(context) if live else [(None, None)] * len(prefixes)  # type: ignore[operator]
            for prefix, (keys, values) in zip(prefixes, pairs, strict=True):
                prefix.keys, prefix.values = keys, values

    def _listen_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            names = inspect.signature(encoder.forward).parameters
            self._listen(self.model, (), dict(zip(names, args, strict=False)) | kwargs)
            self._inside = False

    def _leave(self, model: nn.Module, args: Any, out: Any) -> None:
        self._inside = False

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` with one memory for all its steps, also where no cache tells the first from the later ones."""
        self.context.memory.clear()
        if self._serving is not None and self._serving.rows is not None:
            texts = (*args, *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds")))
            text = next((t for t in texts if isinstance(t, Tensor)), None)
            self._serving.rows.hear(1 if text is None else len(text), False)
        self.context.generating = True
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.context.generating = False
            self.context.memory.clear()

    def _save_pretrained(
        self, save_directory: Any, *args: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """What a foreign trainer saves of the model: see `other_trainers.save_checkpoint`."""
        if is_main_process:
            other_trainers.save_checkpoint(self, save_directory, state_dict)

    def __deepcopy__(self, memo: Any) -> Any:
        raise ConfigError(
            "a tuned model cannot be copied: its hooks would act on the original. Copy the base before attaching (or "
            "load it again) and attach or load the tuning there; tuned.base_only() gives the base as a reference."
        )

    # ------------------------------------------------------------------ switching

    def activate(self, *names: str) -> None:
        """Let exactly these tunings act. None named: the base model.

        Raises:
            CompositionError: two of them cannot act at once; nothing is changed then.
            ConfigError: the tunings are folded into the weights.
        """
        self._refuse_folded("activate")
        if self._serving is not None and self._serving.rows is not None:
            raise ConfigError("activate: inside rows() every row has its own tuning. Leave the block first.")
        wanted = [self.tuning(n) for n in dict.fromkeys(names)]
        for i, one in enumerate(wanted):
            for other in wanted[i + 1 :]:
                who = f"{one.tuning_name} and {other.tuning_name}"
                if compose.spell(one.method) != compose.spell(other.method):
                    self._stand_together(one.method, other.method, f"{who}: ")
                if (what := self._shared(one, other)) is not None:
                    raise CompositionError(f"{who} both want {what}; one can act at a time.")
        for tuning in self.tunings.values():
            if tuning not in wanted:
                self._park(tuning)
        for tuning in wanted:
            self._wake(tuning)
        self._refresh()

    def train_only(self, *names: str) -> None:
        """Let exactly these tunings learn; the others keep acting, frozen."""
        wanted = {self.tuning(n).tuning_name for n in names}
        for tuning in self.tunings.values():
            tuning.trainable = tuning.tuning_name in wanted
            for key_, module in tuning.modules_by_key().items():
                for short, parameter in module.named_parameters():
                    parameter.requires_grad_(tuning.trainable and f"{key_}.{short}" not in tuning.fixed)
        self._settle()

    def _settle(self) -> None:
        """A tensor of the model learns if an active tuning that trains holds it."""
        learns: dict[int, tuple[nn.Parameter, bool]] = {}
        for tuning in self.tunings.values():
            for unfrozen in tuning.unfrozen.values():
                parameter = unfrozen.parameter
                before = learns.get(id(parameter), (parameter, False))[1]
                learns[id(parameter)] = (parameter, before or (tuning.active and tuning.trainable))
        for parameter, now in learns.values():
            parameter.requires_grad_(now)

    @contextmanager
    def base_only(self) -> Iterator[Any]:
        """The base model, for the length of a `with` block."""
        before, folded = [t.tuning_name for t in self._active()], self._folded is not None
        self.unfold()
        self.activate()
        try:
            yield self.model
        finally:
            self.activate(*before)
            if folded:
                self.fold()

    # ------------------------------------------------------------------ answering

    def sockets(self) -> list[Socket]:
        """Every socket once."""
        return list({id(s): s for s in self._sockets.values()}.values())

    @contextmanager
    def serving(self) -> Iterator[Any]:
        """For answering only: inside the block numbers are read once, so each pass costs less. Gives no gradient.

        What is written to a tuning or to the model inside the block may not be seen. `activate` and `rows` work inside;
        adding, removing and folding wait until the block is left. Results are those outside, to rounding.

        Raises:
            ConfigError: the model is in training mode.
        """
        self._refuse_training("serving()")
        if self._serving is not None:
            yield self.model
            return
        with torch.no_grad():
            self._serving = Serving(self)
            self._serving.install()
            try:
                yield self.model
            finally:
                self._serving.remove()
                self._serving = None

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[Any]:
        """Inside the block every row of a batch has its own tuning: `names[i]` acts in row i, None is the base.

        Whatever else is active sleeps. Low-rank updates are computed for all rows at once; other attachments group by
        group, with the same results. `generate` works, with beams and samples too. Entered inside `serving()`, it only
        changes names; alone it reads all numbers each time. Gives no gradient.

        >>> with tuned.serving(), tuned.rows(["support", None, "legal"]):  # doctest: +SKIP
        ...     out = model(**batch_of_three)

        Raises:
            UnknownName: no tuning is called so.
            CompositionError: a method that acts on all rows at once is named beside others.
            ConfigError: training mode, folded tunings, rows inside rows; in the pass, another number of rows.
        """
        self._refuse_training("rows()")
        self._refuse_folded("rows()")
        with self.serving():
            serving = self._serving
            assert serving is not None
            if serving.rows is not None:
                raise ConfigError("rows: already inside such a block. Leave it before naming other rows.")
            rows = serving.name_rows(names)
            awake = [t.tuning_name for t in self._active()]
            # What acts outside of the sockets acts on every row: only one that has all rows may be awake.
            wanted = [rows.only] if rows.only is not None and serving.problems[rows.only] else []
            loud = [n for n in awake if serving.problems[n] and n not in wanted]
            if loud or wanted:
                self.activate(*wanted)
            serving.rows = None if wanted else rows
            try:
                yield self.model
            finally:
                serving.rows = None
                if loud or wanted:
                    self.activate(*awake)

    def _refuse_training(self, doing: str) -> None:
        if self.model.training:
            raise ConfigError(f"{doing}: the model is in training mode, and this is for answering. Call model.eval().")

    def _serve(self, given: dict[str, Any]) -> None:
        self._refuse_training("a pass inside serving() or rows()")
        rows: RowNames | None = None if self._serving is None else self._serving.rows
        if rows is not None:
            if torch.is_grad_enabled():
                raise ConfigError("rows: different tunings in one batch give no gradient. Leave enable_grad() out.")
            first = next((v for v in given.values() if isinstance(v, Tensor) and v.dim() > 0), None)
            rows.hear(self.context.batch or (0 if first is None else len(first)), self.context.generating)

    def _park(self, tuning: Tuning) -> None:
        if tuning.active:
            for unfrozen in tuning.unfrozen.values():
                unfrozen.parked = unfrozen.parameter.data
                unfrozen.parameter.data = unfrozen.original
            tuning.active = False

    def _wake(self, tuning: Tuning) -> None:
        if not tuning.active:
            for unfrozen in tuning.unfrozen.values():
                assert unfrozen.parked is not None
                unfrozen.parameter.data = unfrozen.parked
                unfrozen.parked = None
            tuning.active = True

    def _refresh(self) -> None:
        self._settle()
        active = {t.tuning_name for t in self.tunings.values() if t.active}
        for socket in self.sockets():
            socket.refresh(active, folded=self._folded is not None)
        for name, branch in self._branches.items():
            branch.enabled = name in active
        sources = [
            m
            for t in self.tunings.values()
            if t.active
            for k, m in t.modules_by_key().items()
            if k == "prompt" or k.endswith(":prompt")
        ]
        if sources and self._prompts is None:
            stack, embed, decoder = self._text_stack()
            self._prompts = PromptHooks(self.model, stack, embed, decoder, self.anatomy.max_positions)
        if self._prompts is not None:
            self._prompts.sources = sources
        if self._serving is not None:
            self._serving.refresh()

    def _text_stack(self) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        embed = self._modules[self.anatomy.sites("embed", asked_by="prompt vectors")[0].path]
        if self.anatomy.is_encoder_decoder:
            return self.model.get_encoder(), embed, self.model.get_decoder()
        return text_stack(self._modules, self.anatomy), embed, None

    # ------------------------------------------------------------------ masked updates

    def mask_gradients(self) -> None:
        """Zero the gradient outside every update mask: before clipping, so that the norm is of what moves."""
        for tuning in self.tunings.values():
            for unfrozen in tuning.unfrozen.values():
                if unfrozen.mask is not None and unfrozen.parameter.grad is not None:
                    unfrozen.parameter.grad.mul_(unfrozen.mask)

    @torch.no_grad()
    def constrain(self) -> None:
        """Undo whatever moved outside an update mask: decay and momentum included."""
        for tuning in self.tunings.values():
            if tuning.active:
                for unfrozen in tuning.unfrozen.values():
                    if unfrozen.mask is not None and unfrozen.holds:
                        held = unfrozen.parameter.data
                        torch.where(unfrozen.mask, held, unfrozen.original.to(held.dtype), out=held)

    def set_mask(self, key_: str, mask: Tensor | None, *, name: str | None = None) -> None:
        """Give an unfrozen tensor its update mask; for a method's `prepare`."""
        self.tuning(name).unfrozen[key_].mask = mask

    # ------------------------------------------------------------------ undoing

    def remove(self, name: str) -> None:
        """Take one tuning off, and restore what it changed bit for bit."""
        self._refuse_folded("remove")
        self._refuse_serving("remove")
        tuning = self.tuning(name)
        self._park(tuning)  # asleep, it holds nothing of the model: what stands there may be another tuning's value
        others = {id(u.parameter) for t in self.tunings.values() if t is not tuning for u in t.unfrozen.values()}
        for unfrozen in tuning.unfrozen.values():
            if id(unfrozen.parameter) not in others:
                unfrozen.parameter.grad = None
                unfrozen.parameter.requires_grad_(False)
        for socket in self._sockets.values():
            socket.__dict__["plugs"] = [p for p in socket.plugs if p.tuning != name]
            socket.__dict__["substitutes"] = [s for s in socket.substitutes if s.tuning != name]
        for held, handle in list(self._taps):
            if held == name:
                handle.remove()
        self._taps = [t for t in self._taps if t[0] != name]
        for held, _, prefixes in self._prefixes:
            if held == name:
                for module in self._modules.values():
                    listed = module.__dict__.get("_luthier_prefixes")
                    if listed is not None:
                        module.__dict__["_luthier_prefixes"] = [p for p in listed if p not in prefixes]
        self._prefixes = [p for p in self._prefixes if p[0] != name]
        if name in self._branches:
            self._branches.pop(name).remove()
        del self.tunings[name]
        del self.model.luthier[name]
        self._refresh()

    def detach(self) -> Any:
        """Take everything off and give the model back, name for name and bit for bit."""
        self.unfold()
        for name in list(self.tunings):
            self.remove(name)
        return self._strip()

    def _strip(self) -> Any:
        for path, places in self._sites.items():
            for parent, child_name in places:
                parent._modules[child_name] = self._sockets[path].base
        if self._prompts is not None:
            self._prompts.remove()
        if self._attention is not None:
            prefix_attention.uninstall(self._attention)
        for module in self._modules.values():
            module.__dict__.pop("_luthier_prefixes", None)
        for hook in self._hooks:
            hook.remove()
        other_trainers.unwatch(self)
        for given in ("generate", "save_pretrained"):
            self.model.__dict__.pop(given, None)
        for name, required in self._required.items():
            self._parameters[name].requires_grad_(required)
        del self.model._modules["luthier"]
        del self.model.__dict__["_luthier_tuned"]
        return self.model

    # ------------------------------------------------------------------ merging

    @torch.no_grad()
    def fold(self) -> None:
        """Compute every active tuning into the base weights: fp32, cast once. `unfold` restores a kept copy.

        Raises:
            CannotMerge: a part has no closed form; nothing has been changed then.
        """
        if self._folded is not None:
            return
        self._refuse_serving("fold")
        merging.check(self)
        # Compute everything before writing anything: a failure must leave the model as it was.
        new = merging.merged_tensors(self)
        self._folded = [(held, held.detach().clone()) for held, _ in new]
        for held, value in new:
            held.copy_(value)
        self._refresh()

    @torch.no_grad()
    def unfold(self) -> None:
        """Put the kept base weights back, bit for bit; the tunings act as attachments again."""
        if self._folded is not None:
            for held, copy in self._folded:
                held.copy_(copy)
            self._folded = None
            self._refresh()

    def merge(self, *, check: Mapping[str, Any] | None = None, tolerance: float = 0.25) -> Any:
        """Fold the active tunings into the weights and give back a plain model, without a trace of ours.

        Tunings that sleep are dropped.

        Args:
            check: a batch for the model's `forward`. The merged model's logits are then compared with the attached
                one's, in evaluation mode.
            tolerance: how far they may lie apart, as a share of what the tuning changes on that batch.

        Raises:
            CannotMerge: a part has no closed form (the message names it), the merged weights equal the base's, or the
                comparison fails. Nothing has been changed then.
        """
        wanted = base = None
        if check is not None:
            wanted = merging.probe(self, check)
            with self.base_only():
                base = merging.probe(self, check)
        changed = any(
            not torch.equal(u.parameter.detach(), u.original.to(u.parameter.dtype))
            for t in self._active()
            for u in t.unfrozen.values()
        )
        self.fold()
        assert self._folded is not None
        try:
            if not changed and all(torch.equal(held, copy) for held, copy in self._folded):
                raise CannotMerge(
                    "the merged weights equal the base's: the tunings are untrained, or all that they change is lost "
                    "in the rounding of the base's type. Serve them attached, or load the base in float32."
                )
            if wanted is not None and base is not None:
                effect, error = _rms(wanted - base), _rms(merging.probe(self, check) - wanted)
                if not error <= tolerance * effect:
                    raise CannotMerge(
                        f"merged, the logits are off by {error:.3g} where the tuning changes them by {effect:.3g}: "
                        f"above the tolerance of {tolerance:g}. Serve it attached, or merge into a base in float32."
                    )
        except BaseException:
            self.unfold()
            raise
        self._folded = None
        for tuning in self._active():
            for unfrozen in tuning.unfrozen.values():
                unfrozen.original = unfrozen.parameter.data.to(unfrozen.original.dtype)
        for name in list(self.tunings):
            self.remove(name)
        return self._strip()

    def save(self, folder: Any, *, name: str | None = None, about: dict[str, Any] | None = None) -> str:
        """Write one tuning as safetensors and JSON; returns its digest. See `tuning_files.save`."""
        from luthier.surgery import tuning_files  # below us in the file order, beside us on the floor

        return tuning_files.save(self, folder, name=name, about=about)

    def finish(self) -> None:
        """Bring every tuning that trained into the form that is stored and served."""
        for tuning in self.tunings.values():
            if not tuning.finished:
                for part in tuning.method.parts():
                    part.finish(self)
                tuning.finished = True
        self._refresh()

    # ------------------------------------------------------------------ state of training

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a tuning carries in its training form: trained tensors, buffers, masks; no frozen weight."""
        state: dict[str, Tensor] = {}
        for tuning in self.tunings.values():
            for key_, module in tuning.modules_by_key().items():
                for short, tensor in module.state_dict().items():
                    state[f"{tuning.tuning_name}|{key_}|{short}"] = tensor.detach()
            for key_, unfrozen in tuning.unfrozen.items():
                value = unfrozen.parameter.detach() if unfrozen.parked is None else unfrozen.parked
                state[f"{tuning.tuning_name}|{key_}|value"] = value
                if unfrozen.mask is not None:
                    state[f"{tuning.tuning_name}|{key_}|mask"] = unfrozen.mask
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`, into tunings attached from the same methods."""
        by_module: dict[tuple[str, str], dict[str, Tensor]] = {}
        for full, tensor in state.items():
            tuning_name, key_, short = full.split("|")
            by_module.setdefault((tuning_name, key_), {})[short] = tensor
        for (tuning_name, key_), tensors in by_module.items():
            tuning = self.tuning(tuning_name)
            if key_ in tuning.unfrozen:
                unfrozen = tuning.unfrozen[key_]
                unfrozen.parameter.data.copy_(tensors["value"])
                unfrozen.mask = tensors["mask"].to(unfrozen.parameter.device) if "mask" in tensors else unfrozen.mask
            else:
                tuning.modules_by_key()[key_].load_state_dict(tensors, strict=True)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


class _Shelf(nn.ModuleDict):
    """The tunings, where the model registers them. What is moved or cast takes along what lies beside it."""

    def __init__(self, tuned: Tuned) -> None:
        super().__init__()
        # A module begins in training mode, and a loaded model in evaluation: whoever asks this one for all that is
        # attached would be told the wrong thing.
        self.train(tuned.model.training)
        self.__dict__["tuned"] = tuned

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tuned: Tuned = self.__dict__["tuned"]
        for tuning in tuned.tunings.values():
            for unfrozen in tuning.unfrozen.values():
                where = unfrozen.parameter.device
                for part in ("kept", "mask", "parked"):
                    held = getattr(unfrozen, part)
                    setattr(unfrozen, part, None if held is None else held.to(where))
        for socket in tuned._sockets.values():
            for plug in socket.plugs:
                plug.read_dtype()
        return self


def attach(
    model: Any,
    method: Method | str,
    *,
    name: str = "default",
    seed: int = 0,
    train_head: bool = True,
    new_tensors: Sequence[str] = (),
    **settings: Any,
) -> Tuned:
    """Edit a Hugging Face model in place so that `method` can train; the model keeps its class.

    Args:
        model: any transformer whose anatomy can be read. All its weights are frozen first.
        method: a method, or its name, such as "lora" or "lora+prompt_tuning"; `settings` go to a name.
        name: of this tuning, where a model holds several.
        seed: of the new numbers.
        train_head: also train a new task head (a classifier); a language-model head is never touched.
        new_tensors: names of further tensors that no checkpoint filled; they train with the head.

    Raises:
        UnknownName, ConfigError: no such method or setting.
        AnatomyError: the model lacks a site that the method asks for.
        CompositionError: the method cannot stand beside what is there.
    """
    if isinstance(method, str):
        method = compose.method(method, settings)
    elif settings:
        raise ConfigError(
            f"settings {', '.join(settings)}: pass them to the method itself, {type(method).__name__}(...)."
        )
    tuned = Tuned.of(model) or Tuned(model, new_tensors)
    try:
        tuned.add(method, name=name, seed=seed, train_head=train_head)
    except BaseException:
        if not tuned.tunings:  # nothing of ours may stay on the user's model
            tuned._strip()
        raise
    return tuned


__all__ += ["METHODS", "Attachment", "Base", "keyed"]
