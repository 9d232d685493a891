"""The first hour: a file of customers' messages as Excel saves it in Germany, trained by one command."""

import csv
import io
import json
import random
from pathlib import Path

import pytest
from cli.conftest import Call

INTENTS = {
    "delivery": ("where is my parcel", "the delivery is late", "when will it arrive", "tracking shows nothing"),
    "refund": ("I want my money back", "please refund the order", "the refund has not come", "return and pay back"),
    "invoice": ("send me the invoice", "the bill is wrong", "I need a receipt", "invoice with our VAT number"),
    "account": ("I cannot log in", "reset my password", "change my e-mail address", "close the account"),
    "praise": ("thank you, great service", "very happy with it", "best shop ever", "friendly and quick"),
}
RARE = ("cancel the subscription", "stop renewing my plan")
TAILS = ("", " please", " für Müller", " – Auftrag 17", " since Monday", " at 20 € shipping", " again", " thanks")


def as_excel_saves_it(folder: Path, rows: int = 618) -> Path:
    """Semicolons, a Windows code page, quotes round texts with semicolons; empty messages, missing intents, slips."""
    draw = random.Random(3)
    made: list[tuple[str, str, str]] = []
    for number in range(rows - 12):
        intent = draw.choice(list(INTENTS))
        made.append((f"{draw.choice(INTENTS[intent])}{draw.choice(TAILS)}; no. {number}", intent, "1,5"))
    made += [(f"{draw.choice(RARE)}; no. {n}", "cancellation", "2,0") for n in range(6)]
    made += [("", "refund", "1,0"), ("where is it", "", "1,0"), ("  ", "invoice", "")]
    made += [("late again", "Delivery", "1,0"), ("where is it; no. 3", "delivry", ""), ("my parcel", "Delivery", "")]
    draw.shuffle(made)
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet, delimiter=";", lineterminator="\r\n")
    writer.writerows([("customer_message", "intent", "hours open"), *made])
    path = folder / "Nachrichten.csv"
    path.write_bytes(sheet.getvalue().encode("cp1252"))
    return path


@pytest.mark.samples
def test_a_realistic_file_trains_by_one_command_and_says_what_came_out(
    luthier: Call, minilm_l6: Path, tmp_path: Path
) -> None:
    data = as_excel_saves_it(tmp_path)
    refused = luthier("train", "sample:minilm-l6", "--data", data, "--out", "run")
    assert refused.code == 3 and "--text customer_message" in refused.err, "only what is not certain is asked for"
    answer = luthier(
        "train", "sample:minilm-l6", "--data", data, "--text", "customer_message", "--steps", 60, "--out", "run",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    said = " ".join(answer.err.split())
    for words in (
        "columns are parted by semicolons",
        "read as cp1252",
        "set aside: 3 of 618 rows",
        "rows of each class: ",
        "look alike are kept apart: 'delivery'",
    ):
        assert words in said
    shown = " ".join(answer.out.split())
    assert "95 % interval" in shown and "always answering" in shown
    assert "Learnt badly: " in shown and "rows to learn from" in shown
    quality = json.loads(Path("run/quality.json").read_text())
    badly = next(c for c in quality["classes"] if c["name"] == "cancellation")
    assert badly["learnt"] <= 6
    with Path("run/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == quality["rows"] and {"place", "customer_message", "wanted", "answer", "sure"} == set(rows[0])
    assert quality["score"] > quality["baseline"] + 0.3
