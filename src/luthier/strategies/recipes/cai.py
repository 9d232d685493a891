"""A model finds fault with its own answers under written principles, rewrites them, and then learns which it prefers.

    1 revised     for each prompt x: an answer y, then `rounds` times, with a principle c that is drawn:
                  a critique of y under c, and y rewritten after it. The last y is learnt, beside the task's own rows
    2 preferred   the model of 1 draws two answers to each x, the labeller says under a drawn principle how far it is
                  for one (both orders, as in rlaif), and dpo, or reward_model, learns it

Principles stand in a text file, one a line; ours to begin with is docs/files/principles.txt. Prompts are a further set,
--also prompts=FILE; --data are rows that help, and keep it helpful. Each record of rows-revised.jsonl holds principle,
critique and revision of every round. Answers that are empty, or that come to no end, are left out and counted in
rows-made.jsonl. rows-measured.jsonl says, before and after, how many of the prompts are refused by phrase, and the loss
on held-out answers that help.

Paper: arXiv:2212.08073, with 16 principles and up to 4 rounds. It samples the first answers; here they are the
likeliest ones. Its labels after written reasoning, clamped to 0.4 to 0.6, are not here: a label is read off one word.

Cost: 1 + 2 `rounds` answers a prompt, a run, two answers and two passes of the labeller a prompt, and a run. What was
written is kept: a stopped recipe writes nothing twice.
Claims: fewer harmful answers without a label of a person for harm, and fewer evasive ones than from people's labels.
Pitfalls: a small model cannot criticise: its revisions are its first answers, or worse. Read rows-revised.jsonl first.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from luthier.core import ConfigError, DataError, above, at_least, between
from luthier.data.columns import Columns
from luthier.data.encode_language import prompt_messages
from luthier.data.refusals import EMPTY, REFUSED, lines_of, ways_of
from luthier.data.rows import Row, Table
from luthier.strategies.recipes import _labels as labels
from luthier.strategies.recipes._principles import Questions
from luthier.surgery import compose
from luthier.training.recipe import Asked, Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("cai", family="recipes", paper="arXiv:2212.08073")
@dataclass(frozen=True, kw_only=True)
class CAI(Recipe):
    """Critique, revision, preference by principle."""

    example: ClassVar[str] = "sample:smollm2-135m --data CHATS.jsonl --set principles=docs/files/principles.txt"
    uses: ClassVar[tuple[str, ...]] = ("dpo", "reward_model")
    sets: ClassVar[tuple[str, ...]] = ("prompts",)

    principles: Annotated[str, "a text file with a principle a line"] = ""
    rounds: Annotated[int, "critiques, each with a revision", at_least(1)] = 1
    new_tokens: Annotated[int, "tokens of whatever is written, at most", at_least(1)] = 128
    temperature: Annotated[float, "at which the two answers are drawn", above(0)] = 1.0
    labeller: Annotated[str, "who compares: a finished run or a model; left out, the model itself"] = ""
    then: Annotated[Literal["dpo", "reward_model"], "how the labels are learnt"] = "dpo"
    tie: Annotated[float, "shares as near to a half as this are ties", between(0, 0.49)] = 0.0
    helpful: Annotated[bool, "the task's own rows are learnt beside the revisions"] = True
    critique: Annotated[str, "a text file with {prompt}, {answer} and {principle}, in place of ours"] = ""
    revision: Annotated[str, "one with {critique} too"] = ""
    question: Annotated[str, "one with {prompt}, {first}, {second} and {principle}"] = ""
    words: Annotated[str, "by which the labeller names the answers, parted by a comma"] = "1, 2"

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        if not self.principles:
            raise ConfigError(
                "cai.principles: name a text file with a principle a line (docs/files/principles.txt is one)."
            )
        rules = lines_of(self.principles, "the principles")
        asked = Questions(self, rules, plan.spec.seed)
        spec, (learnt, held, columns) = plan.spec, desk.rows()
        if columns.shape != "answered" or desk.kind != "decoder":
            raise ConfigError(
                f"cai learns answers to prompts with a decoder; these rows are {columns.shape} and the model is of the "
                f"kind {desk.kind}. Give rows with prompt and response, and a model that writes on."
            )
        if around := [name for name in (columns.system, columns.history, columns.tools) if name]:
            raise ConfigError(f"cai reads prompt, context and response, and the rows have {around[0]!r}. Leave it out.")
        if not compose.method(spec.method, dict(plan.of_method)).mergeable:
            raise ConfigError(
                f"cai: {spec.method} does not merge, and the second phase starts from the merged first. Use lora."
            )
        prompts = desk.further("prompts")
        if not len(prompts):
            raise DataError(f"{prompts.source}: holds no prompt to answer and to criticise. Give some.")
        desk.check(plan.phase((), task="causal_lm", also=None))
        texts = [labels.prompt_text(prompt_messages(prompts, k, columns, False)) for k in range(len(prompts))]
        table = Table([{"prompt": text} for text in texts], prompts.places, prompts.source)
        writer = desk.asked(spec.model)
        writer.says(asked.critiques(texts[:1], texts[:1], 0), max_new_tokens=1)  # it can be asked
        how = {
            "writer": writer.digest,
            "questions": asked.version,
            "rounds": self.rounds,
            "new_tokens": self.new_tokens,
        }
        revised = desk.kept("revised", how, table, lambda part: asked.revised(writer, part))
        good = [{"prompt": row["prompt"], "response": row["last"]} for row in revised.rows if not row["left_out"]]
        if len(revised) and not good:
            raise DataError(
                f"cai: of {len(revised)} revisions none has a word and came to an end within {self.new_tokens} tokens. "
                "Set cai.new_tokens higher, or begin from a model that learnt to answer."
            )
        own = _helpful(learnt, columns)
        test = None if held is None else desk.write("held", _helpful(held, columns))
        roles = {"prompt": "prompt", "response": "response", "context": None, "messages": None}
        rows = desk.write("learnt", [*good, *(own if self.helpful else [])])
        first = plan.phase((), task="causal_lm", also=None, data=plan.data(rows, test, **roles))
        done = yield Phase(name="revised", spec=first)
        speaker, judge = desk.asked(str(done.path)), desk.asked(self.labeller or spec.model)
        how = {"writer": done.digest, "labeller": judge.digest, "questions": asked.version, "tie": self.tie,
               "new_tokens": self.new_tokens, "temperature": self.temperature}  # fmt: skip
        pairs = desk.kept("pairs", how, table, lambda part: asked.pairs(speaker, judge, part))
        chosen = [
            {"prompt": row["prompt"], "chosen": row[v], "rejected": row["ba"["ab".index(v)]],
             "share": max(row["share"], 1 - row["share"])}
            for row in pairs.rows if (v := row["verdict"]) in ("a", "b")
        ]  # fmt: skip
        verdicts = {
            name: sum(row["verdict"] == name for row in pairs.rows) for name in ("a", "b", "tie", "same", "empty")
        }
        desk.write(
            "made",
            [
                {
                    "revisions": len(good),
                    "left_out": len(revised) - len(good),
                    "helpful": len(own) * self.helpful,
                    **verdicts,
                }
            ],
        )
        if not chosen:
            raise DataError(
                f"cai: of {len(pairs)} pairs of answers none is better by the labeller ({verdicts}). Ask a larger one."
            )
        roles = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "context": None, "response": None}
        data = plan.data(desk.write("preferred", chosen), None, **roles)
        data = replace(data, test_share=spec.data.test_share if len(chosen) >= 20 else 0.0)
        learns = {"reward_model": "reward", "dpo": "preference"}[self.then]
        last = plan.task((self.then,), model=done.merged(), data=data, also=None, task=learns)
        if self.then == "dpo" and "form" not in plan.of_strategies.get("dpo", {}):
            last = replace(last, settings={**last.settings, "dpo.form": "shares"})
        final = yield Phase(name="preferred", spec=last, made_of=("revised",))
        after = desk.asked(str(final.path)) if self.then == "dpo" else speaker
        questions = [labels.asked(text) for text in texts]
        answers = [] if held is None else [(labels.asked(r["prompt"]), r["response"]) for r in _helpful(held, columns)]
        with speaker.before_tuning():
            before = self._measured("before", speaker, questions, answers)
        desk.write("measured", [before, self._measured("after", after, questions, answers)])

    def _measured(self, name: str, who: Asked, prompts: list[Any], helpful: list[Any]) -> Row:
        """Refusals by phrase of the prompts, and how likely held-out answers that help are."""
        ways = ways_of([text for text, _ in who.says(prompts, max_new_tokens=self.new_tokens)])
        counted = {"refused": ways.count(REFUSED), "empty": ways.count(EMPTY), "prompts": len(ways)}
        return {
            "who": name,
            **counted,
            "helpful_loss": who.loss_of(helpful) if helpful else None,
            "helpful": len(helpful),
        }


def _helpful(table: Table, columns: Columns) -> list[dict[str, str]]:
    """The task's own rows, each as a prompt with its answer.

    Raises:
        DataError: an answer is no text.
    """
    found = []
    for k, row in enumerate(table.rows):
        answer = row.get(columns.response or "")
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(
                f"{table.places[k]}: the response is {answer!r}, and cai learns answers of text. Correct it."
            )
        asked = labels.prompt_text(prompt_messages(table, k, columns, False))
        found.append({"prompt": asked, "response": answer})
    return found
