"""What an answer is worth: rewards by name, a run that learnt rewards, or a function in a file of the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, DataError, UnknownName, near
from luthier.data.columns import Columns
from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.strategies.rollouts._reward_runs import Asked, one_base, rewards_by_run
from luthier.surgery import Tuned, read_tuning, tuning_files
from luthier.workflow.load_model import find_model

__all__ = ["Asked", "Rewards", "digests", "needs_response", "parts_of", "rewards_of"]

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One reward of a sum, as it was named: `weight` times `name`."""

    weight: float
    name: str


def parts_of(words: str, setting: str = "reward") -> tuple[_Part, ...]:
    """The rewards of a sum such as "exact_match+0.2*format".

    Raises:
        ConfigError: nothing is named, a weight is no number, or one is named twice.
        UnknownName: none is called so.
    """
    found = []
    for word in [word.strip() for word in words.split("+") if word.strip()]:
        weight, star, name = word.rpartition("*")
        try:
            factor = float(weight) if star else 1.0
        except ValueError:
            raise ConfigError(f"{setting}: {word!r} has no number before its *. Write 0.5*{name}.") from None
        if not math.isfinite(factor):
            raise ConfigError(f"{setting}: the weight of {name} is {factor}. Give a finite number.")
        found.append(_Part(weight=factor, name=name.strip()))
    known = ", ".join(NAMED)
    if not found:
        raise ConfigError(
            f"{setting}: no reward is named. Give one of {known}, the folder of a run that learnt rewards (--strategy "
            "reward_model), or a file with a function of your own: --set reward=my_reward.py. Several are added: "
            "exact_match+0.2*format."
        )
    for part in found:
        path = Path(part.name.partition(".py:")[0]).expanduser()
        if part.name not in NAMED and ".py" not in part.name and not (path / "run.json").is_file():
            raise UnknownName(
                f"{setting}: no reward is called {part.name!r}, and no run lies there.{near(part.name, list(NAMED))} "
                f"There are {known}; or name the folder of a finished run, or a file such as my_reward.py."
            )
    if len({part.name for part in found}) < len(found):
        raise ConfigError(f"{setting}: {words!r} names a reward twice. Name each once, with its weight.")
    return tuple(found)


def needs_response(words: str) -> list[str]:
    """The named rewards that compare with what a row says is right."""
    return [part.name for part in parts_of(words) if part.name in ("exact_match", "contains", "numeric")]


def digests(words: str, usual: str = "reward") -> dict[str, str]:
    """Of every run and file among the rewards: a resumed run is held to them.

    Raises:
        ConfigError: a run that did not learn rewards or is not finished, a file that is not there.
    """
    found = {}
    for part in parts_of(words):
        if part.name in NAMED:
            continue
        path = Path(part.name.partition(".py:")[0] + (".py" if ".py:" in part.name else "")).expanduser()
        if path.suffix == ".py":
            if not path.is_file():
                raise ConfigError(f"reward: there is no file {path}. Name one with a function reward(prompt, answer).")
            found[part.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            _function(part.name, usual)
        else:
            found[part.name] = _run_digest(path)
    return found


def _run_digest(path: Path) -> str:
    run = RunFolder.open(path, write=False)
    if not run.tuning.exists():
        raise ConfigError(f"reward: {path} has no result yet. Go on with `luthier resume {path}`.")
    theirs = read_tuning(run.tuning)["task"]["name"]
    if theirs != "reward":
        raise ConfigError(
            f"reward: {path} learnt the task {theirs}, and gives no answer a number. Name a run of --strategy "
            "reward_model."
        )
    source = find_model(RunSpec.from_plain(run.spec, where=f"{path}/run.json").model)
    return hashlib.sha256(f"{source.digest} {tuning_files.weights_digest(run.tuning)}".encode()).hexdigest()


# --- by name ----------------------------------------------------------------------------------------------------------


def _length(asked: Asked, words: int, pattern: str) -> float:
    """1 at so many words, less the share that is missing or too much, 0 at least."""
    return max(0.0, 1 - abs(len(asked.answer.split()) - words) / words)


def _regex(asked: Asked, words: int, pattern: str) -> float:
    return float(re.search(pattern, asked.answer) is not None)


def _format(asked: Asked, words: int, pattern: str) -> float:
    return float(re.fullmatch(pattern, asked.answer.strip(), re.DOTALL) is not None)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")


def _exact(asked: Asked, words: int, pattern: str) -> float:
    return float(_plain(asked.answer) == _plain(asked.right or ""))


def _contains(asked: Asked, words: int, pattern: str) -> float:
    return float(_plain(asked.right or "") in _plain(asked.answer))


def _numeric(asked: Asked, words: int, pattern: str) -> float:
    """Whether the last number of the answer is the last number of what is right."""
    said, right = (_NUMBER.findall(text) for text in (asked.answer, asked.right or ""))
    return float(bool(said and right) and math.isclose(_value(said[-1]), _value(right[-1]), rel_tol=1e-6))


def _value(text: str) -> float:
    """A point begins a fraction and a comma parts thousands, where it can; not a number: what is none, as "1,2.3,4".

    >>> [_value(t) for t in ("-3", "2.50", "0.125", "1,200", "0,5", "1,234.5", "1.234.567,8")]
    [-3.0, 2.5, 0.125, 1200.0, 0.5, 1234.5, 1234567.8]
    """
    if re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    elif re.fullmatch(r"-?[1-9]\d{0,2}(\.\d{3})+,\d+|-?[1-9]\d{0,2}(\.\d{3}){2,}", text):
        text = text.replace(".", "")
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return math.nan


NAMED: dict[str, Callable[[Asked, int, str], float]] = {
    "length": _length,
    "regex": _regex,
    "format": _format,
    "exact_match": _exact,
    "contains": _contains,
    "numeric": _numeric,
}


# --- a file of the user's own -----------------------------------------------------------------------------------------


def _function(name: str, usual: str = "reward") -> Callable[..., Any]:
    """The function of my_reward.py, or of my_reward.py:other. The file is run: the user has named it as code."""
    file, colon, inner = name.partition(".py:")
    path, wanted = Path(file + (".py" if colon else "")).expanduser(), inner or usual
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"reward: {path} cannot be run ({type(error).__name__}: {error}). Mend the file.") from error
    found = getattr(module, wanted, None)
    if not callable(found):
        raise ConfigError(f"reward: {path} has no function {wanted}(prompt, answer, row). Write one, or name another.")
    return found  # type: ignore[no-any-return]


