"""Any change of weights as LoRA of a given rank: the best there is, by singular values, and what it leaves out.

    W' - W  =  U S V^T  ~  B A        B = U_r S_r^(1/2) (d_out, r), A = S_r^(1/2) V_r^T (r, d_in)

No product of rank r is nearer in the sum of squares (Eckart and Young 1936). The share of energy that it keeps is
s_1^2 + ... + s_r^2 over the sum of all; it says nothing yet of answers, which have to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import CannotMerge, NothingTrains
from luthier.surgery import compose, merging
from luthier.surgery.peft_sites import plain_site, words_for
from luthier.surgery.tuned import Tuned, attach

__all__ = ["LowRank", "Share", "as_lora", "changes_of", "thin", "told_of"]

WHOLE = 2048  # up to this width all singular values are computed; beyond, the first ones, by random projections
MOST = 256  # the largest rank that is tried where none is given
NOISE = 1.2e-7  # of a weight: what fp32 leaves of a difference of two


@dataclass(frozen=True)
class Share:
    """One place: its rank there, and the share of its change's energy that this rank keeps."""

    key: str
    rank: int
    kept: float


@dataclass(frozen=True)
class LowRank:
    """What became of a tuning: place by place, and the tensors whose change no LoRA of a linear layer holds.

    Attributes:
        left_out: name of each, and the norm of its change as a share of the norm of all changes.
    """

    shares: tuple[Share, ...]
    left_out: tuple[tuple[str, float], ...]
    exact: bool

    @property
    def kept(self) -> float:
        """The least share of energy of a place."""
        return min((share.kept for share in self.shares), default=0.0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it."""
        ranks = sorted({share.rank for share in self.shares})
        told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        least = min(self.shares, key=lambda share: share.kept)
        mean = sum(share.kept for share in self.shares) / len(self.shares)
        said = (
            f"a LoRA of {told} at {len(self.shares)} places is exactly the tuning"
            if self.exact
            else f"{told} keeps {mean:.1%} of the changes' energy at {len(self.shares)} places; least at {least.key}: "
            f"{least.kept:.1%}"
        )
        if not self.left_out:
            return (said,)
        share = sum(part**2 for _, part in self.left_out) ** 0.5
        names = ", ".join(name for name, _ in self.left_out[:3])
        more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
        return said, f"left out, since no LoRA holds them: {names}{more}; {share:.1%} of the norm of all changes"


@torch.no_grad()
def changes_of(tuned: Tuned) -> dict[str, Tensor]:
    """Canonical name -> the change of that tensor, in fp32, of everything that the active tunings change.

    Raises:
        CannotMerge: no weight of the model can do what a tuning does.
    """
    merging.check(tuned.edited)
    before = {id(u.parameter): u.original for t in tuned.edited.active() for u in t.unfrozen.values()}
    after = {id(tensor): value for tensor, value in merging.merged_tensors(tuned.edited)}
    found = {}
    for name, parameter in tuned.edited.parameters.items():
        if id(parameter) in after or id(parameter) in before:
            new = after.get(id(parameter), parameter.detach())
            change = new.float() - before.get(id(parameter), parameter.detach()).float()
            if bool(change.any()):
                found[name] = change
    if not found:
        raise NothingTrains("the tuning changes nothing, so there is nothing to write as LoRA.")
    return found


def thin(change: Tensor, rank: int | None, noise: float) -> tuple[Tensor, Tensor, float, bool]:
    """B (d_out, r), A (r, d_in), the share of energy that they keep, and whether the rest is rounding.

    Args:
        change: (d_out, d_in).
        rank: None for the smallest that leaves rounding.
        noise: energy below which a rest is rounding.

    Raises:
        CannotMerge: no rank was given, and it needs too large a one.
    """
    total = float(change.double().square().sum())
    most = min(change.shape)
    if most <= WHOLE:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=min(most, (rank or MOST) + 16), niter=4)
        vh = v.T
    squares = s.double().square()
    # The rest after each rank. Of all values it is their own sum: what is left of `total` drowns in its rounding.
    rest = squares.flip(0).cumsum(0).flip(0) - squares if most <= WHOLE else (total - squares.cumsum(0)).clamp(min=0)
    rounding = max(1e-9 * total, noise)
    if rank is None:
        rank = int((rest > rounding).sum()) + 1
        if rank > min(MOST, most // 2):
            near = int((rest > 0.01 * total).sum()) + 1
            raise CannotMerge(
                f"its change is of a rank above {min(MOST, most // 2)}; rank {near} keeps 99 % of its energy"
            )
    r = min(rank, most)
    left = float(rest[r - 1])
    root = s[:r].sqrt()
    return u[:, :r] * root, root[:, None] * vh[:r], max(0.0, 1 - left / total), left <= rounding


def as_lora(tuned: Tuned, rank: int | None = None) -> tuple[Tuned, LowRank]:
    """Put in the place of what acts on a model a LoRA that changes its linear layers as nearly alike as it can.

    A head that the tuning trained stays as it is. Norms, biases and embeddings, whose changes a LoRA of linear layers
    cannot hold, are left out and named.

    Args:
        rank: None for the smallest that is exact at each place.

    Raises:
        CannotMerge: no weight can do what the tuning does, nothing that it changes is a linear layer, or no rank is
            given and it is not exactly one of a small rank. Nothing has been changed then.
    """
    changes = changes_of(tuned)
    squares = {name: float(change.double().square().sum()) for name, change in changes.items()}
    heads = {
        name: tuned.edited.parameters[name].detach().clone() for name in tuned.anatomy.head_tensors if name in changes
    }
    every = tuned.anatomy.all_sites
    places = {f"{s.path}.{s.param}": s for s in every if s.kind not in ("embed", "norm") and _is_plain(s)}
    here, left_out, exact = {}, [], True
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    shares = []
    for name, change in changes.items():
        site = places.get(name)
        if name in heads:
            continue
        if site is None or change.dim() != 2:
            left_out.append((name, (squares[name] / sum(squares.values())) ** 0.5))
            continue
        weight = tuned.edited.parameters[name]
        noise = NOISE**2 * float(weight.detach().double().square().sum())
        try:
            b, a, kept, whole = thin(change.T if site.transposed else change, rank, noise)
        except CannotMerge as error:
            raise CannotMerge(f"{site.key}: {error}.") from None
        exact = exact and whole
        here[name], parts[site.key] = site, (a, b)
        shares.append(Share(site.key, len(a), kept))
    if not here:
        raise CannotMerge("none of what the tuning changes is a linear layer, and a LoRA holds nothing else.")
    if rank is None and left_out:
        names = ", ".join(name for name, _ in left_out[:3])
        raise CannotMerge(f"it changes {names}{', ...' if len(left_out) > 3 else ''} too, which no LoRA holds.")
    ranks = {site.key: len(parts[site.key][0]) for site in here.values()}
    uniform = len(set(ranks.values())) == 1
    size = next(iter(ranks.values())) if uniform else ranks
    method = compose.method("lora", {"sites": words_for(here.values(), every), "rank": size, "alpha": size})
    model = tuned.detach()
    fresh = attach(model, method, train_head=bool(heads))
    with torch.no_grad():
        for key, module in fresh.modules().items():
            if key in parts:
                module.a.copy_(parts[key][0])
                module.b.copy_(parts[key][1])
        _fill(dict(fresh.edited.parameters), heads)
    model.eval()
    return fresh, LowRank(tuple(shares), tuple(left_out), exact and not left_out)


def _fill(tensors: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
    for name, value in heads.items():
        tensors[name].copy_(value)


def _is_plain(site: Site) -> bool:
    try:
        plain_site(site, "lora")
    except CannotMerge:
        return False
    return site.n_params > 0


def told_of(method: str, low: LowRank | None) -> str:
    """How a card names what was written."""
    if low is None:
        return method
    most = max(share.rank for share in low.shares)
    return f"{method}, as LoRA of rank {most}{'' if low.exact else ', which is near it and not the same'}"
