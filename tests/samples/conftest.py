"""pip sees a folder of ours and nothing else, except where a test asks for the real samples."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.samples import SAMPLES


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which pip looks for packages; the catalogue is put back afterwards."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    before = dict(SAMPLES)
    yield folder
    SAMPLES.clear()
    SAMPLES.update(before)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
