"""`luthier chat`: talk with a finished run."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import DataError

if TYPE_CHECKING:
    from luthier.workflow.conversation import Conversation

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True
COMMANDS = "/reset forgets all turns, /system TEXT begins anew with it, /exit ends"


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run that learnt from chats.")],
    text: Annotated[
        list[str] | None, typer.Option(help="A turn of yours, in place of the keyboard; may be given several times.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system says first.")] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Show what the base answers to the same conversation, too.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="0 takes the likeliest token each time; higher is more varied.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0, from all.")] = 0,
    repetition: Annotated[
        float | None,
        typer.Option(
            "--repetition",
            "--repetition-penalty",
            help="Make what the answer has said already less likely by this factor, such as 1.2; 1 not, even where the "
            "model's own files say so. [default: as these say]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Names the draws: the same words get the same answers.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Talk with a finished run. It remembers the turns; answers are shown as they are written.

    Examples:

      luthier chat runs/x

      luthier chat runs/x --system "Answer in one sentence." --temperature 0.7 --top-p 0.9

      luthier chat runs/x --text "How tall is it?" --compare-base
    """
    from luthier.workflow.controls import Controls
    from luthier.workflow.conversation import conversation_with

    controls = Controls(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition=repetition, seed=seed,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    with screen().busy("loading"):
        talk = conversation_with(run, controls, system)
    turns: list[dict[str, Any]] = []
    if talk.own_words:
        screen().say(talk.own_words)
    keyboard = not text and sys.stdin.isatty()
    if keyboard:
        screen().say(COMMANDS)
    for said in text or _typed(keyboard):
        if _is_command(talk, said):
            if said.split()[0] == "/exit":
                break
            continue
        try:
            turns.append(_turn(talk, said, compare_base))
        except DataError as error:
            if not keyboard:
                raise
            screen().say(str(error))
    screen().result({"run": run, "turns": turns, **({"generation_config": talk.own} if talk.own else {})})


def _typed(keyboard: bool) -> Iterator[str]:
    """The lines of standard input; empty ones are none."""
    while True:
        if keyboard:
            screen().ask("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _is_command(talk: "Conversation", said: str) -> bool:
    """Whether the line was a command; it is carried out then."""
    word, _, rest = said.partition(" ")
    if word == "/system" and rest.strip():
        talk.reset(rest.strip())
    elif word == "/reset":
        talk.reset()
    elif word != "/exit":
        if word.startswith("/") and word[1:].isalpha():
            screen().say(f"no command is called {word}: {COMMANDS}")
            return True
        return False
    return True


def _turn(talk: "Conversation", said: str, compare_base: bool) -> dict[str, Any]:
    shown, held = screen(), list[str]()
    if compare_base:
        shown.piece("run:  ")
    answer, of_base = talk.say(said, shown.piece, held.append if compare_base else None)
    shown.piece("\n")
    if not answer.ended:
        shown.say(f"cut after {answer.tokens} tokens (--max-new-tokens)")
    turn: dict[str, Any] = {"user": said, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
    if of_base is not None:
        shown.piece(f"base: {of_base.text}\n")
        turn["base"] = of_base.text
    return turn
