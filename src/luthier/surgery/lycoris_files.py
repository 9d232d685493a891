"""LoKr and LoHa go out to files of LyCORIS and come in from them: one .safetensors, no configuration.

    lycoris_model_layers_0_self_attn_q_proj.lokr_w1      the layer's path, its dots turned into strokes, then the part
    lycoris_model_layers_0_self_attn_q_proj.alpha        a number; LyCORIS scales by alpha / rank

What stands before the path is free, and one for all layers. LyCORIS takes 1 for the scale of a LoKr whose factors are
both whole, whatever alpha says; LoKr here takes alpha / rank, so there the first factor carries what is between them.
The layout was read in LyCORIS 4.1.3. Convolutions, DoRA's magnitudes and norms are refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import CannotMerge, ConfigError, IntegrityError, ModelError
from luthier.core.protocols import Model
from luthier.runs import durable
from luthier.surgery import compose
from luthier.surgery.method import METHODS
from luthier.surgery.peft_forms import PeftForm
from luthier.surgery.peft_sites import plain_site, sites_at, words_for
from luthier.surgery.tuned import Tuned, attach
from luthier.trust import safetensors

__all__ = ["LYCORIS_FILE", "from_lycoris", "lycoris_update", "read_back", "to_lycoris"]

LYCORIS_FILE = "lycoris.safetensors"
_PREFIX = "lycoris_"
_FIRST = {"lokr": ("c", "c_a"), "loha": ("b1",)}  # the factor that carries a scale
_Parts = Mapping[str, Tensor]


def lycoris_update(parts: _Parts) -> Tensor:
    """What LyCORIS adds to the weight of one layer, by its parts in the file: (d_out, d_in), in fp32."""
    held = {name: value.float() for name, value in parts.items()}
    if "hada_w1_a" in held:
        rank = held["hada_w1_b"].shape[0]
        made = (held["hada_w1_a"] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"])
        return made * (float(held.get("alpha", torch.tensor(0))) or rank) / rank
    one, two = (held.get(f"lokr_{n}") for n in ("w1", "w2"))
    first = one if one is not None else held["lokr_w1_a"] @ held["lokr_w1_b"]
    second = two if two is not None else held["lokr_w2_a"] @ held["lokr_w2_b"]
    return torch.kron(first.contiguous(), second.contiguous()) * _scale(held)


def _rank(parts: _Parts) -> int | None:
    """The inner width of a layer's thin products; None where both factors are whole."""
    thin = [parts[n].shape[0] for n in ("hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b") if n in parts]
    if len(set(thin)) > 1:
        raise ConfigError(f"a layer's products are {' and '.join(map(str, thin))} wide; they must be of one width.")
    return thin[0] if thin else None


def _scale(parts: _Parts) -> float:
    rank = _rank(parts)
    return 1.0 if rank is None else (float(parts["alpha"]) if "alpha" in parts else 0.0) / rank or 1.0


def to_lycoris(tuned: Tuned, folder: Path | str, name: str | None = None) -> Path:
    """Write a tuning as a file of LyCORIS, in a new folder.

    Raises:
        CannotMerge: it is no LoKr or LoHa, has a head of its own, or sits where LyCORIS's file names nothing.
        ResourceError: the folder cannot be written.
    """
    tuning, folder = tuned.tuning(name), Path(folder)
    method: Any = tuning.method
    kind, form = _form_of(method)
    if tuning.unfrozen:
        raise CannotMerge(f"{next(iter(tuning.unfrozen))}: a file of LyCORIS holds no head. Use --to peft.")
    places = {site.key: site for site in tuned.anatomy.all_sites}
    held: dict[str, Any] = {key: module for key, module in tuning.modules_by_key().items() if key in places}
    sites = {key: plain_site(places[key], kind) for key in held}
    form.check_places(sites.values(), kind)
    tensors: dict[str, Tensor] = {}
    for key, module in held.items():
        stem = _PREFIX + _struck(sites[key])
        parts = {
            part: value.detach() for part, ours in form.parts.items() if (value := _part(module, ours)) is not None
        }
        whole = _rank(parts) is None
        if whole:
            parts["lokr_w1"] = parts["lokr_w1"] * module.scale
        parts["alpha"] = torch.tensor(float(method.rank if whole else method.alpha))
        if any(n.startswith(f"{stem}.") for n in tensors):
            raise CannotMerge(f"{key}: another layer has the same name in a file of LyCORIS. Use --to peft.")
        tensors |= {f"{stem}.{part}": value.cpu().contiguous() for part, value in parts.items()}
    with durable.folder(folder.absolute()) as draft:
        draft.write_tensors(LYCORIS_FILE, tensors)
        draft.share()
    return folder / LYCORIS_FILE


