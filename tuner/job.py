"""The job file: strict, with a default for everything but `name` and `datasets`."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from datasets import PwiserError
from datasets.schema_file import load_yaml
from trainables.configuration import (
    LossSettings,
    Settings,
    TrainingSettings,
    TrialConfiguration,
    describe_faults,
    settings_of,
)
from trainables.models import MODELS
from tuner.errors import JobFileError
from tuner.messages import HANG_S
from tuner.objective import OBJECTIVES, Objective
from tuner.space import Dimension, SearchSpace, has_field
from tuner.tracking_store import hide_password

__all__ = [
    "Budget",
    "DataSettings",
    "Job",
    "ResourceSettings",
    "SearchSettings",
    "TrackingSettings",
    "parse_job",
    "read_job",
    "read_job_text",
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

DEFAULT_SPACE = {
    "loss.alpha": Dimension(low=0.001, high=1.0, log=True, points=4),
    "loss.m1": Dimension(low=0.0, high=0.5, points=4),
    "loss.m2": Dimension(low=0.0, high=0.5, points=4),
}


PASSWORD_PATTERN = r"://[^/@:]*:[^@]*@"  # with a slash in it too, as AWS's secret keys have


def _refuse_password(uri: str) -> None:
    without = hide_password(uri)
    if without != uri or re.search(PASSWORD_PATTERN, uri):
        place = without.rpartition("@")[2].rpartition("://")[2]
        raise ValueError(
            f"a password stands in the URI of {place}, and job files are kept and shown; give it "
            "in the environment (MLFLOW_TRACKING_URI or _PASSWORD, AWS_SECRET_ACCESS_KEY)"
        )


def _model_settings() -> dict[str, Any]:
    """Describe the settings of all built-in models as JSON Schema, each once."""
    found: dict[str, Any] = {}
    defaults: dict[str, dict[str, list[str]]] = {}
    for model in MODELS:
        for name, setting in settings_of(model).model_json_schema()["properties"].items():
            default = json.dumps(setting.pop("default"))
            defaults.setdefault(name, {}).setdefault(default, []).append(model)
            found[name] = setting
    for name, models in defaults.items():
        values = [f"{default} ({', '.join(of)})" for default, of in models.items()]
        found[name]["description"] = f"default {', '.join(values)}"
    return found


class SearchSettings(Settings):
    """What is searched, and how."""

    space: dict[str, Dimension] = Field(
        DEFAULT_SPACE, min_length=1, description="dimensions by dotted path, such as loss.alpha"
    )
    sampler: Literal["tpe", "random", "grid", "gp"] = "tpe"
    pruner: Literal["asha", "median", "none"] = "asha"
    trials: int = Field(
        40,
        ge=1,
        description="of each study, its baseline and the paper's point among them; "
        "a grid has all of its points where left out, else some from all over it",
    )
    replicates: int = Field(
        5,
        ge=0,
        description="fresh seeds that each study's winner is trained again with, with its loss and "
        "with plain BCE, for the evidence; 0 for none",
    )
    objective: Objective | tuple[Objective, ...] = Field(
        "mean_auc", description="validation metric to maximise; a list makes a Pareto study"
    )
    seed: int = Field(0, ge=0, description="of the sampler, and of the order of a grid's points")

    @field_validator("objective", mode="before")
    @classmethod
    def _check_known(cls, objective: object) -> object:
        names = objective if isinstance(objective, list | tuple) else [objective]
        for name in names:
            if not isinstance(name, str) or name not in OBJECTIVES:
                raise ValueError(f"must be one of {', '.join(OBJECTIVES)}, or a list, got {name!r}")
        return objective

    @field_validator("replicates")
    @classmethod
    def _check_replicates(cls, replicates: int) -> int:
        if replicates == 1:
            raise ValueError("must be 0 or at least 2, since one seed shows no spread, got 1")
        return replicates

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives as a list, whatever the job file wrote."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @model_validator(mode="after")
    def _check_objectives(self) -> "SearchSettings":
        if len(self.objectives) != len(set(self.objectives)) or not self.objectives:
            raise ValueError(
                f"objective must name at least one metric, and each once, "
                f"got {list(self.objectives)}"
            )
        if len(self.objectives) > 1 and self.pruner != "none":
            raise ValueError(
                f"pruner {self.pruner} compares one objective; set pruner: none for a Pareto study"
            )
        return self


class ResourceSettings(Settings):
    """What the lanes may use."""

    lanes: int | None = Field(
        None,
        ge=1,
        description="trials at a time; as many as the cluster's cores, GPUs and memory hold "
        "where left out",
    )
    workers_per_lane: int = Field(1, ge=1, description="data-parallel workers of one trial")
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="CPU cores, and threads, of one worker; "
        "an equal share of the cores (with a GPU at most 4) where left out",
    )
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="a fraction lets several lanes share a GPU; "
        "one where the cluster has any, else none, where left out",
    )
    autoscaled: bool = Field(
        False,
        description="lanes without room wait for nodes that the cluster adds, instead of being "
        "refused",
    )

    @model_validator(mode="after")
    def _check_gpus(self) -> "ResourceSettings":
        gpus = self.gpus_per_worker or 0.0
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"gpus_per_worker {gpus:g} must be a whole number, or below 1")
        if 0 < gpus < 1 and self.workers_per_lane > 1:
            raise ValueError(
                f"gpus_per_worker {gpus:g} puts several workers of a lane on one GPU, where they "
                "cannot train together; give each a whole one, or set workers_per_lane to 1"
            )
        return self


class DataSettings(Settings):
    """How the lanes read the datasets."""

    mode: Literal["auto", "memory", "stream"] = Field(
        "auto",
        description="memory holds a dataset, once per node; stream reads it again in every epoch; "
        "auto holds what takes at most half of the memory",
    )
    buffer_mib: int = Field(
        512, ge=16, description="MiB that one worker holds of a streamed dataset, to shuffle them"
    )


class Budget(Settings):
    """When to stop even though work is left."""

    hours: float | None = Field(
        None, gt=0, description="of one run of the job; no limit where left out"
    )
    trial_hours: float | None = Field(
        None,
        gt=0,
        description="of a lane for one trial, which has failed then; no limit where left out",
    )
    hang_minutes: float = Field(
        HANG_S / 60,
        gt=0,
        le=7 * 24 * 60,
        description="without a step, an evaluation or a loaded dataset after which a lane is taken "
        "to hang: its stacks are logged, and it is started again",
    )


class TrackingSettings(Settings):
    """Where MLflow keeps the trials."""

    uri: str | None = Field(
        None,
        description="of the MLflow tracking store; MLFLOW_TRACKING_URI, or else "
        "a SQLite file in the storage, where left out",
    )

    @field_validator("uri")
    @classmethod
    def _check_no_password(cls, uri: str | None) -> str | None:
        _refuse_password(uri or "")
        return uri


class Job(Settings):
    """A tuning job: one search for each pair of a dataset and a model."""

    name: str = Field(pattern=NAME_PATTERN, max_length=100)
    datasets: tuple[str, ...] = Field(min_length=1, description="prepared directories or URIs")
    models: tuple[str, ...] = Field(
        ("mmoe",), min_length=1, description="shared_bottom, mmoe, ple, dnn, masknet, module:Class"
    )
    search: SearchSettings = SearchSettings()
    training: TrainingSettings = TrainingSettings()
    model: dict[str, Any] = Field(
        {},
        description="settings of the models; each model takes those that it has",
        json_schema_extra=lambda schema: schema.update(properties=_model_settings()),
    )
    loss: LossSettings = LossSettings()
    resources: ResourceSettings = ResourceSettings()
    data: DataSettings = DataSettings()
    budget: Budget = Budget()
    tracking: TrackingSettings = TrackingSettings()
    storage: str = Field("pwiser", description="directory or URI of checkpoints")
    keep_checkpoints: Literal["winners", "all"] = Field(
        "winners", description="winners keeps each study's winner and baseline"
    )

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, name: object) -> object:
        if isinstance(name, str) and re.match(NAME_PATTERN, name) is None:
            raise ValueError(
                f"must be letters, digits, '.', '_' or '-', a letter or digit first, got {name!r}"
            )
        return name

    @field_validator("datasets", "storage")
    @classmethod
    def _check_no_password(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for uri in (value,) if isinstance(value, str) else value:
            _refuse_password(uri)
        return value

    @field_validator("datasets", "models")
    @classmethod
    def _check_unique(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        names = [value.rstrip("/").rpartition("/")[2] for value in values]
        for name, value in zip(names, values, strict=True):
            if not name:
                raise ValueError(f"{value!r} names nothing; leave it out")
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is named twice; names must differ")
        return values

    def configuration(self, model: str) -> TrialConfiguration:
        """Build the configuration that the trials of one model start from.

        Raises:
            ConfigurationError: if the model is unknown, or a setting is out of its range.
        """
        known = settings_of(model).model_fields
        return TrialConfiguration.create(
            model,
            {name: value for name, value in self.model.items() if name in known},
            training=self.training,
            loss=self.loss,
        )

    def space(self, model: str) -> SearchSpace:
        """Build the search space of one model's studies.

        Raises:
            ConfigurationError: if a dimension is out of its field's range.
        """
        space = SearchSpace(self.search.space, self.configuration(model))
        if self.search.sampler == "grid":
            space.grid()
        return space

    @model_validator(mode="after")
    def _check_models(self) -> "Job":
        try:
            configurations = [self.configuration(model) for model in self.models]
            known = sorted(
                {name for model in self.models for name in settings_of(model).model_fields}
            )
            for name in self.model:
                if name not in known:
                    raise ValueError(
                        f"model.{name}: unknown key; "
                        f"those of {', '.join(self.models)} are {', '.join(known)}"
                    )
            for path in self.search.space:
                if not any(has_field(base, path) for base in configurations):
                    fields = ", ".join(_field_paths(known))
                    raise ValueError(f"search.space.{path}: no such field; choose from {fields}")
            for model in self.models:
                self.space(model)
        except PwiserError as error:
            raise ValueError(str(error)) from error
        return self


def _field_paths(model_fields: list[str]) -> list[str]:
    return [
        *(f"loss.{name}" for name in LossSettings.model_fields),
        *(f"training.{name}" for name in TrainingSettings.model_fields),
        *(f"model.{name}" for name in model_fields),
    ]


def read_job(path: Path) -> Job:
    """Read and check a job file.

    Raises:
        JobFileError: naming the file, the field, its value and the fix.
    """
    return parse_job(read_job_text(path), str(path))


def read_job_text(path: Path) -> str:
    """Read a job file's text, unchecked.

    Raises:
        JobFileError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise JobFileError(f"{path}: cannot be read ({reason}); name a job file") from error


def parse_job(text: str, path: str) -> Job:
    """Check the text of a job file.

    Args:
        text: YAML.
        path: what messages call the file.

    Raises:
        JobFileError: naming the file, the field, its value and the fix.
    """
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise JobFileError(f"{path}:{place} not YAML ({problem}); mend that line") from error
    if not isinstance(content, dict):
        raise JobFileError(f"{path}: not a job file; it needs at least name and datasets")
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        raise JobFileError(f"{path}: {describe_faults(error, Job)}") from error
