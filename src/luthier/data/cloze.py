"""Questions of a label as a gap in a text: a template, and for each label the word that would fill the gap.

    template   {text} It was {mask}.          words   bad=terrible, good=great

The score of a label is the logit of its word where the gap is: at the mask of an encoder, at the last token of a
decoder (the gap ends the template), at the first sentinel of a T5. No new head is needed, and none trains.

    template   {shown:16} {text} It was {mask}.

With {shown} one labelled row of each label stands there too, its gap filled. Each row is then read in so many versions,
16 where no number is given, with other rows shown: in training one of them in each epoch, and where rows are scored or
answered the logits of all are averaged. The rows that may be shown are stored in the tuning, texts and all.

    template   {soft:5} {text} {soft:5} {mask}.

{soft} is a word that a method trains, such as warp: see `soft_words`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.core import ConfigError, ModelError, key
from luthier.data.columns import Columns, label_name
from luthier.data.infer_task import Kind, kind_of_model
from luthier.data.rows import Table, normalised
from luthier.data.soft_words import MOST_SOFT, filler_of
from luthier.data.tasks import Task

__all__ = ["as_cloze", "marks_of", "rendered", "shown_beside", "with_shown", "words_of"]

FIELDS = ("text", "pair", "mask", "shown", "soft")
FIELD = re.compile(r"\{(\w*)(?::(\d+))?\}")
SOFT = re.compile(r"\s*\{soft(?::(\d+))?\}")
DRAWS, MOST_DRAWS = 16, 64
"""Versions of a row where rows are shown beside it."""
SHOWN = 16
"""Rows of each label that may be shown: they are stored with the tuning."""
NEAREST = 0.5
"""Share of a label's rows, those with most words in common, that may be shown beside a row."""


def as_cloze(task: Task, template: str, words: str | None, columns: Columns, tokenizer: Any, config: Any) -> Task:
    """The task with its labels asked for by a template.

    Args:
        words: "label=word, label=word"; None, the labels themselves.

    Raises:
        ConfigError: a template without a gap, words that do not fit the labels, or that are several tokens.
        ModelError: the tokenizer has nothing that stands for a gap.
    """
    if task.name != "classification" or task.multi_label:
        raise ConfigError(f"a template asks for one of several labels, and the task is {task.name}. Leave it out.")
    kind = kind_of_model(config)
    _check_template(template, kind, columns)
    spelt = words_of(words, task.labels)
    ids = tuple(_word_id(tokenizer, label, word, template) for label, word in spelt.items())
    if len(set(ids)) < len(ids):
        raise ConfigError(f"words: two labels have the same word in {', '.join(spelt.values())}. Choose another.")
    draws = [int(number or DRAWS) for name, number in FIELD.findall(template) if name == "shown"]
    gap, n_soft = _gap(tokenizer, kind), marks_of(template).count("soft")
    filler = filler_of(tokenizer, gap) if n_soft else -1
    return replace(
        task, template=template, words=tuple(spelt.values()), word_ids=ids, gap=gap, asks=kind, draws=sum(draws),
        n_soft=n_soft, filler=filler,
    )  # fmt: skip


def marks_of(template: str) -> list[str]:
    """What a template holds besides words, in order, "soft" as often as such words stand there.

    >>> marks_of("{soft:2} {text} It was {mask}.")
    ['soft', 'soft', 'text', 'mask']
    """
    return [n for n, number in FIELD.findall(template) for _ in range(int(number or 1) if n == "soft" else 1)]


def with_shown(task: Task, table: Table, columns: Columns) -> Task:
    """The task with the rows that may be shown: of each label so many of those that are learnt, by their content.

    Raises:
        ConfigError: a label with fewer than two rows: a row would have nothing but itself to be shown beside it.
    """
    names = [name for name in (columns.text, columns.pair) if name is not None]
    assert columns.label is not None
    of: dict[str, dict[str, tuple[str, ...]]] = {label: {} for label in task.labels}
    for row in table.rows:
        of[label_name(row[columns.label])][columns.content(row)] = tuple(str(row.get(name) or "") for name in names)
    few = [label for label, found in of.items() if len(found) < 2]
    if few:
        raise ConfigError(
            f"template {task.template!r} shows a row of each label, and of {few[0]!r} there are {len(of[few[0]])} to "
            "learn from. Leave {shown} out, or give two rows of each label at least."
        )
    ranked = {label: sorted(found, key=lambda same: key("shown", same))[:SHOWN] for label, found in of.items()}
    return replace(task, shown=tuple((label, *of[label][same]) for label in task.labels for same in ranked[label]))


def shown_beside(task: Task, texts: Sequence[str], draw: int) -> list[tuple[str, ...]]:
    """One row of each label, never this one itself: one of those that have most words in common, named by `draw`.

    Returns:
        texts of a row for each label, in the order of the labels; nothing where the template shows none.
    """
    own, words = [normalised(text) for text in texts], _words(texts)
    found = []
    for label in task.labels if task.shown else ():
        rows = [texts for name, *texts in task.shown if name == label]
        others = [row for row in rows if [normalised(text) for text in row] != own]
        near = sorted(others, key=lambda row: -len(words & _words(row)) / len(words | _words(row) | {""}))
        kept = near[: max(1, round(NEAREST * len(near)))]
        found.append(tuple(kept[key("shown", *own, label, draw) % len(kept)]))
    return found


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in normalised(text).split()}


