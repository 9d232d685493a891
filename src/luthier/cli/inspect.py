"""`luthier inspect`: every place of a model under its one name. Reads structure; loads no weights."""

from typing import Annotated, Any

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import human_count, plain

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    model: Annotated[str, typer.Argument(help="A model folder, sample:NAME, or a hub name.")],
    as_json: AsJson = False,
) -> None:
    """Print a model's sites: the names under which methods find their places in it.

    Examples:

      luthier inspect sample:minilm-l6

      luthier inspect ./my-model --json
    """
    from luthier.cli._read_anatomy import read_anatomy

    anatomy, class_name = read_anatomy(model)
    rows = anatomy.table()
    facts: dict[str, Any] = {
        "model": model,
        "class": class_name,
        "type": anatomy.model_type,
        "n_params": anatomy.n_params,
        "width": anatomy.d,
        "inner_width": anatomy.m,
        "n_layers": anatomy.n_layers,
        "heads": {"query": anatomy.n_heads, "key_value": anatomy.n_kv_heads, "width": anatomy.d_head},
        "vocabulary": anatomy.vocab_size,
        "longest": anatomy.max_positions,
        "sites": rows,
        "layers": [plain(block) for block in anatomy.blocks],
        "unknown": list(anatomy.unknown),
        "remarks": list(anatomy.remarks),
    }
    screen().result(facts)
    show = screen().show
    show(f"{model}: {class_name}, {human_count(anatomy.n_params)} numbers")
    heads = f"{anatomy.n_heads} heads of width {anatomy.d_head}"
    if anatomy.n_kv_heads != anatomy.n_heads:
        heads += f" ({anatomy.n_kv_heads} for keys and values)"
    show(f"{anatomy.n_layers} layers of width {anatomy.d}, {heads}, inner width {anatomy.m}")
    longest = f"at most {anatomy.max_positions} tokens" if anatomy.max_positions else "no bound on length"
    show(f"{anatomy.vocab_size or 'no'} words, {longest}")
    stems = _stems(anatomy.blocks)
    for stem, short in stems.items():
        show(f"{short} stands for {stem.replace('{}', 'N')}, a layer's number")
    show()
    cells = []
    for row in rows:
        site = row["site"] + (f" ({row['part']})" if row["part"] else "")
        path = row["path"]
        for stem, short in stems.items():
            path = path.replace(stem, short, 1) if path.startswith(stem) else path
        if row["notes"]:
            path += f"\n{row['notes']}"
        cells.append((site, path, row["shape"], row["count"], human_count(row["n_params"]) if row["n_params"] else ""))
    screen().table(("site", "path", "shape", "count", "numbers"), cells, right=("shape", "count", "numbers"))
    for remark in anatomy.remarks:
        show(f"\n{remark[0].upper()}{remark[1:]}.")
    if anatomy.unknown:
        show(f"\nNot known: the order inside {', '.join(anatomy.unknown)}; these layers are no sites of their own.")
    show(f"\nNext: luthier train {model} --data FILE --method lora --set sites=attn.q,attn.v")


def _stems(blocks: tuple[Any, ...]) -> dict[str, str]:
    """Where layers lie, such as `encoder.layer.{}` -> a short word for it, such as {0..5}: paths are long."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for block in blocks:
        numbers.setdefault((block.path.rpartition(".")[0] + ".{}", block.stack), []).append(block.layer)
    return {stem: f"{stack}{{{min(layers)}..{max(layers)}}}" for (stem, stack), layers in numbers.items()}
