"""A model behind an endpoint that speaks as OpenAI's chat completions do. It writes; it scores no options.

    POST URL/chat/completions   {"model": ..., "messages": [{"role": "user", "content": prompt}], "n": ..., ...}

The token is read from the environment (OPENAI_API_KEY) and goes to this host alone: no redirect is followed, and it is
sent over TLS or to this machine. What fails for a while (no answer in time, 429, 5xx, an answer that is no JSON) is
tried again, with waits that double; then the error says what was asked and what came.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from luthier.asking.machine import Cost, tokens_of
from luthier.asking.requests import Score, Scored, Text, Write
from luthier.core import ConfigError, ModelError

__all__ = ["KEY", "Endpoint"]

KEY = "OPENAI_API_KEY"
TRIES = 5
LONGEST_WAIT = 30.0  # seconds, whatever the server asks for
ANSWER_BYTES = 16_000_000
HERE = ("127.0.0.1", "localhost", "::1")


class Endpoint:
    """See the top of this file.

    Args:
        name: of the model, as the endpoint calls it.
        url: up to and with its version, such as http://127.0.0.1:8000/v1.
        timeout: seconds for one answer.
        side_by_side: requests at a time.
        wait: sleeps so many seconds.

    Raises:
        ConfigError: no such URL, or a token that would go over the network in the clear.
    """

    scores, writes, limit = False, True, None
    reads = said = ""  # the endpoint lays out the turn
    wave = 8

    def __init__(
        self, name: str, url: str, *, timeout: float = 60.0, side_by_side: int = 4,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--endpoint {url!r}: is no URL. Write one such as http://127.0.0.1:8000/v1.")
        self.key = os.environ.get(KEY, "")
        if self.key and parts.scheme == "http" and parts.hostname not in HERE:
            raise ConfigError(
                f"--endpoint {url}: {KEY} would be sent over the network in the clear. Use https, or unset {KEY}."
            )
        self.name, self.url, self._parts = f"openai:{name}", url.rstrip("/"), parts
        self.model, self.timeout, self.side_by_side, self.wait = name, timeout, side_by_side, wait
        self.cost = Cost()

    def count(self, text: str) -> int:
        """About; the endpoint's own count stands in the cost."""
        return tokens_of(text)

    def size(self, text: str) -> int:
        return self.count(text)

    def forget(self) -> None:
        """Nothing is kept here."""

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        raise ConfigError(f"{self.name} scores no options: chat completions give no log-probabilities of given texts.")

    def write(self, requests: Sequence[Write], names: Sequence[tuple[int, ...]]) -> list[tuple[Text, ...]]:
        """Texts after each prompt, several requests at a time.

        Raises:
            ModelError: the endpoint refuses, or did not answer in all tries.
        """
        begun = time.monotonic()
        with ThreadPoolExecutor(max_workers=self.side_by_side) as pool:
            found = list(pool.map(self._one, requests, names))
        self.cost.requests += len(requests)
        self.cost.seconds += time.monotonic() - begun
        for _, read, written in found:
            self.cost.read += read
            self.cost.computed += read
            self.cost.written += written
        return [texts for texts, _, _ in found]

    def _one(self, request: Write, names: tuple[int, ...]) -> tuple[tuple[Text, ...], int, int]:
        """All texts of one request, and tokens read and written. Some servers give one text, whatever n is."""
        texts: list[Text] = []
        read = written = 0
        while len(texts) < request.n:
            body: dict[str, Any] = {
                "model": self.model, "messages": [{"role": "user", "content": request.prompt}],
                "max_tokens": request.max_tokens, "temperature": request.temperature, "n": request.n - len(texts),
                "seed": names[len(texts)] % 2**31,
            }  # fmt: skip
            if request.stop:
                body["stop"] = list(request.stop[:4])
            usage, new = self._asked(body)
            read += usage.get("prompt_tokens") or self.count(request.prompt)
            written += usage.get("completion_tokens") or sum(self.count(text.text) for text in new)
            texts += [_cut(text, request.stop) for text in new]
        return tuple(texts[: request.n]), read, written

    def _asked(self, body: dict[str, Any]) -> tuple[dict[str, int], list[Text]]:
        """What one answer says of its tokens, and its texts; in as many tries as are allowed."""
        why = ""
        for number in range(TRIES):
            pause = min(0.5 * 2**number, LONGEST_WAIT)
            try:
                status, asked_for, content = self._post(json.dumps(body).encode())
            except (OSError, http.client.HTTPException) as error:
                why = f"no answer ({type(error).__name__}: {error})"
            else:
                if status == 200:
                    try:
                        return _texts(content)
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        why = f"an answer that is no chat completion: {content[:80]!r}"
                elif status == 429 or status >= 500:
                    why = f"status {status}: {content[:120]!r}"
                    pause = min(max(pause, asked_for), LONGEST_WAIT)
                else:
                    raise ModelError(f"{self.url}: refuses with status {status}: {content[:300]!r}.{_advice(status)}")
            if number + 1 < TRIES:
                self.wait(pause)
        raise ModelError(f"{self.url}: {why}, in {TRIES} tries. Is it running, and is the model called {self.model!r}?")

    def _post(self, body: bytes) -> tuple[int, float, bytes]:
        """Status, seconds that the server asks to wait, and what it says."""
        host, port = str(self._parts.hostname), self._parts.port
        if self._parts.scheme == "https":
            line: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self.timeout, context=ssl.create_default_context()
            )
        else:
            line = http.client.HTTPConnection(host, port, timeout=self.timeout)
        head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            line.request("POST", f"{self._parts.path.rstrip('/')}/chat/completions", body, head)
            answer = line.getresponse()
            content = answer.read(ANSWER_BYTES + 1)
            if len(content) > ANSWER_BYTES:
                raise http.client.HTTPException(f"an answer of more than {ANSWER_BYTES} bytes")
            told = answer.headers.get("Retry-After", "0")
            return answer.status, float(told) if told.replace(".", "", 1).isdigit() else 0.0, content
        finally:
            line.close()


def _texts(content: bytes) -> tuple[dict[str, int], list[Text]]:
    """What an answer says of its tokens, and its texts. Halves of characters, which no file takes, are question marks.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is none.
    """
    answer = json.loads(content)
    found = [
        Text(
            text=str(one["message"]["content"] or "").encode(errors="replace").decode(),
            ended=one.get("finish_reason") == "stop",
        )
        for one in answer["choices"]
    ]
    if not found:
        raise ValueError("no choices")
    usage = answer.get("usage")
    return {k: v for k, v in usage.items() if isinstance(v, int)} if isinstance(usage, dict) else {}, found


def _cut(text: Text, stop: Sequence[str]) -> Text:
    """A text up to the first stop word: an endpoint takes four of them at most."""
    cuts = [at for word in stop if (at := text.text.find(word)) >= 0]
    return Text(text=text.text[: min(cuts)], ended=True) if cuts else text


def _advice(status: int) -> str:
    if status in (401, 403):
        return f" Set the token in the environment: {KEY}."
    if status == 404:
        return " Is the URL right up to its version (…/v1), and the model's name?"
    return " No redirect is followed." if 300 <= status < 400 else ""
