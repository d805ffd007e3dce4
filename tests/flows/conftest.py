"""One tiny pipeline, really run once a session, that the tests of flows look at and go on from."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

TINY = {
    "name": "tiny",
    "ratios": [0.3, 0.6],
    "data": {
        "train": 48,
        "val": 16,
        "max_width": 160,
        "text": {"alphabet": "0123456789", "min_length": 1, "max_length": 4},
    },
    "model": {"width": 0.1, "hidden": 8},
    "baseline": {"epochs": 2, "batch_size": 16},
    "sparse": {"epochs": 4, "batch_size": 8, "target_ratio": 0.6},
    "finetune": {"epochs": 1, "batch_size": 16},
}


@dataclass
class Project:
    """A state folder, an experiment file, and the real command line on both."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / ".pipeline"

    @property
    def params(self) -> Path:
        return self.folder / "tiny.yaml"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *arguments]

    def options(self) -> dict[str, Any]:
        environment = {**os.environ, "CRNN_SLIM_HOME": str(self.home), **self.environment}
        return {"cwd": Path(__file__).parents[2], "env": environment, "text": True}

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        result = subprocess.run(command, capture_output=True, timeout=300, **self.options())
        assert result.returncode == code, result.stderr
        return result

    def frontier(self, *arguments: str) -> dict[str, Any]:
        output: dict[str, Any] = json.loads(
            self.run("frontier", str(self.params), "--json", *arguments).stdout
        )
        return output

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Manifest of every finished stage, by label."""
        found = [json.loads(p.read_text()) for p in self.home.glob("stages/*/manifest.json")]
        return {manifest["label"]: manifest for manifest in found}


def new_project(folder: Path, **changes: Any) -> Project:
    """A project of its own with the tiny experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder)
    project.params.write_text(yaml.safe_dump({**TINY, **changes}), encoding="utf-8")
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Any]]:
    """The tiny frontier, computed, and what it printed. Do not change what others rely on."""
    project = new_project(tmp_path_factory.mktemp("tiny"))
    return project, project.frontier()
