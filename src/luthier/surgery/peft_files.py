"""Tunings go out to the files of the peft library, and come in from them, where both compute the same numbers.

    adapter_config.json          which kind, which layers; read as data: unknown keys and other settings are refused
    adapter_model.safetensors    the tensors, under the names that peft gives them

That is so for LoRA, DoRA and (IA)³, which are known here, and for every method whose file says how it stands there
(`peft`, see peft_forms.py); on layers of their own. A layer that holds several projections, an expert or a block that
several layers share has no name in those files, and is refused.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, BySite, Site
from luthier.core import CannotMerge, ConfigError, IntegrityError
from luthier.core.protocols import Model
from luthier.runs import durable
from luthier.surgery import compose
from luthier.surgery.method import METHODS
from luthier.surgery.peft_forms import PEFT_LAYERS, PeftForm, PeftWhole
from luthier.surgery.peft_sites import plain_site, sites_at, turned_round, words_for
from luthier.surgery.peft_whole import read_whole, write_whole
from luthier.surgery.tuned import Tuned, attach
from luthier.surgery.tuning import Tuning
from luthier.trust import config as trusted_config
from luthier.trust import safetensors

__all__ = ["from_peft", "to_peft"]

PREFIX = PEFT_LAYERS
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What is read of a configuration. Every other key that peft writes must say nothing, and one it does not know of is
# refused: it may change what the numbers mean.
READ = {
    "peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "feedforward_modules",
    "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
}  # fmt: skip
COMMON = {"peft_type", "target_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
NO_MATTER = {  # of training or of provenance; `megatron_core` names a package, which nothing here imports
    "base_model_name_or_path", "inference_mode", "init_ia3_weights", "init_lora_weights", "lora_dropout",
    "megatron_core", "peft_version", "revision", "task_type", "init_weights", "fan_in_fan_out", "qalora_group_size",
    "auto_mapping", "eva_config",
}  # fmt: skip
SAYS_NOTHING = {
    "alora_invocation_tokens", "arrow_config", "bias", "corda_config", "ensure_weight_tying",
    "exclude_modules", "kasa_config", "layer_replication", "loftq_config", "lora_bias", "lora_ga_config",
    "megatron_config", "monteclora_config", "runtime_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
# Starts of LoRA that leave the base what it is. Others are taken out of its weights when peft reads the file again.
STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude", "ia3_l": "scale"}


def forms() -> dict[str, tuple[str, PeftForm]]:
    """peft's name of a method -> our name and form; for those whose file gives one."""
    named = [card.name for card in METHODS.cards() if "peft" in card.facts and not card.of]
    found = ((name, METHODS.get(name).peft) for name in named)
    return {form.type: (name, form) for name, form in found if form is not None}


def _names_there() -> str:
    return ", ".join(["lora", "dora", "ia3", *sorted(name for name, _ in forms().values())])


