"""A task head that answers in several turns: between them it reads the text again, and its answer is the turns' mean.

    s_0 = what the head reads        r_k = M^T softmax(M A s_(k-1))        s_k = GRU(r_k, s_(k-1))        k = 1..K

    logits = log mean_k softmax(W s_k + b)        in training the mean of a drawn part of the turns, at least one

M (T, d): the real tokens behind the last block (of an encoder-decoder, of its encoder), each made of mean 0 and spread
1, with dropout in training. s (d,), A (d, d). W and b are the model's own last projection, whatever it is trained or
changed by. Where tasks have labels of their own (mt_dnn), the softmax is over those of one task: W is each task's own,
A and the GRU are shared. It stands alone on a frozen model, or beside another method: `lora+answer_turns`.

Liu et al. 2019, "Multi-Task Deep Neural Networks for Natural Language Understanding", arXiv:1901.11504: its stochastic
answer network for pairs. Verified are K turns, the mean of their predictions, dropout of predictions, and K = 5 and
memory dropout 0.1 from its code. Not verified, so ours: the equations of the first line (the paper tells the two texts
of a pair apart, here M is both), the layer norm, the share of turns that is dropped, and sharing A and the GRU.

Count: d_head (d + 6) + 3 d_head (d + d_head), with d_head what the head reads.
Claims: pairs are answered better than by one look at the first token.
Measured: on a frozen minilm-l6, 600 questions of trec6 (`python -m experiments.methods --only answer_turns --seeds 1`),
one seed, single texts: 0.877 on 300 others, where head_only has 0.413 and lora 0.913. On pairs it was not measured.
Cost: K attentions of one query and K GRU steps a row.
Use it when: an encoder compares two texts, or the first token's state has not gathered what is asked for.
Not when: the result must merge: a mean over turns is no weight.
Pitfalls: what is averaged are probabilities; averaged logits are another answer. For one label a row.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, ModelError, at_least, between
from luthier.surgery import METHODS, Attach, Attachment, Edit, Method
from luthier.surgery.prompts import with_vectors


@METHODS.register("answer_turns", family="additive", paper="arXiv:1901.11504")
@dataclass(frozen=True, kw_only=True)
class AnswerTurns(Method):
    """Settings of a head that answers in several turns."""

    turns: Annotated[int, "how often it reads the text", at_least(1)] = 5
    dropout: Annotated[float, "share of the numbers of the text's states dropped in training", between(0, 0.99)] = 0.1
    left_out: Annotated[float, "chance of a turn to be left out of the mean in training", between(0, 0.99)] = 0.1
    labels: Annotated[tuple[int, ...], "how many each task has, one after another; left out, the rows say"] = ()

    starts_at_base: ClassVar[bool] = False
    classes_only: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    counts_labels: ClassVar[str] = "labels"
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, Any]] = {"turns": 3}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        heard, head = self._sites(anatomy)
        if self.labels and sum(self.labels) != head.d_out:
            raise ConfigError(
                f"answer_turns.labels: {', '.join(map(str, self.labels))} are {sum(self.labels)} labels, and the head "
                f"has {head.d_out}. Leave it out: the rows say, where each task has labels of its own (mt_dnn)."
            )
        text = Text(heard.stack)
        yield Attach(heard, lambda base: Heard(text))
        yield Attach(head, lambda base: Turns(self, text, heard.d_out, head.d_in))

    def n_params(self, anatomy: Anatomy) -> int:
        heard, head = self._sites(anatomy)
        return head.d_in * (heard.d_out + 6) + 3 * head.d_in * (heard.d_out + head.d_in)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, Site]:
        """Behind the last block that reads the text, and the head."""
        if anatomy.is_decoder or not anatomy.head_tensors:
            what = "reads from left to right" if anatomy.is_decoder else "has no new task head"
            raise AnatomyError(
                f"answer_turns: this {anatomy.model_type} model {what}, and the turns look back at a whole text to "
                "choose among classes. Use it for classification with an encoder, or choose lora."
            )
        stack = "encoder" if anatomy.is_encoder_decoder else None
        last = anatomy.sites("block_out", stack=stack, asked_by="answer_turns")[-1]
        return last, anatomy.sites("head", asked_by="answer_turns")[0]


class Text:
    """Hands the states of a text from the last block to the head of the same pass."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.states: Tensor | None = None


class Heard(Attachment):
    """Hears what the last block gives; changes nothing."""

    kind = "sequential"
    needs_input = False
    per_token = False

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.text = text

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        self.text.states = y
        return y


class Turns(Attachment):
    """The head reads the states of all turns; of what it says of each, the mean is the answer."""

    kind = "sequential"
    per_token = False

    def __init__(self, settings: AnswerTurns, text: Text, d: int, d_head: int) -> None:
        super().__init__()
        self.settings, self.text = settings, text
        self.look = nn.Linear(d_head, d, bias=False)
        self.read = nn.Linear(d, 3 * d_head)
        self.keep = nn.Linear(d_head, 3 * d_head)
        self.dropout = nn.Dropout(settings.dropout)

    def before(self, x: Tensor) -> Tensor:
        """x: (rows, d_head) -> the states of all turns, (rows, turns, d_head)."""
        states, self.text.states = self.text.states, None
        if x.dim() != 2 or states is None or len(states) != len(x):
            raise ModelError(
                f"answer_turns: the head reads a tensor of shape {tuple(x.shape)}, and it answers once for each text "
                "that the model has read in the same pass. Call the whole model, made for classification."
            )
        memory = self.dropout(F.layer_norm(states.to(x.dtype), states.shape[-1:]))  # (rows, T, d)
        mask = self.context.mask_for(self.text.stack)
        padding = None
        if mask is not None:  # it may know of fewer tokens: vectors stand before
            padding = with_vectors(mask, memory.shape[1] - mask.shape[1]) == 0
        state, given = x, []
        for _ in range(self.settings.turns):
            scores = torch.einsum("btd,bd->bt", memory, self.look(state)) / math.sqrt(memory.shape[-1])
            if padding is not None:
                scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
            state = self.turn(torch.einsum("btd,bt->bd", memory, scores.softmax(-1)), state)
            given.append(state)
        return torch.stack(given, 1)

    def turn(self, read: Tensor, state: Tensor) -> Tensor:
        """One step of a GRU. read: (rows, d), state: (rows, d_head) -> (rows, d_head)."""
        new_reset, new_update, new = self.read(read).chunk(3, -1)
        old_reset, old_update, old = self.keep(state).chunk(3, -1)
        update = torch.sigmoid(new_update + old_update)
        fresh = torch.tanh(new + torch.sigmoid(new_reset + old_reset) * old)
        return update * state + (1 - update) * fresh

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y: (rows, turns, labels) -> (rows, labels): the logarithm of the mean chance, within each task's labels."""
        sizes = self.settings.labels or (y.shape[-1],)
        each = torch.cat([part.float().log_softmax(-1) for part in torch.split(y, list(sizes), -1)], -1)
        taken = self.taken(y)  # (rows, turns)
        mean = torch.logsumexp(each.masked_fill(~taken[..., None], -torch.inf), 1)
        return mean - taken.sum(1, keepdim=True).log()

    def taken(self, y: Tensor) -> Tensor:
        """Which turns count, (rows, turns): all of them in answers."""
        drawn = torch.rand(y.shape[:2], device=y.device) if self.training else y.new_ones(y.shape[:2])
        return (drawn >= self.settings.left_out) | (drawn == drawn.amax(1, keepdim=True))
