"""Entities, relations or events of a text are learnt as a line of words that reads back as a typed structure.

    1 lines    x = instruction + types + text,    y = "person: Ada; place: Paris",    L = -log P(y | x)

A row has a `text` and `items`, a list of {"type", "text"} (ner), {"type", "head", "tail"} (relation) or {"type",
"trigger", "arguments": [{"role", "text"}]} (event); each span must stand in its text. With `auxiliary` each row to
learn from is also asked for its spans alone, and for the types of spans that are given.

Held-out rows are answered at the end: rows-found.jsonl has each answer, what was read in it and what could not be, and
rows-scores.jsonl precision, recall and F1 over all rows, where type and words must both be right. An answer that cannot
be read counts as nothing found, and is counted; `strict` drops the whole answer where a piece of it is broken.

Paper: arXiv:2304.08085 (InstructUIE), on FLAN-T5 of 11B and 32 sets.

Cost: a plain run, with up to three rows for each; then an answer for each held-out row.
Claims: one model for many sets and label names that are read from the prompt.
Pitfalls: positions are not learnt: a span that stands twice is one. The paper's model is eighty times as large as the
sample of 135M: expect of that the form and the frequent types of one set, and no types that it has not learnt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from luthier.core import ConfigError, DataError, at_least
from luthier.data.extraction import Item, micro_f1, read_items, read_line, written
from luthier.data.rows import Table, load_halves, normalised, split_rows
from luthier.training.recipe import Desk, Done, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES

ASKED = {
    "ner": "Find the named entities in the text. Write each as type: words.",
    "relation": "Find the relations in the text. Write each as type: head, tail.",
    "event": "Find the events in the text. Write each as type: trigger (role: words).",
}


@STRATEGIES.register("instruct_uie", family="recipes", paper="arXiv:2304.08085")
@dataclass(frozen=True, kw_only=True)
class InstructUIE(Recipe):
    """Instructed information extraction."""

    example: ClassVar[str] = "sample:smollm2-135m --data ENTITIES.jsonl"
    tiny: ClassVar[dict[str, Any]] = {"new_tokens": 4}

    kind: Annotated[Literal["ner", "relation", "event"], "what is looked for"] = "ner"
    text: Annotated[str, "column with the text"] = "text"
    items: Annotated[str, "column with what stands in it"] = "items"
    types: Annotated[str, "the types that are asked for, parted by commas; left out, those of the rows"] = ""
    auxiliary: Annotated[bool, "also learn to find spans, and to say their types"] = True
    strict: Annotated[bool, "an answer with a broken piece counts as nothing found"] = False
    new_tokens: Annotated[int, "tokens of an answer, at most", at_least(1)] = 128

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        data = plan.spec.data
        if desk.kind == "encoder" or data.fold is not None:
            raise ConfigError(
                "instruct_uie needs a model that writes, and holds out by test or test_share, not by fold."
            )
        table, held = load_halves(data)
        if held is None:
            table, held = split_rows(
                table, data.test_share, data.split_seed, lambda row: normalised(row.get(self.text) or "")
            )
        wanted = self.read(table)
        types = [word.strip() for word in self.types.split(",") if word.strip()]
        types = types or sorted({item.type for items in wanted for item in items})
        strange = sorted({item.type for items in wanted for item in items} - set(types))
        if strange:
            raise ConfigError(f"instruct_uie.types leaves out {strange[0]!r}, which rows have. Name it too.")
        test = [] if held is None else self.read(held)
        rows = list(self.rows(table, wanted, types, auxiliary=self.auxiliary))
        asked = [] if held is None else list(self.rows(held, test, types, auxiliary=False))
        source = desk.write("lines", rows)
        given = plan.data(
            source, desk.write("held", asked) if asked else None, prompt="prompt", response="response",
            **dict.fromkeys(("context", "text", "pair", "label")),
        )  # fmt: skip
        done = yield Phase(name="lines", spec=plan.task(data=given))
        if held is not None:
            self.score(desk, done, held, asked, test, types)

    def read(self, table: Table) -> list[tuple[Item, ...]]:
        """What stands in each row.

        Raises:
            DataError: a column or a text is not there, or an item cannot be learnt; with place and field.
        """
        for name in (self.text, self.items):
            if name not in table.columns:
                columns = ", ".join(map(repr, table.columns))
                raise DataError(f"{table.source}: no column {name!r} (instruct_uie). Its columns are {columns}.")
        found = []
        for row, place in zip(table.rows, table.places, strict=True):
            text = row.get(self.text)
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{place}: field {self.text!r} is {text!r}; it must be a text.")
            found.append(read_items(row.get(self.items), self.kind, text, f"{place}: field {self.items!r}"))
        return found

    def rows(
        self, table: Table, wanted: list[tuple[Item, ...]], types: list[str], *, auxiliary: bool
    ) -> Iterator[dict[str, str]]:
        """Prompts and answers, and where each came from."""
        options = f"Types: {', '.join(types)}."
        for row, place, items in zip(table.rows, table.places, wanted, strict=True):
            text = f"Text: {row[self.text]}"
            yield {
                "prompt": f"{ASKED[self.kind]}\n{options}\n{text}", "response": written(items, self.kind),
                "asks": self.kind, "from": place,
            }  # fmt: skip
            spans = list(dict.fromkeys(span for item in items for span in item.spans))
            if not auxiliary or not spans:
                continue
            said = "; ".join(spans)
            yield {
                "prompt": f"Find the words in the text that have a type.\n{options}\n{text}", "response": said,
                "asks": "spans", "from": place,
            }  # fmt: skip
            yield {
                "prompt": f"{ASKED[self.kind]}\n{options}\nWords: {said}.\n{text}",
                "response": written(items, self.kind), "asks": "types", "from": place,
            }  # fmt: skip

    def score(
        self, desk: Desk, done: Done, held: Table, asked: list[dict[str, str]], test: list[tuple[Item, ...]],
        types: list[str],
    ) -> None:  # fmt: skip
        """Answers to the held-out rows, what was read in them, and how much of it is right."""
        rows = Table([{"prompt": row["prompt"]} for row in asked], held.places, "held-out rows")
        texts = [text for text, _ in done.written(rows, max_new_tokens=self.new_tokens, beams=1)]
        lines = [
            read_line(line, self.kind, types=types, text=str(row[self.text]), strict=self.strict)
            for line, row in zip(texts, held.rows, strict=True)
        ]
        told = [
            {"from": place, "answer": text, "found": [list(unit) for unit in map(_flat, read.items)],
             "wanted": [list(unit) for unit in map(_flat, items)], "problems": list(read.problems)}
            for place, text, read, items in zip(held.places, texts, lines, test, strict=True)
        ]  # fmt: skip
        desk.write("found", told)
        scores = micro_f1(test, [read.items for read in lines], self.kind)
        broken = sum(bool(read.problems) for read in lines)
        desk.write("scores", [scores | {"rows": len(held), "rows_with_problems": broken}])
        desk.say(
            f"micro-F1 {scores['micro_f1']:.3f} of {self.kind} on {len(held)} held-out rows: {scores['right']:g} right "
            f"of {scores['found']:g} found and {scores['wanted']:g} wanted; {broken} answers with problems, which "
            "rows-found.jsonl names"
        )


def _flat(item: Item) -> tuple[str, ...]:
    return (item.type, *item.spans, *(f"{role}: {span}" for role, span in item.arguments))
