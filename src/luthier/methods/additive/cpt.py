"""CPT: examples before the text, as in a prompt, whose word embeddings may each move a little, by the kind of word.

    H_0 = [E(context) + offset ; E(x)]      |offset_i| <= eps_i sqrt(d / 2048)      offset_i = 0 for words of answers

eps is `epsilon` for the words of a text and `format_epsilon` for those around it; after each step an offset that is too
long is cut to its bound. In a language model the context's answers are learnt too, each word of them like one of the
row's own, times decay for the last example, decay^2 for the one before it, and so on. Vectors before the text know
nothing of it, so that loss is the same for every row of a batch, and needs no pass of its own.

Blau et al. 2024, "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
arXiv:2410.17222. The form is that of peft 0.21, which asks for `words` (ids) and `types`: 1 before a text, 2 the text,
3 before an answer, 4 the answer, and 4 more for each example. A run makes them of `examples`, pairs of a text and an
answer, and the strings around them; each piece is cut into tokens by itself. peft divides the sum of both losses by
all their words, ours by the row's; the direction is the same.

Count: the width of the word embedding times the words of the context that are no answer.
Claims: better than examples alone and than prompt tuning where rows are few, since it hardly can overfit.
Cost: every row grows by the context.
Use it when: you would put examples into a prompt, and have some more rows than fit there.
Not when: there are many rows: the bound keeps the model near its prompt. A classifier has nothing of the second loss.
Pitfalls: the rows of a run carry no kinds of words of their own: all their answers count as the last example. In an
encoder or an encoder-decoder the context acts, and its answers are not learnt.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.anatomy.word_logits import finished_logits
from luthier.core import CannotMerge, ConfigError, IntegrityError, at_least
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.peft_prompts import COUNTS, ONE, prompt_facts, rows_before
from luthier.methods.parts.prompt import prompt_width
from luthier.surgery import (
    METHODS,
    Edit,
    Method,
    Objective,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
    PrependTokens,
    TunedView,
)

USUAL = 2048
"""The width for which eps is meant."""
NEAR = 1e-4
"""How far a vector of peft's file may lie from where it can be, as a share of its length."""


def out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vectors, and the context that they began as."""
    if going.answers != "CAUSAL_LM":
        raise CannotMerge(f"cpt: peft has it for language models alone, and this one answers {going.answers!r}.")
    held = going.stored["prompt.offset"]
    offset = shortened(held, limits(going.method, held.shape[1])[moving(going.method)])
    vectors = placed(going.method, looked_up(going.model, going.method.words), offset)
    return {ONE: vectors}, {**prompt_facts(going, *vectors.shape), **context_facts(going.method)}


def looked_up(model: Any, words: tuple[int, ...]) -> Tensor:
    """Embeddings of the words: (P, d), through the model's layer, as peft looks them up."""
    table = model.get_input_embeddings()
    with torch.no_grad():
        found: Tensor = table(torch.tensor(words, device=table.weight.device))
    return found.float().cpu()


def context_facts(method: Any) -> dict[str, Any]:
    """What peft's configuration says of the context."""
    return {
        "cpt_token_ids": list(method.words),
        "cpt_mask": [1] * len(method.words),
        "cpt_tokens_type_mask": list(method.types),
        "opt_weighted_loss_type": "none" if method.decay == 1 else "decay",
    }


def back(coming: PeftIn) -> PeftTaken:
    """The offsets, from the vectors and the model's own table."""
    rows, facts = rows_before(coming), coming.facts
    words, types = (tuple(facts.get(name) or ()) for name in ("cpt_token_ids", "cpt_tokens_type_mask"))
    mask, weighed = facts.get("cpt_mask"), facts.get("opt_weighted_loss_type", "none")
    if not len(words) == len(types) == len(rows) or any(m != 1 for m in mask or ()):
        raise ConfigError(
            f"{coming.where}: {len(words)} ids, {len(types)} types and {len(rows)} vectors, with the mask {mask!r}; "
            "ours has one of each for every word, and leaves none out."
        )
    settings = {"words": words, "types": types, "decay": facts.get("opt_loss_decay_factor", 1.0)}
    if weighed == "none":
        settings["decay"] = 1.0
    apart = rows.float() - looked_up(coming.model, words)
    kinds = torch.tensor(types) % 4
    if not torch.allclose(apart[kinds == 0], torch.zeros(()), atol=1e-6):
        raise IntegrityError(f"{coming.where}: words of answers have moved. Take the base that it was made on.")
    eps = {n: facts.get(f"opt_projection_{n}", 0.1) for n in ("epsilon", "format_epsilon")}
    bounds = limits(CPT(**settings, **eps), rows.shape[1])
    if bool((apart.norm(dim=1) > bounds * (1 + NEAR) + 1e-6).any()):
        raise IntegrityError(f"{coming.where}: vectors lie further from their words than their bounds let them.")
    return PeftTaken(settings, {"prompt.offset": apart[kinds != 0]})


