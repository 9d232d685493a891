"""Chat rows: one template object for training, prediction and export, and a loss mask that is checked.

The mask covers what the assistant must write, with the token that ends its turn, and nothing else. It is found by
rendering: `P` is the conversation before a turn with the opening of an assistant's turn, `Q` the conversation up to
and with the turn. Where Q begins with P and the whole begins with Q, the turn is what Q adds to P. A template that
writes a turn differently once another follows (some drop the thoughts of earlier turns) breaks the second condition;
then each assistant turn becomes an example of its own, rendered as it would be when it is generated.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from luthier.core import DataError, ModelError
from luthier.trust.template import Rendered, Renderer

__all__ = ["DEFAULT_TEMPLATE", "ROLES", "Chat", "ChatTemplate", "Tokens", "read_messages", "read_tools"]

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Role tags of the OpenAI and ShareGPT layouts -> the names that templates know."""

LEARNT_ROWS = 50
"""Rows whose every turn is rendered by itself before the shape of the template is relied on."""

DEFAULT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '### Assistant:\\n' + message.content + eos_token + '\\n' }}
{%- else %}
{{- '### ' + message.role.capitalize() + ':\\n' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Assistant:\\n' }}
{%- endif %}"""
"""For a tokenizer without a template: a heading for each turn, and the end token after what the assistant says."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The template of a tuning, stored with it: training, prediction and export render with this one."""

    text: str = field(repr=False)
    special_tokens: dict[str, str]
    origin: str

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatTemplate":
        """The tokenizer's own template, or the default one where it has none.

        Raises:
            ModelError: the tokenizer has no end token, so a model could not learn to stop; or several templates, none
                of them called "default".
        """
        special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if not isinstance(v, list | tuple)}
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer has no end token (its special tokens: {special or 'none'}), so a model could not learn"
                " to stop. Set eos_token in its tokenizer_config.json."
            )
        own = tokenizer.chat_template
        if isinstance(own, dict):
            if "default" not in own:
                raise ModelError(
                    f"the tokenizer has the chat templates {', '.join(own)}, none of them called 'default'."
                    " Keep one in its tokenizer_config.json."
                )
            own = own["default"]
        if own:
            return cls(text=own, special_tokens=_mentioned(own, special), origin="the tokenizer's own")
        text = ("{{- bos_token }}\n" if _adds_bos(tokenizer) else "") + DEFAULT_TEMPLATE
        origin = "luthier's default: the tokenizer has none"
        return cls(text=text, special_tokens=_mentioned(text, special), origin=origin)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the text and the special tokens it reads."""
        return hashlib.sha256(json.dumps([self.text, self.special_tokens], sort_keys=True).encode()).hexdigest()


def _mentioned(template: str, special: dict[str, str]) -> dict[str, str]:
    """Only what the template reads: another padding token, say, must not look like another template."""
    return {name: token for name, token in special.items() if name in template}


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def read_messages(value: Any, column: str) -> list[Message]:
    """One conversation in the layout that templates know: a list of `{"role", "content", ...}`.

    OpenAI layout (role, content) or ShareGPT layout (from, value), as a list or as the JSON of one.

    Raises:
        DataError: no list, a message without role or content, an unknown role, or content that is no text; says which
            message.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"field {column!r} is text, but no JSON list of messages: {value[:60]!r}") from error
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"field {column!r} is {str(value)[:60]!r}; it must be a list of messages")
    return [_message(item, f"field {column!r}, message {number}") for number, item in enumerate(value, 1)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where} is {str(item)[:60]!r}; it must have role and content")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if role_key not in item:
        raise DataError(f"{where} has no role; its fields are {', '.join(map(str, item))}")
    role = item[role_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known roles are {', '.join(ROLES)}")
    content = item.get(content_key)
    # Parquet gives every row the keys of all: what is empty there was not written.
    rest = {k: v for k, v in item.items() if k not in (role_key, content_key) and v is not None}
    calls = [without_nothing(call) for call in rest.pop("tool_calls", None) or ()]
    if role.lower() == "function_call":
        calls, content = _calls_of(content, where), None
    if calls:
        rest["tool_calls"] = calls
    if "weight" in rest and rest["weight"] not in (0, 1):
        raise DataError(f"{where} has the weight {rest['weight']!r}; it must be 0 (no loss) or 1")
    if isinstance(content, list):
        parts = [
            p for p in content if isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        ]
        if len(parts) < len(content):
            raise DataError(f"{where} has parts that are no text; only text can be learnt")
        content = "".join(p["text"] for p in parts)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where} has the {content_key} {content!r}; it must be text")
    return {"role": ROLES[role.lower()], "content": content, **rest}


