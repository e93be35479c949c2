"""Names that become files and folders: one pattern, refused before the disk is touched, and no way out of runs/."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vfm_notes.foundation import places
from vfm_notes.foundation.registry import LONGEST, RESERVED_NAMES, make_name, check_name, name_problem
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import RunSpec, StudySpec, run_id
from vfm_notes.runs.grid import job_specs, jobs_of

BAD = [
    "", ".", "..", "cache", "a/b", "/etc", "../up", "a\\b", "a..b", ".hid", "-rf", "a b", "x" * (LONGEST + 1), "nul",
    "Con.txt", "x.", "notebooks", "é",
]
ALIEN = [None, 7, True, 1.5, ["a"], {"a": 1}]
STUDY = {
    "name": "small", "title": "A small study", "cohort": "phantom", "size": [8, 32, 32], "spacing": [6.0, 2.25, 2.25],
    "cases": {"pretrain": 8, "train": 8, "val": 4, "test": 8}, "pretrain": {"mae": {"backbone": "profound_toy"}},
    "backbones": ["profound_toy.mae"], "tasks": {"segmentation": {}}, "strategies": ["scratch", "full"], "seeds": [0],
}
FIELDS = {
    "name": lambda n: {"name": n}, "pretrain": lambda n: {"pretrain": {n: {"backbone": "profound_toy"}}},
    "task": lambda n: {"tasks": {n: {"task": "segmentation"}}},
    "backbone": lambda n: {"backbones": [f"profound_toy.{n}"]},
    "architecture": lambda n: {"pretrain": {"mae": {"backbone": n}}},
    "specialist": lambda n: {"specialists": {"segmentation": n}}, "page": lambda n: {"pages": [n]},
    "objective": lambda n: {"pretrain": {"mae": {"backbone": "profound_toy", "objective": n}}},
    "external task": lambda n: {"external": {"cohort": "x", "task": n}},
    "start": lambda n: {"pretrain": {"mae": {"backbone": "profound_toy", "start": f"profound_toy.{n}"}}},
}


def inside(path: Path, root: Path) -> bool:
    return path.resolve() != root.resolve() and path.resolve().is_relative_to(root.resolve())


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_elsewhere_is_refused_in_every_field(field, name):
    if name == "" and field in ("backbone", "start"): name = "../x"  # an architecture alone is one
    with pytest.raises(VfmError) as e: StudySpec(**STUDY | FIELDS[field](name))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400, str(e.value)


def can_hold(field: str, value) -> bool:
    "Can the value stand there at all? Not where it is joined to text, is a key, or may be a list."
    if field in ("pretrain", "task"): return not isinstance(value, (list, dict))
    return field not in ("backbone", "start") and (field, value) != ("architecture", ["a"])


@pytest.mark.parametrize("field, value", [(f, v) for f in FIELDS for v in ALIEN if can_hold(f, v)])
def test_what_is_no_text_is_no_name(field, value):
    with pytest.raises(VfmError) as e: StudySpec(**STUDY | FIELDS[field](value))
    assert "\n" not in str(e.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("ab./\\-~\0 \n:*", max_size=8))
def test_an_accepted_name_is_a_file_of_its_own_everywhere(name):
    root = Path("/some/runs")
    if name_problem(name): assert not name_problem(make_name(name))
    else:
        assert (
            inside(root / name, root)
            and (root / name).parent == root
            and name.isascii()
            and name.strip(" .") == name
            and name.casefold() not in RESERVED_NAMES
        )
        assert check_name(name, "name") == name


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20) | st.sampled_from([*BAD, "../../x", "a/../../../b"]))
def test_no_maker_of_paths_leaves_its_folder(name):
    makers = {
        places.runs_root: (
            places.study_root, lambda n: places.run_folder("s", n), lambda n: places.run_folder(n, "r"),
            lambda n: places.notebook_file("s", n), lambda n: places.log_file(n, "j"),
            lambda n: places.checkpoint_file("s", n),
        ),
        places.weights_root: (places.weights_file,),
    }
    for root, makes in makers.items():
        for make in makes:
            try: path = make(name)
            except VfmError: continue
            assert Path(os.path.normpath(path)) == path and path.is_relative_to(root()) and path != root(), (name, path)


def test_run_ids_are_names_of_folders_whatever_a_strategy_is_called():
    long = RunSpec(
        task="t" * LONGEST, backbone="a" * LONGEST + "." + "w" * LONGEST,
        strategy="lora " + " ".join(f"o{i}={i}.5" for i in range(9)),
    )
    assert (
        len(run_id(long)) <= 130
        and run_id(long) != run_id(RunSpec(**vars(long) | {"seed": 1}))
        and inside(places.run_folder("s", run_id(long)), places.study_root("s"))
    )
    outside = RunSpec(**vars(RunSpec()) | {"task": "../../etc"})  # a spec that went past the schema
    assert inside(places.run_folder("s", run_id(outside)), places.study_root("s"))


def test_an_external_cohort_of_any_name_gives_a_job_of_a_plain_one():
    job = jobs_of(StudySpec(**STUDY | {"external": {"cohort": "medmnist:some folder", "task": "segmentation"}}))[-1]
    assert job.kind == "external" and not set(job.name) - set("abcdefghijklmnopqrstuvwxyz0123456789_.-"), job.name


def test_a_notebook_run_by_hand_is_held_to_the_same_names():
    for wrong in (
        {"study": "../x"}, {"study": 3}, {"task": "a/b"}, {"backbone": "profound_toy.../x"}, {"strategies": [1]},
        {"seeds": [True]}, {"strategies": "full"}, {"epochs": 0}, {"lr": "1e-3"},
    ):
        with pytest.raises(VfmError, match="Parameters of the transfer template"):
            job_specs("transfer", **{"strategies": ["full"], "seeds": [0]} | wrong)


PROGRAM = """
import contextlib, io, sys, yaml
from vfm_notes.report import cli
names, study = map(eval, sys.argv[1:])
for name in names:
    open("study.yaml", "w").write(yaml.safe_dump(study | {"name": name}))
    for words in (["run", "--dry-run"], ["run"], ["status"], ["table"], ["site"], ["doctor"]):
        sys.argv, out, err = ["vfm", words[0], "study.yaml", *words[1:]], io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: cli.main(); code = 0
            except SystemExit as e: code = e.code
        told = err.getvalue().strip().splitlines()
        assert code == 2 and len(told) == 1 and told[0].startswith("vfm: study.yaml: name is "), (
            name, words, code, out.getvalue(), told,
        )