@METHODS.register("cpt", family="additive", paper="arXiv:2410.17222")
@dataclass(frozen=True, kw_only=True)
class CPT(Method):
    """Settings of CPT. Give `examples` in a run; `words` and `types` say the same in ids."""

    examples: Annotated[tuple[tuple[str, str], ...], "pairs of a text and its answer, the context"] = ()
    before_text: Annotated[str, "what stands before each text of the context"] = ""
    before_answer: Annotated[str, "what stands between a text and its answer"] = "\n"
    behind: Annotated[str, "what stands behind each example"] = "\n\n"
    words: Annotated[tuple[int, ...], "token ids of the context; made of `examples` by a run"] = ()
    types: Annotated[tuple[int, ...], "of each: 1, 3 around a text, 2 text, 4 answer; 4 more an example"] = ()
    epsilon: Annotated[float, "how far words of a text may move, at width 2048", at_least(0)] = 0.1
    format_epsilon: Annotated[float, "how far words around a text may move, at width 2048", at_least(0)] = 0.1
    context: Annotated[float, "times which the context's answers are learnt too; 0: not", at_least(0)] = 1.0
    decay: Annotated[float, "weight of an example's answer over that of the one behind it", at_least(0)] = 1.0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    start_is_drawn: ClassVar[bool] = False
    tiny: ClassVar[dict[str, Any]] = {
        "words": (5, 9, 17, 30, 6, 11, 23, 31), "types": (1, 2, 3, 4, 5, 6, 7, 8), "epsilon": 20.0,
        "format_epsilon": 20.0, "lr": 5e-2,
    }  # fmt: skip
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "CPT",
        settings={
            "opt_projection_epsilon": "epsilon",
            "opt_projection_format_epsilon": "format_epsilon",
            "opt_loss_decay_factor": "decay",
        },
        out=out,
        back=back,
        prefix="base_model.",
        also=(*COUNTS, "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type"),
        ignored=("tokenizer_name_or_path",),
    )

    def __post_init__(self) -> None:
        if len(self.words) != len(self.types):
            raise ConfigError(f"cpt.types: {len(self.types)} for {len(self.words)} words. Give each word one.")
        if any(kind < 1 for kind in self.types):
            raise ConfigError(f"cpt.types: {min(self.types)}. They count from 1: 1 to 4 for the first example.")

    def completed(self, tokenizer: Any, *, pair: bool) -> Self:
        if self.words or not self.examples:
            return self
        words, types = list[int](), list[int]()
        for number, (text, answer) in enumerate(self.examples):
            pieces = (1, self.before_text), (2, text), (3, self.before_answer), (4, answer), (3, self.behind)
            for kind, piece in pieces:
                ids = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                words += ids
                types += [4 * number + kind] * len(ids)
        return replace(self, words=tuple(words), types=tuple(types))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if not self.words:
            raise ConfigError(
                "cpt.examples: there are none, and they are what it tunes. Give pairs of a text and its answer, as "
                'examples=[["Who wrote Moby Dick?", "HUM"]], or words and types as ids.'
            )
        if anatomy.vocab_size is None:
            raise ConfigError(f"cpt.examples: this {anatomy.model_type} model reads no words. Use prompt_tuning.")
        yield PrependTokens(Context(self, prompt_width(anatomy, "cpt")), len(self.words))

    def n_params(self, anatomy: Anatomy) -> int:
        return len(moving(self)) * prompt_width(anatomy, "cpt")

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        for context in own_modules(self, tuned, Context):
            context.cut()

    def loss(self, tuned: TunedView, forward: Objective) -> Any:
        prompts = own_modules(self, tuned, Context)
        learnt = tuned.anatomy.is_decoder and self.context > 0 and bool(prompts) and prompts[0].training
        head = tuned.model.get_output_embeddings() if learnt else None
        if head is None:
            return forward()
        (prompt,) = prompts
        prompt.listens = True
        try:
            result = forward()
        finally:
            prompt.listens, states, prompt.heard = False, prompt.heard, None
        if states is not None:
            each = prompt.answers_loss(states[:1], head, partial(finished_logits, tuned.model))
            result.loss = result.loss + self.context * len(states) * each
        return result


