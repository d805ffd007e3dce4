"""The direction of imports: flows -> pruning -> crnn, and who may know MLflow and Prefect."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "crnn": {"pruning", "flows", "prefect", "mlflow"},
    "pruning": {"flows", "prefect", "mlflow"},
}
ONLY_IN = {
    "mlflow": {"registry.py", "serving.py", "tracking.py"},
    "prefect": {
        "flow_runs.py",
        "leases.py",
        "pipeline.py",
        "runners.py",
        "schedule.py",
        "server.py",
        "tasks.py",
    },
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_lower_packages_do_not_import_higher_ones(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_one_module_imports_each_service(library: str) -> None:
    users = {p.name for p in (ROOT / "flows").rglob("*.py") if library in imported(p)}
    assert users == ONLY_IN[library]