def read_back(tuned: Tuned, path: Path) -> float:
    """The largest difference between what LyCORIS adds by its file and what the tuning adds, as a share of the size."""
    found, worst = _by_layer(path), 0.0
    places = {site.key: site for site in tuned.anatomy.all_sites}
    stems = _stems(found, tuned.anatomy.all_sites, path)
    modules: dict[str, Any] = {
        places[key].path: module for key, module in tuned.tuning().modules_by_key().items() if key in places
    }
    for stem, layer in stems.items():
        theirs = lycoris_update(found[stem])
        with torch.no_grad():
            ours = modules[layer].merged(torch.zeros_like(theirs), None)[0]
        worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12)))
    return worst


def from_lycoris(model: Model, path: Path | str) -> Tuned:
    """Attach to `model` what a file of LyCORIS holds, with the same numbers.

    Raises:
        Refused: a file that is not what it claims to be.
        ConfigError: it holds something that we do not compute.
        ModelError: its layers are not those of this model.
        IntegrityError: tensors are missing or of other shapes.
    """
    path = Path(path)
    found = _by_layer(path)
    every = Anatomy.read(model).all_sites
    paths = _stems(found, every, path)
    sites = sites_at(every, set(paths.values()), path)
    kind = "loha" if any("hada_w1_a" in parts for parts in found.values()) else "lokr"
    form = _form_of(METHODS.get(kind))[1]
    form.check_places(sites.values(), kind)
    for stem, parts in found.items():
        strange = [n for n in parts if n not in form.parts and n != "alpha"]
        if strange:
            raise ConfigError(f"{path}: {stem}.{strange[0]} is nothing that {kind} computes here.")
    by_path = {paths[stem]: parts for stem, parts in found.items()}
    settings = {"sites": words_for(sites.values(), every), **_settings(kind, by_path, sites, path)}
    tuned = attach(model, compose.method(kind, settings), train_head=False)
    try:
        _fill(tuned, kind, form, by_path, path)
    except BaseException:
        tuned.detach()
        raise
    model.eval()
    return tuned


def _form_of(method: Any) -> tuple[str, PeftForm]:
    """Parts have the same names as in peft's files."""
    kind = next((n for n in ("lokr", "loha") if method.is_a(n)), None)
    if kind is None or method.peft is None:
        raise CannotMerge(f"{compose.spell(method)}: files of LyCORIS are written for lokr and loha. Use --to peft.")
    return kind, method.peft


def _part(module: nn.Module, ours: str) -> Tensor | None:
    value = dict(module.named_parameters()).get(ours)
    return None if value is None else value.detach()


def _struck(site: Site) -> str:
    return site.path.replace(".", "_")


