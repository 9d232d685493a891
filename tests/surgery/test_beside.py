"""A method may ask for the frozen layers beside its own, of the same block."""

import pytest
import torch
from tiny import tiny

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError
from luthier.surgery import Attach, Attachment, Base, attach
from luthier.surgery.method import Method


class Asks(Method):
    """Attaches nothing that acts, and keeps the layers it was given."""

    name = "asks"

    def __init__(self, kind, part=""):
        self.kind, self.part, self.found = kind, part, {}

    def edits(self, anatomy: Anatomy):
        for site in anatomy.sites("ffn_out"):
            yield Attach(site, lambda base, site=site: self._keep(site, base))

    def _keep(self, site: Site, base: Base) -> Attachment:
        self.found[site.key] = base.beside(self.kind, self.part)
        return Attachment()

    def n_params(self, anatomy: Anatomy) -> int:
        return 0

    def settings(self):
        return {}


def test_the_layer_beside_is_of_the_same_block_and_stack():
    method = Asks("norm", "1")
    model = tiny("t5")
    attach(model, method)
    paths = {key: base.site.key for key, base in method.found.items()}
    assert paths["ffn_out@encoder.1"] == "norm@encoder.1.1"
    assert paths["ffn_out@decoder.1"] == "norm@decoder.1.1"


def test_it_runs_in_its_own_type_and_answers_in_that_of_its_input():
    method, model = Asks("norm", "1"), tiny("bert").to(torch.bfloat16)
    attach(model, method)
    x = torch.randn(2, 3, 48, requires_grad=True)
    y = method.found["ffn_out@0"].run(x)
    assert y.dtype == torch.float32
    norm = model.bert.encoder.layer[0].output.LayerNorm
    assert torch.equal(y, norm(x.to(torch.bfloat16)).float())
    y.sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


def test_a_layer_that_the_block_lacks_is_refused_with_those_that_it_has():
    with pytest.raises(AnatomyError, match=r"ffn_out@0: its block has no 'cross\.q'. It has attn\.q@0"):
        attach(tiny("bert"), Asks("cross.q"))
