"""`luthier certify`: whether what ships is what was trained."""

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import IntegrityError

if TYPE_CHECKING:
    from luthier.workflow.certificate import Step

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    prompts: Annotated[
        str | None,
        typer.Option(help="Compare on these rows too: a file with the columns of the training rows, or a text a line."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Also hold the merged model in these codes: nf4, int8, int4 or int2.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Look at this merged or exported folder, in place of new ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a run, by every way that leads out of its folder, with what its model computed when training ended.

    It is loaded again, served, taken off and put on, merged and read by transformers, exported and read by peft: each
    in a process of its own. What came out is in certificate.json in the run's folder.

    Examples:

      luthier certify runs/x

      luthier certify runs/x --prompts questions.txt --store nf4

      luthier certify runs/x --folder for-a-colleague
    """
    from luthier.workflow.certify_run import certify

    with screen().busy("reloaded") as tell:
        found = certify(run, prompts=prompts, store=store, folder=folder, say=lambda step: tell(f"after {step.name}"))
    screen().result(found.to_plain())
    compared_on = f"{found.rows} rows that the run kept" + (f" and {found.prompts} of yours" if found.prompts else "")
    screen().headline(f"{run}: {found.method} on {found.model}, compared on {compared_on}")
    head = ("step", "", "largest gap", "allowed", "from base", "KL", "same answer", "same tokens")
    screen().table(head, [_line(step) for step in found.steps], right=head[2:])
    for step in found.steps:
        if step.reason:
            screen().show(f"{step.name}: {step.reason}")
    programs = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    screen().say(f"luthier {found.luthier}, {programs}; {found.date}; in {run}/certificate.json")
    if found.failed:
        names = ", ".join(step.name for step in found.failed)
        raise IntegrityError(
            f"{run}: not the model that was trained: {names}. The reasons stand above; ship none of these."
        )


def _line(step: "Step") -> tuple[str, ...]:
    gap = "same bits" if step.same_bits else _short(step.gap)
    numbers = (_short(value) for value in (step.tolerance, step.from_base, step.kl))
    return step.name, step.status, gap, *numbers, _share(step.likeliest), _share(step.greedy)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
