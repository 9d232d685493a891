import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.core import UnknownName, UsageError
from luthier.samples import COLUMNS, SAMPLES, find, model_path, rows
from luthier.samples.convert import CONVERTERS
from luthier.samples.parsers import PARSERS


def test_an_unknown_name_offers_near_ones() -> None:
    with pytest.raises(UnknownName, match=r"'terc6'\. Did you mean 'trec6'"):
        find("sample:terc6")


def test_a_data_set_is_no_model() -> None:
    with pytest.raises(UsageError, match="sample:trec6 is a data set, but a model is wanted here"):
        model_path("trec6")
    with pytest.raises(UsageError, match="is a model, but a data set"):
        find("minilm-l6", "data")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_entry_is_complete(name: str) -> None:
    sample = SAMPLES[name]
    assert sample.name == name
    assert sample.parser in (CONVERTERS if sample.kind == "model" else PARSERS)
    assert sample.kind == "model" or sample.task in COLUMNS
    assert set(sample.needs) <= set(SAMPLES)
    assert len(set(sample.members)) == len(sample.members) > 0
    assert sample.licence and sample.title and sample.note
    for pin in sample.packages:
        assert re.fullmatch("[0-9a-f]{64}", pin.sha256)
        assert pin.n_bytes > 0
        assert pin.filename.endswith(".tar.gz" if pin.sdist else ".whl")
        assert f"-{pin.version}" in pin.filename


def test_the_listing_is_plain_and_complete(tmp_path: Path) -> None:
    listed = json.loads(json.dumps(rows(tmp_path)))
    assert [row["name"] for row in listed] == list(SAMPLES)
    assert not any(row["cached"] for row in listed)
    assert not any(tmp_path.iterdir())


def test_listing_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "yaml"}
    code = f"import sys, luthier.samples as s; s.rows(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
