"""One configuration of autopeft: its own tests, beside those that every method passes."""

import numpy as np
import pytest
import torch
from methods.sizes import MODELS, anatomy_of
from tiny import tiny

from luthier.cli._front_space import front_space
from luthier.comparison.front import words_of
from luthier.core import ConfigError
from luthier.methods.hybrid.autopeft import AutoPEFT
from luthier.methods.parts.layer_plan import layers_named
from luthier.surgery import attach, method


def test_the_count_is_that_of_the_catalogue():
    made = AutoPEFT(layers="0-2+6-6+8-8+11-11", serial=48, parallel=96, prefix=12)
    assert made.n_params(anatomy_of("roberta")) == 1_437_696 + 10_080
    cls, config = MODELS["roberta"]
    with torch.device("meta"):
        space = front_space(cls(config))
    assert space.sizes == (0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768)
    assert space.choices() == (2**12 - 1) * (11**3 - 1)


@pytest.mark.acid("autopeft", 5)
def test_the_count_of_the_space_is_that_of_what_is_built():
    model = tiny("bert", num_hidden_layers=4)
    space, rng = front_space(model), np.random.default_rng(0)
    for _ in range(50):
        config = space.draw(rng)
        settings = space.settings(config)
        tuned = attach(model, "autopeft", **settings)
        head = sum(model.get_parameter(n).numel() for n in tuned.anatomy.head_tensors)
        built = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
        assert built == space.count(config) == method("autopeft", settings).n_params(tuned.anatomy)
        tuned.detach()


def test_words_of_layers_are_read_as_they_are_written():
    for numbers in ([0], [5], [0, 1, 2, 5], [1, 3, 4, 7, 8, 9]):
        assert layers_named(words_of(numbers), "autopeft.layers") == numbers


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": "3-1"}, "names no layers"),
        ({"layers": "some"}, "names no layers"),
        ({"serial": 0, "parallel": 0, "prefix": 0}, "nothing trains"),
    ],
)
def test_settings_that_name_nothing_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        AutoPEFT(**settings)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="names layer 12, and this model has 12, counted from 0"):
        AutoPEFT(layers="9-12").n_params(anatomy_of("roberta"))
