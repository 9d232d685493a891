"""lm-evaluation-harness asks a run: by tasks of one's own, read as data; and by nothing that would be run."""

import json
import math
from pathlib import Path

import pytest
import torch
from little import little_spec

from luthier.core import ConfigError
from luthier.workflow import Predictor, train
from luthier.workflow.controls import Controls
from luthier.workflow.harness import TextScorer, harness, read_task

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "how far is {{question.strip()}}"
doc_to_choice: ["good", "bad", "red"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITES = """
task: says
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["moon"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("asked")
    train(little_spec(home, kind="llama", steps=4))
    return home / "run"


@pytest.fixture(scope="module")
def scorer(run: Path) -> TextScorer:
    return TextScorer(Predictor(run))


def test_a_text_is_as_likely_as_its_tokens_one_after_the_other(scorer: TextScorer) -> None:
    pairs = [scorer.halves(*pair) for pair in (("how far is", " the moon"), ("red", " dog"), ("", "good"))]
    assert [len(after) for _, after in pairs] == [2, 1, 1] and pairs[2][0] == [scorer.first]
    model = scorer.predictor.tuned.model
    for (value, best), (context, after) in zip(scorer.likely(pairs), pairs, strict=True):
        by_hand, likeliest = 0.0, True
        for n, token in enumerate(after):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*context, *after[:n]]])).logits[0, -1].float()
            by_hand += float(logits.log_softmax(-1)[token])
            likeliest &= int(logits.argmax()) == token
        assert value == pytest.approx(by_hand, abs=1e-4) and best == likeliest
    (whole, _), *_ = scorer.likely([([scorer.first], scorer.ids("how far is the moon"))])
    assert scorer.rolling("how far is the moon") == pytest.approx(whole, abs=1e-4)
    assert scorer.rolling("how far is the moon " * 40) < 10 * whole, "a long text is read in windows"


def test_tasks_of_ones_own_are_scored_as_by_hand(run: Path, scorer: TextScorer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = ["the moon", "a dog", "the sun", "rome"]
    said = [text.split("moon")[0] for text in scorer.written(questions, Controls(max_new_tokens=4))]
    best = []
    for question in questions:
        pairs = [scorer.halves(f"how far is {question}", f" {word}") for word in ("good", "bad", "red")]
        chances = [value for value, _ in scorer.likely(pairs)]
        best.append(chances.index(max(chances)))
    answers = [best[0], best[1], (best[2] + 1) % 3, best[3]]
    rows = [
        {"question": q, "answer": a, "said": s if i else "something else"}
        for i, (q, a, s) in enumerate(zip(questions, answers, said, strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("colours", TASK), ("says", WRITES)):
        (tmp_path / f"{name}.yaml").write_text(text)
    found = harness(run, [str(tmp_path / "colours.yaml"), str(tmp_path / "says.yaml")])
    assert found.scores["colours"]["acc"] == 0.75 and found.rows == {"colours": 4, "says": 4}
    assert found.scores["says"]["exact_match"] == 0.75


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("doc_to_text: !function utils.run", "a function of Python"),
        ("doc_to_text: \"{{ ''.__class__ }}\"", "reads .__class__"),
        ("doc_to_text: \"{{ ''['_' ~ '_class__'] }}\"", "looks things up by more than a number"),
        ("doc_to_text: \"{{ question | attr('x') }}\"", "uses the filter attr"),
        ("doc_to_text: \"{% import 'x' as y %}\"", "a part of the kind Import"),
        ('doc_to_text: "{{ range(9) }}"', "calls a function"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "would load a program"),
        ("unsafe_code: true", "would run what the model writes"),
        ("metric_list: [", "cannot be read as data"),
    ],
)
def test_a_task_file_that_is_more_than_data_is_refused(tmp_path: Path, line: str, why: str) -> None:
    name = line.partition(":")[0]
    kept = [one for one in TASK.splitlines() if not one.startswith(name)]
    (tmp_path / "task.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError, match=why):
        read_task(tmp_path / "task.yaml")


def test_a_score_that_the_harness_would_look_for_elsewhere_is_refused_before_its_program_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("open('it-ran', 'w').close()")
    (tmp_path / "task.yaml").write_text(TASK.replace("metric: acc", "metric: ./mine"))
    with pytest.raises(ConfigError, match=r"no score './mine' of its own.*There are acc"):
        harness(run, [str(tmp_path / "task.yaml")])
    assert not (tmp_path / "it-ran").exists()


def test_files_of_rows_lie_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK)
    found = read_task(tmp_path / "task.yaml")
    assert found["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "rows.jsonl")}
    (tmp_path / "none.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="is no task"):
        read_task(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        read_task(tmp_path / "nothing.yaml")


def test_a_chat_run_lays_questions_out_in_its_template(scorer: TextScorer) -> None:
    laid = scorer.laid_out([{"role": "user", "content": "how far"}])
    assert laid.endswith("### Assistant:\n") and "how far" in laid
    assert math.isfinite(scorer.likely([scorer.halves(laid, "good")])[0][0])
