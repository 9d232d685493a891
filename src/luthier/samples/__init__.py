"""Real models and data sets for the first run, the tests and the benchmarks: pinned, checked, split once.

    model_path("minilm-l6")             a Hugging Face folder
    load_sample("trec6").train[0]       {"text": ..., "label": ...}
    resolve("sample:trec6")             the folder, fetched first if need be

Importing this room imports neither torch nor transformers.
"""

from luthier.samples.catalogue import PREFIX, SAMPLES, Pin, Sample, find
from luthier.samples.data import COLUMNS, SampleData, load_sample
from luthier.samples.store import cache_dir, fetch, is_cached, model_path, resolve, rows, verify

__all__ = [
    "COLUMNS",
    "PREFIX",
    "SAMPLES",
    "Pin",
    "Sample",
    "SampleData",
    "cache_dir",
    "fetch",
    "find",
    "is_cached",
    "load_sample",
    "model_path",
    "resolve",
    "rows",
    "verify",
]
