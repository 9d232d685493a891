"""Where an update that never sees the whole gradient (LOMO, MeZO) is not what it would be after it: refused here."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core import ConfigError
from luthier.data.batches import Batches
from luthier.runs.spec import RunSpec
from luthier.surgery import Method, Tuned
from luthier.training.optimiser import Lomo, Optimiser
from luthier.training.strategy import Strategy, fills
from luthier.training.whole_steps import why_cut

__all__ = ["refuse_inexact", "refuse_optimisers"]

_WANTS = {
    "after_backward": "looks at the gradients of the whole step before the update",
    "on_step": "looks at the gradients of the whole step after the update",
    "extra_loss": "adds a penalty with a backward pass of its own",
    "phases": "lets only some of what trains learn at a time",
    "prepare": "looks at gradients of the data before the first step",
}

_WHOLE_GRADIENT = ("gradient", "passes", "penalty", "after_backward", "trains", "numbers")
"""Moments of a strategy that need a gradient which is still there after the backward pass, or several passes."""


def refuse_inexact(
    spec: RunSpec, tuned: Tuned, batches: Batches, strategies: Sequence[Strategy], optimiser: Optimiser
) -> None:
    """Every reason at once why steps would come out otherwise than by plain gradient descent.

    Raises:
        ConfigError: a step of several backward passes; a method that wants to see all gradients of a step.
    """
    wrong = []
    owner = next((one.name for one in strategies if fills(one, "optimiser")), None)
    who = owner or f"optim.name = {spec.optim.name}"
    instead = f"Leave it or {owner} out." if owner else "Use optim.name = sgd or adamw with it."
    if isinstance(optimiser, Lomo) and (reason := why_cut(spec, batches)):
        wrong.append(f"a gradient that is dropped at once cannot be summed over micro-batches: {reason}")
    for tuning in tuned.tunings.values():
        for part in tuning.method.parts():
            for name, why in _WANTS.items():
                # LoRA looks for some of its starts alone.
                asleep = name in part.idle or (name == "prepare" and not part.looks_at_data)
                if getattr(type(part), name) is not getattr(Method, name) and not asleep:
                    wrong.append(f"{part.name} {why}. {instead}")
    for one in strategies:
        fits = [m for m in _WHOLE_GRADIENT if fills(one, m)]
        if fits and not fills(one, "optimiser"):  # one that has both made them for each other
            wrong.append(f"strategy {one.name} fills {', '.join(fits)}. {instead}")
    if wrong:
        how = "updates inside the backward pass" if isinstance(optimiser, Lomo) else "makes no backward pass"
        raise ConfigError(f"{who} {how}: " + "\n".join(wrong))


def refuse_optimisers(strategies: Sequence[Strategy], spec: RunSpec) -> None:
    """A strategy that moves the numbers itself beside another word on how: refused before anything is read.

    Raises:
        ConfigError: an optimiser is named too; no rate; gradients that are to be scaled or compared.
    """
    for one in strategies:
        if not fills(one, "optimiser"):
            continue
        if spec.optim.name != "adamw":
            raise ConfigError(
                f"optim.name is {spec.optim.name}, and strategy {one.name} moves the numbers itself. Leave one out."
            )
        if spec.optim.lr is None and one.rated:
            raise ConfigError(
                f"optim.lr: strategy {one.name} is no AdamW, for which the methods' own rates are made. Give a rate: "
                "--lr (`luthier strategies " + one.name + "` says which are usual)."
            )
        if spec.precision == "fp16" or spec.recheck:
            field = "precision fp16" if spec.precision == "fp16" else f"recheck = {spec.recheck}"
            raise ConfigError(
                f"{field} needs all gradients of a step at once, and strategy {one.name} never holds them. Use "
                f"{'bf16 or fp32' if spec.precision == 'fp16' else 'recheck = 0'}."
            )
