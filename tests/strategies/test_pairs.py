"""Strategies beside one another, with methods of several kinds, stopped and resumed: the same bits as the whole run."""

import pytest
import torch
from in_memory import Runs, same

from luthier.core import CompositionError

torch.set_num_threads(1)
PAIRS = [
    ("freelb+llrd", "lora"),
    ("class_weights+focal+label_smoothing", "full"),
    ("ema+l2_sp", "lora"),
    ("r_drop+gradual_unfreeze", "bitfit"),
    ("self_ensemble+stlr", "prefix_tuning"),
    ("lisa+clr", "full"),
    ("recadam+llrd", "full"),
    ("mixout+ema", "lora"),
    ("smart+adaptive_freeze", "lora"),
    ("dft+ema+llrd+stlr", "ia3"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(("names", "method"), PAIRS)
def test_strategies_beside_one_another_resume_to_the_bit(names, method, runs):
    given = {"steps": 4}
    assert same(runs.resumed(2, names, method, **given), runs.after(names, method, **given))


def test_two_owners_of_a_moment_are_refused(runs):
    for names, moment in (("freelb+mixout", "passes"), ("stlr+clr", "rate")):
        with pytest.raises(CompositionError, match=f"each would own the moment '{moment}'"):
            runs.loop(names)