def to_peft(
    tuned: Tuned, folder: Path | str, name: str | None = None, *, task_type: str | None = None, base: str | None = None,
    own: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Path:  # fmt: skip
    """Write a tuning as `PeftModel.from_pretrained` reads it; the base is left as it is.

    The files are the same whatever acts on the model, speeds it up, serves or is folded into it at the moment.

    Args:
        task_type: as peft calls it, such as "SEQ_CLS"; its `AutoPeftModelFor...` classes ask for it.
        base: where the base can be had; without it, what the model says of itself.
        own: what is written for a tensor of the model itself, such as a head's, given its name and its trained value.

    Raises:
        CannotMerge: peft has no such method, or no name for a place of it.
        ResourceError: the folder cannot be written.
    """
    tuning, folder = tuned.tuning(name), Path(folder)
    kind, form = next((n for n in ("lora", "dora", "ia3") if tuning.method.is_a(n)), None), tuning.method.peft
    if kind is not None and not tuning.method.mergeable:
        why = tuning.method.lends(tuning.method.settings()) or "has no form in the weights"
        raise CannotMerge(f"{compose.spell(tuning.method)} {why}: peft's layers compute something else.")
    if kind is None and form is None:
        raise CannotMerge(
            f"{compose.spell(tuning.method)} has no form in peft's files that computes the same. "
            f"{_names_there()} have one."
        )
    if isinstance(form, PeftWhole):
        tensors, facts = write_whole(tuned, tuning, form, task_type, own)
        return _written(folder, tensors, facts | _of_every(tuned, task_type or facts.get("task_type"), base))
    places = {site.key: site for site in tuned.anatomy.all_sites}
    held = {key: module for key, module in tuning.modules_by_key().items() if key in places}
    sites = {key: plain_site(places[key], kind or tuning.method.name) for key in held}
    if form is not None:
        form.check_places(sites.values(), tuning.method.name)
    tensors = {}
    for key, module in held.items():
        for part, short in (_PARTS if form is None else form.parts).items():
            value = _acting(module).get(short, getattr(module, short, None))
            if isinstance(value, Tensor):
                given = value.detach()
                tensors[f"{PREFIX}{sites[key].path}.{part}"] = (
                    _shaped(given, _reads(module)) if part == "ia3_l" else given
                )
    values = _own_values(tuned, tuning)
    heads = sorted({unfrozen.name.rpartition(".")[0] for unfrozen in tuning.unfrozen.values()})
    for full, value in values.items():
        if any(full.startswith(f"{path}.") for path in heads):
            tensors[f"{PREFIX}{full}"] = own(full, value)
    paths = [site.path for site in sites.values()]
    facts = {
        "peft_type": form.type if form else "IA3" if kind == "ia3" else "LORA",
        "target_modules": paths, "modules_to_save": heads or None, **_of_every(tuned, task_type, base),
    }  # fmt: skip
    if form is None or form.transposed:
        facts["fan_in_fan_out"] = turned_round(sites.values())
    if form is not None:
        facts |= form.facts(tuning.method)
    elif kind == "ia3":
        facts["feedforward_modules"] = [sites[k].path for k, m in held.items() if _reads(m)]
    else:
        method: Any = tuning.method
        facts |= {"lora_dropout": method.dropout, "bias": "none", "use_dora": kind == "dora"}
        root = getattr(method, "scaling", "rank") == "root"
        facts |= {"use_rslora": True} if root else {}
        facts |= _widths({sites[k].path: m for k, m in held.items()}, method, root)
    return _written(folder, tensors, facts)


def _written(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    with durable.folder(folder.absolute()) as draft:
        draft.write_tensors(WEIGHTS, {n: t.cpu().contiguous() for n, t in tensors.items()})
        draft.write_json(CONFIG, facts)
        draft.share()
    return folder


def _of_every(tuned: Tuned, task_type: str | None, base: str | None) -> dict[str, Any]:
    """What every configuration of peft's says."""
    named = base or str(getattr(tuned.model.config, "_name_or_path", ""))
    return {"inference_mode": True, "task_type": task_type, "revision": None, "base_model_name_or_path": named}


def _widths(modules: Mapping[str, Any], method: Any, root: bool) -> dict[str, Any]:
    """Rank and alpha as peft's file says them: one for all, and a pattern for the layers with another."""
    facts: dict[str, Any] = {}
    for name, pattern, setting, value_of in (
        ("r", "rank_pattern", method.rank, lambda m: len(_acting(m).get("a", m.a))),
        ("lora_alpha", "alpha_pattern", method.alpha, lambda m: m.scale * _power(len(_acting(m).get("a", m.a)), root)),
    ):
        facts[name] = setting
        if isinstance(setting, BySite) or any(_acting(module) for module in modules.values()):
            found = {path: value_of(module) for path, module in modules.items()}
            facts[name] = Counter(found.values()).most_common(1)[0][0]
            facts[pattern] = {path: value for path, value in found.items() if value != facts[name]}
    return facts


def _power(rank: int, root: bool) -> float:
    return math.sqrt(rank) if root else rank


def _acting(module: Any) -> dict[str, Tensor]:
    """A and B of an update that is a thin product of other numbers than those that train; nothing for the others."""
    if not hasattr(module, "a0"):
        return {}
    a, b = module.thin()
    return {"a": a, "b": b}


def _own_values(tuned: Tuned, tuning: Tuning) -> dict[str, Tensor]:
    """The model's tensors by the names that they had before anything was attached, as this tuning has them."""
    copies = {id(tensor): copy for tensor, copy in tuned.edited.base_copies or ()}
    trained = {id(unfrozen.parameter): unfrozen.value for unfrozen in tuning.unfrozen.values()}
    return {
        name: copies.get(id(parameter), trained.get(id(parameter), parameter)).detach()
        for name, parameter in tuned.edited.parameters.items()
    }


def from_peft(model: Model, folder: Path | str) -> Tuned:
    """Attach to `model` what peft saved in `folder`, with the same numbers. Nothing is imported or fetched.

    Raises:
        Refused: a file that is not what it claims to be, or a configuration with a key that is not known.
        ConfigError: a kind or setting that computes something that we do not.
        ModelError: its layers are not those of this model, or not all of a kind.
        IntegrityError: tensors are missing or of other shapes.
    """
    folder = Path(folder)
    known = forms()
    facts = trusted_config.read_json(
        folder / CONFIG,
        READ
        | NO_MATTER
        | SAYS_NOTHING
        | {key for _, form in known.values() for key in {*form.understood(), *form.silent}},
    )
    name, form = known.get(str(facts.get("peft_type")), (None, None))
    silent = SAYS_NOTHING if form is None else set(facts) - COMMON - NO_MATTER - form.understood()
    for key in sorted(silent & facts.keys()):
        if facts[key] not in (None, False, 0, "none", [], {}, ""):
            raise ConfigError(f"{folder / CONFIG}: {key} is {facts[key]!r}; tunings of ours have nothing of that kind.")
    if isinstance(form, PeftWhole) and name is not None:
        return read_whole(model, name, form, facts, safetensors.read(folder / WEIGHTS), folder / CONFIG)
    names = _PARTS if form is None else form.parts
    parts: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for full, tensor in safetensors.read(folder / WEIGHTS).items():
        inner = full.removeprefix(PREFIX)
        part = next((p for p in names if inner.endswith(f".{p}")), None)
        if part is not None:
            parts.setdefault(inner.removesuffix(f".{part}"), {})[names[part]] = tensor
        else:
            heads[inner] = tensor
    every = Anatomy.read(model).all_sites
    tuned_sites = sites_at(every, set(parts), folder / WEIGHTS)
    if form is not None and name is not None:
        settings = {"sites": words_for(tuned_sites.values(), every), **form.chosen(facts, str(folder / CONFIG))}
        method: Any = compose.method(name, settings)
    else:
        method = _method(facts, parts, tuned_sites, every, folder)
    drawn = {key: heads.pop(key) for key in (form.shared if form else {}) if key in heads}
    tuned = attach(model, method, train_head=bool(heads))
    try:
        if form is not None:
            _compare(tuned, form, drawn, folder)
        _fill(tuned, parts, heads, folder, names.values())
    except BaseException:
        tuned.detach()
        raise
    model.eval()
    return tuned


def _fill(
    tuned: Tuned,
    parts: Mapping[str, dict[str, Tensor]],
    heads: Mapping[str, Tensor],
    folder: Path,
    names: Iterable[str],
) -> None:
    places = {site.key: site for site in tuned.anatomy.all_sites}
    waiting = {
        f"{path}.{short}": (tensor, short) for path, tensors in parts.items() for short, tensor in tensors.items()
    }
    with torch.no_grad():
        for key, module in tuned.modules().items():
            for short in names if key in places else ():
                parameter = getattr(module, short, None)
                if isinstance(parameter, Tensor):
                    found, _ = waiting.pop(f"{places[key].path}.{short}", (None, ""))
                    if not isinstance(parameter, nn.Parameter):
                        _same(parameter, found, f"{key}.{short}", folder)
                        continue
                    _copy(parameter, found.flatten() if found is not None and short == "scale" else found, key, folder)
        named = dict(tuned.model.named_parameters())
        for name, tensor in heads.items():
            if name not in named:
                raise IntegrityError(f"{folder / WEIGHTS}: {name!r} is no tensor of this model. Take the right base.")
            _copy(named[name], tensor, name, folder)
    if waiting:
        raise IntegrityError(f"{folder / WEIGHTS}: {', '.join(sorted(waiting)[:3])} have no place in this model.")


def _compare(tuned: Tuned, form: PeftForm, drawn: Mapping[str, Tensor], folder: Path) -> None:
    """What is drawn from a seed here must be what the file holds."""
    modules = tuned.tuning().modules_by_key()
    for key, found in drawn.items():
        home, short = form.shared[key]
        _same(getattr(modules[home], short), found, key, folder)


def _same(ours: Tensor, found: Tensor | None, name: str, folder: Path) -> None:
    if found is None or found.shape != ours.shape or not torch.allclose(found.to(ours), ours, rtol=1e-4, atol=1e-6):
        raise IntegrityError(
            f"{folder / WEIGHTS}: {name} is not what it is on this model. Take the right base; where it is drawn "
            "from a seed, the file was made with another or by another way of drawing."
        )


def _copy(parameter: nn.Parameter, found: Tensor | None, name: str, folder: Path) -> None:
    if found is None or found.shape != parameter.shape:
        shape = "nothing" if found is None else str(list(found.shape))
        raise IntegrityError(f"{folder / WEIGHTS}: {name} is {shape}; this model needs {list(parameter.shape)}.")
    parameter.copy_(found)


def _method(
    facts: Mapping[str, Any],
    parts: Mapping[str, dict[str, Tensor]],
    sites: Mapping[str, Site],
    every: Sequence[Site],
    folder: Path,
) -> Any:
    """The method of ours that attaches at exactly these places."""
    if facts.get("peft_type") == "IA3":
        reads = {p for p, tensors in parts.items() if tensors["scale"].shape[0] == 1}
        read, given = ([s for p, s in sites.items() if (p in reads) == wanted] for wanted in (True, False))
        places = {"outputs": words_for(given, every), "inputs": words_for(read, every)}
        return compose.method("ia3", {**places, "cross": False})
    if facts.get("peft_type") != "LORA":
        there = ", ".join(sorted(forms()))
        raise ConfigError(
            f"{folder / CONFIG}: peft_type {facts.get('peft_type')!r}; LORA, IA3 and {there} can be read."
        )
    start = facts.get("init_lora_weights")
    if start not in STARTS:
        raise ConfigError(
            f"{folder / CONFIG}: init_lora_weights is {start!r}, a start that peft takes out of the base. Save "
            "it there as a LoRA of the whole base: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    ranks = _by_path(facts, "rank_pattern", int(facts["r"]), sites, folder)
    alphas = _by_path(facts, "alpha_pattern", float(facts["lora_alpha"]), sites, folder)
    name, rooted = "dora" if facts.get("use_dora") else "lora", bool(facts.get("use_rslora"))
    settings = {
        "sites": words_for(sites.values(), every),
        "rank": _one_or_rules(ranks, sites),
        "alpha": _one_or_rules(alphas, sites),
    }
    settings["scaling"] = "root" if rooted else "rank"
    return compose.method(name, settings)


def _by_path(
    facts: Mapping[str, Any], pattern: str, default: float, sites: Mapping[str, Site], folder: Path
) -> dict[str, Any]:
    """The value of each layer: the first key of the pattern that its path ends with, as peft takes it.

    Raises:
        ConfigError: a key that is no path, such as a regular expression: those of others are not run.
    """
    given = facts.get(pattern) or {}
    for key in given:
        if not any(path == key or path.endswith(f".{key}") for path in sites):
            raise ConfigError(
                f"{folder / CONFIG}: {pattern} has {key!r}, which is no tuned layer or the end of its path."
            )
    met = {path: next((k for k in given if path == k or path.endswith(f".{k}")), None) for path in sites}
    return {path: default if key is None else type(default)(given[key]) for path, key in met.items()}


def _one_or_rules(values: Mapping[str, Any], sites: Mapping[str, Site]) -> Any:
    """One number where all are alike, else a rule for each place."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return {sites[path].key: value for path, value in values.items()}


def _reads(module: nn.Module) -> bool:
    return type(module).__name__ == "RescaleInput"


def _shaped(scale: Tensor, reads: bool) -> Tensor:
    return scale[None, :] if reads else scale[:, None]
