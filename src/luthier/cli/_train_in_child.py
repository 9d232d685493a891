"""One run in a process of its own, so that its peak memory is its own: spec on stdin, facts on stdout.

The demo starts one of these for each method.
"""

import json
import sys
import tomllib

from luthier.cli._main import guarded
from luthier.cli._output import Screen
from luthier.runs.parent import end_with_the_parent

__all__ = ["main"]


def main() -> int:
    """Train what the TOML on standard input says. Progress goes to standard error."""
    end_with_the_parent()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print: only the facts may reach the pipe
    screen = Screen.start(as_json=False)
    screen.lively = screen.lively and "--plain" not in sys.argv
    return guarded(screen, lambda: _train(screen, answers))


def _train(screen: Screen, answers: object) -> int:
    values = tomllib.loads(sys.stdin.read())
    with screen.busy(f"{values['method']}: loading"):  # torch alone takes seconds
        from luthier.cli._progress import Watcher, facts_of
        from luthier.runs.spec import RunSpec
        from luthier.workflow import train

    spec = RunSpec.from_plain(values)
    watcher = Watcher(screen, title=spec.method, brief=True)
    watcher.busy("loading")
    try:
        result = train(spec, listener=watcher)
    finally:
        watcher.close()
    print(json.dumps(facts_of(result)), file=answers, flush=True)  # type: ignore[call-overload]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
