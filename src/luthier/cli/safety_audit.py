"""`luthier safety-audit`: whether a tuning broke what the model refused."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import DataError, NotPassed

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run that writes text.")],
    prompts: Annotated[
        str,
        typer.Option(help="What it should refuse: a .txt file with a prompt a line, or rows with prompt or messages."),
    ],
    harmless: Annotated[str | None, typer.Option(help="Prompts that it should answer, in place of ours.")] = None,
    before: Annotated[str | None, typer.Option(help="Compare with this run or model, in place of its base.")] = None,
    judge: Annotated[str | None, typer.Option(help="A run or a model that scores answers from 1 to 5.")] = None,
    refusals: Annotated[str | None, typer.Option(help="Phrases by which a refusal is known, one a line.")] = None,
    texts: Annotated[str | None, typer.Option(help="Texts to measure the drift over, one a line.")] = None,
    useful: Annotated[
        str | None, typer.Option(help="Rows of everyday use with answers, to measure what else the tuning changed.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system says first, as where it will be used.")] = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer, at most.")] = 64,
    allow: Annotated[float, typer.Option(help="By how much a share may get worse.")] = 0.05,
    most_kl: Annotated[float | None, typer.Option(help="Refuse a drift of more nats a token.")] = None,
    answers: Annotated[str | None, typer.Option(help="Write all answers, before and after, to this file.")] = None,
    beside: Annotated[str | None, typer.Option(help="Show the audit of another run beside it, made alike.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a tuned model and its base the same prompts: what they refuse, harmful or harmless, and how far words moved.

    What came out is in safety-audit.json and safety-audit.txt in the run's folder. The exit code is 7 where a share got
    worse by more than is allowed, and 3 where the numbers say nothing. The prompts are yours, and are not copied there.

    Examples:

      luthier safety-audit runs/x --prompts prompts.txt

      luthier safety-audit runs/x --prompts prompts.txt --judge a-larger-model --allow 0.02
    """
    from luthier.workflow import safety_audit as audits

    with screen().busy("asking both models"):
        card = audits.safety_audit(
            run, prompts, before=before, harmless=harmless, texts=texts, useful=useful, phrases=refusals,
            judge=judge, system=system, new_tokens=new_tokens, allow=allow, most_kl=most_kl, answers=answers,
        )  # fmt: skip
    screen().result(card.to_plain())
    screen().headline(f"{run}: a tuning of {card.model}, beside {card.compared_with}: {card.verdict}")
    screen().table(("share (95 %)", "before", "after"), list(card.rows()), right=("before", "after"))
    if beside is not None:
        compared = audits.beside(audits.read_card(run), audits.read_card(beside))
        screen().table(("after tuning", run, beside), [(n, str(a), str(b)) for n, a, b in compared])
    screen().say(f"in {run}/{audits.CARD}; it says nothing of prompts that were not asked")
    if card.verdict == audits.FAILED:
        raise NotPassed(
            f"{run}: the tuning made it worse: {'; '.join(card.reasons)}. Mix in rows that are refused, stay nearer to "
            "the base (--strategy l2_sp, a lower rate), or look at the answers (--answers FILE)."
        )
    if card.verdict == audits.NOTHING:
        raise DataError(f"{run}: {'; '.join(card.reasons)}.")
