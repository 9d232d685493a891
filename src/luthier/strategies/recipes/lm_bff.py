"""A handful of labelled rows: labels are asked for by a gap, whose words and template are searched for.

    1 given     the template and the words as they were given: learnt on one half of the rows, scored on the other
    2 try-...   the same with words, and then with templates, that the search found
    last        the best of them by that score, with labelled rows shown beside each row, on the half that was learnt

Words: of each label the `top` words to which the model, as it is, gives the highest summed log-probability in the gaps
of its rows; of all ways to choose one for each label, no word twice, the `tries` with most right answers. Templates:
with `template_model`, a T5 fills the places before and behind the word in all rows at once, by a beam whose scores are
summed over them; the likeliest `tries` are tried. Rows shown: one of each label, filled in, of those that are nearest;
`shown` versions of each row are averaged in an answer (docs of --template). What was found stands in rows-tried.jsonl,
and how right the model was before it learnt, on held-out rows too, in rows-zero-shot.jsonl.

Paper: arXiv:2012.15723. 16 rows a label to learn and 16 to choose by, a beam of 100 of a T5 of 3 billion numbers, 16
versions and the nearer half of the rows are quoted for its code. Nearness there is by a sentence encoder; here by words
in common. It shows the rows while it tries; here the one that is chosen alone has them.

Cost: a run for each try, and a last one whose rows are as many times longer as there are labels.
Claims: better than a plain classifier on a few rows, and more steady from draw to draw.
Pitfalls: the rows that are shown stand in the tuning, texts and all (tuning.json): whoever has it can read them, and
with `shown` = 0 there are none. Half of the rows is spent on the choice: with `tries` = 0 nothing is searched, and all
rows are learnt. A score of 16 rows a label tells little: of many tries the luckiest wins. Measured: smollm2-135m, asked
whether a film was great or terrible (32 rows and 200 held out of movie-snippets), is at chance on the latter before it
learns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, ClassVar

import numpy as np

from luthier.core import ConfigError, at_least, between, key
from luthier.data.cloze import words_of
from luthier.data.columns import label_name
from luthier.data.rows import Table, split_rows
from luthier.runs.spec import EvalSpec, RunSpec
from luthier.training.recipe import Desk, Guesses, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES

MOST_WAYS = 20_000


@STRATEGIES.register("lm_bff", family="recipes", paper="arXiv:2012.15723")
@dataclass(frozen=True, kw_only=True)
class LMBFF(Recipe):
    """Prompts that are searched for, and rows shown beside."""

    example: ClassVar[str] = (
        "sample:smollm2-135m --data sample:trec6 --template '{text} Kind: {mask}' "
        "--words 'ABBR=short,DESC=why,ENTY=thing,HUM=person,LOC=place,NUM=number'"
    )
    tiny: ClassVar[dict[str, Any]] = {"tries": 1, "shown": 2, "top": 3}

    tries: Annotated[int, "searched words, and searched templates, that are tried; 0, none", at_least(0)] = 4
    top: Annotated[int, "words of each label that are combined", at_least(1)] = 10
    template_model: Annotated[str, "a T5 that writes templates; left out, the given one stays"] = ""
    beams: Annotated[int, "templates that it follows side by side", at_least(1)] = 100
    new_tokens: Annotated[int, "tokens of a template, at most", at_least(2)] = 20
    shown: Annotated[int, "versions of each row with rows shown beside; 0, none", between(0, 64)] = 16

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec, (learnt, held, columns) = plan.spec, desk.rows()
        if spec.data.template is None or "{shown" in spec.data.template:
            raise ConfigError(
                "lm_bff needs a template to begin with, such as --template '{text} It was {mask}.', and --words; rows "
                "that are shown stand before it or behind it by lm_bff.shown."
            )
        whole = plan.task((), data=replace(spec.data, template=self._showing(desk, spec.data.template)))
        desk.check(whole)
        if not self.tries:
            yield Phase(name="prompt", spec=whole)
            return
        assert columns.label is not None
        content, stratum = columns.content, columns.outcome
        half, choose_by = split_rows(learnt, 0.5, key(spec.data.split_seed, "lm_bff"), content, stratum)
        assert choose_by is not None
        names: dict[str, Any] = columns.used()
        kept = [[{n: row.get(n) for n in names.values()} for row in part.rows] for part in (half, choose_by)]
        data = plan.data(desk.write("learnt", kept[0]), desk.write("by", kept[1]), **names)
        first = plan.phase((), also=None, eval=EvalSpec(), data=data)
        done = yield Phase(name="given", spec=first)
        best, score = first, done.scores["accuracy"]
        label_of = [label_name(row[columns.label]) for row in half.rows]
        labels = sorted(set(label_of))
        words = words_of(spec.data.words, labels)
        tried = [self._told("given", first, score)]
        guessed = desk.guesses(first, half)
        asked = [("learnt", half, guessed), *([("held", held, desk.guesses(first, held))] if held else [])]
        desk.write("zero-shot", [_right(name, rows, said, columns.label, words) for name, rows, said in asked])
        found = _searched(guessed, label_of, labels, self.top, words)
        ways: dict[str, tuple[str, str]] = {}
        ways |= {f"words-{k + 1}": (spec.data.template, way) for k, way in enumerate(found[: self.tries])}
        ways |= self._templates(desk, half, columns.text or "", label_of, words, spec)
        for name, (template, written) in ways.items():
            each = replace(first, data=replace(first.data, template=template, words=written))
            done = yield Phase(name=f"try-{name}", spec=each)
            tried.append(self._told(name, each, done.scores["accuracy"]))
            if done.scores["accuracy"] > score:
                best, score = each, done.scores["accuracy"]
        desk.write("tried", tried)
        assert best.data.template is not None
        test = None if held is None else desk.write("held", [{n: r.get(n) for n in names.values()} for r in held.rows])
        template = self._showing(desk, best.data.template)
        data = replace(best.data, test=test, template=template)
        made_of = ("given", *(f"try-{name}" for name in ways))
        yield Phase(name="prompt", spec=plan.task((), also=None, data=data), made_of=made_of)

    def _told(self, name: str, spec: RunSpec, score: float) -> dict[str, Any]:
        return {"try": name, "template": spec.data.template, "words": spec.data.words, "accuracy": score}

    def _showing(self, desk: Desk, template: str) -> str:
        """The template with rows shown: behind the question, and before it where a decoder reads on from there."""
        field = f"{{shown:{self.shown}}}" if self.shown else ""
        return f"{field} {template}".strip() if desk.kind == "decoder" else f"{template} {field}".strip()

    def _templates(
        self, desk: Desk, table: Table, text: str, label_of: list[str], words: dict[str, str], spec: RunSpec
    ) -> dict[str, tuple[str, str]]:
        """Name -> template and words, of those that a T5 writes around the words of the rows."""
        if not self.template_model:
            return {}
        if "{pair}" in (spec.data.template or ""):
            raise ConfigError("lm_bff.template_model: templates are searched for rows of one text. Leave it out.")
        gaps = [f"{_plain(row[text])} {{0}} {words[c]} {{1}}" for row, c in zip(table.rows, label_of, strict=True)]
        found = desk.fillings(self.template_model, gaps, beams=self.beams, most=self.new_tokens)
        ends = desk.kind == "decoder"  # reads what stands before the gap alone
        made = dict.fromkeys(" ".join(f"{{text}} {x} {{mask}} {'' if ends else y}".split()) for x, y in found)
        listed = ", ".join(f"{label}={word}" for label, word in words.items())
        return {f"template-{k + 1}": (one, listed) for k, one in enumerate([*made][: self.tries])}


def _plain(text: Any) -> str:
    return str(text).replace("{", "(").replace("}", ")")


def _right(name: str, table: Table, said: Guesses, label: str, words: dict[str, str]) -> dict[str, Any]:
    """How many rows the model answers right by these words before it learns."""
    ids = {word: i for i, word in said.words.items()}
    known = [(c, ids[word]) for c, word in words.items() if word in ids]
    if len(known) < len(words):
        return {"rows": name, "accuracy": None, "count": len(table)}
    best = said.chances[:, [i for _, i in known]].argmax(-1)
    right = [known[int(k)][0] == label_name(row[label]) for k, row in zip(best, table.rows, strict=True)]
    return {"rows": name, "accuracy": float(np.mean(right)), "count": len(table)}


def _searched(said: Guesses, label_of: list[str], labels: list[str], top: int, given: dict[str, str]) -> list[str]:
    """Words for the labels, best first: by right answers, then by the log-probability of what is right."""
    ids = np.asarray(sorted(said.words), dtype=np.int64)
    mine = np.asarray([labels.index(c) for c in label_of])
    sums = np.stack([said.chances[mine == c][:, ids].sum(0, dtype=np.float64) for c in range(len(labels))])
    while top > 1 and top ** len(labels) > MOST_WAYS:
        top -= 1
    best = [ids[np.argsort(-row, kind="stable")[:top]].tolist() for row in sums]
    scored = []
    for way in _distinct(best):
        chances = said.chances[:, list(way)]
        right = chances.argmax(-1) == mine
        scored.append((-int(right.sum()), -float(chances[np.arange(len(mine)), mine].sum()), way))
    return [
        ", ".join(f"{label}={said.words[i]}" for label, i in zip(labels, way, strict=True))
        for *_, way in sorted(scored)
        if [said.words[i] for i in way] != [given[label] for label in labels]
    ]


def _distinct(best: list[list[int]]) -> Iterator[tuple[int, ...]]:
    return (way for way in product(*best) if len(set(way)) == len(way))
