"""The methods' hooks in the Trainer of transformers, and in those made from it, such as TRL's.

Most methods need nothing: their numbers are parameters, and masks are held around every `optimizer.step`. Some have to
be asked: for their loss (adamix), for a penalty (adalora, diff_pruning), before and after each step. This asks them.

    begin of a step        before_step
    a training pass        loss, and the penalty in the first pass of a step
    before the optimiser   after_backward
    after it               on_step
    end of training        finish

What differs from luthier's own loop: gradients have been clipped when `after_backward` sees them.

TRL's SFTTrainer reads no loss from the model: it has log-probabilities computed in one piece with the head, without
logits, and makes the loss of them. There a method's loss is given back as log-probabilities of the same sum, and a
penalty goes into the gradients at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from luthier.core import ConfigError
from luthier.data.examples import IGNORED
from luthier.surgery import Method, Tuned, keyed

__all__ = ["HooksCallback"]


@dataclass
class _Pass:
    """One forward pass as methods know it: the loss is a sum over targets."""

    loss: Tensor
    logits: Tensor
    labels: Tensor | None


class HooksCallback(TrainerCallback):  # type: ignore[misc]  # transformers tells mypy no types
    """Give it to a Trainer (`callbacks=[...]`), and the methods on the model are asked as luthier's own loop asks them.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from luthier import attach
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20))
    >>> callback = HooksCallback(attach(model, "adalora", rank=3, target_rank=2))
    >>> callback.asks
    ('extra_loss', 'after_backward', 'on_step', 'finish')

    Args:
        tuned: what `attach` gave.
    """

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self._handle: Any = None
        self._penalty_due = False
        self._plain_sum = True  # the trainer adds log-probabilities up as they are, where it makes the loss of them
        self._scales = False  # fp16: gradients are of a loss times a number that only the trainer knows
        self._whole = 1  # passes by which the trainer will divide a loss that it did not scale itself

    @property
    def _parts(self) -> list[Method]:
        return [part for t in self.tuned.tunings.values() if t.trainable for part in t.method.parts()]

    @property
    def asks(self) -> tuple[str, ...]:
        """The hooks that the attached methods have."""
        hooks = ("before_step", "loss", "extra_loss", "after_backward", "on_step", "finish")
        return tuple(
            h
            for h in hooks
            if any(getattr(type(p), h) is not getattr(Method, h) and h not in p.idle for p in self._parts)
        )

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups with the methods' own rates (such as `b_rate` of lora), for an optimiser of your own.

        A trainer that makes its optimiser itself gives all numbers one rate.
        """
        left = dict(self.tuned.trained())
        found = []
        for group in self.tuned.groups():
            decay = weight_decay if group.weight_decay is None else group.weight_decay
            held = [left.pop(name) for name in group.names if name in left]
            if held:
                found.append({"params": held, "lr": lr * group.lr_factor, "weight_decay": decay})
        rest = {"params": list(left.values()), "lr": lr, "weight_decay": weight_decay}
        return [*found, rest] if left else found

    # ------------------------------------------------------------------ what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self._parts:
            if every := getattr(part, part.looks_again, 0):
                raise ConfigError(
                    f"{part.name}.{part.looks_again}: looks at the rows every {every} steps, and this callback has "
                    "none. Set it to 0, or use luthier's own loop (luthier train)."
                )
            # One that also has on_step begins its later phase there.
            if type(part).on_step is Method.on_step and (phases := part.phases(self.tuned)):
                raise ConfigError(
                    f"{part.name} cuts a run into {len(phases)} phases, which this trainer does not have: all of it "
                    "would be the first. Use luthier's own loop (luthier train)."
                )
        self.tuned.calls_hooks = True
        self._whole = int(args.gradient_accumulation_steps)
        self._plain_sum, self._scales = getattr(args, "loss_type", "nll") == "nll", bool(args.fp16)
        self._handle = self.tuned.model.register_forward_hook(self._after_forward, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._penalty_due = True
        for part in self._parts:
            if type(part).before_step is not Method.before_step:
                with keyed(args.seed, "before step", part.name, state.global_step):
                    part.before_step(self.tuned, state.global_step + 1, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self._parts:
            part.after_backward(self.tuned, state.global_step + 1, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self._parts:
            part.on_step(self.tuned, state.global_step + 1, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.tuned.calls_hooks = None, False
        self.tuned.finish()

    # ------------------------------------------------------------------ the loss

    def _after_forward(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the methods' loss in it, where this is a pass of training."""
        if not model.training:
            return None
        asked = [p for p in self._parts if type(p).loss is not Method.loss]
        loss = getattr(output, "loss", None)
        if loss is None:
            if asked or "extra_loss" in self.asks:
                name = (asked or self._parts)[0].name
                raise ConfigError(
                    f"{name} changes the loss, and this trainer computes it outside the model (label smoothing, "
                    "a loss function of its own, or preferences). Leave that out, or use luthier's own loop (luthier "
                    "train)."
                )
            return None
        labels = kwargs.get("labels")
        scaled = kwargs.get("num_items_in_batch")  # the trainer's: targets of the whole step
        n = _n_targets(labels, shifted=_predicts_next(self.tuned)) if scaled is None else scaled

        fused = getattr(output, "log_probs", None) is not None
        if fused:
            self._refuse_weighted(asked)
            kwargs = {name: value for name, value in kwargs.items() if name != "fused_lm_head"}
        made = [] if fused else [output]  # the pass that has just been made is the first one that a method asks for

        def forward() -> Any:
            out = made.pop() if made else model.forward(*args, **kwargs)
            return _Pass(out.loss * n, out.logits, labels)

        if asked:
            inner = forward
            for part in asked:
                inner = _around(part, self.tuned, inner)
            loss = inner().loss / n
        if self._penalty_due:
            self._penalty_due = False
            for part in self._parts:
                extra = part.extra_loss(self.tuned)
                if extra is not None and fused:
                    self._refuse_scaled(part)
                    torch.autograd.backward(extra)
                elif extra is not None:
                    loss = loss + extra * (1 if scaled is not None else self._whole)
        changed = copy.copy(output)
        changed["loss"] = loss
        if fused and asked:
            told = output.label_mask
            changed["log_probs"] = -(loss * n / told.sum().clamp(min=1)) * told  # as a sum, the method's loss
        return changed

    def _refuse_scaled(self, part: Method) -> None:
        if self._scales:
            raise ConfigError(
                f"{part.name} adds a penalty to the gradients here, and fp16 = True scales them. Use bf16 = True."
            )

    def _refuse_weighted(self, asked: list[Method]) -> None:
        if asked and not self._plain_sum:
            raise ConfigError(
                f"{asked[0].name} has a loss of its own, and loss_type = 'dft' weighs that of each token. Use "
                "loss_type = 'nll', or luthier's own loop with --strategy dft."
            )


def _around(part: Method, tuned: Tuned, inner: Any) -> Any:
    return lambda: part.loss(tuned, inner)


def _predicts_next(tuned: Tuned) -> bool:
    return tuned.anatomy.is_decoder and not tuned.anatomy.head_tensors


def _n_targets(labels: Any, *, shifted: bool) -> int:
    """Targets of one batch: rows, or the tokens that carry loss."""
    if labels.dim() < 2 or labels.is_floating_point():
        return max(1, len(labels))
    told = labels[:, 1:] if shifted else labels
    return max(1, int((told != IGNORED).sum()))
