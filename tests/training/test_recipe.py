"""The specs that a recipe's phases are made of."""

from typing import Any

from luthier.runs.spec import RunSpec
from luthier.training.recipe import Plan


def plan_of(**fields: Any) -> Plan:
    whole: dict[str, Any] = {"model": "m", "data": {"source": "d"}, "method": "lora", "strategy": "ewc", **fields}
    spec = RunSpec.from_plain(whole)
    return Plan(recipe=None, spec=spec, of_strategies={"ewc": {"a": 1}, "pace": {"b": 2}}, of_method={"rank": 3})  # type: ignore[arg-type]


def test_the_settings_of_a_method_go_to_the_phases_that_train_it_and_to_no_other() -> None:
    plan = plan_of()
    assert plan.phase([]).settings == {"rank": 3} and plan.phase([], method="lora").settings == {"rank": 3}
    other = plan.phase([], method="full")
    assert other.settings == {} and (other.method, other.strategy) == ("full", None)


def test_a_phase_takes_its_own_strategies_settings_and_the_task_those_that_were_named_beside() -> None:
    plan = plan_of()
    assert plan.phase(["pace", "pace"]).settings == {"rank": 3, "pace.b": 2}
    task = plan.task(["pace"])
    assert task.strategy == "pace+ewc" and task.settings == {"rank": 3, "pace.b": 2, "ewc.a": 1}
