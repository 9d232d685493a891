"""Tokens that are drawn: the chances of the model, what may be left out, and no word of the neighbours."""

import pytest
import torch
from tiny import tiny
from word_tables import table, word_tokenizer

from luthier.core import ConfigError, key
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.tasks import Task
from luthier.surgery import attach
from luthier.training.precision import choose_precision
from luthier.training.sampling import Drawn, Sampling
from luthier.workflow.generation import Generator

torch.set_num_threads(1)
SCORES = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])


def drawn(n=4000, **options):
    """How often each of five words is drawn."""
    found = torch.zeros(5)
    draw = Drawn(list(range(n)), **options)
    for word in draw(torch.zeros(n, 1), SCORES.repeat(n, 1)).argmax(-1).tolist():
        found[word] += 1 / n
    return found


def test_a_token_is_drawn_with_the_chance_that_the_model_gives_it():
    assert 0.5 * float((drawn() - SCORES.softmax(-1)).abs().sum()) < 0.03
    assert 0.5 * float((drawn(temperature=0.5) - (SCORES / 0.5).softmax(-1)).abs().sum()) < 0.03


def test_what_is_left_out_is_never_drawn_and_the_rest_keeps_its_proportions():
    two = drawn(top_k=2)
    assert (two[[1, 3, 4]] == 0).all() and abs(float(two[0] - SCORES[[0, 2]].softmax(-1)[0])) < 0.03
    order = SCORES.softmax(-1)  # .55 .07 .20 .03 .12
    some = drawn(top_p=float(order[0] + order[2]) + 0.01)  # two are not enough, three are
    assert (some[[1, 3]] == 0).all() and (some[[0, 2, 4]] > 0).all()
    assert drawn(top_p=0.01)[0] > 0.999


def test_a_row_is_written_alike_alone_and_in_a_batch_and_another_seed_writes_otherwise():
    tuned, device = attach(tiny("llama", "lm"), "lora"), torch.device("cpu")
    tuned.model.eval()
    texts = ["how far is it", "why", "who is the good dog", "why"]

    def written(rows, **options):
        prompts = encode(
            table([{"text": texts[i]} for i in rows]), Columns(shape="plain", text="text"), Task(name="causal_lm"),
            word_tokenizer("gpt"), n_vocab=131, max_length=20, with_targets=False,
        )  # fmt: skip
        generator = Generator(
            tuned, word_tokenizer("gpt"), choose_precision("fp32", device), device, pad_id=0, stop=[3], limit=60,
            tokens=512,
        )  # fmt: skip
        sampling = Sampling(seeds=[key(7, "row", i) for i in rows], **options)
        return [each.text for each in generator.write(prompts, 8, sampling=sampling)]

    whole = written([0, 1, 2, 3])
    assert whole == [written([i])[0] for i in range(4)] == written([3, 2, 1, 0])[::-1]
    assert whole[1] != whole[3], "one prompt, two seeds"
    with pytest.raises(ConfigError, match="one of the two"):
        Generator.write(None, [1], 3, beams=2, sampling=Sampling(seeds=[1]))
    with pytest.raises(ConfigError, match="2 seeds for 1 prompts"):
        Generator.write(None, [1], 3, sampling=Sampling(seeds=[1, 2]))
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sampling(seeds=[1], **wrong)
