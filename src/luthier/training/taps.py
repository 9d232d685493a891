"""What stands inside a model in one pass: projections of its attentions, and the states between its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task

__all__ = ["heads_apart", "layer_sites", "real_pairs", "seen_inside", "targets_by_row"]


@contextmanager
def seen_inside(model: nn.Module, sites: Iterable[Site], *, start: str = "") -> Iterator[dict[str, Tensor]]:
    """Within, what a pass gives at each site stands under the site's key, with its graph: (rows, tokens, width).

    What a tuning adds at the site is in it. A prompt's vectors in front of the text are not told apart.

    Args:
        start: path of a block; what it reads stands under "start".
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            handle = model.get_submodule(site.path).register_forward_hook(_keeper(found, site))
            stack.callback(handle.remove)
        if start:

            def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
                found["start"] = args[0] if args else kwargs["hidden_states"]

            stack.callback(model.get_submodule(start).register_forward_pre_hook(entered, with_kwargs=True).remove)
        yield found


def _keeper(found: dict[str, Tensor], site: Site) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        value: Tensor = out if isinstance(out, Tensor) else out[0]
        found[site.key] = value if site.rows is None else value[..., list(site.rows.indices())]

    return hook


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """(rows, tokens, width) -> (rows, heads, tokens, width / heads)."""
    return x.view(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)


def real_pairs(batch: Batch, width: int, *, causal: bool) -> Tensor:
    """Which token may look at which, padding left out: (rows, tokens, tokens).

    Raises:
        ConfigError: `width` tokens came out where the text has others: a prompt stands in front of it.
    """
    real = batch.inputs["attention_mask"].bool()  # (rows, tokens)
    if real.shape[1] != width:
        raise ConfigError(
            f"a pass over {real.shape[1]} tokens has {width} inside: a prompt of the method stands in front of the "
            "text, so tokens of teacher and student cannot be told which is which. Use a method without a prompt."
        )
    pairs = real[:, :, None] & real[:, None, :]
    return pairs.tril() if causal else pairs


def targets_by_row(task: Task, batch: Batch) -> Tensor:
    """How many numbers of the loss each row has: (rows,). A row's own term counts as often, however a step is cut."""
    rows = len(batch.rows)
    labels = batch.labels
    if task.name in ("classification", "regression") or labels is None:
        return torch.ones(rows, device=batch.inputs["input_ids"].device)
    carried = labels[:, 1:] if task.name == "causal_lm" else labels
    return (carried != IGNORED).sum(-1).float()


def layer_sites(anatomy: Anatomy, kind: str) -> list[Site]:
    """The sites of one kind, one for each layer, in order.

    Raises:
        AnatomyError: the model has none.
    """
    found = sorted((s for s in anatomy.all_sites if s.kind == kind and s.layer is not None), key=lambda s: s.layer or 0)
    if not found:
        raise AnatomyError(f"{anatomy.model_type} has no place {kind}. Use another model.")
    return found
