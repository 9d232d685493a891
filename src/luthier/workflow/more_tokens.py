"""A model with further tokens, as a folder of its own: a base like any other, on which a tuning trains their rows.

A new token begins as the mean of all tokens that the tokenizer has, in the table of the words, and in a matrix and a
bias of the output where these are not the table itself. It takes a row that no token has, where the table is longer
than the vocabulary; otherwise rows are added. Everything else is copied bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import ConfigError, DataError, ModelError
from luthier.core.places import refuse_taken
from luthier.runs import durable
from luthier.trust import safetensors
from luthier.workflow.load_model import Source, find_model, load_config, load_tokenizer, quiet

__all__ = ["add_tokens", "read_tokens"]


def read_tokens(path: Path | str) -> list[str]:
    """The tokens of a file, one a line.

    Raises:
        DataError: no such file, an empty line, a blank at an edge, or a token twice; says which line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}). Give a file with a token on each line.") from error
    if not lines:
        raise DataError(f"{path}: holds no token. Give one on each line.")
    for number, line in enumerate(lines, 1):
        if not line or line != line.strip():
            raise DataError(f"{path}:{number}: {line!r} is no token: it is empty, or has a blank at an edge.")
        if line in lines[: number - 1]:
            raise DataError(f"{path}:{number}: {line!r} stands there twice. Name each token once.")
    return lines


def add_tokens(model: str, tokens: Sequence[str], out: Path | str) -> list[int]:
    """Write the model with further tokens to a folder, and give their ids.

    >>> from luthier.workflow.more_tokens import add_tokens
    >>> add_tokens("sample:smollm2-135m", ["[Search]", "[Quote]"], "with-tokens")
    [49152, 49153]

    Args:
        model: a folder, sample:NAME, or a hub name.
        out: must not exist.

    Raises:
        ConfigError: nothing to add, a token that is there already, or `out` is there.
        ModelError: a tensor as long as the vocabulary whose part is not known.
    """
    source, out = find_model(model), Path(out).absolute()
    refuse_taken(out)
    tokenizer = load_tokenizer(source)
    ids = _ids_of(tokenizer, tokens, model)
    known = len(tokenizer) - len(ids)
    tensors = {name: tensor for path in source.folder.weights for name, tensor in safetensors.read(path).items()}
    names, rows = _by_vocabulary(source, tensors)
    if known > rows:
        raise ModelError(f"{model}: its tokenizer has {known} tokens and its table {rows} rows: they are no pair.")
    size = max(rows, max(ids) + 1)
    for name, axis in names.items():
        tensors[name] = _grown(tensors[name], axis, known, ids, size)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(held for held in config.values() if isinstance(held, dict))):
        if part.get("vocab_size") == rows:
            part["vocab_size"] = size
    from safetensors.torch import save_file

    with durable.folder(out) as draft:
        with quiet():
            tokenizer.save_pretrained(draft.path)
        save_file({n: t.contiguous() for n, t in tensors.items()}, draft.path / "model.safetensors", {"format": "pt"})
        (draft.path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        settings = source.path / "generation_config.json"
        if settings.is_file():
            (draft.path / settings.name).write_bytes(settings.read_bytes())
    return ids


def _ids_of(tokenizer: Any, tokens: Sequence[str], model: str) -> list[int]:
    """Adds the tokens to the tokenizer; each is one piece wherever it stands, and is shown where texts are decoded."""
    from tokenizers import AddedToken

    if not tokens:
        raise ConfigError("no token is named. Give one at least.")
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        raise ConfigError(f"{model}: has the token {there[0]!r} already, with the id {known[there[0]]}. Leave it out.")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]
    if len(set(ids)) < len(tokens) or set(ids) & set(known.values()):
        raise ModelError(f"{model}: its tokenizer gave the new tokens ids that are taken. Use another tokenizer.")
    return ids


def _by_vocabulary(source: Source, tensors: dict[str, Tensor]) -> tuple[dict[str, int], int]:
    """Tensors with a row for each word, and on which axis; and how many rows that is.

    Raises:
        ModelError: another tensor is as long, and its part is not known.
    """
    import transformers

    config = load_config(source)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ModelError(f"{source.name}: config.json names no architecture that is known. Name it there.")
    with quiet(), torch.device("meta"):
        model = cls(config)
    names = {id(p): n for n, p in model.named_parameters()}
    table = model.get_input_embeddings().weight
    head, rows = model.get_output_embeddings(), int(table.shape[0])
    wanted = {names[id(table)]}
    wanted |= {n for n, p in model.named_parameters(remove_duplicate=False) if p is table}
    if head is not None and head.weight.shape[0] == rows:
        wanted |= {n for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight or p is head.bias}
    wanted |= {n for n in tensors if n.endswith(("final_logits_bias", "predictions.bias", "predictions.decoder.bias"))}
    found = {n: list(t.shape).index(rows) for n, t in tensors.items() if n in wanted and rows in t.shape}
    strange = [n for n, t in tensors.items() if rows in t.shape and n not in found]
    if names[id(table)] not in found and not found:
        raise ModelError(f"{source.name}: its weights hold no {names[id(table)]}, the table of the words.")
    if strange:
        raise ModelError(
            f"{source.name}: {strange[0]} is as long as the vocabulary ({rows}), and what it is for is not known. Add "
            "the tokens with transformers' resize_token_embeddings."
        )
    return found, rows


def _grown(tensor: Tensor, axis: int, known: int, ids: Sequence[int], size: int) -> Tensor:
    """The tensor with as many rows, the new tokens' being the mean of the known ones."""
    moved = tensor.movedim(axis, 0)
    mean = moved[:known].double().mean(0).to(tensor.dtype)
    whole = torch.cat([moved, mean.expand(max(0, size - len(moved)), *mean.shape)])
    whole[list(ids)] = mean
    return whole.movedim(0, axis)
