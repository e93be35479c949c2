"""The tool of `make mutants`: named changes are found by their words, whatever the lines of the library are."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "mutants"))

from named import EQUIVALENT, NAMED
from operators import mutants, places, words
from run import ROOT, Worker, excuse, key, made_mutants, named_mutants, stale

ONE_LINE = """
def f(a, b):
    if a: return dict(x="é", low=np.mean(a - b, axis=0))  # why, "so"
"""
MANY_LINES = """
def f(a, b):
    if a:
        # other words
        return dict(
            x='é',  # a - b
            low=np.mean(
                a - b,
                axis=0,
            ),
        )
"""


@pytest.mark.parametrize("code", [ONE_LINE, MANY_LINES])
def test_a_place_is_found_however_the_lines_are_broken(code):
    found = places("if a: return dict(x='é', low=np.mean(a - b", words(code))
    [(start, end)] = found
    text = code.encode()[start:end].decode()
    assert text.startswith("if a:") and text.endswith("a - b") and text.count("a - b") == code.count("a - b")
    [(start, end)] = places('np.mean(a - b, axis=0))', words(code))
    assert code.encode()[start : start + 7] == b"np.mean" and code.encode()[end - 1 : end] == b")"
    assert not places("np.mean(b - a", words(code)) and not places("p.mean", words(code))


def test_a_comment_is_no_place():
    assert not places("other words", words(MANY_LINES)) and not places("why", words(ONE_LINE))


def test_a_judgement_outlives_new_lines_and_another_module(tmp_path, monkeypatch):
    import run
    monkeypatch.setattr(run, "ROOT", tmp_path)
    keys = []
    for name, code in {"one.py": ONE_LINE, "two.py": "import numpy as np\n" + MANY_LINES}.items():
        (tmp_path/"vfm_notes"/"p").mkdir(parents=True, exist_ok=True)
        (tmp_path/"vfm_notes"/"p"/name).write_text(code)
        keys.append({m.what: key(m) for m in mutants(tmp_path/"vfm_notes", f"p/{name}")})
    one, two = keys
    assert one == two and len(set(one.values())) == len(one) >= 4 and "- to +" in one


def test_every_named_change_is_in_the_library_and_is_code():
    assert len(named_mutants()) == len(NAMED) == len({m.what for m in named_mutants()})


def test_an_excuse_is_for_one_change():
    [(package, then)] = [k for k in EQUIVALENT if "expand_as" in k[1]]
    excused = [m for m in mutants(ROOT/"vfm_notes", "tune/image_task.py") if excuse(m) == (package, then)]
    assert [m.what for m in excused] == ["keepdim=True changed"]


def test_a_draw_is_the_same_again_and_has_every_kind():
    drawn = made_mutants(("shift",), 20, 0)
    assert drawn == made_mutants(("shift",), 20, 0) and len(set(drawn)) == 20
    assert {m.module.split("/")[0] for m in drawn} == {"shift"} and len({m.kind for m in drawn}) >= 5


def test_a_judgement_ends_with_the_test_that_made_it(tmp_path, monkeypatch):
    import run
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path/"test_a.py").write_text("class TestIt:\n    def test_one(self): ...\ndef test_two(): ...\n")
    def killed(by): return {"end": "killed", "by": by, "tests": "x"}
    for by in ("test_a.py::test_two", "test_a.py::test_two[a::b]", "test_a.py::TestIt::test_one", "too slow", "exit 3"):
        assert not stale(killed(by), lambda: "y"), by
    for by in ("test_a.py::test_three", "test_b.py::test_two", "test_a.py::test_tw"): assert stale(killed(by), str), by
    survivor = {"end": "survived", "by": "", "tests": "x"}
    assert stale(survivor, lambda: "y") and not stale(survivor, lambda: "x")


def fake_worker(program: str, tmp_path: Path) -> Worker:
    "A worker whose process is some other program."
    worker = Worker.__new__(Worker)
    worker.folder, worker.read = tmp_path, b""
    worker.process = subprocess.Popen(
        [sys.executable, "-c", program], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return worker


def test_lines_that_come_together_are_read_one_by_one(tmp_path):
    worker = fake_worker("import os, time; os.write(1, b'pid 5\\ngroup 7\\nend 0\\n'); time.sleep(600)", tmp_path)
    with worker.process as process:
        assert worker.answer(60) == ("pid", "5") and [worker.answer(0) for _ in range(3)] == [
            ("group", "7"), ("end", "0"), None]
        process.kill()


def test_time_counts_from_the_fork_and_only_the_fork_is_killed(tmp_path):
    "A process that is still importing has told no number, and group 0 is the tool's own."
    program = """import subprocess, sys, time
sys.stdin.readline()
time.sleep(1)
p = subprocess.Popen(['sleep', '600'], start_new_session=True)
print('pid', p.pid, flush=True)
print('end', p.wait(), flush=True)
"""
    worker = fake_worker(program, tmp_path)
    with worker.process: assert worker.run(0.01, look={}) is None
