"""A model of ours as a machine: its scores are those of one plain pass, whatever shares a batch or a prefix."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from asking.stub import Stub, asked, desk
from little import little_model
from transformers import GenerationConfig
from word_tables import word_tokenizer

from luthier.asking.local import Local
from luthier.asking.models import open_model
from luthier.asking.way import Score, Write
from luthier.asking.ways.shots.icl import ICL
from luthier.core import DataError, ModelError

SHOTS = "how far is the moon answer one\n\nhow tall is the cat answer two\n\nwho is the dog answer three\n\n"
TEXTS = ("what is it", "how far is the red red red sun", "why", "who is paris and who is rome")
OPTIONS = (" one", " two three", " two good", " red blue cat", " the moon is")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Local:
    return open_model(str(little_model(folder / "llama", "llama")), device="cpu", precision="fp32")


def by_hand(on: Local, prompt: str, option: str) -> float:
    """One pass of prompt and option, alone."""
    context, own = on.parts(prompt, option)
    with torch.inference_mode():
        if on.both:
            ids = torch.tensor([on.ids(prompt)])
            logits = on.model(input_ids=ids, decoder_input_ids=torch.tensor([[*context, *own]])).logits[0]
        else:
            logits = on.model(input_ids=torch.tensor([[*context, *own]])).logits[0]
    chances = logits.log_softmax(-1)
    return sum(float(chances[len(context) - 1 + k, token]) for k, token in enumerate(own))


def requests(prompts: Sequence[str]) -> list[Score]:
    return [Score(prompt=prompt, options=OPTIONS) for prompt in prompts]


@pytest.mark.acid("icl", 2)
@pytest.mark.acid("pmi_dc", 4)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_scores_are_sums_of_one_plain_pass_in_any_batch(kind: str, folder: Path) -> None:
    on = open_model(str(little_model(folder / kind, kind)), device="cpu", precision="fp32")
    prompts = [f"{SHOTS if kind != 't5' else ''}{text} answer" for text in TEXTS]
    together = on.score(requests([*prompts, "answer", "is"]))
    for prompt, found in zip(prompts, together, strict=False):
        wanted = [by_hand(on, prompt, option) for option in OPTIONS]
        assert found.chances == pytest.approx(wanted, abs=2e-4)
        assert found.tokens == (1, 2, 2, 3, 3)
        assert on.score(requests([prompt]))[0].chances == pytest.approx(found.chances, abs=2e-4)
    if kind != "t5":
        assert on.score(requests([""]))[0].chances == pytest.approx(
            [by_hand(on, "", option) for option in OPTIONS], abs=2e-4
        )


def test_what_prompts_share_is_computed_once_and_changes_no_score(folder: Path, llama: Local) -> None:
    plain = open_model(str(folder / "llama"), device="cpu", precision="fp32", share=False)
    prompts = [f"{SHOTS}{text} answer" for text in TEXTS]
    one = [Score(prompt=prompt, options=(" one", " two")) for prompt in prompts]
    llama.forget()
    before = llama.cost.computed
    shared, alone = llama.score(one), plain.score(one)
    assert [r.chances for r in shared] == [pytest.approx(r.chances, abs=2e-4) for r in alone]
    lengths = [llama.count(prompt) for prompt in prompts]
    prefix = llama.count(SHOTS)
    assert plain.cost.computed == sum(lengths)
    assert llama.cost.computed - before <= prefix + sum(n - prefix for n in lengths) + 4
    again = llama.cost.computed
    llama.score(one[:3])
    assert llama.cost.computed - again <= sum(n - prefix for n in lengths[:3]) + 3, "the shots are still there"


def test_a_model_that_takes_no_shared_part_is_asked_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = open_model(str(little_model(folder / "llama", "llama")), device="cpu", precision="fp32")
    monkeypatch.setattr(on, "behind", lambda shared, rows: {"position_ids": torch.tensor([[1, 2]])} if shared else {})
    prompts = [f"{SHOTS}{text} answer" for text in TEXTS]
    found = on.score(requests(prompts))
    assert on.share is False
    assert found[1].chances == pytest.approx([by_hand(on, prompts[1], o) for o in OPTIONS], abs=2e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_texts_are_those_that_transformers_writes(kind: str, folder: Path) -> None:
    on = open_model(str(little_model(folder / kind, kind)), device="cpu", precision="fp32")
    prompts = [*(f"{SHOTS}{text}" if kind == "llama" else text for text in TEXTS)]
    found = on.write([Write(prompt=p, max_tokens=6) for p in prompts], [(0,)] * 4)
    for prompt, (text,) in zip(prompts, found, strict=True):
        ids = torch.tensor([on.ids(prompt)])
        out = on.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
            pad_token_id=on.pad_id, eos_token_id=list(on.stop) or None,
        )[0]  # fmt: skip
        new = out[1:] if on.both else out[ids.shape[1] :]
        assert text.text == on.tokenizer.decode(new, skip_special_tokens=True)
        assert text.chance < 0


def test_draws_depend_on_their_names_and_on_no_neighbour(llama: Local) -> None:
    prompts = [f"{SHOTS}{text}" for text in TEXTS]
    asked = [Write(prompt=p, n=3, temperature=1.5, max_tokens=5) for p in prompts]
    names = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 1, 2)]
    together = llama.write(asked, names)
    for request, name, wanted in zip(asked, names, together, strict=True):
        [alone] = llama.write([request], [name])
        assert [t.text for t in alone] == [t.text for t in wanted]
        assert [t.chance for t in alone] == pytest.approx([t.chance for t in wanted], abs=1e-3)
    assert len({t.text for t in together[0]}) == 3
    assert together[3][0].text == together[3][1].text != together[3][2].text


def test_a_stop_word_ends_a_text_and_is_no_part_of_it(llama: Local) -> None:
    prompt = f"{SHOTS}{TEXTS[1]}"
    [[whole]] = llama.write([Write(prompt=prompt, n=1, temperature=1.5, max_tokens=8)], [(2,)])
    words = whole.text.split()
    assert len(words) > 3
    [[cut]] = llama.write([Write(prompt=prompt, temperature=1.5, max_tokens=8, stop=(words[2],))], [(2,)])
    assert cut.text.split() == words[: words.index(words[2])] and cut.ended


def test_prompts_that_are_too_long_are_refused(llama: Local) -> None:
    with pytest.raises(DataError, match=r"a prompt of 70 tokens and an option of 3: .* 64 positions"):
        llama.score(requests(["the " * 70]))
    with pytest.raises(DataError, match="leaves no room for an answer"):
        llama.write([Write(prompt="the " * 64)], [(0,)])


def test_logits_that_are_no_numbers_are_an_error_and_no_answer(folder: Path) -> None:
    broken = open_model(str(little_model(folder / "llama", "llama")), device="cpu", precision="fp32")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="gives no number for what goes on from 'what is it'"):
        broken.score(requests(["what is it"]))


def test_an_encoder_is_refused_before_it_is_loaded(folder: Path) -> None:
    with pytest.raises(ModelError, match="bert is an encoder, which goes on from no prompt"):
        open_model(str(little_model(folder / "bert", "bert")))


TURNS = (
    "{% for m in messages %}{{ 'who ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)


def test_a_chat_model_is_asked_in_a_turn_of_its_template_unless_it_is_told_otherwise(folder: Path) -> None:
    path = little_model(folder / "chat", "llama")
    word_tokenizer("gpt", chat_template=TURNS).save_pretrained(path)
    on, raw = (open_model(str(path), device="cpu", precision="fp32", raw=raw) for raw in (False, True))
    assert on.template is not None and on.template.digest[:12] in on.said and on.template.digest in on.reads
    assert raw.reads == raw.said == "" and raw.ids("what is it") != on.ids("what is it")
    assert on.ids("what is it") == raw.ids("who what is it answer ") and on.count("what is it") == 5
    assert on.size(" answer") == 1 < on.count(" answer"), "no turn is laid around what goes on"
    found = on.score([Score(prompt=text, options=OPTIONS) for text in TEXTS])
    by_turns = raw.score([Score(prompt=f"who {text} answer", options=OPTIONS) for text in TEXTS])
    for one, other in zip(found, by_turns, strict=True):  # words of this tokenizer know no blanks
        assert one.chances == pytest.approx(other.chances, abs=2e-4)
    [[text]] = on.write([Write(prompt="what is it", max_tokens=3)], [(0,)])
    [[same]] = raw.write([Write(prompt="who what is it answer ", max_tokens=3)], [(0,)])
    assert text == same
    on.forget()
    assert on._chat is None, "the template's process has ended"


def test_how_prompts_are_laid_before_a_model_is_part_of_their_digests() -> None:
    machine = Stub()
    plain = asked(ICL(k=0), ["x"], desk((), {"A": "a"}), machine)[0]
    machine.reads = "one turn"
    turned = asked(ICL(k=0), ["x"], desk((), {"A": "a"}), machine)[0]
    assert plain.prompts == turned.prompts and plain.digests != turned.digests
    assert plain.digests == (hashlib.sha256(plain.prompts[0].encode()).hexdigest()[:16],)


OWN = {
    "repetition_penalty": 0.2, "suppress_tokens": [7, 9], "begin_suppress_tokens": [11], "no_repeat_ngram_size": 2,
    "min_new_tokens": 4, "forced_bos_token_id": 5,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_generation_config_of_a_models_own_files_is_obeyed_as_generate_obeys_it(kind: str, folder: Path) -> None:
    path, prompts = little_model(folder / f"own-{kind}", kind), [f"{SHOTS}{text} answer" for text in TEXTS]
    plain = open_model(str(path), device="cpu", precision="fp32")
    assert plain.own == {} and plain.said == plain.reads == ""
    asked_for = [Write(prompt=prompt, max_tokens=6) for prompt in prompts]
    before = [text.text for [text] in plain.write(asked_for, [(0,)] * len(prompts))]
    GenerationConfig(**OWN, eos_token_id=plain.stop[0], decoder_start_token_id=0).save_pretrained(path)
    on = open_model(str(path), device="cpu", precision="fp32")
    assert on.own == OWN and "suppress_tokens = [7, 9]" in on.said and "suppress_tokens = [7, 9]" in on.reads
    assert "--repetition" not in on.said, "a command that has no such option"
    found = [text.text for [text] in on.write(asked_for, [(0,)] * len(prompts))]
    assert found != before
    for prompt, text in zip(prompts, found, strict=True):
        ids = on.ids(prompt)
        out = on.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=6,
            do_sample=False, num_beams=1, pad_token_id=on.pad_id, eos_token_id=list(on.stop),
        )[0].tolist()  # fmt: skip
        new = out[1:] if on.both else out[len(ids) :]
        end = next((k for k, token in enumerate(new) if token in on.stop), None)
        assert text == on.tokenizer.decode(new[:end], skip_special_tokens=True)
    drawn = [text.text for [text] in on.write([Write(prompt=p, max_tokens=6, temperature=1.0) for p in prompts],
                                              [(n,) for n in range(len(prompts))])]  # fmt: skip
    banned = {on.tokenizer.decode([token]).strip() for token in OWN["suppress_tokens"]}  # type: ignore[attr-defined]
    assert not any(banned & set(text.split()) for text in drawn)
