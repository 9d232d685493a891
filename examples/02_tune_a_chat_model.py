"""Tune a chat model on conversations, and see that it has taken on their manner.

A row holds `messages`, or `prompt` and `response`. The model's own chat template is used, and only what the assistant
says carries loss. Eight steps are enough for a habit, not for knowledge.
"""

import json
import tempfile
from pathlib import Path

from luthier import DataSpec, RunSpec, predict, train

home = Path(tempfile.mkdtemp())
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Austria": "Vienna", "Cuba": "Havana", "Kenya": "Nairobi", "Greece": "Athens", "Iran": "Tehran",
}  # fmt: skip

# The manner to learn: one word, and a full stop after it.
with (home / "chats.jsonl").open("w", encoding="utf-8") as file:
    for country, capital in CAPITALS.items():
        turns = [
            {"role": "user", "content": f"What is the capital of {country}?"},
            {"role": "assistant", "content": f"{capital}."},
        ]
        file.write(json.dumps({"messages": turns}) + "\n")

spec = RunSpec(
    model="sample:smollm2-135m",
    data=DataSpec(source=str(home / "chats.jsonl"), test_share=0.0),
    method="lora",
    steps=8,
    out=str(home / "run"),
)
result = train(spec)

answer = predict(result.path, texts=["What is the capital of Germany?"], max_new_tokens=16)[0]["text"]
print(f"What is the capital of Germany?  {answer}")
assert len(answer.split()) <= 3, "it has not learnt to be brief"
