"""GGUF headers, against the reference writer and against damage."""

import random
from pathlib import Path

import gguf as reference
import numpy as np
import pytest

from luthier.core import LuthierError, Refused
from luthier.trust import _gguf, gguf


def honest(folder: Path, alignment: int | None = None) -> Path:
    path = folder / "a.gguf"
    out = reference.GGUFWriter(path, "llama")
    if alignment:
        out.add_custom_alignment(alignment)
    out.add_block_count(3)
    out.add_rope_freq_base(10000.5)
    out.add_token_list(["a", "béé", "c"])
    out.add_token_scores([0.5, 1.5, -2.0])
    out.add_chat_template("{{ messages }}")
    out.add_tensor("x", np.arange(15, dtype=np.float32).reshape(3, 5))
    out.add_tensor("y", np.zeros((2, 34), np.uint8), raw_dtype=reference.GGMLQuantizationType.Q8_0)
    out.add_tensor("z", np.ones(7, dtype=np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_the_reference_writers_file_passes_and_its_tensors_are_where_the_reader_finds_them(
    tmp_path: Path, alignment: int | None
) -> None:
    path = honest(tmp_path, alignment)
    header = gguf.check(path)
    theirs = reference.GGUFReader(path)
    assert {n: t["shape"] for n, t in header.tensors.items()} == {
        t.name: [int(n) for n in t.shape] for t in theirs.tensors
    }
    for tensor in theirs.tensors:
        assert header.data_start + header.tensors[tensor.name]["offset"] == tensor.data_offset
        assert header.tensors[tensor.name]["bytes"] == tensor.n_bytes
    assert header.metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert header.metadata["llama.block_count"] == 3 and header.metadata["llama.rope.freq_base"] == 10000.5
    assert header.metadata["tokenizer.ggml.tokens"] == "(array of 3)"


def test_the_table_of_blocks_is_the_reference_packages() -> None:
    theirs = {int(kind): sizes for kind, sizes in reference.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in _gguf.BLOCKS} == _gguf.BLOCKS


def test_a_message_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(Refused, match=r"bad\.gguf': it does not begin with GGUF"):
        gguf.check(path)


def test_a_damaged_header_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    content, draw = honest(tmp_path).read_bytes(), random.Random(0)
    path = tmp_path / "bad.gguf"
    args = {"path": str(path), "header_bytes": 10**8, "tensors": 10**4, "pairs": 10**4, "array": 10**6}
    read = 0
    for _ in range(600):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(draw.choice([24, 100, len(content)]))] = draw.choice([0, 1, 127, 128, 255])
        path.write_bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.2 else changed)
        try:
            _gguf._read(args)
            read += 1
        except LuthierError:
            pass
    assert 0 < read < 600
