"""Whether strategies fit the task and the rows of a run: refused, with the reason, before a weight is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from luthier.core import CompositionError, ConfigError
from luthier.data.tasks import Task
from luthier.training.strategy import Strategy, fills

__all__ = ["refuse_sets", "refuse_task", "task_of"]


def refuse_task(strategies: Iterable[Strategy], task: Task) -> None:
    """Refuse strategies that cannot learn a task.

    Raises:
        ConfigError: names strategy and task, with the reason.
    """
    for one in strategies:
        reason = _of_another_task(one, task) or one.suits(task)
        if reason:
            raise ConfigError(f"strategy {one.name} cannot learn the task {task.name}: {reason}")


def task_of(strategies: Iterable[Strategy], asked: str) -> str:
    """The task that a spec asks for, or that a strategy learns where the spec leaves it open.

    Raises:
        CompositionError: two strategies learn different tasks.
    """
    named = {one.learns: one.name for one in strategies if one.learns}
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise CompositionError(
            f"{first} and {second} cannot stand together: they learn from different kinds of rows. Choose one of them."
        )
    return next(iter(named)) if named and asked == "auto" else asked


def _of_another_task(one: Strategy, task: Task) -> str | None:
    """Why a strategy and a task do not belong together, from what the strategy says of itself."""
    if one.learns and one.learns != task.name:
        return f"it learns {one.learns} alone. Leave --task out, or choose another strategy."
    if task.weighs and not one.learns:
        looks = [*one.reads, *(moment for moment in ("weigh", "loss", "order") if fills(one, moment))]
        if looks or one.roles:
            family = "rollouts" if task.name == "prompts" else "preference"
            return (
                f"it changes how texts or labels are learnt, and here whole answers are weighed. Use one of {family}."
            )
    return None


def refuse_sets(strategies: Iterable[Strategy], names: Collection[str]) -> None:
    """Refuse rows that nobody reads, and strategies whose rows are not there.

    Args:
        names: of the further sets that the spec names.

    Raises:
        ConfigError: says what to add or to leave out.
    """
    read: set[str] = set()
    for one in strategies:
        for wanted in one.sets:
            found = set(names) if wanted == "*" else set(names) & {wanted}
            if not found:
                name = "NAME" if wanted == "*" else wanted
                raise ConfigError(f"strategy {one.name} needs further rows: --also {name}=FILE.")
            read |= found
    unread = [name for name in names if name not in read]
    if unread:
        raise ConfigError(
            f"also {unread[0]}: no strategy of this run reads such rows. Leave them out, or name a strategy that does "
            "(replay and ewc read rows called old; `luthier strategies NAME` says what one needs)."
        )
