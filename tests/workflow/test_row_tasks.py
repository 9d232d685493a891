"""Rows of several tasks: from a column to the method, in training, resumed, scored and answered."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from little import little_data, little_spec

from luthier.core import ConfigError, DataError
from luthier.runs.spec import DataSpec, RunSpec
from luthier.workflow import resume, train
from luthier.workflow.prediction import Predictor, predict
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

SMALL = {"reduction": 8, "embedding": 5, "hidden": 7, "mixed": 6}


def rows(home: Path, name: str = "tasks.csv", tasks: tuple[str, ...] = ("news", "mail", "talk")) -> Path:
    """The little rows, each of a task."""
    with little_data(home / "plain.csv").open() as file:
        found = list(csv.DictReader(file))
    with (home / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "kind"))
        writer.writerows((r["text"], r["label"], tasks[i % len(tasks)]) for i, r in enumerate(found))
    return home / name


def spec(home: Path, name: str, **more) -> RunSpec:
    data = DataSpec(source=str(rows(home)), text="text", label="label", row_task="kind")
    fields = {"method": "hyperformer", "settings": SMALL, "steps": 4, "data": data, "out": str(home / name)}
    return little_spec(home, **{**fields, **more})


def test_a_run_over_three_tasks_is_resumed_to_the_bit_and_answers_by_task(tmp_path):
    result = train(spec(tmp_path, "whole"))
    train(spec(tmp_path, "halves"), stop_at=2)
    resume(tmp_path / "halves")
    assert run_digests(tmp_path / "halves") == run_digests(tmp_path / "whole")
    assert result.tuned.tuning().method.values_of("task") == 3
    predictor = Predictor(tmp_path / "whole")
    assert predictor.contract["row_tasks"] == ["mail", "news", "talk"]
    assert len(predict(tmp_path / "whole", data=str(rows(tmp_path)))) == 46
    with pytest.raises(ConfigError, match=r"knows several tasks \(mail, news, talk\): give rows in a file"):
        predict(tmp_path / "whole", texts=["a word"])
    strange = rows(tmp_path, "strange.csv", ("news", "mails"))
    with pytest.raises(DataError, match=r"the task 'mails' \(column 'kind'\) is not among .* Did you mean 'mail'"):
        predict(tmp_path / "whole", data=str(strange))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "lora", "settings": {}}, "data.row_task: lora keeps no numbers for each task"),
        ({"settings": {**SMALL, "tasks": 2}}, "hyperformer.tasks is 2, and the rows have 3 values of task"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused_before_anything_is_written(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train(spec(tmp_path, "run", **changes))
    assert not (tmp_path / "run").exists()


def test_rows_that_say_no_task_or_one_that_training_lacks_are_refused(tmp_path):
    blank = rows(tmp_path, "blank.csv", ("news", ""))
    base = spec(tmp_path, "run")
    with pytest.raises(DataError, match=r"blank.csv:\d+: nothing in column 'kind'"):
        train(dataclasses.replace(base, data=dataclasses.replace(base.data, source=str(blank))))
    test = rows(tmp_path, "test.csv", ("news", "poem"))
    with test.open("a") as file:
        file.write("words that are nowhere else,good,poem\n")
    with pytest.raises(DataError, match=r"the task 'poem' .* is not among those of the training rows"):
        train(dataclasses.replace(base, data=dataclasses.replace(base.data, test=str(test))))
    with pytest.raises(DataError, match=r"no column 'sort' \(asked for by --row-task\)"):
        train(dataclasses.replace(base, data=dataclasses.replace(base.data, row_task="sort")))
    assert not (tmp_path / "run").exists()
