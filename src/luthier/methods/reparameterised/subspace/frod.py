"""FRoD: layers of a kind get one common basis of their inputs; scales in it, and a few turns of it, are trained.

    W = U diag(l) V^T       y = x W^T + b + x V (diag(c) + S)^T U^T

    V: (d_in, d_in), of all sites of a kind     U: (d_out, d_in), columns of length 1     l, c: (d_in,)
    S: (d_in, d_in), `share` of its entries off the diagonal train, at places drawn once for the kind

V follows from the weights: of their rows, one below the other, Q R; V = R^T E, where E are the eigenvectors of the mean
over layers of (Q_i^T Q_i + ridge 1)^-1. Where there are fewer rows than columns, it is their right singular vectors. U
and l follow from W and V. c and S start at zero, so the tuned model starts as the base model.

Wan et al. 2026, "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence",
doi:10.1609/aaai.v40i31.39813 (arXiv:2512.23485). Of the paper only the abstract has been read; the equations are those
of peft 0.21, which computes the same from the same V (tests/methods/test_frod.py). There l itself trains, and decays to
zero; here c is what is added to it, and decays to none. Files are not exchanged: peft writes V and not U, and its
loader makes U of a V of its own, which on another machine need not be that of the file.

Count: sum over sites of d_in + max(1, floor(share d_in^2)); stored besides, d_in^2 for each kind.
Claims: full rank at the cost of a small tuning, and fast convergence.
Cost: one decomposition for each kind when it is attached, minutes from a width of a few thousand on. U and V are held
beside the weight, and an update as large as it is made in every pass.
Use it when: a low rank is what holds LoRA back, and memory is no matter.
Not when: the base only just fits.
Pitfalls: the columns of V have no length of their own, so how far a rate moves the weights depends on the model: at
1e-2 smollm2-135m lost all it knew within 20 steps (perplexity 830 of 110), at 3e-3 it reached 49 and at 1e-3 41, and
minilm-l6 0.90 and 0.88 of 300 questions of trec6 (`python -m experiments.rates frod optim.lr=1e-3`). V follows from
all sites of a kind, so other `sites` are another V; signs and order in it are the decomposition's own, so a saved
tuning holds V.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import above, at_least, between, key
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.low_rank import check_projections
from luthier.methods.parts.own_tensors import own_modules
from luthier.surgery import METHODS, Attach, Base, Edit, Method, TunedView


@METHODS.register("frod", family="reparameterised", paper="doi:10.1609/aaai.v40i31.39813")
@dataclass(frozen=True, kw_only=True)
class FRoD(Method):
    """Settings of FRoD."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    share: Annotated[float, "share of S that trains", between(0, 1)] = 0.01
    ridge: Annotated[float, "steadies the inverses of which V is made", above(0)] = 1e-3
    draw: Annotated[int, "which places of S: any whole number", at_least(0)] = 0

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    start_is_drawn: ClassVar[bool] = False  # what is drawn follows from `draw`
    tiny: ClassVar[dict[str, float]] = {"lr": 5e-2}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        sites = anatomy.sites(*self.sites, asked_by="frod.sites", fits=is_projection)
        return check_projections(anatomy, sites, "frod", 0.0)

    def alike(self, anatomy: Anatomy) -> dict[tuple[str, str, int], list[Site]]:
        """The sites of one kind, stack and width of input."""
        groups: dict[tuple[str, str, int], list[Site]] = {}
        for site in self.places(anatomy):
            groups.setdefault((site.kind, site.stack, site.d_in), []).append(site)
        return groups

    def n_turns(self, d_in: int) -> int:
        """Entries of S that train."""
        most = d_in * d_in - d_in
        return min(max(int(d_in * d_in * self.share), int(self.share > 0)), most)

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(site.d_in + self.n_turns(site.d_in) for site in self.places(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + sum(d_in * d_in for _, _, d_in in self.alike(anatomy))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for number, ((kind, stack, d_in), sites) in enumerate(self.alike(anatomy).items()):
            basis = Basis(d_in, self.n_turns(d_in), key(self.draw, kind, stack, d_in))
            for site in sites:
                yield self._at(site, basis, number)

    def _at(self, site: Site, basis: "Basis", number: int) -> Attach:
        return Attach(site, lambda base: Turned(base, basis), {f"basis{number}": basis})

    def begin(self, tuned: TunedView) -> None:
        modules = own_modules(self, tuned, Turned)
        for basis in {id(m.basis): m.basis for m in modules}.values():
            mine = [m for m in modules if m.basis is basis]
            weights = [m.base.weight() for m in mine]
            if not weights[0].is_meta:
                basis.v.copy_(common_basis(weights, self.ridge))
        for module in modules:
            module.directions()


@torch.no_grad()
def common_basis(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """V: (d_in, d_in) of weights (d_out, d_in), in double precision."""
    wide = [w.double() for w in weights]
    stacked = torch.cat(wide)
    if len(stacked) < stacked.shape[1]:
        right: Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh.T
        return right
    q, r = torch.linalg.qr(stacked)
    ridges = ridge * torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    mean = torch.zeros_like(ridges)
    for part in q.split([len(w) for w in wide]):
        mean += torch.linalg.inv(part.T @ part + ridges) / len(wide)
    v: Tensor = r.T @ torch.linalg.eigh(mean).eigenvectors
    return v


class Basis(nn.Module):
    """v: (d_in, d_in). places: (2, turns), rows and columns of S, none on the diagonal."""

    v: Tensor
    places: Tensor

    def __init__(self, d_in: int, turns: int, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        flat = torch.randperm(d_in * d_in - d_in, generator=made, device="cpu")[:turns]
        row, column = flat // max(1, d_in - 1), flat % max(1, d_in - 1)
        self.register_buffer("v", torch.eye(d_in))
        self.register_buffer("places", torch.stack([row, column + (column >= row)]), persistent=False)


class Turned(DenseUpdate):
    """Adds `U (diag(c) + S) V^T x`. c: (d_in,)   s: (turns,)"""

    reads_base_weight = True
    u: Tensor

    def __init__(self, base: Base, basis: Basis) -> None:
        super().__init__()
        self.base = base
        self.__dict__["basis"] = basis  # registered once, on the tuning
        self.made_of: tuple[int, int] | None = None
        self.c = nn.Parameter(torch.zeros(basis.v.shape[0]))
        self.s = nn.Parameter(torch.zeros(basis.places.shape[1]))
        shape = base.site.d_out, base.site.d_in
        self.register_buffer("u", torch.zeros(shape, device=basis.v.device), persistent=False)

    @property
    def basis(self) -> Basis:
        """That of its kind."""
        found: Basis = self.__dict__["basis"]
        return found

    @torch.no_grad()
    def directions(self) -> Tensor:
        """U: (d_out, d_in), made anew where V is another than it was made of: a saved tuning brings its own."""
        v = self.basis.v
        if self.made_of != (id(v), v._version):
            weight = self.base.weight()
            if weight.is_meta or v.is_meta:
                return weight
            whole = _solved(v.double(), weight.double())
            lengths = torch.linalg.vector_norm(whole, dim=0)
            self.u = torch.where(lengths > 1e-12, whole / lengths.clamp_min(1e-12), 0.0).to(v.dtype)
            self.made_of = (id(v), v._version)
        return self.u

    def update(self) -> Tensor:
        basis, dtype = self.basis, self.s.dtype
        row, column = basis.places
        middle = torch.diag(self.c).index_put((row, column), self.s)
        return self.directions().to(dtype) @ middle @ basis.v.T.to(dtype)


def _solved(v: Tensor, weight: Tensor) -> Tensor:
    """X with X V^T = weight. (d_out, d_in)."""
    try:
        found: Tensor = torch.linalg.solve(v, weight.T).T
    except RuntimeError:  # V has no inverse
        found = weight @ torch.linalg.pinv(v, rtol=1e-6).T
    return found
