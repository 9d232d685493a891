"""Learning how to ask: several prompts of trained words, each with a deviation in every layer, and their mixture.

    v_i + Δ_i^0 at the embedding        h_i <- h_i + Δ_i^l behind layer l        i: a trained word; slots are let alone

    p(y|x) = Σ_t π_t p(y | t(x))        ρ_xt ∝ π_t p(y|t(x))        π_t ∝ Σ_x ρ_xt

The words stand where the template says {soft}: `--template '{soft:3} {text} {soft:2} {mask}.'`. Each entry of `prompts`
fills all of them, in order; prompts that are not named are drawn like the embeddings. All share the template's places,
so they are of one length; the paper's may differ in both. Δ starts at zero and learns from -log p(y|x), whose gradient
weighs each prompt by its ρ; π is no trained number, and is set anew from the ρ so far `updates` times in a run, where
the paper does so after every epoch.

Qin & Eisner 2021, "Learning How to Ask: Querying LMs with Mixtures of Soft Prompts", arXiv:2104.06599, section 3.

Count: T (L + 1) n d, for T prompts of n words; T n d without `deep`.
Claims: prompts of trained words find facts that written ones miss, wherever they start.
Cost: a pass for each prompt, in training and in answers.
Use it when: the model was trained to fill gaps, is frozen, and there are few rows and several ideas how to ask.
Not when: answers must be fast, or are longer than a word: every label is one.
Pitfalls: probabilities are mixed, not logits. A checkpoint without a layer that scores words, as sentence encoders have
none (sample:minilm-l6), is refused. The tuned model called by hand, without a run's scores, answers by the first prompt
alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, ModelError, at_least
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.soft_words import soft_site
from luthier.surgery import METHODS, Attach, Attachment, Base, Edit, Mixing, TunedView, TuningView


@METHODS.register("soft_prompt_mixture", family="additive", paper="arXiv:2104.06599")
@dataclass(frozen=True, kw_only=True)
class SoftPromptMixture(Mixing):
    """Settings of a mixture of prompts. A run's template and tokenizer decide the last three."""

    prompts: Annotated[tuple[str, ...], "the words that fill {soft} in each prompt; what is left is drawn"] = ()
    mixture: Annotated[int, "prompts in all", at_least(1)] = 4
    deep: Annotated[bool, "also deviations behind every layer"] = True
    l2: Annotated[float, "times the squares of all deviations, added to the loss", at_least(0)] = 0.0
    updates: Annotated[int, "how often in a run the shares of the prompts are set anew; 0, never", at_least(0)] = 10
    length: Annotated[int, "words of each; left out, as many as the template has {soft}", at_least(0)] = 0
    ids: Annotated[tuple[tuple[int, ...], ...], "ids of the words; left out, what the tokenizer makes of them"] = ()
    first: Annotated[int | None, "id of the first trained word; left out, just behind the vocabulary", at_least(0)] = (
        None
    )

    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    soft_words: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"mixture": 1, "length": 128, "first": 3, "lr": 0.02}

    def __post_init__(self) -> None:
        if max(len(self.prompts), len(self.ids)) > self.mixture:
            object.__setattr__(self, "mixture", max(len(self.prompts), len(self.ids)))

    def completed(self, tokenizer: Any, *, pair: bool) -> Self:
        if self.ids or not self.prompts:
            return self
        made = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.prompts)
        return replace(self, ids=tuple(tuple(int(i) for i in ids) for ids in made))

    def for_template(self, words: Sequence[int], n_soft: int, first: int) -> Self:
        for text, ids in zip(self.prompts or ("",) * len(self.ids), self.ids, strict=False):
            if len(ids) != n_soft:
                raise ConfigError(
                    f"soft_prompt_mixture.prompts: {text!r} is {len(ids)} tokens, and the template has {n_soft} words "
                    "{soft}. Give every prompt as many."
                )
        return replace(self, length=n_soft, first=first)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if not self.length:
            raise ConfigError(
                "soft_prompt_mixture: there is no word to train. Mark some in a template: --template '{soft:3} {text} "
                "{soft:2} {mask}.' --words 'LABEL=WORD, ...'."
            )
        site = soft_site(anatomy, "soft_prompt_mixture")
        first = site.d_in if self.first is None else self.first
        words = SoftWords()
        yield Attach(site, lambda base: Prompts(base, self, first, words))
        for block in self._blocks(anatomy):
            yield Attach(block, lambda base: Deviations(self, base.site.d_out, words))

    def n_params(self, anatomy: Anatomy) -> int:
        sites = (soft_site(anatomy, "soft_prompt_mixture"), *self._blocks(anatomy))
        return self.mixture * self.length * sum(site.d_out for site in sites)

    def n_stored(self, anatomy: Anatomy) -> int:
        words = self.mixture * self.length * soft_site(anatomy, "soft_prompt_mixture").d_out
        return self.n_params(anatomy) + words + 2 * self.mixture

    def _blocks(self, anatomy: Anatomy) -> tuple[Site, ...]:
        stack = soft_site(anatomy, "soft_prompt_mixture").stack
        blocks = anatomy.sites("block_out", asked_by="soft_prompt_mixture") if self.deep else ()
        return tuple(s for s in blocks if stack in ("", s.stack))

    def passes(self, tuning: TuningView) -> int:
        return self.mixture

    def turn(self, tuning: TuningView, number: int) -> None:
        _prompts_of(tuning).now = number

    def mixed(self, tuning: TuningView, scores: Tensor) -> Tensor:
        """log p(y|x) of the mixture. (T, rows, labels) -> (rows, labels)."""
        return _prompts_of(tuning).mixed(scores)

    def loss(self, tuned: TunedView, forward: Callable[[], Any]) -> Any:
        result = forward()
        for prompts in _own_prompts(self, tuned):
            if prompts.joint is not None and result.labels is not None:
                prompts.pending = prompts.pending + responsibilities(prompts.joint, result.labels).sum(1)
                prompts.joint = None
        return result

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        if not self.l2:
            return None
        held = [m.deltas for m in own_modules(self, tuned, Prompts)]
        held += [m.deltas for m in own_modules(self, tuned, Deviations)]
        return self.l2 * torch.stack([d.square().sum() for d in held]).sum()

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        for prompts in _own_prompts(self, tuned):
            prompts.pending = torch.zeros_like(prompts.shares)  # of a step that is made again

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        every = max(1, total // self.updates) if self.updates else 0
        for prompts in _own_prompts(self, tuned):
            prompts.sums += prompts.pending
            if every and step % every == 0 and float(prompts.sums.sum()) > 0:
                prompts.shares.copy_(prompts.sums / prompts.sums.sum())
                prompts.sums.zero_()


def _own_prompts(method: SoftPromptMixture, tuned: TunedView) -> list["Prompts"]:
    """Its prompts, whether they learn or only answer."""
    return [_prompts_of(t) for t in tuned.tunings.values() if t.active and t.made_by(method)]


def _prompts_of(tuning: TuningView) -> "Prompts":
    (prompts,) = (m for m in tuning.modules_by_key().values() if isinstance(m, Prompts))
    return prompts


def responsibilities(joint: Tensor, labels: Tensor) -> Tensor:
    """ρ: how much each prompt accounts for each row's label. joint: (T, rows, labels) -> (T, rows)."""
    of_label = joint[:, torch.arange(len(labels), device=labels.device), labels]
    return torch.softmax(of_label, 0)


class SoftWords:
    """Under which key one tuning's prompts tell its deviations where their words stand: others may be in the batch."""


class Prompts(Attachment):
    """All prompts' words and deviations, at the word embedding, and the shares of the prompts.

    words: (T, n, d) frozen        deltas: (T, n, d)        shares, sums: (T,), π and the ρ summed since it was set
    """

    kind = "sequential"
    per_token = False
    words: Tensor
    shares: Tensor
    sums: Tensor

    def __init__(self, base: Base, settings: SoftPromptMixture, first: int, where: SoftWords) -> None:
        super().__init__()
        t, n, d = settings.mixture, settings.length, base.site.d_out
        self.where = where
        self.first, self.now, self.length = first, 0, n
        self.deltas = nn.Parameter(torch.zeros(t, n, d))
        self.register_buffer("words", torch.randn(t, n, d))
        self.register_buffer("shares", torch.full((t,), 1 / t))
        self.register_buffer("sums", torch.zeros(t))
        self.pending = torch.zeros(t)
        self.joint: Tensor | None = None
        if self.words.device.type != "meta":
            with torch.no_grad():
                self._fill(base, settings)

    def _fill(self, base: Base, settings: SoftPromptMixture) -> None:
        device = base.whole_weight().device
        some = torch.randperm(base.site.d_in)[:2000].to(device)  # of the vocabulary, whose spread is drawn from
        looked_up = base.module(some).float()
        self.words.mul_(looked_up.std(0).to(self.words)).add_(looked_up.mean(0).to(self.words))
        for number, ids in enumerate(settings.ids):
            self.words[number] = base.module(torch.tensor(ids, device=device)).to(self.words)

    def before(self, x: Any) -> Any:
        """x: (rows, T) ids."""
        return torch.where(x >= self.first, 0, x)

    def after(self, x: Any, y: Tensor) -> Tensor:
        """x: (rows, T) ids, as they came. y: (rows, T, d)."""
        number = torch.where(x >= self.first, (x - self.first).clamp(max=self.length - 1), -1)
        self.context.memory[self.where] = number, self.now
        chosen = (self.words + self.deltas)[self.now][number.clamp(min=0)].to(y.dtype)
        return torch.where((number >= 0)[..., None], chosen, y)

    def mixed(self, scores: Tensor) -> Tensor:
        """log Σ_t π_t p_t of what each prompt gives. (T, rows, labels) -> (rows, labels)."""
        shares = self.shares.log()[:, None, None].to(scores.device, torch.float32)
        joint = torch.log_softmax(scores.float(), -1) + shares
        self.joint = joint.detach()
        return torch.logsumexp(joint, 0)


class Deviations(Attachment):
    """Δ^l of all prompts, behind a block."""

    kind = "sequential"
    needs_input = False
    per_token = False
    may_rest = True  # behind the last block an encoder reads the gap alone

    def __init__(self, settings: SoftPromptMixture, d: int, where: SoftWords) -> None:
        super().__init__()
        self.where = where
        self.deltas = nn.Parameter(torch.zeros(settings.mixture, settings.length, d))

    def after(self, x: Any, y: Tensor) -> Tensor:
        found = self.context.memory.get(self.where)
        if found is None:
            raise ModelError("soft_prompt_mixture: its words are found by their ids. Give the text as input_ids.")
        number, now = found
        around = self.context.around
        number = number if around is None else around.filled(number, -1)
        added = self.deltas[now][number.clamp(min=0)].to(y.dtype)
        return torch.where((number >= 0)[..., None], y + added, y)
