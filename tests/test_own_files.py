"""Looking changes nothing, and what was not made here is neither deleted nor replaced nor run."""
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import small_site
from test_records import cut, flip, snapshot
from toy_batch import Toy, hostile
from typer.testing import CliRunner

from vfm_notes.foundation.registry import VfmError
from vfm_notes.report import site
from vfm_notes.report.cli import app
from vfm_notes.report.stamp import read_stamp
from vfm_notes.runs.forkserver import python_path

LOOKS = (("status",), ("table",), ("run", "--dry-run"), ("run", "--dry-run", "--executor", "slurm"), ("doctor",),
         ("weights", "export", "profound_toy.mae_phantom"))


def look(toy: Toy, words: tuple) -> SimpleNamespace:
    "A command that only looks, on the toy's study: exit status and what it said."
    first = 2 if words[0] == "weights" else 1
    words = [*words[:first], str(toy.study), *words[first:]] + (["--templates", str(toy.templates)]
                                                                if words[0] == "run" else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toy.root)
        for k, v in {"VFM_RUNS": toy.runs, "VFM_WEIGHTS": toy.root/"weights"}.items(): patch.setenv(k, str(v))
        done = CliRunner().invoke(app, words)
    refused = isinstance(done.exception, VfmError)
    if done.exception and not refused and not isinstance(done.exception, SystemExit): raise done.exception
    return SimpleNamespace(returncode=2 if refused else done.exit_code, stdout=done.stdout,
                           stderr=done.stderr + str(done.exception or ""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_server):
    "A toy study that is done."
    toy = Toy(tmp_path_factory.mktemp("finished"), seeds=[0, 1])
    toy.server = toy_server
    done = toy.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return toy


@pytest.fixture
def spoilt(finished):
    "The same with two damaged records and with files of somebody else; mended afterwards."
    kept = finished.root/"kept"
    shutil.copytree(finished.runs, kept)
    own = finished.runs/"toy"
    a, b = sorted(finished.results())[1:3]
    cut(own/a/"record.json")
    flip(own/b/"curves.parquet")
    (own/"my notes").mkdir()
    (own/"my notes"/"a.txt").write_text("mine")
    (own/"figures-20240101").mkdir()
    (finished.runs/"paper").mkdir()
    yield finished, a, b
    shutil.rmtree(finished.runs)
    kept.rename(finished.runs)


def test_looking_changes_nothing_and_names_what_is_damaged(spoilt):
    toy, a, b = spoilt
    before = snapshot(toy.runs)
    for words in LOOKS:
        done = look(toy, words)
        assert snapshot(toy.runs) == before, (words, done.stderr)
        if words[0] in ("status", "table", "run"):
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("damaged ")]
            assert [line.split()[1].rstrip(":") for line in said] == [a, b], (words, done)
            assert all(
                line.endswith(f"; it counts as missing, 'vfm run {toy.study}' sets it aside and computes it again")
                for line in said
            ), (words, done)
            assert "curves.parquet has another content" in said[1]
        assert "my notes" not in done.stdout + done.stderr and "figures-2024" not in done.stdout + done.stderr


def test_a_run_mends_what_is_damaged_and_leaves_the_rest(spoilt):
    toy, a, b = spoilt
    whole = json.loads((toy.root/"kept"/"toy"/a/"record.json").read_text(encoding="utf-8"))["metrics"]
    done = toy.run()
    assert done.returncode == 0 and all(f"{i}.corrupt-1" in done.stderr for i in (a, b)), done.stderr
    assert toy.records()[a]["metrics"] == whole and len(toy.records()) == 5
    assert (toy.runs/"toy"/"my notes"/"a.txt").read_text() == "mine" and (toy.runs/"toy"/"figures-20240101").is_dir()
    assert (toy.runs/"paper").is_dir()
    assert "damaged" not in look(toy, ("status",)).stdout


def test_damaged_weights_are_not_exported_and_not_tuned(spoilt):
    toy = spoilt[0]
    id, = (p.name for p in (toy.runs/"toy").glob("pretrain-*"))
    flip(toy.runs/"toy"/id/"weights.safetensors", hidden=True)
    done = look(toy, ("weights", "export", "profound_toy.mae_phantom"))
    assert done.returncode == 2 and "weights.safetensors is damaged" in done.stderr
    assert not (toy.root/"weights").exists()


@contextmanager
def read_only(folder: Path):
    "A folder that nobody can write into, not even root."
    if os.getuid():
        for p in [folder, *folder.rglob("*")]: p.chmod(0o555 if p.is_dir() else 0o444)
    elif any(subprocess.run(["mount", *words, folder], capture_output=True).returncode
             for words in (("--bind", folder), ("-o", "remount,ro,bind"))):
        pytest.skip("a read-only mount needs more rights")
    try: yield
    finally:
        if not os.getuid(): subprocess.run(["umount", folder])
        else: [p.chmod(0o755) for p in [folder, *folder.rglob("*")]]


