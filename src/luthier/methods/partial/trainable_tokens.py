"""Trainable tokens: train the vectors of chosen tokens, and nothing else.

    E'[t] = E[t] + m_t for t in `tokens`, E elsewhere      m: (tokens, d)

m starts at zero, so the tuned model starts as the base model. Where a model that writes words reads and writes with one
matrix, both move; where it has two, `output_matrix` says whether the second's rows train too, by numbers of their own.

TrainableTokens of the peft library, github:huggingface/peft/pull/1541; there is no paper. peft stores the new vectors,
this file what was added to them: a tuning is read on the very base that it was made on.

Count: tokens times d; twice that for two matrices.
Claims: new tokens can be taught without the megabytes of the whole table.
Use it when: tokens were added to the vocabulary (before attaching); beside a method for the rest,
trainable_tokens+lora.
Not when: it stands alone on a task that is not about those tokens.
Pitfalls: the table is put together in every pass, and its gradient is as large as the table; ids, not words, are named;
ids that the data never hold learn nothing. Without `tokens` the whole table trains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError
from luthier.methods.parts.peft_rows import rows_form
from luthier.surgery import METHODS, Edit, Method, PeftForm, Reparametrise


@METHODS.register("trainable_tokens", family="partial", paper="github:huggingface/peft/pull/1541")
@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Settings of trainable tokens."""

    tokens: Annotated[tuple[int, ...], "ids of the tokens whose vectors train; none for all"] = ()
    output_matrix: Annotated[bool, "also their rows of an output matrix that is not the table itself"] = True

    mergeable: ClassVar[bool] = True
    start_is_drawn: ClassVar[bool] = False
    computes_tensors: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, object]] = {"lr": 3e-2}
    peft: ClassVar[PeftForm | None] = rows_form()

    def __post_init__(self) -> None:
        twice = sorted({t for t in self.tokens if self.tokens.count(t) > 1})
        if twice:
            raise ConfigError(f"trainable_tokens.tokens: {twice[0]} stands there twice. Name each token once.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from (Reparametrise(n, MovedRows(self.tokens, anatomy.tensors[n])) for n in self._tables(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        tables = [anatomy.tensors[name] for name in self._tables(anatomy)]
        return sum((len(self.tokens) or rows) * width for rows, width in tables)

    def _tables(self, anatomy: Anatomy) -> list[str]:
        """The table of the words, and the output matrix where it is another.

        Raises:
            ConfigError: an id that the table does not have.
        """
        table = anatomy.sites("embed", asked_by="trainable_tokens")[0]
        strange = [t for t in self.tokens if not 0 <= t < table.d_in]
        if strange:
            raise ConfigError(
                f"trainable_tokens.tokens: {strange[0]} is no row of the {table.d_in} of {table.path}. Ids count from "
                "0; add new tokens to the model before you attach."
            )
        heads = [s for s in anatomy.all_sites if s.kind == "head" and s.d_out == table.d_in and self.output_matrix]
        names = [f"{site.path}.{site.param}" for site in (table, *heads)]
        return list(dict.fromkeys(anatomy.tied.get(name, name) for name in names))


class MovedRows(nn.Module):
    """A table some rows of which are moved."""

    index: Tensor

    def __init__(self, tokens: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__()
        rows = tokens or range(shape[0])
        self.moves = nn.Parameter(torch.zeros(len(rows), *shape[1:]))
        self.register_buffer("index", torch.tensor(list(rows)), persistent=False)

    def forward(self, frozen: Tensor) -> Tensor:
        return frozen.index_add(0, self.index, self.moves.to(frozen.dtype))
