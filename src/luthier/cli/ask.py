"""`luthier ask`: a model is asked about held-out rows in several ways, without training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli._asking import named_ways, show_prompts, show_standings
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._shelf import WAYS
from luthier.cli._spec_options import complete_data, complete_model
from luthier.core import ConfigError, LuthierError, UsageError, plain

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True
REMOTE = "openai:"


def _complete(incomplete: str) -> list[str]:
    return [name for name in WAYS.names() if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, sample:NAME, a hub name, a finished run, or openai:NAME with --endpoint.",
        autocompletion=complete_model,
    ),
]
Ways = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        metavar="NAMES",
        help="Ways of asking, with commas between: icl,pmi_dc; icl:k=4 with settings of its own.",
        autocompletion=_complete,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of every way that has it; icl.k=4 of one way alone."),
]
Source = Annotated[
    str | None,
    typer.Option("--data", help="Rows as for training; held-out ones are asked about.", autocompletion=complete_data),
]
Test = Annotated[str | None, typer.Option(help="Rows to ask about, where they are a file of their own.")]
Rows = Annotated[int | None, typer.Option(help="Ask about so many of them. [default: all]", min=1)]
Out = Annotated[
    str | None, typer.Option(help="Write each row's answer, with the digests of its prompts, to this .jsonl file.")
]


def command(
    model: Model,
    data: Source = None,
    strategy: Ways = None,
    settings: Settings = None,
    test: Test = None,
    rows: Rows = None,
    seed: Annotated[int, typer.Option(help="Names which rows are shown and what is drawn.")] = 0,
    seeds: Annotated[int, typer.Option(help="So many seeds, from --seed on.", min=1)] = 1,
    metric: Annotated[
        str | None, typer.Option(help="accuracy, macro_f1 or mcc; of texts accuracy or f1. [default: accuracy]")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="How a row stands in a prompt, ending with {label}; \\n begins a line.", show_default=False),
    ] = None,
    words: Annotated[str | None, typer.Option(help="The word of each label, as LABEL=WORD,...")] = None,
    before: Annotated[str, typer.Option(help="Stands before everything, such as an instruction.")] = "",
    text: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    pair: Annotated[str | None, typer.Option(help="Column with the second text of a pair.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column with the prompt.")] = None,
    response: Annotated[str | None, typer.Option(help="Column with the wanted answer.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    endpoint: Annotated[
        str | None, typer.Option(help="URL up to its version, of what answers as OpenAI's chat completions do.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give prompts as they are, not as a turn of the model's chat template.")
    ] = False,
    show: Annotated[int, typer.Option(help="Print so many whole prompts of each way.", min=0)] = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about held-out rows without training it, in one way or several, compared on the same rows.

    `luthier strategies --family asking` lists the ways.

    Examples:

      luthier ask sample:smollm2-135m --data sample:trec6 --strategy icl --set k=8 --rows 200

      luthier ask sample:smollm2-135m --data sample:trec6 --strategy icl,contextual_calibration,pmi_dc --rows 200

      luthier ask runs/x --data rows.csv --strategy icl:k=0,icl:k=4 --seeds 5 --out answers.jsonl

      luthier ask openai:NAME --endpoint http://127.0.0.1:8000/v1 --data sums.jsonl --strategy cot
    """
    if data is None:
        raise UsageError("ask: no rows. Name them: --data FILE, or --data sample:trec6 to begin with.")
    if model.startswith(REMOTE) != (endpoint is not None):
        lacks = (
            "--endpoint URL, where it is asked" if endpoint is None else f"{REMOTE} before its name: {REMOTE}{model}"
        )
        raise UsageError(f"ask {model}: a model behind an endpoint needs {lacks}.")
    chosen = named_ways(strategy or [], settings or [])
    target = _free(out)
    from luthier.asking import WAYS as SHELF
    from luthier.asking import AskSpec, ask
    from luthier.asking.models import config_of
    from luthier.core import build
    from luthier.runs.spec import DataSpec

    ways = {name: build(SHELF.get(way), values, name) for name, (way, values) in chosen.items()}
    source = DataSpec(source=data, test=test, text=text, pair=pair, label=label, prompt=prompt, response=response)
    spec = AskSpec(
        data=source, rows=rows, seed=seed, seeds=seeds, metric=metric, template=template, words=words, before=before
    )
    lines: list[dict[str, Any]] = []
    wanted: list[str] = []

    def keep(run: Any) -> None:
        lines[:] = [line for line in lines if (line["way"], line["seed"]) != (run.name, run.seed)]
        lines.extend(_lines(run))

    try:
        asked = ask(
            _machine(model, endpoint, device, raw),
            ways,
            spec,
            config=None if endpoint else config_of(model),
            say=screen().say,
            done=keep,
        )
        wanted = list(asked.wanted)
    except BaseException as error:  # Ctrl-C too: what was paid for is kept
        if target is None or not lines:
            raise
        _write(target, lines, wanted)
        told = f"{len(lines)} answers were finished; they are in {target}."
        if isinstance(error, LuthierError):
            raise type(error)(f"{error} {told}") from error
        screen().say(told)
        raise
    if target is not None:
        _write(target, lines, wanted)
    if show:
        show_prompts(asked, show)
    show_standings(asked.standings)
    if target is not None:
        screen().show(f"\nAnswers: {target}")
    reads = {"reads": asked.reads} if asked.reads else {}
    screen().result({**plain(asked.standings), "model": model, "data": data, **reads, "out": out})


def _machine(model: str, endpoint: str | None, device: str, raw: bool) -> Callable[[], Any]:
    """What makes the machine, once the rows are known to be right."""
    from luthier.asking.endpoint import Endpoint
    from luthier.asking.models import open_model

    if endpoint is None:
        return lambda: open_model(model, device=device, raw=raw)
    if device != "auto":
        raise UsageError(f"--device {device}: a model behind an endpoint computes elsewhere. Leave it out.")
    if raw:
        raise UsageError("--raw: a model behind an endpoint is asked in turns, which it lays out itself. Leave it out.")
    made = Endpoint(model.removeprefix(REMOTE), endpoint)
    return lambda: made


def _free(out: str | None) -> Path | None:
    if out is None:
        return None
    path = Path(out)
    if path.exists():
        raise ConfigError(f"--out {out}: is there already. Name a file that does not exist.")
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"--out {out}: answers are written as .jsonl. Name such a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {path.parent}. Make it, or name another.")
    return path


def _lines(run: Any) -> list[dict[str, Any]]:
    return [
        {
            "way": run.name,
            "seed": run.seed,
            "row": one.query.number,
            "place": one.query.place,
            "texts": list(one.query.texts),
            "answer": one.answer.said,
            "note": one.answer.note,
            "shares": dict(one.answer.shares),
            "facts": plain(dict(one.answer.facts)),
            "prompts": list(one.digests),
            "written": list(one.written),
        }
        for one in run.told
    ]


def _write(target: Path, lines: Sequence[dict[str, Any]], wanted: Sequence[str]) -> None:
    from luthier.runs import durable

    told = [{**line, **({"wanted": wanted[line["row"]]} if wanted else {})} for line in lines]
    durable.write_bytes(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told).encode())
