"""Ladder side-tuning: its own tests, beside those that every method passes."""

import pytest
import torch
import transformers
from little import little_model, little_spec
from methods.checks import frozen_copy, logits, same, stir, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred, uncached
from safetensors.torch import load_file
from tiny import ALSO, TINY, inputs, tiny
from transformers import BertConfig, BertModel
from unusual import COMMON, random_model, word_ids

from luthier import resume
from luthier import train as train_run
from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, CompositionError, ConfigError
from luthier.methods.additive.lst import Sides
from luthier.methods.parts.trial_pass import try_pass
from luthier.surgery import Tuned, attach, method

NAMES = ["bert", "llama", "t5"]


def sides_of(tuned):
    (sides,) = tuned.modules(Sides).values()
    return sides


def leaves(tensor):
    """The tensors into which a gradient of `tensor` flows."""
    seen, found, left = set(), [], [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            left += [n for n, _ in node.next_functions]
    return found


def kept_bytes(model):
    """Bytes that autograd keeps for the backward pass, parameters left out; of short texts, for the scores of attention
    are as many beside the model as in it."""
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs(model, batch=16, length=4, padded=False)).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.acid("lst", 1)
@pytest.mark.parametrize("name", [*NAMES, "gpt2", "bart", "modernbert"])
def test_no_gradient_enters_the_frozen_model(name):
    tuned = attach(tiny(name), "lst", reduction=3)
    trained = {id(p) for p in tuned.trained().values()}
    found = leaves(tuned.model(**inputs(tuned.model), **uncached(tuned)).loss)
    assert found and {id(p) for p in found} == trained
    seen = []
    sides = sides_of(tuned)
    forward = sides.forward
    sides.forward = lambda stack, calls, context, last: (
        seen.extend([*calls, last]) or forward(stack, calls, context, last)
    )
    tuned.model(**inputs(tuned.model))
    assert not any(c.after.requires_grad or c.before.requires_grad for c in seen if not isinstance(c, torch.Tensor))
    before = frozen_copy(tuned)
    train(tuned, 2)
    assert same(dict(tuned.model.named_parameters()), before)


def per_layer(chosen, **settings):
    """Bytes kept for three more layers."""
    three, six = (
        kept_bytes(attach(tiny("llama", num_hidden_layers=n), chosen, **settings).model.train()) for n in (3, 6)
    )
    return six - three


@pytest.mark.acid("lst", 1)
def test_kept_activations_shrink_with_the_side_and_stay_far_below_full_tuning():
    small, large = (per_layer("lst", reduction=r, importance="random") for r in (6, 2))
    full = per_layer("full")
    assert small < large < full
    assert small < full / 3


@pytest.mark.acid("lst", 2)
@pytest.mark.parametrize("name", NAMES)
def test_gates_at_their_ends_read_only_the_ladder_or_only_the_side(name):
    tuned = stirred(name, "lst", reduction=3)
    sides = sides_of(tuned)
    for end, ladder_matters in ((-1e4, True), (1e4, False)):
        with torch.no_grad():
            for ladder in sides.ladders.values():
                ladder.alpha.fill_(end)
        before = logits(tuned.model)
        changed = [
            m for ladder in sides.ladders.values() for m in (ladder.steps if not ladder_matters else [ladder.entry])
        ]
        with torch.no_grad():
            for module in changed:
                module.weight.add_(1.0)
        assert torch.equal(logits(tuned.model), before)
        changed = [m for ladder in sides.ladders.values() for m in (ladder.steps if ladder_matters else [ladder.entry])]
        with torch.no_grad():
            for module in changed:
                module.weight.add_(1.0)
        assert not torch.equal(logits(tuned.model), before)


def where(rows, table):
    """The index of each of `rows` in `table`; each stands there once."""
    equal = (rows[:, None] - table[None]).abs().flatten(2).amax(-1) == 0
    assert (equal.sum(1) == 1).all()
    return equal.float().argmax(1)


