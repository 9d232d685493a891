"""What onnxruntime makes of the rows that a run kept: the step "onnx" of a certificate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core import IntegrityError
from luthier.workflow.fresh import Answer, Asked, look_plainly

__all__ = ["GRAPH", "answer", "session_of"]

GRAPH = "model.onnx"


def session_of(folder: Path) -> Any:
    """The graph of a folder, ready to answer on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])


class OnnxModel(nn.Module):
    """A graph in the place of a model of transformers: called with its inputs, it gives an object with `logits`.

    Raises:
        IntegrityError: the graph cannot be read, or is of another shape than such a graph has.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime
        import transformers

        super().__init__()
        self.here = nn.Parameter(torch.empty(0), requires_grad=False)  # says where inputs must be
        self.config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        try:
            self.session = session_of(folder)
        except Exception as error:  # onnxruntime's are of many classes
            raise IntegrityError(f"{GRAPH} cannot be read by onnxruntime: {str(error).splitlines()[0]}") from error
        self.names = [given.name for given in self.session.get_inputs()]
        if "logits" not in [given.name for given in self.session.get_outputs()] or "input_ids" not in self.names:
            raise IntegrityError(f"{GRAPH} has other inputs or outputs than a graph that luthier wrote")
        self.by = f"onnxruntime {onnxruntime.__version__}"

    def get_input_embeddings(self) -> Any:
        """Something that has as many rows as the vocabulary."""
        return nn.Embedding(int(self.config.get_text_config().vocab_size), 1, device="meta")

    def forward(self, **inputs: Tensor) -> Any:
        """Of int64 inputs, each (b, t); what a row's batch does not have, such as types of one text, is zeros."""
        zeros = torch.zeros_like(inputs["input_ids"])
        given = {name: inputs.get(name, zeros).numpy() for name in self.names}
        return SimpleNamespace(logits=torch.tensor(self.session.run(["logits"], given)[0]))


def answer(asked: Asked) -> Answer:
    """The rows, read by the folder's own tokenizer, and the graph's logits of each."""
    model = OnnxModel(Path(asked.folder)).eval()
    return Answer(*look_plainly(model, asked), facts={"by": model.by})
