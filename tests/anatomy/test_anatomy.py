"""What an anatomy says of a model as a whole: counts, names, what is tied, shared or absent."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn
from unusual import UNUSUAL

from luthier.anatomy import ARCHITECTURES, KINDS, Anatomy, Rows, Site
from luthier.core import AnatomyError

torch.set_num_threads(1)

EVERY = (*tiny.TINY, *tiny.ALSO)
CELLS = [(name, task) for name in EVERY for task in tiny.tasks(name)]


def read(name: str, task: str = "", **changes: Any) -> Anatomy:
    return Anatomy.read(tiny.tiny(name, task, device="meta", **changes))


# -- counts and names --------------------------------------------------------------------------------------------------

# Ends of the names of all parameters that belong to no site, in any of the models.
NO_SITE = (
    "position_embeddings.weight",
    "position_embeddings",
    "positions_embed.weight",
    "embed_positions.weight",
    "token_type_embeddings.weight",
    "wpe.weight",
    "relative_attention_bias.weight",
    "rel_embeddings.weight",
    "cls_token",
    "projection.weight",  # patches
    "projection.bias",
    "embedding_hidden_mapping_in.weight",
    "embedding_hidden_mapping_in.bias",
    "embeddings_project.weight",
    "embeddings_project.bias",
    "project_in.weight",
    "project_out.weight",
    "mlp.gate.weight",  # routers
    "mlp.router.weight",
    "mlp.router.bias",
    "shared_expert_gate.weight",
    "self_attn.sinks",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "pooler.weight",
    "pooler.bias",
    "head.dense.weight",
    "head.dense.bias",
    "classifier.dense.weight",
    "classifier.dense.bias",
    "pre_classifier.weight",
    "pre_classifier.bias",
)


@pytest.mark.parametrize(("name", "task"), CELLS)
def test_sites_and_named_leftovers_add_up_to_the_whole_model(name: str, task: str) -> None:
    model = tiny.tiny(name, task, device="meta")
    anatomy = Anatomy.read(model)
    covered = set()
    for site in anatomy.all_sites:
        if site.n_params:
            covered.add(f"{site.path}.{site.param}")
            covered |= {f"{site.path}.{site.bias}"} if site.bias else set()
    covered = {anatomy.tied.get(tensor, tensor) for tensor in covered}
    left = {tensor: shape for tensor, shape in anatomy.tensors.items() if tensor not in covered}
    strangers = [t for t in left if not t.endswith(NO_SITE)]
    assert not strangers
    n_left = sum(torch.Size(shape).numel() for shape in left.values())
    assert sum(s.n_params for s in anatomy.all_sites) + n_left == anatomy.n_params
    assert anatomy.n_params == sum(p.numel() for p in model.parameters())
    assert sum(torch.Size(shape).numel() for shape in anatomy.tensors.values()) == anatomy.n_params


@pytest.mark.parametrize(("name", "task"), CELLS)
def test_the_meta_device_gives_the_same_anatomy_as_real_weights(name: str, task: str) -> None:
    assert read(name, task) == Anatomy.read(tiny.tiny(name, task))


@pytest.mark.parametrize("name", EVERY)
def test_keys_are_unique_and_kinds_come_from_the_vocabulary(name: str) -> None:
    anatomy = read(name)
    keys = [site.key for site in anatomy.all_sites]
    assert len(set(keys)) == len(keys)
    assert {site.kind for site in anatomy.all_sites} <= set(KINDS)
    assert anatomy.kinds() == [k for k in KINDS if k in anatomy.kinds()]
    assert not anatomy.unknown


@pytest.mark.parametrize("name", EVERY)
def test_paths_lead_to_modules_and_parameters_of_the_stated_shape(name: str) -> None:
    model = tiny.tiny(name, device="meta")
    anatomy = Anatomy.read(model)
    for site in anatomy.all_sites:
        module = model.get_submodule(site.path)
        for path in (site.input_path, site.residual_path):
            assert path is None or isinstance(model.get_submodule(path), nn.Module)
        if site.kind.startswith(("attn.", "cross.", "ffn.", "head")) and site.rows is None:
            shape = (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
            assert module.weight.shape == shape
            assert (module.bias is not None) == (site.bias is not None) if hasattr(module, "bias") else True
    for attention in anatomy.attentions:
        assert isinstance(model.get_submodule(attention.path), nn.Module)
    assert not anatomy.backbone or isinstance(model.get_submodule(anatomy.backbone), nn.Module)


def test_keys_read_as_promised() -> None:
    def keys(name: str, *kinds: str, task: str = "") -> list[str]:
        return [site.key for site in read(name, task).sites(*kinds)]

    assert keys("llama", "attn.q") == ["attn.q@0", "attn.q@1", "attn.q@2"]
    assert keys("bert", "norm") == [
        "norm@0.0",
        "norm@0.1",
        "norm@1.0",
        "norm@1.1",
        "norm@2.0",
        "norm@2.1",
        "norm@embed",
    ]
    assert keys("llama", "norm")[-1] == "norm@final" and keys("gpt2", "embed", "head") == ["embed", "head"]
    assert keys("t5", "cross.q") == ["cross.q@decoder.0", "cross.q@decoder.1"]
    assert keys("t5", "embed") == ["embed@encoder", "embed@decoder"]
    assert "experts.up@1#2" in keys("mixtral", "experts")
    assert "norm@head" in keys("modernbert", "norm", task="classification")
    assert "norm@relative" in keys("deberta-v2", "norm")


def test_rows_name_the_rows_of_a_fused_layer() -> None:
    d, dh, heads = tiny.HIDDEN, tiny.HEAD_DIM, tiny.HEADS
    key = read("gpt2").sites("attn.k", layers=[1])[0]
    assert key.rows == Rows(offset=d, width=d, stride=3 * d) and key.transposed
    value = read("gpt-neox").sites("attn.v", layers=[0])[0]
    assert value.rows == Rows(offset=2 * dh, width=dh, stride=3 * dh, groups=heads) and not value.transposed
    assert value.rows.indices()[:3] == (24, 25, 26) and value.rows.indices()[dh] == 3 * dh + 2 * dh
    phi = read("phi3").sites("attn.v", layers=[0])[0]
    assert phi.rows == Rows(offset=72, width=24, stride=96) and phi.d_out == 24
    oss = read("gpt-oss").sites("experts.up", layers=[0])[0]
    assert oss.rows is not None and oss.rows.indices()[:3] == (1, 3, 5) and oss.transposed


# -- the model as a whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_widths_and_heads_are_those_of_the_configuration(name: str) -> None:
    anatomy = read(name)
    inner = {"bloom": 192, "openai-gpt": 192, "qwen3-moe": 56, "qwen2-moe": 64, "gpt-oss": 48}
    grouped = (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "mixtral",
        "glm4",
        "glm",
        "olmo2",
        "phi",
    )
    grouped += ("olmoe", "qwen3-moe", "qwen2-moe", "gpt-oss", "modernbert-decoder")
    narrow = ("mistral", "qwen3", "gemma2", "gemma3", "t5", "t5-v1.1", "glm", "glm4")
    assert anatomy.d == tiny.HIDDEN and anatomy.n_heads == tiny.HEADS
    assert anatomy.d_head == (10 if name in narrow else tiny.HEAD_DIM)
    if name != "modernbert-decoder":
        assert anatomy.n_kv_heads == (tiny.KV_HEADS if name in grouped else tiny.HEADS)
    if name != "qwen2-moe":
        assert anatomy.m == inner.get(name, tiny.INNER)
    assert anatomy.vocab_size == (None if name == "vit" else tiny.VOCAB)
    unbounded = ("t5", "t5-v1.1", "bloom", "vit")
    assert anatomy.max_positions == (None if name in unbounded else tiny.POSITIONS)


def test_max_positions_is_what_the_model_can_run() -> None:
    for name in ("bert", "roberta", "mpnet", "gpt2", "opt", "distilbert"):
        model = tiny.tiny(name)
        limit = Anatomy.read(model).max_positions
        assert limit is not None
        batch = {k: v for k, v in tiny.inputs(model, length=limit, padded=False).items() if k != "labels"}
        with torch.no_grad():
            model(**batch)
            longer = torch.cat([batch["input_ids"], batch["input_ids"][:, :1]], 1)
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_decoders_and_encoders_are_told_apart_by_their_attention() -> None:
    decoders = {n for n in EVERY if read(n).is_decoder}
    encoders = {"bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "modernbert", "vit"}
    assert decoders == set(EVERY) - encoders - {"t5", "t5-v1.1", "bart", "mbart"}
    both = read("t5")
    assert both.is_encoder_decoder and not both.is_decoder
    causal = {(a.stack, a.cross): a.causal for a in both.attentions}
    assert causal == {("encoder", False): False, ("decoder", False): True, ("decoder", True): False}


@pytest.mark.parametrize("name", [n for n in EVERY if n != "vit"])
def test_a_causal_attention_cannot_see_ahead(name: str) -> None:
    """Changing the last token leaves all earlier outputs alone in a decoder, and in no encoder."""
    model = tiny.tiny(name, "base")
    anatomy = Anatomy.read(model)
    batch = tiny.inputs(model, padded=False)
    words = "decoder_input_ids" if anatomy.is_encoder_decoder else "input_ids"
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        batch[words] = batch[words].clone()
        batch[words][:, -1] = 9 + (batch[words][:, -1] == 9).long()
        after = model(**batch).last_hidden_state
    same = torch.allclose(before[:, 0], after[:, 0], atol=1e-6)
    assert same == any(a.causal for a in anatomy.attentions)


def test_norm_order_is_read_from_the_code() -> None:
    post = {"bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "bart", "openai-gpt", "olmo2"}
    assert {n for n in EVERY if not read(n).pre_norm} == post
    assert not read("opt", do_layer_norm_before=False).pre_norm


def test_bloom_may_take_the_normed_stream_as_its_residual() -> None:
    plain = read("bloom").sites("ffn_out")[0]
    other = read("bloom", apply_residual_connection_post_layernorm=True).sites("ffn_out")[0]
    assert plain.residual_path == "transformer.h.0.post_attention_layernorm"
    assert other.residual_path == other.input_path == "transformer.h.0.mlp.dense_h_to_4h"


def test_albert_has_one_block_that_all_layers_share() -> None:
    model = tiny.tiny("albert")
    anatomy = Anatomy.read(model)
    assert anatomy.n_layers == 3 and len(anatomy.blocks) == 1
    (query,) = anatomy.sites("attn.q")
    assert query.shared == 3 and query.key == "attn.q@0"
    calls: list[int] = []
    handle = model.get_submodule(query.path).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**tiny.inputs(model))
    handle.remove()
    assert len(calls) == query.shared
    groups = read("albert", num_hidden_groups=2, num_hidden_layers=4)
    assert [b.layer for b in groups.blocks] == [0, 1] and groups.n_layers == 4
    assert [s.shared for s in groups.sites("attn.q")] == [2, 2]


def test_tied_weights_are_flagged_and_counted_once() -> None:
    tied = read("gpt2")
    embed, head = tied.sites("embed")[0], tied.sites("head")[0]
    assert embed.tied and head.tied and head.n_params == 0
    assert tied.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in tied.tensors
    free = read("gpt2", tie_word_embeddings=False)
    assert not free.sites("embed")[0].tied and free.sites("head")[0].n_params == tiny.VOCAB * tiny.HIDDEN
    assert free.n_params == tied.n_params + tiny.VOCAB * tiny.HIDDEN
    t5 = read("t5")
    assert [s.n_params for s in t5.sites("embed")] == [tiny.VOCAB * tiny.HIDDEN, 0]


def test_head_tensors_are_what_a_pretrained_checkpoint_lacks() -> None:
    def heads(name: str, task: str) -> set[str]:
        return set(read(name, task).head_tensors)

    assert heads("bert", "classification") == {"classifier.weight", "classifier.bias"}
    assert heads("roberta", "classification") == {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    assert heads("llama", "classification") == {"score.weight"}
    assert heads("llama", "lm") == heads("t5", "seq2seq") == heads("bert", "base") == set()
    masked = hf.BertForMaskedLM(tiny.config_of("bert"))
    assert Anatomy.read(masked).head_tensors == ()
    for name, task in CELLS:
        model = tiny.tiny(name, task, device="meta")
        anatomy = Anatomy.read(model)
        if anatomy.head_tensors:
            base = tiny.tiny(name, "base", device="meta")
            inside = {n.removeprefix(f"{anatomy.backbone}.") for n in anatomy.tensors if n not in anatomy.head_tensors}
            assert inside <= {n for n, _ in base.named_parameters()}


def test_bias_and_norm_tensors_are_named() -> None:
    model = tiny.tiny("bert", "classification", device="meta")
    anatomy = Anatomy.read(model)
    wanted = {n for n, _ in model.named_parameters() if n.endswith(".bias") and not n.startswith("classifier")}
    assert set(anatomy.bias_tensors()) == wanted
    assert set(anatomy.bias_tensors("attn.q")) == {n for n in wanted if n.endswith("query.bias")}
    assert set(anatomy.norm_tensors()) == {n for n, _ in model.named_parameters() if "LayerNorm" in n}
    assert not [n for n in read("t5").bias_tensors() if "relative" in n]
    assert [n for n in read("gpt-oss").bias_tensors() if n.endswith("down_proj_bias")]
    assert len(read("gpt-oss").bias_tensors("experts")) == 2 * tiny.LAYERS


def test_roberta_base_has_the_counts_of_the_literature() -> None:
    """With the head's 592,130: LoRA r=8 on q and v 887,042 (294,912 of its own), BitFit 694,274 (102,144 biases)."""
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        model = hf.RobertaForSequenceClassification(config)
    anatomy = Anatomy.read(model)
    head = sum(torch.Size(anatomy.tensors[n]).numel() for n in anatomy.head_tensors)
    assert head == 592_130
    assert head + sum(8 * (s.d_in + s.d_out) for s in anatomy.sites("attn.q", "attn.v")) == 887_042
    biases = sum(torch.Size(anatomy.tensors[n]).numel() for n in anatomy.bias_tensors())
    assert head + biases == 694_274
    assert anatomy.max_positions == 512


