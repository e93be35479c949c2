"""The examples of CONTRIBUTING.md, run by the contract tests of their registries."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (HERE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
ENTRIES = {
    "strategies": "head_only", "tasks": "denoising", "backbones": "plain_3d", "objectives": "denoise",
    "divergences": "largest_shift", "cohorts": "bright_block",
}
CONTRACTS = {
    "strategies": "tune/test_strategies.py::test_two_steps_change_what_the_strategy_says_and_nothing_else",
    "tasks": "tune/test_tasks.py::test_task_contract", "backbones": "backbones/test_backbones.py",
    "objectives": "pretrain/test_objectives.py",
    "divergences": "shift/test_divergences.py", "cohorts": "data/test_cohorts.py",
}


def test_there_is_one_example_for_each_registry():
    assert [re.search(r"@(\w+)\(\"(\w+)\"", e).groups() for e in EXAMPLES] == list(ENTRIES.items())


def test_the_map_leads_to_what_is_there():
    text = (HERE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+\? \| `([^`]+)` \| `(\w+)` \|$", text, re.M)
    assert len(rows) >= 10
    for notebook, name in rows:
        source = (HERE.parent / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8")
        assert re.search(rf"\b(def|class) {name}\b", source), (notebook, name)
    folders = {p.name for p in (HERE.parent / "nbs").iterdir() if re.match(r"\d_", p.name)}
    assert folders == set(re.findall(r"^\| `(\d_\w+)` \|", text, re.M))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    "The contract tests, in a process that has registered the examples and nothing else has been told of them."
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "examples.py").write_text("\n".join(EXAMPLES), encoding="utf-8")
    command = [
        sys.executable, "-m", "pytest", "-p", "examples", "-p", "no:cacheprovider", "-p", "no:xdist", "-v", "-k",
        " or ".join(ENTRIES.values()), *(str(HERE / c) for c in CONTRACTS.values()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("registry", ENTRIES)
def test_registering_the_example_is_enough_for_its_contract_test(registry, outcome):
    file, _, name = CONTRACTS[registry].partition("::")
    lines = [l for l in outcome.splitlines() if re.match(rf"\S*{file}::{name}\S*{ENTRIES[registry]}", l)]
    assert len(lines) >= (5 if registry in ("backbones", "objectives", "divergences") else 2), outcome[-3000:]
    assert all(" PASSED" in l or " SKIPPED" in l for l in lines) and any(" PASSED" in l for l in lines), (
        "\n".join(l for l in lines if "PASSED" not in l) + outcome[-6000:]
    )
