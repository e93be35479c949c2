"""Fixtures shared by all tests."""
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder of real cases, or a skip that says where it was looked for."
    root = Path(os.environ.get("VFM_TEST_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data")
    if not root.is_dir(): pytest.skip(f"no real cases at {root}; set VFM_TEST_DATA")
    return root


@pytest.fixture
def runs_root(tmp_path, monkeypatch) -> Path:
    "A scratch runs folder."
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    return tmp_path/"runs"
