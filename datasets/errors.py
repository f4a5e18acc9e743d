"""The faults a user can mend. Every message names file, field, value and the fix, on one line."""

__all__ = [
    "DatasetError",
    "OutputExistsError",
    "PwiserError",
    "SchemaError",
    "TableError",
    "one_line",
]


class PwiserError(Exception):
    """The root of every fault that a user can mend; the command line prints it and exits with 2."""


class SchemaError(PwiserError):
    """A schema file that cannot be used."""


class TableError(PwiserError):
    """An input table whose content breaks its schema."""


class DatasetError(PwiserError):
    """A prepared dataset that is missing, incomplete or damaged."""


class OutputExistsError(PwiserError):
    """An output directory that is already there."""


def one_line(error: BaseException | str, max_characters: int | None = 200) -> str:
    """Put what another library raised or said on one line, its beginning if it is long."""
    return " ".join(str(error).split())[:max_characters]
