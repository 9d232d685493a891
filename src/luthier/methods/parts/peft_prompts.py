"""How vectors before the text stand in peft's files: one tensor for all, and a configuration that counts them.

peft puts the vectors before everything it is given, pads too, and counts the positions of the text from behind them; a
classifier of a decoder is read at the last token there is. So both compute the same for rows that begin with text,
and a classifier answers the same for rows that end with text.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from luthier.core import CannotMerge, ConfigError, IntegrityError
from luthier.surgery import PeftIn, PeftOut, PeftTaken, PeftWhole

__all__ = ["COUNTS", "ONE", "before_text", "prompt_facts", "prompt_form", "rows_before"]

ONE = "prompt_embeddings"
COUNTS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


def before_text(going: PeftOut) -> None:
    """Refuse what peft answers from another token than ours.

    Raises:
        CannotMerge: a classifier that reads its first token.
    """
    if going.answers == "SEQ_CLS" and not going.anatomy.is_decoder:
        raise CannotMerge(
            f"{going.method.name}: peft's classifier on this {going.anatomy.model_type} model reads the first vector "
            "of the prompt where ours reads the first token of the text. Export another method, or a model of tokens."
        )


def prompt_facts(going: PeftOut, length: int, width: int) -> dict[str, Any]:
    """What peft's configuration counts."""
    anatomy = going.anatomy
    heads = anatomy.n_heads
    layers = max(anatomy.depths.values())
    return dict(zip(COUNTS, (length, width, 1, heads, layers), strict=True))


def rows_before(coming: PeftIn, name: str = ONE) -> Tensor:
    """The vectors before the text, of a file that may hold those of a decoder behind them: no model of peft reads them.

    Raises:
        ConfigError: the configuration counts others.
        IntegrityError: there are none.
    """
    rows, length = coming.tensor(name), coming.facts.get("num_virtual_tokens")
    stacks = int(coming.facts.get("num_transformer_submodules") or 1)
    if rows.dim() != 2 or not isinstance(length, int) or len(rows) != length * stacks:
        raise ConfigError(f"{coming.where}: num_virtual_tokens is {length!r}, and the file has {list(rows.shape)}.")
    left = set(coming.tensors) - {name, "prefix_task_cols", "prefix_task_rows"}
    if left:
        raise IntegrityError(f"{coming.where}: {', '.join(sorted(left)[:3])} have no place in this model.")
    return rows[:length]


def prompt_form(
    type_: str,
    settings: Callable[[Mapping[str, Any]], dict[str, Any]],
    refuse: Callable[[PeftOut], str | None] = lambda going: None,
    *,
    said: Mapping[str, Any],
    ignored: tuple[str, ...],
) -> PeftWhole:
    """The form of a method that stores its vectors as `prompt.vectors`.

    Args:
        settings: ours beside the length, from peft's configuration.
        refuse: why such a tuning has no form there.
        said: further keys of peft's, and what they say; they act in training alone.
    """

    def out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, Any]]:
        before_text(going)
        why = refuse(going)
        if why:
            raise CannotMerge(f"{going.method.name}: {why}")
        vectors = going.stored["prompt.vectors"]
        return {ONE: vectors}, {**prompt_facts(going, *vectors.shape), **said}

    def back(coming: PeftIn) -> PeftTaken:
        rows = rows_before(coming)
        return PeftTaken({"length": len(rows), **settings(coming.facts)}, {"prompt.vectors": rows})

    return PeftWhole(type_, out=out, back=back, prefix="base_model.", also=COUNTS, ignored=(*said, *ignored))
