"""LP-FT: first the head alone on frozen features, then everything from that head.

    phase 1: head trains, theta = theta_0          phase 2: head and theta train, from where phase 1 ended

Nothing below the head has changed when the second phase begins. It begins with empty moments and a schedule of its own.

Kumar, Raghunathan, Jones, Ma, Liang 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", arXiv:2202.10054, section 3. The run's rate is that of the second phase; how long the first lasts
and how fast it learns are ours.

Count: all parameters of the model, tied ones once, a new task head apart.
Claims: features are distorted less, so it does better than full fine-tuning on rows unlike those of training.
Cost: a step of full fine-tuning in the second phase, far less in the first; moments are there from the first step.
Use it when: the text in use will be unlike the rows at hand.
Not when: the model has no new head: a language model has nothing to probe.
Pitfalls: a first phase that stops early leaves a head that distorts features after all; moments of the first phase in
the second; dropout of the trunk stays on in both, while a probe of fixed features would have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above, between
from luthier.methods.parts.frozen_below import no_new_head
from luthier.methods.parts.in_place import TrainsInPlace
from luthier.methods.parts.update_masks import maskable
from luthier.surgery import METHODS, Phase, TunedView, is_head


@METHODS.register("lp_ft", family="partial", paper="arXiv:2202.10054")
@dataclass(frozen=True, kw_only=True)
class LPFT(TrainsInPlace):
    """Settings of probing first."""

    probe: Annotated[float, "share of the run in which the head alone learns", between(0, 1)] = 0.5
    probe_rate: Annotated[float, "learning rate of that part, as a multiple of the run's", above(0)] = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.probe < 1:
            what = "full" if self.probe == 0 else "head_only"
            raise ConfigError(f"lp_ft.probe: {self.probe:g} leaves one phase, which is {what}. Set it between 0 and 1.")

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        if not anatomy.head_tensors:
            raise no_new_head(anatomy, "lp_ft", "there is nothing to probe with")
        return maskable(anatomy, "all")

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        probe = Phase(self.probe, trains=is_head, rate=self.probe_rate)
        return probe, Phase(1 - self.probe)
