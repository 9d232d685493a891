"""The acid tests of gradient surgery."""

import pytest
import torch
from in_memory import Runs

from luthier.core import CompositionError
from luthier.runs.spec import BatchSpec
from luthier.strategies.gradient.pcgrad import added, projected

torch.set_num_threads(1)


def freed(*gradients, seed=0):
    slopes = [{"a": torch.tensor(g[:1]), "b": torch.tensor(g[1:])} for g in gradients]
    found = projected(slopes, torch.Generator().manual_seed(seed))
    return [torch.cat([one["a"], one["b"]]) for one in found]


@pytest.mark.acid("pcgrad", 1)
@pytest.mark.parametrize("other", [(0.0, 2.0, 0.0), (3.0, 1.0, 0.0)])
def test_pcgrad_orthogonal_and_aligned_gradients_stay(other):
    one = (1.0, 0.0, 0.0)
    assert all(torch.equal(v, torch.tensor(g)) for v, g in zip(freed(one, other), (one, other), strict=True))


@pytest.mark.acid("pcgrad", 2)
def test_pcgrad_conflicting_gradients_end_without_a_part_along_the_other_as_it_was():
    one, other = (1.0, 0.5, 0.0), (-2.0, 0.1, 1.0)
    first, second = freed(one, other)
    assert abs(float(first @ torch.tensor(other))) < 1e-6 and abs(float(second @ torch.tensor(one))) < 1e-6
    assert first.norm() > 0 and not torch.equal(first, torch.tensor(one))


@pytest.mark.acid("pcgrad", 3, 4)
def test_pcgrad_one_set_alone_is_the_plain_gradient_and_the_draw_is_fixed_by_its_seed():
    assert torch.equal(freed((1.0, -2.0, 3.0))[0], torch.tensor([1.0, -2.0, 3.0]))
    three = [(1.0, 0.0, 0.2), (-1.0, 0.4, 0.0), (-0.5, -1.0, 0.1)]
    assert all(torch.equal(a, b) for a, b in zip(freed(*three), freed(*three), strict=True))


def test_pcgrad_gradients_are_added_up_and_heads_are_left_as_they_are():
    slopes = [{"head/w": torch.ones(2), "t": torch.ones(1)}, {"head/w": -2 * torch.ones(2), "t": -torch.ones(1)}]
    assert all("head/w" not in one for one in projected(slopes, torch.Generator()))
    assert torch.equal(added(slopes)["head/w"], -torch.ones(2))


def test_pcgrad_the_steps_gradient_is_made_of_the_sets_own(tmp_path):
    runs = Runs(tmp_path)
    loop = runs.loop("pcgrad", kind="bert-dry", batch=BatchSpec(size=8, tokens=30))
    loop.set_mode(training=True)
    loop.moments.before_step(0, 3, 0)
    (_, course), *_ = loop.moments._asked
    batches = loop.moments.batches(loop.feed.cut(0))
    numbers = [set(course.rows.numbers(b.rows).tolist()) for b in batches]
    assert all(len(n) == 1 for n in numbers) and len(batches) > 2 and set.union(*numbers) == {0, 1}
    slopes = []
    for number in (0, 1):
        mine = [b for b, n in zip(batches, numbers, strict=True) if n == {number}]
        loss = sum(course.forward(b).loss for b in mine) / sum(b.n_targets for b in mine)
        names = list(loop.optimiser.named)
        found = torch.autograd.grad(loss, [loop.optimiser.named[n] for n in names], allow_unused=True)
        slopes.append({n: g for n, g in zip(names, found, strict=True) if g is not None})
    wanted = added(projected(slopes, course.generator()))
    losses = loop._gradients(0, batches)
    assert len(losses) == len(batches)
    for name, slope in wanted.items():
        assert torch.allclose(loop.optimiser.named[name].grad, slope, atol=1e-6), name
    head = next(n for n in slopes[0] if n.startswith("head/"))
    assert torch.allclose(loop.optimiser.named[head].grad, slopes[0][head] + slopes[1][head], atol=1e-6)


def test_a_maker_of_gradients_and_a_maker_of_passes_are_refused_together(tmp_path):
    with pytest.raises(CompositionError, match="pcgrad and freelb cannot stand together: the first makes the whole"):
        Runs(tmp_path).loop("pcgrad+freelb", values={})
