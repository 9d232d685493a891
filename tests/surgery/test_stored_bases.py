"""Bases whose linear layers are held in codes: every method over them, beside the floats that the codes stand for."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import small
from kinds import prepared, with_twin
from tiny import inputs, tiny
from torch import nn
from unusual import learnt, llama, word_ids

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, CannotMerge, ConfigError, WrongBase
from luthier.kernels import FORMATS, StoredLinear
from luthier.surgery import METHODS, attach, decode_layers, encode_layers, load
from luthier.surgery.tuning_files import base_digest

STORES = list(FORMATS)


def pair(store: str = "nf4", make: Any = llama) -> tuple[Any, Any]:
    """A model in codes, and the same function in plain layers."""
    short = encode_layers(make(), store, remember=True)
    return short, decode_layers(copy.deepcopy(short))


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_over_codes_computes_what_it_does_over_their_floats_or_is_refused(name: str) -> None:
    short, plain = pair()
    ids = word_ids(2, 7)
    buffers = {n: b.clone() for n, b in short.named_buffers()}
    both = with_twin(name, short, plain)
    if both is None:
        return
    tuned, twin = both
    assert tuned.n_trained() == twin.n_trained()
    if name == "loftq":  # over floats it has nothing to make up for
        return
    for each in both:
        learnt(prepared(each, {"input_ids": ids, "labels": ids}), 0.1)
        each.model.eval()
    torch.testing.assert_close(short(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    for each in both:
        each.model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in tuned.trained().items():
        other = twin.trained()[key].grad
        assert (parameter.grad is None) == (other is None), key
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, atol=2e-4, rtol=2e-3)
    assert all(torch.equal(b, buffers[n]) for n, b in short.named_buffers() if n in buffers)


@pytest.mark.parametrize("store", STORES)
def test_codes_count_as_what_they_stand_for_and_have_one_digest_in_any_type(store: str) -> None:
    short, plain = pair(store)
    assert Anatomy.read(short) == Anatomy.read(plain)
    digests = []
    for model in (short, plain, copy.deepcopy(short).to(torch.bfloat16)):
        tuned = attach(model, "lora")
        digests.append(base_digest(tuned.edited))
        tuned.detach()
    assert len(set(digests)) == 1
    assert digests[0] != base_digest(attach(llama(), "lora").edited)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_other_architectures_hold_their_projections_and_nothing_else(kind: str) -> None:
    task = {"bert": "classification", "gpt2": "lm", "t5": "seq2seq"}[kind]
    short, plain = pair(make=lambda: tiny(kind, task))
    batch = inputs(short)
    torch.testing.assert_close(short(**batch).logits, plain(**batch).logits)
    held = {n for n, m in short.named_modules() if isinstance(m, StoredLinear)}
    anatomy = Anatomy.read(short)
    assert held == {s.path for s in anatomy.all_sites if s.kind.split(".")[0] in ("attn", "cross", "ffn")}
    assert not [n for n, m in plain.named_modules() if isinstance(m, StoredLinear)]
    for method in ("lora", "ia3", "sequential_adapter"):
        one, two = (learnt(attach(m, method, train_head=False), 0.1) for m in (short, plain))
        torch.testing.assert_close(short(**batch).logits, plain(**batch).logits, atol=1e-4, rtol=1e-4)
        one.detach()
        two.detach()


def test_a_saved_tuning_is_loaded_over_the_codes_or_their_floats_and_over_no_other_base(tmp_path: Path) -> None:
    short, plain = pair()
    ids = word_ids(2, 7)
    fresh = copy.deepcopy(short)
    tuned = learnt(attach(short, "lora", rank=2))
    tuned.save(tmp_path / "tuning")
    wanted = short.eval()(input_ids=ids).logits
    load(fresh, tmp_path / "tuning")
    assert torch.equal(fresh(input_ids=ids).logits, wanted)
    merged = load(plain, tmp_path / "tuning").merge()
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)
    for other in (llama(), pair("int8")[0]):
        with pytest.raises(WrongBase):
            load(other, tmp_path / "tuning")


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "adalora"])
def test_merging_into_codes_is_refused_and_says_what_can_be_done(name: str) -> None:
    short, _ = pair()
    before = {n: b.clone() for n, b in short.named_buffers()}
    with pytest.raises(CannotMerge, match=r"nf4 codes.*luthier merge RUN"):
        learnt(attach(short, small(name))).merge()
    assert all(torch.equal(b, before[n]) for n, b in short.named_buffers() if n in before)


@pytest.mark.parametrize("name", ["full", "diff_pruning", "intrinsic_said", "lst"])
def test_methods_that_train_or_replace_weights_are_refused_over_codes(name: str) -> None:
    with pytest.raises(AnatomyError, match=r"quantised \(it holds nf4 codes\)"):
        attach(pair()[0], small(name))


def test_bitfit_trains_the_biases_of_layers_in_codes() -> None:
    model = encode_layers(tiny("bert", "classification"), "nf4")
    tuned = attach(model, "bitfit")
    model(**inputs(model)).loss.backward()
    moved = [n for n, p in tuned.trained().items() if "query.bias" in n and p.grad is not None and p.grad.any()]
    assert moved


def test_what_cannot_be_held_in_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'nf5' is none of nf4"):
        encode_layers(llama(), "nf5")
    with pytest.raises(AnatomyError, match=r"no linear layer of it can be held in codes"):
        encode_layers(encode_layers(llama(), "nf4"), "nf4")
    broken = llama()
    with torch.no_grad():
        next(m for m in broken.model.layers.modules() if isinstance(m, nn.Linear)).weight[0, 0] = float("nan")
    with pytest.raises(AnatomyError, match=r"weight holds NaN"):
        encode_layers(broken, "nf4")
    model = llama()
    attach(model, "lora")
    with pytest.raises(AnatomyError, match=r"'default' stands on the model"):
        encode_layers(model, "nf4")


def verdict(name: str, store: str) -> str:
    """What a method can do over a base in codes: "refused", "trains", or "trains and merges"."""
    for make in (llama, lambda: tiny("bert", "classification")):
        model = encode_layers(make(), store, remember=True)
        try:
            tuned = attach(model, small(name))
        except AnatomyError as error:
            if "quantised" in str(error):
                return "refused"
            continue
        break
    else:
        return "refused"
    part = tuned.tuning().method
    if not part.mergeable or part.looks_at_data:
        return "trains"
    try:
        learnt(tuned).merge()
    except CannotMerge:
        return "trains"
    return "trains and merges"


def matrix() -> str:
    """The table of docs/stored-bases.md: methods by what they can do."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in METHODS.names():
        found.setdefault((verdict(name, "nf4"), verdict(name, "int4")), []).append(name)
    lines = ["| nf4, int8 | int4, int2 | methods |", "| --- | --- | --- |"]
    for (one, two), names in sorted(found.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {one} | {two} | {', '.join(f'`{n}`' for n in names)} |")
    return "\n".join(lines) + "\n"


def test_the_support_matrix_on_the_page_is_what_methods_do() -> None:
    # LUTHIER_WRITE_PAGES=1 writes it anew.
    page = Path(__file__).parents[2] / "docs" / "stored-bases.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- matrix -->\n")
    written, _, tail = rest.partition("<!-- end -->")
    made = matrix()
    if os.environ.get("LUTHIER_WRITE_PAGES") == "1":
        page.write_text(f"{head}<!-- matrix -->\n{made}<!-- end -->{tail}", encoding="utf-8")
        return
    # A method that is newer than the page is on it after `make matrix`; one that is on it stands where it belongs.
    new = {n for row in made.splitlines() for n in re.findall(r"`(\w+)`", row)}
    old = set(re.findall(r"`(\w+)`", written))
    assert old <= new
    for row in made.splitlines():
        wanted = [n for n in re.findall(r"`(\w+)`", row) if n in old]
        if wanted:
            here = next(r for r in written.splitlines() if r.startswith(row.split("`")[0]))
            assert re.findall(r"`(\w+)`", here) == wanted, "run `make matrix`"
