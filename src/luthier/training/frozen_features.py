"""What a frozen trunk gives for each training row, computed once: later epochs cost the head alone.

    logits = head(feature(row))         feature: the one position of the last hidden states that the head reads

Kept only where that is the whole truth: a sequence classifier whose trunk is computed without dropout and holds nothing
of a method, whose head (and pooler) alone trains, and whose head reads one token of each row, which is tried out on a
small random batch: the logits of the head on the kept states must equal the model's own to the bit there.

A feature's last bits depend on the rows it is computed beside. So it is never computed beside those of its step, but
always in the same group: the rows sorted by length and cut once and for all. A resumed run begins with no features and
computes the same ones, whichever rows it meets first, and its steps are those of a run that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier import kernels
from luthier.core import human_bytes
from luthier.data.batches import Batch, Batches, cut
from luthier.surgery import Method, Tuned
from luthier.training.out_of_memory import is_out_of_memory, make_room

__all__ = ["LIMIT_BYTES", "Features", "Groups", "Trunk", "features_of"]

LIMIT_BYTES = 1 << 30
"""Features that take more are not kept at all: which rows lie in memory must not depend on the steps made so far."""

GROUP_ROWS = 64


class Trunk:
    """The part of a sequence classifier below its head, which can be stood in for by states that it gave before.

    Attributes:
        reads: "first" or "last", the token of each row that the head reads.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.module: nn.Module = model.base_model
        self.pooler = getattr(self.module, "pooler", None)
        self.reads = ""
        self.kind: Any = None  # the class of the trunk's outputs

    def states(self, inputs: dict[str, Tensor]) -> Tensor:
        """The last hidden states, (batch, tokens, d)."""
        out = self.module(**inputs)
        self.kind = type(out)
        states: Tensor = out[0]
        return states

    def logits(self, inputs: dict[str, Tensor], states: Tensor) -> Tensor:
        """What the model's own forward pass makes of `states`."""
        with self.standing_in(states):
            logits: Tensor = self.model(**inputs).logits
        return logits

    @contextmanager
    def standing_in(self, states: Tensor) -> Iterator[None]:
        """Within, the trunk gives these last hidden states, whatever it is asked."""

        def given(*args: Any, **kwargs: Any) -> Any:
            if self.pooler is None:
                return self.kind(last_hidden_state=states)
            return self.kind(last_hidden_state=states, pooler_output=self.pooler(states))

        self.module.__dict__["forward"] = given
        try:
            yield
        finally:
            del self.module.__dict__["forward"]

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        """The states that the head reads, (batch, d)."""
        if self.reads == "first":
            return states[:, 0]
        return states[torch.arange(len(states), device=states.device), mask.sum(-1) - 1]

    def laid_out(self, features: Tensor, mask: Tensor) -> Tensor:
        """The inverse of `read`: states that are zero where the head does not look."""
        if self.reads == "first":
            return features[:, None]
        states = features.new_zeros((*mask.shape, features.shape[-1]))
        states[torch.arange(len(states), device=states.device), mask.sum(-1) - 1] = features
        return states


