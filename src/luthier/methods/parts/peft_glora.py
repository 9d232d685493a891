"""GLoRA in peft's files: one way of each term for all layers there, one for each place here.

Ours go out in the richest ways, which hold every other one exactly: a vector is a product whose first row is ones.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import CannotMerge, ConfigError, IntegrityError
from luthier.surgery import PeftIn, PeftOut, PeftTaken, PeftWhole
from luthier.surgery.peft_forms import PEFT_LAYERS

__all__ = ["glora_form"]

TERMS = ("a", "b", "c", "d", "e")
OURS = {"lora": "low_rank", "vector": "vector", "constant": "constant", "none": "none"}
KEYS = {"a": "config_A_B", "b": "config_A_B", "c": "config_C", "d": "config_D_E", "e": "config_D_E"}
USUAL = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}


def glora_form(ways: Mapping[str, tuple[str, ...]]) -> PeftWhole:
    """The form. ways: of each term, in the order in which a place's choice is stored."""

    def out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors: dict[str, Tensor] = {}
        rank = int(going.method.rank)
        for key, site in going.sites.items():
            chosen = dict(zip(TERMS, going.stored[f"{key}.path"].tolist(), strict=True))
            way = {term: ways[term][number] for term, number in chosen.items()}
            if site.bias is None and (way["c"], way["e"]) != ("none", "none"):
                raise CannotMerge(
                    f"glora: {key} has no bias, and its way makes one; peft leaves that out. Set c=none e=none, or "
                    "export the merged model."
                )
            at = f"{PEFT_LAYERS}{site.path}.glora_"
            for term in TERMS if site.bias is not None else ("a", "b"):
                rows = site.d_in if term == "c" else site.d_out
                down, up = (going.stored.get(f"{key}.terms.{term}.{part}") for part in ("down", "up"))
                if term in ("d", "e"):
                    tensors[f"{at}{term.upper()}.X"] = _column(way[term], down, rows)[:, 0].contiguous()
                    continue
                thin, wide = _product(way[term], down, up, rows, 1 if term == "c" else site.d_in, rank)
                tensors[f"{at}{term.upper()}.Xd"], tensors[f"{at}{term.upper()}.Xu"] = thin, wide
        return tensors, {"config_A_B": "lora", "config_C": "lora", "config_D_E": "vector"}

    def back(coming: PeftIn) -> PeftTaken:
        said = {key: str(coming.facts.get(key, usual)) for key, usual in USUAL.items()}
        strange = next((key for key, value in said.items() if value not in OURS), None)
        if strange is not None:
            raise ConfigError(f"{coming.where}: {strange} is {said[strange]!r}; it must be one of {', '.join(OURS)}.")
        names = [name.removeprefix(PEFT_LAYERS) for name in coming.tensors]
        sites, words = coming.sites_of({name.partition(".glora_")[0] for name in names if ".glora_" in name})
        bare = [site.bias is None for site in sites.values()]
        settings: dict[str, object] = {"sites": words}
        for term in TERMS:
            way = OURS[said[KEYS[term]]]
            settings[term] = way if term in "ab" or not any(bare) else "none" if all(bare) else "search"
        stored: dict[str, Tensor] = {}
        rank = int(coming.facts.get("r", 8))
        for path, site in sites.items():
            path_of = []
            for term in TERMS:
                way = OURS[said[KEYS[term]]] if term in "ab" or site.bias is not None else "none"
                path_of.append(ways[term].index(way))
                rich = settings[term] == "search" and site.bias is not None
                stored |= _taken(coming, path, site, term, way, rank, rich=rich)
            stored[f"{site.key}.path"] = torch.tensor(path_of, dtype=torch.int32)
        return PeftTaken(settings, stored)

    return PeftWhole(
        "GLORA", out=out, back=back, transposed=False, settings={"r": "rank"}, also=tuple(USUAL),
        ignored=("init_weights",),
    )  # fmt: skip


def _column(way: str, down: Tensor | None, rows: int) -> Tensor:
    """What a vector, a number or nothing gives to every row: (rows, 1)."""
    if down is None or way == "none":
        return torch.zeros(rows, 1)
    return (down[:, :1] if way == "vector" else down[:1, :1]).expand(rows, 1)


def _product(
    way: str, down: Tensor | None, up: Tensor | None, rows: int, columns: int, rank: int
) -> tuple[Tensor, Tensor]:
    """A term as two thin matrices, (rows, rank) and (rank, columns)."""
    if way == "low_rank" and down is not None and up is not None:
        return down.contiguous(), up.contiguous()
    ones = torch.ones(1, columns)
    return F.pad(_column(way, down, rows), (0, rank - 1)).contiguous(), F.pad(ones, (0, 0, 0, rank - 1)).contiguous()


def _taken(coming: PeftIn, path: str, site: Site, term: str, way: str, rank: int, *, rich: bool) -> dict[str, Tensor]:
    """A term's tensors as they are stored here. rich: with room for every way, of which this is one."""
    at, key = f"{PEFT_LAYERS}{path}.glora_{term.upper()}.", f"{site.key}.terms.{term}"
    if way == "none" and not rich:
        return {}
    if way == "low_rank":
        return {f"{key}.down": coming.tensor(f"{at}Xd"), f"{key}.up": coming.tensor(f"{at}Xu")}
    rows = site.d_in if term == "c" else site.d_out
    down = torch.zeros(1, 1) if way == "none" else coming.tensor(f"{at}X").reshape(-1, 1)
    if len(down) not in (1, rows):
        raise IntegrityError(f"{coming.where}: {at}X has {len(down)} numbers, and the layer has {rows}. Restore it.")
    if not rich:
        return {f"{key}.down": down}
    down = F.pad(down.expand(rows, 1), (0, rank - 1 if term == "c" else 0)).contiguous()
    return {f"{key}.down": down, **({f"{key}.up": torch.zeros(rank, 1)} if term == "c" else {})}
