"""LoRAPrune: its acid tests, its whole schedule against a plain reference, and what a merged folder is."""

import json
import math
from dataclasses import replace

import pytest
import torch
from little import little_spec
from methods.checks import attach_double, logits, optimiser, stir, train
from tiny import inputs, tiny

from luthier import kernels
from luthier import train as run
from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, CannotMerge, ConfigError
from luthier.methods.reparameterised.loraprune import Felt, LoRAPrune, PrunedReader
from luthier.surgery import attach, encode_layers, narrowing
from luthier.workflow import merge, resume
from luthier.workflow.resume_proof import run_digests


def readers(tuned):
    return tuned.modules(PrunedReader)


def left(tuned):
    return {key: int(m.keep.sum()) for key, m in readers(tuned).items()}


def pruned(kind, task="", **settings):
    """A model that has been trained and pruned."""
    tuned = attach(tiny(kind, task), LoRAPrune(**{"rank": 3, "every": 2, **settings}))
    train(tuned, 12)
    stir(tuned, 0.1)
    return tuned


@pytest.mark.acid("loraprune", 1)
@pytest.mark.parametrize(
    ("kind", "sites", "cut_out"),
    [
        ("llama", (), ("1 of 2", "40 of 80")),
        ("qwen3", (), ("1 of 2", "40 of 80")),
        ("phi3", (), ("1 of 2", "40 of 80")),
        ("gpt2", ("ffn",), ("40 of 80",)),
        ("bert", (), ("40 of 80",)),
        ("t5", ("ffn",), ("40 of 80",)),
        ("bart", ("ffn",), ("36 of 72 and 40 of 80",)),
    ],
)
def test_cut_out_it_computes_the_same_with_fewer_numbers_and_products(kind, sites, cut_out):
    tuned = pruned(kind, **({"sites": sites} if sites else {}))
    anatomy, batch = tuned.anatomy, inputs(tuned.model)
    masked, unread = logits(tuned.model, batch), narrowing.unread(tuned.edited)
    model, n_before = tuned.merge(check=batch), anatomy.n_params
    small, notes = narrowing.narrow(model, anatomy, unread, batch)
    torch.testing.assert_close(logits(small, batch), masked, rtol=1e-5, atol=1e-5)
    told = [note for note in notes if note.startswith("cut out")]
    assert len(told) == len(cut_out), notes
    for note, share in zip(sorted(told), sorted(cut_out), strict=True):
        n = share.split()
        assert share in note or f"{2 * int(n[0])} of {2 * int(n[2])} heads" in note, notes
    after = Anatomy.read(small)
    assert after.n_params < n_before

    def products(found):
        return sum(s.d_in * s.d_out for s in found.all_sites if s.kind in ("ffn.up", "ffn.down", "attn.q", "attn.o"))

    assert products(after) < products(anatomy)


@pytest.mark.acid("loraprune", 2)
@pytest.mark.parametrize(("ratio", "kv"), [(0.5, 1), (0.3, 1), (0.7, 1)])
def test_the_share_that_is_gone_is_the_target_in_whole_groups(ratio, kv):
    tuned = attach(tiny("llama"), LoRAPrune(ratio=ratio, every=3))
    train(tuned, 10)
    for key, n in left(tuned).items():
        groups = readers(tuned)[key].n
        assert groups == (2 if key.startswith("attn") else 80), "key-value heads, not query heads"
        assert abs((groups - n) - ratio * groups) < 1, "and the end was no multiple of `every`"


@pytest.mark.acid("loraprune", 2)
def test_what_is_spared_is_spared_and_counts_for_no_share():
    tuned = attach(tiny("llama"), LoRAPrune(keep_first=1, keep_last=1))
    train(tuned, 10)
    assert set(left(tuned)) == {"attn.o@1", "ffn.down@1"} and set(left(tuned).values()) == {1, 40}


@pytest.mark.acid("loraprune", 3)
def test_worth_is_the_product_rules_change_of_the_update_in_a_step_of_size_one():
    tuned = attach_double("llama", "loraprune", rank=3, alpha=6)
    stir(tuned)
    tuned.model(**inputs(tuned.model)).loss.backward()
    for module in tuned.modules(Felt).values():
        a, b = module.a.detach(), module.b.detach()
        change = b @ a - (b - module.b.grad) @ (a - module.a.grad)  # of B A, by one step of plain descent
        worth = (change * (module.base.weight() + module.scale * b @ a)).abs()
        sums = worth.sum(0 if isinstance(module, PrunedReader) else 1).view(module.n, -1).sum(1)
        torch.testing.assert_close(module.feel(rows=7).double(), sums / sums.norm(), rtol=1e-5, atol=1e-8)


