"""No whole number of a method leaves it with nothing to train, without a word."""

from typing import get_args

import pytest
import torch
from little import little_spec
from tiny import tiny
from tiny_methods import settings, spelling

from luthier.anatomy import Anatomy
from luthier.core import LuthierError, NothingTrains, fields_of
from luthier.surgery import METHODS, method
from luthier.workflow import prepare
from luthier.workflow.preparation import refuse_empty

torch.set_num_threads(1)

ANY_NUMBER = {("intrinsic_said", "subspace")}
"""Settings that name a draw: a number below 0 is as good as another."""


def test_each_whole_number_of_0_or_below_is_refused_or_leaves_something_to_train() -> None:
    models = [Anatomy.read(tiny("bert", "classification")), Anatomy.read(tiny("llama", "lm"))]
    seen = 0
    for name in METHODS:
        if "+" in spelling(name) or METHODS.get(name).is_a("head_only"):
            continue
        for fact in fields_of(METHODS.get(name)):
            if fact.type is not int and int not in get_args(fact.type):
                continue
            for number in (0, -1):
                for anatomy in models:
                    try:
                        made = method(name, {**settings(name), fact.name: number})
                        refuse_empty(made, anatomy, "tiny")
                        attached = list(made.edits(anatomy))
                    except LuthierError:
                        continue
                    except (RuntimeError, TypeError):
                        attached = ["layers that need the model"]
                    seen += 1
                    where = (name, fact.name)
                    assert number == 0 or where in ANY_NUMBER or fact.limit is None, where
                    assert not attached or made.n_stored(anatomy) > 0, where
    assert seen > 40


@pytest.mark.parametrize("words", ["p_tuning_v2", "prefix_tuning", "lora+prefix_tuning"])
def test_a_prefix_of_no_rows_is_refused_though_a_new_head_trains(words, tmp_path):
    with pytest.raises(NothingTrains, match=r"_tuning(_v2)? trains no number of .* with length=0.*Raise it, or choose"):
        prepare(little_spec(tmp_path, words, settings={"length": 0, "mlp_width": 7}))


def test_the_head_alone_is_no_method_of_nothing(tmp_path):
    assert prepare(little_spec(tmp_path, "head_only")).n_params == 0
