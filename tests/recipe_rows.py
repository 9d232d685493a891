"""What the contract of recipes needs for those that read rows of their own kind: fields of a spec, by recipe."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fillers import filler
from little import little_data, little_model, little_spec

from luthier.data.reflection import TOKENS
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.workflow import merge, train
from luthier.workflow.load_model import find_model, load_tokenizer
from luthier.workflow.more_tokens import add_tokens

__all__ = ["ROWS", "write_lines"]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def traces(home: Path) -> dict[str, Any]:
    words = ("sun", "moon", "cat", "dog", "paris", "rome")
    rows = [
        {
            "question": f"what is the {words[i % 6]}",
            "steps": [
                {"thought": "good", "action": f"say[{words[i % 6]}]", "observation": f"red {words[i % 5]}"},
                {"answer": f"blue {words[i % 6]}"},
            ],
            "reward": 1 if i % 4 else 0,
        }
        for i in range(40)
    ]
    source = str(write_lines(home / "traces.jsonl", rows))
    model = str(little_model(home / "llama", "llama"))
    return {"model": model, "data": DataSpec(source=source), "settings": {"agent_sft.reward": "reward"}}


def answers(home: Path) -> dict[str, Any]:
    data = DataSpec(source=str(little_data(home / "turns.csv", kind="turns")))
    return {"model": str(little_model(home / "llama", "llama")), "data": data}


def labelled_by_a_model(home: Path) -> dict[str, Any]:
    (home / "choose.txt").write_text("{prompt} # {first} # {second} #")
    pairs = DataSpec(source=str(little_data(home / "pairs.csv", rows=30, kind="pairs")))
    settings = {"rlaif.words": "one, two", "rlaif.question": str(home / "choose.txt")}
    return {"model": str(little_model(home / "llama", "llama")), "data": pairs, "method": "lora", "settings": settings}


def under_principles(home: Path) -> dict[str, Any]:
    texts = {
        "principles": "say moon\nsay cat\n",
        "critique": "{prompt} {answer} {principle}",
        "revision": "{prompt} {answer} {principle} {critique}",
        "question": "{prompt} {first} {second} {principle}",
    }
    for name, text in texts.items():
        (home / f"{name}.txt").write_text(text)
    settings = {f"cai.{name}": str(home / f"{name}.txt") for name in texts}
    settings |= {"cai.words": "one, two", "cai.new_tokens": 6}
    turned = DataSpec(source=str(little_data(home / "turns.csv", rows=30, kind="turns")))
    prompts = little_data(home / "asked.csv", rows=12, kind="turns", seed=3)
    return {
        "model": taught(home), "data": turned, "method": "lora", "also": (f"prompts={prompts}",), "settings": settings
    }  # fmt: skip


def taught(home: Path) -> str:
    """A tiny decoder that has learnt to answer and to stop."""
    out = home / "taught"
    if not out.exists():
        rows = DataSpec(source=str(little_data(home / "turns.csv", rows=30, kind="turns")))
        given = {"data": rows, "steps": 60, "optim": OptimSpec(lr=1e-2), "trunk_dropout": "off"}
        merge(train(little_spec(home, "full", "llama", out=str(home / "taught-run"), **given)).path, out)
    return str(out)


def asked(home: Path) -> dict[str, Any]:
    """Questions, each with the document that answers it; the last document is a copy of the first."""
    words = ("sun", "moon", "cat", "dog", "paris", "rome", "city", "red")
    documents = [
        {"id": str(i), "text": f"the {word} is {words[i - 3]} and {words[i - 5]}"} for i, word in enumerate(words)
    ]
    write_lines(home / "documents.jsonl", [*documents, {"id": "copy", "text": documents[0]["text"].upper()}])
    rows = [
        {
            "question": f"how {'far ' * (i // 8)}is the {words[i % 8]}",
            "answer": f"##begin_quote##is {words[i % 8 - 3]}##end_quote## ." if i % 3 else words[i % 8 - 3],
            "oracle": str(i % 8),
        }
        for i in range(40)
    ]
    source = str(write_lines(home / "asked.jsonl", rows))
    settings = {"raft.documents": str(home / "documents.jsonl"), "raft.distractors": 2}
    return {"model": str(little_model(home / "llama", "llama")), "data": DataSpec(source=source), "settings": settings}


def found(home: Path) -> dict[str, Any]:
    given = asked(home)
    encoder = little_model(home / "bert", "bert")
    settings = {"ra_dit.documents": str(home / "documents.jsonl"), "ra_dit.encoder": str(encoder)}
    return given | {"method": "lora", "settings": settings}


def reflected(home: Path) -> dict[str, Any]:
    asked(home)
    model = home / "llama-reflects"
    if not model.exists():
        add_tokens(str(little_model(home / "llama", "llama")), TOKENS, model)
    words = ("sun", "moon", "cat", "dog", "paris", "rome", "city", "red")
    rows = [
        {
            "question": f"how {'far ' * (i // 8)}is the {words[i % 8]}",
            "answer": words[i % 8 - 3],
            "utility": 5 if i % 3 else 2,
            **({"passage": str(i % 8), "relevant": True, "support": "full"} if i % 2 == 0 else {}),
        }
        for i in range(40)
    ]
    vocabulary = load_tokenizer(find_model(str(model))).get_vocab()
    ids = [vocabulary[token] for token in TOKENS]
    settings = {"self_rag.documents": str(home / "documents.jsonl"), "trainable_tokens.tokens": ids, "lora.rank": 2}
    data = DataSpec(source=str(write_lines(home / "judged.jsonl", rows)))
    return {"model": str(model), "data": data, "method": "trainable_tokens+lora", "settings": settings}


def entities(home: Path) -> dict[str, Any]:
    words = ("paris", "rome", "cat", "dog", "moon")
    rows = [
        {
            "text": f"the {words[i % 5]} is {'so ' * (i // 5)}far",
            "items": [{"type": "city" if i % 5 < 2 else "name", "text": words[i % 5]}] if i % 4 else [],
        }
        for i in range(40)
    ]
    source = str(write_lines(home / "entities.jsonl", rows))
    return {"model": str(little_model(home / "llama", "llama")), "data": DataSpec(source=source)}


def gaps(home: Path) -> dict[str, Any]:
    data = DataSpec(source=str(little_data(home / "rows.csv")), template="{text} ! it is {mask} .")
    return {"model": str(filler(home / "filler")), "data": data}


ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "agent_sft": traces,
    "cai": under_principles,
    "instruct_sft": answers,
    "label_words": gaps,
    "rlaif": labelled_by_a_model,
    "ra_dit": found,
    "raft": asked,
    "self_rag": reflected,
    "instruct_uie": entities,
    "self_instruct": answers,
}
