"""A model's folder, its configuration and its tokenizer: what is read of it before any weight. No torch here.

Nothing that a file says is executed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core import ModelError, near
from luthier.trust.model import ModelFolder, check_folder

__all__ = ["Source", "find_model", "load_config", "load_tokenizer", "quiet"]


@dataclass(frozen=True)
class Source:
    """A checked folder with a model."""

    name: str
    folder: ModelFolder

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.folder.path)

    @property
    def digest(self) -> str:
        """Of its configuration and weights."""
        return self.folder.digest


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices and bars off the terminal: what a user must know, we say ourselves."""
    import transformers

    logger = logging.getLogger("transformers")
    level, shown = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if shown:
            transformers.utils.logging.enable_progress_bar()


def find_model(name: str) -> Source:
    """Find and check a model: `sample:NAME`, a folder, or a hub name.

    Raises:
        UnknownName: no such sample.
        ModelError, Refused: no such folder, or one that cannot or must not be used.
    """
    if name.startswith("sample:"):
        from luthier import samples

        return Source(name, check_folder(samples.model_path(name.removeprefix("sample:"))))
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(name, check_folder(path))
    if path.exists():
        raise ModelError(f"{name}: is a file; a model is a folder with config.json and safetensors weights.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"{name}: no such model folder.{near(path.name, beside)} Name a folder, sample:NAME "
            "(`luthier samples` lists them), or a hub name such as org/model."
        )
    return Source(name, check_folder(_download(name)))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{name}: cannot be had from the hub ({str(error).splitlines()[0]}). "
            "Check the name and the network, or name a folder or sample:NAME."
        ) from error


def load_config(source: Source) -> Any:
    """The model's configuration object."""
    from transformers import AutoConfig

    with quiet():
        return AutoConfig.from_pretrained(source.path, local_files_only=True)


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer.

    Raises:
        ModelError: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source.name}: no tokenizer that can be read ({str(error).splitlines()[0]}). "
            "Put the model's tokenizer.json and tokenizer_config.json into its folder."
        ) from error
