"""A model that is asked: a finished run, its base, or a model as it is. It writes, and says how likely words are.

Prompts are conversations. A run reads them as its training did: by the template that is stored with it, or as plain
text where it learnt texts without turns. A model that is no run is asked by its own chat template, where it has one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core import ConfigError, DataError, build
from luthier.data.batches import cut
from luthier.data.chat import Chat, ChatTemplate, Message
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import Examples
from luthier.data.rows import Table
from luthier.data.stop_tokens import stop_ids
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_length, choose_pad, position_limit
from luthier.runs import RunFolder
from luthier.surgery import Tuned, tuning_files
from luthier.training.precision import choose_device, choose_precision
from luthier.training.sampling import Sampling
from luthier.workflow.generation import Generator
from luthier.workflow.load_model import find_model, load_config, load_model, load_tokenizer, tokenizer_digest
from luthier.workflow.prediction import Predictor

__all__ = ["Speaker", "is_run", "text_digest"]

_ROWS = 16  # prompts of one length that share a pass


def is_run(name: str) -> bool:
    """Whether a name is that of a run's folder, and not of a model."""
    return (Path(name) / "run.json").is_file()


class Speaker:
    """Asks one model. Inside `before_tuning()` a run answers as its base.

    Args:
        name: a finished run, a model folder, sample:NAME or a hub name.
        device, precision: of a model that is no run; a run answers where, and in what, it was trained.
        like: a model that is no run reads as this one does.

    Attributes:
        digest: of the run's tuning, or of the model: two speakers of one digest say the same.

    Raises:
        ConfigError: an unfinished run, or a model that writes no text.
        ModelError, IntegrityError, WrongBase: it cannot be loaded, or has changed.
    """

    def __init__(
        self, name: str, *, device: str = "auto", precision: str = "auto", like: Speaker | None = None
    ) -> None:
        self.name, self.device = name, choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.columns = Columns(shape="dialogue", messages="messages")
        self.template: ChatTemplate | None = None
        if is_run(name):
            self._of_run(Predictor(name))
        else:
            self._of_model(name)
            if like is not None and like.generator.both == self.generator.both:
                self.columns, self.template = like.columns, like.template
        self.how = {"dialogue": "the chat template", "plain": "plain text"}.get(self.columns.shape, "the encoder")
        template = self.template.digest if self.columns.shape == "dialogue" and self.template else ""
        self.reads = f"{self.how} {template[:12]}".strip()

    def _of_run(self, predictor: Predictor) -> None:
        if not predictor.task.writes:
            raise ConfigError(
                f"{predictor.path}: this run learnt {predictor.task.name} and writes no text, so it cannot be asked. "
                "Name a run that learnt causal_lm, seq2seq or preferences, or a model."
            )
        if predictor.columns.row_task is not None:
            raise ConfigError(f"{predictor.path}: each row of this run says its task, and a question does not.")
        self.tuned, self.tokenizer, self.generator = predictor.tuned, predictor.tokenizer, predictor.generator
        self.device, self.precision = predictor.device, predictor.precision
        self.max_length = int(predictor.contract["max_length"])
        self.digest = tuning_files.weights_digest(RunFolder.open(predictor.path, write=False).tuning)
        stored = predictor.contract["template"]
        self.template = None if stored is None else build(ChatTemplate, stored, "template")
        self.task = Task(name="seq2seq" if self.generator.both else "causal_lm")
        if self.generator.both:
            self.columns = Columns(shape="answered", prompt="prompt")
        elif stored is None:
            self.columns = Columns(shape="plain", text="text")

    def _of_model(self, name: str) -> None:
        source = find_model(name)
        config, self.tokenizer = load_config(source), load_tokenizer(source)
        self.task = Task(name="seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal_lm")
        self.digest = source.digest
        model, new = load_model(source, self.task, dtype=self.precision.dtype, device=self.device, seed=0)
        if new:
            raise ConfigError(f"{name}: has no head of words, so it writes no text. Name a model that does.")
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        pad = choose_pad(self.tokenizer, vocabulary)
        model.config.pad_token_id = pad.id
        self.tuned = Tuned(model)
        self.template = None
        if self.task.name == "seq2seq":
            self.columns = Columns(shape="answered", prompt="prompt")
        elif self.tokenizer.chat_template:
            self.template = ChatTemplate.of(self.tokenizer)
        else:
            self.columns = Columns(shape="plain", text="text")
        self.max_length = choose_length(None, self.tokenizer, config, self.task)
        self.generator = Generator(
            self.tuned, self.tokenizer, self.precision, self.device, pad_id=pad.id,
            stop=stop_ids(None, self.tokenizer, model), limit=position_limit(config), tokens=8192,
        )  # fmt: skip

    @contextmanager
    def before_tuning(self) -> Iterator[Speaker]:
        """The base of a run in the run's place, read alike; the tuning sleeps meanwhile."""
        with self.tuned.base_only():
            yield self

    @property
    def words_digest(self) -> str:
        """Of the tokenizer: speakers of one digest have the same tokens."""
        return tokenizer_digest(self.tokenizer)

    def encoded(self, asked: Sequence[Sequence[Message]]) -> Examples:
        """Conversations as examples that end where an answer begins.

        Raises:
            DataError: one cannot be read or is too long; all such are named.
        """
        texts = ["\n\n".join(str(m["content"]) for m in messages) for messages in asked]
        rows: list[dict[str, Any]] = [{"prompt": text, "text": text} for text in texts]
        if self.columns.shape == "dialogue":
            rows = [{"messages": list(messages)} for messages in asked]
        table = Table(rows, [f"question {i + 1}" for i in range(len(rows))], "the questions")
        examples = encode(
            table, self.columns, self.task, self.tokenizer, n_vocab=self._vocabulary(), max_length=self.max_length,
            with_targets=False, check=False, template=self.template,
        )  # fmt: skip
        bad = [row for row in examples.ledger if row["status"] == "refused"]
        if bad:
            raise DataError(
                f"{len(bad)} of {len(rows)} questions cannot be asked of {self.name}: {bad[0]['place']}: "
                f"{bad[0]['reason']}. Shorten the rows, or ask a model with more positions."
            )
        return examples

    def says(
        self, asked: Sequence[Sequence[Message]], *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[tuple[str, bool]]:
        """The text that is written after each conversation, and whether it came to an end of its own.

        Args:
            sampling: draw it, by a seed for each conversation; left out, the likeliest token each time.
        """
        with self.tuned.serving():
            found = self.generator.write(self.encoded(asked), max_new_tokens, sampling=sampling)
        return [(one.text, one.ended) for one in found]

    def loss_of(self, answered: Sequence[tuple[Sequence[Message], str]]) -> float:
        """The mean loss of the tokens of given answers, in nats; each conversation is read alone.

        Raises:
            ConfigError: an encoder-decoder.
            DataError: nothing to read.
        """
        if self.generator.both:
            raise ConfigError(f"{self.name}: the loss of given answers is measured of models that write on.")
        total, count = 0.0, 0
        for messages, answer in answered:
            ids, told = self._answered(messages, answer)
            places = [k for k in range(1, len(ids)) if told[k]]
            logs = self.next_chances(ids)[[k - 1 for k in places], [ids[k] for k in places]]
            total -= float(logs.double().sum())
            count += len(places)
        if not count:
            raise DataError(f"{self.name}: no answer has a token to be measured. Give answers, or shorter prompts.")
        return total / count

    def _answered(self, messages: Sequence[Message], answer: str) -> tuple[list[int], list[bool]]:
        """The ids of a conversation with an answer, and which of them are the answer's, with its end."""
        if self.columns.shape == "dialogue":
            with Chat(self.tokenizer, template=self.template) as chat:
                (read,) = chat.encode(chat.plan(0, [*messages, {"role": "assistant", "content": answer}], "an answer"))
            if isinstance(read, str):
                raise DataError(f"{self.name}: an answer cannot be read: {read}.")
            return read.ids[: self.max_length], read.loss[: self.max_length]
        ids = self.encoded([messages]).ids.tolist()
        more = [*self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]][: self.max_length - len(ids)]
        return [*ids, *more], [*[False] * len(ids), *[True] * len(more)]

    def chances(self, asked: Sequence[Sequence[Message]], words: Sequence[str]) -> NDArray[np.float64]:
        """How likely each of a few words is as the answer, among them: (conversations, words), rows sum to 1.

        Raises:
            ConfigError: the tokenizer writes two words alike, or one begins another: they could not be told apart.
        """
        ids = self._word_ids(words)
        examples = self.encoded(asked)
        found = np.zeros((len(asked), len(words)))
        logs = np.zeros_like(found)
        if all(len(one) == 1 for one in ids):
            logs = self._next(examples, [()])[:, 0][:, [one[0] for one in ids]]
        else:
            for k, one in enumerate(ids):
                heads = [tuple(one[:n]) for n in range(len(one))]
                steps = self._next(examples, heads)  # (conversations, tokens of the word, vocabulary)
                logs[:, k] = sum(steps[:, n, token] for n, token in enumerate(one))
        found[:] = np.exp(logs - logs.max(1, keepdims=True))
        return np.asarray(found / found.sum(1, keepdims=True))

    def next_chances(self, ids: Sequence[int]) -> Tensor:
        """Log-probabilities of every next token of a text that is read: (tokens, vocabulary), fp32 on the CPU."""
        with torch.inference_mode(), self.precision.autocast(self.device):
            given = torch.tensor([list(ids)], device=self.device)
            logits: Tensor = self.tuned.model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0]
        return logits.float().log_softmax(-1).cpu()

    def _word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word as an answer: after a turn's opening, or after a blank."""
        if self.columns.shape == "answered":
            ids = [list(self.tokenizer(text_target=w)["input_ids"]) for w in words]  # with the end of an answer
        else:
            lead = "" if self.columns.shape == "dialogue" else " "
            ids = [list(self.tokenizer(lead + w, add_special_tokens=False)["input_ids"]) for w in words]
        for k, one in enumerate(ids):
            for j, other in enumerate(ids):
                if j != k and (not one or other[: len(one)] == one):
                    raise ConfigError(
                        f"{self.name}: its tokenizer writes {words[k]!r} as the beginning of {words[j]!r}, so the two "
                        "answers cannot be told apart. Choose other words."
                    )
        return ids

    def _next(self, examples: Examples, heads: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
        """Log-probabilities of the token after each prompt and each head: (examples, heads, vocabulary).

        Prompts of one length share a pass, so that no padding has a part in any answer.
        """
        lengths = np.diff(examples.offsets)
        found: list[list[NDArray[np.float64]]] = [[] for _ in range(len(examples))]
        with ExitStack() as stack:
            for one in (torch.inference_mode(), self.precision.autocast(self.device), self.tuned.serving()):
                stack.enter_context(one)
            for head in heads:
                for length in np.unique(lengths):
                    for piece in cut(np.flatnonzero(lengths == length), lengths, self.generator.tokens, _ROWS):
                        logs = self._last(examples, piece, head)
                        for row, log in zip(piece.tolist(), logs, strict=True):
                            found[row].append(log)
        return np.asarray(found)

    def _last(self, examples: Examples, piece: NDArray[np.int64], head: tuple[int, ...]) -> NDArray[np.float64]:
        batch = self.generator.collator(examples, piece).to(self.device).inputs
        after = torch.tensor([head] * len(piece), dtype=torch.long, device=self.device).reshape(len(piece), -1)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.generator.both:
            start = int(self.tuned.model.config.decoder_start_token_id)
            begun = torch.cat([torch.full((len(piece), 1), start, device=self.device), after], 1)
            logits = self.tuned.model(input_ids=ids, attention_mask=mask, decoder_input_ids=begun).logits
        else:
            mask = torch.cat([mask, torch.ones_like(after)], 1)
            logits = self.tuned.model(input_ids=torch.cat([ids, after], 1), attention_mask=mask).logits
        return np.asarray(logits[:, -1].float().log_softmax(-1).double().cpu().numpy())

    def _vocabulary(self) -> int:
        return int(self.tuned.model.get_input_embeddings().weight.shape[0])


def text_digest(text: str) -> str:
    """SHA-256 of a text, by which two records say whether they asked the same."""
    return hashlib.sha256(text.encode()).hexdigest()