def without_nothing(value: Any) -> Any:
    """The value without keys that hold nothing, at any depth."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None}
    return [without_nothing(v) for v in value] if isinstance(value, list | tuple) else value


def _calls_of(content: Any, where: str) -> list[Any]:
    """The calls of a ShareGPT turn, whose value is the JSON of one call or of several."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise DataError(f"{where} is a function call, but no JSON: {str(content)[:60]!r}") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError(f"{where} is a function call without a name: {str(content)[:60]!r}")
    return [{"type": "function", "function": without_nothing(call)} for call in calls]


def read_tools(value: Any, column: str) -> list[Any] | None:
    """The functions that a row offers: a list, or the JSON of one; None where the row has none.

    Raises:
        DataError: it is neither.
    """
    if value is None or value == "" or value == []:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, list | tuple):
        raise DataError(f"field {column!r} is {str(value)[:60]!r}; it must be a list of functions, or the JSON of one")
    return list(without_nothing(list(found))) or None


@dataclass(frozen=True)
class Tokens:
    """One encoded example: ids, and for each of them whether it carries loss."""

    ids: list[int]
    loss: list[bool]


@dataclass(frozen=True)
class _Plan:
    """Rendered text and the characters of it that carry loss: (first, past-last), ascending, apart from one another."""

    row: int
    text: str
    spans: list[tuple[int, int]]


