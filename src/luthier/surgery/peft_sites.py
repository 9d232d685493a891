"""Layers as peft's files name them: each by its path, and whole."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from luthier.anatomy import Site
from luthier.core import CannotMerge, ModelError

__all__ = ["plain_site", "sites_at", "turned_round", "words_for"]


def words_for(sites: Iterable[Site], every: Iterable[Site]) -> list[str]:
    """These sites as choices: a kind where all that the model has of it are among them, else each by its own."""
    keys = {site.key for site in sites}
    whole = {s.kind for s in every} - {s.kind for s in every if s.key not in keys}
    return sorted({s.kind if s.kind in whole else s.key for s in every if s.key in keys})


def sites_at(every: Sequence[Site], paths: set[str], where: Path) -> dict[str, Site]:
    """The sites of these paths.

    Raises:
        ModelError: a path is no layer of the model, or there is none.
    """
    found = {site.path: site for site in every if site.path in paths and site.n_params}
    strange = sorted(paths - found.keys())
    if strange or not paths:
        named = ", ".join(strange[:3]) or "nothing"
        raise ModelError(f"{where}: {named} is no layer of this model that can be tuned. Take the right base.")
    return {path: plain_site(site, "peft's file") for path, site in found.items()}


def plain_site(site: Site, kind: str) -> Site:
    """Hand the site back if it is a whole layer.

    Raises:
        CannotMerge: it is a part of one.
    """
    if site.rows is not None or site.expert is not None or site.shared > 1 or site.param != "weight":
        raise CannotMerge(f"{kind}: {site.key} is only a part of {site.path}; peft's files name whole layers.")
    return site


def turned_round(sites: Iterable[Site]) -> bool:
    """Whether the layers store their weight as (d_in, d_out).

    Raises:
        CannotMerge: some do.
    """
    values = {site.transposed for site in sites}
    if len(values) > 1:
        raise CannotMerge("peft's files hold layers of one orientation; these weights are stored both ways round.")
    return values.pop()