class Groups:
    """Rows in groups that are the same whatever the steps are: what is kept of a row is computed in its group."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        lengths = batches.examples.lengths
        self.n_rows = len(lengths)
        everything = np.arange(self.n_rows, dtype=np.int64)
        self._groups = cut(everything, lengths, batches.tokens, GROUP_ROWS, batches.collator.pad_to)
        self._group_of = np.empty(self.n_rows, dtype=np.int64)
        for number, group in enumerate(self._groups):
            self._group_of[group] = number
        self._known = np.zeros(len(self._groups), dtype=bool)

    def meet(self, rows: NDArray[np.int64], device: torch.device, keep: Callable[[Batch], None]) -> None:
        """Let `keep` see the groups of these rows that it has not seen; in pieces where memory runs out."""
        for number in np.unique(self._group_of[rows]):
            if not self._known[number]:
                self._fill(self._groups[number], device, keep)
                self._known[number] = True

    def _fill(self, rows: NDArray[np.int64], device: torch.device, keep: Callable[[Batch], None]) -> None:
        try:
            keep(self.batches.collator(self.batches.examples, rows).to(device))
            return
        except Exception as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        make_room()
        for half in np.array_split(rows, 2):
            self._fill(half, device, keep)


class Features:
    """Features of the examples of `batches`, computed group by group when a row of it is first met."""

    def __init__(self, trunk: Trunk, batches: Batches, cutting: Callable[[], AbstractContextManager[None]]) -> None:
        self.trunk = trunk
        self._groups = Groups(batches)
        self._cut = cutting
        self._kept: Tensor | None = None

    def sentence(self) -> str:
        """For the log."""
        n_bytes = human_bytes(_bytes(self.trunk.model, self._groups.n_rows))
        return f"nothing in the trunk trains: what it gives for each row is computed once and kept (at most {n_bytes})"

    def usable(self) -> bool:
        """Not with dropout in the trunk, and not where the plain computation is asked for."""
        return kernels.fast() and not self.trunk.model.training

    def logits(self, batch: Batch) -> Tensor:
        """What the model gives for the batch, with a graph through the head alone."""
        self._groups.meet(batch.rows, batch.inputs["input_ids"].device, self._keep)
        assert self._kept is not None
        mask = batch.inputs["attention_mask"]
        features = self._kept[torch.from_numpy(batch.rows).to(self._kept.device)]
        return self.trunk.logits(batch.inputs, self.trunk.laid_out(features, mask))

    def _keep(self, batch: Batch) -> None:
        with torch.no_grad(), self._cut():
            found = self.trunk.read(self.trunk.states(batch.inputs), batch.inputs["attention_mask"])
        if self._kept is None:
            self._kept = found.new_zeros((self._groups.n_rows, found.shape[-1]))
        self._kept[torch.from_numpy(batch.rows).to(found.device)] = found


def features_of(tuned: Tuned, batches: Batches, cutting: Callable[[], AbstractContextManager[None]]) -> Features | None:
    """Features of the training rows, where they may be kept; None where not.

    Args:
        cutting: makes a context in which the last block is computed for what the head reads alone (`Objective.cut`).
    """
    trunk = _trunk_of(tuned)
    if trunk is None or _bytes(tuned.model, len(batches.examples)) > LIMIT_BYTES:
        return None
    return Features(trunk, batches, cutting)


def _bytes(model: Any, n: int) -> int:
    """Bytes of n features, at most."""
    return 4 * n * int(model.config.get_text_config().hidden_size)


def _trunk_of(tuned: Tuned) -> Trunk | None:
    """The trunk, where nothing of a method lies in it and the head reads one token of each row."""
    model: Any = tuned.model
    module = getattr(model, "base_model", None)
    if not isinstance(module, nn.Module) or module is model or "forward" in module.__dict__:
        return None
    if tuned.anatomy.is_encoder_decoder or model.training or not hasattr(model.config.get_text_config(), "hidden_size"):
        return None
    tunings = list(tuned.tunings.values())
    if any(t.parts for t in tunings) or any(type(p).loss is not Method.loss for t in tunings for p in t.method.parts()):
        return None  # something of a method computes, or computes the loss in its own way
    trunk = Trunk(model)
    own = {id(p) for p in trunk.pooler.parameters()} if isinstance(trunk.pooler, nn.Module) else set()
    if any(p.requires_grad and id(p) not in own for p in module.parameters()):
        return None
    trunk.reads = _token_read(trunk, tuned.anatomy.vocab_size or 2)
    return trunk if trunk.reads else None


def _token_read(trunk: Trunk, n_vocab: int) -> str:
    """ "first" or "last"; empty where the head reads something else, or is not a function of the states alone."""
    generator = torch.Generator().manual_seed(0)
    device = next(trunk.model.parameters()).device
    pad = getattr(trunk.model.config, "pad_token_id", None)
    if pad is None:
        return ""
    ids = torch.randint(min(n_vocab, 1000), (3, 6), generator=generator).to(device)
    ids[ids == pad] = (pad + 1) % n_vocab
    mask = torch.ones_like(ids)
    mask[1, 4:], ids[1, 4:] = 0, pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        wanted = getattr(trunk.model(**inputs), "logits", None)
        states = trunk.states(inputs)
    fields = getattr(trunk.kind, "__dataclass_fields__", {})
    complete = "last_hidden_state" in fields and (trunk.pooler is None or "pooler_output" in fields)
    if wanted is None or wanted.dim() != 2 or states.shape[:2] != ids.shape or not complete:
        return ""
    held = states.detach().requires_grad_()
    with torch.enable_grad():
        logits = trunk.logits(inputs, held)
        # Weighted, since the sum of a classifier's columns could be nothing.
        weights = torch.randn(logits.shape, generator=generator).to(logits)
        (slope,) = torch.autograd.grad((logits * weights).sum(), held, allow_unused=True)
    if slope is None or not torch.equal(logits, wanted):
        return ""
    read = slope.abs().amax(-1) > 0
    places = {"first": torch.zeros_like(mask[:, 0]), "last": mask.sum(-1) - 1}
    return next((w for w, at in places.items() if torch.equal(read, F.one_hot(at, ids.shape[1]).bool())), "")
