"""Where a new folder can be made, and where not."""

from pathlib import Path

import pytest

from luthier.core import ConfigError, ResourceError
from luthier.core.places import refuse_taken


def test_a_folder_that_is_there_or_was_linked_is_taken(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError, match="is there already"):
            refuse_taken(taken, deep=True)


def test_below_a_file_there_is_no_place_and_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    for deep in (False, True):
        with pytest.raises(ResourceError, match=r"thesis\.txt is a file, and no folder can stand in it"):
            refuse_taken(tmp_path / "thesis.txt" / "a" / "b", deep=deep)


def test_folders_above_are_made_only_where_that_is_said(tmp_path: Path) -> None:
    refuse_taken(tmp_path / "new")
    refuse_taken(tmp_path / "a" / "new", deep=True)
    with pytest.raises(ConfigError, match=r"the folder .*/a does not exist. Make it"):
        refuse_taken(tmp_path / "a" / "new")


def test_where_this_user_may_not_write_there_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.core.places.os.access", lambda *asked: False)
    with pytest.raises(ResourceError, match=f"this user may not write to {tmp_path}, "):
        refuse_taken(tmp_path / "new")
