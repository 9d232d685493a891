"""Labels are asked for by a gap, and the word of each label is searched for in what the model makes of its rows.

    p(y | h) = softmax(h A^T + b)     fitted on the states h of the gaps (rows, d), the model as it is
    the word of y: that w with the largest p(y | E(w))     E(w): its row of the output matrix, in the place of h (d,)

    1 task    the run itself, with the template and the words that were found; strategies named beside it are its own

States and rows of the output matrix meet in the logit h . E(w), so what tells states of a label apart also tells its
words apart. Only whole words that are one token are looked at, and no word is given to two labels: where two want one,
the label that is surer of it has it. --words beside it are refused. rows-words.jsonl holds the `top` words of each
label, rows-fitted.jsonl how many rows the fit and the words get right before anything is learnt.

Paper: arXiv:2010.15980 (AutoPrompt, its label tokens). There each label has three words or more, whose chances are
summed; here one, and the search for words of the prompt is the strategy autoprompt: --strategy label_words+autoprompt.

Cost: two passes without gradient over the rows that learn, `most` at most, then a plain run.
Claims: words for labels that nobody can name, such as those of inference.
Pitfalls: with fewer rows than numbers in a state the fit is right on all of them whatever the words: `decay` keeps it
small. Words with large vectors win easily. What is found need not read as the label. lm_bff searches by what the model
finds likely in the gaps, and tries what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from luthier.core import ConfigError, above, at_least
from luthier.data.columns import label_name
from luthier.data.order import shuffled
from luthier.training.recipe import Desk, Guesses, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("label_words", family="recipes", paper="arXiv:2010.15980")
@dataclass(frozen=True, kw_only=True)
class LabelWords(Recipe):
    """Words of labels from the states of gaps."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6 --template '{text} Kind: {mask}'"

    most: Annotated[int, "rows that are looked at, at most", at_least(1)] = 2000
    decay: Annotated[float, "of the fit: half of it times A's squared size, beside the mean loss", above(0)] = 0.01
    top: Annotated[int, "words of each label that are written down", at_least(1)] = 10

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec, (learnt, _, columns) = plan.spec, desk.rows()
        if spec.data.template is None or columns.label is None:
            raise ConfigError(
                "label_words needs a template, such as --template '{text} It was {mask}.', and rows with a label each."
            )
        if spec.data.words is not None:
            raise ConfigError(
                f"label_words searches for the labels' words, and words = {spec.data.words!r} names them. Leave "
                "--words out, or the strategy."
            )
        chosen = learnt.take(sorted(shuffled(len(learnt), spec.seed, "label_words")[: self.most].tolist()))
        label_of = [label_name(row[columns.label]) for row in chosen.rows]
        labels = sorted({label_name(row[columns.label]) for row in learnt.rows})
        if odd := [name for name in labels if set(name) & set(",=")]:
            raise ConfigError(
                f"label_words: the label {odd[0]!r} holds a comma or an equals sign, which stand between labels and "
                "their words. Call it otherwise in the rows."
            )
        if lost := sorted(set(labels) - set(label_of)):
            raise ConfigError(
                f"label_words.most: no row of the label {lost[0]!r} is among the {len(chosen)} that are looked at. "
                "Give a larger number."
            )
        said = desk.guesses(plan.task((), data=replace(spec.data, words=None)), chosen)
        numbers = np.asarray([labels.index(name) for name in label_of])
        turn, shift = fitted(said.states, numbers, len(labels), self.decay)
        words, known = ranked(said, turn, shift), sorted(said.words)
        places = given_out(words)
        if places is None:
            raise ConfigError(f"label_words: {len(said.words)} words cannot serve {len(labels)} labels. Name --words.")
        ids = [known[place] for place in places]
        desk.write("words", self._told(said, labels, words))
        right = {
            "fit": ((said.states @ turn.T + shift).argmax(-1) == numbers).mean(),
            "words": (said.chances[:, ids].argmax(-1) == numbers).mean(),
        }
        desk.write("fitted", [{"rows": len(chosen), **{name: float(share) for name, share in right.items()}}])
        found = ", ".join(f"{label}={said.words[i]}" for label, i in zip(labels, ids, strict=True))
        desk.say(f"label_words found: {found}")
        whole = plan.task((), data=replace(spec.data, words=found))
        desk.check(whole)
        yield Phase(name="task", spec=whole)

    def _told(self, said: Guesses, labels: Sequence[str], words: NDArray[np.float64]) -> list[dict[str, Any]]:
        ids = np.asarray(sorted(said.words))
        best = np.argsort(-words, axis=-1, kind="stable")[:, : self.top]
        return [
            {"label": label, "words": [said.words[int(ids[k])] for k in row], "log_chances": words[c, row].tolist()}
            for c, (label, row) in enumerate(zip(labels, best, strict=True))
        ]


def fitted(
    states: NDArray[np.float32], labels: NDArray[np.int64], n_labels: int, decay: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (labels, d) and b (labels,) of the logistic regression on states (rows, d)."""
    x, y = torch.from_numpy(states).double(), torch.from_numpy(labels)
    turn = torch.zeros(n_labels, x.shape[1], dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(n_labels, dtype=torch.float64, requires_grad=True)
    descent: Any = torch.optim.LBFGS(
        [turn, shift], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        descent.zero_grad()
        loss = F.cross_entropy(x @ turn.T + shift, y) + decay / 2 * turn.square().sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    descent.step(closure)
    return turn.detach().numpy(), shift.detach().numpy()


def ranked(said: Guesses, turn: NDArray[np.float64], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """log p(y | E(w)) of each label and whole word, by rising id: (labels, words)."""
    logits = torch.from_numpy(said.vectors[np.asarray(sorted(said.words))] @ turn.T + shift)
    return logits.log_softmax(-1).T.numpy()


def given_out(words: NDArray[np.float64]) -> list[int] | None:
    """A column for each row of (labels, words), none twice, the largest values first; None with fewer columns.

    >>> given_out(np.asarray([[-1.0, -2.0], [-0.5, -3.0]]))
    [1, 0]
    """
    chosen: dict[int, int] = {}
    order = np.argsort(-words, axis=None, kind="stable")
    for label, word in zip(*np.unravel_index(order, words.shape), strict=True):
        if label not in chosen and word not in chosen.values():
            chosen[int(label)] = int(word)
    return [chosen[c] for c in range(len(words))] if len(chosen) == len(words) else None
