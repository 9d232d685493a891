"""A model says which of two answers is better, and its shares are learnt in place of people's.

    1 labels    p(a) = ½ [P("1" | x, a, b) + P("2" | x, b, a)] for each pair, read off the labeller's next word
    2 learnt    reward_model, or dpo, on the better answer, the worse one and p

Both orders are asked, so a labeller that likes one place says ½. A share of ½, or within `tie` of it, is a tie: named
in rows-labels.jsonl, and not learnt. There stand, for each row, both orders, the share, the verdict, the labeller's
digest and the version of the question. What order the rows have is not read; rows-made.jsonl counts how often the
labeller agrees with it, which says something where people made it. Held-out rows are labelled alike.

Paper: arXiv:2309.00267, section 2. Reasoning before the label, and rewards that are asked for directly, are not here.

Cost: two passes of the labeller a pair, then a run of the strategy. Labels are kept: no row is asked twice.
Claims: labels of a large labeller teach about as much as people's.
Pitfalls: what the labeller likes is learnt: often what is longer, or like its own words. A small labeller is swayed by
the order in most rows (`swayed` in rows-made.jsonl) and then knows nothing. Compare a few labels with your own first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from luthier.core import ConfigError, DataError, between
from luthier.data.columns import Columns
from luthier.data.encode_pairs import NEITHER, pair_messages
from luthier.data.rows import Row, Table
from luthier.strategies.recipes._labels import labels_of, prompt_text, question_of, version, words_of
from luthier.training.recipe import Asked, Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("rlaif", family="recipes", paper="arXiv:2309.00267")
@dataclass(frozen=True, kw_only=True)
class RLAIF(Recipe):
    """Preferences of a model."""

    example: ClassVar[str] = "sample:smollm2-135m --data PAIRS.jsonl --set labeller=MODEL"
    uses: ClassVar[tuple[str, ...]] = ("reward_model", "dpo")

    labeller: Annotated[str, "a finished run, or a model; left out, the model itself"] = ""
    then: Annotated[Literal["reward_model", "dpo"], "how the labels are learnt"] = "reward_model"
    tie: Annotated[float, "shares as near to a half as this are ties", between(0, 0.49)] = 0.0
    question: Annotated[str, "a text file with {prompt}, {first} and {second}, in place of ours"] = ""
    words: Annotated[str, "by which the labeller names the answers, parted by a comma"] = "1, 2"

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        question, words = question_of(self.question), words_of(self.words)
        learnt, held, columns = desk.rows()
        if columns.shape != "preferred":
            raise ConfigError(
                f"rlaif weighs two answers to one prompt, and these rows are {columns.shape}. Give rows with prompt, "
                "chosen and rejected; which is which is not read."
            )
        learns = {"task": {"reward_model": "reward", "dpo": "preference"}[self.then]}
        desk.check(plan.task((self.then,), **learns))
        who = desk.asked(self.labeller or plan.spec.model)
        first = next((row for row in range(len(learnt)) if _pair(learnt, row, columns)), None)
        if first is None:
            raise DataError(f"rlaif: no row of {learnt.source} has two answers that differ. Give other rows.")
        labels_of(who, question, [_pair(learnt, first, columns) or ("", "", "")], words, self.tie)  # it can be asked
        key = {"labeller": who.digest, "question": version(question, *words), "tie_within": self.tie}
        written, counts = {}, []
        for half, table in (("labels", learnt), ("held-labels", held)):
            if table is None:
                continue
            said = desk.kept(half, key, table, lambda part: self._labelled(who, question, words, part, columns, key))
            counts.append(_counts(half, said, key))
            rows = zip(table.rows, said.rows, strict=False)  # none are said while nothing is written
            written[half] = [_ordered(row, label, columns) for row, label in rows if label["verdict"] in ("a", "b")]
        desk.write("made", counts)
        if counts[0]["rows"] and not written["labels"]:
            raise DataError(
                f"rlaif: the labeller finds no answer better than the other in {counts[0]['rows']} rows; in "
                f"{counts[0]['swayed']} the order alone decides what it names. Ask a larger labeller, or otherwise "
                "(rlaif.question)."
            )
        test = desk.write("held", written["held-labels"]) if written.get("held-labels") else None
        roles = {role: columns.used().get(role) for role in ("prompt", "context", "chosen", "rejected")}
        data = plan.data(desk.write("labelled", written["labels"]), test, **roles)
        spec = plan.task((self.then,), data=data, **learns)
        if self.then == "dpo" and "form" not in plan.of_strategies.get("dpo", {}):
            spec = replace(spec, settings={**spec.settings, "dpo.form": "shares"})
        yield Phase(name="learnt", spec=spec)

    def _labelled(
        self, who: Asked, question: str, words: tuple[str, str], part: Table, columns: Columns, key: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        pairs = [_pair(part, row, columns) for row in range(len(part))]
        labels = iter(labels_of(who, question, [p for p in pairs if p], words, self.tie))
        for row, pair in enumerate(pairs):
            told = {"place": part.places[row], "labeller": key["labeller"], "question": key["question"]}
            if pair is None:
                yield {"verdict": "same", "share": 0.5, "swayed": False, **told}
                continue
            yield {**vars(next(labels)), **told}


def _pair(table: Table, row: int, columns: Columns) -> tuple[str, str, str] | None:
    """Prompt and both answers as texts; None where they are the same."""
    try:
        one, other = pair_messages(table, row, columns)
    except DataError as error:
        if str(error) == NEITHER:
            return None
        raise DataError(f"{table.places[row]}: {error}. Correct the row; a labeller reads all of them.") from None
    return prompt_text(one[:-1]), str(one[-1]["content"]), str(other[-1]["content"])


def _ordered(row: Row, label: Row, columns: Columns) -> Row:
    """The row with the better answer first, and the share of it, unrounded."""
    assert columns.chosen is not None and columns.rejected is not None
    kept = {name: row.get(name) for role, name in columns.used().items() if role not in ("share", "margin")}
    if label["verdict"] == "b":
        kept |= {columns.chosen: row.get(columns.rejected), columns.rejected: row.get(columns.chosen)}
    return {**kept, "share": max(label["share"], 1.0 - label["share"])}


def _counts(half: str, said: Table, key: dict[str, Any]) -> Row:
    verdicts = [row["verdict"] for row in said.rows]
    counted = {name: verdicts.count(name) for name in ("a", "b", "tie", "same")}
    swayed = sum(bool(row["swayed"]) for row in said.rows)
    agrees = counted["a"] / max(1, counted["a"] + counted["b"])
    return {"half": half, **key, "rows": len(verdicts), **counted, "swayed": swayed, "agrees_with_the_rows": agrees}
