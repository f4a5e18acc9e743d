"""Reading a schema from its YAML file, with one line for whatever is wrong in it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from datasets.errors import SchemaError
from datasets.schema import CategoricalField, Labels, NumericalField, Schema, SplitFractions

__all__ = ["load_yaml", "read_schema"]


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys all differ."""
        seen: set[object] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is there twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401
        """Build any value; a date or number that is none is the file's fault, not a program's."""
        try:
            return super().construct_object(node, deep=deep)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            shown, kind = str(node.value)[:40], node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{shown!r} is no {kind} that can be read; text stands in quotes",
                problem_mark=node.start_mark,
            ) from error


def load_yaml(text: str) -> Any:  # noqa: ANN401
    """Read YAML of plain values.

    Raises:
        yaml.YAMLError: if it is none, or a key is there twice.
    """
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def read_schema(path: str | Path) -> Schema:
    """Read a schema file.

    Raises:
        SchemaError: The file is missing, no YAML, or breaks a rule; the message names the key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = load_yaml(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SchemaError(f"{path}: cannot read the schema ({reason}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: the schema is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}:"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SchemaError(f"{path}:{line} not YAML ({problem}); mend that line") from error
    if not isinstance(content, dict):
        raise SchemaError(
            f"{path}: holds no keys; write labels, categorical and numerical as 'key: value' lines"
        )
    try:
        return Schema.model_validate(content)
    except ValidationError as error:
        description = " ".join(_describe(error).split())  # a key may have lines of its own
        raise SchemaError(f"{path}: {description}") from error


def _describe(error: ValidationError) -> str:
    """Return the first problem of a validation as one line with its key, value and fix."""
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        model = _model_at(location[:-1])
        where = f"{'.'.join(str(part) for part in location[:-1])}: " if len(location) > 1 else ""
        return f"{where}unknown key {str(location[-1])!r}; known: {', '.join(model.model_fields)}"
    if first["type"] == "missing":
        known = ", ".join(_model_at(location[:-1]).model_fields)
        return f"{key}: missing; add it (known keys here: {known})"
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {problem}" if key else problem
    return f"{key}: {first['input']!r} is wrong; {problem[:1].lower()}{problem[1:]}"


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    by_key: dict[int | str, type[BaseModel]] = {
        "labels": Labels,
        "categorical": CategoricalField,
        "numerical": NumericalField,
        "split": SplitFractions,
    }
    return by_key[location[0]] if location else Schema
