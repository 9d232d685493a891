"""What a model that has learnt nothing yet would put into gaps: words for a template, and templates themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core import ModelError
from luthier.data.batches import EvalBatches
from luthier.data.cloze import as_cloze
from luthier.data.encode import encode
from luthier.data.load_data import load_data
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_length, choose_pad
from luthier.runs.spec import RunSpec
from luthier.training.gap_words import gaps_of
from luthier.training.precision import choose_device
from luthier.training.recipe import Guesses
from luthier.workflow.load_model import collator_of, find_model, load_config, load_model, load_tokenizer

__all__ = ["guess_words", "write_fillings"]


def guess_words(spec: RunSpec, table: Table) -> Guesses:
    """How likely the spec's model, as it is, finds each word of its vocabulary in the gap of each row.

    Args:
        spec: with a template; where it has no words, any will do, since no label is read.

    Raises:
        Any LuthierError: of a run of this spec.
    """
    source = find_model(spec.model)
    config, tokenizer = load_config(source), load_tokenizer(source)
    data = load_data(spec.data, spec.task, config)
    assert spec.data.template is not None
    words = spec.data.words
    if words is None:
        whole = _whole_words(tokenizer, len(tokenizer), spec.data.template).values()
        words = ", ".join(
            f"{label}={word}" for label, word in zip(data.task.labels, dict.fromkeys(whole), strict=False)
        )
    # No rows are shown beside: what is searched are words for the question alone.
    task = as_cloze(data.task, spec.data.template, words, data.columns, tokenizer, config)
    model, device = _model(spec, task)
    n_vocab = int(model.get_input_embeddings().weight.shape[0])
    pad = choose_pad(tokenizer, n_vocab).id
    examples = encode(
        table, data.columns, task, tokenizer, n_vocab=n_vocab, with_targets=False,
        max_length=choose_length(spec.max_length, tokenizer, config, task, 0),
    )  # fmt: skip
    collator = collator_of(task, model, tokenizer, pad_id=pad, pad_to=1, seed=0)
    found = np.zeros((len(table), n_vocab), dtype=np.float32)
    vectors = model.get_output_embeddings().weight.detach().float().cpu().numpy()  # (vocabulary, d)
    states = np.zeros((len(table), vectors.shape[1]), dtype=np.float32)
    seen: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        for batch in EvalBatches(examples, collator, spec.batch.tokens):
            inputs = batch.to(device).inputs
            logits: Tensor = model(**inputs).logits  # (rows, tokens, vocabulary)
            gaps, rows = gaps_of(task, inputs), examples.rows[batch.rows]
            found[rows] = logits[gaps].float().log_softmax(-1).cpu().numpy()
            states[rows] = seen.pop()[gaps].float().cpu().numpy()
    known = _whole_words(tokenizer, n_vocab, spec.data.template)
    return Guesses(chances=found, words=known, states=states, vectors=vectors)


def _whole_words(tokenizer: Any, n_vocab: int, template: str) -> dict[int, str]:
    """Id -> word, of the ids that are a word of letters by itself and that the word, read again, gives."""
    written = [tokenizer.decode([i]).strip() for i in range(min(n_vocab, len(tokenizer)))]
    words = {i: word for i, word in enumerate(written) if word.isalpha() and word.isascii()}
    blank = " " if " {mask}" in template else ""
    again = tokenizer([blank + word for word in words.values()], add_special_tokens=False)["input_ids"]
    return {i: word for (i, word), ids in zip(words.items(), again, strict=True) if ids == [i]}


def write_fillings(spec: RunSpec, model: str, texts: Sequence[str], *, beams: int, most: int) -> list[tuple[str, str]]:
    """What a T5 puts into the two gaps of all texts alike: a beam whose scores are summed over the texts.

    Args:
        model: of the T5.
        texts: each with {0} and {1} where its gaps are.
        most: tokens that are written, at most.

    Returns:
        what stands in the first and in the second gap, likeliest first.

    Raises:
        ModelError: a model without sentinels, or that is no encoder-decoder.
    """
    source = find_model(model)
    tokenizer = load_tokenizer(source)
    marks = [tokenizer.get_vocab().get(f"<extra_id_{i}>") for i in range(3)]
    if None in marks or not load_config(source).is_encoder_decoder:
        raise ModelError(f"{model}: templates are written by a T5, whose tokenizer has sentinels. Name one.")
    writer, device = _model(spec, Task(name="seq2seq"), model)
    said = [text.format("<extra_id_0>", "<extra_id_1>") for text in texts]
    read = tokenizer(said, padding=True, truncation=True, return_tensors="pt").to(device)
    ends = {tokenizer.eos_token_id, marks[2]}
    living: list[tuple[float, list[int]]] = [(0.0, [marks[0]])]
    done: list[tuple[float, list[int]]] = []
    with torch.inference_mode():
        states = writer.get_encoder()(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        start = writer.config.decoder_start_token_id
        for _ in range(most):
            grown = []
            for score, ids in living:
                begun = torch.tensor([[start, *ids]] * len(texts), device=device)
                out = writer(encoder_outputs=states, attention_mask=read["attention_mask"], decoder_input_ids=begun)
                summed = out.logits[:, -1].double().log_softmax(-1).sum(0)  # over texts: (vocabulary,)
                top = summed.topk(min(beams, len(summed)))
                grown += [(score + float(v), [*ids, int(i)]) for v, i in zip(top.values, top.indices, strict=True)]
            grown.sort(key=lambda one: -one[0])
            done += [one for one in grown[:beams] if one[1][-1] in ends]
            living = [one for one in grown[:beams] if one[1][-1] not in ends]
            if not living:
                break
    found = dict.fromkeys(_parted(tokenizer, ids, marks) for _, ids in sorted(done + living, key=lambda one: -one[0]))
    return [one for one in found if one is not None]


def _parted(tokenizer: Any, ids: list[int], marks: Sequence[int]) -> tuple[str, str] | None:
    """The texts of both gaps; None where a second one was not begun, or what is written would be read as a field."""
    if ids.count(marks[1]) != 1:
        return None
    at = ids.index(marks[1])
    both = (ids[1:at], ids[at + 1 :])
    first, second = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in both)
    return None if set("{}|") & set(first + second) else (first, second)


def _model(spec: RunSpec, task: Task, name: str | None = None) -> tuple[Any, torch.device]:
    device = choose_device(spec.device)
    model, _ = load_model(find_model(name or spec.model), task, dtype=torch.float32, device=device, seed=spec.seed)
    return model.eval(), device
