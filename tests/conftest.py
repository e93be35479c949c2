"""Fixtures shared by all tests."""
import json
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path

import pytest


SLOW = ("packaging", "slurm_array", "slurm_faults", "site", "bad_sites", "slurm", "pretrain_together", "probing", "faults_2", "faults", "evidence")  # minutes each: begun first, they end with the others


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.stem.removeprefix("test_")
        return SLOW.index(name) if name in SLOW else len(SLOW)
    items.sort(key=rank)


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


@pytest.fixture(scope="session")
def lend_library(tmp_path_factory):
    "Put the library's pages, built once, where the site of a runs folder's neighbour looks for them."
    from vfm_notes.report.site import build_reference, choose_renderer
    built = {}
    def lend(root, renderer="smalldocs"):
        if renderer not in built:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("library")/"runs"))
                built[renderer] = build_reference(choose_renderer(renderer), lambda line: None)
        return shutil.copytree(built[renderer], root/"pages"/"_reference")
    return lend


# ---- measured values for the report: VFM_EVIDENCE=nbs/report/real_weights.json python -m pytest tests/test_layouts.py tests/test_natural.py tests/test_real_weights.py

def pytest_configure(config): config.evidence = {}


@pytest.fixture
def evidence(request):
    "Keep what a test measured, by kind and name, when the test has got so far."
    def keep(kind, name, **values):
        request.config.evidence[f"{kind}: {name}"] = dict(kind=kind, name=name, **values, test=request.node.nodeid.split("[")[0])
    return keep


def pytest_sessionfinish(session):
    path, found = os.environ.get("VFM_EVIDENCE"), session.config.evidence
    if not path or not found: return
    from vfm_notes.foundation.origin import device_name, versions
    made = dict(date=datetime.now(timezone.utc).strftime("%Y-%m-%d"), device=device_name(), versions={k: v for k, v in versions().items() if k in ("python", "torch", "monai", "transformers")})
    rows = {f"{r['kind']}: {r['name']}": r for r in (json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else [])}
    rows |= {k: r | made for k, r in found.items()}
    Path(path).write_text("[\n" + ",\n".join(json.dumps(rows[k]) for k in sorted(rows)) + "\n]\n", encoding="utf-8")