def test_where_nobody_may_write_looking_works(finished, monkeypatch):
    with read_only(finished.runs):
        with pytest.raises(OSError): (finished.runs/"x").touch()
        stand = "Study toy: 5 done of 5 runs"
        for words, told in zip(LOOKS[:3], (f"{stand}.\n", f"{stand}.\n", f"{stand}; nothing to run.\n")):
            done = look(finished, words)
            assert done.returncode == 0 and told in (done.stderr if words == ("table",) else done.stdout), (words, done)
        monkeypatch.setenv("VFM_RUNS", str(finished.runs))
        from vfm_notes.data.load import load_cohort
        assert len(load_cohort("phantom", (4, 16, 16), (4.0, 1.5, 1.5), {"test": 2}, 3)) == 2


def test_a_page_keeps_no_cohort(runs_root, monkeypatch):
    from vfm_notes.data.load import load_cohort
    ask = lambda: load_cohort("phantom", (4, 16, 16), (4.0, 1.5, 1.5), {"test": 2}, 3)
    monkeypatch.setenv("VFM_LOOKING", "1")
    first = ask().hash()
    assert not runs_root.exists()
    monkeypatch.delenv("VFM_LOOKING")
    assert ask().hash() == first and len(list((runs_root/"cache").iterdir())) == 1
    monkeypatch.setenv("VFM_LOOKING", "1")
    before = snapshot(runs_root)
    assert ask().hash() == first and snapshot(runs_root) == before


# ---- the site

PATCHED = ("report_pages", "build_reference", "write_assets", "study_findings", "made_from")  # by small_site

@pytest.fixture
def few(tmp_path, monkeypatch):
    "Two studies with sites of two pages."
    for name in PATCHED: monkeypatch.setattr(site, name, getattr(site, name))  # as they were, afterwards
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    small_site.few_pages()
    return [small_site.write_study(tmp_path, n) for n in ("a", "b")]


def test_a_site_that_was_not_made_here_stays(tmp_path, few):
    home = tmp_path/"_site"
    home.mkdir()
    (home/"index.html").write_text("my homepage")
    with pytest.raises(VfmError, match=r"_site was not made by 'vfm site' \(it holds index.html\): move it away or "
                                        "delete it"): small_site.build(few[0])
    assert (home/"index.html").read_text() == "my homepage"
    (home/"index.html").unlink()
    small_site.build(few[0])
    (home/"CNAME").write_text("example.org")
    (home/"img").mkdir()
    (home/"img"/"own.png").write_text("mine")
    made = small_site.build(few[1])
    assert (home/"CNAME").read_text() == "example.org" and (home/"img"/"own.png").read_text() == "mine"
    assert "study b" in made.path.read_text(encoding="utf-8")
    made.path.write_text("edited by hand")
    with pytest.raises(VfmError, match=r"index.html was changed after 'vfm site' made it: move it away or delete "
                                        "it"): small_site.build(few[0])
    assert made.path.read_text() == "edited by hand"
    made.path.unlink()
    assert "study a" in small_site.build(few[0]).path.read_text(encoding="utf-8") and (home/"CNAME").exists()


def test_pages_that_were_not_made_here_stay(tmp_path, few):
    own = tmp_path/"pages"/"a"
    own.mkdir(parents=True)
    (own/"draft.ipynb").write_text("{}")
    with pytest.raises(VfmError, match="pages/a was not made by 'vfm site'"): small_site.build(few[0])
    (own/"draft.ipynb").rename(tmp_path/"draft.ipynb")
    small_site.build(few[0])
    shutil.copy(tmp_path/"draft.ipynb", own/"draft.ipynb")
    small_site.write_study(tmp_path, "a", title="changed")
    with pytest.raises(VfmError, match="draft.ipynb was not made by 'vfm site' and would become a "
                                       "page"): small_site.build(few[0])
    assert (own/"draft.ipynb").read_text() == "{}"
    (own/"draft.ipynb").unlink()
    (own/"todo.txt").write_text("mine")
    small_site.build(few[0])
    edited = own/"guide_batch.ipynb"
    edited.write_text(edited.read_text(encoding="utf-8") + " ")
    small_site.write_study(tmp_path, "a", title="changed again")
    with pytest.raises(VfmError, match="guide_batch.ipynb was changed after"): small_site.build(few[0])
    edited.unlink()
    real = site.report_pages
    site.report_pages = lambda *words: [p for p in real(*words) if p.name == "index"]  # one page less: it was ours
    assert small_site.build(few[0]).pages == 1 and not edited.exists() and (own/"todo.txt").read_text() == "mine"
    assert not (tmp_path/"_site"/"guide_batch.html").exists()


