"""Prompt tuning: train a few vectors before the embedded text, and nothing else.

    H_0 = [E_p ; E(x)]          E_p: (P, d)

In an encoder-decoder the encoder alone gets them. The model reads other text than before from the first step on. In a
model of pictures (ViT) they stand beside the patches, behind the positions, drawn from [-sqrt(3 / d), sqrt(3 / d)]: Jia
et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119, its shallow form.

Lester, Al-Rfou, Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2.

Count: P times the width of the word embedding.
Claims: matches full fine-tuning at 10 billion parameters, and falls behind it below that.
Cost: every row grows by P tokens. Where the texts are shorter than that, most of a step is the prompt.
Use it when: the model is large and a tuning must be a few vectors that travel with a request.
Not when: the model is small: its paper reaches full fine-tuning only with billions of numbers.
Pitfalls: learning rates are of another order here, 0.3 with Adafactor: with 1e-3 the vectors hardly move; the paper's
100 vectors shorten the text by as much where positions are bounded; T5 v1.1 wants to be trained as a language model
first. The paper samples from the 5,000 most frequent words: we take the first 5,000 ids, which are those in a
vocabulary sorted by frequency (SentencePiece), and merely ids in any other.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above, at_least
from luthier.methods.parts.peft_prompts import prompt_form
from luthier.methods.parts.prompt import Prompt, prompt_width
from luthier.surgery import METHODS, Edit, Method, PeftForm, PrependTokens


@METHODS.register("prompt_tuning", family="additive", paper="arXiv:2104.08691")
@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Settings of prompt tuning."""

    length: Annotated[int, "vectors before the text", at_least(1)] = 20
    init: Annotated[Literal["uniform", "vocabulary", "words"], "random, or copied from word embeddings"] = "vocabulary"
    span: Annotated[float, "uniform: drawn from [-span, span]", above(0)] = 0.5
    words: Annotated[
        tuple[tuple[int, ...], ...], "init=words: token ids, one group per vector; a group is averaged"
    ] = ()

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 0.3
    tiny: ClassVar[dict[str, int]] = {"length": 3}
    peft: ClassVar[PeftForm | None] = prompt_form(
        "PROMPT_TUNING",
        lambda facts: {"init": "uniform"},
        said={"prompt_tuning_init": "RANDOM"},
        ignored=("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    )

    def __post_init__(self) -> None:
        if (self.init == "words") != bool(self.words):
            raise ConfigError(
                f"prompt_tuning: init={self.init!r} and {len(self.words)} groups of words. "
                "init=words needs words, such as words=[[318],[318,12]]; other inits take none."
            )
        if len(self.words) > self.length or any(not group for group in self.words):
            raise ConfigError(
                f"prompt_tuning.words: {len(self.words)} groups for {self.length} vectors. "
                "Give at most one group per vector, each of at least one token id; the rest is sampled."
            )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        width, span = prompt_width(anatomy, "prompt_tuning"), self.span
        if anatomy.vocab_size is None:  # patches are narrow beside words, and there is no table to copy from
            if self.init == "words":
                raise ConfigError(
                    f"prompt_tuning.init: words, and this {anatomy.model_type} model has none. Leave it out."
                )
            span = math.sqrt(3 / width)
        yield PrependTokens(Prompt(self.length, width, init=self.init, span=span, words=self.words), self.length)

    def n_params(self, anatomy: Anatomy) -> int:
        return self.length * prompt_width(anatomy, "prompt_tuning")