def test_table_adds_up() -> None:
    for name in EVERY:
        anatomy = read(name)
        rows = anatomy.table()
        assert sum(row["count"] for row in rows) == len(anatomy.all_sites)
        assert sum(row["n_params"] for row in rows) == sum(s.n_params for s in anatomy.all_sites)
    row = next(r for r in read("bert").table() if r["site"] == "attn.q")
    assert row["path"] == "bert.encoder.layer.{}.attention.self.query" and row["shape"] == "48 x 48"
    assert row["count"] == 3 and row["n_params"] == 3 * 49 * 48


# -- asking for sites --------------------------------------------------------------------------------------------------


def test_sites_are_filtered_by_layer_and_stack() -> None:
    anatomy = read("t5")
    assert [s.key for s in anatomy.sites("attn.q", layers=[1])] == ["attn.q@encoder.1", "attn.q@decoder.1"]
    assert [s.key for s in anatomy.sites("attn.q", stack="decoder")] == ["attn.q@decoder.0", "attn.q@decoder.1"]
    assert {s.kind for s in read("llama").sites("ffn")} == {"ffn.gate", "ffn.up", "ffn.down"}
    assert read("llama").sites() == read("llama").all_sites
    assert {s.layer for s in read("llama").sites(layers=[1])} == {1}


