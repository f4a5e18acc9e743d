"""The layers: deploy -> tuner -> trainables -> datasets, and what each may import from outside."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAYERS = ("deploy", "tuner", "trainables", "datasets")
"""Each may import those after it."""

SERVICE_ONLY = ("ray", "mlflow", "optuna")
"""What the layers below `tuner` may not import."""

TORCH_ONLY = ("trainables.models", "trainables.loss", "trainables.metrics")
"""What may import torch, the standard library and each other, and nothing else."""


def files(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """List the modules that a file imports, anywhere in it; `from a.b import c` is `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the whole name"
            assert node.module is not None
            found.add(node.module)
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("import a.b, c\nfrom d.e import f\ndef g():\n    from h import i\n")
    assert imported(source) == {"a.b", "c", "d.e", "h"}


@pytest.mark.parametrize("package", LAYERS[1:])
def test_there_is_something_to_check(package: str) -> None:
    assert len(files(package)) > 5


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package: str) -> None:
    above = set(LAYERS[: LAYERS.index(package)])
    wrong = {str(path.relative_to(REPOSITORY)): tops(path) & above for path in files(package)}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("package", LAYERS[2:])
def test_what_trains_and_what_it_reads_import_no_service(package: str) -> None:
    wrong = {
        str(path.relative_to(REPOSITORY)): tops(path) & set(SERVICE_ONLY) for path in files(package)
    }
    assert {path: names for path, names in wrong.items() if names} == {}


def test_datasets_do_not_import_torch() -> None:
    assert [str(path) for path in files("datasets") if "torch" in tops(path)] == []


def test_models_loss_and_metrics_import_torch_alone() -> None:
    checked = [REPOSITORY / "trainables" / name for name in ("loss.py", "metrics.py")]
    checked += files("trainables/models")
    assert all(path.is_file() for path in checked)
    for path in checked:
        others = {
            name
            for name in imported(path)
            if name.partition(".")[0] not in {"torch", *sys.stdlib_module_names}
            and not is_within(name, TORCH_ONLY)
        }
        assert others == set(), path
