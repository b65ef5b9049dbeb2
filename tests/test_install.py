"""The Makefile where Python lacks what an environment needs, as on Ubuntu without python3-venv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.paths import ROOT


@pytest.mark.parametrize("name", ["VENV", "TPU"])
def test_without_ensurepip_the_package_is_named_and_nothing_is_begun(tmp_path: Path, name: str) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError(\"No module named 'ensurepip'\")")
    made = tmp_path / "environment"
    command = ["make", f"PYTHON={sys.executable}", f"{name}={made}", f"{made}/bin/python"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    refused = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert refused.returncode == 2 and "apt-get install python3-venv" in refused.stderr
    assert not made.exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert subprocess.run([made / "bin/python", "-m", "pip", "--version"]).returncode == 0
