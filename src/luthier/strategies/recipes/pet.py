"""Few labels, many patterns: a model for each pattern, all of them label further texts, and a classifier learns those.

    1 ...   a run for each pattern and repetition: labels are asked for by a gap in the text (docs of --template)
    last    a classifier with a new head, from what all the runs say of rows and further texts together

With `generations` above 1 (iPET) each generation's runs learn the rows and, beside them, further texts that a random
share of the *other* runs of the last generation is surest of: so many of each label that, with the labelled ones, its
rows are `growth` times as many with each generation.

Paper: arXiv:2001.07676. T = 2, three repetitions, three generations, a quarter of the models and a growth of 5 are
quoted for its code.

Cost: patterns x repetitions x generations runs on few rows, then one on all texts.
Claims: far better than a plain classifier on 10 to some 100 rows.
Pitfalls: all runs count alike, where the paper weighs them by their accuracy before training; its small loss of masked
words beside (1e-4) is left out; the classifier also learns the labelled rows by soft labels. A pattern that fits badly
drags all down: score one alone first.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, above, at_least, between, key
from luthier.data.columns import label_name
from luthier.data.order import shuffled
from luthier.runs.spec import EvalSpec
from luthier.strategies.recipes._soft import logits_of, most_sure, soft_labels
from luthier.training.recipe import Desk, Done, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("pet", family="recipes", paper="arXiv:2001.07676")
@dataclass(frozen=True, kw_only=True)
class PET(Recipe):
    """Pattern-exploiting training."""

    example: ClassVar[str] = (
        "sample:smollm2-135m --data sample:trec6 --set 'patterns={text} Kind: {mask}' "
        "--words 'ABBR=short,DESC=why,ENTY=thing,HUM=person,LOC=place,NUM=number'"
    )
    uses: ClassVar[tuple[str, ...]] = ("kd_ensemble",)
    sets: ClassVar[tuple[str, ...]] = ("unlabelled",)
    tiny: ClassVar[dict[str, Any]] = {"patterns": "{text} ! it is {mask} || {mask} : {text}", "repetitions": 1}

    patterns: Annotated[str, "templates, parted by ||, such as '{text} It was {mask}. || {mask}: {text}'"] = ""
    repetitions: Annotated[int, "runs of each pattern, each with a seed of its own", at_least(1)] = 3
    generations: Annotated[int, "1 for PET, more for iPET", at_least(1)] = 1
    growth: Annotated[float, "how many times more rows each generation learns", above(1)] = 5.0
    share: Annotated[float, "share of the other runs that label a run's texts", between(0.01, 1)] = 0.25
    temperature: Annotated[float, "of the soft labels", above(0)] = 2.0
    final_epochs: Annotated[float | None, "passes of the classifier; left out, as the spec says", above(0)] = None

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        patterns = [p.strip() for p in self.patterns.split("||") if p.strip()]
        if not patterns:
            raise ConfigError("pet needs patterns: --set 'pet.patterns={text} It was {mask}. || {mask}: {text}'.")
        if plan.spec.data.template is not None:
            raise ConfigError("pet has its own patterns: leave data.template out, and give data.words.")
        spec, (learnt, held, columns) = plan.spec, desk.rows()
        first = [
            plan.phase((), data=replace(spec.data, template=p), seed=spec.seed + r, also=None, eval=EvalSpec())
            for p in patterns
            for r in range(self.repetitions)
        ]
        if self.generations > 1 and len(first) < 2:
            raise ConfigError("pet with generations needs two runs at least: another pattern, or repetitions.")
        of_last: dict[str, Any] = {"also": None}
        of_last |= {} if self.final_epochs is None else {"epochs": self.final_epochs, "steps": None}
        for each in (*first[:: self.repetitions], plan.task((), data=replace(spec.data, words=None), **of_last)):
            desk.check(each)
        further = desk.further("unlabelled")
        names = [n for n in (columns.text, columns.pair) if n is not None]
        assert columns.label is not None
        label = columns.label
        rows = [{n: row[n] for n in (*names, label)} for row in learnt.rows]
        counts = Counter(label_name(row[label]) for row in rows)
        labels = sorted(counts)
        texts = [{n: row[n] for n in names} for row in further.rows]
        test = None if held is None else desk.write("held", [{n: r[n] for n in (*names, label)} for r in held.rows])
        own: dict[str, Any] = {"text": columns.text, "pair": columns.pair, "label": label}

        said: dict[Path, NDArray[np.float64]] = {}

        def says(run: Done) -> NDArray[np.float64]:
            if run.path not in said:  # several panels ask the same run
                said[run.path] = logits_of(run, further, labels)
            return said[run.path]

        done: list[Done] = []
        at = {}
        for k, each in enumerate(first):
            at[k] = f"pattern-{k + 1}"
            done.append((yield Phase(name=at[k], spec=each)))
        for g in range(1, self.generations):
            size = [round(counts[name] * self.growth**g) - counts[name] for name in labels]
            before, made = dict(at), []
            for k, each in enumerate(first):
                panel = _others(len(done), k, self.share, spec.seed, g)
                shares = soft_labels([says(done[i]) for i in panel])
                chosen = [{**texts[i], label: labels[c]} for i, c in most_sure(shares, size)]
                source = desk.write(f"generation-{g + 1}-{k + 1}", [*rows, *chosen])
                data = plan.data(source, test, template=each.data.template, **own)
                at[k] = f"generation-{g + 1}-{k + 1}"
                made.append(
                    (yield Phase(name=at[k], spec=replace(each, data=data), made_of=tuple(before[i] for i in panel)))
                )
            done = made
        shares = soft_labels([says(run) for run in done])
        soft = [{**text, label: labels[int(c)]} for text, c in zip(texts, shares.argmax(-1), strict=True)]
        source = desk.write("soft", [*rows, *soft])
        final = plan.task(("kd_ensemble",), data=plan.data(source, test, words=None, **own), **of_last)
        teachers = ",".join(str(run.path) for run in done)
        settings = {"kd_ensemble.teachers": teachers, "kd_ensemble.temperature": self.temperature}
        yield Phase(
            name="classifier", spec=replace(final, settings=final.settings | settings), made_of=tuple(at.values())
        )


def _others(n: int, itself: int, share: float, seed: int, generation: int) -> list[int]:
    """A random share of the other models, one at least, by their numbers."""
    others = [i for i in range(n) if i != itself]
    order = shuffled(len(others), key(seed, "panel"), generation, itself)
    return sorted(others[int(i)] for i in order[: max(1, round(share * len(others)))])
