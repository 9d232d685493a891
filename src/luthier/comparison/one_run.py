"""One run of a comparison, in a process of its own; what goes wrong is its last line."""

import json
import os
import signal
import tomllib

from luthier.core import Interrupted, LuthierError
from luthier.runs.parent import end_with_the_parent
from luthier.runs.spec import RunSpec

__all__ = ["MARK", "work"]

MARK = "luthier-error "


def work(spec: str, threads: int | None) -> None:
    """Train the run that the spec names, or go on with it; the message of an error is the last line printed."""
    end_with_the_parent()
    import torch

    from luthier.training.listener import Listener
    from luthier.workflow.run import run_to_end

    torch.set_num_threads(threads or os.cpu_count() or 1)
    read = RunSpec.from_plain(tomllib.loads(spec))
    try:
        run_to_end(read, Listener())
    except LuthierError as error:
        print(MARK + json.dumps(str(error)), flush=True)
        raise
    except KeyboardInterrupt:
        print(MARK + json.dumps("interrupted"), flush=True)
        raise Interrupted("interrupted", signal.SIGINT) from None
