"""One block, run for all tokens or for some of each row: what belongs to a token goes with it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.core import AnatomyError
from luthier.surgery.block_run import BlockRun


class Block(nn.Module):
    """Says what it was given."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        self.seen = {"mask": attention_mask, "pair": position_embeddings, "ids": position_ids}
        return hidden_states + position_embeddings[0] * position_embeddings[1]


PICK = torch.tensor([[0, 2], [3, 4]])


def given(rows: int) -> tuple[Tensor, dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    pair = tuple(torch.randn(rows, 5, 3, generator=draw) for _ in range(2))
    mask = torch.arange(rows * 25).reshape(rows, 1, 5, 5).float()
    ids = torch.arange(5).expand(rows, 5)
    return torch.randn(2, 5, 3, generator=draw), {
        "attention_mask": mask,
        "position_embeddings": pair,
        "position_ids": ids,
    }


@pytest.mark.parametrize("rows", [1, 2])  # positions and masks may be shared by all rows
def test_positions_and_masks_are_those_of_the_tokens_that_are_picked(rows: int) -> None:
    block, (x, facts) = Block(), given(rows)
    call = BlockRun(lambda args, kwargs: block(*args, **kwargs), block, (x,), facts)
    whole = call(x)
    assert torch.equal(whole, x + facts["position_embeddings"][0] * facts["position_embeddings"][1])
    some = call(x, PICK)
    for row, places in enumerate(PICK.tolist()):
        assert torch.equal(some[row], whole[row, places])
        own = min(row, rows - 1)
        assert block.seen["ids"][row].tolist() == places
        assert torch.equal(block.seen["mask"][row, 0], facts["attention_mask"][own, 0][places][:, places])


def test_what_belongs_to_no_known_token_is_refused() -> None:
    block, (x, facts) = Block(), given(1)
    call = BlockRun(lambda args, kwargs: block(*args, **kwargs), block, (x,), {**facts, "bias": torch.ones(5)})
    with pytest.raises(AnatomyError, match="Block: it is given bias"):
        call(x, PICK)