# --- all together -----------------------------------------------------------------------------------------------------


@dataclass
class Rewards:
    """Gives answers their rewards.

    Args:
        words: the target of `length`. pattern: of `regex` and `format`. seconds: for one answer, at most.
    """

    parts: tuple[_Part, ...]
    words: int
    pattern: str
    seconds: float
    judge: str = ""
    runs: dict[str, Any] = field(default_factory=dict)
    settled: int = 0

    def __post_init__(self) -> None:
        if self.judge:
            self.runs[self.judge] = _function(self.judge, "prefers")
        for part in self.parts:
            if part.name in NAMED:
                continue
            if ".py" in part.name:
                self.runs[part.name] = _function(part.name)
            else:
                from luthier.workflow.prediction import Predictor  # which imports the shelf of strategies

                self.runs[part.name] = Predictor(part.name)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards, in order."""
        return tuple(part.name for part in self.parts)

    def settle(self, tuned: Tuned, say: Callable[[str], None]) -> None:
        """Let runs that learnt rewards on the same base look at the numbers in memory already; once a model."""
        if self.settled == id(tuned):
            return
        self.settled = id(tuned)
        for part in self.parts:
            run: Any = self.runs.get(part.name)
            if hasattr(run, "tuned"):
                shared, own = (n / 1e6 for n in one_base(run.tuned.model, tuned))
                say(f"reward {part.name}: shares {shared:.1f} M numbers with the model, {own:.1f} M are its own")

    def __call__(self, asked: Sequence[Asked], columns: Columns) -> list[list[float]]:
        """The reward of each answer, of each part, before weights.

        Raises:
            DataError: a reward fails, is no finite number, or takes too long; names reward, row and answer.
        """
        if not self.parts:
            return [[] for _ in asked]
        found = [self._one(part.name, asked, columns) for part in self.parts]
        return [list(values) for values in zip(*found, strict=True)]

    def preferred(self, first: Sequence[Asked], second: Sequence[Asked], columns: Columns) -> list[float]:
        """How likely each first answer is preferred to the second, 0 to 1: by the judge, or by their rewards."""
        if not self.judge:
            a, b = ([self.total(values) for values in self(asked, columns)] for asked in (first, second))
            return [1 / (1 + math.exp(min(700.0, y - x))) for x, y in zip(a, b, strict=True)]
        ask = self.runs[self.judge]
        found = []
        for one, other in zip(first, second, strict=True):
            there, back = (
                self._guarded(self.judge, x, partial(ask, x.prompt, x.answer, y.answer, dict(x.row)))
                for x, y in ((one, other), (other, one))
            )
            if not (0 <= there <= 1 and 0 <= back <= 1):
                raise DataError(
                    f"judge {self.judge}: of {one.place} it says {there:g} and {back:g}, which are no chances. Give 0 "
                    "to 1."
                )
            found.append((there + 1 - back) / 2)
        return found

    def total(self, values: Sequence[float]) -> float:
        """The weighted sum of one answer's rewards."""
        return sum(part.weight * value for part, value in zip(self.parts, values, strict=True))

    def _one(self, name: str, asked: Sequence[Asked], columns: Columns) -> list[float]:
        if name in NAMED:
            return [self._guarded(name, one, partial(NAMED[name], one, self.words, self.pattern)) for one in asked]
        run = self.runs[name]
        if hasattr(run, "tuned"):
            return rewards_by_run(name, run, asked, columns)
        return [self._guarded(name, one, partial(run, one.prompt, one.answer, dict(one.row))) for one in asked]

    def _guarded(self, name: str, one: Asked, ask: Callable[[], Any]) -> float:
        what = f"reward {name}: of {one.place}, for the answer {one.answer[:80]!r}"
        advice = (
            "The last checkpoint stays: mend the reward and go on with luthier resume RUN --accept-drift model, or "
            "begin anew without the row."
        )
        try:
            value = float(_within(self.seconds, ask))
        except TimeoutError:
            raise DataError(f"{what}, took longer than {self.seconds:g} seconds. {advice}") from None
        except Exception as error:
            raise DataError(f"{what}, failed with {type(error).__name__}: {error}. {advice}") from error
        if not math.isfinite(value):
            raise DataError(f"{what}, is {value}, no finite number. {advice}")
        return value


@lru_cache(maxsize=4)
def rewards_of(reward: str, words: int, pattern: str, seconds: float, judge: str = "") -> Rewards:
    """The rewards that settings name; a run among them is loaded once a process."""
    parts = () if judge else parts_of(reward)
    return Rewards(parts=parts, words=words, pattern=pattern, seconds=seconds, judge=judge)


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What a function gives, or TimeoutError.

    By an alarm where there are any, which also ends a pattern that backtracks for ever; elsewhere a thread is left
    behind, since none can be ended from outside.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            return ask()
    found: list[Any] = []

    def work() -> None:
        try:
            found.append((ask(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def rings(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, rings)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