@pytest.mark.parametrize(
    ("name", "kind", "needles"),
    [
        ("bert", "ffn.gate", ["lora: this bert model has no site 'ffn.gate'", "ffn.up", "ffn.down"]),
        ("vit", "embed", ["this vit model has no site 'embed'", "attn.q"]),
        ("bert", "cross.q", ["no site 'cross.q'", "attn.q"]),
        ("mixtral", "ffn.up", ["no site 'ffn.up'", "experts.up"]),
        ("llama", "attn.qq", ["no site is called 'attn.qq'", "Did you mean 'attn.q'"]),
        ("llama", "q_proj", ["no site is called 'q_proj'", "attn.q"]),
    ],
)
def test_an_absent_site_is_an_error_that_lists_what_there_is(name: str, kind: str, needles: list[str]) -> None:
    with pytest.raises(AnatomyError) as error:
        read(name, "classification" if name in ("bert", "vit") else "").sites("attn.o", kind, asked_by="lora")
    assert all(needle in str(error.value) for needle in needles), str(error.value)


def test_layers_and_stacks_that_are_not_there_are_errors() -> None:
    with pytest.raises(AnatomyError, match=r"none in layers \[7\]. It has layers 0 to 2"):
        read("bert").sites("attn.q", layers=[7])
    with pytest.raises(AnatomyError, match=r"none in the stack 'encoder'.*decoder, encoder"):
        read("t5").sites("cross.q", stack="encoder")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(AnatomyError, match="found no list of layers"):
        Anatomy.read(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))


