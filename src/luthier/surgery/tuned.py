"""A model with its edits in place: several named tunings, of which some are active and some train.

`Tuned` is the front. Behind it stand objects with one trade each, which share an `EditedModel`:

    edited     EditedModel     the model's own layers and tensors, the sockets, the tunings
    serving    Serving         blocks in which the model only answers
    forward    Forward         hooks around a pass: facts of the batch, prefixes, prompts, branches
    installer  Installer       edits put on, and taken off
    fast       FastPath        frozen layers as faster functions
    state      TrainingState   trained tensors, masks, checkpoints
    merging    Merging         tunings folded into the weights
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from luthier.core import CompositionError, ConfigError, human_count
from luthier.core.protocols import Model
from luthier.surgery import compose, install, merging, other_trainers, tuning_files
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.fast_path import FastPath
from luthier.surgery.forward import Forward
from luthier.surgery.install import Installer
from luthier.surgery.merging import Merging
from luthier.surgery.method import Group, Method
from luthier.surgery.serving import Serving
from luthier.surgery.source import Source
from luthier.surgery.sources import check_weights, opened
from luthier.surgery.training_state import TrainingState
from luthier.surgery.tuning import Tuning

__all__ = ["Tuned", "attach"]


class Tuned:
    """A model and the tunings on it. Made by `attach`.

    *active*, *trainable* and *frozen* are three separate facts: `activate` says which tunings act, `train_only` which
    of them learn; `print(tuned)` shows both.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20))
    >>> tuned = attach(model, "lora", name="first", rank=2)
    >>> print(tuned)
    BertForSequenceClassification, 9.3 k numbers in the base
      first: lora, active, trains, 218 in 6 places
    >>> Tuned.of(model) is tuned
    True
    >>> tuned.activate()  # nothing acts: the base model
    >>> tuned.detach() is model  # everything taken off, bit for bit
    True

    Attributes:
        model: the user's model, which keeps its class.
        anatomy: what it is made of.
        context: facts of the current forward pass.
        tunings: by name, in the order in which they were added.
        forward, fast, state, merging: see the top of this file.
        calls_hooks: a loop of one's own that calls the methods' hooks says so here.
    """

    def __init__(self, model: Model, new_tensors: Sequence[str] = ()) -> None:
        self.edited = EditedModel(model, new_tensors)
        self.model, self.anatomy = model, self.edited.anatomy
        self.context, self.tunings = self.edited.context, self.edited.tunings
        # In the order in which they are told that other tunings act.
        self.state = TrainingState(self.edited)
        self._serving = Serving(self.edited)
        self.forward = Forward(self.edited, self._serving)
        self.fast = FastPath(self.edited, self.forward)
        self.merging = Merging(self.edited, self._serving)
        self._installer = Installer(self.edited, self.forward)
        self.calls_hooks = False
        model.__dict__["save_pretrained"] = self._save_pretrained
        model.__dict__["_luthier_tuned"] = self
        other_trainers.watch(self)

    # ------------------------------------------------------------------ looking

    @staticmethod
    def of(model: Model) -> Tuned | None:
        """The `Tuned` that holds `model`, if one does."""
        found = model.__dict__.get("_luthier_tuned")
        return found if isinstance(found, Tuned) else None

    def tuning(self, name: str | None = None) -> Tuning:
        """The tuning called `name`; with one tuning on the model the name may be left out.

        Raises:
            UnknownName: none is called so, or the name is missing where there are several.
        """
        return self.edited.tuning(name)

    def trained(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Canonical name -> trained tensor, of the tuning called `name`, or of all that act and train.

        A tuning that is not active gets no gradient, and a tensor of the model that it trains holds another value
        meanwhile.
        """
        return self.state.trained(name)

    def n_trained(self, *, head: bool = False) -> int:
        """Trained numbers; with `head`, those of a new task head too. A mask counts only what it lets move."""
        return self.state.n_trained(head=head)

    def groups(self) -> list[Group]:
        """The methods' own learning rates and decays, of all tunings that train."""
        return [g for t in self.edited.active() if t.trainable for part in t.method.parts() for g in part.groups(self)]

    def modules(self, kind: type[nn.Module] = nn.Module, *, name: str | None = None) -> dict[str, Any]:
        """Canonical key -> module of the given class, of one tuning or all."""
        return {
            k: m
            for t in self.tunings.values()
            if name is None or t.tuning_name == name
            for k, m in t.modules_by_key().items()
            if isinstance(m, kind)
        }

    def let_rest(self, name: str, modules: Collection[nn.Module]) -> None:
        """Let exactly these attachments of the tuning called `name` sit out from now on; none of them: all act."""
        self.edited.let_rest(name, modules)

    def tensor(self, name: str) -> nn.Parameter:
        """The model's own tensor of a canonical name, whatever stands around its layer by now."""
        return self.edited.parameters[name]

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
            facts = f"{'active' if row['active'] else 'inactive'}, {'trains' if row['trainable'] else 'frozen'}"
            lines.append(
                f"  {row['tuning']}: {row['method']}, {facts}, {human_count(row['numbers'])} in {row['places']} places"
            )
        return "\n".join(lines)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ adding and removing

    def add(
        self, method: Method | str, *, name: str = "default", seed: int = 0, train_head: bool = True,
        sources: Sequence[Source | Path | str] = (),
    ) -> Tuning:  # fmt: skip
        """Carry out a method's edits under a new name; it becomes active and trainable beside the others.

        A tuning of the same method that holds what the new one needs (the same tensor, the attention's prefix, the one
        side network) becomes inactive; `activate` changes between them.

        Raises:
            ConfigError: the name is taken.
            AnatomyError: the model lacks a site that the method asks for.
            CompositionError: the method cannot stand beside what is active. Nothing has been changed then.
            WrongBase: a source was made for another model.
        """
        if isinstance(method, str):
            method = compose.method(method)
        material = opened(sources)
        if material:
            method = compose.fitted(method, material)
            check_weights(self.edited, material)
        if name in self.tunings or not name or "." in name or "/" in name or ":" in name or "|" in name:
            raise ConfigError(
                f"tuning name {name!r}: it must be new, not empty, and hold none of . / : | on this model."
            )
        if hasattr(self.model.luthier, name):  # torch registers no module under a name that its class has
            raise ConfigError(f"tuning name {name!r}: torch's modules have an attribute of that name. Choose another.")
        self.edited.refuse_folded("adding a tuning")
        self._serving.refuse("adding a tuning")
        active = self.edited.active()
        for other in active:
            compose.check_beside(other.method, method, f"{name} and {other.tuning_name}: ")
        tuning = Tuning(name, method)
        edits = install.edits_of(method, self.edited, seed, train_head=train_head)
        tuning.claims = install.check(self.edited, edits, method)
        tuning.train(self.model.training)
        self.tunings[name] = tuning
        self.model.luthier[name] = tuning
        try:
            for other in active:
                if other.shared_with(tuning):
                    other.deactivate()
            for prefix, edit in edits:
                self._installer.install(tuning, prefix, edit, seed)
            tuning.sources = [source.facts() for source in material]
            for part in method.parts() if material else ():
                part.adopt(self, [source for source in material if compose.takes(part, source)])
            install.begin(self, tuning, seed)
        except BaseException:
            self.remove(name)
            self.activate(*(t.tuning_name for t in active))
            raise
        tuning.note_fixed()
        self.edited.refresh()
        return tuning

    def remove(self, name: str) -> None:
        """Take one tuning off, and restore what it changed bit for bit."""
        self.edited.refuse_folded("remove")
        self._serving.refuse("remove")
        tuning = self.tuning(name)
        tuning.deactivate()  # it holds nothing of the model then: what stands there may be another tuning's value
        self._installer.remove(tuning)
        del self.tunings[name]
        del self.model.luthier[name]
        self.edited.refresh()

    def detach(self) -> Any:
        """Take everything off and give the model back, name for name and bit for bit."""
        self.merging.unfold()
        for name in list(self.tunings):
            self.remove(name)
        self.forward.close()
        self.fast.close()
        other_trainers.unwatch(self)
        self.edited.restore()
        del self.model.__dict__["save_pretrained"]
        del self.model.__dict__["_luthier_tuned"]
        return self.model

    # ------------------------------------------------------------------ switching

    def activate(self, *names: str) -> None:
        """Let exactly these tunings act. None named: the base model.

        Raises:
            CompositionError: two of them cannot act at once; nothing is changed then.
            ConfigError: the tunings are folded into the weights.
        """
        self.edited.refuse_folded("activate")
        if self._serving.rows is not None:
            raise ConfigError("activate: inside rows() every row has its own tuning. Leave the block first.")
        wanted = [self.tuning(n) for n in dict.fromkeys(names)]
        for i, one in enumerate(wanted):
            for other in wanted[i + 1 :]:
                who = f"{one.tuning_name} and {other.tuning_name}"
                compose.check_beside(one.method, other.method, f"{who}: ")
                if (what := one.shared_with(other)) is not None:
                    raise CompositionError(f"{who} both want {what}; one can act at a time.")
        self.edited.set_active([t.tuning_name for t in wanted])

    def train_only(self, *names: str) -> None:
        """Let exactly these tunings learn; the others keep acting, frozen."""
        self.state.train_only(*names)

    @contextmanager
    def base_only(self) -> Iterator[Any]:
        """The base model, for the length of a `with` block."""
        before, folded = [t.tuning_name for t in self.edited.active()], self.edited.folded
        self.merging.unfold()
        self.activate()
        try:
            yield self.model
        finally:
            self.activate(*before)
            if folded:
                self.merging.fold()

    def checkpoint_activations(self) -> None:
        """Compute activations of the blocks twice instead of keeping them: less memory, more time, the same gradients.

        Each block finds the model as it was in its own pass, whatever has been activated since.
        """
        self.forward.checkpoint_activations()

    # ------------------------------------------------------------------ answering

    def serving(self) -> AbstractContextManager[Any]:
        """For answering only: inside the block numbers are read once, so each pass costs less. Gives no gradient.

        What is written to a tuning or to the model inside the block may not be seen. `activate` and `rows` work inside;
        adding, removing and folding wait until the block is left. Results are those outside, to rounding.

        Raises:
            ConfigError: the model is in training mode.
        """
        return self._serving.block()

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[Any]:
        """Inside the block every row of a batch has its own tuning: `names[i]` acts in row i, None is the base.

        Whatever else is active does not act. Low-rank updates are computed for all rows at once; other attachments
        group by group, with the same results. `generate` works, with beams and samples too. Entered inside `serving()`,
        it only changes names; alone it reads all numbers each time. Gives no gradient.

        >>> with tuned.serving(), tuned.rows(["support", None, "legal"]):  # doctest: +SKIP
        ...     out = model(**batch_of_three)

        Raises:
            UnknownName: no tuning is called so.
            CompositionError: a method that acts on all rows at once is named beside others.
            ConfigError: training mode, folded tunings, rows inside rows; in the pass, another number of rows.
        """
        return self._serving.by_row(names)

    # ------------------------------------------------------------------ results

    def finish(self) -> None:
        """Bring every tuning that trained into the form that is stored and served."""
        for tuning in self.tunings.values():
            if not tuning.finished:
                for part in tuning.method.parts():
                    part.finish(self)
                tuning.finished = True
        self.edited.refresh()

    def save(self, folder: Path | str, *, name: str | None = None, about: dict[str, Any] | None = None) -> str:
        """Write one tuning as safetensors and JSON; returns its digest. See `tuning_files.save`."""
        return tuning_files.save(self.edited, folder, name=name, about=about)

    def merge(self, *, check: Mapping[str, Any] | None = None, tolerance: float = 0.25) -> Any:
        """Fold the active tunings into the weights and give back a plain model, without a trace of ours.

        Tunings that are not active are dropped.

        Args:
            check: a batch for the model's `forward`. The merged model's logits are then compared with the attached
                one's, in evaluation mode.
            tolerance: how far they may lie apart, as a share of what the tuning changes on that batch.

        Raises:
            CannotMerge: a part has no closed form (the message names it), the merged weights equal the base's, or the
                comparison fails. Nothing has been changed then.
        """
        wanted: Tensor | None = None
        base: Tensor | None = None
        if check is not None:
            wanted = merging.probe(self.model, check)
            with self.base_only():
                base = merging.probe(self.model, check)
        self.merging.commit(check, wanted, base, tolerance)
        return self.detach()

    def _save_pretrained(
        self, save_directory: Any, *args: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """What another trainer saves of the model: see `other_trainers.save_checkpoint`."""
        if is_main_process:
            other_trainers.save_checkpoint(self, save_directory, state_dict)


def check_loaded(model: object, who: str) -> None:
    """Refuse a name where a model is wanted.

    Raises:
        ConfigError: it is no model; says what to pass.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str | Path):
        name = str(model)
        sample = name.startswith("sample:")
        place = f"luthier.samples.model_path({name.removeprefix('sample:')!r})" if sample else repr(name)
        raise ConfigError(
            f"{who}: got the name {name!r} where a loaded model is wanted. Load it first, such as "
            f"transformers.AutoModelForSequenceClassification.from_pretrained({place}); luthier.train takes names."
        )
    raise ConfigError(f"{who}: got {type(model).__name__} where a loaded model of transformers (a Module) is wanted.")


def attach(
    model: Model,
    method: Method | str,
    *,
    name: str = "default",
    seed: int = 0,
    train_head: bool = True,
    new_tensors: Sequence[str] = (),
    sources: Sequence[Source | Path | str] = (),
    **settings: Any,
) -> Tuned:
    """Edit a Hugging Face model in place so that `method` can train; the model keeps its class.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20))
    >>> tuned = attach(model, "lora", rank=2)
    >>> tuned.n_trained()  # 2 layers, q and v, a matrix to and one from two numbers
    192
    >>> type(model).__name__
    'BertForSequenceClassification'

    Args:
        model: any transformer whose anatomy can be read. All its weights are frozen first.
        method: a method, or its name, such as "lora" or "lora+prompt_tuning"; `settings` go to a name.
        name: of this tuning, where a model holds several.
        seed: of the new numbers.
        train_head: also train a new task head (a classifier); a language-model head is never touched.
        new_tensors: names of further tensors that no checkpoint filled; they train with the head.
        sources: for a method that is made of saved tunings: their folders, or those of their runs.

    Raises:
        UnknownName, ConfigError: no such method or setting.
        AnatomyError: the model lacks a site that the method asks for.
        CompositionError: the method cannot stand beside what is there.
    """
    check_loaded(model, "attach")
    if isinstance(method, str):
        method = compose.method(method, settings)
    elif settings:
        raise ConfigError(
            f"settings {', '.join(settings)}: pass them to the method itself, {type(method).__name__}(...)."
        )
    model = getattr(model, "_orig_mod", model)  # compiled before: edits go to what is called from there
    tuned = Tuned.of(model) or Tuned(model, new_tensors)
    try:
        tuned.add(method, name=name, seed=seed, train_head=train_head, sources=sources)
    except BaseException:
        if not tuned.tunings:  # nothing of ours may stay on the user's model
            tuned.detach()
        raise
    return tuned
