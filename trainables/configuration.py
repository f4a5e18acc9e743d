"""What one trial is: a model with its settings, the loss, the training; checked at construction.

A model's settings are the keyword-only arguments of its constructor, so a new architecture is one
class and nothing else; the strict schema that checks a job file is derived from its signature.
"""

import importlib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    ValidationError,
    create_model,
)

from datasets.errors import PwiserError, one_line
from trainables.execution import CudaGraph, Folding, Precision
from trainables.models import MODELS, Inputs
from trainables.optimizers import EmbeddingOptimizer

__all__ = [
    "ConfigurationError",
    "LossSettings",
    "Settings",
    "TrainingSettings",
    "TrialConfiguration",
    "build_model",
    "describe_faults",
    "find_model",
    "settings_of",
]


Section = TypeVar("Section", bound="Settings")


class ConfigurationError(PwiserError):
    """A configuration that names an unknown model or field, or a value out of its range."""


class Settings(BaseModel):
    """The base of every section: frozen; unknown keys and numbers without end are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


class LossSettings(Settings):
    """The loss `BCE + alpha * PWiseR` (docs/method.md); the defaults are the paper's point."""

    alpha: float = Field(0.3, ge=0, description="weight of the PWiseR loss; 0 is plain BCE")
    m1: float = Field(0.3, ge=0, le=1, description="margin of converted over clicked impressions")
    m2: float = Field(0.1, ge=0, le=1, description="margin of converted over unclicked impressions")
    gate: Literal["hinge", "literal"] = Field("hinge", description="which pairs count")


class TrainingSettings(Settings):
    """How a trial trains. The defaults are the paper's."""

    epochs: int = Field(2, ge=1, description="passes over the train split")
    batch_size: int = Field(
        2048,
        ge=1,
        description="impressions per step over all workers, at most: "
        "the batches of an epoch have one size, the largest that wastes no step",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam's step size")
    weight_decay: float = Field(1e-6, ge=0, description="Adam's L2 penalty")
    precision: Precision = Field(
        "auto", description="of the matrix products; auto is bfloat16 where the device has it"
    )
    folding: Folding = Field(
        "auto",
        description="of embeddings into the first layer, which changes the speed alone; "
        "auto folds the fields whose vocabularies are small enough for it, none on a GPU",
    )
    cuda_graph: CudaGraph = Field(
        "auto",
        description="whether a GPU with dense Adam and one worker per lane replays its step as one "
        "CUDA graph; auto: of the built-in models, on: of your own too, which must not wait for "
        "the device, off: of none",
    )
    compile: bool = Field(
        False,
        description="whether the model, on a CPU its loss too, is compiled (torch.compile), with "
        "one worker per lane and a C++ compiler on its node: on a GPU, or of a small model on a "
        "CPU, less time per step, after 5 to 40 seconds for every lane and shape of the model; on "
        "a CPU a trial fails whose gradients it changes",
    )
    embedding_optimizer: EmbeddingOptimizer = Field(
        "auto",
        description="dense is Adam over whole embedding tables, sparse over the rows that a step "
        "reads alone, without momentum, and with weight_decay for those rows alone; auto is sparse "
        "where the tables are large against a batch",
    )
    evaluate_every: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of an epoch between two evaluations; "
        "1/n for a whole n, others are rounded to one",
    )
    seed: int = Field(0, ge=0, description="of the initial weights and of the order of the data")


def find_model(name: str) -> type[torch.nn.Module]:
    """Find a model's class.

    Args:
        name: a key of `MODELS`, or `module:Class` for an architecture of the user's own.

    Raises:
        ConfigurationError: if there is no such model, or it has not the form of one.
    """
    if name in MODELS:
        return MODELS[name]
    module_name, _, class_name = name.partition(":")
    if not (module_name and class_name):
        raise ConfigurationError(
            f"models: {name!r} is no model; choose from {', '.join(MODELS)}, "
            "or name your own as module:Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(
            f"models: {name!r} cannot be imported ({reason}); "
            f"mend it, or put the directory of {module_name!r} on PYTHONPATH"
        ) from error
    if found is None:
        raise ConfigurationError(
            f"models: {name!r}: module {module_name!r} has no {class_name!r}; name a class of its"
        )
    if not (inspect.isclass(found) and issubclass(found, torch.nn.Module)):
        raise ConfigurationError(f"models: {name!r} is no torch.nn.Module; name a class of one")
    if getattr(found, "num_heads", None) not in {1, 2}:
        raise ConfigurationError(
            f"models: {name!r} has no class attribute num_heads; set it to the number of logits, "
            "2 (click, conversion) or 1 (click), see trainables/contract.py"
        )
    return found


