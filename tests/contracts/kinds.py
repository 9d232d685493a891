"""One method of every kind of edit, with sizes of a tiny model, and what the tests of surgery do with them."""

from typing import Any

import pytest
import torch
from cells import shake
from tiny import inputs, tiny
from tiny_methods import settings, small
from torch import Tensor

from luthier.core import AnatomyError
from luthier.surgery import Method, Tuned, attach, method

# name -> settings. The comment names the edit that it stands for.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},  # Attach, a change of the weight
    "ia3": {},  # Attach, a scale
    "sequential_adapter": {"width": 6},  # Attach at a sublayer's end, and Unfreeze
    "bitfit": {},  # Unfreeze
    "child_tuning_d": {"share": 0.3},  # Unfreeze with a mask
    "prompt_tuning": {"length": 3},  # PrependTokens
    "prefix_tuning": {"length": 3},  # PrependKeys
    "lst": {},  # AddBranch
    "intrinsic_said": {},  # Reparametrise
}


def make(name: str) -> Method:
    return method(name, {**settings(name), **KINDS[name]})


def prepared(tuned: Tuned, batch: dict[str, Tensor]) -> Tuned:
    """Methods that look at data have seen two batches."""
    for tuning in tuned.tunings.values():
        for part in tuning.method.parts():
            if part.looks_at_data:
                part.prepare(tuned, [lambda: tuned.model(**batch).loss] * 2)
    return tuned


def with_twin(name: str, short: Any, plain: Any) -> tuple[Tuned, Tuned] | None:
    """The method on a model of quantised layers, and on the same function in plain ones; None where it is refused."""
    names = list(short.state_dict())
    try:
        tuned = attach(short, small(name), train_head=False)
    except AnatomyError as error:
        if not any(words in str(error) for words in ("quantised", "no new task head", "bias")):
            with pytest.raises(AnatomyError):  # then it goes with no decoder, whatever its layers hold
                attach(plain, small(name), train_head=False)
        assert list(short.state_dict()) == names
        return None
    return tuned, attach(plain, small(name), train_head=False)


def shaken(name: str, arch: str = "gpt2", task: str = "", **more: Any) -> tuple[Tuned, Any, dict[str, Tensor]]:
    """The method on a tiny model, every trained number moved off its start."""
    model = tiny(arch, task)
    batch = inputs(model, **more)
    tuned = prepared(attach(model, make(name)), batch)
    model.eval()
    shake(tuned)
    return tuned, model, batch


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    given = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        out: Tensor = model(**given).logits
    return out


def tokenizer(size: int = 131) -> Any:
    """Words w4 to w130 and four special tokens; pads on the left, as text generation wants it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, size)}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=40,
    )