class Chat:
    """Renders and encodes conversations. Use it in a `with` block: the template runs in a child process.

    Args:
        tokenizer: of transformers, of the model.
        loss_on: "response" for the assistant's turns, "all" for every token.
        template: in place of the tokenizer's, such as the one a tuning was stored with.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "response", template: ChatTemplate | None = None) -> None:
        self.template = template or ChatTemplate.of(tokenizer)
        self._tokenizer = tokenizer
        self._all = loss_on == "all"
        self._renderer = Renderer(self.template.text, self.template.special_tokens)
        self._marks = self._renderer.facts().marks_generation
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if getattr(t, "special", False)]
        self._ends = tuple(t for t in {*map(str, tokenizer.all_special_tokens), *added} if t)
        self._counts: Counter[str] = Counter()
        self._shape: tuple[str, str, str] | None = None
        self._regular, self._learnt = True, 0
        self._tools: list[Any] | None = None  # of the row at hand
        self._reads_tools = "tools" in self._renderer.facts().variables
        self._arguments: str | None = None  # "object" or "text", once a call was met
        self._unread: Counter[str] = Counter()

    def __enter__(self) -> "Chat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._renderer.close()

    def notes(self) -> list[str]:
        """What was met on the way, in sentences, for the log."""
        sentences = {
            "turnwise": "rows are rendered turn by turn, since the template writes earlier turns differently",
            "end added": "rows ended without an end token; it was added, and carries loss",
            "no end": "turns inside rows have no end token in this template",
            "system": "rows have a system message that the template leaves out",
            "forged": "messages hold the text of a special token, which the tokenizer reads as that token",
            "joined": "rows are encoded piece by piece, since a token would join prompt and response",
            "weight": "turns have the weight 0 and carry no loss",
            "tools": "rows offer tools that this template does not read: calls are learnt of functions not shown",
            "calls": "turns call tools that this template leaves out: the calls are not learnt",
            "thoughts": "thoughts are left out by this template: they are not learnt",
        }
        found = [f"chat template: {self._counts[k]} {text}" for k, text in sentences.items() if self._counts[k]]
        for name, count in self._unread.items():
            found.append(f"chat template: {count} messages have the field {name!r}, which this template does not read")
        return found

    def prompt(self, messages: Sequence[Message], where: str = "", tools: list[Any] | None = None) -> list[int]:
        """The ids that generation starts from: the conversation and the opening of the assistant's turn."""
        self._tools = tools
        messages = self._with_arguments(messages)
        return self._ids([self._render(messages, add_generation_prompt=True, where=where).text])[0]

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, where: str = "") -> Rendered:
        given = {} if self._tools is None else {"tools": self._tools}
        return self._renderer.render(
            messages, add_generation_prompt=add_generation_prompt, must_keep=False, where=where, **given
        )

    def _with_arguments(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, their calls' arguments as the template writes them without escaping: object or text."""
        return [m if "tool_calls" not in m else {**m, "tool_calls": self._calls(m["tool_calls"])} for m in messages]

    def _calls(self, calls: Sequence[Any]) -> list[Any]:
        if self._arguments is None:
            self._arguments = next((form for form in ("object", "text") if self._writes_plainly(form)), "as given")
        found = []
        for call in calls:
            inner = call.get("function", call) if isinstance(call, dict) else {}
            given = inner.get("arguments")
            if self._arguments == "object" and isinstance(given, str):
                try:
                    given = json.loads(given)
                except ValueError as error:
                    raise DataError(f"the arguments {given[:60]!r} of a tool call are no JSON") from error
            elif self._arguments == "text" and isinstance(given, dict | list):
                given = json.dumps(given, ensure_ascii=False)
            if given is not inner.get("arguments"):
                inner = {**inner, "arguments": given}
                call = {**call, "function": inner} if "function" in call else inner
            found.append(call)
        return found

    def _writes_plainly(self, form: str) -> bool:
        """Whether the template writes arguments of this form as JSON: not quoted again, not as Python does."""
        arguments: Any = {"key": "value"} if form == "object" else '{"key": "value"}'
        call = {"id": "call00001", "type": "function", "function": {"name": "name", "arguments": arguments}}
        turns: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            text = self._renderer.render(turns, must_keep=False).text
        except DataError:
            return False
        return re.search(r'(?<!")\{\s*"key"\s*:\s*"value"\s*\}(?!")', text) is not None

    def plan(self, row: int, messages: Sequence[Message], place: str, tools: list[Any] | None = None) -> list[_Plan]:
        """Render one conversation and find what carries loss.

        Raises:
            DataError: no assistant turn, an empty one, or a template that fails on the row or drops a turn; the
                rendered text is quoted.
        """
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise DataError("no message is the assistant's, so there is nothing to learn")
        learnt = [messages[k].get("weight", 1) != 0 for k in turns]
        if not any(learnt):
            raise DataError("every turn of the assistant has the weight 0, so there is nothing to learn")
        self._tools = tools
        messages = self._with_arguments(messages)
        self._counts["weight"] += learnt.count(False)
        self._counts["tools"] += tools is not None and not self._reads_tools
        for k in turns:
            if not messages[k]["content"].strip() and not messages[k].get("tool_calls"):
                raise DataError(f"message {k + 1}, of the assistant, is empty")
        self._counts["forged"] += sum(any(end in m["content"] for end in self._ends) for m in messages)
        whole = self._render(messages, where=place)
        text = whole.text
        self._count_unread(messages, text)
        # Without its call such a turn is nothing: to learn it would be to learn to say nothing.
        learnt = [
            wanted and bool(messages[k]["content"].strip() or _calls_in(messages[k], text))
            for k, wanted in zip(turns, learnt, strict=True)
        ]
        if not any(learnt):
            raise DataError("the assistant does nothing but call tools, and the template leaves calls out")
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
            self._counts["system"] += 1
        if self._all and not all(messages[k].get("weight", 1) for k in turns):
            raise DataError("a turn has the weight 0, which loss_on = all cannot heed; use loss_on = response")
        if self._all:
            plan = _Plan(row, text, [(0, len(text))])
            return [plan if text.rstrip().endswith(self._ends) else self._with_end(plan)]
        if self._marks:
            spans = [s for s in whole.spans if s[1] > s[0]]
            if len(spans) != len(turns):
                raise DataError(
                    f"the template marks {len(spans)} of {len(turns)} assistant turns; it renders {text[:400]!r}"
                )
            plans = [_Plan(row, text, list(spans))]
            contents = [spans]
        else:
            plans = self._by_rendering(row, messages, turns, text, place)
            contents = [p.spans for p in plans]
        found = [p.text[a:b] for p, spans in zip(plans, contents, strict=True) for a, b in spans]
        for k, said in zip(turns, found, strict=True):
            answer = messages[k]["content"].rsplit("</think>", 1)[-1].strip()
            if answer not in said:
                raise DataError(
                    f"the template drops or changes the assistant's turn {answer[:80]!r}; it renders {text[:400]!r}"
                )
        return [self._with_end(p) for p in _weighted(plans, learnt)]

    def _count_unread(self, messages: Sequence[Message], text: str) -> None:
        """Note what messages say and this template does not: fields, thoughts, calls."""
        for message in messages:
            for name in message.keys() - {"role", "content", "weight", "tool_calls"}:
                if name not in self.template.text:
                    self._unread[name] += 1
            if message["role"] != "assistant":
                continue
            thought = message.get("reasoning_content") or ""
            if "</think>" in message["content"]:
                thought = message["content"].rsplit("</think>", 1)[0].replace("<think>", "")
            self._counts["thoughts"] += bool(str(thought).strip()) and str(thought).strip() not in text
            self._counts["calls"] += bool(message.get("tool_calls")) and not _calls_in(message, text)

    def _by_rendering(
        self, row: int, messages: Sequence[Message], turns: Sequence[int], text: str, place: str
    ) -> list[_Plan]:
        if self._regular and self._learnt >= LEARNT_ROWS:
            found = self._by_shape(messages, turns, text)
            if found is not None:
                return [_Plan(row, text, found)]
        spans: list[tuple[int, int]] = []
        upto: list[str] = []
        for k in turns:
            before = self._render(messages[:k], add_generation_prompt=True, where=place).text
            after = self._render(messages[: k + 1], where=place).text
            if not after.startswith(before):
                raise DataError(
                    "the template does not continue its own generation prompt: with the prompt it renders"
                    f" {before[-200:]!r}, with the assistant's turn {after[:400]!r}"
                )
            spans.append((len(before), len(after)))
            upto.append(after)
        apart = all(b <= a for (_, b), (a, _) in itertools.pairwise(spans))
        if apart and all(text.startswith(after) for after in upto):
            self._learn(messages, turns[-1], text, spans)
            return [_Plan(row, text, spans)]
        self._regular = False
        self._counts["turnwise"] += 1
        return [_Plan(row, after, [span]) for after, span in zip(upto, spans, strict=True)]

    def _learn(self, messages: Sequence[Message], k: int, text: str, spans: list[tuple[int, int]]) -> None:
        """Remember how this template opens and closes an assistant's turn; stop relying on it if rows disagree.

        Rendering a conversation twice for each turn takes a time that grows with the square of its length. The first
        rows are rendered so; where all of them have one shape, later rows are searched for that shape in one rendering,
        and are rendered in full where they do not have it.
        """
        self._learnt += 1
        said = text[slice(*spans[-1])]
        content = messages[k]["content"]
        if self._shape is None and content.strip() and said.count(content.strip()) == 1:
            bare = self._render(messages[:k]).text
            opening = text[len(bare) : spans[-1][0]] if text.startswith(bare) else ""
            before, after = said.split(content.strip())
            self._shape = (opening, before, after)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self._shape is not None and self._by_shape(messages, turns, text) not in (None, spans):
            self._regular = False

    def _by_shape(self, messages: Sequence[Message], turns: Sequence[int], text: str) -> list[tuple[int, int]] | None:
        """The assistant's turns by the learnt shape, or `None` where the text does not have it without doubt."""
        if self._shape is None:
            return None
        opening, before, after = self._shape
        spans: list[tuple[int, int]] = []
        at = previous = 0
        for k in turns:
            for message in messages[previous:k]:
                said = message["content"].strip()
                if (place := text.find(said, at)) < 0:
                    return None
                at = place + len(said)
            whole = opening + before + messages[k]["content"].strip() + after
            place = text.find(whole, at)
            if place < 0 or (opening and text.find(opening, at) != place):
                return None
            spans.append((place + len(opening), place + len(whole)))
            at, previous = place + len(whole), k + 1
        return spans

    def _with_end(self, plan: _Plan) -> _Plan:
        """Let each span stop behind its end token: a line break that follows is the template's."""
        spans = []
        for number, (a, b) in enumerate(plan.spans):
            said = plan.text[a:b].rstrip()
            last = number == len(plan.spans) - 1
            if said.endswith(self._ends):
                spans.append((a, a + len(said)))
            elif last and not plan.text[b:].strip():
                self._counts["end added"] += 1
                text = plan.text[: a + len(said)] + self._tokenizer.eos_token
                return _Plan(plan.row, text, [*spans, (a, len(text))])
            else:
                self._counts["no end"] += 1
                spans.append((a, b))
        return _Plan(plan.row, plan.text, spans)

    def encode(self, plans: Sequence[_Plan]) -> list[Tokens | str]:
        """Encode rendered rows together; a row that cannot be encoded faithfully gives the reason instead."""
        if not plans:
            return []
        pieces = [_cut(p.text, p.spans) for p in plans]
        flat = self._ids([text for parts in pieces for text, _ in parts])
        options = {"return_offsets_mapping": True} if self._tokenizer.is_fast else {}
        whole = self._tokenize([p.text for p in plans], **options)
        results: list[Tokens | str] = []
        start = 0
        for i, parts in enumerate(pieces):
            mine = flat[start : start + len(parts)]
            start += len(parts)
            ids: list[int] = list(whole["input_ids"][i])
            joined = [t for piece in mine for t in piece]
            loss = [has_loss for piece, (_, has_loss) in zip(mine, parts, strict=True) for _ in piece]
            if joined != ids:
                # Sentence-piece tokenizers put a blank before each piece: then the whole is right, if no token of it
                # reaches over an edge and each prompt alone has the same tokens.
                by_offsets = self._by_offsets(plans[i], ids, whole["offset_mapping"][i]) if options else None
                if by_offsets is not None:
                    joined, loss = ids, by_offsets
                elif self._decode(joined) == self._decode(ids):
                    self._counts["joined"] += 1
                else:
                    results.append(
                        "its turns cannot be told apart as tokens: prompt and response together are encoded otherwise"
                        f" than one after the other; rendered {plans[i].text[:200]!r}"
                    )
                    continue
            bos = self._tokenizer.bos_token_id
            if bos is not None and bos != self._tokenizer.eos_token_id and joined[:2] == [bos, bos]:
                results.append(f"begins with {self._tokenizer.bos_token!r} twice; rendered {plans[i].text[:80]!r}")
                continue
            results.append(Tokens(joined, loss))
        return results

    def _by_offsets(self, plan: _Plan, ids: list[int], offsets: Sequence[tuple[int, int]]) -> list[bool] | None:
        edges = {edge for span in plan.spans for edge in span}
        if any(a < edge < b for a, b in offsets for edge in edges):
            return None
        for first, _ in plan.spans:
            prompt = self._ids([plan.text[:first]])[0]
            if ids[: len(prompt)] != prompt:
                return None
        return [any(a >= first and b <= last and b > a for first, last in plan.spans) for a, b in offsets]

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        # The template writes the special tokens itself; the tokenizer must not add them again.
        return self._tokenizer(texts, add_special_tokens=False, padding=False, verbose=False, **options)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self._tokenize(texts)["input_ids"]] if texts else []

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _calls_in(message: Message, text: str) -> bool:
    """Whether a turn calls tools, and the text names them."""
    names = [call.get("function", call).get("name", "") for call in message.get("tool_calls", ())]
    return bool(names) and all(str(name) in text for name in names)


def _weighted(plans: list[_Plan], learnt: Sequence[bool]) -> list[_Plan]:
    """The plans without the turns that carry no loss: several turns of one text, or a text for each turn."""
    if all(learnt):
        return plans
    if len(plans) == 1:
        kept = [span for span, wanted in zip(plans[0].spans, learnt, strict=True) if wanted]
        return [_Plan(plans[0].row, plans[0].text, kept)]
    return [plan for plan, wanted in zip(plans, learnt, strict=True) if wanted]


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text in pieces, each wholly inside or outside a span."""
    pieces, at = [], 0
    for first, last in spans:
        pieces += [(text[at:first], False), (text[first:last], True)]
        at = last
    pieces.append((text[at:], False))
    return [(piece, has_loss) for piece, has_loss in pieces if piece]
