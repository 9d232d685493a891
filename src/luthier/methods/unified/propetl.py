"""ProPETL: one small module shared by all layers; each layer owns only a binary mask that picks its part of it.

    W_l = W * m_l      m_l = 1 for the `density` largest of |S_l|, else 0      W: shared prototype    S_l: scores, as W

Gradients pass the choice as if it were the identity, to chosen and unchosen entries alike, and |.| with its sign. The
matrices are masked, the biases are not, and nothing is rescaled. With form="adapter" the start is near the base model
(normal weights of 0.02); with form="lora" it is the base model.

With several tasks each layer owns a mask of its own and one for each task, and a row is answered with both:

    m = 1 - (1 - m_l) (1 - m_t)      with join=and: m_l m_t      with join=sum: m_l + m_t

Zeng, Zhang, Lu 2023, "One Network, Many Masks: Towards More Parameter-Efficient Transfer Learning", arXiv:2305.17682,
section 3. One prototype for each kind of site (and shape). The form over prefixes is not built. In the authors' code
the layer's mask is drawn from the scores of the last task, so that this task has one mask where the others have two;
here layers have scores of their own.

Count: prototype + one score per masked entry and layer in training, T + 1 of them with T tasks; stored are the
prototype and one bit per score.
Claims: quality of an adapter in every layer for about a tenth of its storage.
Use it when: adapters of all layers, or of several tasks (`--row-task COLUMN`), must share their numbers, because
storage is what counts.
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
from luthier.methods.parts.bottleneck import Activation, activated, check_sublayers
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
    tasks: Annotated[int | None, "how many tasks there are; left out, as many as the rows say", at_least(1)] = None
    join: Annotated[Literal["or", "and", "sum"], "what a layer's mask and a task's become together"] = "or"
    mask_rate: Annotated[float, "learning rate of the scores, as a multiple of the prototype's", at_least(0)] = 30.0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-4
    reads_rows: ClassVar[tuple[str, ...]] = ("task",)
    tiny: ClassVar[dict[str, int]] = {"width": 6, "rank": 3}

    def __post_init__(self) -> None:
        # Masked thin matrices are thin matrices: they merge, and they start at the base. Several tasks have several.
        object.__setattr__(self, "mergeable", self.form == "lora" and self.n_tasks == 0)
        object.__setattr__(self, "starts_at_base", self.form == "lora")

    @property
    def n_tasks(self) -> int:
        """How many masks of tasks each layer has: none where there is one task."""
        return self.tasks if self.tasks is not None and self.tasks > 1 else 0

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        prototypes: dict[str, Prototype] = {}
        for key, sites in self._classes(anatomy).items():
            prototypes[key] = self._prototype(sites[0])
        for key, sites in self._classes(anatomy).items():
            for site in sites:
                prototype = prototypes[key]
                yield Attach(site, lambda base, own=prototype: self._masked(own), shared={key: prototype})  # type: ignore[misc]

    def n_params(self, anatomy: Anatomy) -> int:
        masks = self.n_tasks + 1
        return sum(self._shared(s[0]) + masks * len(s) * self._scored(s[0]) for s in self._classes(anatomy).values())

    def n_stored(self, anatomy: Anatomy) -> int:
        """The prototype's numbers, and the bytes that the masks are packed in."""
        total = 0
        for sites in self._classes(anatomy).values():
            packed = sum(math.ceil(n / 8) + math.ceil(self.n_tasks * n / 8) for n in self._sizes(sites[0]))
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
            return MaskedUpdate(prototype, self, self.alpha / self.rank)
        return MaskedBottleneck(prototype, self)


class Prototype(nn.Module):
    """What the layers share: two matrices, and the biases of an adapter."""

    def __init__(self, down: tuple[int, int], up: tuple[int, int], *, biases: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(down))
        self.up = nn.Parameter(torch.zeros(up))
        self.down_bias = nn.Parameter(torch.zeros(down[0])) if biases else None
        self.up_bias = nn.Parameter(torch.zeros(up[0])) if biases else None


def _chosen(sizes: Tensor, k: int) -> Tensor:
    """Which entries of a matrix are its k largest; of one matrix for each task, (tasks, ...), those of each."""
    matrices = [sizes] if sizes.dim() < 3 else list(sizes)
    masks = [top_k([matrix], k)[0] for matrix in matrices]
    return masks[0] if sizes.dim() < 3 else torch.stack(masks)


