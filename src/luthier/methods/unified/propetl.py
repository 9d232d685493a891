"""ProPETL: one small module shared by all layers; each layer owns only a binary mask that picks its part of it.

    W_l = W * m_l      m_l = 1 for the `density` largest of |S_l|, else 0      W: shared prototype    S_l: scores, as W

Gradients pass the choice as if it were the identity, to chosen and unchosen entries alike, and |.| with its sign. The
matrices are masked, the biases are not, and nothing is rescaled. With form="adapter" the start is near the base model
(normal weights of 0.02); with form="lora" it is the base model.

Zeng, Zhang, Lu 2023, "One Network, Many Masks: Towards More Parameter-Efficient Transfer Learning", arXiv:2305.17682,
section 3. One prototype for each kind of site (and shape). One task: the masks of several tasks are not built here,
nor is the form over prefixes.

Count: prototype + one score per masked entry and layer in training; stored are the prototype and one bit per entry.
Claims: quality of an adapter in every layer for about a tenth of its storage.
Use it when: adapters of all layers must share their numbers, because storage is what counts.
Not when: one tuning is kept and quality counts: LoRA is simpler.
Pitfalls: the authors' "sparsity" is this density; scores saved instead of bits, or one byte per bit; a prototype
registered in every layer is saved in every layer; scores need a far larger rate than the prototype and no decay.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy, Site, is_projection, is_sublayer
from luthier.core import above, at_least, between
from luthier.methods.parts.bottleneck import Activation, check_sublayers
from luthier.methods.parts.low_rank import check_projections, fusable
from luthier.methods.parts.masks import pack, top_k, unpack
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.surgery import METHODS, Attach, Attachment, Base, Edit, Group, Method, TunedView


@METHODS.register("propetl", family="unified", paper="arXiv:2305.17682")
@dataclass(frozen=True, kw_only=True)
class ProPETL(Method):
    """Settings of ProPETL."""

    form: Annotated[Literal["adapter", "lora"], "what the prototype is"] = "adapter"
    sites: Annotated[tuple[str, ...], "where to attach; none: ffn_out for adapters, attn.q and attn.v for lora"] = ()
    density: Annotated[float, "share of the prototype that a layer uses", between(0, 1)] = 0.5
    width: Annotated[int, "width of an adapter", at_least(1)] = 64
    activation: Annotated[Activation, "between an adapter's two layers"] = "gelu"
    rank: Annotated[int, "width of lora's thin matrices", at_least(1)] = 32
    alpha: Annotated[float, "lora's update is scaled by alpha / rank", above(0)] = 48.0
    mask_rate: Annotated[float, "learning rate of the scores, as a multiple of the prototype's", at_least(0)] = 30.0

    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-4
    tiny: ClassVar[dict[str, int]] = {"width": 6, "rank": 3}

    def __post_init__(self) -> None:
        # Masked thin matrices are thin matrices: they merge, and they start at the base.
        object.__setattr__(self, "mergeable", self.form == "lora")
        object.__setattr__(self, "starts_at_base", self.form == "lora")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        prototypes: dict[str, Prototype] = {}
        for key, sites in self._classes(anatomy).items():
            prototypes[key] = self._prototype(sites[0])
        for key, sites in self._classes(anatomy).items():
            for site in sites:
                prototype = prototypes[key]
                yield Attach(site, lambda base, own=prototype: self._masked(own), shared={key: prototype})  # type: ignore[misc]

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(self._shared(s[0]) + len(s) * self._scored(s[0]) for s in self._classes(anatomy).values())

    def n_stored(self, anatomy: Anatomy) -> int:
        """The prototype's numbers, and the bytes that the masks are packed in."""
        total = 0
        for sites in self._classes(anatomy).values():
            packed = sum(math.ceil(n / 8) for n in self._sizes(sites[0]))
            total += self._shared(sites[0]) + len(sites) * packed
        return total

    def groups(self, tuned: TunedView) -> list[Group]:
        scores = [p for m in own_modules(self, tuned, Masked) for p in m.scores.values()]
        names = group_names(tuned, scores)
        return [Group(names, lr_factor=self.mask_rate, weight_decay=0.0)] if names else []

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, Masked):
            module.restore(module.stored())

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("adamix"):
            return "neither paper says what masks over a mixture of experts would be. Use one of them."
        return None

    def _classes(self, anatomy: Anatomy) -> dict[str, list[Site]]:
        """Key of a prototype -> the sites that share it."""
        kinds = self.sites or (("ffn_out",) if self.form == "adapter" else ("attn.q", "attn.v"))
        fits = is_sublayer if self.form == "adapter" else is_projection
        found = anatomy.sites(*kinds, asked_by="propetl.sites", fits=fits)
        if self.form == "lora":
            check_projections(anatomy, found, "propetl", 0.0)
        else:
            check_sublayers(found, "propetl")
        shapes: dict[str, list[tuple[int, ...]]] = {}
        classes: dict[str, list[Site]] = {}
        for site in found:
            shape = (site.d_out,) if self.form == "adapter" else (site.d_out, site.d_in)
            known = shapes.setdefault(site.kind, [shape])
            if shape not in known:
                known.append(shape)
            number = known.index(shape)
            classes.setdefault(f"prototype/{site.kind}" + (f"~{number}" if number else ""), []).append(site)
        return classes

    def _sizes(self, site: Site) -> tuple[int, int]:
        """Entries of the two masked matrices."""
        if self.form == "adapter":
            return site.d_out * self.width, site.d_out * self.width
        return self.rank * site.d_in, self.rank * site.d_out

    def _scored(self, site: Site) -> int:
        return sum(self._sizes(site))

    def _shared(self, site: Site) -> int:
        return self._scored(site) + (self.width + site.d_out if self.form == "adapter" else 0)

    def _prototype(self, site: Site) -> "Prototype":
        if self.form == "lora":
            found = Prototype((self.rank, site.d_in), (site.d_out, self.rank), biases=False)
            nn.init.kaiming_uniform_(found.down, a=math.sqrt(5))
            return found
        found = Prototype((self.width, site.d_out), (site.d_out, self.width), biases=True)
        nn.init.normal_(found.down, std=0.02)
        nn.init.normal_(found.up, std=0.02)
        return found

    def _masked(self, prototype: "Prototype") -> Attachment:
        if self.form == "lora":
            return MaskedUpdate(prototype, self.density, self.alpha / self.rank)
        return MaskedBottleneck(prototype, self.density, self.activation)


