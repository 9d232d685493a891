"""A method's course on a tiny model, step by step, with its phases."""

import torch
from cells import Trainer
from tiny import inputs, tiny
from torch import Tensor

from luthier.surgery import attach


class Course:
    """The loop's order of events around one batch; looks at what there is between steps."""

    def __init__(
        self, method: str, total: int, *, kind: str = "bert", task: str = "", decay: float = 0.01, **settings: object
    ) -> None:
        model = tiny(kind, task)
        self.tuned = attach(model, method, **settings)
        self.tuned.calls_hooks = True
        self.trainer = Trainer(self.tuned, model, inputs(model), total=total, lr=0.01, decay=decay)
        self.optimiser = self.trainer.optimiser
        model.luthier.train()

    def run(self, steps: int) -> None:
        """So many steps more."""
        for _ in range(steps):
            self.trainer.step()

    def begin(self) -> None:
        """Enter the phase of the next step, and make none."""
        entered = self.trainer.phases.enter(len(self.trainer.losses) + 1, self.trainer.total)
        assert entered is not None, "no phase begins here"
        if entered.fresh:
            self.optimiser.begin_anew()

    def values(self) -> dict[str, Tensor]:
        """What trains, as it is now."""
        return {n: p.detach().clone() for n, p in self.tuned.trained().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