class _Choose(torch.autograd.Function):
    """1 for the k largest entries, 0 for the others; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor, k: int) -> Tensor:
        return _chosen(sizes, k).to(sizes.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Masked(Attachment):
    """One layer's masks over the shared prototype; as scores while they learn, as bits afterwards."""

    def __init__(self, prototype: Prototype, how: ProPETL) -> None:
        super().__init__()
        self.__dict__["prototype"] = prototype  # registered once, on the tuning
        self.density, self.join, self.n_tasks = how.density, how.join, how.n_tasks
        self.shapes = {"down": prototype.down.shape, "up": prototype.up.shape}
        if self.n_tasks:
            own = {f"{name}_of_tasks": torch.Size((self.n_tasks, *shape)) for name, shape in self.shapes.items()}
            self.shapes |= own
        self.scores = nn.ParameterDict({name: torch.empty(shape) for name, shape in self.shapes.items()})
        for name, scores in self.scores.items():
            for matrix in scores if name.endswith("_of_tasks") else [scores]:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        for name in self.shapes:
            self.register_buffer(f"{name}_mask", None)
        self._kept: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def kept(self, name: str) -> int:
        """How many entries of a matrix one mask keeps."""
        n = self.shapes[name.removesuffix("_of_tasks")].numel()
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
            self._kept[name] = (state, _chosen(scores.abs(), self.kept(name)).to(scores.dtype))
        return self._kept[name][1]

    def weight(self, name: str) -> Tensor:
        """This layer's matrix: the prototype's, masked. (out, in)."""
        shared: Tensor = getattr(self.__dict__["prototype"], name)
        return shared * self.mask(name).to(shared.dtype)

    def weights(self, name: str, tasks: Tensor) -> Tensor:
        """This layer's matrix for some tasks. tasks: (n,) -> (n, out, in)."""
        shared: Tensor = getattr(self.__dict__["prototype"], name)
        layer, task = self.mask(name).to(shared.dtype), self.mask(f"{name}_of_tasks").to(shared.dtype)[tasks]
        both = layer * task
        if self.join == "or":
            both = 1 - (1 - layer) * (1 - task)
        elif self.join == "sum":
            both = layer + task
        return shared * both

    def thin(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream as rows, and for each row the two matrices of its task.

        y: (rows, n, d), which some models flatten to (rows n, d) -> (rows, n, d), (rows, r, d), (rows, d, r).
        """
        row = self.context.row("task").to(y.device)
        picked, of_row = torch.unique(row, return_inverse=True)  # each task's matrices are made once
        down, up = (self.weights(name, picked)[of_row] for name in ("down", "up"))
        return y.to(down.dtype).reshape(len(row), -1, y.shape[-1]), down, up

    def stored(self) -> dict[str, Tensor]:
        """The masks, eight entries to a byte."""
        found = {}
        for name in self.shapes:
            with torch.no_grad():
                scores = self.scores[name].abs() if name in self.scores else None
                bits = self.get_buffer(f"{name}_mask") if scores is None else _chosen(scores, self.kept(name))
            found[name] = pack(bits.bool())
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if set(tensors) != set(self.shapes):
            wanted = " and ".join(self.shapes)
            raise KeyError(f"masks are stored as {wanted}, the file has {', '.join(sorted(tensors)) or 'none'}")
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

    def __init__(self, prototype: Prototype, how: ProPETL) -> None:
        super().__init__(prototype, how)
        self.activation = how.activation

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        shared: Prototype = self.__dict__["prototype"]
        if self.n_tasks:
            assert shared.down_bias is not None and shared.up_bias is not None, "an adapter's prototype has them"
            stream, downs, ups = self.thin(y)
            hidden = activated(self.activation, stream @ downs.transpose(1, 2) + shared.down_bias)  # (rows, n, r)
            return y + (hidden @ ups.transpose(1, 2) + shared.up_bias).reshape(y.shape).to(y.dtype)
        down, up = self.weight("down"), self.weight("up")
        return kernels.bottleneck(y, y, down, shared.down_bias, up, shared.up_bias, 1.0, self.activation)


class MaskedUpdate(Masked):
    """Adds `scale * B A x` to the output, A and B masked."""

    kind = "delta"

    def __init__(self, prototype: Prototype, how: ProPETL, scale: float) -> None:
        super().__init__(prototype, how)
        self.scale = scale

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.n_tasks:
            stream, downs, ups = self.thin(x)  # (rows, n, d_in)
            branch = stream @ downs.transpose(1, 2) @ ups.transpose(1, 2)  # (rows, n, d_out)
            return y + (branch * self.scale).reshape(y.shape).to(y.dtype)
        return y + (x @ self.weight("down").T @ self.weight("up").T) * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.weight("up") @ self.weight("down") * self.scale, bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if self.n_tasks or not fusable(base):
            return None
        down, up = self.weight("down"), self.weight("up")
        return kernels.low_rank_linear(x, base.weight(), base.bias(), down, up, self.scale)