@pytest.mark.acid("loraprune", 3)
def test_at_the_first_step_a_group_has_worth_though_b_is_zero():
    tuned = attach(tiny("bert"), LoRAPrune())
    tuned.model(**inputs(tuned.model)).loss.backward()
    for module in tuned.modules(Felt).values():
        assert not module.b.any() and not module.a.grad.any()
        worth = module.feel()
        assert bool(torch.isfinite(worth).all()) and bool(worth.any())


@pytest.mark.acid("loraprune", 4)
def test_no_tensor_of_the_weights_size_has_a_gradient():
    tuned = attach(tiny("llama"), LoRAPrune(rank=3))
    model = tuned.model.train()
    shapes = {tuple(s.shape) for s in (m.base.weight() for m in tuned.modules(Felt).values())}
    seen = []

    def note(grad):
        seen.append(tuple(grad.shape))

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(**inputs(model)).loss
    for module in tuned.modules(Felt).values():
        for parameter in module.parameters():
            parameter.register_hook(note)
    loss.backward()
    assert seen and not shapes & set(seen)
    assert not [n for n, p in model.named_parameters() if p.grad is not None and tuple(p.grad.shape) in shapes]


@pytest.mark.acid("loraprune", 5)
def test_what_is_pruned_never_returns_though_it_would_be_worth_most():
    method = LoRAPrune(rank=2, every=1)
    tuned = attach(tiny("llama"), method)
    step_with, before = optimiser(tuned), {k: m.keep.clone() for k, m in readers(tuned).items()}
    for step in range(1, 41):
        tuned.model(**inputs(tuned.model, seed=step)).loss.backward()
        method.after_backward(tuned, step, 40)
        for module in readers(tuned).values():
            module.worth[~module.keep] = 1e6
        step_with.step()
        method.on_step(tuned, step, 40)
        for key, module in readers(tuned).items():
            assert not bool((module.keep & ~before[key]).any())
            before[key] = module.keep.clone()
        step_with.zero_grad()
    assert all(m.n // 2 == int(m.keep.sum()) for m in readers(tuned).values())
    tuned.finish()
    whole = {k: (p.detach().clone(), m.mask()) for k, m in readers(tuned).items() for p in [m.a]}
    batch = inputs(tuned.model)
    before_logits = logits(tuned.model, batch)
    with torch.no_grad():
        for a, mask in ((m.a, m.mask()) for m in readers(tuned).values()):
            a[:, ~mask] += 5.0
    assert whole and torch.equal(logits(tuned.model, batch), before_logits), "nothing of it is read"


@pytest.mark.parametrize("spec", ["loraprune", "loraprune+ia3", "ia3+loraprune"])
def test_the_update_reads_nothing_that_is_gone_by_whatever_way_it_is_computed(spec):
    tuned = attach(tiny("llama"), spec)
    stir(tuned, 0.1)
    for module in readers(tuned).values():
        module.keep[::2] = False
    batch = inputs(tuned.model)
    with kernels.plain():
        before = logits(tuned.model, batch)
        torch.testing.assert_close(logits(tuned.merge(check=batch), batch), before, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_what_is_gone_is_zero_by_whatever_way_it_is_computed():
    for plain in (False, True):
        tuned = attach(tiny("llama"), LoRAPrune(rank=3))
        stir(tuned, 0.1)
        for module in readers(tuned).values():
            module.keep[::2] = False
        with kernels.plain(plain):
            tuned.model(**inputs(tuned.model)).loss.backward()
        for module in readers(tuned).values():
            assert bool(module.a.grad[:, module.mask()].any()) and not bool(module.a.grad[:, module.unread()].any())


class Plain:
    """The schedule of one layer's channels, in plain Python, from what the gradients of each step say."""

    def __init__(self, n, ratio, total):
        self.kept, self.worth, self.ratio, self.total = list(range(n)), [0.0] * n, ratio, total

    def step(self, step, matrices):
        n = len(self.worth)
        if step - 1 < 0.9 * self.total and all(math.isfinite(v) for m in matrices for v in m):
            lengths = [math.sqrt(sum(v * v for v in m)) for m in matrices]
            for c in range(n):
                new = sum(m[c] / length for m, length in zip(matrices, lengths, strict=True))
                self.worth[c] = 0.9 * self.worth[c] + 0.1 * new
        first, last = 0.1 * self.total, 0.9 * self.total
        if step > first and (step % 10 == 0 or step == math.ceil(last)):
            share = self.ratio * (1 - max(0.0, 1 - (step - first) / (last - first)) ** 3)
            while n - len(self.kept) < math.floor(share * n + 0.5):
                self.kept.remove(min(self.kept, key=lambda c: self.worth[c]))


def test_a_hundred_steps_give_the_masks_of_a_plain_reference():
    """Also where two steps have no finite gradient: they count for nothing."""
    method = LoRAPrune(rank=2, ratio=0.6, sites=("ffn.up", "ffn.gate", "ffn.down"))
    tuned = attach(tiny("llama"), method)
    step_with, n = optimiser(tuned, lr=3e-3), 0
    plain = {key: Plain(80, 0.6, 100) for key in readers(tuned)}
    for step in range(1, 101):
        tuned.model(**inputs(tuned.model, seed=step)).loss.backward()
        if step in (7, 44):
            next(iter(tuned.trained().values())).grad[0, 0] = float("nan")
        felt = {}
        for key, module in tuned.modules(Felt).items():
            a, b, g_a, g_b = module.a.detach(), module.b.detach(), module.a.grad, module.b.grad
            change = (g_b @ a + b @ g_a - g_b @ g_a) * (module.base.weight() + module.scale * b @ a)
            felt[key] = change.abs().sum(0 if key.startswith("ffn.down") else 1).tolist()
        bad = any(not math.isfinite(v) for m in felt.values() for v in m)
        method.after_backward(tuned, step, 100)
        if not bad:
            step_with.step()
        method.on_step(tuned, step, 100)
        step_with.zero_grad()
        for key, reference in plain.items():
            layer = key.partition("@")[2]
            mine = [felt[f"{kind}@{layer}"] for kind in ("ffn.up", "ffn.gate", "ffn.down")]
            reference.step(step, [[math.nan]] if bad else mine)
            assert readers(tuned)[key].keep.nonzero().flatten().tolist() == sorted(reference.kept), step
        n += bad
    assert n == 2 and all(len(p.kept) == 32 for p in plain.values())


def test_a_step_in_pieces_tells_what_the_whole_step_tells():
    """The gradients of all micro-batches, and not the last one's."""
    found = []
    for pieces in (1, 3):
        tuned = attach_double("llama", "loraprune", rank=3)
        stir(tuned)
        tuned.model.eval()
        batch = inputs(tuned.model)
        n = len(batch["input_ids"])
        for i in range(pieces):
            part = {k: v[i * n // pieces : (i + 1) * n // pieces] for k, v in batch.items()}
            here = max(1, int((part["labels"][:, 1:] != -100).sum()))
            (tuned.model(**part).loss * here / int((batch["labels"][:, 1:] != -100).sum())).backward()
        method = tuned.tuning().method
        method.after_backward(tuned, 1, 10)
        method.on_step(tuned, 1, 10)
        found.append([m.worth for m in readers(tuned).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_where_nothing_is_known_yet_nothing_goes():
    tuned = attach(tiny("bert"), LoRAPrune())
    for module in readers(tuned).values():
        module.prune(2)
    assert set(left(tuned).values()) == {4, 80}


def test_a_run_stopped_while_it_prunes_goes_on_to_the_bit(tmp_path):
    settings = {"rank": 2, "every": 2}
    spec = replace(little_spec(tmp_path, "loraprune"), settings=settings, steps=8)
    run(replace(spec, out=str(tmp_path / "whole")))
    run(replace(spec, out=str(tmp_path / "stopped")), stop_at=5)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


@pytest.mark.acid("loraprune", 1)
def test_a_merged_folder_is_a_smaller_plain_model_and_says_so(tmp_path):
    run(replace(little_spec(tmp_path, "loraprune", "llama"), settings={"rank": 2, "every": 2}, steps=6))
    said = []
    merge(tmp_path / "run", tmp_path / "merged", say=said.append)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    card = (tmp_path / "merged" / "README.md").read_text()
    assert config["intermediate_size"] == 40 and "40 of 80 channels of each feed-forward block" in card
    assert json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 12)
    assert said == ["cut out: 40 of 80 channels of each feed-forward block", "cut out: 2 of 4 heads of each attention"]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama", {"keep_last": 1}, "one width for all layers, and they keep 40 at ffn.down@0, 80 at ffn.down@2"),
        ("bert", {"sites": ("attn",)}, "no BertConfig says so"),
        ("bloom", {"sites": ("attn",)}, "no BloomConfig says so"),
        ("t5", {"sites": ("attn",)}, "no T5Config says so"),
        ("olmo2", {"sites": ("attn",)}, "another shape"),
    ],
)
def test_what_no_configuration_says_stays_as_zeros_and_the_reason_is_said(kind, settings, words):
    tuned = pruned(kind, **settings)
    anatomy, batch, unread = tuned.anatomy, inputs(tuned.model), narrowing.unread(tuned.edited)
    masked = logits(tuned.model, batch)
    model, notes = narrowing.narrow(tuned.merge(check=batch), anatomy, unread, batch)
    assert any(words in note and note.startswith("written as zeros") for note in notes), notes
    assert Anatomy.read(model).n_params == anatomy.n_params
    torch.testing.assert_close(logits(model, batch), masked, rtol=1e-5, atol=1e-5)


def test_what_is_cut_keeps_the_type_of_every_tensor(tmp_path):
    """A model that was loaded in bf16 has its tables of angles in fp32, and a saved T5 in fp16 some weights."""
    for kind, dtype in (("llama", torch.bfloat16), ("t5", torch.float16)):
        tiny(kind).save_pretrained(tmp_path / kind)
        model = type(tiny(kind)).from_pretrained(tmp_path / kind, dtype=dtype)
        tuned = attach(model, LoRAPrune(rank=3, every=2, sites=("ffn",)))
        for module in readers(tuned).values():
            module.keep[::2] = False
        unread, anatomy, batch = narrowing.unread(tuned.edited), tuned.anatomy, inputs(model)
        merged = tuned.merge(check=batch)
        small, notes = narrowing.narrow(merged, anatomy, unread, batch)
        before, after = ({n: t.dtype for n, t in (*m.named_parameters(), *m.named_buffers())} for m in (merged, small))
        assert notes[0].startswith("cut out") and before == after and len(set(before.values())) == 2


def test_columns_that_another_tuning_reads_again_are_not_cut_out():
    tuned = pruned("llama", sites=("ffn",))
    tuned.add("lora", name="over")
    unread = narrowing.unread(tuned.edited)
    model, anatomy = tuned.merge(), tuned.anatomy
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 0.1
    _, notes = narrowing.narrow(model, anatomy, unread, inputs(model))
    assert "they keep 40 at ffn.down@1, 80 at ffn.down@0" in notes[0]


def test_other_runs_are_not_added_to_a_pruned_one(tmp_path):
    spec = replace(little_spec(tmp_path, "loraprune"), settings={"rank": 2, "every": 1}, steps=3)
    run(spec)
    run(replace(little_spec(tmp_path, "lora"), steps=2, out=str(tmp_path / "other")))
    with pytest.raises(CannotMerge, match="other runs would bring back"):
        merge(tmp_path / "run", tmp_path / "merged", add=[tmp_path / "other"])


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama", {"ratio": 0.9}, "0.9 keeps none of the 2 heads of attn.o@0"),
        ("llama", {"ratio": 0.1}, "0.1 prunes none of the 2 heads of attn.o@0. Set it from 0.25 to below 0.75"),
        ("bert", {"sites": ("attn.q", "ffn.up")}, "hold neither attn.o nor ffn.down"),
        ("bert", {"keep_first": 2, "keep_last": 1}, "keep_first and keep_last leave"),
    ],
)
def test_a_budget_that_keeps_or_prunes_nothing_is_refused(kind, settings, words):
    with pytest.raises(ConfigError, match=words):
        attach(tiny(kind), LoRAPrune(**settings))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"initial 0\.6 is above ratio 0.5"):
        LoRAPrune(initial=0.6)
    with pytest.raises(ConfigError, match="their sum must be below 1"):
        LoRAPrune(warmup=0.5, settled=0.5)


def test_a_model_without_the_places_is_refused():
    with pytest.raises(AnatomyError, match=r"no site.*ffn|ffn"):
        attach(tiny("mixtral"), LoRAPrune())
    with pytest.raises(AnatomyError, match="is an expert"):
        attach(tiny("mixtral"), LoRAPrune(sites=("attn.o", "experts")))


def test_on_a_base_in_codes_it_prunes_and_merges_only_where_codes_are_decoded():
    model = encode_layers(tiny("llama"), "nf4")
    tuned = attach(model, LoRAPrune(rank=2, every=2))
    train(tuned, 6)
    assert set(left(tuned).values()) == {1, 40}
    with pytest.raises(CannotMerge, match="quantised"):
        tuned.merge()
