"""From the words of a command to a verb, and from what the verb raises to a message and an exit code.

No verb imports torch before it needs it: `luthier methods` and every `--help` answer at once.
"""

import contextlib
import inspect
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from luthier.__version__ import __version__
from luthier.cli._output import Screen
from luthier.core import LuthierError, UnknownName, near, other_names

__all__ = ["HELP", "guarded", "main", "verbs"]

HELP = """Fine-tune any transformer with any method, and know beforehand what it costs.

A first run:  luthier demo
With rows:    luthier train sample:minilm-l6 --data FILE

Exit codes: 0 done · 2 wrong use · 3 bad input · 4 damaged or refused bytes · 5 memory, disk or lock · 6 diverged ·
7 gate not passed · 130, 143 interrupted (the run can be resumed) · 1 a bug of ours. With --json, errors come as JSON.
"""

COMPLETING = "_LUTHIER_COMPLETE"  # set by the shell that wants a word completed
READS_ROWS = frozenset({"ask", "compare", "evaluate", "find-lr", "look", "plan", "predict", "safety-audit", "train"})
ROWS = frozenset({".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"})
# With one of these, what the command prints is its answer.
ASKS = frozenset({"--help", "-h", "--version", "--show-completion", "--install-completion"})

# Typer brings its own copy of click and gives out only the leaves of its tree of errors.
WrongUse: type[Any] = typer.BadParameter.__bases__[0]


class Verbs(TyperGroup):
    """The group of all verbs: an unknown one is answered with near names."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise UnknownName(
                f"No command is called {args[0]!r}.{near(args[0], list(self.commands))} "
                f"There are {', '.join(self.commands)}; `luthier --help` says what they do."
            )
        return super().resolve_command(ctx, args)


def verbs() -> list[str]:
    """The names of all verbs: the files of this folder."""
    order = ["demo", "methods", "strategies", "inspect", "samples", "train", "resume", "predict"]
    found = [
        m.name.replace("_", "-")
        for m in pkgutil.iter_modules([str(Path(__file__).parent)])
        if not m.name.startswith("_")
    ]
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def application(wanted: Sequence[str], words: Sequence[str] = ()) -> Any:
    """The verbs as one command, made by typer."""
    app = typer.Typer(
        cls=Verbs, help=HELP, no_args_is_help=True, add_completion=True, rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]}, pretty_exceptions_enable=False,
    )  # fmt: skip

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"luthier {__version__}")
            raise typer.Exit

    @app.callback()
    def _(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
        ] = False,
    ) -> None:
        pass

    for verb in wanted:
        module = import_module(f"luthier.cli.{verb.replace('-', '_')}")
        # A verb whose options depend on other words, as a method's settings do, makes its command for them.
        command = module.command_for(words) if hasattr(module, "command_for") else module.command
        app.command(name=verb, no_args_is_help=getattr(module, "NEEDS_WORDS", False))(command)
    made = typer.main.get_command(app)
    for command in (made, *getattr(made, "commands", {}).values()):
        _take_words_as_they_are(command)
    return made


def _take_words_as_they_are(command: Any) -> None:
    """Brackets in a help text are brackets: rich would take `[default: 3]` for a colour and drop it.

    A paragraph is one line, which is wrapped where it is shown; lines of two blanks or with a command stay apart.
    """
    from rich.markup import escape

    command.help = escape(_flowing(inspect.cleandoc(command.help or "")))
    for param in command.params:
        if getattr(param, "help", None):
            if "[default: " in param.help:
                param.show_default = False  # else it stands there twice
            param.help = escape(param.help)


def _flowing(text: str) -> str:
    return "\n\n".join(
        part if "  " in part or part.startswith("luthier ") else " ".join(part.split("\n"))
        for part in text.split("\n\n")
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Nothing it raises on purpose shows a traceback."""
    words = list(sys.argv[1:] if words is None else words)
    polite()
    screen = Screen.start(as_json="--json" in words)
    known = verbs()
    # Only the verb asked for is imported; help and misspelt words need all of them.
    wanted = [words[0]] if words and words[0] in known else known
    asking = not words or bool(ASKS & set(words)) or COMPLETING in os.environ
    if asking:
        from luthier.cli._help_tables import keep_names_whole

        keep_names_whole()

    def run() -> int:
        # Libraries print, and so does typer where words are missing: standard output holds the result, which the
        # screen writes there, and nothing else.
        with contextlib.nullcontext() if asking else contextlib.redirect_stdout(sys.stderr):
            code = application(wanted, words)(args=words, prog_name="luthier", standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0

    return guarded(screen, run, words)


def polite() -> None:
    """Let threads that wait spin only a little, then sleep. Read when torch is loaded, so it stands here.

    Beside another busy process on two cores, unbounded spinning made training of minilm-l6 many times slower; sleeping
    at once costs a quarter on idle cores (docs/speed-log.md). A user's own setting is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def guarded(screen: Screen, run: Callable[[], int], words: Sequence[str] = ()) -> int:
    """Call `run`; turn whatever it raises into a message and the exit code for it."""
    try:
        return run()
    except LuthierError as error:
        return screen.failed(type(error).__name__, str(error), error.exit_code)
    except WrongUse as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer has printed the help
            return 2
        verb = " ".join(["luthier", *[w for w in words[:1] if w in verbs()]])
        if "--method" in words[1:-1]:  # whose settings are options too
            verb += f" --method {words[words.index('--method') + 1]}"
        said = error.format_message().rstrip(".")
        if asked := getattr(error, "option_name", None):  # there is no such option
            said += _called_here(str(asked), words)
        said += _rows_meant(said, words)
        return screen.failed("UsageError", f"{said}{_given(error, words)}. `{verb} --help` shows what it takes.", 2)
    except (typer.Abort, KeyboardInterrupt):
        return screen.failed("Interrupted", "stopped by Ctrl-C; nothing half-written was left behind.", 130)
    except BrokenPipeError:
        # Whoever read us, such as `head`, has seen enough. Python flushes once more when it ends: give it a place to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr, end="")
        return screen.failed(
            type(error).__name__,
            f"{error}\nThis is a bug in luthier, not a mistake of yours. Please report it with the lines above and "
            f"the command. Version {__version__}.",
            1,
        )


def _rows_meant(said: str, words: Sequence[str]) -> str:
    """Where one word too many names rows: the option that takes them."""
    found = re.search(r"unexpected extra argument(?:s|\(s\))? \((.+)\)$", said)
    if found is None or words[0] not in READS_ROWS:
        return ""
    named = found[1].split()[0]
    rows = named.startswith("sample:") or Path(named).suffix.lower() in ROWS
    return f". Rows stand behind an option: --data {named}" if rows else ""


def _called_here(option: str, words: Sequence[str]) -> str:
    """What an option of another library is called here."""
    ours = other_names.SETTINGS.get(option.lstrip("-").replace("-", "_"))
    if ours is None:
        return ""
    value = dict(pairwise(words)).get(option, "VALUE")
    if ours == "sites":
        value = ",".join(other_names.place_here(name.strip()) or name.strip() for name in value.split(","))
    return f". Here it is --{ours.replace('_', '-')} {value}"


def _given(error: Any, words: Sequence[str]) -> str:
    """What stood after the option that an error is about: typer names the option and not always the value."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for option, value in pairwise(words):
        if option in names:
            return f" (got {value!r})"
    for word in words:
        name, sign, value = word.partition("=")
        if sign and name in names:
            return f" (got {value!r})"
    return ""
