"""Many sets of rows as one task of texts: each row is put into words by one of its set's templates.

    1 mixture    prompts and answers of all sets but those held out, mixed by mtl_sampling
                 scored on those held out, on --test, and on the test half of each set that has one

The file `templates` (TOML) has a table for each set, "train" for the rows of --data and NAME for --also NAME=FILE:

    [train]
    cluster = "topics"
    templates = ["{question} What is asked for? ||| {label}", "Ask for {label}. ||| {question}"]
    words.label = { ABBR = "an abbreviation", ENTY = "a thing" }

Fields are the columns of the set, what stands behind ||| is the answer, and `words` say what a cell is called. With the
input on the answer's side, as in the second one, a template is an inversion. Sets whose `cluster` is in `hold_out` are
scored and not learnt: a model that does them has not seen their like. Which template a row gets is named by the seed,
the set and the row. A row with a text (three words or more) of a held-out row is left out: rows-made.jsonl counts them.

--test FILE is the test half of "train"; a set from --also has one where its source does. Of a set that is held out the
test half alone is scored, where there is one. Nothing held out at all, a share of "train" is (--test-share, or --fold).
rows-held-NAME.jsonl are the held-out rows of a set: `luthier evaluate RUN --data` with it scores that task alone.

Paper: arXiv:2110.08207 (T0); FLAN, arXiv:2109.01652, holds out clusters too.

Cost: a plain run on the prompts.
Claims: sets of a kind that was never learnt are answered from the words of the prompt alone, by large models.
Pitfalls: it shows with many sets and large models; two sets teach two sets. Examples and reasoning in the prompt, and
texts with gaps mixed in (ExT5), are not here. How sets are weighed is mtl_sampling's: mtl_sampling.temperature.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, DataError, key
from luthier.data.columns import is_blank, label_name
from luthier.data.rows import Table, load_halves, load_rows, normalised
from luthier.data.sets import TRAIN, named_sources
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES

FIELD = re.compile(r"\{(\w+)\}")


@STRATEGIES.register("task_mixture", family="recipes", paper="arXiv:2110.08207")
@dataclass(frozen=True, kw_only=True)
class TaskMixture(Recipe):
    """Sets put into words."""

    example: ClassVar[str] = "sample:smollm2-135m --data ROWS.jsonl --also NAME=FILE --set templates=TEMPLATES.toml"
    uses: ClassVar[tuple[str, ...]] = ("mtl_sampling",)

    templates: Annotated[str, "a TOML file with the templates of each set"] = ""
    hold_out: Annotated[str, "clusters that are scored and not learnt, parted by commas"] = ""

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec, out = plan.spec, {word.strip() for word in self.hold_out.split(",") if word.strip()}
        if desk.kind == "encoder":
            raise ConfigError("task_mixture needs a model that writes answers, and this one reads alone. Name another.")
        sources = {TRAIN: spec.data.source, **named_sources(spec.also)}
        of = _read(self.templates, sources)
        unknown = out - {kept["cluster"] for kept in of.values()}
        if unknown:
            raise ConfigError(
                f"task_mixture.hold_out: no set is of the cluster {min(unknown)!r}. See {self.templates}."
            )
        held = {name for name in sources if of[name]["cluster"] in out}
        if held == set(sources):
            raise ConfigError("task_mixture.hold_out: all sets are held out, and nothing is left to learn.")
        twice = {sources[name] for name in held} & {s for name, s in sources.items() if name not in held}
        if twice:
            raise ConfigError(f"task_mixture: {min(twice)} is learnt as one set and held out as another. Choose one.")
        halves = {
            name: load_halves(spec.data) if name == TRAIN else load_rows(s, **spec.data.stored(s))
            for name, s in sources.items()
        }
        rows = {name: learns for name, (learns, _) in halves.items()}
        scored = {name: half for name, (_, half) in halves.items() if half is not None}
        scored |= {name: rows[name] for name in held - scored.keys()}
        if scored and spec.data.fold is not None:
            raise ConfigError(
                f"task_mixture: data.fold parts the rows of --data, and {', '.join(sorted(scored))} has held-out rows "
                "already. Leave one of the two out."
            )
        parts = [*scored.values(), *(rows[name] for name in held)]
        never = {text for table in parts for row in table.rows for text in _texts(row)}
        learnt, counts = {}, []
        for name in (n for n in sources if n not in held):
            common = [never & _texts(row) for row in rows[name].rows]
            table = rows[name].take(i for i, held_too in enumerate(common) if not held_too)
            counts.append({"set": name, "rows": len(table), "left_out": len(rows[name]) - len(table)})
            if len(table) < len(common):
                (text, times), *_ = Counter(text for held_too in common for text in held_too).most_common(1)
                said = f"{len(common) - len(table)} of {len(common)} rows of {name} share a text with held-out rows"
                most = f"{text[:60]!r} stands in {times}"
                if not len(table):
                    raise ConfigError(
                        f"task_mixture: {said}, so none is left to learn: {most}. Other rows; or, if it is a label or "
                        "an instruction, one word for it in the rows, and the words in the templates' file."
                    )
                desk.say(f"task_mixture: {said}, and are not learnt: {most}")
            learnt[name] = self.worded(name, table, of[name], spec.seed)
        tests = {name: self.worded(name, scored[name], of[name], spec.seed) for name in sorted(scored)}
        for name, lines in tests.items():
            desk.write(f"held-{name}", lines)
        test = [line for lines in tests.values() for line in lines]
        desk.write("made", [*counts, *({"set": name, "held_out": len(lines)} for name, lines in tests.items())])
        first, *others = [(name, desk.write(f"set-{name}", lines)) for name, lines in learnt.items()]
        roles = {**dict.fromkeys(("text", "pair", "label", "context", "template", "words")), "prompt": "prompt"}
        data = plan.data(first[1], desk.write("held", test) if test else None, **roles, response="response")
        data = data if test else replace(data, test_share=spec.data.test_share, fold=spec.data.fold)
        also = tuple(f"{name}={path}" for name, path in others) or None
        yield Phase(name="mixture", spec=plan.task(("mtl_sampling",) if also else (), data=data, also=also))

    def worded(self, name: str, table: Table, kept: Mapping[str, Any], seed: int) -> list[dict[str, str]]:
        """Prompt and answer of each row of a set, by a drawn template.

        Raises:
            DataError: a row without what a template of its set asks for; each could have drawn each.
        """
        found = []
        for row, place in zip(table.rows, table.places, strict=True):
            cells = {n: label_name(v) if not isinstance(v, str) else v for n, v in row.items() if not is_blank(v)}
            for template in kept["templates"]:
                lacks = [field for field in FIELD.findall(template) if field not in cells]
                if lacks:
                    raise DataError(f"{place}: nothing in {lacks[0]!r}, which the template {template!r} asks for.")
            words = kept["words"]
            called = {n: words.get(n, {}).get(v, v) for n, v in cells.items()}
            number = key(seed, "task_mixture", name, _content(row)) % len(kept["templates"])
            said = FIELD.sub(lambda m, called=called: called[m.group(1)], kept["templates"][number])  # type: ignore[misc]
            prompt, _, response = said.partition("|||")
            found.append({"prompt": prompt.strip(), "response": response.strip(), "set": name, "template": str(number)})
        return found


def _texts(row: Mapping[str, Any]) -> set[str]:
    """The cells that are texts, and no labels or numbers."""
    cells = {normalised(value) for value in row.values() if not is_blank(value)}
    return {cell for cell in cells if len(cell.split()) > 2}


def _content(row: Mapping[str, Any]) -> str:
    return "\x1f".join(normalised(value) for _, value in sorted(row.items()) if not is_blank(value))


def _read(path: str, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The templates, words and cluster of each set.

    Raises:
        ConfigError: no such file, a set without templates, a template without an answer, two cells with one word.
    """
    if not path or not Path(path).is_file():
        raise ConfigError(f"task_mixture.templates: {path or 'nothing'!r} is no file. Give one (docs of task_mixture).")
    try:
        told = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no TOML ({error}).") from error
    found = {}
    for name in sources:
        kept = told.get(name, {})
        templates = kept.get("templates", [])
        if not templates or not all(isinstance(t, str) and t.count("|||") == 1 for t in templates):
            raise ConfigError(f"{path}: [{name}] needs templates, each a prompt and an answer with ||| between them.")
        words = {column: {str(k): str(v) for k, v in cells.items()} for column, cells in kept.get("words", {}).items()}
        for column, cells in words.items():
            if len(set(cells.values())) < len(cells):
                raise ConfigError(f"{path}: [{name}] two cells of {column!r} have one word, so answers tell nothing.")
        found[name] = {"templates": templates, "words": words, "cluster": str(kept.get("cluster", name))}
    return found
