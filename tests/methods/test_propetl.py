"""ProPETL: its own tests, beside those that every method passes."""

import json
import math

import pytest
import torch
from methods.checks import logits, stir, train
from safetensors import safe_open
from tiny import HIDDEN, LAYERS, inputs, tiny

from luthier.methods.parts.masks import pack, top_k, unpack
from luthier.methods.unified.propetl import Masked, ProPETL, Prototype, _Choose
from luthier.surgery import attach, load


def _tuned(name="bert", **settings):
    how = ProPETL(**{"width": 8, "rank": 4, **settings})
    return attach(tiny(name), how), how


def test_packing_and_unpacking_a_mask():
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(35 / 8)
    assert torch.equal(unpack(packed, mask.shape), mask)
    assert packed[0] == sum(int(b) << i for i, b in enumerate(mask.flatten()[:8]))


def test_top_k_is_exact_under_ties_and_takes_the_first():
    scores = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0])]
    for k in range(6):
        assert sum(int(m.sum()) for m in top_k(scores, k)) == k
    first, second = top_k(scores, 3)
    assert first.tolist() == [True, False, True]
    assert second.tolist() == [False, True]


@pytest.mark.acid("propetl", 3)
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 1.0])
def test_each_mask_has_exactly_its_density(density):
    tuned, _ = _tuned(density=density)
    with torch.no_grad():
        for module in tuned.modules(Masked).values():
            module.scores["up"].fill_(0.5)  # all tie
            for name in ("down", "up"):
                n = module.scores[name].numel()
                assert int(module.mask(name).sum()) == n - math.floor(round((1 - density) * n, 6))


