"""Answers of a run of self_rag: it looks something up where it wants to, and of several answers takes the best.

    score of an answer = mean log p of its tokens + w_rel s_rel + w_sup s_sup + w_use s_use

    s_rel = p([Relevant]) / (p([Relevant]) + p([Irrelevant]))
    s_sup = (p(full) + p(partial) / 2) / (p(full) + p(partial) + p(none))
    s_use = sum over n of (n - 3) / 2 * p([Utility:n]) / sum over n of p([Utility:n])

Paper: arXiv:2310.11511, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from luthier.core import ConfigError
from luthier.data.chat import Chat
from luthier.data.reflection import RELEVANT, RETRIEVE, SUPPORT, TOKENS, UTILITY, paragraph
from luthier.data.retrieval import Retriever, nearest
from luthier.workflow.speaker import Speaker

__all__ = ["Reflected", "reflect", "worth"]


@dataclass(frozen=True)
class Reflected:
    """An answer, the document that it was written beside (its number, or None), its score, and all that were tried."""

    answer: str
    document: int | None
    score: float
    looked_up: float
    tried: tuple[tuple[int | None, float], ...]


def reflect(
    run: Speaker, question: str, texts: Sequence[str], of: Retriever, *, k: int = 3, bound: float = 0.5,
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5), max_new_tokens: int = 64,
) -> Reflected:  # fmt: skip
    """Answer one question.

    Args:
        texts, of: documents, and what finds them.
        bound: something is looked up where the chance of [Retrieval] against [No Retrieval] is above it.
        weights: of relevance, support and utility. All 0: the likeliest answer.

    Raises:
        ConfigError: the run's tokenizer lacks a token of reflection, or a bound outside 0 to 1.
    """
    if not 0 <= bound <= 1:
        raise ConfigError(f"bound: got {bound:g}; it is a chance, from 0 to 1.")
    ids = {token: i for token in TOKENS if (i := run.tokenizer.get_vocab().get(token)) is not None}
    if len(ids) < len(TOKENS):
        raise ConfigError(f"{run.name}: its tokenizer lacks tokens of reflection. Train it with the recipe self_rag.")
    asked = [{"role": "user", "content": question}]
    first = _next(run, asked, "")[-1]
    wants = float(first[ids[RETRIEVE[0]]].exp() / sum(first[ids[t]].exp() for t in RETRIEVE))
    numbers: list[int | None] = list(nearest(of, question, k)) if wants > bound else [None]
    tried: list[tuple[int | None, float, str]] = []
    for number in numbers:
        talk = list(asked)
        if number is not None:
            talk += [
                {"role": "assistant", "content": RETRIEVE[0]},
                {"role": "user", "content": paragraph(texts[number])},
            ]
        said = run.says([talk], max_new_tokens=max_new_tokens)[0][0]
        tried.append((number, worth(run, talk, said, ids, weights, beside=number is not None), said))
    number, score, said = max(tried, key=lambda one: one[1])
    for token in TOKENS:
        said = said.replace(token, "")
    return Reflected(" ".join(said.split()), number, score, wants, tuple(one[:2] for one in tried))


def worth(
    run: Speaker, talk: Sequence[dict[str, Any]], said: str, ids: dict[str, int], weights: Sequence[float], *,
    beside: bool,
) -> float:  # fmt: skip
    """The score of an answer. A token of reflection that was not written is judged where the answer ends."""
    logs = _next(run, talk, said)  # from the first token of the answer on, and one behind the last
    told = run.tokenizer(said, add_special_tokens=False)["input_ids"]
    if not told:
        return float("-inf")
    total = sum(float(logs[n][token]) for n, token in enumerate(told)) / len(told)

    def chances(names: Sequence[str]) -> list[float]:
        mine = {ids[name] for name in names}
        at = next((n for n, token in enumerate(told) if token in mine), len(told))
        shares = [float(logs[at][ids[name]].exp()) for name in names]
        return [share / max(sum(shares), 1e-30) for share in shares]

    relevance, support = (chances(RELEVANT)[0], chances(SUPPORT)) if beside else (0.0, [0.0] * 3)
    use = sum((n - 3) / 2 * share for n, share in enumerate(chances(UTILITY), 1))
    return total + weights[0] * relevance + weights[1] * (support[0] + support[1] / 2) + weights[2] * use


def _next(run: Speaker, talk: Sequence[dict[str, Any]], said: str) -> Tensor:
    """Log-probabilities of what comes next, from the end of the talk on: (tokens of the answer + 1, vocabulary)."""
    with Chat(run.tokenizer, template=run.template) as chat:
        before = chat.prompt(list(talk))
    told = run.tokenizer(said, add_special_tokens=False)["input_ids"] if said else []
    return run.next_chances([*before, *told])[len(before) - 1 :]
