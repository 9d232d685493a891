"""A sentence encoder learns to find what helped: its chances of documents approach those that a language model gave.

    p_R(c|q) = softmax over the row's documents of cos(h_q, h_c) / temperature     L = KL(p_LM || p_R), a mean over rows

h is the mean of the last states over a text's tokens. The encoder of queries trains alone: h_c are made once, before
step 1, by the encoder as it was, so an index of documents stays as it is. A row has `documents`, a list of texts, and
`shares`, which is p_LM. The head rests, and the label of a row is not read.

Paper: arXiv:2310.01352 (RA-DIT, its retriever step).

Neutral: none: it stands in the place of the task's loss.
Claims: what is found helps the language model more than what was found before.
Pitfalls: the recipe ra_dit makes such rows. The documents of a row alone take part: what was never found for it is not
learnt. Scores of held-out rows are of the head, and say nothing.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import DataError, above
from luthier.data.tasks import Task
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy, fills

MOST = 16  # documents of a pass


@STRATEGIES.register("retriever_kl", family="distillation", paper="arXiv:2310.01352")
@dataclass(frozen=True, kw_only=True)
class RetrieverKL(Strategy):
    """Chances of documents in place of labels."""

    example: ClassVar[str] = "sample:minilm-l6 --data FOUND.jsonl"
    reads: ClassVar[tuple[str, ...]] = ("states",)
    tiny_kind: ClassVar[str] = "bert-found"

    temperature: Annotated[float, "of the encoder's chances", above(0)] = 0.05

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and (not other.through_trunk or other.name == "head_only"):
            return f"what {other.name} trains does not move the trunk's states. Use a method inside the trunk."
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh")):
            return f"{other.name} changes the task's loss, and in its place chances are learnt. Use one of the two."
        return None

    def suits(self, task: Task) -> str | None:
        if task.name not in ("classification", "regression") or task.template:
            return "it trains an encoder of texts, whose rows have documents and shares of them. Leave it out here."
        return None

    def trains(self, course: Course) -> Collection[str]:
        return course.weights(head=False)

    def start(self, course: Course) -> None:
        table = course.examples().ledger.table
        found = [_told(row, place) for row, place in zip(table.rows, table.places, strict=True)]
        texts = list(dict.fromkeys(text for documents, _ in found for text in documents))
        number, width = {text: i for i, text in enumerate(texts)}, max(len(documents) for documents, _ in found)
        numbers, shares = torch.zeros(len(found), width, dtype=torch.long), torch.zeros(len(found), width)
        for i, (documents, told) in enumerate(found):
            numbers[i, : len(told)] = torch.tensor([number[text] for text in documents])
            shares[i, : len(told)] = torch.tensor(told)
        counts = torch.tensor([len(told) for _, told in found])
        course.memory.tensors |= {"numbers": numbers, "shares": shares, "counts": counts}
        course.memory.tensors["vectors"] = self.vectors(course, texts)

    def vectors(self, course: Course, texts: list[str]) -> Tensor:
        """(texts, d), of length 1, by the encoder without its tuning."""
        made = []
        longest = max(8, int(torch.as_tensor(course.tuned.model.config.max_position_embeddings)) - 2)
        with torch.inference_mode(), course.still(), course.tuned.base_only():
            for start in range(0, len(texts), MOST):
                some = texts[start : start + MOST]
                read = course.tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt")
                inputs = {name: value.to(course.device) for name, value in read.items()}
                with course.states() as seen:
                    course.tuned.model(**inputs)
                assert seen.last is not None
                made.append(mean_state(seen.last, inputs["attention_mask"]).cpu())
        return torch.cat(made).clone()

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        with course.states() as seen:
            result = forward()
        assert seen.last is not None
        rows = torch.from_numpy(course.examples().rows[piece.batch.rows])
        held, device = course.memory.tensors, seen.last.device
        numbers, shares, counts = (held[name].cpu()[rows].to(device) for name in ("numbers", "shares", "counts"))
        query = mean_state(seen.last, piece.batch.inputs["attention_mask"])  # (rows, d)
        cosine = (held["vectors"].to(device)[numbers] * query[:, None]).sum(-1)  # (rows, documents)
        there = torch.arange(numbers.shape[1], device=device) < counts[:, None]
        chances = (cosine / self.temperature).masked_fill(~there, -torch.inf).log_softmax(-1)
        apart = torch.where(shares > 0, shares * (shares.clamp(min=1e-30).log() - chances), 0.0).sum(-1)
        result.loss = apart.sum()
        return result


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that are there, of length 1: (rows, tokens, d) -> (rows, d)."""
    summed = (states.float() * mask[..., None]).sum(1)
    return F.normalize(summed / mask.sum(1, keepdim=True).clamp(min=1), dim=-1)


def _told(row: Mapping[str, Any], place: str) -> tuple[list[str], list[float]]:
    """The documents of a row and their shares.

    Raises:
        DataError: not as many shares as documents, or shares that are none.
    """
    documents, shares = row.get("documents"), row.get("shares")
    if not isinstance(documents, list) or not documents or not all(isinstance(t, str) and t for t in documents):
        raise DataError(f"{place}: field 'documents' is {str(documents)[:60]!r}; it must be a list of texts.")
    if not isinstance(shares, list) or len(shares) != len(documents):
        raise DataError(f"{place}: field 'shares' must have a number for each of {len(documents)} documents.")
    if not all(isinstance(s, int | float) and s >= 0 for s in shares) or abs(sum(shares) - 1) > 1e-3:
        raise DataError(f"{place}: field 'shares' is {str(shares)[:60]}; its numbers must add up to 1.")
    return documents, [float(s) / sum(shares) for s in shares]
