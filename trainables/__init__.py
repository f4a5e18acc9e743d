"""What a trial trains: models, the PWiseR loss, metrics, the training loop, exports."""

from trainables.batches import inputs_of
from trainables.checkpoint import CheckpointError, Predictor, load
from trainables.configuration import (
    ConfigurationError,
    LossSettings,
    TrainingSettings,
    TrialConfiguration,
)
from trainables.models import MODELS, Inputs
from trainables.training import DeviceImpressions, Evaluation, TrainingError, train
from trainables.workers import Workers

__all__ = [
    "MODELS",
    "CheckpointError",
    "ConfigurationError",
    "DeviceImpressions",
    "Evaluation",
    "Inputs",
    "LossSettings",
    "Predictor",
    "TrainingError",
    "TrainingSettings",
    "TrialConfiguration",
    "Workers",
    "inputs_of",
    "load",
    "train",
]
