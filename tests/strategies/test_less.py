"""less: the rows whose gradients are like those of target rows."""

import csv
import dataclasses
import random
import weakref

import numpy as np
import pytest
import torch
from in_memory import Runs
from little import little_spec
from word_tables import WORDS

from luthier.core import ConfigError
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec
from luthier.strategies.mixture.less import Less, projected
from luthier.workflow import train

torch.set_num_threads(1)


@pytest.mark.acid("data_select", 3)
def test_less_projected_products_are_near_the_exact_ones_and_nearer_with_more_numbers():
    x = torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))  # more than is drawn at once
    sizes = x.norm(dim=1)
    errors = {}
    for d in (64, 1024):
        short = projected(x, d, 3)
        assert torch.equal(short, projected(x, d, 3)) and not torch.equal(short, projected(x, d, 4))
        assert torch.allclose(projected(x[:2], d, 3), short[:2], atol=1e-3), "the same, whoever stands beside"
        apart = (short @ short.T - x @ x.T) / (sizes[:, None] * sizes[None])
        errors[d] = float(apart.square().mean().sqrt())
        # Johnson and Lindenstrauss: for 20 vectors all within sqrt(8 ln 20 / d), but with a small chance.
        assert float(apart.abs().max()) < (8 * np.log(20) / d) ** 0.5
    assert errors[64] > 2.5 * errors[1024]


def loop_of(runs, project=0, steps=12):
    """A run at the end of its warm-up. Half of the rows call red what the others call good; so does the target."""
    draw = random.Random(1)

    def write(name, count, swapped):
        path = runs.home / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for i in range(count):
                word = ("good", "bad")[i // 2 % 2]
                label = {"good": "bad", "bad": "good"}[word] if swapped(i) else word
                writer.writerow((" ".join([*draw.choices(WORDS, k=4), word, word, word]), label))
        return str(path)

    rows, target = write("rows.csv", 60, lambda i: i % 2), write("target.csv", 8, lambda i: True)
    given = {"less.warmup": 0.5, "less.share": 0.25, "less.project": project, "less.looks": 1}
    return runs.loop(
        "less", "lora", "bert-dry", values=given, steps=steps, batch=BatchSpec(size=12, tokens=4096),
        data=DataSpec(source=rows, test_share=0.0), also=(f"target={target}",), optim=OptimSpec(lr=3e-3),
    )  # fmt: skip


@pytest.mark.acid("data_select", 4)
@pytest.mark.parametrize("project", [0, 256])
def test_less_a_planted_cluster_is_found_and_from_then_on_learnt_alone(tmp_path, project, monkeypatch):
    loop = loop_of(Runs(tmp_path), project)
    seen = []
    inner = Less.batches
    monkeypatch.setattr(Less, "batches", lambda self, course, b: seen.append(inner(self, course, b)) or seen[-1])
    loop.run_to()
    ((_, course),) = loop.moments._asked
    kept = course.memory.tensors["kept"].tolist()
    assert len(kept) == 15 and sum(row % 2 for row in kept) >= 13, "half of all rows are planted"
    later = [row for step in seen[-6:] for batch in step for row in batch.rows.tolist()]
    assert set(later) <= set(kept) and len(later) == 6 * 12
    assert sorted(later[:12]) == sorted(set(later[:12])), "none twice in a step"


def test_less_scores_are_cosines_with_the_way_of_adamw_by_brute_force(tmp_path, monkeypatch):
    loop = loop_of(Runs(tmp_path))
    loop.run_to(6)
    ((one, course),) = loop.moments._asked
    rows = course.rows.rows("train")[:5]
    made, most, slopes, adam = [], [], Less._slopes, Less.adam

    def watched(tensor):
        made.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in made))
        return tensor

    monkeypatch.setattr(Less, "_slopes", lambda self, c, r: (watched(slope) for slope in slopes(self, c, r)))
    monkeypatch.setattr(Less, "adam", lambda self, c, slope: watched(adam(self, c, slope)))
    found = one.scored(course, rows)
    assert len(made) == 8 + 2 * 5 and max(most) <= 4, "each is as large as all that trains, and few are held at once"
    held = {name: loop.optimiser.first.pop(name) for name in [one._names(course)[0]]}
    (g,) = slopes(one, course, rows[:1])
    forgotten = adam(one, course, g)
    loop.optimiser.first |= {name: torch.zeros_like(m) for name, m in held.items()}
    assert torch.equal(forgotten, adam(one, course, g)), "moments that were forgotten are zeros"
    loop.optimiser.first |= held
    names = [n for n in course.weights() if "head" not in n]
    assert names and all("classifier" not in n for n in names) and len(names) < len(course.weights())

    def slope(row):
        for p in course.weights().values():
            p.grad = None
        with course.still():
            (batch,) = course.cut(np.asarray([row]))
            course.forward(batch).loss.backward()
        return [course.weights()[n].grad.clone() for n in names]

    def mean_of(those):
        return torch.cat([torch.stack(part).mean(0).reshape(-1) for part in zip(*map(slope, those), strict=True)])

    target = course.rows.rows("target")
    classes = [int(course.cut(np.asarray([row]))[0].labels) for row in target]
    assert sorted(set(classes)) == [0, 1]
    aims = [mean_of([row for row, one in zip(target, classes, strict=True) if one == part]) for part in (0, 1)]
    whole = dataclasses.replace(one, parts="one").scored(course, rows)
    assert found.shape == (2, 5) and whole.shape == (1, 5)
    for row, scores in zip(rows, torch.cat([found, whole]).T, strict=True):
        moved = []
        for name, g in zip(names, slope(row), strict=True):  # by an AdamW of torch's that has the same moments
            p = torch.zeros_like(g).requires_grad_()
            adam = torch.optim.AdamW([p], lr=1.0, weight_decay=0.0, eps=loop.spec.optim.eps)
            p.grad = g
            adam.state[p] = {
                "step": torch.tensor(float(loop.optimiser.counts[name])),
                "exp_avg": loop.optimiser.first[name].clone(), "exp_avg_sq": loop.optimiser.second[name].clone(),
            }  # fmt: skip
            adam.step()
            moved.append(-p.detach().reshape(-1))
        for score, aim in zip(scores.tolist(), [*aims, mean_of(target)], strict=True):
            assert score == pytest.approx(float(torch.cosine_similarity(torch.cat(moved), aim, dim=0)), abs=1e-4)


def test_less_a_row_counts_for_the_part_of_the_target_that_it_is_most_like(tmp_path, monkeypatch):
    scores = torch.tensor([[0.9, 0.5, 0.7, 0.0, 0.1, 0.0], [0.0, 0.5, 0.0, 0.2, 0.85, 0.3]])
    monkeypatch.setattr(Less, "scored", lambda self, course, rows: scores.repeat(1, 10)[:, : len(rows)])
    loop = loop_of(Runs(tmp_path))
    loop.run_to()
    ((_, course),) = loop.moments._asked
    kept = course.memory.tensors["kept"].tolist()
    assert {row % 6 for row in kept} == {0, 4} and len(kept) == 15, "ten of .9 and five of .85; .5 and .5 are no 1"
    assert course.memory.tensors["scores"].shape == (2, 60)


def test_less_without_a_target_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="target"):
        train(little_spec(tmp_path, strategy="less", steps=2))
