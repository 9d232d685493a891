"""Compare methods on the same rows: same split, same batches, same seed; only the method differs.

Each run has its own folder and record. `luthier methods` lists what there is; without a learning rate each method takes
its own default.
"""

import json
import tempfile
from pathlib import Path

from luthier import DataSpec, RunSpec, train
from luthier.samples import load_sample

home = Path(tempfile.mkdtemp())
rows = [row for row in load_sample("trec6").train if row["label"] in ("HUM", "NUM")][:300]
(home / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

print(f"{'method':12} {'accuracy':>8} {'trained':>9} {'seconds':>8} {'on disk':>9}")
for method in ("head_only", "ia3", "lora"):
    spec = RunSpec(
        model="sample:minilm-l6",
        data=DataSpec(source=str(home / "questions.jsonl")),
        method=method,
        epochs=4,
        out=str(home / method),
    )
    result = train(spec)
    assert result.record.status == "finished"
    print(
        f"{method:12} {result.scores['accuracy']:8.2f} {result.n_params:9,} {result.seconds:8.1f} "
        f"{result.stored_bytes / 1e3:6.0f} kB"
    )