# -- compositions and strangers ----------------------------------------------------------------------------------------


def test_an_encoder_decoder_of_two_berts_has_both_stacks() -> None:
    encoder = tiny.config_of("bert")
    decoder = tiny.config_of(
        "bert", is_decoder=True, add_cross_attention=True, intermediate_size=72, num_hidden_layers=2
    )
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = hf.EncoderDecoderModel(config).eval()
    anatomy = Anatomy.read(model)
    assert anatomy.is_encoder_decoder and anatomy.n_layers == 5
    assert [s.key for s in anatomy.sites("cross.q")] == ["cross.q@decoder.0", "cross.q@decoder.1"]
    assert {s.stack: s.d_out for s in anatomy.sites("ffn.up")} == {"encoder": tiny.INNER, "decoder": 72}
    assert [s.stack for s in anatomy.sites("embed")] == ["encoder", "decoder"]
    assert anatomy.sites("head")[0].d_out == tiny.VOCAB and anatomy.head_tensors == ()
    causal = {(a.stack, a.cross): a.causal for a in anatomy.attentions}
    assert causal == {("encoder", False): False, ("decoder", False): True, ("decoder", True): False}
    site = anatomy.sites("cross_out", layers=[0])[0]
    seen: list[Tensor] = []
    assert site.input_path is not None and site.path.endswith("crossattention.output.dropout")
    handle = model.get_submodule(site.path).register_forward_hook(lambda _, __, out: seen.append(out))
    ids = torch.arange(4, 11)[None]
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :5])
    handle.remove()
    assert seen[0].shape == (1, 5, tiny.HIDDEN)


