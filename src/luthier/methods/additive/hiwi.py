"""HiWi: a small network changes the biases themselves, and only the changed biases are kept.

    b' = b + f(b W_down) W_up          b: (n,)    W_down: (n, r)    W_up: (r, n), zero at the start

W_up starts at zero, so the tuned model starts as the base model. After training b' is computed once and the network is
dropped, so serving costs nothing. With of=weight each row of a weight takes the place of b.

Liao, Meng, Monz 2023, "Parameter-Efficient Fine-Tuning without Introducing New Latency", arXiv:2305.16742, section 3.
Whether layers share a network, whether it has biases and how W_up starts could not be checked: here each layer has its
own, and its own biases are a setting.

Count: sum of 2 n r over the biases, L (2 m r + 2 d r) in BERT; with `adapter_bias` r + n more for each. Stored: the new
biases alone, L (m + d), whatever the rank.
Claims: 0.03 % of RoBERTa-large stored.
Use it when: a tuning must be tens of kilobytes and merge, and biases alone learn too slowly.
Not when: the model has no biases, as most decoders since Llama.
Pitfalls: the network reads the same row at every step, so a unit that a ReLU has cut off stays cut off for ever, which
is why the bend is a smooth one here; a bias of zeros gives nothing to compute with, so its change stays zero without
`adapter_bias`; the network is many times what is stored, and is no measure of what is served.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site, is_projection
from luthier.core import AnatomyError, ConfigError, at_least
from luthier.methods.parts.own_tensors import own_modules
from luthier.surgery import METHODS, Edit, Method, Reparametrise, TunedView


@METHODS.register("hiwi", family="additive", paper="arXiv:2305.16742")
@dataclass(frozen=True, kw_only=True)
class HiWi(Method):
    """Settings of HiWi."""

    rank: Annotated[int, "inner width of the network", at_least(1)] = 4
    sites: Annotated[tuple[str, ...], "layers whose bias is changed"] = ("ffn.up", "ffn.down")
    of: Annotated[Literal["bias", "weight"], "what is changed: the bias, or each row of the weight"] = "bias"
    activation: Annotated[Literal["relu", "gelu", "tanh"], "the network's bend"] = "gelu"
    adapter_bias: Annotated[bool, "the network has biases of its own"] = False

    mergeable: ClassVar[bool] = True
    computes_tensors: ClassVar[bool] = True
    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[Mapping[str, Any]] = {"rank": 3}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for site in self._sites(anatomy):
            n = self._width(site)
            name = self._name(site)
            transposed = self.of == "weight" and site.transposed
            yield Reparametrise(
                anatomy.tied.get(name, name), Hidden(n, self.rank, self.activation, self.adapter_bias, transposed)
            )

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(
            2 * self._width(s) * self.rank + (self.rank + self._width(s) if self.adapter_bias else 0)
            for s in self._sites(anatomy)
        )

    def n_stored(self, anatomy: Anatomy) -> int:
        """The new values alone."""
        return sum(math.prod(anatomy.tensors[self._name(s)]) for s in self._sites(anatomy))

    def begin(self, tuned: TunedView) -> None:
        names = {self._name(site): site for site in self._sites(tuned.anatomy)}
        idle = []
        for name, module in zip(names, own_modules(self, tuned, Hidden), strict=True):
            module.__dict__["source"] = tuned.tensor(name)  # the frozen tensor itself: what is stored is made of it
            if not self.adapter_bias and not tuned.tensor(name).any():
                idle.append(name)
        if idle and len(idle) == len(names):
            raise ConfigError(f"hiwi: {idle[0]} and all others it would change are zero. Set adapter_bias=true.")
        if idle:
            warnings.warn(
                f"hiwi: {len(idle)} of {len(names)} tensors are zero, {idle[0]} among them, and will not change. "
                "Set adapter_bias=true, or leave them out of sites.",
                stacklevel=2,
            )

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, Hidden):
            module.restore(module.stored())

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        found = anatomy.sites(*self.sites, asked_by="hiwi.sites", fits=is_projection)
        for site in found:
            if not is_projection(site) or site.expert is not None or site.rows is not None:
                raise AnatomyError(f"hiwi.sites: {site.key} has no {self.of} of its own. Name other projections.")
            if self.of == "bias" and site.bias is None:
                raise AnatomyError(
                    f"hiwi: {site.key} of this {anatomy.model_type} model has no bias. Set of=weight, or use lora."
                )
        return found

    def _name(self, site: Site) -> str:
        return f"{site.path}.{site.bias if self.of == 'bias' else site.param}"

    def _width(self, site: Site) -> int:
        """Length of the rows that the network reads."""
        return site.d_out if self.of == "bias" else site.d_in


_BEND = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}


class Hidden(nn.Module):
    """A tensor of the model changed by a network of its rows; after training the changed tensor itself."""

    def __init__(self, n: int, rank: int, activation: str, biases: bool, transposed: bool) -> None:
        super().__init__()
        self.bend, self.transposed = _BEND[activation], transposed
        self.down: nn.Linear | None = nn.Linear(n, rank, bias=biases)
        self.up: nn.Linear | None = nn.Linear(rank, n, bias=biases)
        self.value: nn.Parameter | None = None
        nn.init.zeros_(self.up.weight)
        if biases:
            nn.init.zeros_(self.up.bias)

    def forward(self, frozen: Tensor) -> Tensor:
        if self.value is not None:
            return self.value
        assert self.down is not None and self.up is not None
        rows = frozen.T if self.transposed else frozen  # (..., n)
        rows = rows.to(torch.promote_types(rows.dtype, self.up.weight.dtype))
        changed: Tensor = rows + self.up(self.bend(self.down(rows)))
        return changed.T if self.transposed else changed  # as the layer holds it

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The changed tensor."""
        return {"value": self(self.__dict__["source"].detach()).contiguous()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if set(tensors) != {"value"}:
            raise KeyError(f"a changed tensor stores value, the file has {', '.join(sorted(tensors))}")
        like = next(self.parameters())
        self.value = nn.Parameter(tensors["value"].to(like.device, like.dtype).clone(), like.requires_grad)
        self.down = self.up = None