def _by_layer(path: Path) -> dict[str, dict[str, Tensor]]:
    """Stem of a layer's name -> its parts."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in safetensors.read(path).items():
        stem, _, part = full.partition(".")
        found.setdefault(stem, {})[part] = tensor
    if not any(part.startswith(("lokr_w", "hada_w")) for parts in found.values() for part in parts):
        raise ConfigError(f"{path}: holds no LoKr or LoHa of LyCORIS (no lokr_w1, no hada_w1_a).")
    return found


def _stems(found: Mapping[str, Any], every: tuple[Site, ...], path: Path) -> dict[str, str]:
    """Stem -> path of the layer. What stands before the path must be the same for all."""
    names: dict[str, set[str]] = {}
    for site in every:
        if site.n_params:
            names.setdefault(_struck(site), set()).add(site.path)
    first = next(iter(found))
    ends = sorted((n for n in names if first == n or first.endswith(f"_{n}")), key=len)
    before = first.removesuffix(ends[-1]) if ends else _PREFIX
    paths = {}
    for stem in found:
        there = names.get(stem.removeprefix(before), set()) if stem.startswith(before) else set()
        if len(there) != 1:
            raise ModelError(f"{path}: {stem} is no layer of this model that can be tuned. Take the right base.")
        paths[stem] = next(iter(there))
    return paths


def _settings(kind: str, parts: Mapping[str, _Parts], sites: Mapping[str, Site], path: Path) -> dict[str, Any]:
    """Rank, alpha and factors by which our method makes these shapes."""
    ranks = {rank for held in parts.values() if (rank := _rank(held)) is not None}
    if len(ranks) > 1:
        raise ConfigError(
            f"{path}: ranks {', '.join(map(str, sorted(ranks)))}; a {kind} of ours has one for all layers."
        )
    alphas = [_scale(held) * rank for held in parts.values() if (rank := _rank(held)) is not None]
    if kind == "loha":
        return {"rank": ranks.pop(), "alpha": alphas[0]}
    shapes = {layer: _shapes(held, sites[layer], path) for layer, held in parts.items()}
    rank = ranks.pop() if ranks else max(math.ceil(max(d) / 2) for _, d in shapes.values())
    near = {layer: tuple(_nearest(width) for width in (s.d_out, s.d_in)) for layer, s in sites.items()}
    factor = 0
    if any(shapes[layer][0] != near[layer] for layer in shapes):
        sides = {side for c, _ in shapes.values() for side in c}
        if len(sides) > 1:
            raise ConfigError(f"{path}: factors of sides {', '.join(map(str, sorted(sides)))}; ours has one for all.")
        factor = sides.pop()
    both = any("lokr_w1_a" in held for held in parts.values())
    return {"rank": rank, "alpha": alphas[0] if alphas else float(rank), "factor": factor, "both": both}


def _nearest(n: int) -> int:
    """The smaller of the two factors of n that lie closest to each other."""
    return next(m for m in range(math.isqrt(n), 0, -1) if n % m == 0)


def _shapes(held: _Parts, site: Site, path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of both factors.

    Raises:
        IntegrityError: they do not make the weight's.
    """
    found = []
    for name in ("lokr_w1", "lokr_w2"):
        ends = (name, name) if name in held else (f"{name}_a", f"{name}_b")
        if any(end not in held or held[end].dim() != 2 for end in ends):
            raise IntegrityError(f"{path}: {site.path} has no whole {name} of two sides. Restore it from a copy.")
        found.append((held[ends[0]].shape[0], held[ends[1]].shape[1]))
    (a, b), (c, d) = found
    if (a * c, b * d) != (site.d_out, site.d_in):
        raise IntegrityError(
            f"{path}: {site.path} is {a * c} by {b * d}, and this model's layer {site.d_out} by {site.d_in}."
        )
    return (a, b), (c, d)


@torch.no_grad()
def _fill(tuned: Tuned, kind: str, form: PeftForm, parts: Mapping[str, _Parts], path: Path) -> None:
    places = {site.key: site for site in tuned.anatomy.all_sites}
    for key, module in tuned.modules().items():
        held = parts[places[key].path]
        found = {form.parts[name]: value for name, value in held.items() if name != "alpha"}
        ours = dict(module.named_parameters())
        if found.keys() != ours.keys() or any(found[n].shape != ours[n].shape for n in ours):
            shown = ", ".join(f"{n} {list(t.shape)}" for n, t in sorted(held.items()) if n != "alpha")
            raise IntegrityError(f"{path}: {places[key].path} holds {shown}, which is no {kind} of this layer.")
        for name, parameter in ours.items():
            more = _scale(held) / module.scale if name in _FIRST[kind] else 1.0
            parameter.copy_(found[name].float() * more if more != 1.0 else found[name])
