"""What every method owes, on every kind of architecture. A new method is tested because it exists.

G, U and P refer to the universal acid tests of the catalogue.
"""

import json
from functools import cache
from typing import Any

import pytest
import torch
from cells import (
    ARCHITECTURES,
    CELLS,
    GENERATORS,
    Refused,
    Trainer,
    attached,
    base_logits,
    few_steps,
    fresh,
    learning_rate,
    logits,
    model_and_inputs,
    shake,
    shaken,
    small,
    steps_of,
    take,
    task_of,
    trained,
    untrained,
)
from tiny import inputs
from torch.testing import assert_close

from luthier import kernels
from luthier.core import AnatomyError, CannotMerge, CompositionError, LuthierError, plain
from luthier.surgery import METHODS, attach, compose, frozen_layers, load

REFUSED: set[tuple[str, str]] = set()


@pytest.fixture(autouse=True)
def record(request: pytest.FixtureRequest, record_cell: Any) -> Any:
    """Every cell is counted at the end of the run; one that a method refuses is counted as refused."""
    yield
    arguments = getattr(request.node, "callspec", None)
    if arguments is not None and {"name", "arch"} <= set(arguments.params):
        name, arch = arguments.params["name"], arguments.params["arch"]
        record_cell(name, arch, request.node.originalname, "refused" if (name, arch) in REFUSED else "")


def cell(test: Any) -> Any:
    """Let a refused cell end quietly: the refusal itself is checked where it is raised."""
    import functools

    @functools.wraps(test)
    def run(name: str, arch: str, **more: Any) -> None:
        try:
            test(name, arch, **more)
        except Refused:
            REFUSED.add((name, arch))
            assert refusals(name) <= len(ARCHITECTURES) // 2, f"{name} refuses most architectures"

    return run


@cache
def refusals(name: str) -> int:
    count = 0
    for arch in ARCHITECTURES:
        try:
            attached(name, arch)
        except Refused:
            count += 1
    return count


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_the_formula_counts_what_is_trained(name: str, arch: str) -> None:  # G1, U2
    tuned, model, batch = untrained(name, arch)
    if tuned.tuning().method.looks_at_data:
        tuned, model, batch = attached(name, arch)
        Trainer(tuned, model, batch, total=steps_of(tuned))  # masks are chosen from data
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_it_starts_where_it_says(name: str, arch: str) -> None:  # G4, U1
    tuned, model, batch = untrained(name, arch)
    apart = float((logits(model, batch) - base_logits(name, arch)).abs().max())
    if tuned.tuning().method.starts_at_base:
        assert apart <= 1e-6
    else:
        assert apart > 1e-6, "it says that it changes the function at once, and does not"


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_what_is_frozen_stays_and_what_trains_moves(name: str, arch: str) -> None:  # G2, G3, U3, P1
    tuned, model, batch = attached(name, arch)
    named = dict(model.named_parameters())
    frozen = {n: p.detach().clone() for n, p in named.items() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    total = steps_of(tuned)
    trainer = Trainer(tuned, model, batch, total=total)
    assert not {id(p) for p in trainer.optimiser.named.values()} & {id(named[n]) for n in frozen}
    assert all(t.dtype == torch.float32 for t in start.values())
    seen: set[str] = set()
    model.luthier.train()
    # Experts are drawn by lot, and some parts wait for a phase of their own.
    while len(trainer.losses) < 4 or (len(trainer.losses) < min(24, total) and not set(start) <= seen):
        trainer.step()
        seen |= {n for n, g in trainer.gradients.items() if bool(g.any())}
    for n, value in frozen.items():
        assert torch.equal(dict(model.named_parameters())[n], value), f"{n} is frozen and moved"
    masked_out = {k for k, u in tuned.tuning().unfrozen.items() if u.mask is not None and not bool(u.mask.any())}
    masked_out |= {n for n, mask in tuned.tuning().masks.items() if not bool(mask.any())}
    start = {n: t for n, t in start.items() if n not in masked_out}
    dead = [n for n in start if n not in seen and not _may_rest(n)]
    assert not dead, f"no gradient in {len(trainer.losses)} steps: {dead[:5]}"
    still = [
        n for n, p in tuned.trained().items() if n in start and torch.equal(p.detach(), start[n]) and not _may_rest(n)
    ]
    assert not still, f"did not move in {len(trainer.losses)} steps: {still[:5]}"
    for unfrozen in tuned.tuning().unfrozen.values():
        if unfrozen.mask is not None:
            outside = ~unfrozen.mask
            assert torch.equal(unfrozen.parameter.detach()[outside], unfrozen.original[outside])


def _may_rest(name: str) -> bool:
    """Key biases of softmax attention without rotary have a gradient of zero; padding rows are never read."""
    return name.endswith(("key.bias", "k_proj.bias")) or "token_type" in name


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_it_learns_what_it_is_shown(name: str, arch: str) -> None:  # U6
    tuned, model, batch = attached(name, arch)
    lr = learning_rate(tuned.tuning().method)
    losses = Trainer(tuned, model, batch, total=30, lr=lr, decay=0.0).run().losses
    assert sum(losses[-5:]) / 5 < 0.97 * losses[0], f"{losses[0]:.4f} -> {losses[-1]:.4f}"


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_asleep_it_is_the_base_and_awake_itself_again(name: str, arch: str) -> None:  # G5
    base = base_logits(name, arch)
    # A new head is the base's own: only the method's part is put to sleep here.
    tuned, model, batch = shaken(name, arch)
    awake = logits(model, batch)
    assert not torch.equal(awake, base)
    with tuned.base_only():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), awake)


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_detaching_gives_the_model_back(name: str, arch: str) -> None:  # G5
    original, _ = model_and_inputs(name, arch)
    expected = {n: t.clone() for n, t in original.state_dict().items()}
    required = {n: p.requires_grad for n, p in original.named_parameters()}
    attention = original.config._attn_implementation
    tuned, model, batch = attached(name, arch)
    Trainer(tuned, model, batch, total=few_steps(tuned)).run()
    assert tuned.detach() is model
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert model.config._attn_implementation == attention
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


