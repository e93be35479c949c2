"""Killed at a random moment while it writes: afterwards the same command gives the same files."""
import os
import random
import signal
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vfm_notes.runs.forkserver import python_path
from vfm_notes.foundation.places import pid_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and signals as on Linux")
ROUNDS = 12  # kills of each kind

PARENT = '''
import os, sys, time
from pathlib import Path
root = Path(os.environ["VFM_RUNS"]).parent
{prepare}
print("ready", flush=True)
for line in sys.stdin:  # a child that works without end, to be killed
    pid = os.fork()
    if not pid:
        os.close(0)
        k = int(line) * 1000
        while True:
            k += 1
            work(k)
    print(pid, flush=True)
'''
KINDS = {
    "weights": ('''
import torch
from vfm_notes.backbones import weights as w
folder, name = Path(os.environ["VFM_WEIGHTS"]), "net.test"
folder.mkdir()
torch.save({f"l{i}": torch.ones(40_000) * i for i in range(12)}, folder/"net.pth")
card = dict(title="a test", licence="MIT", source="a page", file="net.pth", sha256=w.file_digest(folder/"net.pth"))
w.weights(name, **card)(lambda state: state)
def work(k):
    made = w.converted_file(name)
    if made.exists(): made.rename(folder/f"before-{k % 3}.safetensors")
    w.fetch_weights(name)
work(0)
''', 0.2),
    "cache": ('''
from vfm_notes.data.load import load_cohort
from vfm_notes.data.load import cache_root
from vfm_notes.runs.locks import remove_stale_cache
load_cohort("phantom", (4, 16, 16), (4.0, 1.5, 1.5), {"test": 2}, 999)
def work(k): load_cohort("phantom", (4, 16, 16), (4.0, 1.5, 1.5), {"test": 2}, k % 5)
''', 0.4),
    "site": ('''
import small_site
small_site.few_pages()
studies = [small_site.write_study(root, n) for n in ("a", "b")]
for s in studies: small_site.build(s)
def work(k): small_site.build(studies[k % 2])
''', 0.8)}


def environment(root: Path) -> dict:
    "Runs below a folder, and the tests' own modules."
    return os.environ | {
        "VFM_RUNS": str(root / "runs"), "PYTHONPATH": os.pathsep.join([python_path(), str(Path(__file__).parent)]),
    }


@pytest.fixture
def killed(tmp_path):
    "Kill workers of a kind, one after the other; hands back how many were at work when it came."
    env = environment(tmp_path) | {"VFM_WEIGHTS": str(tmp_path/"weights"), "OMP_NUM_THREADS": "1"}
    def run(kind: str, after_each, enough=lambda: True) -> None:  # on a busy machine it takes more and later kills
        prepare, longest = KINDS[kind]
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(prepare=prepare)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1, env=env, cwd=tmp_path,
        )
        rng = random.Random(kind)
        try:
            assert parent.stdout.readline() == "ready\n"
            for turn in range(20 * ROUNDS):
                if turn >= ROUNDS and enough(): break
                parent.stdin.write(f"{turn}\n")
                pid = int(parent.stdout.readline())
                time.sleep(rng.uniform(0, longest * (1 + turn // ROUNDS)))
                os.kill(pid, signal.SIGKILL)
                while pid_alive(pid): time.sleep(0.001)
                after_each()
        finally: parent.kill(), parent.communicate()
    return run


def test_weights_are_whole_or_absent(killed, tmp_path, monkeypatch):
    from safetensors.numpy import load_file
    folder, seen = tmp_path/"weights", set()
    def whole():
        for path in folder.glob("[!.]*.safetensors"):
            assert {k: float(v.mean()) for k, v in load_file(path).items()} == {f"l{i}": float(i) for i in range(12)}
            seen.add((path.name, path.stat().st_mtime_ns))
    killed("weights", whole, lambda: len(seen) > 3)
    assert len(seen) > 3  # many were written
    known = {"net.pth", "net.test.safetensors", *(f"before-{k}.safetensors" for k in range(3))}
    assert {p.name for p in folder.glob("[!.]*")} <= known


def test_prepared_cohorts_are_whole_or_made_again(killed, tmp_path, monkeypatch):
    import numpy as np

    from vfm_notes.data.load import load_cohort
    from vfm_notes.runs.locks import remove_stale_cache
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"undisturbed"/"runs"))
    ask = lambda k: load_cohort("phantom", (4, 16, 16), (4.0, 1.5, 1.5), {"test": 2}, k)
    undisturbed = {k: np.array(ask(k).volumes) for k in range(5)}
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    killed("cache", lambda: None)
    remove_stale_cache()
    assert not list((tmp_path/"runs"/"cache").glob(".*"))
    for k, volumes in undisturbed.items(): assert (ask(k).volumes == volumes).all()
    assert len(list((tmp_path/"runs"/"cache").iterdir())) == 6


def test_a_site_is_whole_or_the_old_one(killed, tmp_path, monkeypatch):
    import small_site
    from vfm_notes.report.stamp import replacement_names, changed_files, files_of, read_stamp
    site = tmp_path/"_site"
    def whole():
        there = site if site.exists() else replacement_names(site)[1]  # between two renames
        stamp = read_stamp(there/"stamp.json")
        assert stamp["study"] in "ab" and not changed_files(there, stamp["files"])
        assert files_of(there) == sorted(stamp["files"])
    killed("site", whole)
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    undisturbed = tmp_path/"undisturbed"
    undisturbed.mkdir()
    code = "import sys, small_site; small_site.few_pages(); small_site.build(sys.argv[1])"
    for root in (undisturbed, tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"a.yaml")], env=environment(root), cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert small_site.content(tmp_path) == small_site.content(undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_site", "a.yaml", "b.yaml", "pages", "undisturbed"]


def test_pages_whose_rendering_was_killed_are_rendered_again(tmp_path, monkeypatch):
    "What a kill leaves of the pages before the renderer wrote what it knows a site by."
    import small_site
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    study = small_site.write_study(tmp_path, "a")
    code = "import sys, small_site; small_site.few_pages(); small_site.build(sys.argv[1])"
    def build():
        return subprocess.run([sys.executable, "-c", code, str(tmp_path/"a.yaml")], env=environment(tmp_path),
                              cwd=tmp_path, capture_output=True, text=True)
    assert study and build().returncode == 0
    known = small_site.content(tmp_path)
    shutil.rmtree(tmp_path/"pages"/"a"/"_site"/"site_libs")
    shutil.rmtree(tmp_path/"_site")
    again = build()
    assert again.returncode == 0, again.stderr
    assert small_site.content(tmp_path) == known


def test_a_stamp_whose_writing_was_killed_is_tidied_up(tmp_path):
    "What the kill left is one unfinished file; a folder with anything else is left alone."
    from vfm_notes.foundation.registry import VfmError
    from vfm_notes.report.stamp import replacement_names, finish_replacement
    new, _ = replacement_names(tmp_path/"_site")
    new.mkdir()
    (new/".stamp.json.host.1.part").write_text("{")
    finish_replacement(tmp_path/"_site")
    assert not new.exists()
    new.mkdir()
    for name in (".stamp.json.host.1.part", "notes.txt"): (new/name).write_text("{")
    with pytest.raises(VfmError, match="was not made by 'vfm site'"): finish_replacement(tmp_path/"_site")
    assert (new/"notes.txt").is_file()
