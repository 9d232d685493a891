"""How much a foreign file may ask of us. Every reader takes a `Limits`; the defaults fit what people really train."""

from dataclasses import dataclass

__all__ = ["Limits"]

MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps, in bytes where nothing else is said. A file over a cap is refused before it is parsed."""

    json_bytes: int = 64 * MB  # a tokenizer.json of a 250 k vocabulary has 35 MB
    toml_bytes: int = MB
    yaml_bytes: int = 64_000  # PyYAML needs about a second for 200 kB
    depth: int = 64  # nested brackets
    keys: int = 20_000  # keys of one mapping, and `=` signs of one TOML file
    digits: int = 40  # of one whole number
    header_bytes: int = 8 * MB  # of a safetensors file; the format itself allows 100 MB
    entries: int = 50_000  # tensors of one safetensors file
    name_chars: int = 512  # of one tensor's name
    dims: int = 16  # of one tensor
    in_memory: int = 512 * MB  # safetensors up to this size are read once into memory; larger ones are memory-mapped
    template_chars: int = 200_000
    rendered_chars: int = MB
    render_seconds: float = 0.75  # of processor time, for one conversation; with its start a refusal takes under 1 s
    child_bytes: int = 256 * MB  # address space of a child process
    members: int = 10_000  # of an archive
    unpacked_bytes: int = 2_000 * MB
    ratio: int = 200  # unpacked to packed size of one archive member
    path_chars: int = 1_024
    gguf_tensors: int = 50_000
    gguf_pairs: int = 10_000
    gguf_array: int = 2_000_000  # elements of one metadata array: a vocabulary
    gguf_header_bytes: int = 128 * MB
    row_file_bytes: int = 8_000 * MB
    row_chars: int = 16 * MB  # of one line
    rows: int = 50_000_000
    columns: int = 1_000
    complaints: int = 50  # bad rows named in one message
