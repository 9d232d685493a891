"""A model writes tasks of its own after a few that it is shown, answers them, and learns what was not thrown away.

    1 tasks    a loop of requests, then plain learning of the seed tasks and of those that were written

Each request shows `shown` tasks, a quarter of them written before where there are any, and the model goes on with the
list. A new task is thrown away if it is too short or long, asks for what a text cannot do, begins strangely, or has a
ROUGE-L above `alike` with one that is there. Then the model gives an example, the input first. Where the seed tasks
have a column `classification` (true or false), it first says whether the answers are a few labels; if so, labels come
first and each has as many inputs. Inputs with two different answers are thrown away, and empty answers.

rows-tasks.jsonl says of each row which request made it, by which model and seed, and what was shown;
rows-left_out.jsonl what was thrown away and why. asked.jsonl keeps every answer: a resumed recipe asks nothing twice.

Paper: arXiv:2212.10560. For its code 175 seeds, temperature 0.7, top_p 0.5 and these filters are quoted.

Cost: an answer for each request, and for each task that is kept; then a plain run.
Claims: a large model follows instructions better after learning from its own.
Pitfalls: a model cannot teach itself what it does not know, and a small one answers its own tasks wrongly: read
rows-tasks.jsonl before you use it, or name a larger `writer`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, DataError, above, at_least, between, key
from luthier.data.columns import is_blank
from luthier.strategies.recipes._written_tasks import (
    Instance,
    SeedTask,
    asks_for_inputs,
    asks_for_labelled,
    asks_for_tasks,
    asks_whether_labels,
    complaint,
    contradicted,
    instances_in,
    labelled_in,
    tasks_in,
    unlike,
)
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe, Writer
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("self_instruct", family="recipes", paper="arXiv:2212.10560")
@dataclass(frozen=True, kw_only=True)
class SelfInstruct(Recipe):
    """Data from the model itself."""

    example: ClassVar[str] = "sample:smollm2-135m --data TASKS.jsonl"
    tiny: ClassVar[dict[str, Any]] = {"shown": 2, "wanted": 2, "requests": 3, "new_tokens": 12}

    writer: Annotated[str | None, "a model that writes the tasks; left out, the one that learns"] = None
    wanted: Annotated[int, "tasks to be written", at_least(1)] = 100
    requests: Annotated[int, "lists that are asked for, at most", at_least(1)] = 100
    shown: Annotated[int, "tasks that a request shows", at_least(1)] = 8
    alike: Annotated[float, "ROUGE-L with a task of the pool, at most", between(0, 1)] = 0.7
    temperature: Annotated[float, "of the draw of tasks; examples are the likeliest", above(0)] = 0.7
    top_p: Annotated[float, "share of chance that is drawn from", between(0.01, 1)] = 0.5
    new_tokens: Annotated[int, "tokens of an answer, at most", at_least(1)] = 256

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        learnt, held, columns = desk.rows()
        if columns.shape != "answered":
            raise ConfigError(
                "self_instruct begins with seed tasks, rows with an instruction and its answer, and these are "
                f"{columns.shape}. Name the columns with --prompt and --response."
            )
        seeds = []
        for row, place in zip(learnt.rows, learnt.places, strict=True):
            said, given, gave = (row.get(name or "") for name in (columns.prompt, columns.context, columns.response))
            if not isinstance(said, str) or not isinstance(gave, str) or not said.strip() or not gave.strip():
                raise DataError(f"{place}: a seed task needs words in {columns.prompt!r} and {columns.response!r}.")
            told = row.get("classification")
            labels = None if is_blank(told) else str(told).lower() in ("true", "1", "yes")
            seeds.append(
                SeedTask(said.strip(), "" if is_blank(given) else str(given).strip(), gave.strip(), place, labels)
            )
        if len(seeds) < self.shown:
            raise ConfigError(
                f"self_instruct.shown = {self.shown}, and there are {len(seeds)} seed tasks. Give more rows."
            )
        desk.check(plan.task())
        writer = desk.writer(self.writer or plan.spec.model)
        source = desk.write("tasks", self.rows(desk, writer, seeds, plan.spec.seed))
        test = None
        if held is not None:
            used = {"prompt": columns.prompt, "input": columns.context, "response": columns.response}
            test = desk.write("held", [{k: r.get(name or "") or "" for k, name in used.items()} for r in held.rows])
        data = plan.data(
            source, test, prompt="prompt", context="input", response="response",
            **dict.fromkeys(("text", "pair", "label")),
        )  # fmt: skip
        yield Phase(name="tasks", spec=plan.task(data=data))

    def rows(self, desk: Desk, writer: Writer, seeds: list[SeedTask], seed: int) -> Iterator[dict[str, Any]]:
        """The seed tasks, then those that were written; nothing is asked before the first of them is wanted."""
        yield from ({"prompt": s.instruction, "input": s.input, "response": s.output, "from": s.place} for s in seeds)
        pool, kept, out, made = [s.instruction for s in seeds], 0, [], list[str]()
        for number in range(self.requests):
            if kept >= self.wanted:
                break
            shown = self.drawn(seeds, made, Random(key(seed, "self_instruct", number)))
            answer = writer.write(
                asks_for_tasks(shown), seed=key(seed, "self_instruct", "tasks", number), stop=("\n\n",),
                max_new_tokens=self.new_tokens, temperature=self.temperature, top_p=self.top_p,
            )  # fmt: skip
            for task in tasks_in(answer, len(shown) + 1):
                reason, found = complaint(task), list[Instance]()
                if reason is None and (other := unlike(task, pool, self.alike)) is not None:
                    reason = f"too much alike: {other[:60]!r}"
                if reason is None:
                    try:
                        found = self.instances(writer, task, seeds)
                        reason = None if found else "no example with one answer could be read"
                    except DataError as error:  # of this task: its prompt leaves no room for an answer
                        reason = f"too long: {error}"
                if reason is not None or kept >= self.wanted:
                    out.append({"request": number, "task": task, "because": reason or "there are as many as wanted"})
                    continue
                pool.append(task)
                made.append(task)
                kept += 1
                told = {"request": number, "shown": shown, "writer": writer.digest, "seed": seed}
                yield from (
                    {"prompt": task, "input": i.input, "response": i.output, "label": i.label, **told} for i in found
                )
        desk.write("left_out", out or [{"because": "nothing was thrown away"}])
        why = Counter(str(one["because"]).partition(":")[0] for one in out).most_common(3)
        said = ", ".join(f"{count} {reason}" for reason, count in why)
        desk.say(
            f"{kept} of {self.wanted} tasks were written; {len(out)} were thrown away{f' ({said})' if said else ''}"
        )

    def drawn(self, seeds: list[SeedTask], made: list[str], draw: Random) -> list[str]:
        """What a request shows: a quarter written ones where there are as many."""
        n = min(self.shown // 4, len(made))
        shown = [s.instruction for s in draw.sample(seeds, self.shown - n)] + draw.sample(made, n)
        draw.shuffle(shown)
        return shown

    def instances(self, writer: Writer, task: str, seeds: list[SeedTask]) -> list[Instance]:
        """Examples of a task, without those whose input has two answers."""

        def likeliest(text: str, most: int) -> str:
            return writer.write(text, seed=0, stop=("\n\n", "\nTask:"), max_new_tokens=most)

        few = sorted(seeds, key=lambda s: key("self_instruct", task, s.instruction))[:4]
        if {True, False} <= {s.labels for s in seeds}:
            says = likeliest(asks_whether_labels(task, seeds[:12]), 4)
            if says.strip().lower().startswith("yes"):
                shown = [s for s in seeds if s.labels][:4]
                return labelled_in(likeliest(asks_for_labelled(task, shown), self.new_tokens))
        found = instances_in(likeliest(asks_for_inputs(task, few), self.new_tokens))
        out = contradicted(found)
        return [one for one in dict.fromkeys(found) if one.input not in out and one.input != one.output]
