"""What is asked of a model under principles: to criticise an answer, to rewrite it, to choose between two."""

from collections.abc import Iterator
from typing import Any

from luthier.core import key
from luthier.data.rows import Table
from luthier.strategies.recipes import _labels as labels
from luthier.training.recipe import Asked
from luthier.training.sampling import Sampling

__all__ = ["Questions"]

CRITIQUE = """\
A person asked:
{prompt}

The answer was:
{answer}

A principle says: {principle}

Say briefly in what the answer goes against that principle."""
REVISION = f"""\
{CRITIQUE.removesuffix("Say briefly in what the answer goes against that principle.")}\
Criticism of the answer:
{{critique}}

Write the answer anew so that it keeps to the principle. Write the answer alone."""
QUESTION = labels.QUESTION.replace(
    "Say which serves the person better: which is more helpful, truer, and does less harm.",
    "Say which keeps better to this principle: {principle}",
)


class Questions:
    """What is asked for a prompt, with principles that are drawn by seed, prompt and round."""

    def __init__(self, recipe: Any, rules: tuple[str, ...], seed: int) -> None:
        self.recipe, self.rules, self.seed = recipe, rules, seed
        fields = ("prompt", "answer", "principle")
        self.critique = labels.question_of(recipe.critique, fields, CRITIQUE)
        self.revision = labels.question_of(recipe.revision, (*fields, "critique"), REVISION)
        self.question = labels.question_of(recipe.question, ("prompt", "first", "second", "principle"), QUESTION)
        self.words = labels.words_of(recipe.words)
        self.version = labels.version(self.critique, self.revision, self.question, *self.words, *rules)

    def rule(self, prompt: str, when: int | str) -> str:
        return self.rules[key(self.seed, "cai", str(when), prompt) % len(self.rules)]

    def critiques(self, prompts: list[str], answers: list[str], number: int) -> list[Any]:
        each = zip(prompts, answers, strict=True)
        return [self._of(self.critique, prompt=p, answer=a, principle=self.rule(p, number)) for p, a in each]

    def revised(self, who: Asked, part: Table) -> Iterator[dict[str, Any]]:
        prompts = [row["prompt"] for row in part.rows]
        said = self._says(who, [labels.asked(p) for p in prompts])
        firsts, rounds = [text for text, _ in said], [list[Any]() for _ in prompts]
        for number in range(self.recipe.rounds):
            answers = [text for text, _ in said]
            critiques = [text for text, _ in self._says(who, self.critiques(prompts, answers, number))]
            said = self._says(who, [
                self._of(self.revision, prompt=p, answer=a, critique=c, principle=self.rule(p, number))
                for p, a, c in zip(prompts, answers, critiques, strict=True)
            ])  # fmt: skip
            for k, (text, _) in enumerate(said):
                rounds[k].append(
                    {"principle": self.rule(prompts[k], number), "critique": critiques[k], "revision": text}
                )
        for k, (text, ended) in enumerate(said):
            why = "" if text and ended else "no end" if text else "empty"
            yield {"prompt": prompts[k], "first": firsts[k], "rounds": rounds[k], "last": text, "left_out": why}

    def pairs(self, who: Asked, judge: Asked, part: Table) -> Iterator[dict[str, Any]]:
        prompts, found = [row["prompt"] for row in part.rows], []
        for side in ("a", "b"):
            seeds = [key(self.seed, "cai", side, prompt) for prompt in prompts]
            how = Sampling(seeds=seeds, temperature=self.recipe.temperature)
            found.append([text for text, _ in self._says(who, [labels.asked(p) for p in prompts], how)])
        both = list(zip(prompts, *found, strict=True))
        ask = [k for k, (_, a, b) in enumerate(both) if a and b and a != b]
        rules = [self.rule(prompt, "pair") for prompt in prompts]
        further = [{"principle": rules[k]} for k in ask]
        said = labels.labels_of(judge, self.question, [both[k] for k in ask], self.words, self.recipe.tie, further)
        of = dict(zip(ask, said, strict=True))
        for k, (prompt, a, b) in enumerate(both):
            told = vars(of[k]) if k in of else {"verdict": "same" if a == b and a else "empty", "share": 0.5}
            yield {"prompt": prompt, "a": a, "b": b, "principle": rules[k], **told}

    def _says(self, who: Asked, asked: list[Any], how: Sampling | None = None) -> list[tuple[str, bool]]:
        return who.says(asked, max_new_tokens=self.recipe.new_tokens, sampling=how)

    def _of(self, question: str, **values: str) -> list[dict[str, str]]:
        return labels.asked(labels.filled(question, values))
