"""early_exit: a loss at every block, and rows that are answered before the last one."""

import pytest
import torch
from in_memory import Runs, alike
from little import little_model

from luthier.core import ConfigError
from luthier.runs.spec import BatchSpec
from luthier.training.exits import Exits, leave_early

torch.set_num_threads(1)
STEPS, WIDE = 50, BatchSpec(size=16, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("early_exit"))


@pytest.fixture(scope="module")
def learnt(runs):
    """A loop after some steps in evaluation mode, and a batch of its rows."""
    return of_rows(runs.after("early_exit", "full", "bert-dry", steps=STEPS, batch=WIDE))


def of_rows(loop):
    loop.tuned.model.eval()
    return loop, loop.feed.cut(0)[0]


def at_each(loop, batch):
    """The head's logits behind each block."""
    exits, states = Exits(loop.tuned), []
    with torch.no_grad(), exits.watched(states.append):
        whole = loop.tuned.model(**batch.inputs).logits
    return torch.stack([exits.logits(batch.inputs, x) for x in states]).detach(), whole


def unsure(logits):
    q = torch.softmax(logits, -1)
    return -(q * q.log()).sum(-1) / torch.tensor(float(q.shape[-1])).log()


@pytest.mark.acid("early_exit", 1)
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "pfeiffer_adapter", "full"])
def test_early_exit_who_never_leaves_has_the_logits_of_the_whole_model(runs, method):
    loop = runs.after("early_exit", method, "bert-dry", steps=2)
    loop.tuned.model.eval()
    batch = loop.feed.cut(0)[0]
    each, whole = at_each(loop, batch)
    torch.testing.assert_close(each[-1], whole)  # the head on the last block's states is the model
    assert not torch.allclose(each[0], whole, atol=1e-3)
    left = leave_early(loop.tuned, batch.inputs, 0.0)
    assert torch.equal(left.logits, whole) and left.run == left.of == 3 and left.layers.tolist() == [3] * len(whole)


@pytest.mark.acid("early_exit", 2)
def test_early_exit_the_mean_depth_falls_as_the_threshold_rises(learnt):
    loop, batch = learnt
    depths = [leave_early(loop.tuned, batch.inputs, t).layers.float().mean().item() for t in torch.linspace(0, 1.01, 9)]
    assert depths == sorted(depths, reverse=True) and depths[0] == 3.0 and depths[-1] == 1.0


@pytest.mark.acid("early_exit", 3, 4)
def test_early_exit_each_row_leaves_by_itself_and_layers_that_ran_are_counted(learnt):
    loop, batch = learnt
    each, _ = at_each(loop, batch)
    entropy = unsure(each)  # (layers, rows)
    threshold = float(entropy[0].median()) + 1e-6  # about half of the rows leave at once
    calls = []
    path = loop.tuned.anatomy.blocks[-1].path
    handle = loop.tuned.model.get_submodule(path).register_forward_hook(lambda *a: calls.append(1))
    left = leave_early(loop.tuned, batch.inputs, threshold)
    handle.remove()
    wanted = [next((n for n in range(2) if entropy[n, row] < threshold), 2) for row in range(entropy.shape[1])]
    assert left.layers.tolist() == [n + 1 for n in wanted] and 1 in left.layers
    torch.testing.assert_close(left.logits, torch.stack([each[n, row] for row, n in enumerate(wanted)]))
    assert left.run == max(wanted) + 1 and len(calls) == (left.run == 3)
    assert left.speed_up == 3 / left.run
    for row in range(len(wanted)):  # alone, it leaves where it leaves among others
        alone = leave_early(loop.tuned, {n: t[row : row + 1] for n, t in batch.inputs.items()}, threshold)
        assert alone.layers.tolist() == [wanted[row] + 1] and alone.run == wanted[row] + 1
    assert leave_early(loop.tuned, batch.inputs, 1.01).run == 1, "blocks that no row needs are not run"


def test_early_exit_the_loss_is_the_mean_weighted_by_depth(runs):
    loop = runs.after("early_exit", "full", "bert-dry", steps=2, values={"early_exit.weight": 0.75})
    loop.tuned.model.eval()
    ((one, course),) = [(s, c) for s, c in loop.moments._asked if s.name == "early_exit"]
    batch = loop.feed.cut(0)[0]
    each, _ = at_each(loop, batch)
    losses = [torch.nn.functional.cross_entropy(x, batch.labels, reduction="sum") for x in each]
    from luthier.training.course import Piece

    found = one.loss(course, Piece(batch=batch, index=0, n_targets=1), lambda: course.forward(batch)).loss
    mean = (losses[0] + 2 * losses[1] + 3 * losses[2]) / 6
    torch.testing.assert_close(found.detach(), 0.25 * losses[2] + 0.75 * mean)


def test_early_exit_of_a_model_of_one_block_is_the_plain_run(runs):
    model = str(little_model(runs.home / "one", "bert", num_hidden_layers=1))
    loops = [runs.loop(name, "full", "bert", steps=2, batch=WIDE, model=model) for name in ("early_exit", None)]
    for loop in loops:
        loop.run_to()
    assert alike(*loops, 1e-6)


def test_early_exit_low_blocks_answer_better_than_without(runs, learnt):
    plain = of_rows(runs.after(None, "full", "bert-dry", steps=STEPS, batch=WIDE))
    ours, theirs = (
        torch.nn.functional.cross_entropy(at_each(loop, batch)[0][0], batch.labels).item()
        for loop, batch in (learnt, plain)
    )
    assert ours < 0.7 * theirs, (ours, theirs)


def test_early_exit_models_whose_head_cannot_read_blocks_are_refused(runs):
    with pytest.raises(ConfigError, match="behind one last norm"):
        runs.loop("early_exit", kind="llama-labels").moments.start()
    with pytest.raises(ConfigError, match="its pooler is a part"):
        runs.loop("early_exit", kind="albert").moments.start()


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_early_exit_the_last_exit_is_the_model_in_other_encoders(runs, kind):
    loop, batch = of_rows(runs.loop("early_exit", "full", kind, batch=WIDE))
    each, whole = at_each(loop, batch)
    torch.testing.assert_close(each[-1], whole)
    assert torch.equal(leave_early(loop.tuned, batch.inputs, 0.0).logits, whole)
