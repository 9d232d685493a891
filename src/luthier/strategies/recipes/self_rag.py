"""A model says by tokens of its own when to look something up, and how good what it found and wrote is.

    1 answers    L = - sum over the model's turns of log p(token | all before); a paragraph is not learnt

A row has a question, an answer and a `utility` from 1 to 5. Where something was looked up it also names its `passage`
(an id, or the text of one of `documents`), whether it is `relevant`, and the answer's `support`: full, partial or none.
The tokens must be in the model: `luthier add-tokens MODEL --tokens FILE --out FOLDER` with the tokens that `luthier
strategies self_rag` lists below, one a line. Their rows train with the method trainable_tokens, beside another.

    [Retrieval] [No Retrieval] [Relevant] [Irrelevant] [Fully supported] [Partially supported]
    [No support / Contradictory] [Utility:1] ... [Utility:5] <paragraph> </paragraph>

`luthier.workflow.reflection.reflect` answers with such a run: it looks up where the chance of [Retrieval] is above a
bound, writes an answer for each document, and takes the best of log p + sum of w s, s from the chances of the tokens.

Paper: arXiv:2310.11511. Batches of 128, a rate of 2e-5 and 3 epochs of a model of 7B are quoted for its code.

Cost: a plain run; then for each question an answer for each document.
Claims: answers with what supports them, and no look where none is needed.
Pitfalls: judgements are read and not made: there is no critic here; a person or a larger model writes them. One
segment is written and chosen, not a tree of them. Of a small model nothing was measured: its judgements are words.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError
from luthier.data.columns import is_blank
from luthier.data.documents import load_documents, refuse_beside
from luthier.data.reflection import TOKENS, chat_of, read_judged
from luthier.data.rows import Table
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES
from luthier.workflow.load_model import find_model, load_tokenizer


@STRATEGIES.register("self_rag", family="recipes", paper="arXiv:2310.11511")
@dataclass(frozen=True, kw_only=True)
class SelfRAG(Recipe):
    """Reflection tokens."""

    example: ClassVar[str] = "MODEL --data JUDGED.jsonl --set documents=DOCUMENTS.jsonl"

    documents: Annotated[str | None, "a file of documents: rows with a text, and an id where they have names"] = None
    passage: Annotated[str, "column that names what was looked up; empty where nothing was"] = "passage"

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        learnt, held, columns = desk.rows()
        if columns.shape != "answered" or desk.kind != "decoder":
            raise ConfigError(
                "self_rag needs a decoder, and rows with a question and an answer (--prompt, --response); here are "
                f"rows of the kind {columns.shape} and a model of the kind {desk.kind}."
            )
        refuse_beside(columns, self.name, self.passage)
        vocabulary = load_tokenizer(find_model(plan.spec.model)).get_vocab()
        lacks = [token for token in TOKENS if token not in vocabulary]
        if lacks:
            raise ConfigError(
                f"self_rag: {plan.spec.model} has not the token {lacks[0]!r}, and lacks {len(lacks)} of {len(TOKENS)}. "
                "Write them to a file, one a line, and add them: luthier add-tokens MODEL --tokens FILE --out FOLDER."
            )
        names = (columns.prompt or "", columns.response or "")
        source = desk.write("answers", self.rows(learnt, *names, plan))
        test = None if held is None else desk.write("held", self.rows(held, *names, plan))
        nothing = dict.fromkeys(("text", "pair", "label", "prompt", "context", "response"))
        data = plan.data(source, test, **nothing, messages="messages")
        yield Phase(name="answers", spec=plan.task(data=data, task="causal_lm"))

    def rows(self, table: Table, question: str, answer: str, plan: Plan) -> list[dict[str, Any]]:
        """Each row as a chat, and where it came from."""
        looked = any(not is_blank(row.get(self.passage)) for row in table.rows)
        found = load_documents(self.documents, self.name, plan.spec.data) if looked else None
        made = []
        for row, place in zip(table.rows, table.places, strict=True):
            text = None
            if found is not None and not is_blank(row.get(self.passage)):
                text = found.texts[found.number(row[self.passage], f"{place}: field {self.passage!r}")]
            judged = read_judged(row, place, str(row.get(question)), str(row.get(answer)), text)
            made.append({"messages": chat_of(judged), "from": place})
        return made
