"""The guard of the first steps: what it asks for a gradient, and what it says of what got none."""

from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor

from luthier.core import NothingTrains
from luthier.surgery import attach
from luthier.training.guards import NoOpGuard


def asked(guard: NoOpGuard, alive: set[int], resting: tuple[str, ...] = ()) -> dict[str, Any]:
    def has_gradient(parameter: Tensor) -> bool:
        return id(parameter) in alive

    guard.after_backward(has_gradient, resting)
    guard.after_update()
    return guard.state()


@pytest.mark.parametrize("method", ["lora", "lora_fa", "ia3"])
def test_every_trained_place_is_asked_and_those_without_a_gradient_are_named(method: str) -> None:
    tuned = attach(tiny("bert", "classification"), method)
    guard, trained = NoOpGuard(tuned), tuned.trained()
    places = len(tuned.modules()) + len(tuned.tuning().unfrozen)
    state = asked(guard, {id(p) for p in trained.values()})
    assert len(state["live"]) == places and (state["steps"], state["moved"]) == (1, False)
    dead = NoOpGuard(tuned)
    assert asked(dead, set())["live"] == []
    attached = len(tuned.modules())  # the head's tensors are asked too, and not named
    with pytest.raises(NothingTrains, match=rf"^{attached} of {places} trained places got no gradient in 1 steps: "):
        dead.check()


def test_five_dead_places_are_named_and_the_others_counted() -> None:
    tuned = attach(tiny("bert"), "lora", train_head=False)
    names = list(tuned.modules())
    for n_dead, more in ((1, ""), (5, ""), (6, " and 1 more")):
        dead = names[:n_dead]
        guard = NoOpGuard(tuned)
        asked(guard, {id(p) for key, module in tuned.modules().items() if key not in dead for p in module.parameters()})
        with pytest.raises(NothingTrains) as stopped:
            guard.check()
        assert f"{n_dead} of {len(names)} trained places" in str(stopped.value)
        assert f": {', '.join(dead[:5])}{more}. They cannot learn" in str(stopped.value)


def test_what_rests_is_not_asked_and_one_moved_number_is_enough() -> None:
    tuned = attach(tiny("bert"), "lora", train_head=False)
    trained = tuned.trained()
    resting = next(iter(tuned.modules()))
    guard = NoOpGuard(tuned)
    with torch.no_grad():
        list(trained.values())[-1].view(-1)[0] += 1e-3
    rests = tuple(n for n in trained if n.startswith(f"{resting}."))
    state = asked(guard, {id(p) for n, p in trained.items() if n not in rests}, rests)
    assert state["moved"] and resting not in state["asked"]
    guard.check()
    again = NoOpGuard(tuned)
    again.load(state)
    assert again.state() == state


def test_one_number_that_moves_a_little_among_many_is_seen() -> None:
    tuned = attach(tiny("bert"), "full", train_head=False)
    widest = max(tuned.trained().values(), key=lambda p: p.numel())
    with torch.no_grad():
        widest.view(-1)[:] = 1.0
    guard = NoOpGuard(tuned)
    with torch.no_grad():
        widest.view(-1)[0] += 1e-6  # less than a float's last place in the sum of all of them
    assert asked(guard, set())["moved"]