@pytest.mark.fault("F64", "our own format")
@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_saved_and_loaded_it_computes_the_same_bits(name: str, arch: str, tmp_path: Any) -> None:  # G6, U5, P5
    tuned, model, batch = trained(name, arch)
    expected = logits(model, batch)
    tuned.save(tmp_path / "tuning")
    other, _ = model_and_inputs(name, arch)
    again = load(other, tmp_path / "tuning")
    assert torch.equal(logits(other, batch), expected)
    assert not other.training
    stored = again.tuning().method.n_stored(again.anatomy)
    from safetensors import safe_open

    with safe_open(tmp_path / "tuning" / "tuning.safetensors", "pt") as file:
        numbers = sum(
            file.get_tensor(k).numel()
            for k in file.keys()  # noqa: SIM118
            if not k.startswith("head/")
        )
    assert sorted(p.name for p in (tmp_path / "tuning").iterdir()) == [
        "MANIFEST.json",
        "tuning.json",
        "tuning.safetensors",
    ]
    base = sum(p.numel() for p in fresh(arch, task_of(name, arch)).parameters())
    assert numbers <= 2 * stored + 64 or numbers <= base, f"the file holds {numbers} numbers, {stored} are declared"


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_neither_padding_nor_neighbours_change_a_row(name: str, arch: str) -> None:  # G7
    _, model, batch = shaken(name, arch)
    together = logits(model, batch)
    for i in range(len(batch["input_ids"])):
        n = int(batch["attention_mask"][i].sum())
        alone = {k: v[i : i + 1] for k, v in batch.items()}
        real = alone["attention_mask"][0].bool()
        alone["input_ids"], alone["attention_mask"] = alone["input_ids"][:, real], alone["attention_mask"][:, real]
        assert alone["input_ids"].shape[1] == n
        if "token_type_ids" in alone:
            alone["token_type_ids"] = alone["token_type_ids"][:, real]
        got, want = logits(model, alone)[0], together[i]
        if task_of(name, arch) == "lm":
            want = want[real]
        assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "arch"), GENERATORS)