def limits(method: CPT, width: int) -> Tensor:
    """How long each word's offset may be: (P,); nothing for words of answers."""
    by_kind = (0.0, method.format_epsilon, method.epsilon, method.format_epsilon)
    return torch.tensor([by_kind[kind % 4] * math.sqrt(width / USUAL) for kind in method.types])


def moving(method: CPT) -> list[int]:
    """Which words move: all but those of answers."""
    return [i for i, kind in enumerate(method.types) if kind % 4]


def shortened(offset: Tensor, bounds: Tensor) -> Tensor:
    """Offsets (n, d), none longer than its bound (n,)."""
    lengths: Tensor = torch.linalg.vector_norm(offset, dim=1).clamp(min=1e-30)
    return offset * (bounds / lengths).clamp(max=1.0)[:, None]


def placed(method: CPT, embedded: Tensor, offset: Tensor) -> Tensor:
    """The vectors: (P, d), of the words' embeddings (P, d) and the offsets of those that move."""
    return embedded.index_add(0, torch.tensor(moving(method), device=offset.device), offset.to(embedded))


class Context(nn.Module):
    """The context's vectors. Called, it gives them: (P, d).

    offset: (words that move, d)    embedded: (P, d), what the model's own table gives
    """

    embedded: Tensor
    bounds: Tensor

    def __init__(self, method: CPT, width: int) -> None:
        super().__init__()
        self.method, self.listens = method, False
        self.heard: Tensor | None = None
        moves = moving(method)
        self.offset = nn.Parameter(torch.zeros(len(moves), width))
        self.register_buffer("embedded", torch.zeros(len(method.words), width), persistent=False)
        self.register_buffer("bounds", limits(method, width)[moves], persistent=False)

    @torch.no_grad()
    def start(self, embed: nn.Module) -> None:
        """Look the words up, through the layer: some models scale what they find.

        Raises:
            ConfigError: an id that the vocabulary does not have.
        """
        weight = embed.weight
        assert isinstance(weight, Tensor)
        outside = [i for i in self.method.words if not 0 <= i < weight.shape[0]]
        if outside:
            raise ConfigError(f"cpt.words: no token has the id {outside[0]}; the vocabulary has {weight.shape[0]}.")
        ids = torch.tensor(self.method.words, device=weight.device)
        found: Tensor = embed(ids)
        self.embedded = found.float()

    def within(self) -> Tensor:
        """The offsets, none longer than its bound."""
        return shortened(self.offset.detach(), self.bounds)

    @torch.no_grad()
    def cut(self) -> None:
        """Shorten what has grown too long."""
        self.offset.copy_(self.within())

    def forward(self) -> Tensor:
        # Within the bound in every pass, with the gradient of what is not cut, as peft has it.
        offset = self.offset + (self.within() - self.offset.detach())
        return placed(self.method, self.embedded, offset)

    def answers_loss(self, states: Tensor, head: nn.Module, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighed sum of the losses of the context's answers, from its last hidden states (1, P, d). ()."""
        types = torch.tensor(self.method.types)
        told = (types % 4 == 0) & (torch.arange(len(types)) > 0)
        examples = types[told]
        order = sorted(set(examples.tolist()), reverse=True)  # the last one first
        weights = torch.tensor([self.method.decay ** (1 + order.index(k)) for k in examples.tolist()])
        read = states[0, told.nonzero().flatten().to(states.device) - 1]  # each word is told by the one before it
        logits = finish(head(read.to(head.weight.dtype)).float())  # type: ignore[arg-type]
        wanted = torch.tensor(self.method.words)[told].to(logits.device)
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        summed: Tensor = (losses * weights.to(losses)).sum()
        return summed
