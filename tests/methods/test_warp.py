"""WARP: the acid tests of its paper, and trained words of a template from the row to the answer."""

import dataclasses

import numpy as np
import pytest
import torch
from little import Heard
from methods.checks import stir
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from workflow.test_cloze import asking

from luthier import train as run
from luthier.core import AnatomyError, ConfigError
from luthier.data.cloze import rendered
from luthier.data.tasks import Task
from luthier.runs import RunFolder
from luthier.surgery import attach
from luthier.training.objective import Objective
from luthier.workflow import resume
from luthier.workflow.build import build
from luthier.workflow.load_model import collator_of, find_model, load_config, load_model
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import prepare
from luthier.workflow.resume_proof import run_digests

TEMPLATES = {
    "encoder": "{soft:2} {text} ! it {soft} is {mask} .",
    "decoder": "{soft:2} {text} ! it is {soft} {mask}",
    "both": "{soft:2} {text} ! it {soft} is {mask} .",
}


def filling(home, kind="encoder", **changes):
    data = {"template": TEMPLATES[kind], **changes.pop("data", {})}
    return asking(home, kind, method="warp", data=data, **changes)


@pytest.mark.acid("warp", 1)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_trains_is_the_words_the_label_vectors_and_their_biases(kind, tmp_path):
    done = run(filling(tmp_path, kind, steps=1))
    d = done.tuned.anatomy.d
    assert done.tuned.n_trained(head=True) == 3 * d + 3 * d + 3
    assert {tuple(p.shape) for p in done.tuned.trained().values()} == {(3, d), (3,)}


@pytest.mark.acid("warp", 2)
@pytest.mark.parametrize("other", ["{text} ! it {soft:3} is {mask} .", "{soft} {text} ! it is {mask} {soft:2} ."])
def test_where_the_words_stand_matters(other, tmp_path):
    done = run(filling(tmp_path, steps=1))
    stir(done.tuned)
    asked = Predictor(done.path)
    for name, held in asked.tuned.trained().items():
        held.data.copy_(done.tuned.trained()[name].data)
    first = asked.texts(["how far is the moon"])[0]["probabilities"]
    asked.task = dataclasses.replace(asked.task, template=other)
    moved = asked.texts(["how far is the moon"])[0]["probabilities"]
    assert max(abs(first[label] - moved[label]) for label in first) > 1e-4


@pytest.mark.acid("warp", 3)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_with_the_words_own_rows_it_gives_the_models_own_scores(kind, tmp_path):
    bare = asking(tmp_path, kind, steps=1)
    first = prepare(dataclasses.replace(bare, method="bitfit" if kind == "encoder" else "lora"))
    rows = slice(0, 8)
    base = scores_of(first, rows)
    spec = dataclasses.replace(bare, method="warp", settings={"labels": "words"})
    torch.testing.assert_close(scores_of(prepare(spec), rows), base, rtol=1e-4, atol=1e-4)


def scores_of(prepared, rows):
    """Logits of some training rows, of the tuning as it starts."""
    model, fresh = load_model(
        prepared.source, prepared.task, dtype=torch.float32, device=torch.device("cpu"), seed=0, store=None
    )
    model.config.pad_token_id = prepared.pad_id
    tuned = attach(model, prepared.method, new_tensors=fresh)
    model.eval()
    collator = collator_of(prepared.task, model, prepared.tokenizer, pad_id=prepared.pad_id, pad_to=1, seed=0)
    batch = collator(prepared.train, np.arange(rows.start, rows.stop))
    with torch.no_grad():
        return Objective(tuned, prepared.task, full_logits=True)(batch).logits


@pytest.mark.acid("warp", 4)
def test_dropout_rests_while_it_trains(tmp_path):
    done = build(prepare(dataclasses.replace(filling(tmp_path), trunk_dropout="auto")))
    with RunFolder.create(tmp_path / "run", {}, fingerprints={}, device="cpu") as folder:
        loop = done(folder, Heard())
        loop.set_mode(training=True)
        model = loop.tuned.model
        assert model.luthier.training and not loop.trunk_dropout
        ids = torch.tensor([[2, 7, len(model.get_input_embeddings().weight), 9, 3]])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_it_learns_resumes_to_the_bit_and_answers_in_a_fresh_model(kind, tmp_path):
    spec = filling(tmp_path, kind, steps=12 if kind == "encoder" else 30)
    spec = dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, lr=0.05))
    whole = run(spec)
    # The states of a random encoder at its gap say next to nothing of the text.
    assert kind == "encoder" or whole.scores["accuracy"] > 0.6
    run(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=11)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(whole.path)
    answers = Predictor(whole.path).texts(["moon sun good", "[UNK] moon bad"])
    assert set(answers[0]["probabilities"]) == {"bad", "good", "red"}


def test_trained_words_start_as_the_mask(tmp_path):
    done = prepare(filling(tmp_path))
    assert (done.task.n_soft, done.method.length) == (3, 3)
    ids = done.train.ids
    first = load_config(find_model(done.spec.model)).vocab_size
    assert sorted(set(ids[ids >= first].tolist())) == [first, first + 1, first + 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora"}, "lora trains none of them"),
        ({"data": {"template": "{text:2} {mask}"}}, "have no number"),
        ({"data": {"template": "{shown} {soft} {text} {mask}"}}, "would show them in every row"),
        ({"data": {"template": "{soft:600} {text} {mask}"}}, "600 of them"),
        ({"data": {"template": None, "words": None}}, "answers in no words"),
        ({"strategy": "aux_lm"}, "are no words of the model, so none can be predicted"),
        ({"strategy": "early_exit"}, "strategy early_exit cannot learn"),
        ({"strategy": "contrastive"}, "strategy contrastive cannot learn"),
        ({"strategy": "cosine_ws"}, "strategy cosine_ws cannot learn"),
        ({"strategy": "lwf"}, "the base has no head for its labels"),
        ({"strategy": "lwf", "settings": {"old": "runs/before"}}, "Leave the template or the other model out"),
    ],
)
def test_what_cannot_work_is_refused(changes, words, tmp_path):
    given = {"method": "warp", **changes}
    method = given.pop("method")
    spec = dataclasses.replace(filling(tmp_path, **given), method=method)
    with pytest.raises((ConfigError, AnatomyError), match=words):
        run(spec)


def test_no_blank_is_a_token_between_trained_words():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "<eos>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<eos>")
    end = tokenizer.eos_token_id
    template = "{soft:2} {text} is {soft:2} {soft} {mask}"
    task = Task(name="classification", template=template, asks="decoder", n_soft=5, filler=end)
    ids = tokenizer(rendered(task, ["a moon"], tokenizer))["input_ids"]
    between = tokenizer(" a moon is")["input_ids"]
    assert ids == [end, end, *between, end, end, end]


def test_a_row_that_holds_the_place_of_a_trained_word_is_refused(tmp_path):
    rows = tmp_path / "own.csv"
    texts = ["moon", "sun [MASK]", *["moon sun"] * 30]
    rows.write_text("text,label\n" + "".join(f"{t} {i},{('good', 'bad', 'red')[i % 3]}\n" for i, t in enumerate(texts)))
    done = prepare(filling(tmp_path, data={"source": str(rows), "test_share": 0.0, "accept_refused": 0.5}))
    assert done.train.ledger.counts()["refused"] == 1
    assert b"stands for the template's trained words" in b"".join(done.train.ledger.lines("train"))