@cell
def test_generation_is_the_same_with_and_without_a_cache(name: str, arch: str) -> None:  # G8
    if task_of(name, arch) == "classification":
        return  # nothing generates here
    _, model, batch = shaken(name, arch)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    if arch != "t5":
        # Decoders continue from the right edge: pads stand on the left.
        given = {k: v.flip(1) for k, v in given.items()}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        cached = model.generate(**given, **options, num_beams=beams, use_cache=True)
        plainly = model.generate(**given, **options, num_beams=beams, use_cache=False)
        assert torch.equal(cached, plainly)
    torch.manual_seed(3)
    one = model.generate(**given, **{**options, "do_sample": True}, use_cache=True)
    torch.manual_seed(3)
    two = model.generate(**given, **{**options, "do_sample": True}, use_cache=False)
    assert torch.equal(one, two)


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_merged_it_computes_the_same_or_says_that_it_cannot(name: str, arch: str) -> None:  # G9, U4
    tuned, model, batch = take(trained(name, arch))
    apart = logits(model, batch)
    if not tuned.tuning().method.mergeable:
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(CannotMerge):
            tuned.merge()
        after = model.state_dict()
        assert all(torch.equal(after[n], before[n]) for n in before)
        return
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        tuned.merging.fold()
    except CannotMerge as error:
        assert "a bias that the model's layer lacks" in str(error)
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())
        assert_close(logits(model, batch), apart, atol=0, rtol=0)
        return
    assert_close(logits(model, batch), apart, atol=1e-5, rtol=1e-5)
    tuned.merging.unfold()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())
    merged = tuned.merge()
    assert_close(logits(merged, batch), apart, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == list(fresh(arch, task_of(name, arch)).state_dict())
    assert not any("luthier" in type(m).__module__ for m in merged.modules())


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_a_loss_on_one_tuning_leaves_another_alone(name: str, arch: str) -> None:  # G10
    tuned, model, batch = take(shaken(name, arch))
    mine = logits(model, batch)
    lora, method = small("lora"), tuned.tuning().method
    alone = any(p.conflicts(lora) or lora.conflicts(p) for p in method.parts() if not p.is_a("lora"))
    if alone:
        return
    tuned.add(lora, name="other", seed=1)
    tuned.activate("other")
    tuned.train_only("other")
    model(**batch).loss.backward()
    # The head is one tensor of the model whose value each tuning has for itself.
    mine_alone = [p for n, p in tuned.trained("default").items() if not n.startswith("head/")]
    assert all(p.grad is None or not p.grad.any() for p in mine_alone)
    assert any(p.grad is not None and p.grad.any() for p in tuned.trained("other").values())
    tuned.activate("default")
    assert torch.equal(logits(model, batch), mine)
    facts = {row["tuning"]: (row["active"], row["trainable"]) for row in tuned.status()}
    assert facts == {"default": (True, False), "other": (False, True)}
    tuned.remove("other")
    assert torch.equal(logits(model, batch), mine)


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_in_rows_each_row_is_its_own_or_it_is_refused(name: str, arch: str) -> None:
    tuned, model, batch = take(shaken(name, arch))
    names: list[str | None] = ["default", None, "default"]
    with tuned.base_only():
        rows = {None: logits(model, batch)}
    rows["default"] = logits(model, batch)
    try:
        tuned.add(small(name), name="other", seed=1)
    except CompositionError:
        pass  # two of them cannot be on one model
    else:
        tuned.activate("other")
        shake(tuned, 0.1)
        rows["other"] = logits(model, batch)
        names[2] = "other"
    assert len({float(of[2].sum()) for of in rows.values()}) == len(rows), "the rows would not tell who acts"
    try:
        with tuned.rows(names):
            found = logits(model, batch)
    except CompositionError as error:
        assert len(str(error)) > 40, f"the refusal says too little: {error}"
        return
    for i, who in enumerate(names):
        assert_close(found[i], rows[who][i], atol=2e-5, rtol=1e-4, msg=lambda m, i=i: f"row {i}, {names[i]}: {m}")


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_called_through_its_trunk_it_computes_what_it_says_or_refuses(name: str, arch: str) -> None:
    tuned, model, batch = shaken(name, arch)
    if model.base_model is model:
        return  # T5 for sequences is its own trunk
    held: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda module, args, out: held.append(out[0].detach().clone()))
    logits(model, batch)
    handle.remove()
    with tuned.base_only():
        logits(model, inputs(model, batch=2, length=5, seed=1))  # what is left of another pass is of no use
    given = {n: batch[n] for n in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:  # a classifier hands the same words to both sides
        given["decoder_input_ids"] = model.base_model._shift_right(batch["input_ids"])
    try:
        with torch.no_grad():
            found = model.base_model(**given)[0]
    except LuthierError as error:
        assert len(str(error)) > 40, f"the refusal says too little: {error}"
        return
    assert_close(found, held[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_gradient_checkpointing_changes_no_gradient(name: str, arch: str) -> None:  # G12
    found = []
    tuned, model, batch = take(shaken(name, arch))
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            tuned.forward.checkpoint_activations()
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        found.append({n: p.grad for n, p in tuned.trained().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for n, gradient in found[0].items():
        assert_close(found[1][n], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def attached_to(model: Any, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    try:
        return attach(model, small(name)), inputs(model)
    except (AnatomyError, CompositionError) as error:
        raise Refused from error


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_it_works_on_a_bf16_model(name: str, arch: str) -> None:  # G12
    model = fresh(arch, task_of(name, arch)).to(torch.bfloat16)
    tuned, batch = attached_to(model, name)
    assert all(p.dtype == torch.float32 for p in tuned.trained().values())
    with torch.autocast("cpu", torch.bfloat16):
        Trainer(tuned, model, batch, total=few_steps(tuned)).run()
    model.eval()
    assert torch.isfinite(logits(model, batch).float()).all(), "outside autocast"
    assert torch.equal(logits(model, batch), logits(model, batch)), "evaluation is deterministic"


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_in_bf16_all_fast_paths_together_are_about_as_near_the_exact_result_as_the_plain_computation(
    name: str, arch: str
) -> None:
    def results(dtype: torch.dtype, *, fast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and all gradients, of a base that bf16 holds exactly."""
        model = fresh(arch, task_of(name, arch)).to(torch.bfloat16).to(dtype)
        tuned, batch = attached_to(model, name)
        shake(tuned, 0.02)
        model.eval()
        if fast:
            tuned.forward.route_attention()
            tuned.fast.accelerate()
        with kernels.plain(not fast):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = model(**batch)
            out.loss.backward()
        gradients = [p.grad.flatten().float() for p in tuned.trained().values() if p.grad is not None]
        return out.logits.detach().float(), torch.cat(gradients)

    exact, slow = results(torch.float32, fast=False), results(torch.bfloat16, fast=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_layers, "MIN_WIDTH", 1)  # packed layers too, where this processor has them
        quick = results(torch.bfloat16, fast=True)
    for wanted, plainly, found in zip(exact, slow, quick, strict=True):
        norm = float(wanted.norm())
        # Probabilities are kept in bf16 for the backward pass, so T5's gradients are up to 2.4 times as far off.
        assert float((found - wanted).norm()) < 3 * float((plainly - wanted).norm()) + 0.01 * norm


@pytest.mark.parametrize(("name", "arch"), CELLS)
@cell
def test_its_state_of_training_goes_out_and_in(name: str, arch: str) -> None:
    tuned, model, batch = attached(name, arch)
    Trainer(tuned, model, batch, total=steps_of(tuned)).step()
    state = {n: t.clone() for n, t in tuned.state.tensors().items()}
    expected = logits(model, batch)
    other, second, _ = attached(name, arch, seed=9)
    other.state.load_tensors(state)
    assert torch.equal(logits(second, batch), expected)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and not n.startswith("luthier.")}
    assert not any(n.split("|")[-1] in frozen for n in state), "a frozen weight is in the state"


@pytest.mark.parametrize("name", METHODS.names())
def test_its_settings_survive_json(name: str) -> None:
    chosen = small(name)
    words = json.loads(json.dumps(plain(chosen.settings())))
    assert compose.method(compose.spell(chosen), words).parts() == chosen.parts()


@pytest.mark.parametrize("name", METHODS.names())
def test_two_seeds_give_two_starts_and_one_seed_one(name: str) -> None:
    arch = next(a for a in ARCHITECTURES if refuses_not(name, a))
    starts = [untrained(name, arch)[0].state.tensors()]
    starts += [attached(name, arch, seed=s)[0].state.tensors() for s in (0, 1)]
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    drawn = [
        n
        for n, t in starts[0].items()
        if not n.split("|")[1].rpartition(":")[2].startswith(("head/", "model/")) and t.is_floating_point()
    ]
    if METHODS.get(name).start_is_drawn and any(
        starts[0][n].float().std() > 0 for n in drawn if starts[0][n].numel() > 1
    ):
        assert any(not torch.equal(starts[0][n], starts[2][n]) for n in drawn)


def refuses_not(name: str, arch: str) -> bool:
    try:
        untrained(name, arch)
    except Refused:
        return False
    return True
