"""`luthier convert`: a pickled torch checkpoint becomes safetensors. The pickle is opened in a jailed child only."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from luthier.core import BadInput, Refused
from luthier.trust import jail, safetensors
from luthier.trust._bytes import open_regular, show
from luthier.trust._limits import Limits

__all__ = ["Converted", "pickle_to_safetensors"]


@dataclass(frozen=True)
class Converted:
    """What was written. `left_out` names the entries that are no tensors, such as counters and settings."""

    path: Path
    tensors: int
    left_out: tuple[str, ...]
    sha256: str


def pickle_to_safetensors(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> Converted:
    """Read the tensors of a torch checkpoint (the zip format, torch 1.6 and later) without running anything of it.

    Raises:
        BadInput: no such file, or `target` exists.
        Refused: it asks for anything but tensors, or is in another format; nothing is written.
    """
    target = Path(target)
    where = show(str(source), 200)
    if target.exists() or target.is_symlink():
        raise BadInput(f"{show(str(target), 200)}: is there already. Choose another name, or remove it.")
    with open_regular(source) as file:
        first, size = file.read(4), os.fstat(file.fileno()).st_size
    if first != b"PK\x03\x04":
        raise Refused(
            f"{where}: not in the zip format of torch 1.6 and later, so it is not read. If it is your own, load it "
            "where you trust it and save it again with torch.save."
        )
    full = os.path.abspath(source)  # noqa: PTH100  # the child stands in another folder
    target.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=".convert-", dir=target.parent))  # 0700
    try:
        out = private / "out.safetensors"
        # Tied weights are written once per name, so the result may be longer than the source.
        answer = jail.run(
            "luthier.trust._unpickle:start",
            {"source": full, "out": os.path.abspath(out)},  # noqa: PTH100
            what=where,
            seconds=30 + size / 20e6,
            bytes_=1_000_000_000 + 3 * size,
            readable=[full],
            writable=os.path.abspath(private),  # noqa: PTH100
            written=2 * size + 10_000_000,
        )
        header = safetensors.check_header(out, limits=limits)
        if len(header.entries) != answer["tensors"]:
            raise Refused(f"{where}: the jailed reader wrote {len(header.entries)} tensors, said {answer['tensors']}.")
        with out.open("rb+") as file:
            os.fsync(file.fileno())
        found = safetensors.sha256(out)
        os.link(out, target)  # unlike rename, never over a file that came into being meanwhile
    except Refused as error:
        text = str(error)
        raise Refused(text if text.startswith(where) else f"{where}: {text}") from None
    except FileExistsError:
        raise BadInput(f"{show(str(target), 200)}: is there already. Choose another name, or remove it.") from None
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return Converted(target, answer["tensors"], tuple(answer["left_out"]), found)
