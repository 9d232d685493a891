"""Checks of one method on one architecture stand together, so that they share its tuned model."""

from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the cells, and mark those of the long matrix before anything is chosen by its mark."""
    from cells import QUICK

    if config.getoption("--methods"):
        wanted = set(config.getoption("--methods").split(","))
        items[:] = [item for item in items if item.path.parent != HERE or _given(item).get("name") in wanted]

    here = [i for i, item in enumerate(items) if item.path.parent == HERE and {"name", "arch"} <= _given(item).keys()]
    ordered = sorted((items[i] for i in here), key=lambda item: (_given(item)["name"], _given(item)["arch"]))
    for i, item in zip(here, ordered, strict=True):
        items[i] = item
        if _given(item)["arch"] not in QUICK:
            item.add_marker(pytest.mark.slow)


def _given(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})
