"""A model behind an endpoint, played by a server on this machine; and what goes wrong there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from asking.stub import query, shown
from cli.conftest import Answer

from luthier.asking import WAYS
from luthier.asking.ask import desk_of
from luthier.asking.desk import OPEN
from luthier.asking.endpoint import KEY, TRIES, Endpoint
from luthier.asking.engine import put
from luthier.asking.requests import Write
from luthier.core import ConfigError, ModelError


class Played(HTTPServer):
    """Answers by its script: a status with a body, "sleep", or "" for a good answer. After the script all are good."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Played

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body | {"path": self.path})
            self.server.heads.append(dict(self.headers))
            step = self.server.script.pop(0) if self.server.script else None
        if step == "hang up":
            self.connection.close()
            return
        status, content, head = step or (200, json.dumps(good(body)), {})
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args: Any) -> None:
        pass


def good(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["messages"][0]["content"]
    text = f" {len(prompt)}\nmore" if "Question" not in prompt else " So the answer is 7."
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 3}}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    monkeypatch.delenv(KEY, raising=False)
    server = Played()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def machine(played: Played, **more: Any) -> tuple[Endpoint, list[float]]:
    waits: list[float] = []
    return Endpoint("some-model", played.url, wait=waits.append, **more), waits


def test_texts_are_asked_for_cut_and_counted(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret-token")
    on, _ = machine(played)
    [one, three] = on.write(
        [Write(prompt="abcd", stop=("\n",)), Write(prompt="xy", n=3, temperature=0.5)], [(2**40,), (1, 2, 3)]
    )
    assert [t.text for t in one] == [" 4"] and [t.text for t in three] == [" 2\nmore"] * 3, (
        "it gives one text, whatever n is"
    )
    assert played.seen[0]["path"] == "/v1/chat/completions" and {s["model"] for s in played.seen} == {"some-model"}
    assert all(head["Authorization"] == "Bearer secret-token" for head in played.heads)
    assert (on.cost.requests, on.cost.read, on.cost.written) == (2, 44, 12)


FAULTS = [
    ((429, "slow down", {"Retry-After": "7"}), "429", 7.0),
    ((503, "later", {}), "503", 0.5),
    ((200, "no json", {}), "no chat completion", 0.5),
    ((200, '{"choices": []}', {}), "no chat completion", 0.5),
    ((200, "[]", {}), "no chat completion", 0.5),
    ((200, "[" * 100_000, {}), "no chat completion", 0.5),
    ("hang up", "no answer", 0.5),
]


@pytest.mark.parametrize(("fault", "word", "wait"), FAULTS, ids=[f[1] + str(n) for n, f in enumerate(FAULTS)])
def test_what_fails_for_a_while_is_tried_again_and_then_is_an_error(
    played: Played, fault: Any, word: str, wait: float
) -> None:
    on, waits = machine(played)
    played.script = [fault] * 2
    assert on.write([Write(prompt="abcd")], [(0,)])[0][0].text.startswith(" 4")
    assert len(waits) == 2 and waits[0] == wait
    played.script = [fault] * TRIES
    with pytest.raises(
        ModelError, match=rf"{word}.* in {TRIES} tries. Is it running, and is the model called 'some-model'"
    ):
        on.write([Write(prompt="abcd")], [(0,)])
    assert len(waits) == 2 + TRIES - 1


@pytest.mark.parametrize(
    ("status", "advice"), [(401, KEY), (404, "up to its version"), (302, "No redirect is followed"), (400, "400")]
)
def test_what_is_refused_is_not_tried_again(played: Played, status: int, advice: str) -> None:
    on, waits = machine(played)
    played.script = [(status, "no", {"Location": "http://127.0.0.1:1/"})]
    with pytest.raises(ModelError, match=f"refuses with status {status}.*{advice}|{advice}"):
        on.write([Write(prompt="x")], [(0,)])
    assert not waits and len(played.seen) == 1


def test_an_endpoint_that_is_down_or_wrongly_named_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    on = Endpoint("m", "http://127.0.0.1:9/v1", wait=lambda seconds: None, timeout=1)
    with pytest.raises(ModelError, match="no answer"):
        on.write([Write(prompt="x")], [(0,)])
    with pytest.raises(ConfigError, match="is no URL"):
        Endpoint("m", "localhost:8000")
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(ConfigError, match="in the clear"):
        Endpoint("m", "http://example.org/v1")


def test_ways_that_score_are_refused_before_anything_is_sent(played: Played) -> None:
    from luthier.asking.ask import refuse_ways

    on, _ = machine(played)
    for name in ("contextual_calibration", "pmi_dc"):
        with pytest.raises(ConfigError, match="gives no log-probabilities"):
            refuse_ways({name: WAYS.get(name)()}, on, labelled=True)
    with pytest.raises(ConfigError, match="icl scores labels"):
        refuse_ways({"icl": WAYS.get("icl")()}, on, labelled=True)
    refuse_ways({"icl": WAYS.get("icl")()}, on, labelled=False)
    assert not played.seen


def test_waves_that_were_answered_are_kept_where_a_later_one_fails(played: Played) -> None:
    on, _ = machine(played, side_by_side=1)
    played.script = [None] * 8 + [(500, "gone", {})] * TRIES
    pool = (shown("a", "7"),)
    desk = desk_of(pool, words={}, template=OPEN, machine=on)
    kept: list[Any] = []
    with pytest.raises(ModelError, match="500"):
        put(WAYS.get("cot")(), [query(f"{n} and 1", n) for n in range(12)], desk, on, kept.extend)
    assert [one.answer.said for one in kept] == ["7"] * 8


def test_what_no_file_takes_and_counts_that_are_none_do_no_harm(played: Played) -> None:
    on, _ = machine(played)
    choice = {"message": {"content": "half \ud800 of it"}}
    played.script = [(200, json.dumps({"choices": [choice], "usage": usage}), {}) for usage in ([1], {"total": "x"})]
    for n in range(2):
        [[text]] = on.write([Write(prompt=f"ask {n}")], [(0,)])
        assert text.text == "half ? of it" and text.text.encode()
    assert on.cost.read == 4 and on.cost.written == 6, "counted here, as nobody else did"


def test_rows_that_were_answered_are_kept_where_another_of_their_wave_fails(played: Played) -> None:
    on, _ = machine(played, side_by_side=1)
    plain = {"choices": [{"message": {"content": " I think."}}]}
    played.script = [None, None, (200, json.dumps(plain), {})] + [(500, "gone", {})] * TRIES
    desk = desk_of((shown("a", "7"),), words={}, template=OPEN, machine=on)
    kept: list[Any] = []
    with pytest.raises(ModelError, match="500"):  # of the third row, which is asked again for its answer
        put(WAYS.get("cot")(), [query(f"{n} and 1", n) for n in range(3)], desk, on, kept.extend)
    assert [(one.query.number, one.answer.said) for one in kept] == [(0, "7"), (1, "7")]


def test_what_was_answered_is_kept_where_the_user_stops(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from luthier.cli import main

    rows, inner, calls = tmp_path / "sums.jsonl", Endpoint.write, []
    rows.write_text("".join(json.dumps({"question": f"{n} and 1", "answer": str(n + 1)}) + "\n" for n in range(60)))

    def stopped(self: Endpoint, *given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return inner(self, *given)

    monkeypatch.setattr(Endpoint, "write", stopped)
    words = ["ask", "openai:m", "--endpoint", played.url, "--data", str(rows), "--strategy", "cot"]
    assert main([*words, "--prompt", "question", "--response", "answer", "--out", str(tmp_path / "c.jsonl")]) != 0
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 8
    assert "8 answers were finished" in capfd.readouterr().err


def test_the_verb_asks_an_endpoint_and_keeps_what_was_finished(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from luthier.asking import endpoint
    from luthier.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endpoint, "TRIES", 1)
    rows = Path("sums.jsonl")
    rows.write_text("".join(json.dumps({"question": f"{n} and 1", "answer": str(n + 1)}) + "\n" for n in range(60)))
    words = [
        "ask",
        "openai:m",
        "--endpoint",
        played.url,
        "--data",
        str(rows),
        "--strategy",
        "cot",
        "--prompt",
        "question",
        "--response",
        "answer",
    ]
    assert main([*words, "--out", "a.jsonl", "--json"]) == 0
    found = json.loads(Answer(0, *capfd.readouterr()).out)
    assert found["standings"][0]["name"] == "cot" and found["rows"] == 12
    assert {json.loads(line)["answer"] for line in Path("a.jsonl").read_text().splitlines()} == {"7"}
    played.script = [None] * 8 + [(500, "gone", {})] * 8
    assert main([*words, "--out", "b.jsonl"]) == 3
    said = capfd.readouterr().err
    assert "8 answers were finished; they are in b.jsonl" in said and len(Path("b.jsonl").read_text().splitlines()) == 8
    assert main(["ask", "openai:m", "--data", str(rows), "--strategy", "cot"]) == 2
    assert "--endpoint" in capfd.readouterr().err
    assert main(["ask", "m", "--endpoint", played.url, "--data", str(rows), "--strategy", "cot"]) == 2
    assert "openai:m" in capfd.readouterr().err
