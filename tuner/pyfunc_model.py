"""The script of a registered model: MLflow runs it where the model is loaded or served.

The export lies beside it, and the packages `trainables` and `datasets` travel with it.
"""

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel

import trainables


class ClickModel(PythonModel):
    """Raw features, a row per impression, to `pctr` (and `pctcvr`, `pcvr`)."""

    def load_context(self, context: Any) -> None:  # noqa: ANN401 - MLflow's
        """Load the export."""
        self.predictor = trainables.load(context.artifacts["export"])

    def predict(
        self,
        context: Any,  # noqa: ANN401 - MLflow's
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Score every row; unseen and missing categories are the unknown one, as in training."""
        return pd.DataFrame(self.predictor.predict(model_input))


mlflow.models.set_model(ClickModel())