class Prototype(nn.Module):
    """What the layers share: two matrices, and the biases of an adapter."""

    def __init__(self, down: tuple[int, int], up: tuple[int, int], *, biases: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(down))
        self.up = nn.Parameter(torch.zeros(up))
        self.down_bias = nn.Parameter(torch.zeros(down[0])) if biases else None
        self.up_bias = nn.Parameter(torch.zeros(up[0])) if biases else None


class _Choose(torch.autograd.Function):
    """1 for the k largest entries, 0 for the others; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor, k: int) -> Tensor:
        (mask,) = top_k([sizes], k)
        return mask.to(sizes.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Masked(Attachment):
    """One layer's masks over the shared prototype; as scores while they learn, as bits afterwards."""

    def __init__(self, prototype: Prototype, density: float) -> None:
        super().__init__()
        self.__dict__["prototype"] = prototype  # registered once, on the tuning
        self.density = density
        self.shapes = {"down": prototype.down.shape, "up": prototype.up.shape}
        self.scores = nn.ParameterDict({name: torch.empty(shape) for name, shape in self.shapes.items()})
        for scores in self.scores.values():
            nn.init.kaiming_uniform_(scores, a=math.sqrt(5))
        self.register_buffer("down_mask", None)
        self.register_buffer("up_mask", None)
        self._kept: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def kept(self, name: str) -> int:
        """How many entries of a matrix this layer uses."""
        n = self.shapes[name].numel()
        return n - math.floor(round((1 - self.density) * n, 6))  # rounded first: (1 - 0.9) * 10 is not quite 1

    def mask(self, name: str) -> Tensor:
        """The mask of one matrix, as numbers; with the straight-through gradient while it learns."""
        if name not in self.scores:
            found: Tensor = self.get_buffer(f"{name}_mask")
            return found
        scores = self.scores[name]
        if self.training:
            chosen: Tensor = _Choose.apply(scores.abs(), self.kept(name))  # type: ignore[no-untyped-call]
            return chosen
        state = (scores.data_ptr(), scores._version)
        if name not in self._kept or self._kept[name][0] != state:
            (mask,) = top_k([scores.abs()], self.kept(name))
            self._kept[name] = (state, mask.to(scores.dtype))
        return self._kept[name][1]

    def weight(self, name: str) -> Tensor:
        """This layer's matrix: the prototype's, masked."""
        shared: Tensor = getattr(self.__dict__["prototype"], name)
        return shared * self.mask(name).to(shared.dtype)

    def stored(self) -> dict[str, Tensor]:
        """The masks, eight entries to a byte."""
        found = {}
        for name in self.shapes:
            with torch.no_grad():
                scores = self.scores[name].abs() if name in self.scores else None
                bits = self.get_buffer(f"{name}_mask") if scores is None else top_k([scores], self.kept(name))[0]
            found[name] = pack(bits.bool())
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if set(tensors) != set(self.shapes):
            raise KeyError(f"masks are stored as down and up, the file has {', '.join(sorted(tensors)) or 'none'}")
        prototype: Prototype = self.__dict__["prototype"]
        for name, shape in self.shapes.items():
            bits = unpack(tensors[name].to(prototype.down.device), shape)
            setattr(self, f"{name}_mask", bits)
        self.scores = nn.ParameterDict()
        self._kept = {}


class MaskedBottleneck(Masked):
    """Adds a bottleneck of the sublayer's output to that output."""

    kind = "sequential"
    needs_input = False

    def __init__(self, prototype: Prototype, density: float, activation: Activation) -> None:
        super().__init__(prototype, density)
        self.activation = activation

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        shared: Prototype = self.__dict__["prototype"]
        down, up = self.weight("down"), self.weight("up")
        return kernels.bottleneck(y, y, down, shared.down_bias, up, shared.up_bias, 1.0, self.activation)


class MaskedUpdate(Masked):
    """Adds `scale * B A x` to the output, A and B masked."""

    kind = "delta"

    def __init__(self, prototype: Prototype, density: float, scale: float) -> None:
        super().__init__(prototype, density)
        self.scale = scale

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (x @ self.weight("down").T @ self.weight("up").T) * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.weight("up") @ self.weight("down") * self.scale, bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        down, up = self.weight("down"), self.weight("up")
        return kernels.low_rank_linear(x, base.weight(), base.bias(), down, up, self.scale)
