"""startup and kd_views: a teacher of another task labels rows, and a student sees them twice."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from fillers import encoder
from in_memory import Runs, tiny_settings
from little import little_data, little_spec
from word_tables import WORDS

from luthier.core import CompositionError, ConfigError
from luthier.runs import RunFolder
from luthier.runs.spec import BatchSpec, DataSpec
from luthier.strategies.distillation.kd_views import nt_xent
from luthier.surgery import tuning_files
from luthier.training.course import Piece
from luthier.workflow.recipes import follow

torch.set_num_threads(1)
WIDE = BatchSpec(size=6, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("kd_views"))


def a_step(runs, kind="bert-dry", labels=lambda y: y, **values):
    values = tiny_settings("kd_views") | {f"kd_views.{k}": v for k, v in values.items()}
    loop = runs.loop("kd_views", "full", kind, values=values, batch=WIDE)
    loop.moments.start()
    ((one, course),) = loop.moments._asked
    (batch,) = loop.feed.cut(0)
    other = torch.from_numpy(course.rows.numbers(batch.rows)) == 1
    assert other.sum() == (~other).sum() == 6
    batch = dataclasses.replace(batch, labels=torch.where(other, labels(batch.labels), batch.labels))
    piece = Piece(batch=batch, index=0, n_targets=batch.n_targets)
    return course, batch, other, one.loss(course, piece, lambda: course.forward(batch)).loss


@pytest.mark.acid("startup", 1, 4)
def test_startup_without_contrast_it_is_soft_labels_alone_and_these_are_distributions(runs):
    course, batch, other, loss = a_step(runs, contrast=0.0)
    said = course.models["teacher"].logits(batch)[other].softmax(-1)
    assert said.max() < 0.99 and torch.allclose(said.sum(-1), torch.ones(6)), "none is one answer"
    logits = course.forward(batch).logits
    soft = (said * (said.log() - F.log_softmax(logits[other], -1))).sum(-1).mean()
    labelled = F.cross_entropy(logits[~other], batch.labels[~other])
    torch.testing.assert_close(loss, len(batch.rows) * (labelled + soft))
    assert torch.equal(a_step(runs, labels=lambda y: (y + 1) % 3, contrast=0.0)[-1], loss), "labels of further rows"
    assert not torch.equal(a_step(runs)[-1], loss)


def test_startup_views_differ_by_dropout_and_are_told_apart_from_other_rows(runs):
    one, two = torch.randn(3, 5), torch.randn(3, 5)
    z = F.normalize(torch.cat([one, two]), dim=-1)
    wanted = []
    for i in range(6):
        terms = {j: float(torch.exp(z[i] @ z[j] / 0.5)) for j in range(6) if j != i}
        wanted.append(-torch.log(torch.tensor(terms[(i + 3) % 6] / sum(terms.values()))))
    torch.testing.assert_close(nt_xent(one, two, 0.5), torch.stack(wanted).mean())
    loop = runs.loop("kd_views", "full", "bert", batch=WIDE)
    loop.moments.start()
    loop.set_mode(training=True)
    ((_, course),) = loop.moments._asked
    (batch,) = loop.feed.cut(0)
    assert not torch.equal(course.forward(batch).logits, course.forward(batch).logits)


def test_startup_what_projects_trains_and_is_not_kept(runs):
    loop = runs.loop("kd_views", "lora", "bert-dry", batch=WIDE, steps=4)
    ((_, course),) = loop.moments._asked
    before = {n: p.detach().clone() for n, p in course.numbers.items()}
    loop.run_to()
    assert set(before) == {"first", "second"}
    assert all(not torch.equal(p.detach(), before[n]) for n, p in course.numbers.items())
    assert not set(loop.tuned.trained()) & {f"kd_views/{n}" for n in before}
    with pytest.raises(CompositionError, match="would read the labels of rows that have none"):
        runs.loop("kd_views+focal", batch=WIDE)


def spec_of(home, out, **changes):
    words = {"sun": "day", "moon": "night"}
    target = home / "two.csv"
    lines = [f"{' '.join(WORDS[i % 9 : i % 9 + 4])} {word},{words[word]}" for i in range(15) for word in words]
    target.write_text("\n".join(["words,when", *lines]) + "\n")
    unlabelled = home / "plain.csv"
    unlabelled.write_text("\n".join(["words", *(line.split(",")[0] for line in lines)]) + "\n")
    given = {
        "model": str(encoder(home / "encoder")), "data": DataSpec(source=str(target), text="words", label="when"),
        "method": "full", "settings": {"startup.head_epochs": 2.0}, "strategy": "startup", "steps": 4,
        "batch": BatchSpec(size=8, tokens=4096),
        "also": (f"source={little_data(home / 'source.csv')}", f"unlabelled={unlabelled}"),
    }  # fmt: skip
    return little_spec(home, out=str(out), **{**given, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    home = tmp_path_factory.mktemp("startup")
    return follow(spec_of(home, home / "out"))


@pytest.mark.acid("startup", 2)
def test_startup_the_teacher_stays_as_it_was(done):
    told = {json.loads(p.read_text())["name"]: p.parent for p in done.path.glob("*/lineage.json")}
    lineage = json.loads((told["student"] / "lineage.json").read_text())["made_of"]["teacher"]
    assert lineage["tuning"] == tuning_files.weights_digest(told["teacher"] / "tuning")
    assert RunFolder.open(told["student"], write=False).spec["settings"]["kd_views.teacher"] == str(told["teacher"])


@pytest.mark.acid("startup", 3, 5)
def test_startup_tasks_may_have_other_labels_and_the_new_ones_are_read_at_the_end(done):
    assert list(done.phases) == ["teacher", "student", "fit"]
    specs = [RunFolder.open(done.path / f"{k + 1}-{name}", write=False).spec for k, name in enumerate(done.phases)]
    assert [s["data"]["source"].rpartition("/")[2] for s in specs] == ["source.csv", "source.csv", "two.csv"]
    assert specs[2]["method"] == "head_only" and specs[2]["model"].endswith("2-student-merged")
    tasks = [
        json.loads((done.path / f"{k + 1}-{n}" / "tuning" / "tuning.json").read_text())
        for k, n in enumerate(done.phases)
    ]
    labels = [t["task"]["labels"] for t in tasks]
    assert labels == [["bad", "good", "red"]] * 2 + [["day", "night"]]
    written = [json.loads(line) for line in (done.path / "rows-unlabelled.jsonl").read_text().splitlines()]
    assert {row["label"] for row in written} == {"good"}, "one label of the source for all: none is read"


def test_startup_reads_rows_of_the_source_as_those_of_the_task_are_stored(tmp_path):
    spec = spec_of(tmp_path, tmp_path / "out", steps=1)
    for name in ("two.csv", "source.csv"):
        (tmp_path / name).write_bytes((tmp_path / name).read_text().replace(",", "~").encode("utf-16-le"))
    data = dataclasses.replace(spec.data, delimiter="~", encoding="utf-16-le")
    done = follow(dataclasses.replace(spec, data=data))
    told = [RunFolder.open(p.parent, write=False).spec["data"] for p in sorted(done.path.glob("*/run.json"))]
    assert [(one["delimiter"], one["encoding"]) for one in told] == [("~", "utf-16-le")] * 3


def test_startup_is_refused_where_it_cannot_work(tmp_path):
    for words, changes in (
        ("needs further rows: --also source", {"also": ("unlabelled=x.csv",)}),
        ("does not merge", {"method": "prefix_tuning", "settings": {}}),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(spec_of(tmp_path, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