@pytest.mark.acid("propetl", 5)
def test_the_choice_passes_gradients_to_dropped_entries_with_the_sign_of_their_scores():
    scores = torch.tensor([-0.9, -0.2, 0.5, 0.1], requires_grad=True)
    weight = torch.tensor([2.0, 3.0, 5.0, 7.0], requires_grad=True)
    upstream = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (weight * _Choose.apply(scores.abs(), 2) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream * torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(scores.grad, scores.detach().sign() * upstream * weight.detach())
    # The loss wants entry 1 in: a step down its gradient grows |S| although S is negative.
    assert (scores - 0.01 * scores.grad).abs()[1] > scores.abs()[1]


@pytest.mark.acid("propetl", 4)
def test_masks_of_two_layers_differ_as_independent_ones_do():
    tuned, _ = _tuned(width=40, density=0.3)
    modules = list(tuned.modules(Masked).values())
    one, two = (m.mask("down").bool() for m in modules[:2])
    share = float((one != two).float().mean())
    assert abs(share - 2 * 0.3 * 0.7) < 0.05


@pytest.mark.acid("propetl", 7)
@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_one_prototype_serves_all_layers_before_and_after_loading(form, tmp_path):
    tuned, _ = _tuned(form=form)
    train(tuned, 3)
    tuned.finish()
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    found = load(again, tmp_path / "tuning")
    for held in (tuned, found):
        prototypes = held.modules(Prototype)
        assert len(prototypes) == (1 if form == "adapter" else 2)
        pointers = {m.__dict__["prototype"].down.data_ptr() for m in held.modules(Masked).values()}
        assert pointers == {p.down.data_ptr() for p in prototypes.values()}
        names = [n for n in held.model.state_dict() if "prototype" in n]
        assert len(names) == 4, "an adapter's two matrices and biases, or two matrices each for attn.q and attn.v"
    assert torch.equal(logits(again), logits(tuned.model))
    assert not any("scores" in n for n in again.state_dict())


@pytest.mark.acid("propetl", 1)
@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_the_file_holds_the_prototype_and_one_bit_per_entry(form, tmp_path):
    tuned, how = _tuned(form=form)
    tuned.save(tmp_path / "tuning")
    path = tmp_path / "tuning" / "tuning.safetensors"
    prototype = sum(p.numel() for m in tuned.modules(Prototype).values() for p in m.parameters())
    masks = sum(math.ceil(s.numel() / 8) for m in tuned.modules(Masked).values() for s in m.scores.values())
    head = sum(p.numel() for n, p in tuned.trained().items() if n.startswith("head/"))
    payload = 4 * (prototype + head) + masks
    assert payload <= path.stat().st_size <= payload + 4096
    assert prototype + masks == how.n_stored(tuned.anatomy)
    with safe_open(path, "pt") as file:
        assert {str(file.get_tensor(n).dtype) for n in file.keys() if "@" in n} == {"torch.uint8"}  # noqa: SIM118


@pytest.mark.acid("propetl", 8)
def test_with_density_one_it_is_one_adapter_shared_by_the_layers():
    tuned, _ = _tuned(density=1.0)
    stir(tuned, 0.1)
    shared = next(iter(tuned.modules(Prototype).values()))
    reference = tiny("bert")
    with torch.no_grad():
        for name, parameter in tuned.trained().items():
            if name.startswith("head/"):
                dict(reference.named_parameters())[name.removeprefix("head/")].copy_(parameter)
    for layer in reference.bert.encoder.layer:

        def add(module, args, out):
            h = torch.nn.functional.gelu(out @ shared.down.T + shared.down_bias)
            return out + h @ shared.up.T + shared.up_bias

        layer.output.dropout.register_forward_hook(add)
    torch.testing.assert_close(logits(tuned.model), logits(reference))


@pytest.mark.acid("propetl", 6)
def test_entries_leave_and_come_back_in_a_run():
    tuned, _ = _tuned(density=0.5)
    scores = [p for m in tuned.modules(Masked).values() for p in m.scores.values()]
    rest = [p for p in tuned.trained().values() if not any(p is s for s in scores)]
    step_with = torch.optim.AdamW([{"params": rest, "lr": 1e-2}, {"params": scores, "lr": 3e-2, "weight_decay": 0.0}])
    tuned.model.luthier.train()
    history = []
    for step in range(60):
        torch.manual_seed(step)
        tuned.model(**inputs(tuned.model, seed=step % 3)).loss.backward()
        step_with.step()
        step_with.zero_grad()
        masks = [top_k([s.abs()], s.numel() // 2)[0].flatten() for s in scores]
        history.append(torch.cat(masks))
    assert float((history[0] != history[-1]).float().mean()) > 0.01
    left = ~torch.stack(history[1:-1]).all(0) & history[0]
    assert bool((left & history[-1]).any()), "some entries came back"


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_lora_form_starts_at_the_base_and_merges(name):
    model = tiny(name)
    before = logits(model)
    how = ProPETL(form="lora", rank=4, density=0.5)
    tuned = attach(model, how)
    assert how.mergeable and how.starts_at_base
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    stir(tuned, 0.1)
    tuned_logits = logits(model)
    assert not torch.allclose(tuned_logits, before)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), tuned_logits, rtol=1e-5, atol=1e-5)


def test_lora_scores_start_to_move_at_the_second_step():
    tuned, _ = _tuned(form="lora")
    tuned.model.luthier.train()
    step_with = torch.optim.SGD(tuned.trained().values(), lr=0.5)
    seen = []
    for _ in range(3):
        tuned.model(**inputs(tuned.model)).loss.backward()
        grads = [p.grad.abs().sum() for m in tuned.modules(Masked).values() for p in m.scores.values()]
        seen.append(float(sum(grads)))
        step_with.step()
        step_with.zero_grad()
    assert seen[0] == 0.0
    assert seen[1] > 0.0


def test_counts_and_groups():
    tuned, how = _tuned()
    matrices = 2 * HIDDEN * 8
    assert tuned.n_trained() == how.n_params(tuned.anatomy) == matrices + 8 + HIDDEN + LAYERS * matrices
    (group,) = tuned.groups()
    assert group.lr_factor == 30.0
    assert group.weight_decay == 0.0
    assert len(group.names) == 2 * LAYERS
    assert all(".scores." in n for n in group.names)


def test_sites_of_different_shapes_have_prototypes_of_their_own():
    tuned, how = _tuned("llama", form="lora", sites=("attn.q", "attn.v", "ffn.down"))
    assert len(tuned.modules(Prototype)) == 3
    assert tuned.n_trained() == how.n_params(tuned.anatomy)


def test_masks_are_kept_in_evaluation_and_follow_a_change():
    tuned, _ = _tuned()
    module = next(iter(tuned.modules(Masked).values())).eval()
    assert module.mask("down") is module.mask("down")
    before = module.mask("down")
    with torch.no_grad():
        module.scores["down"].neg_().add_(module.scores["down"].abs().max())
    assert not torch.equal(module.mask("down"), before)


def test_settings_go_through_json():
    how = ProPETL(form="lora", density=0.25)
    assert json.loads(json.dumps(how.settings()))["density"] == 0.25


@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_a_place_alone_has_a_prototype_of_its_own(form):
    place = "ffn_out@1" if form == "adapter" else "attn.q@1"
    tuned, how = _tuned(form=form, sites=(place,))
    assert len(tuned.modules(Masked)) == len(tuned.modules(Prototype)) == 1
    assert tuned.n_trained() == how.n_params(tuned.anatomy) > how.n_stored(tuned.anatomy) > 0


@pytest.mark.acid("propetl", 9)
@pytest.mark.parametrize("join", ["or", "and", "sum"])
def test_masks_of_a_layer_and_of_a_task_have_the_density_of_two_that_are_independent(join):
    tuned, _ = _tuned(width=200, density=0.3, tasks=3, join=join)
    module = next(iter(tuned.modules(Masked).values()))
    prototype = module.__dict__["prototype"]
    both = (module.weights("down", torch.arange(3)) / prototype.down).detach()
    of_layer, of_tasks = module.mask("down").detach(), module.mask("down_of_tasks").detach()
    for task, mask in enumerate(both):
        n = of_tasks[task].numel()
        assert int(of_tasks[task].sum()) == n - math.floor(round(0.7 * n, 6)), "each task's mask has its own density"
        wanted = {"or": torch.maximum, "and": torch.minimum, "sum": torch.add}[join](of_layer, of_tasks[task])
        torch.testing.assert_close(mask, wanted)
        share = {"or": 1 - 0.7**2, "and": 0.3**2, "sum": 0.6}[join]
        assert abs(float(mask.mean()) - share) < 0.03, "also of the last task"
    assert not torch.equal(of_tasks[0], of_tasks[1])


@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_a_row_is_answered_with_the_masks_of_its_task(form, tmp_path):
    tuned, how = _tuned(form=form, tasks=3)
    assert not how.mergeable
    assert tuned.n_trained() == how.n_params(tuned.anatomy)
    stir(tuned, 0.3)
    batch = inputs(tuned.model, padded=False)
    mixed = logits(tuned.model, batch | {"row_task": torch.tensor([2, 0, 1])})
    for row, task in enumerate([2, 0, 1]):
        alone = logits(tuned.model, batch | {"row_task": torch.full((3,), task)})
        torch.testing.assert_close(mixed[row], alone[row])
        assert not torch.allclose(mixed[row], alone[row - 1])
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again, batch | {"row_task": torch.tensor([2, 0, 1])}), mixed)
    masks = sum(math.ceil(s.numel() / 8) for m in tuned.modules(Masked).values() for s in m.scores.values())
    prototype = sum(p.numel() for m in tuned.modules(Prototype).values() for p in m.parameters())
    assert prototype + masks == how.n_stored(tuned.anatomy)


def test_where_all_tasks_keep_what_their_layer_keeps_it_is_the_form_of_one_task():
    several, _ = _tuned(tasks=2, join="and")
    alone, _ = _tuned()
    stir(several, 0.2)
    own = {name: p for name, p in several.trained().items() if "_of_tasks" not in name}
    with torch.no_grad():
        for name, p in alone.trained().items():
            p.copy_(own[name])
        for module in several.modules(Masked).values():
            for name in ("down", "up"):
                module.scores[f"{name}_of_tasks"].copy_(module.scores[name])
    batch = inputs(alone.model)
    torch.testing.assert_close(
        logits(several.model, batch | {"row_task": torch.tensor([0, 1, 1])}), logits(alone.model)
    )
