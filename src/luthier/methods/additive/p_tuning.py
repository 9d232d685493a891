"""P-tuning: vectors on both sides of the text, which a small network computes from embeddings of their own.

    [h_1 .. h_i ; E(x) ; h_{i+1} .. h_P]          h = MLP([forward LSTM(e) ; backward LSTM(e)])          e: (P, d)

The LSTM has two layers and lets every vector know of every other one. After training the network is evaluated once and
dropped: what is stored and served are the P vectors. encoder="mlp" leaves the LSTM out, tune_lm=true trains the model
too. `behind` vectors stand behind the text; in a decoder nothing that is read would see them: all stand before it.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 3; the network in the form of the authors' code for
knowledge probing (hidden width d / 2 in each direction) and, as "mlp", of that for few examples.

Count: P d + 8 h (d + 4 h + 4) + (2 h d + d) + d^2 + d in training, h = d / 2; for mlp P d + 2 (d^2 + d). Stored: P d.
Claims: the authors report that a network in front of the vectors makes them easier to train than free ones.
Measured: `python -m experiments.rates p_tuning`, 300 questions of trec6 that the table does not score: 0.71, and 0.61
with `optim.head_lr=3e-3`. A new head learns at the rate of `head_only`. With all rows (`luthier train sample:minilm-l6
--data sample:trec6 --method p_tuning --lr 3e-3`) 0.744 of 1,076 held-out ones, one seed, where head_only reaches 0.572;
at a rate of 1e-3 0.723.
Cost: prompt tuning's, every row grows by P tokens, and one LSTM over P vectors a pass, not a row.
Use it when: a frozen model is to be steered by few vectors and free ones do not learn.
Not when: the model itself may train: full costs less then, and tune_lm=true is what the paper did on SuperGLUE.
Pitfalls: the paper's numbers for SuperGLUE are not those of a frozen model; the network in the served file is waste;
the paper's prompts stand around a [MASK] that is answered in words: with a new head they stand around the text alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError, above, at_least
from luthier.methods.parts.in_place import TrainsInPlace
from luthier.methods.parts.own_tensors import group_names, own_modules, own_unfrozen
from luthier.methods.parts.peft_prompts import prompt_form
from luthier.methods.parts.prompt import prompt_width
from luthier.methods.parts.update_masks import maskable, sizes_of
from luthier.surgery import METHODS, Edit, Group, Method, PeftForm, PrependTokens, TunedView, Unfreeze


@METHODS.register("p_tuning", family="additive", paper="arXiv:2103.10385")
@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Settings of P-tuning."""

    length: Annotated[int, "vectors in all", at_least(1)] = 9
    behind: Annotated[
        int | None, "how many of them stand behind the text; left out, half, in a decoder none", at_least(0)
    ] = None
    encoder: Annotated[Literal["lstm", "mlp"], "what computes them: LSTM and two layers, or the two layers alone"] = (
        "lstm"
    )

    tune_lm: Annotated[bool, "the model itself trains too, at `lm_rate` times the learning rate"] = False
    lm_rate: Annotated[float, "of the model, as a share of the vectors' rate", above(0)] = 0.02

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-3
    default_head_lr: ClassVar[float | None] = 3e-2
    tiny: ClassVar[dict[str, int]] = {"length": 3}
    peft: ClassVar[PeftForm | None] = prompt_form(
        "P_TUNING",
        lambda facts: {"behind": 0, "encoder": str(facts.get("encoder_reparameterization_type", "MLP")).lower()},
        lambda going: going.method._not_in_peft(going.anatomy),
        said={"encoder_reparameterization_type": "MLP"},
        ignored=("encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "trains_base", self.tune_lm)
        if (self.behind or 0) > self.length:
            raise ConfigError(f"p_tuning.behind: {self.behind} of {self.length} vectors. Set at most {self.length}.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        width = prompt_width(anatomy, "p_tuning")
        if anatomy.is_decoder and self.behind:
            raise AnatomyError(
                f"p_tuning.behind: {self.behind} vectors behind the text of a decoder are read by nothing. Leave it "
                "out."
            )
        yield PrependTokens(EncodedPrompt(self.length, self._behind(anatomy), width, self.encoder), self.length)
        yield from (Unfreeze(name) for name in self._of_model(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        d = prompt_width(anatomy, "p_tuning")
        h = d // 2
        lstm = 2 * 4 * (h * d + h * h + 2 * h) + 2 * 4 * (2 * h * h + h * h + 2 * h)
        entry = 2 * h if self.encoder == "lstm" else d
        lm = sum(sizes_of(anatomy, self._of_model(anatomy)))
        return lm + self.length * d + (lstm if self.encoder == "lstm" else 0) + (entry * d + d) + (d * d + d)

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.length * prompt_width(anatomy, "p_tuning") + sum(sizes_of(anatomy, self._of_model(anatomy)))

    def groups(self, tuned: TunedView) -> list[Group]:
        held = [u.parameter for u in own_unfrozen(self, tuned)]
        return [Group(group_names(tuned, held), lr_factor=self.lm_rate)] if held else []

    def conflicts(self, other: Method) -> str | None:
        if self.tune_lm and isinstance(other, TrainsInPlace):
            return f"tune_lm trains all that {other.name} would. Leave it out."
        return None

    def _behind(self, anatomy: Anatomy) -> int:
        return 0 if anatomy.is_decoder else self.length // 2 if self.behind is None else self.behind

    def _not_in_peft(self, anatomy: Anatomy) -> str | None:
        if self._behind(anatomy):
            return f"{self._behind(anatomy)} vectors stand behind the text, where peft has none. Train with behind=0."
        if self.tune_lm:
            return "peft's file holds the vectors, and tune_lm trained the model too. Export the merged model."
        return None

    def _of_model(self, anatomy: Anatomy) -> tuple[str, ...]:
        return maskable(anatomy, "all") if self.tune_lm else ()

    def finish(self, tuned: TunedView) -> None:
        for prompt in own_modules(self, tuned, EncodedPrompt):
            prompt.settle(prompt())


class EncodedPrompt(nn.Module):
    """The vectors and the network that computes them, or the vectors alone. Called, it gives them: (P, d)."""

    def __init__(self, length: int, behind: int, d: int, encoder: Literal["lstm", "mlp"]) -> None:
        super().__init__()
        self.length, self.behind = length, behind
        self.vectors = nn.Parameter(torch.randn(length, d))
        self.lstm = nn.LSTM(d, d // 2, num_layers=2, bidirectional=True) if encoder == "lstm" else None
        entry = 2 * (d // 2) if encoder == "lstm" else d
        self.mlp: nn.Sequential | None = nn.Sequential(nn.Linear(entry, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self) -> Tensor:
        if self.mlp is None:
            return self.vectors
        read = self.vectors if self.lstm is None else self.lstm(self.vectors)[0]  # (P, 2 h)
        made: Tensor = self.mlp(read)
        return made

    @torch.no_grad()
    def settle(self, vectors: Tensor) -> None:
        """Hold these vectors from now on, without a network."""
        like = self.vectors
        self.lstm = self.mlp = None
        self.vectors = nn.Parameter(vectors.to(like.device, like.dtype).clone(), like.requires_grad)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The vectors as the model reads them."""
        return {"vectors": self().detach()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take vectors; the network is dropped."""
        if set(tensors) != {"vectors"} or tensors["vectors"].shape != self.vectors.shape:
            raise KeyError(f"the prompt of {self.length} vectors is not what was stored: {sorted(tensors)}")
        self.settle(tensors["vectors"])
