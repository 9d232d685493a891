"""MLflow: the experiment "luthier" (MLFLOW_EXPERIMENT_NAME names another; MLFLOW_TRACKING_URI says where)."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["PACKAGE", "Sink"]

PACKAGE = "mlflow"


class Sink:
    def __init__(self, run: str, facts: dict[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "luthier"))
        mlflow.start_run(run_name=run)
        mlflow.log_params(facts)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self, end: str) -> None:
        self._mlflow.end_run(status={"finished": "FINISHED", "failed": "FAILED"}.get(end, "KILLED"))
