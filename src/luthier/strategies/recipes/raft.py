"""Answers are learnt from documents of which most say nothing of the question, and sometimes all.

    1 answers    x = shuffled(d*, d_1 .. d_k) + q    in a share p of the rows,     L = - log P(a | x)
                 x = shuffled(d_1 .. d_k+1) + q      in the others

A row has a question, an answer, and its `oracle` d*: the id or the text of one of `documents`. The others are those
nearest to the question (`by` words, or vectors of `encoder`), or drawn. An answer may quote, ##begin_quote## words
##end_quote##: what it quotes must stand in its oracle. rows-answers.jsonl says of each row which documents it shows,
where its oracle stands among them, and the seed. Held-out rows all show their oracle and the k nearest others.

Paper: arXiv:2403.10131. Its figures show 1 + 4 documents; for its code p = 0.8 is quoted, or 1, with 3 distractors.

Cost: a plain run on rows that are k + 1 documents longer.
Claims: answers come from the document that has them and not from those beside it; without it, from what was learnt.
Pitfalls: rows without an oracle teach answers that stand nowhere in the prompt: with facts that the model cannot know
they teach it to invent. Nothing was measured here of how well a small model chooses among five documents: compare with
p = 1 and fewer `distractors`. A score of held-out rows says how well it reads, and nothing of how well documents are
found.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from luthier.core import ConfigError, DataError, at_least, between, key
from luthier.data.columns import Columns
from luthier.data.documents import Documents, beside, load_documents, quotes_in, refuse_beside
from luthier.data.retrieval import Retriever, Vectors, Words, nearest
from luthier.data.rows import Table
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES
from luthier.workflow.sentence_vectors import SentenceVectors


@STRATEGIES.register("raft", family="recipes", paper="arXiv:2403.10131")
@dataclass(frozen=True, kw_only=True)
class RAFT(Recipe):
    """Retrieval-aware fine-tuning."""

    example: ClassVar[str] = "sample:smollm2-135m --data ANSWERED.jsonl --set documents=DOCUMENTS.jsonl"

    documents: Annotated[str | None, "a file of documents: rows with a text, and an id where they have names"] = None
    oracle: Annotated[str, "column that names the document with the answer"] = "oracle"
    share: Annotated[float, "share of the rows that show their oracle", between(0, 1)] = 0.8
    distractors: Annotated[int, "documents beside it", at_least(1)] = 4
    by: Annotated[Literal["words", "vectors", "drawn"], "how they are chosen: near to the question, or drawn"] = "words"
    encoder: Annotated[str, "what makes the vectors"] = "sample:minilm-l6"

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        learnt, held, columns = desk.rows()
        if columns.shape != "answered":
            raise ConfigError(
                f"raft needs rows with a question and an answer, and these are {columns.shape}. Name the columns with "
                "--prompt and --response."
            )
        refuse_beside(columns, self.name, self.oracle)
        found = load_documents(self.documents, self.name, plan.spec.data)
        if len(found) < self.distractors + 2:
            raise ConfigError(
                f"raft.distractors = {self.distractors} needs {self.distractors + 2} documents or more, and "
                f"{found.source} has {len(found)}. Set it lower."
            )
        of: Retriever | None = None
        if self.by != "drawn":
            of = Words(found.texts) if self.by == "words" else Vectors(found.texts, SentenceVectors(self.encoder))
        rows = list(self.rows(learnt, columns, found, of, plan.spec.seed, self.share))
        test = None if held is None else list(self.rows(held, columns, found, of, plan.spec.seed, 1.0))
        written = desk.write("answers", rows)
        data = plan.data(
            written, desk.write("held", test) if test else None, prompt="prompt", response="response",
            **dict.fromkeys(("context", "text", "pair", "label")),
        )  # fmt: skip
        yield Phase(name="answers", spec=plan.task(data=data))

    def rows(
        self, table: Table, columns: Columns, found: Documents, of: Retriever | None, seed: int, share: float
    ) -> Iterator[dict[str, Any]]:
        """Each row beside its documents, and where it came from.

        Raises:
            DataError: an oracle that is no document, or a quote that does not stand in it; with place and field.
        """
        if self.oracle not in table.columns:
            names = ", ".join(map(repr, table.columns))
            raise DataError(f"{table.source}: no column {self.oracle!r} (raft.oracle). Its columns are {names}.")
        for row, place in zip(table.rows, table.places, strict=True):
            question, answer = str(row.get(columns.prompt or "")), str(row.get(columns.response or ""))
            number = found.number(row.get(self.oracle), f"{place}: field {self.oracle!r}")
            for quote in quotes_in(answer, f"{place}: field {columns.response!r}"):
                if not quote or quote not in found.texts[number]:
                    raise DataError(
                        f"{place}: field {columns.response!r} quotes {quote[:60]!r}, which does not stand in its "
                        f"document {found.names[number]!r}. Quote it word for word."
                    )
            shown = self.shown(question, number, found, of, seed, share)
            yield {
                "prompt": beside(question, [found.texts[n] for n in shown]),
                "response": answer,
                "documents": [found.names[n] for n in shown],
                "oracle": shown.index(number) + 1 if number in shown else 0,
                "from": place,
                "seed": seed,
            }

    def shown(
        self, question: str, oracle: int, found: Documents, of: Retriever | None, seed: int, share: float
    ) -> list[int]:
        """The documents of one row, in their order: a draw that is named by the seed and the row."""
        draw = random.Random(key(seed, "raft", question, oracle))
        has = draw.random() < share
        out = found.alike(oracle)
        n = self.distractors + (not has)
        if len(found) - len(out) < n:
            raise ConfigError(f"raft: {found.source} has not {n} documents other than {found.names[oracle]!r}.")
        if of is None:
            others = draw.sample([i for i in range(len(found)) if i not in out], n)
        else:
            others = nearest(of, question, n, without=out)
        shown = [*others, *([oracle] if has else [])]
        draw.shuffle(shown)
        return shown