@pytest.mark.acid("lst", 3)
def test_side_blocks_start_as_rows_and_columns_of_the_frozen_ones_the_same_in_every_layer():
    tuned = attach(tiny("bert"), "lst", reduction=3)
    base = tuned.model.bert.encoder.layer
    streams = []
    for block, frozen in zip(sides_of(tuned).ladders["self"].blocks, base, strict=True):
        stream = where(block.output.LayerNorm.weight[:, None], frozen.output.LayerNorm.weight[:, None])
        streams.append(stream)
        for narrow, wide in (
            (block.attention.self.query, frozen.attention.self.query),
            (block.attention.self.value, frozen.attention.self.value),
            (block.intermediate.dense, frozen.intermediate.dense),
        ):
            rows = where(narrow.bias[:, None], wide.bias[:, None])
            assert torch.equal(narrow.weight, wide.weight[rows][:, stream])
        inner = where(block.intermediate.dense.bias[:, None], frozen.intermediate.dense.bias[:, None])
        assert torch.equal(block.output.dense.weight, frozen.output.dense.weight[stream][:, inner])
        heads = where(block.attention.self.value.bias[:, None], frozen.attention.self.value.bias[:, None])
        assert torch.equal(heads // 12, torch.arange(16) // 4)  # every head keeps 4 of its 12
        assert torch.equal(block.attention.output.dense.weight, frozen.attention.output.dense.weight[stream][:, heads])
    assert all(torch.equal(s, streams[0]) for s in streams)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt-neox", "phi3", "mixtral"])
def test_what_one_angle_turns_is_kept_together_and_fused_layers_are_cut_part_by_part(name):
    tuned = attach(tiny(name), "lst", reduction=3)
    side = Anatomy.read(sides_of(tuned).__dict__["narrow"])
    parameters = dict(sides_of(tuned).__dict__["narrow"].named_parameters())
    q = next(s for s in side.sites("attn.q") if s.layer == 0)
    k = next(s for s in side.sites("attn.k") if s.layer == 0)
    assert (q.d_in, k.d_in) == (16, 16)
    assert q.d_out == 16 and k.d_out == 4 * tuned.anatomy.n_kv_heads
    assert all(torch.isfinite(p).all() for p in parameters.values())


@pytest.mark.acid("lst", 4)
@pytest.mark.parametrize("reduction", [2, 3, 8])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral", "t5", "bart", "mixtral", "vit"])
def test_the_count_is_that_of_the_network_that_is_built(name, reduction):
    tuned = attach(tiny(name), "lst", reduction=reduction, layers=(0, 1))
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    assert all(len(ladder.alpha) == len(ladder.blocks) == 2 for ladder in sides_of(tuned).ladders.values())


@pytest.mark.acid("lst", 4)
def test_the_counts_are_those_of_the_catalogue():
    with torch.device("meta"):
        anatomy = Anatomy.read(BertModel(BertConfig()))
    assert method("lst", {"layers": tuple(range(9))}).n_params(anatomy) == 1_819_497
    assert method("lst").n_params(anatomy) == 2_376_492


@pytest.mark.parametrize("name", NAMES)
def test_every_number_learns_by_the_second_step(name):
    tuned = attach(tiny(name), "lst", reduction=3)
    stir(tuned, 0.05)
    train(tuned, 1)
    tuned.model.train()
    tuned.model(**inputs(tuned.model)).loss.backward()
    dead = {n for n, p in tuned.trained().items() if p.grad is None or float(p.grad.abs().max()) == 0}
    # The gradient of a key's bias is zero in softmax attention without rotary angles.
    assert all("key.bias" in n for n in dead)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fisher_looks_at_batches_and_leaves_no_trace(name):
    tuned = attach(tiny(name), "lst", reduction=3, importance="fisher")
    chosen, model = tuned.tuning().method, tuned.model
    with pytest.raises(ConfigError, match="none were given"):
        chosen.after_backward(tuned, 1, 1)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    batches = [lambda i=i: model(**inputs(model, batch=1, seed=i)).loss for i in range(3)]
    before = frozen_copy(tuned)
    chosen.prepare(tuned, batches)
    chosen.after_backward(tuned, 1, 1)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert same(dict(model.named_parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    by_size = attach(tiny(name), "lst", reduction=3)
    blocks, others = (sides_of(t).ladders["self"].blocks.state_dict() for t in (tuned, by_size))
    assert any(not torch.equal(blocks[n], others[n]) for n in blocks)
    logits(model)


def fisher_spec(home, **changes):
    settings = {"importance": "fisher", "reduction": 3}
    return little_spec(home, "lst", settings=settings, trunk_dropout="off", **changes)


def test_a_run_starts_from_fisher_and_resumes_to_the_bit(tmp_path):
    little_model(tmp_path / "bert")
    train_run(fisher_spec(tmp_path, out=str(tmp_path / "whole")))
    train_run(fisher_spec(tmp_path, out=str(tmp_path / "parts")), stop_at=5)
    resume(tmp_path / "parts")
    one, other = (load_file(tmp_path / name / "tuning" / "tuning.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    train_run(little_spec(tmp_path, "lst", settings={"reduction": 3}, trunk_dropout="off", out=str(tmp_path / "size")))
    third = load_file(tmp_path / "size" / "tuning" / "tuning.safetensors")
    assert any(not torch.allclose(one[n], third[n], atol=1e-3) for n in one), "another start"


def test_a_saved_side_that_started_from_fisher_trains_on_where_it_is_loaded(tmp_path):
    from luthier.surgery import load

    tuned = attach(tiny("bert"), "lst", reduction=3, importance="fisher")
    model = tuned.model
    tuned.tuning().method.prepare(tuned, [lambda: model(**inputs(model)).loss])
    tuned.save(tmp_path / "side")
    again = load(tiny("bert"), tmp_path / "side")
    again.tuning().method.after_backward(again, 1, 1)  # refuses a side that never started


def test_fisher_sees_frozen_weights_that_are_computed_by_fast_functions():
    blocks = []
    for quick in (False, True):
        tuned = attach(tiny("llama").bfloat16(), "lst", reduction=3, importance="fisher")
        model = tuned.model
        if quick:
            tuned.fast.accelerate(training=False)
        tuned.tuning().method.prepare(tuned, [lambda model=model: model(**inputs(model)).loss])
        blocks.append(sides_of(tuned).ladders["self"].blocks.state_dict())
    assert all(torch.equal(blocks[0][n], blocks[1][n]) for n in blocks[0])


@pytest.mark.parametrize("order", [("size", "fisher"), ("fisher", "size")])
def test_looking_at_the_data_starts_its_own_side_and_no_other(order):
    model = tiny("bert")
    for name in order:
        chosen = {"reduction": 3, "importance": "fisher" if name == "fisher" else "magnitude"}
        tuned = attach(model, method("lst", chosen), name=name, train_head=False)
        tuned.activate()
    tuned.activate("fisher")
    sides = {name: tuned.tuning(name).modules_by_key()["branch"] for name in order}
    before = {name: {n: t.clone() for n, t in side.state_dict().items()} for name, side in sides.items()}
    tuned.tuning("fisher").method.prepare(tuned, [lambda: model(**inputs(model)).loss])
    after = {name: side.state_dict() for name, side in sides.items()}
    assert all(torch.equal(after["size"][n], t) for n, t in before["size"].items())
    assert any(not torch.equal(after["fisher"][n], t) for n, t in before["fisher"].items())


def test_an_encoder_that_ran_without_the_side_is_refused_and_states_keep_their_width():
    tuned = stirred("t5", "lst", reduction=3)
    batch = inputs(tuned.model)
    out = tuned.model(**batch)
    assert out.encoder_last_hidden_state.shape[-1] == 48
    encoded = tuned.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ahead = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    torch.testing.assert_close(tuned.model(**ahead).logits, out.logits)
    encoded.last_hidden_state = encoded.last_hidden_state[..., :48]
    with pytest.raises(Exception, match="no state of the side encoder"):
        tuned.model(**ahead)


@pytest.mark.parametrize("other", ["lora", "prompt_tuning", "bitfit"])
def test_nothing_can_train_inside_the_frozen_model_beside_it(other):
    with pytest.raises(CompositionError, match="no gradient enters"):
        method(f"lst+{other}")


@pytest.mark.parametrize("name", ["albert", "deberta-v2"])
def test_a_model_whose_layers_cannot_be_narrowed_is_refused(name):
    with pytest.raises(AnatomyError, match="lst"):
        attach(tiny(name), "lst")


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(AnatomyError, match=r"\[7\]"):
        attach(tiny("bert"), "lst", layers=(0, 7))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "mistral", "gemma3", "bloom"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "lst", reduction=3), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "lst", reduction=3))


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_model_trains_fp32_numbers(name):
    check_low_precision(name, "lst", reduction=3)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_computes_the_same(name, tmp_path):
    from luthier.surgery import load

    tuned = stirred(name, "lst", reduction=3)
    before = logits(tuned.model)
    tuned.save(tmp_path / "side")
    model = tiny(name)
    load(model, tmp_path / "side")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_ladder_is_cut_from_a_model_that_holds_another_tuning(name):
    alone = attach(tiny(name), "lst", reduction=3).modules(Sides)["branch"].state_dict()
    tuned = attach(tiny(name), "lora", name="first")
    tuned.activate()  # they cannot act together
    beside = tuned.add(method("lst", {"reduction": 3}), name="second").modules_by_key()["branch"].state_dict()
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[n], beside[n]) for n in alone)


