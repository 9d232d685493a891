"""What SmolLM2-135M learns of 48 traces, each a look-up and an answer: the form, and to read what a tool said.

    python -m experiments.traces

It asks about countries that traces had and about others, with a tool that says what is true and with one that names
another country's capital. Two minutes of a processor.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.workflow import train
from luthier.workflow.agent_loop import act, writer_of
from luthier.workflow.prediction import Predictor

SHOWN = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Cuba": "Havana", "Norway": "Oslo", "Greece": "Athens", "Chile": "Santiago", "Iran": "Tehran",
    "Iraq": "Baghdad", "Poland": "Warsaw", "Turkey": "Ankara", "Russia": "Moscow", "China": "Beijing",
    "Nepal": "Kathmandu",
    "Ghana": "Accra", "Qatar": "Doha", "Syria": "Damascus", "Jordan": "Amman", "Ireland": "Dublin", "Canada": "Ottawa",
}  # fmt: skip
OTHERS = {"Portugal": "Lisbon", "Austria": "Vienna", "Sweden": "Stockholm", "Hungary": "Budapest"}
ASKED = ("What is the capital of {}?", "Name the capital of {}.")


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        rows = Path(home) / "traces.jsonl"
        lines = [_trace(asked.format(country), country) for country in SHOWN for asked in ASKED]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        done = train(
            RunSpec(
                model="sample:smollm2-135m", data=DataSpec(source=str(rows), test_share=0.0), method="lora",
                strategy="agent_sft", settings={"reward": "reward"}, steps=20,
                batch=BatchSpec(size=4), out=f"{home}/run",
            )
        )  # fmt: skip
        write = writer_of(Predictor(done.path), max_new_tokens=40)
        print(f"{len(lines)} traces, 20 steps of 4")
        for whose, countries in (("of the traces", list(SHOWN)[:4]), ("of no trace", list(OTHERS))):
            for says, tool in (("what is true", _true), ("what is false", _false)):
                ended = [act(write, ASKED[0].format(c), {"search": tool(countries)}, turns=3) for c in countries]
                read = [
                    one.ended == "answer"
                    and bool(one.steps[:-1])
                    and one.steps[-2].observation.endswith(f" {one.answer}.")
                    for one in ended
                ]
                formed = sum(one.ended == "answer" and len(one.steps) == 2 for one in ended)
                print(
                    f"{len(countries)} countries {whose}, the tool says {says}: {formed} looked up once and answered, "
                    f"{sum(read)} answered what the tool had said"
                )
                for country, one in zip(countries, ended, strict=True):
                    said = [s.observation for s in one.steps if s.observation]
                    print(f"    {country}: {said} -> {one.answer or one.why or one.ended}")


def _trace(question: str, country: str) -> dict[str, object]:
    said = f"{country} has the capital {SHOWN[country]}."
    steps = f"Thought: I look up {country}.\nAction: search[{country}]\nObservation: {said}\nAnswer: {SHOWN[country]}"
    return {"question": question, "steps": steps, "reward": 1}


def _true(countries: list[str]) -> Callable[[str], str]:
    known = {c: {**SHOWN, **OTHERS}[c] for c in countries}
    return lambda text: f"{text} has the capital {known[text]}." if text in known else f"nothing about {text}"


def _false(countries: list[str]) -> Callable[[str], str]:
    known = {c: {**SHOWN, **OTHERS}[other] for c, other in zip(countries, countries[1:] + countries[:1], strict=True)}
    return lambda text: f"{text} has the capital {known[text]}." if text in known else f"nothing about {text}"


if __name__ == "__main__":
    main()
