"""Fixtures shared by all tests."""
import fcntl
import functools
import json
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

# a folder per layer; what several tests need lies beside this file, and some tests use another's
sys.path[:0] = sorted({str(p.parent) for p in Path(__file__).parent.glob("*/test_*.py")})

SLOW = ("packaging", "slurm_faults", "lab", "site", "slurm", "slurm_array", "bad_sites", "contributing", "conflicts",
        "faults", "faults_2", "study", "one_number", "natural_study", "cli", "pretrain_together", "probing",
        "evidence")  # a minute each: begun first, they end with the others


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.stem.removeprefix("test_")
        return SLOW.index(name) if name in SLOW else len(SLOW)
    items.sort(key=rank)


THEIRS = ("VFM_", "JUPYTER_", "IPYTHON", "SLURM_", "SBATCH_", "XDG_CONFIG_HOME", "XDG_CACHE_HOME",
          "XDG_DATA_HOME")  # how the user has set things up
TESTS = ("VFM_TEST_", "VFM_EVIDENCE", "VFM_SCREENSHOT")  # what is said to tests
OWN = {k: os.environ.get(k) for k in ("HOME", "VFM_WEIGHTS", "VFM_TEST_WEIGHTS")}  # the user's


@pytest.fixture(scope="session", autouse=True)
def scratch_home(tmp_path_factory):
    "Tests see an empty home, no data, no weights, no runs and a site key of their own, whatever the user has."
    home = tmp_path_factory.mktemp("home")
    key = home/"site.key"
    key.touch(mode=0o600)
    key.write_text("5e" * 32 + "\n")
    before = Path(OWN["HOME"] or "~").expanduser()
    # these programs work as the user set them up
    tools = {
        "PIP_CONFIG_FILE": before / ".config" / "pip" / "pip.conf", "PIP_CACHE_DIR": before / ".cache" / "pip",
        "GIT_CONFIG_GLOBAL": before / ".gitconfig",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(THEIRS) and not n.startswith(TESTS)]: patch.delenv(name)
        for name, path in tools.items():
            if path.exists() and name not in os.environ: patch.setenv(name, str(path))
        for name, value in {"HOME": home, "VFM_RUNS": home/"runs", "VFM_SITE_KEY": key}.items():
            patch.setenv(name, str(value))
        yield home


@pytest.fixture
def real_weights(monkeypatch) -> Path:
    """The user's own folder of weights (VFM_TEST_WEIGHTS, else VFM_WEIGHTS, else where they lie by themselves), for
    tests of real ones."""
    root = Path(
        OWN["VFM_TEST_WEIGHTS"] or OWN["VFM_WEIGHTS"] or Path(OWN["HOME"] or "~") / ".cache" / "vfm_notes" / "weights"
    ).expanduser()
    monkeypatch.setenv("VFM_WEIGHTS", str(root))
    return root


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
def made_once(tmp_path_factory, request):
    "A folder that the first worker to ask for it fills, and that all of this session share: made_once(name, fill)."
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"): shared = shared.parent  # of all workers
    def made(name, fill):
        folder = shared/f"once-{name}"
        with open(shared/f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder/"made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder/"made").touch()
        return folder
    return made


@pytest.fixture(scope="session")
def lend_library(made_once):
    "Put the library's pages where a site looks for them; they and the chart library are made once."
    import vl_convert
    from vfm_notes.report.site import build_reference, choose_renderer
    bundle = functools.cache(vl_convert.javascript_bundle)
    def fill(folder, renderer):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VFM_RUNS", str(folder/"runs"))
            build_reference(choose_renderer(renderer), lambda line: None)
    def lend(root, renderer="smalldocs"):
        library = made_once(f"library-{renderer}", lambda folder: fill(folder, renderer))
        return shutil.copytree(library/"pages"/"_reference", root/"pages"/"_reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", bundle)
        yield lend


@pytest.fixture(scope="session")
def toy_server(tmp_path_factory, request):
    "Address of one fork server for the toy studies of all tests and workers, which saves them their imports."
    from toy_batch import WHOLE
    from vfm_notes.runs.forkserver import ForkServer
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"): shared = shared.parent  # of all workers
    address = shared/"server-address"
    with open(shared/"server-turn", "w") as turn, open(shared/"server-users", "w") as users:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if address.exists():
            fcntl.flock(users, fcntl.LOCK_SH)
            fcntl.flock(turn, fcntl.LOCK_UN)
            yield address.read_text()
            return
        with ForkServer(WHOLE) as server:
            address.write_text(server.address)
            fcntl.flock(turn, fcntl.LOCK_UN)
            yield server.address
            fcntl.flock(turn, fcntl.LOCK_EX)  # nobody comes any more
            address.unlink()
            fcntl.flock(turn, fcntl.LOCK_UN)
            fcntl.flock(users, fcntl.LOCK_EX)  # those who came have gone


# ---- measured values for the report: VFM_EVIDENCE=nbs/report/real_weights.json python -m pytest
# tests/backbones/test_layouts.py tests/backbones/test_natural.py tests/backbones/test_real_weights.py

def pytest_configure(config): config.evidence = {}


@pytest.fixture
def evidence(request):
    "Keep what a test measured, by kind and name, when the test has got so far."
    def keep(kind, name, **values):
        request.config.evidence[f"{kind}: {name}"] = dict(
            kind=kind, name=name, **values, test=request.node.nodeid.split("[")[0]
        )
    return keep


def pytest_sessionfinish(session):
    path, found = os.environ.get("VFM_EVIDENCE"), session.config.evidence
    if not path or not found: return
    from vfm_notes.foundation.meter import device_name, package_versions
    made = dict(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"), device=device_name(),
        versions={k: v for k, v in package_versions().items() if k in ("python", "torch", "monai", "transformers")},
    )
    rows = {
        f"{r['kind']}: {r['name']}": r
        for r in (json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else [])
    }
    rows |= {k: r | made for k, r in found.items()}
    Path(path).write_text("[\n" + ",\n".join(json.dumps(rows[k]) for k in sorted(rows)) + "\n]\n", encoding="utf-8")
