"""The encoder that finds documents learns what helps the language model; the model learns to use what is found.

    1 retriever   p_LM(c|x, y) = softmax over the `candidates` nearest of log p(y | c, x) / tau;  L = KL(p_LM || p_R)
    2 answers     for each of the k nearest c a row of its own, c + x -> y;                        L = -log p(y | c, x)

Rows are questions with answers; `documents` is a file of texts. In 1 the language model is asked as it is and stays;
in 2 the encoder finds and stays. log p is the mean over the tokens of y, so that long answers are no surer. Phase 1 is
a run of the strategy retriever_kl on `encoder`, by `retriever_method`; its merged model, beside it, is the encoder to
find with afterwards. rows-answers.jsonl and rows-found.jsonl say what was found for each row.

Paper: arXiv:2310.01352. k = 3 and tau = 0.01 are quoted for it.

Cost: `candidates` passes of the language model for each row, a run of the encoder, and a run on k times as many rows.
Claims: both together answer better than either alone.
Pitfalls: the order of the two is ours. A document that says nothing of the answer still makes a row, and teaches to
answer without it. The shares are as good as the model's judgement: of a model of 135M nothing was measured here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, above, at_least
from luthier.data.columns import Columns
from luthier.data.documents import Documents, beside, load_documents, refuse_beside
from luthier.data.retrieval import Vectors, nearest
from luthier.data.rows import Table
from luthier.runs.spec import DataSpec, EvalSpec, OptimSpec
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe, Writer
from luthier.training.strategy import STRATEGIES
from luthier.workflow.sentence_vectors import SentenceVectors


@STRATEGIES.register("ra_dit", family="recipes", paper="arXiv:2310.01352")
@dataclass(frozen=True, kw_only=True)
class RADIT(Recipe):
    """Retrieval-augmented dual instruction tuning."""

    example: ClassVar[str] = "sample:smollm2-135m --data ANSWERED.jsonl --set documents=DOCUMENTS.jsonl"
    uses: ClassVar[tuple[str, ...]] = ("retriever_kl",)
    tiny: ClassVar[dict[str, Any]] = {"k": 2, "candidates": 3, "retriever_epochs": 1.0}

    documents: Annotated[str | None, "a file of documents: rows with a text, and an id where they have names"] = None
    encoder: Annotated[str, "what finds documents, and learns"] = "sample:minilm-l6"
    k: Annotated[int, "documents of a question, each in a row of its own", at_least(1)] = 3
    candidates: Annotated[int, "documents that the language model judges for a question", at_least(2)] = 8
    tau: Annotated[float, "temperature of its judgement", above(0)] = 0.01
    retriever_method: Annotated[str, "how the encoder learns; it must merge"] = "lora"
    retriever_epochs: Annotated[float, "passes of the encoder over the questions", above(0)] = 3.0
    retriever_lr: Annotated[float | None, "peak rate of the encoder; left out, the method's own", above(0)] = None

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec, (learnt, held, columns) = plan.spec, desk.rows()
        if columns.shape != "answered" or desk.kind != "decoder":
            raise ConfigError(
                "ra_dit needs a decoder, and rows with a question and an answer (--prompt, --response); here are rows "
                f"of the kind {columns.shape} and a model of the kind {desk.kind}."
            )
        refuse_beside(columns, self.name)
        found = load_documents(self.documents, self.name, spec.data)
        if len(found) < max(self.k, self.candidates):
            raise ConfigError(
                f"ra_dit needs {max(self.k, self.candidates)} documents for k = {self.k} and candidates = "
                f"{self.candidates}, and {found.source} has {len(found)}. Set them lower."
            )
        source = desk.write("found", self.judged(desk.writer(spec.model), learnt, columns, found))
        data = DataSpec(source=source, text="text", label="label", test_share=0.0)
        first = plan.phase(
            ("retriever_kl",), model=self.encoder, method=self.retriever_method, task="regression", data=data,
            epochs=self.retriever_epochs, steps=None, eval=EvalSpec(), optim=OptimSpec(lr=self.retriever_lr), also=None,
        )  # fmt: skip
        done = yield Phase(name="retriever", spec=first)
        of = Vectors(found.texts, SentenceVectors(done.merged()))
        rows = desk.write("answers", self.rows(learnt, columns, found, of))
        test = None if held is None else desk.write("held", self.rows(held, columns, found, of))
        given = plan.data(
            rows, test, prompt="prompt", response="response", **dict.fromkeys(("context", "text", "pair", "label"))
        )
        yield Phase(name="answers", spec=replace(plan.task(data=given), also=None), made_of=("retriever",))

    def judged(self, writer: Writer, table: Table, columns: Columns, found: Documents) -> Iterator[dict[str, Any]]:
        """Each question with what was found for it, and how much each of them helps the model with the answer."""
        of = Vectors(found.texts, SentenceVectors(self.encoder))
        for number, (row, place) in enumerate(zip(table.rows, table.places, strict=True)):
            question, answer = str(row[columns.prompt or ""]), str(row[columns.response or ""])
            near = nearest(of, question, self.candidates)
            said = []
            for n in near:
                total, tokens = writer.log_chance(f"{beside(question, [found.texts[n]])}\nAnswer:", f" {answer}")
                said.append(total / tokens)
            yield {
                "text": question, "label": float(number), "documents": [found.texts[n] for n in near],
                "shares": posterior(said, self.tau), "names": [found.names[n] for n in near], "from": place,
            }  # fmt: skip

    def rows(self, table: Table, columns: Columns, found: Documents, of: Vectors) -> Iterator[dict[str, Any]]:
        """k rows for each question, each with one document."""
        for row, place in zip(table.rows, table.places, strict=True):
            question = str(row[columns.prompt or ""])
            for rank, n in enumerate(nearest(of, question, self.k), 1):
                yield {
                    "prompt": beside(question, [found.texts[n]]), "response": str(row[columns.response or ""]),
                    "document": found.names[n], "rank": rank, "from": place,
                }  # fmt: skip


def posterior(logs: list[float], tau: float) -> list[float]:
    """softmax of log-probabilities over a temperature.

    >>> [round(share, 3) for share in posterior([-1.0, -2.0], 1.0)]
    [0.731, 0.269]
    """
    top = max(logs)
    shares = [math.exp((one - top) / tau) for one in logs]
    return [share / sum(shares) for share in shares]
