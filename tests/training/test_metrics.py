import math

import numpy as np
import pytest

from luthier.core import UnknownName, UsageError
from luthier.data import tasks
from luthier.training import metrics
from luthier.training.metrics import METRICS, better, perplexity, score, spans_of


def test_scores_of_one_label_follow_their_definitions():
    wanted = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "b", "a"]
    found = score(["accuracy", "macro_f1", "mcc"], said, wanted)
    f1 = {"a": 2 * 2 / (3 + 3), "b": 2 * 2 / (3 + 2), "c": 0.0}
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["macro_f1"] == pytest.approx(sum(f1.values()) / 3)
    # Gorodkin's multi-class form, by hand: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2))
    c, s, p, t = 4, 6, np.array([3, 3, 0]), np.array([3, 2, 1])
    assert found["mcc"] == pytest.approx((c * s - p @ t) / math.sqrt((s * s - p @ p) * (s * s - t @ t)))


def test_always_the_same_class_has_no_correlation():
    assert score(["mcc"], ["a"] * 4, ["a", "b", "a", "b"])["mcc"] == 0.0
    assert score(["pearson", "spearman"], [1.0] * 3, [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_scores_of_several_labels_count_labels_and_sets():
    wanted, said = [["a", "b"], ["c"], []], [["b", "a"], ["a"], []]
    found = score(["micro_f1", "macro_f1", "exact_match"], said, wanted)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_correlations_see_a_line_and_a_rank():
    wanted = [1.0, 2.0, 3.0, 4.0]
    found = score(["pearson", "spearman", "mse"], [2.0, 4.0, 6.0, 8.0], wanted)
    assert found["pearson"] == pytest.approx(1.0)
    assert found["mse"] == pytest.approx((1 + 4 + 9 + 16) / 4)
    bent = score(["pearson", "spearman"], [1.0, 8.0, 27.0, 640.0], wanted)
    assert bent["spearman"] == pytest.approx(1.0)
    assert bent["pearson"] < 0.95
    assert score(["pearson"], [4.0, 3.0, 2.0, 1.0], wanted)["pearson"] == pytest.approx(-1.0)


def test_two_different_values_are_enough_for_a_correlation():
    found = score(["pearson", "spearman"], [0.0, 2.0, 0.0, 2.0], [1.0, 3.0, 1.0, 1.0])
    # Deviations (-1, 1, -1, 1) and (-.5, 1.5, -.5, -.5): 2 of sqrt(4 * 3).
    assert found["pearson"] == pytest.approx(2 / math.sqrt(12))
    assert found["spearman"] == pytest.approx(2 / math.sqrt(12))


def test_spans_count_only_when_both_ends_and_the_kind_are_right():
    wanted = [["B-LOC", "I-LOC", "O", "B-PER"], ["O", "B-LOC"]]
    assert score(["span_f1", "token_accuracy"], wanted, wanted) == {"span_f1": 1.0, "token_accuracy": 1.0}
    cut_short = [["B-LOC", "O", "O", "B-PER"], ["O", "B-PER"]]
    found = score(["span_f1", "token_accuracy"], cut_short, wanted)
    assert found["span_f1"] == pytest.approx(2 * 1 / (3 + 3))
    assert found["token_accuracy"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (["O", "O"], set()),
        (["I-A", "I-A"], {("A", 0, 2)}),
        (["B-A", "B-A"], {("A", 0, 1), ("A", 1, 2)}),
        (["B-A", "I-B"], {("A", 0, 1), ("B", 1, 2)}),
        (["B-A", "I-A", "I-A"], {("A", 0, 3)}),
        ([], set()),
    ],
)
def test_spans_are_read_as_conll_does(tags, spans):
    assert spans_of(tags) == spans


def test_texts_are_compared_with_rouge_and_bleu():
    wanted = ["the cat sat on the mat today", "dogs bark loudly at night here"]
    same = score(["rouge_l", "bleu", "exact_match"], wanted, wanted)
    assert same == {"rouge_l": pytest.approx(1.0), "bleu": pytest.approx(100.0), "exact_match": 1.0}
    other = score(["rouge_l", "bleu", "exact_match"], ["the cat", "nothing alike"], wanted)
    assert other["rouge_l"] == pytest.approx((2 * 1.0 * (2 / 7) / (1 + 2 / 7) + 0) / 2)
    assert other["bleu"] < 20
    assert other["exact_match"] == 0.0


def test_perplexity_is_exp_of_the_loss_and_does_not_overflow():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf


def test_better_knows_the_direction_and_prefers_nothing_non_finite():
    assert better("accuracy", 0.6, 0.5) and not better("accuracy", 0.5, 0.5)
    assert better("loss", 0.4, 0.5) and not better("loss", 0.6, 0.5)
    assert not better("loss", math.nan, None) and not better("loss", -math.inf, 0.5)
    assert better("loss", 3.0, None) and better("loss", 3.0, math.nan)


def test_token_f1_counts_words_as_often_as_they_stand_whatever_their_order():
    assert score(["token_f1"], ["The cat, the mat"], ["a mat the CAT sat"]) == {"token_f1": pytest.approx(6 / 9)}
    assert score(["token_f1"], ["", "x"], ["", ""]) == {"token_f1": 0.5}


def test_every_score_that_a_task_names_exists():
    named = {name for names in [*tasks.METRICS.values(), tasks.GENERATED, {"forgetting"}] for name in names}
    assert named <= set(METRICS)
    assert set(METRICS) <= named


def test_an_unknown_score_is_answered_with_near_ones():
    with pytest.raises(UnknownName, match=r"'accurracy'.*'accuracy'"):
        score(["accurracy"], ["a"], ["a"])
    with pytest.raises(UnknownName, match=r"task regression has no score 'accuracy'.*pearson"):
        tasks.Task(name="regression").check_metric("accuracy")


def test_lists_of_different_length_are_no_score():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["accuracy"], ["a"], ["a", "b"])


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(metrics.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"needs rouge-score.*pip install 'luthier\[metrics\]'"):
        score(["rouge_l"], ["a", "b"], ["a", "a"])


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_scikit_learn_and_scipy(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(seed)
    wanted, said = (draw.choice(list("abcd")[: 2 + seed % 3], 40).tolist() for _ in range(2))
    found = score(["accuracy", "macro_f1", "mcc"], said, wanted)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(wanted, said))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(wanted, said, average="macro", zero_division=0))
    assert found["mcc"] == pytest.approx(sklearn.matthews_corrcoef(wanted, said))
    marks = draw.integers(0, 2, (2, 30, 4))
    rows = [[[str(i) for i in np.flatnonzero(row)] for row in half] for half in marks]
    found = score(["micro_f1", "macro_f1"], *rows)
    for average in ("micro", "macro"):
        expected = sklearn.f1_score(marks[1], marks[0], average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)
    x, y = draw.normal(size=(2, 25)).round(1 if seed % 2 else 8)  # rounded: equal ranks
    found = score(["pearson", "spearman"], x.tolist(), y.tolist())
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_what_measures_a_distance_is_better_when_it_is_lower_and_every_other_score_when_it_is_higher():
    distances = {"loss", "perplexity", "mse", "forgetting", "answer_tokens"}
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == distances
    for name in METRICS:
        assert better(name, 1.0, 2.0) == (name in distances) != better(name, 2.0, 1.0)
