import ast
import subprocess
import sys
from pathlib import Path

import pytest

import datasets

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", datasets.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(datasets, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'datasets' has no attribute 'load_dataset'"):
        datasets.load_dataset  # noqa: B018


def test_first_line_says_whose_package_it_is() -> None:
    first_line = (REPOSITORY / "datasets" / "__init__.py").read_text().splitlines()[0]
    assert "pwiser-tuner" in first_line


def test_nothing_heavy_is_loaded_before_it_is_used() -> None:
    heavy = ("pandas", "pyarrow", "numpy", "torch", "ray", "rich.table")
    script = f"import sys, datasets, tuner.cli.data; print(*(set({heavy}) & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == ""


def test_no_module_imports_the_layers_above() -> None:
    above = {"torch", "ray", "mlflow", "optuna", "trainables", "tuner", "rich"}
    for path in (REPOSITORY / "datasets").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not above & {name.split(".")[0] for name in names}, path
