"""`luthier samples`: real models and data for a first run, pinned and checked."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import UnknownName, UsageError, near

__all__ = ["command"]

ACTIONS = ("fetch", "verify")


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="fetch NAME... brings samples here; verify NAME... reads every byte.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the sample models and data sets, or fetch some. Anything named `sample:NAME` is fetched when first used.

    Examples:

      luthier samples

      luthier samples fetch minilm-l6 trec6

      luthier samples verify trec6
    """
    from luthier import samples

    if not words:
        rows = samples.rows()
        screen().result({"folder": str(samples.cache_dir()), "samples": rows})
        cells = [
            (r["name"], r["kind"], r["size"], "yes" if r["cached"] else "no", f"{r['title']}\n  {r['licence']}")
            for r in rows
        ]
        screen().table(("name", "kind", "size", "here", "what · licence"), cells, right=("size",))
        screen().show(f"\nKept in {samples.cache_dir()}. Next: luthier samples fetch minilm-l6 trec6")
        return
    action, *names = words
    if action not in ACTIONS:
        raise UnknownName(
            f"samples: no action is called {action!r}.{near(action, list(ACTIONS))} "
            "Write `luthier samples`, `luthier samples fetch NAME...` or `luthier samples verify NAME...`."
        )
    if not names:
        raise UsageError(f"samples {action}: which? Name one or more, such as `luthier samples {action} trec6`.")
    names = [name.removeprefix(samples.PREFIX) for name in names]
    for name in names:
        samples.find(name)  # a misspelt last name must not cost the download of the first
    done = {}
    for name in names:
        if action == "fetch":
            done[name] = {"path": str(samples.fetch(name, progress=screen().say))}
            screen().show(f"{name}: {done[name]['path']}")
        else:
            digests = samples.verify(name)
            done[name] = {"files": digests}  # type: ignore[dict-item]
            screen().show(f"{name}: {len(digests)} files, each as it was made")
    screen().result({action: done})
