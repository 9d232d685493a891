"""Methods whose files in peft are more than the same tensors at each layer: read there, equal logits, and back."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from methods.checks import stir
from tiny import inputs, tiny
from torch import Tensor

from luthier.core import CannotMerge, ConfigError, IntegrityError
from luthier.surgery import METHODS, PeftWhole, attach, from_peft, to_peft
from luthier.surgery.peft_files import forms

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Token type ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # said of every norm
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),  # said of a tied table's second name
]

NAMES = sorted(name for name, form in forms().values() if isinstance(form, PeftWhole))
# Where it acts, beside what its file calls tiny.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "prompt_tuning": [{}],
    "cpt": [{"epsilon": 2.0, "format_epsilon": 3.0}, {"decay": 0.5}],
    "p_tuning": [{"encoder": "lstm"}, {"encoder": "mlp"}],
    "mpt": [{"tasks": 3}],
    "llama_adapter": [{"gate": "layer"}],
    "trainable_tokens": [{"tokens": [46, 9, 80]}, {"tokens": [46], "output_matrix": False}],
    "tinylora": [{}, {"tying": 0.5}],
    "unilora": [{}, {"rank": 3, "sites": ["*"]}],
    "vblora": [{"top": 3}, {"sites": ["attn.o", "ffn"]}],
    "peanut": [{}, {"depth": 2, "function": "tanh"}],
    "adalora": [{}, {"sites": ["attn.o", "ffn.down"], "alpha": 7.0}],
    "glora": [{}, {"a": "vector", "b": "constant", "sites": ["attn.v", "attn.o"]}],
    "layernorm_tuning": [{}, {"outside": False}],
    "prefix_tuning": [{"mlp_width": 0}, {}],
    "cartridge": [{"still": 2}, {"words": [], "still": 0}],
    "poly": [{"tasks": 3}, {"tasks": 2, "splits": 1}],
    "shira": [{}, {"sites": ["attn.k", "ffn.down"]}],
    "supertuning": [{}, {"which": "smallest", "sparsity": 0.7}],
    "shadow": [{}, {"hidden": None, "strength": 0.1}],
}
WORDS = ("prompt_tuning", "cpt", "p_tuning", "mpt", "prefix_tuning", "cartridge")  # vectors or keys before the text
BARE = ("llama_adapter", "trainable_tokens", "cpt", "shadow")  # peft keeps no head for them
CELLS = [(name, i, "llama", "lm") for name in NAMES for i in range(len(SETTINGS[name]))]
CELLS += [(name, 0, "llama", "classification") for name in NAMES if name not in BARE]
CELLS += [(name, 0, "bert", "classification") for name in NAMES if name not in (*BARE, *WORDS)]
CELLS += [(name, 0, "gpt2", "lm") for name in ("trainable_tokens", "layernorm_tuning")]
CELLS += [(name, 1, "gpt2", "lm") for name in ("vblora", "adalora")]
CELLS += [("prompt_tuning", 0, "bert", "tokens"), ("prompt_tuning", 0, "t5", "seq2seq"), ("mpt", 0, "t5", "seq2seq")]


def whole_rows(model: Any) -> dict[str, Tensor]:
    """Rows without pads: peft reads a classifier of a decoder at the last position there is."""
    batch = inputs(model)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    return batch


def answers(model: Any, batch: dict[str, Tensor], tasks: int = 0) -> Tensor:
    """Logits of the text; peft gives those of the vectors too."""
    more = {"task_ids": torch.arange(len(batch["input_ids"])) % tasks} if tasks else {}
    with torch.no_grad():
        out: Tensor = model.eval()(**batch, **more).logits
    return out[:, -batch["input_ids"].shape[1] :] if out.dim() == 3 and "decoder_input_ids" not in batch else out


def fresh(name: str, arch: str, task: str) -> Any:
    """peft adds the bias of an output projection twice under its adaption prompt: see the test of that."""
    return tiny(arch, task, attention_bias=False) if name == "llama_adapter" else tiny(arch, task)


def made(name: str, number: int, arch: str, task: str) -> tuple[Any, Any]:
    given = {n: v for n, v in METHODS.get(name).tiny.items() if n != "lr"} | SETTINGS[name][number]
    model = fresh(name, arch, task)
    tuned = attach(model, name, **given)
    stir(tuned, 0.05)
    return tuned, model.eval()


@pytest.mark.parametrize(("name", "number", "arch", "task"), CELLS)
def test_peft_computes_from_our_file_what_we_do_and_its_own_comes_back(
    name: str, number: int, arch: str, task: str, tmp_path: Path
) -> None:
    tuned, model = made(name, number, arch, task)
    batch = whole_rows(model)
    tasks = SETTINGS[name][number].get("tasks", 0)
    of_tasks = {"row_task": torch.arange(len(batch["input_ids"])) % tasks} if tasks else {}
    with torch.no_grad():
        ours = model(**batch, **of_tasks).logits
    to_peft(tuned, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        theirs = peft.PeftModel.from_pretrained(fresh(name, arch, task), str(tmp_path / "ours")).eval()
    assert type(theirs) is not peft.PeftModel or not theirs.active_peft_config.is_prompt_learning
    found = answers(theirs, batch if arch == "t5" else {k: v for k, v in batch.items() if k != "labels"}, tasks)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)
    plain = fresh(name, arch, task).eval()
    with torch.no_grad():
        assert not torch.allclose(plain(**batch).logits, ours, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = fresh(name, arch, task)
    back = from_peft(again, tmp_path / "theirs")
    assert back.tuning().method.name == name
    with torch.no_grad():
        torch.testing.assert_close(again(**batch, **of_tasks).logits, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "targets"),
    [
        (("vector", "vector", "vector"), ["q_proj", "v_proj"]),
        (("constant", "lora", "constant"), ["q_proj"]),
        (("none", "vector", "vector"), ["q_proj", "down_proj"]),
        (("lora", "lora", "vector"), ["down_proj"]),
    ],
)
@pytest.mark.parametrize("bare", ["", "mlp_bias"])  # then ffn.down has no bias
def test_every_way_of_pefts_glora_comes_back_as_the_same_function(
    theirs: tuple[str, str, str], targets: list[str], bare: str, tmp_path: Path
) -> None:
    def plain() -> Any:
        return tiny("llama", "lm", **({bare: False} if bare else {}))

    ways: dict[str, Any] = dict(zip(("config_A_B", "config_C", "config_D_E"), theirs, strict=True))
    config = peft.GloraConfig(r=3, target_modules=targets, init_weights=False, task_type="CAUSAL_LM", **ways)
    torch.manual_seed(5)
    model = peft.get_peft_model(plain(), config).eval()
    batch = whole_rows(model)
    wanted = answers(model, batch)
    near = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(wanted.abs().max()))}  # what is drawn makes large answers
    model.save_pretrained(str(tmp_path / "theirs"))
    again = plain()
    assert not torch.allclose(answers(again, batch), wanted, atol=1e-4)
    tuned = from_peft(again, tmp_path / "theirs")
    torch.testing.assert_close(answers(again, batch), wanted, **near)
    to_peft(tuned, tmp_path / "ours")  # and out again, in the richest ways
    read = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(answers(read, batch), wanted, **near)


def test_glora_where_a_way_makes_a_bias_that_peft_would_leave_out_is_refused(tmp_path: Path) -> None:
    tuned = attach(tiny("llama", "lm", attention_bias=False), "glora", sites=["attn.q"], c="vector", rank=2)
    with pytest.raises(CannotMerge, match="has no bias, and its way makes one"):
        to_peft(tuned, tmp_path / "ours")


def test_a_file_is_read_by_peft_in_a_process_of_its_own(tmp_path: Path) -> None:
    tuned, model = made("prefix_tuning", 0, "llama", "lm")
    to_peft(tuned, tmp_path / "ours")
    batch = whole_rows(model)
    asked = {"ids": batch["input_ids"], "logits": answers(model, {"input_ids": batch["input_ids"]}).contiguous()}
    safetensors.torch.save_file(asked, tmp_path / "x")
    code = (
        "import sys, torch, peft, safetensors.torch; from tiny import tiny\n"
        "folder = sys.argv[1]; held = safetensors.torch.load_file(folder + '/x')\n"
        "model = peft.PeftModel.from_pretrained(tiny('llama', 'lm'), folder + '/ours').eval()\n"
        "assert 'luthier' not in sys.modules\n"
        "with torch.no_grad(): found = model(input_ids=held['ids'])\n"
        "print(float((found.logits - held['logits']).abs().max()))\n"
    )
    tests = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], cwd=tests, capture_output=True, text=True
    )
    assert float(run.stdout) < 1e-5, run.stderr


def test_a_prefix_goes_out_with_its_keys_turned_and_not_where_no_turning_helps(tmp_path: Path) -> None:
    tuned, _ = made("prefix_tuning", 0, "llama", "lm")
    to_peft(tuned, tmp_path / "ours")
    held = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")["prompt_embeddings"]
    ours = tuned.modules()["prefix"].groups["self"]().detach()
    theirs, mine = (t.view(3, 3, 2, 24) for t in (held, ours))  # (P, layers, keys and values, n_kv d_head)
    assert torch.equal(theirs[:, :, 1], mine[:, :, 1])
    assert not torch.allclose(theirs[:, :, 0], mine[:, :, 0], atol=1e-3)
    torch.testing.assert_close(theirs[:, :, 0].norm(dim=-1), mine[:, :, 0].norm(dim=-1))
    for arch in ("gpt2", "bert", "t5"):
        with pytest.raises(CannotMerge, match="peft moves every word of the text"):
            to_peft(attach(tiny(arch, "tokens" if arch == "bert" else ""), "prefix_tuning"), tmp_path / arch)
        assert not (tmp_path / arch).exists()


def test_pefts_adaption_prompt_adds_the_output_bias_twice_and_such_models_are_refused(tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model = tiny("llama", "lm")
    batch = whole_rows(model)
    shut = answers(peft.get_peft_model(tiny("llama", "lm"), config), batch)
    assert not torch.allclose(shut, answers(model, batch), atol=1e-2), "peft has mended it: take the refusal away"
    with pytest.raises(CannotMerge, match="a second time"):
        to_peft(attach(model, "llama_adapter", gate="layer", skip=1), tmp_path / "a")
    bare = tiny("llama", "lm", attention_bias=False)
    with pytest.raises(CannotMerge, match="Train with gate=layer"):
        to_peft(attach(bare, "llama_adapter", skip=1), tmp_path / "b")


def test_what_peft_answers_from_another_token_or_keeps_no_head_for_is_refused(tmp_path: Path) -> None:
    for name in ("prompt_tuning", "mpt"):
        with pytest.raises(CannotMerge, match="reads the first vector of the prompt"):
            to_peft(attach(tiny("bert", "classification"), name), tmp_path / "a")
    with pytest.raises(CannotMerge, match="keeps no head in its file"):
        to_peft(attach(tiny("llama", "classification"), "trainable_tokens", tokens=[5]), tmp_path / "b")
    with pytest.raises(CannotMerge, match="1 vectors stand behind the text"):
        to_peft(attach(tiny("bert", "tokens"), "p_tuning", length=3), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_pruned_triplets_of_adalora_go_out_and_pefts_pattern_of_ranks_comes_in(tmp_path: Path) -> None:
    tuned, model = made("adalora", 0, "llama", "lm")
    module = tuned.modules()["attn.q@1"]
    module.restore({n: t[..., :2] if n != "q" else t[:2] for n, t in module.stored().items()})
    to_peft(tuned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny("llama", "lm"), str(tmp_path / "ours"), is_trainable=True)
    batch = whole_rows(model)
    ours = answers(model, batch)
    torch.testing.assert_close(answers(theirs, batch), ours, rtol=1e-5, atol=1e-5)
    kept = {f"model.layers.{i}.self_attn.{n}_proj.lora_E": [True] * 3 for i in range(3) for n in "qv"}
    theirs.peft_config["default"].rank_pattern = kept | {"model.layers.1.self_attn.q_proj.lora_E": [True, True, False]}
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = tiny("llama", "lm")
    back = from_peft(again, tmp_path / "theirs")
    assert back.modules()["attn.q@1"].l.shape == (2,)
    torch.testing.assert_close(answers(again, batch), ours, rtol=1e-5, atol=1e-5)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def changed(name: str, tensors: Any = lambda held: held, number: int = 0, **facts: Any) -> Path:
        folder = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        to_peft(made(name, number, "llama", "lm")[0], folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
        held = tensors(safetensors.torch.load_file(folder / "adapter_model.safetensors"))
        safetensors.torch.save_file(held, folder / "adapter_model.safetensors")
        return folder

    base = tiny("llama", "lm")
    before = {n: p.clone() for n, p in base.named_parameters()}
    with pytest.raises(ConfigError, match="num_virtual_tokens is 5"):
        from_peft(base, changed("prompt_tuning", num_virtual_tokens=5))
    with pytest.raises(ConfigError, match="num_ranks is 2"):
        from_peft(base, changed("mpt", num_ranks=2))
    with pytest.raises(IntegrityError, match=r"no base_model\.vblora_vector_bank"):
        from_peft(base, changed("vblora", lambda held: {n: t for n, t in held.items() if "bank" not in n}))
    with pytest.raises(IntegrityError, match="have no place"):
        from_peft(base, changed("prompt_tuning", lambda held: held | {"other": torch.zeros(1)}))
    with pytest.raises(ConfigError, match="tensors of norms"):
        from_peft(base, changed("layernorm_tuning", lambda held: dict(list(held.items())[:2])))
    with pytest.raises(IntegrityError, match="does not fit"):
        from_peft(base, changed("unilora", lambda held: {n: t[:-1] for n, t in held.items()}))
    with pytest.raises(ConfigError, match=r"target_modules is '\.\*q_proj'"):
        from_peft(base, changed("unilora", target_modules=".*q_proj"))
    with pytest.raises(IntegrityError, match="not those of projection_seed"):
        drawn = {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.tinylora_P": torch.ones(16, 4, 4) for i in range(3)
        }
        from_peft(base, changed("tinylora", lambda held: held | drawn))
    with pytest.raises(ConfigError, match="save_only_topk_weights is True"):
        from_peft(base, changed("vblora", save_only_topk_weights=True))
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters()), "a refusal leaves nothing behind"


@pytest.mark.parametrize("name", ["shira", "supertuning"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_entries_beside_a_weight_have_pefts_gradients_and_merge_as_there(name: str, arch: str, tmp_path: Path) -> None:
    tuned, model = made(name, 1, arch, "")
    to_peft(tuned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "ours"), is_trainable=True).eval()
    batch = whole_rows(model)
    model(**batch).loss.backward()
    theirs(**batch).loss.backward()
    values = {n: p.grad for n, p in tuned.trained().items() if n.endswith(".values")}
    there = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad and name in n}
    assert len(values) == len(there) > 0
    for mine, other in zip(values.values(), there.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    tuned.merging.fold()
    weights = dict(theirs.merge_and_unload().named_parameters())
    for site in tuned.anatomy.all_sites:
        if site.key in tuned.modules():
            ours = tuned.model.get_submodule(site.path).weight
            torch.testing.assert_close(ours, weights[f"{site.path}.weight"], rtol=1e-5, atol=1e-5)
