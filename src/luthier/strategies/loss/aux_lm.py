"""A decoder that learns labels goes on predicting the text itself, so that it does not forget how to read.

    L = L_task + lambda * sum_i LM_i / n         LM_i: the mean of row i's -log p(x_t | x_<t) over its tokens

Words are scored by the table of the embedded text, as models do whose output matrix is tied to it. The row's mean, not
the sum, so that a long text counts no more than a short one, however a step is cut.

Paper: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.2, and before it
arXiv:1511.01432. lambda = .5 is quoted for it.

Neutral: weight = 0.
Cost: one product with the table of words for each token.
Claims: the larger data sets of GLUE gain from it, the smaller ones do not.
Pitfalls: encoders are refused, whose words need a head that does not stand beside one of labels; so are decoders whose
output matrix is not tied. All logits of a batch are held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.anatomy.word_logits import finished_logits
from luthier.core import ConfigError, at_least
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("aux_lm", family="loss", paper="arXiv:1511.01432")
@dataclass(frozen=True, kw_only=True)
class AuxLM(Strategy):
    """An auxiliary language-model loss."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6"
    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("states",)
    tiny_kind: ClassVar[str] = "llama-labels-tied"

    weight: Annotated[float, "lambda, what predicting the text counts", at_least(0)] = 0.5

    def suits(self, task: Task) -> str | None:
        if task.of_words:
            return "its loss is of words already. Use --loss-on all to learn prompts too."
        if task.n_soft:
            return "the template's {soft} are no words of the model, so none can be predicted. Write words instead."
        return None

    def start(self, course: Course) -> None:
        config = course.tuned.model.config.get_text_config()
        kind = course.tuned.anatomy.model_type
        if not course.tuned.anatomy.is_decoder:
            raise ConfigError(
                f"aux_lm cannot be used with {kind}: it is no decoder, and the head that scores its words does not "
                "stand beside one of labels. Use a decoder such as smollm2, or no aux_lm."
            )
        if not config.tie_word_embeddings:
            raise ConfigError(
                f"aux_lm cannot be used with this {kind}: its output matrix is not the table of its words, and is not "
                "loaded beside a head of labels. Use a model whose matrices are tied, or no aux_lm."
            )

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.weight:
            return forward()
        with course.states() as seen:
            result = forward()
        assert seen.last is not None, "a pass of the model is one of its trunk"
        words = self.of_words(course, seen.last, piece.batch.inputs)
        course.note("words", float(words.detach()) / max(1, piece.n_targets))
        result.loss = result.loss + self.weight * words
        return result

    def of_words(self, course: Course, states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The mean loss of each row's words, added up; states: (rows, tokens, d)."""
        table = course.tuned.model.get_input_embeddings().weight  # (words, d)
        logits = finished_logits(course.tuned.model, F.linear(states[:, :-1], table.to(states)).float())
        wanted = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, IGNORED)
        each = F.cross_entropy(
            logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )  # (rows, tokens-1)
        return torch.sum(each.sum(-1) / (wanted != IGNORED).sum(-1).clamp(min=1))
