"""Code of one's own in a study, from a plain folder: the examples of CONTRIBUTING.md, mistakes, and what is kept."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vfm_notes.foundation.plugins import LOADED, load_plugins
from vfm_notes.foundation.registry import VfmError, strategies
from vfm_notes.foundation.spec import RunSpec, canonical_text, load_study, run_id, run_specs

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S
)
NAMES = [re.search(r"@(\w+)\(\"(\w+)\"", e).groups() for e in EXAMPLES]
VFM = [sys.executable, "-c", "from vfm_notes.report.cli import main; main()"]
STUDY = {
    "name": "own", "title": "Own code", "cohort": "bright_block", "size": [4, 32, 32], "spacing": [8.0, 3.0, 3.0],
    "cases": {"pretrain": 4, "train": 4, "val": 4, "test": 4}, "backbones": ["plain_3d.mine"],
    "pretrain": {"mine": {"backbone": "plain_3d", "objective": "denoise", "epochs": 1, "probe_every": 0}},
    "tasks": {"denoising": {}}, "strategies": ["scratch", "head_only"], "seeds": [0], "divergences": ["largest_shift"],
    "budget": {"epochs": 1},
}


def vfm(folder, *args, **env):
    kept = {k: v for k, v in os.environ.items() if k not in ("VFM_DATA", "VFM_FORKSERVER", "PYTHONPATH")}
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [*VFM, *args], cwd=folder, capture_output=True, text=True,
        env=kept | {"VFM_RUNS": str(folder / "runs"), "PYTHONPATH": root} | env,
    )


def write_study(folder, **changes):
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False), encoding="utf-8")
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory, toy_server):
    "Each example in a file of its own, in a folder that `vfm init` made."
    folder = tmp_path_factory.mktemp("plain")/"mine"
    made = vfm(folder.parent, "init", "mine")
    assert made.returncode == 0, made.stderr
    files = {f"my_{kind}.py": text for (kind, _), text in zip(NAMES, EXAMPLES)}
    for name, text in files.items(): (folder/name).write_text(text, encoding="utf-8")
    write_study(folder, plugins=list(files))
    shown = vfm(folder, "run", "study.yaml", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    ran = vfm(folder, "run", "study.yaml", VFM_FORKSERVER=toy_server)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, shown.stdout, ran.stdout


def records(folder):
    return [json.loads(p.read_text(encoding="utf-8")) for p in (folder/"runs"/"own").glob("*/record.json")]


def test_the_examples_run_from_a_plain_folder(done):
    folder, _, said = done
    found = records(folder)
    assert {r["status"] for r in found} == {"done"} and len(found) == 3, said
    tuned = next(r for r in found if r["spec"].get("strategy") == "head_only")
    assert tuned["spec"]["task"] == "denoising" and tuned["spec"]["backbone"] == "plain_3d.mine"
    assert any("largest_shift" in json.dumps(row) for row in tuned["d2p"])
    assert 0 < tuned["cost"]["parameters"]["trainable"] < tuned["cost"]["parameters"]["total"]


def test_the_record_holds_the_checksums_and_the_code_is_kept(done):
    import hashlib
    folder, *_ = done
    for record in records(folder):
        assert list(record["spec"]["plugins"].items()) == [  # in the order in which they are run
            (f"my_{kind}.py", hashlib.sha256((folder/f"my_{kind}.py").read_bytes()).hexdigest()) for kind, _ in NAMES
        ]
        for name, code in record["spec"]["plugins"].items():
            kept = folder/"runs"/"own"/"plugins"/code[:16]/name
            assert kept.read_bytes() == (folder/name).read_bytes()


@pytest.mark.parametrize("kind, name", NAMES)
def test_a_dry_run_states_whose_code_runs(done, kind, name):
    line = next(l for l in done[1].splitlines() if f"my_{kind}.py" in l)
    assert line.startswith("This study runs code from ") and name in line.partition(":")[2]
    assert f"This study runs code from {done[0]/f'my_{kind}.py'}" in done[2]


def test_other_code_means_other_runs_wherever_the_file_lies(tmp_path):
    def ids(folder):
        folder.mkdir(exist_ok=True)
        path = write_study(folder, plugins=["code.d/mine.py"], cohort="phantom", backbones=["profound_toy.random"],
                           pretrain={})
        return [run_id(s) for s in run_specs(load_study(path))]
    for name in ("a", "b"):
        (tmp_path/name/"code.d").mkdir(parents=True)
        (tmp_path/name/"code.d"/"mine.py").write_text("x = 1\n", encoding="utf-8")
    first = ids(tmp_path/"a")
    assert ids(tmp_path/"b") == first
    (tmp_path/"a"/"code.d"/"mine.py").write_text("x = 2\n", encoding="utf-8")
    assert not set(ids(tmp_path/"a")) & set(first)
    assert "plugins" not in canonical_text(RunSpec())  # none: as ever


MISTAKES = {
    "syntax": ("x = 1\ndef f(:\n    pass\n", "code_of_mine.py, line 2"),
    "import": ("import no_such_module_here\n", "code_of_mine.py, line 1"),
    "taken": ("from vfm_notes.foundation.registry import strategies\n\n@strategies('before_it')\n"
              "def before_it(m): pass\n\n@strategies('full')\ndef full(m): pass\n",
              "the strategy 'full', which exists"),
    "taken by another name": ("from vfm_notes.foundation.registry import strategies\n\n@strategies('full')\n"
                              "def mine(m): pass\n", "code_of_mine.py, line 3"),
    "deep": ("def f(): return 1 / 0\n\n\nf()\n", "code_of_mine.py, line 1"),
    "half way": ("from vfm_notes.foundation.registry import strategies\n\nstrategies('before_it')(print)\n1 / 0\n",
                 "code_of_mine.py, line 4"),
}


@pytest.mark.parametrize("which", MISTAKES)
def test_a_mistake_is_told_with_file_and_line(tmp_path, which):
    import vfm_notes.tune.catalog
    text, wanted = MISTAKES[which]
    (tmp_path/"code_of_mine.py").write_text(text, encoding="utf-8")
    study, before = load_study(write_study(tmp_path, plugins=["code_of_mine.py"])), strategies["full"]
    names, card = list(strategies), dict(strategies.card("full"))
    with pytest.raises(VfmError, match=re.escape(wanted)): load_plugins(study.plugins)
    assert strategies["full"] is before and "code_of_mine" not in LOADED
    assert strategies.card("full") == card and card["pretrained"] and list(strategies) == names


@pytest.mark.parametrize("written, wanted", [
    ("my_code.py", "expected a list"), (["gone.py"], "does not exist"), (["no_such_module"], "no installed module"),
    (["json.py"], "also an installed module"), (["a/same.py", "b/same.py"], "two modules 'same'"),
    (["9.py"], "cannot be the name of a module"), ([3], "expected a list"),
])
def test_what_a_study_may_name(tmp_path, written, wanted):
    for name in ("json.py", "a/same.py", "b/same.py", "9.py"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    with pytest.raises(VfmError, match=re.escape(wanted)) as error:
        load_study(write_study(tmp_path, plugins=written))
    assert "study.yaml" in str(error.value)


def test_a_package_an_installed_module_and_a_group_of_entry_points(tmp_path, monkeypatch):
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"lab_strategies.py").write_text(
        "from vfm_notes.foundation.registry import strategies\n\n@strategies('of_the_lab')\n"
        "def of_the_lab(model): pass\n",
        encoding="utf-8",
    )
    info = tmp_path/"site"/"lab-1.0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n", encoding="utf-8")
    (info/"entry_points.txt").write_text("[lab.plugins]\nours = lab_strategies\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path/"site")
    (tmp_path/"pack").mkdir()
    (tmp_path/"pack"/"__init__.py").write_text("from .inner import value\n", encoding="utf-8")
    (tmp_path/"pack"/"inner.py").write_text("value = 1\n", encoding="utf-8")
    study = load_study(write_study(tmp_path, plugins=["lab.plugins", "pack"]))
    assert list(study.plugins) == ["lab_strategies", str(tmp_path/"pack")]
    assert load_plugins(study.plugins)[0].entries == ("strategy of_the_lab",)
    assert sys.modules["pack"].value == 1
    (tmp_path/"pack"/"inner.py").write_text("value = 2\n", encoding="utf-8")
    again = load_study(write_study(tmp_path, plugins=["lab.plugins", "pack"]))
    assert again.plugins["lab_strategies"] == study.plugins["lab_strategies"]
    assert again.plugins[str(tmp_path/"pack")] != study.plugins[str(tmp_path/"pack")]
    load_plugins(again.plugins)
    assert sys.modules["pack"].value == 2
    assert load_study(write_study(tmp_path, plugins=["lab_strategies"])).plugins.keys() == {"lab_strategies"}


def test_code_that_changes_in_the_middle_of_a_batch_is_that_of_its_beginning(tmp_path, monkeypatch):
    from vfm_notes.foundation.plugins import keep_plugins
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    (tmp_path/"mid_batch.py").write_text("value = 1\n", encoding="utf-8")
    study = load_study(write_study(tmp_path, plugins=["mid_batch.py"]))
    keep_plugins(study.plugins, "own")
    (tmp_path/"mid_batch.py").write_text("value = 2\n", encoding="utf-8")
    with pytest.raises(VfmError, match="as it was when its study was run"): load_plugins(study.plugins)
    load_plugins(study.plugins, "own")
    assert sys.modules["mid_batch"].value == 1
    sys.modules.pop("mid_batch"), LOADED.pop("mid_batch")
    load_plugins({Path(k).name: v for k, v in study.plugins.items()}, "own")  # as a record has it
    assert sys.modules["mid_batch"].value == 1


def test_a_plugin_that_fails_when_it_is_tried_is_a_sentence_with_file_and_line(tmp_path):
    from vfm_notes.runs.grid import jobs_of
    from vfm_notes.runs.notebook import known_conflicts
    (tmp_path/"broken_code.py").write_text(
        "from vfm_notes.foundation.registry import strategies\n\n@strategies('broken', title='b', pretrained=False)\n"
        "def broken(model):\n    model.absent_part.x()\n", encoding="utf-8",
    )
    study = load_study(write_study(
        tmp_path, plugins=["broken_code.py"], cohort="phantom", backbones=["profound_toy.random"], pretrain={},
        divergences=[], strategies=["broken"], tasks={"segmentation": {}},
    ))
    found = known_conflicts(study, jobs_of(study))
    assert len(found) == 1 and found[0].startswith("broken_code.py, line 5 (a plugin"), found


def test_a_failure_of_a_run_is_recorded_with_the_line_of_the_plugin(tmp_path):
    from vfm_notes.runs.record import failed_record
    (tmp_path/"late_code.py").write_text("def late():\n    return [][0]\n", encoding="utf-8")
    load_plugins(load_study(write_study(tmp_path, plugins=["late_code.py"])).plugins)
    try: sys.modules["late_code"].late()
    except IndexError as error: record = failed_record(RunSpec(), "own", error)
    assert record["error"]["message"] == "list index out of range (late_code.py, line 2)"


# ---- networks that were trained with own code


def scan(folder):
    "A volume on the grid of the study, by nibabel."
    import nibabel as nib
    import numpy as np
    affine, values = np.diag([-3.0, -3, 8, 1]), np.random.default_rng(2).normal(5, 2, (32, 32, 4)).astype("float32")
    nib.save(nib.Nifti1Image(values, affine), folder/"new.nii.gz")
    return str(folder/"new.nii.gz")


@pytest.fixture(scope="module")
def elsewhere(done, tmp_path_factory):
    "The runs of `done` at another place, a scan, and an empty folder of runs; the code is not here."
    import shutil
    root = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(done[0]/"runs"/"own", root/"kept"/"own", copy_function=shutil.copy2)
    run = next(p for p in (root/"kept"/"own").glob("denoising*head_only*"))
    return root, run, scan(root)


def test_a_run_with_own_code_answers_with_the_copy_beside_it(elsewhere):
    root, run, given = elsewhere
    made = vfm(root, "predict", str(run), given, "-o", "out")
    assert made.returncode == 0, made.stderr
    kept = {p.name: p for p in run.parent.glob("plugins/*/*.py")}
    code = kept["my_backbones.py"]
    assert f"The network runs code from {code} (checksum {code.parent.name[:12]}" in made.stdout
    assert (root/"out"/"new_denoising.nii.gz").is_file()


def test_code_that_is_gone_or_changed_is_told_and_is_named_by_hand(done, elsewhere):
    import shutil
    root, run, given = elsewhere
    alone = shutil.copytree(run, root/"alone"/"own"/run.name, copy_function=shutil.copy2)
    gone = vfm(root, "predict", str(alone), given, "-o", "gone")
    assert gone.returncode == 2 and "as it was when its study was run (checksum " in gone.stderr
    assert f"there is no {root/'my_strategies.py'}" in gone.stderr and "--plugin FILE" in gone.stderr
    (root/"my_strategies.py").write_text((done[0]/"my_strategies.py").read_text() + "# later\n", encoding="utf-8")
    changed = vfm(root, "predict", str(alone), given, "-o", "gone")
    (root/"my_strategies.py").unlink()
    assert changed.returncode == 2 and f"{root/'my_strategies.py'} has changed since" in changed.stderr
    named = [w for p in sorted(done[0].glob("my_*.py")) for w in ("--plugin", str(p))]
    made = vfm(root, "predict", str(alone), given, "-o", "named", *named)
    assert made.returncode == 0, made.stderr
    assert f"The network runs code from {done[0]/'my_strategies.py'}" in made.stdout


def test_an_exported_network_carries_its_code_and_runs_it_when_told(elsewhere):
    root, run, given = elsewhere
    made = vfm(root, "weights", "export", str(run), "-o", "exported")
    assert made.returncode == 0 and "MODEL_CARD.md, code" in made.stdout, made.stderr
    codes = sorted((root/"exported"/"code").iterdir())
    assert [c.name for c in codes] == sorted(p.name for p in run.parent.glob("plugins/*/*.py"))
    refused = vfm(root, "predict", "exported", given, "-o", "no")
    assert refused.returncode == 2 and "was trained with code of its study" in refused.stderr
    assert "read exported/code/" in refused.stderr and "write --plugin exported/code/" in refused.stderr
    named = [w for c in codes for w in ("--plugin", str(c))]
    done = vfm(root, "predict", "exported", given, "-o", "yes", *named)
    assert done.returncode == 0 and (root/"yes"/"new_denoising.nii.gz").is_file(), done.stderr


def test_a_study_whose_code_has_changed_names_a_run_that_keeps_it(done):
    folder = done[0]
    text = folder/"my_divergences.py"
    before = text.read_text(encoding="utf-8")
    text.write_text(before + "# later\n", encoding="utf-8")
    made = vfm(folder, "predict", "study.yaml", "x.nii.gz", "-o", "out")
    text.write_text(before, encoding="utf-8")
    assert made.returncode == 2 and "No run of study own was made with" in made.stderr
    assert f"name a run, which keeps its code, e.g. {folder/'runs'/'own'}" in made.stderr
