"""Methods whose files in peft are more than the same tensors at each layer: a bank for all, vectors before the text.

What they write and read is said by two functions of the form (`PeftWhole`); here is what all of them share: the head,
the layers, and the way of tensors into a fresh tuning.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import CannotMerge
from luthier.core.protocols import Model
from luthier.surgery import compose, tuning_files
from luthier.surgery.peft_forms import PeftIn, PeftOut, PeftWhole
from luthier.surgery.peft_sites import plain_site, sites_at, turned_round, words_for
from luthier.surgery.tuned import Tuned, attach
from luthier.surgery.tuning import Tuning

__all__ = ["read_whole", "write_whole"]

HEAD = "head/"
ANSWERS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def answers_of(model: Any) -> str:
    """What a model is for, as peft calls it, from the name of its class; "" where that does not tell."""
    name = type(model).__name__
    return next((kind for ending, kind in ANSWERS.items() if name.endswith(ending)), "")


def write_whole(
    tuned: Tuned, tuning: Tuning, form: PeftWhole, task_type: str | None, own: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a tuning.

    Raises:
        CannotMerge: peft computes something else, or keeps no head in such a file.
    """
    assert form.out is not None
    stored = tuning_files.stored_tensors(tuning)
    heads = {key: stored.pop(key) for key in [k for k in stored if k.startswith(HEAD)]}
    name = tuning.method.name
    if heads and not form.heads:
        raise CannotMerge(
            f"{name}: peft's {form.type} keeps no head in its file, and this tuning has one. Export the merged model, "
            "or train with train_head=false."
        )
    places = {site.key: site for site in tuned.anatomy.all_sites}
    sites: dict[str, Site] = {key: plain_site(places[key], name) for key in tuning.modules_by_key() if key in places}
    form.check_places(sites.values(), name)
    answers = task_type or answers_of(tuned.model)
    tensors, facts = form.out(PeftOut(tuning.method, stored, sites, tuned.anatomy, tuned.model, answers, tuned.tensor))
    if form.heads and not heads and answers in ("SEQ_CLS", "TOKEN_CLS"):  # peft asks for one, trained or not
        heads = {f"{HEAD}{n}": tuned.tensor(n).detach() for n in tuned.anatomy.head_tensors}
    paths = sorted({key.removeprefix(HEAD).rpartition(".")[0] for key in heads})
    for key, value in heads.items():
        full = key.removeprefix(HEAD)
        tensors[f"{form.prefix}{full}"] = own(full, value)
    facts = {"peft_type": form.type, "task_type": answers or None, **form.facts(tuning.method), **facts}
    if sites:
        facts["target_modules"] = [site.path for site in sites.values()]
        facts |= {"fan_in_fan_out": turned_round(sites.values())} if form.transposed else {}
    return tensors, facts | ({"modules_to_save": paths or None} if form.heads else {})


def read_whole(
    model: Model, name: str, form: PeftWhole, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path
) -> Tuned:
    """Attach what peft's file holds.

    Raises:
        ConfigError, ModelError, IntegrityError: it asks for what we do not compute, or does not fit this model.
    """
    assert form.back is not None
    anatomy = Anatomy.read(model)
    heads = {f"{form.prefix}{n}": f"{HEAD}{n}" for n in anatomy.head_tensors}

    def sites_of(paths: set[str]) -> tuple[dict[str, Site], list[str]]:
        sites = sites_at(anatomy.all_sites, paths, where)
        return sites, words_for(sites.values(), anatomy.all_sites)

    inside = {n: t for n, t in tensors.items() if n not in heads}
    settings = form.chosen(facts, str(where))
    taken = form.back(PeftIn(facts, inside, anatomy, model, str(where), model.get_parameter, sites_of))
    head = {heads[n]: t for n, t in tensors.items() if n in heads}
    tuned = attach(model, compose.method(name, settings | taken.settings), train_head=bool(head))
    try:
        tuning_files.restore(tuned.tuning(), {**taken.stored, **head}, str(where))
    except BaseException:
        tuned.detach()
        raise
    model.eval()
    return tuned