@cache
def settings_of(name: str) -> type[Settings]:
    """Derive the strict settings class of a model from its constructor's keyword-only arguments.

    Raises:
        ConfigurationError: if the model is unknown, or an argument has no annotation or default,
            or none that a job file could give.
    """
    fields: dict[str, Any] = {}
    model = find_model(name)
    try:
        signature = inspect.signature(model.__init__, eval_str=True)
    except NameError as error:
        raise ConfigurationError(
            f"models: an annotation of {name!r} cannot be resolved ({error}); import it at run time"
        ) from error
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if inspect.Parameter.empty in {parameter.annotation, parameter.default}:
            raise ConfigurationError(
                f"models: argument {parameter.name!r} of {name!r} needs an annotation and a default"
            )
        fields[parameter.name] = (parameter.annotation, parameter.default)
    try:
        return create_model("ModelSettings", __base__=Settings, **fields)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ConfigurationError(
            f"models: the arguments of {name!r} cannot be settings ({str(error).splitlines()[0]}); "
            "use names and types that YAML can hold"
        ) from error


class TrialConfiguration(Settings):
    """Everything that decides a trial's result, next to its dataset.

    Attributes:
        model: a key of `MODELS` or `module:Class`.
        model_settings: the model's settings, complete (defaults filled in).
    """

    model: str
    model_settings: dict[str, Any]
    training: TrainingSettings
    loss: LossSettings

    @classmethod
    def create(
        cls,
        model: str,
        settings: Mapping[str, Any] | None = None,
        *,
        training: TrainingSettings | None = None,
        loss: LossSettings | None = None,
    ) -> "TrialConfiguration":
        """Check a model's settings, fill in its defaults and build it once without memory.

        Raises:
            ConfigurationError: naming the field, its value and what it may be.
        """
        known = settings_of(model)
        try:
            checked = known.model_validate(dict(settings or {}))
        except ValidationError as error:
            raise ConfigurationError(describe_faults(error, known, "model")) from error
        configuration = cls(
            model=model,
            model_settings=checked.model_dump(),
            training=training or TrainingSettings(),
            loss=loss or LossSettings(),
        )
        with torch.device("meta"):
            build_model(configuration, Inputs(vocabulary_sizes=(2, 3), num_numericals=2))
        return configuration

    def replace(self, values: Mapping[str, Any]) -> "TrialConfiguration":
        """Copy with other values, each by its dotted path, such as `loss.alpha`.

        Raises:
            ConfigurationError: if a path is no field or a value is out of its range.
        """
        sections: dict[str, dict[str, Any]] = {
            "model": dict(self.model_settings),
            "training": self.training.model_dump(),
            "loss": self.loss.model_dump(),
        }
        for path, value in values.items():
            section, _, field = path.partition(".")
            if field not in sections.get(section, {}):
                choices = sections.get(section) or sections
                raise ConfigurationError(f"{path}: no such field; choose from {', '.join(choices)}")
            sections[section][field] = value
        return TrialConfiguration.create(
            self.model,
            sections["model"],
            training=_checked(TrainingSettings, sections["training"], "training"),
            loss=_checked(LossSettings, sections["loss"], "loss"),
        )


def build_model(configuration: TrialConfiguration, inputs: Inputs) -> torch.nn.Module:
    """Build the model with fresh weights from torch's global random state.

    Raises:
        ConfigurationError: if a setting is out of the range that the model accepts.
    """
    try:
        return find_model(configuration.model)(inputs, **configuration.model_settings)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = one_line(error, None)
        raise ConfigurationError(f"model: {configuration.model}: {reason}") from error


_DEMANDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be one of {expected}",
    "model_type": "must be a mapping of keys to values (leave it out for the defaults)",
    "string_too_long": "must have at most {max_length} characters",
    "string_type": "must be text",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
}
"""What pydantic's kinds of faults demand, in the words of a job file."""


def describe_faults(error: ValidationError, known: type[BaseModel], section: str = "") -> str:
    """Put a validation error on one line: field, value and what it may be."""
    faults = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in ((section,) if section else ()) + fault["loc"])
        if fault["type"] == "extra_forbidden":
            fields = ", ".join(_fields_at(known, fault["loc"][:-1]))
            problem = f"unknown key; the known ones are {fields or 'none'}"
        elif fault["type"] == "missing":
            problem = "missing; add it"
        elif fault["type"] == "value_error":
            problem = fault["msg"].removeprefix("Value error, ")
        else:
            demand = _DEMANDS.get(fault["type"], "").format_map(fault.get("ctx", {}))
            message = demand or fault["msg"][:1].lower() + fault["msg"][1:]
            problem = f"{message}, got {fault['input']!r}"
        faults.append(f"{path}: {problem}" if path else problem)
    return "; ".join(faults)


def _fields_at(known: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    found: Any = known
    for part in location:
        if get_origin(found) is dict:
            found = get_args(found)[1]
        else:
            found = found.model_fields[str(part)].annotation
    return list(found.model_fields)


def _checked(known: type[Section], values: dict[str, Any], name: str) -> Section:
    try:
        return known.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(describe_faults(error, known, name)) from error