def _check_template(template: str, kind: Kind, columns: Columns) -> None:
    found = [name for name, _ in FIELD.findall(template)]
    unknown = [name for name in found if name not in FIELDS]
    if unknown:
        raise ConfigError(f"template: {{{unknown[0]}}} is none of {', '.join(f'{{{n}}}' for n in FIELDS)}.")
    if found.count("mask") != 1:
        raise ConfigError(
            f"template {template!r} has {found.count('mask')} gaps; it needs one {{mask}}, such as "
            "'{text} It was {mask}.'"
        )
    fields = [(name, number) for name, number in FIELD.findall(template) if name != "soft"]
    numbers = [int(number or DRAWS) for name, number in fields if name == "shown" or number]
    if found.count("shown") > 1 or len(numbers) > found.count("shown") or not all(0 < n <= MOST_DRAWS for n in numbers):
        raise ConfigError(
            f"template {template!r}: rows are shown at one place, in 1 to {MOST_DRAWS} versions of each row, such as "
            "{shown:16}; other fields have no number, but for {soft}."
        )
    soft = marks_of(template).count("soft")
    if "soft" in found and ("shown" in found or not 0 < soft <= MOST_SOFT):
        about = "{shown} too: it would show them in every row" if "shown" in found else f"{soft} of them"
        raise ConfigError(
            f"template {template!r} has words that are trained, {{soft}}, and {about}. Use 1 to {MOST_SOFT}, and no "
            "{shown}."
        )
    if "text" not in found:
        raise ConfigError(f"template {template!r} does not hold the row's text: put {{text}} into it.")
    if ("pair" in found) != (columns.pair is not None):
        lacks = "holds {pair}, and the rows have one text" if "pair" in found else "leaves out the second text"
        raise ConfigError(f"template {template!r} {lacks}. Use {{pair}} where rows are pairs, and only there.")
    if kind == "decoder" and not template.rstrip().endswith("{mask}"):
        raise ConfigError(
            f"template {template!r}: a decoder reads what stands before the gap alone, so the template must end with "
            "{mask}. Put the rest before it."
        )


def words_of(words: str | None, labels: Sequence[str]) -> dict[str, str]:
    """Label -> its word, in the order of the labels.

    >>> words_of("1=great, 0=bad", ("0", "1"))
    {'0': 'bad', '1': 'great'}

    Raises:
        ConfigError: a label without a word, or a word for none.
    """
    if words is None:
        return {label: label for label in labels}
    pairs = [part.partition("=") for part in words.split(",") if part.strip()]
    found: Mapping[str, str] = {label.strip(): word.strip() for label, _, word in pairs}
    lacks = [label for label in labels if not found.get(label)]
    extra = [label for label in found if label not in labels]
    if lacks or extra:
        about = f"no word for {', '.join(lacks)}" if lacks else f"{', '.join(extra)} is no label"
        raise ConfigError(
            f"words {words!r}: {about}. Write one word for each label of {', '.join(labels)}, as in {labels[0]}=great."
        )
    return {label: found[label] for label in labels}


def _word_id(tokenizer: Any, label: str, word: str, template: str) -> int:
    blank = " " if " {mask}" in template else ""
    ids: list[int] = []
    for written in (f"{blank}{word}", word):
        ids = list(tokenizer(written, add_special_tokens=False)["input_ids"])
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    parts = tokenizer.convert_ids_to_tokens(ids)
    what = "is unknown to the tokenizer" if tokenizer.unk_token_id in ids else f"is {len(ids)} tokens ({parts})"
    raise ConfigError(
        f"words: the word {word!r} of label {label!r} {what}, and a gap holds one. Choose another: --words "
        f"'{label}=WORD, ...'."
    )


def _gap(tokenizer: Any, kind: Kind) -> int:
    """The id that stands where the gap is; -1 in a decoder, whose gap is the end."""
    if kind == "decoder":
        return -1
    if kind == "encoder":
        found = tokenizer.mask_token_id
    else:
        found = tokenizer.get_vocab().get("<extra_id_0>")
    if found is None:
        raise ModelError("a template needs a tokenizer with a mask token, or with sentinels as T5 has; this has none.")
    return int(found)


def rendered(task: Task, texts: Sequence[str], tokenizer: Any, shown: Sequence[Sequence[str]] = ()) -> str:
    """The template filled with a row, with the token that stands for the gap.

    Args:
        texts: of the row, one or two.
        shown: texts of a row of each label, to stand beside it.
    """
    gap = "" if task.asks == "decoder" else str(tokenizer.convert_ids_to_tokens(task.gap))
    beside = " ".join(_filled(task, row, word).strip() for row, word in zip(shown, task.words, strict=False))
    soft = str(tokenizer.convert_ids_to_tokens(task.filler)) if task.n_soft else ""
    said = _filled(task, texts, gap, beside, soft)
    return said.rstrip() if task.asks == "decoder" else said


def _filled(task: Task, texts: Sequence[str], gap: str, shown: str = "", soft: str = "") -> str:
    fields = {"text": texts[0], "pair": texts[-1], "mask": gap, "shown": shown}
    # Without a blank before it: to some tokenizers that is a token of its own beside one that they know as a whole.
    template = SOFT.sub(lambda m: soft * int(m.group(1) or 1), task.template)
    return FIELD.sub(lambda m: fields[m.group(1)], template)
