"""What others count among the strategies, and here is a part of every run: found by its name too."""

from dataclasses import dataclass

__all__ = ["PARTS_OF_RUNS", "PartOfRuns"]


@dataclass(frozen=True, kw_only=True)
class PartOfRuns:
    """One of them.

    Attributes:
        paper: where it comes from, or what it follows.
        page: as the page of a strategy: the first sentence says what it is.
        example: the rest of a command behind `luthier`.
    """

    paper: str
    page: str
    example: str


PARTS_OF_RUNS: dict[str, PartOfRuns] = {
    "packing": PartOfRuns(
        paper="arXiv:2404.10830",
        page="""\
Several short rows stand in one line, in place of padding: --pack.

    rows of 9, 5, 4, 3 tokens   ->   lines of 9:   [9]   [5 4]   [3 . . . . . .]

Best fit, longest row first, in lines as wide as the longest row of the step. Positions begin anew with each row, and
attention is block-diagonal: each row sees itself alone. A step stays the rows that it was, so the gradient is that of
the padded step, to rounding. No row is cut for it.

For language models that read from left to right. Whether a model and a method keep the rows of a line apart is tried on
a tiny batch before anything is written, by the logits themselves: recurrent layers, prompt vectors before the text, and
models that make their mask without positions are refused, with what was found. So are strategies that look at single
rows.

Cost: what padding was, is saved; attention looks at the whole line.
Claims: less padding; with rows of like length in one step, which is the default, little is left to save. A run says the
share of padding with it, and without it where it would pay.
Pitfalls: dropout draws other noise, as with any other cut of a step.""",
        example="train sample:smollm2-135m --data chats.jsonl --no-group-by-length --pack",
    ),
    "chat_format": PartOfRuns(
        paper="the chat templates of transformers",
        page="""\
One template lays out conversations in training, in answering and in what is exported: of itself, with rows of chats.

It is the tokenizer's own, and is kept with the run; a default one where there is none. What the assistant says and the
token that ends its turn carry loss, and nothing else. They are found by rendering each conversation up to a turn and
beyond it; a template that writes earlier turns differently has each turn rendered by itself. A row whose turn a
template drops or changes is refused, never learnt in full. What a template leaves out of the rest is said: what the
system says, tools, calls, thoughts. Turns with "weight": 0 carry no loss.

Templates run in a jail, with bounds on time and on what they write.

Cost: none.
Pitfalls: rows with a text that reads as a special token; they are counted.""",
        example="look sample:smollm2-135m --data chats.jsonl",
    ),
}