"""


def tree(root: Path) -> dict:
    "Everything below a folder: names, kinds, sizes, times."
    return {
        str(p.relative_to(root)): (p.is_dir(), p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in sorted(root.rglob("*"))
        if p.name != "study.yaml"
    }


def test_no_command_touches_the_disk_for_a_wrong_name(tmp_path):
    for folder in ("runs/cache/x", "runs/other/segmentation-x-1a2b3c4d", "pages/a", "_site", "elsewhere/notebooks"):
        (tmp_path/folder).mkdir(parents=True)
    for file in (
        "runs/cache/x/a.npy", "runs/other/segmentation-x-1a2b3c4d/record.json", "runs/other/mine.txt",
        "pages/a/b.ipynb", "_site/index.html", "elsewhere/notebooks/n.ipynb",
    ):
        (tmp_path/file).write_text("mine")
    (tmp_path/"study.yaml").touch()
    before = tree(tmp_path)
    names = [str(tmp_path/"elsewhere"), "/etc", "", ".", "..", "cache", "a/b", "../elsewhere", 3, None, ["a"]]
    env = os.environ | {
        "VFM_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(places.package_root().parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, repr(names), repr(STUDY)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree(tmp_path) == before


def test_init_gives_a_study_a_name_that_it_may_have(tmp_path):
    from vfm_notes.report.doctor import init_folder
    for folder in ("cache", "CON", "My study (2)", "..x", "ü", "x" * 90):
        path = init_folder(tmp_path/folder)[0]
        assert not name_problem(yaml.safe_load(path.read_text(encoding="utf-8"))["name"]), folder