@pytest.mark.parametrize("arch", ["olmo2", "olmoe", "qwen2-moe"])
def test_blocks_that_cannot_be_cut_narrower_are_refused_with_the_start_that_needs_no_cut(arch: str) -> None:
    model = tiny(arch, "lm")
    names = list(model.state_dict())
    with pytest.raises(AnatomyError, match="importance=random"):
        attach(model, "lst")
    assert list(model.state_dict()) == names
    tuned = attach(model, "lst", importance="random")
    assert tuned.trained() and torch.isfinite(model(**inputs(model)).loss)


@pytest.mark.parametrize("name", [n for n in (*TINY, *ALSO) if n != "vit"])
def test_it_goes_through_a_training_pass_wherever_it_could_be_attached(name):
    model = tiny(name)
    names = list(model.state_dict())
    try:
        tuned = attach(model, "lst", reduction=3)
    except AnatomyError as error:
        assert str(error).startswith("lst: ") and "another method" in str(error)
        assert list(model.state_dict()) == names and Tuned.of(model) is None
        return
    model.train()
    model(**inputs(model)).loss.backward()
    assert all(p.grad is not None for n, p in tuned.trained().items() if "blocks" not in n)


def hybrid(kind):
    """Decoders whose layers keep more than keys, or whose projections cannot be told apart."""
    if kind == "falcon_h1":
        mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
        config = transformers.FalconH1Config(**{**COMMON, "num_key_value_heads": 2, **mamba})
        return random_model(transformers.FalconH1ForCausalLM, config)
    return random_model(transformers.FalconForCausalLM, transformers.FalconConfig(**COMMON))


@pytest.mark.parametrize("kind", ["falcon_h1", "falcon"])
def test_a_model_that_a_side_network_cannot_stand_beside_is_refused_when_it_is_attached(kind):
    model = hybrid(kind)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    before = model(input_ids=word_ids()).logits
    with pytest.raises(AnatomyError, match=f"^lst: .*this {kind} model"):
        attach(model, "lst", reduction=2)
    assert Tuned.of(model) is None
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(input_ids=word_ids()).logits, before)


def test_a_pass_that_the_base_itself_cannot_do_says_nothing_about_the_side():
    tuned = attach(tiny("bert"), "lst", reduction=3)
    tuned.model.forward = lambda **given: 1 / 0
    try_pass(tuned, "lst")
