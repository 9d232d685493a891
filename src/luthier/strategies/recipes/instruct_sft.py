"""An instruction and its answer: the model learns the answer, and the token that ends it.

    1 answers    L = - sum over tokens of the response, and its end, of log p(token | instruction, tokens before)

This is what `luthier train` does with rows of prompts and responses, or of chats: the name is here so that it is found,
and so that rows of another kind are refused. What the prompt says carries no loss. Rows are laid out by the model's
own chat template, and prediction lays them out alike. --loss-on all learns the prompts too; `luthier look` shows it.

Paper: arXiv:2203.02155, its first step; FLAN, arXiv:2109.01652.

Cost: a plain run; its neutral is itself.
Claims: a base model answers in place of going on with the text. A thousand careful rows can do.
Pitfalls: it teaches a manner more than facts: answers that the model could not know teach it to invent. Of a model
of 135M expect the manner alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from luthier.core import ConfigError
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("instruct_sft", family="recipes", paper="arXiv:2203.02155")
@dataclass(frozen=True, kw_only=True)
class InstructSFT(Recipe):
    """Supervised fine-tuning on instructions."""

    example: ClassVar[str] = "sample:smollm2-135m --data ANSWERED.jsonl"

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        _, _, columns = desk.rows()
        if columns.shape not in ("answered", "dialogue") or desk.kind == "encoder":
            raise ConfigError(
                "instruct_sft needs a model that writes, and prompts with responses or chats; here are rows of the "
                f"kind {columns.shape} and a model of the kind {desk.kind}. Name the columns (--prompt, --response)."
            )
        yield Phase(name="answers", spec=plan.task())