@pytest.mark.parametrize("other", ["a", "b"])
def test_two_sites_at_once_one_waits(tmp_path, few, other):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([python_path(), str(Path(__file__).parent)])}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    start = lambda name, *hold: subprocess.Popen(
        [sys.executable, small_site.__file__, str(tmp_path / f"{name}.yaml"), *hold], env=env, text=True, **pipes
    )
    first = start("a", "hold")
    assert first.stdout.readline() == "rendering\n"
    second = start(other)
    told = next(line for line in second.stderr if "at work" in line)
    assert "Another 'vfm site' is at work" in told and "this one waits" in told and second.poll() is None
    assert first.communicate("go on\n", timeout=300) and first.returncode == 0
    said = second.communicate(timeout=300)
    assert second.returncode == 0 and said[0].splitlines()[-1] == ("up to date" if other == "a" else "made"), said
    assert read_stamp(tmp_path/"_site"/"stamp.json")["study"] == other


def test_a_site_names_what_is_damaged(spoilt, monkeypatch):
    toy, a, b = spoilt
    for name in PATCHED: monkeypatch.setattr(site, name, getattr(site, name))  # as they were, afterwards
    monkeypatch.setenv("VFM_RUNS", str(toy.runs))
    small_site.few_pages()
    c = max(p.name for p in (toy.runs/"toy").glob("*-n4-s*"))
    flip(toy.runs/"toy"/c/"cases.parquet", hidden=True)
    before = snapshot(toy.runs)
    made = small_site.build(str(toy.study))
    assert snapshot(toy.runs) == before and [p.split()[1].rstrip(":") for p in made.problems] == [a, b, c]


# ---- other files that a command is told to write

def test_a_table_replaces_only_a_table(finished, tmp_path):
    for ending in ("csv", "json", "parquet"):
        file = tmp_path/f"own.{ending}"
        file.write_text("age,sex\n61,f\n")
        done = look(finished, ("table", "-o", str(file)))
        assert done.returncode == 2 and "is no table of runs" in done.stderr, done.stderr
        assert file.read_text() == "age,sex\n61,f\n", done.stderr
        file.unlink()
        for _ in range(2): assert look(finished, ("table", "-o", str(file))).returncode == 0
    assert not list(tmp_path.glob(".*"))
    assert look(finished, ("table", "-o", str(tmp_path/"new"/"a.csv"))).returncode == 0
    assert (tmp_path/"new"/"a.csv").is_file()


# ---- modules that lie in the working folder

def test_an_empty_part_of_the_path_is_left_out(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"/a{os.pathsep}{os.pathsep}/b{os.pathsep}")
    assert "" not in python_path().split(os.pathsep) and python_path().endswith(f"/a{os.pathsep}/b")


def test_hostile_modules_do_something_where_they_are_run(tmp_path):
    mark = hostile(tmp_path)
    subprocess.run([sys.executable, "-m", "ipykernel_launcher", "--version"], cwd=tmp_path, capture_output=True)
    assert "ipykernel_launcher" in mark.read_text()


@pytest.mark.parametrize("engine", ["forked", "plain"])
def test_what_lies_beside_a_study_is_not_run(tmp_path, engine):
    toy = Toy(tmp_path, seeds=[0], strategies=["scratch"])
    mark = hostile(tmp_path)
    done = toy.run("--engine", engine)
    assert done.returncode == 0 and len(toy.results()) == 2, done.stdout + done.stderr
    assert toy.vfm("status", str(toy.study)).returncode == 0 and not mark.exists(), mark.read_text()


def test_pages_do_not_run_what_lies_beside_a_study(tmp_path):
    mark = hostile(tmp_path)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c)
                                         for c in ("import random, altair, yaml, json, os, sys",
                                                   "print('' in sys.path, random.random() < 1, "
                                                   "[f for f in os.listdir() if 'kernel-ipc' in f])")])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path/"page.ipynb")
    code = ("import sys; from pathlib import Path; from vfm_notes.report.pages import Page, execute_pages; "
            "told = lambda page, nb, error: print(error, nb['cells'][-1]['outputs'][0]['text']); "
            "execute_pages([Page('p', Path(sys.argv[1]), {}, '')], 'phantom', told)")
    script = tmp_path.parent/f"{tmp_path.name}.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script, str(tmp_path/"page.ipynb")], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": python_path()}, capture_output=True, text=True)
    assert done.stdout.strip() == "False True []", (
        done.stdout + done.stderr + (mark.read_text() if mark.exists() else "")
    )
    assert not mark.exists(), done.stdout + done.stderr + (mark.read_text() if mark.exists() else "")