def test_gpt2_with_cross_attention_splits_its_fused_layer_in_two_there() -> None:
    model = tiny.tiny("gpt2", add_cross_attention=True)
    anatomy = Anatomy.read(model)
    query, key, value = (anatomy.sites(f"cross.{letter}", layers=[0])[0] for letter in "qkv")
    assert query.path.endswith("crossattention.q_attn") and query.rows is None
    assert key.rows == Rows(0, 48, 96) and value.rows == Rows(48, 48, 96)
    assert key.path == value.path == "transformer.h.0.crossattention.c_attn"
    x, memory = torch.randn(2, 5, 48), torch.randn(2, 9, 48)
    fused = model.get_submodule(key.path)(memory)
    assert fused.shape == (2, 9, 96) and x.shape[-1] == query.d_in


class ToyAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.c_attn, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.c_attn(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class ToyBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.late_norm, self.early_norm = nn.LayerNorm(d), nn.LayerNorm(d)  # not in the order of use
        self.wide, self.thin = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)
        self.attention = ToyAttention(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.early_norm(x))
        return x + self.thin(self.wide(self.late_norm(x)).relu())


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy")
        self.blocks = nn.ModuleList(ToyBlock(6) for _ in range(2))


SHELF = '''"""Toy: keys come first."""

from luthier.anatomy import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("toy", model_types=("toy",))
class ToyTable(Architecture):
    fused = {"c_attn": Fused(("attn.k", "attn.q", "attn.v"))}
'''


def test_a_third_party_can_describe_its_architecture(tmp_path: Path) -> None:
    stranger = Anatomy.read(Toy())
    with pytest.raises(AnatomyError, match=r"order inside blocks\.0\.attention\.c_attn.* is not known"):
        stranger.sites("attn.q")
    assert stranger.unknown == ("blocks.0.attention.c_attn", "blocks.1.attention.c_attn")
    (tmp_path / "toy.py").write_text(SHELF)
    ARCHITECTURES.add_shelf(tmp_path)
    try:
        known = Anatomy.read(Toy())
    finally:
        ARCHITECTURES.remove_shelf(tmp_path)
    assert known.sites("attn.q", layers=[0])[0].rows == Rows(6, 6, 18)
    assert known.pre_norm and [s.path for s in known.sites("norm", layers=[0])] == [
        "blocks.0.early_norm",
        "blocks.0.late_norm",
    ]
    assert known.sites("ffn_out", layers=[0])[0].residual_path == "blocks.0.late_norm"
    assert known.sites("ffn_out", layers=[0])[0].path == "blocks.0.thin"


def test_every_table_of_an_architecture_is_used_by_a_tiny_model() -> None:
    spoken_for = {kind for card in ARCHITECTURES.cards() for kind in card.facts["model_types"]}
    built = {str(tiny.config_of(name).model_type) for name in EVERY}
    built |= {str(build().config.model_type) for build in UNUSUAL.values()}
    assert spoken_for <= built
    for name in ARCHITECTURES.names():
        assert ARCHITECTURES.get(name).name == name


def test_site_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = None; import importlib.util as u, pathlib; import luthier.core;"
    path = Path(__import__("luthier").__file__).parent / "anatomy" / "site.py"
    code += f"s = u.spec_from_file_location('site_alone', {str(path)!r}); m = u.module_from_spec(s);"
    code += "sys.modules['site_alone'] = m; s.loader.exec_module(m); print(m.Rows(0, 2, 4, 2).indices())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(0, 1, 4, 5)"


def test_sites_are_values() -> None:
    one, two = Site("attn.q", 0, "x", 2, 3), Site("attn.q", 0, "x", 2, 3)
    assert one == two and hash(one) == hash(two)


def test_what_is_no_module_is_refused_by_name() -> None:
    with pytest.raises(AnatomyError, match="str is no module of torch"):
        Anatomy.read("bert")  # type: ignore[arg-type]
