"""The real command: exit status, one sentence on stderr, nothing half written."""
import os
import subprocess
import sys

import pandas as pd
import pytest
from toy_batch import Toy, vfm, write_template

from vfm_notes.foundation.spec import load_study
from vfm_notes.runs.forkserver import python_path
from vfm_notes.runs.grid import parameter_names


@pytest.fixture
def toy(tmp_path, toy_server) -> Toy:
    toy = Toy(tmp_path)
    toy.server = toy_server
    return toy


def refused(done: subprocess.CompletedProcess, *words: str) -> str:
    "The one sentence of a refusal."
    assert done.returncode == 2, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == 1 and said[0].startswith("vfm: ") and "Traceback" not in said[0], done.stderr
    for word in words: assert word in said[0], said[0]
    return said[0]


HEAVY = ("torch", "monai", "pandas", "papermill", "numpy")


def test_help_is_light():
    "Nothing that takes long to import is imported, neither for help nor for the runner."
    code = f"import sys, atexit; atexit.register(lambda: print('heavy:', [m for m in {HEAVY} if m in sys.modules])); "
    env = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", code + "from vfm_notes.report.cli import main; sys.argv = ['vfm', '--help']; main()"],
        capture_output=True, text=True, env=env,
    )
    assert done.returncode == 0 and all(
        w in done.stdout for w in ("run", "status", "table", "site", "data", "weights", "doctor")
    )
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout
    assert (
        subprocess.run(
            [sys.executable, "-c", code + "import vfm_notes.runs.batch"], capture_output=True, text=True, env=env
        ).stdout
        == "heavy: []\n"
    )


@pytest.mark.parametrize("command", ["run", "status", "table", "site"])
def test_unknown_study(toy, command):
    refused(toy.vfm(command, "fantom"), "Unknown study 'fantom'", "Did you mean 'phantom'?")
    refused(toy.vfm(command, "no/such.yaml"), "no/such.yaml")
    assert not toy.runs.exists()


BAD_FILES = {
    "unknown key": (dict(taks={}), ["unknown key 'taks'", "Did you mean 'tasks'?", "toy.yaml"]),
    "unknown budget": (dict(budget={"epoch": 3}), ["unknown key 'epoch'", "'epochs'"]),
    "doubled seed": (dict(seeds=[0, 0]), ["seeds"]), "no task": (dict(tasks={}), ["tasks"]),
    "size": (dict(size=[4, 8]), ["size", "three"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_study_file(toy, case):
    changes, words = BAD_FILES[case]
    toy.write(**changes)
    refused(toy.run(), *words)
    assert not toy.runs.exists()


def test_a_study_file_that_is_no_yaml(toy):
    toy.study.write_text("name: [")
    refused(toy.run(), "not valid YAML")


@pytest.mark.parametrize(
    "words, said",
    [
        (("--only", "task=segmentatoin"), ["no task 'segmentatoin'", "Did you mean 'segmentation'?"]),
        (("--only", "backbone=profound"), ["no backbone 'profound'", "profound_toy.mae_phantom"]),
        (("--only", "stragety=full"), ["unknown key 'stragety'", "'strategy'"]),
        (("--executor", "slrum"), ["Unknown executor 'slrum'", "local"]),
        (("--engine", "fast"), ["Unknown engine 'fast'"]),
    ],
)
def test_wrong_words(toy, words, said):
    refused(toy.run(*words), *said)
    assert not toy.runs.exists()


def test_wrong_use_of_the_command(toy):
    for words in (["--jobs", "0"], ["--jobs", "many"], ["--nonsense"]):
        done = toy.run(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr
    assert toy.vfm("nonsense").returncode == 2 and not toy.runs.exists()


def test_a_template_without_a_parameter(toy):
    write_template(toy.templates/"transfer.ipynb", "transfer", [n for n in parameter_names("transfer") if n != "lr"])
    for words in ([], ["--dry-run"]): refused(toy.run(*words), "transfer.ipynb", "no parameter 'lr'")
    (toy.templates/"transfer.ipynb").unlink()
    refused(toy.run(), "transfer.ipynb", "does not exist")
    assert not toy.runs.exists()


@pytest.mark.parametrize("data", [None, "/no/such/folder", ""])
def test_absent_data(toy, data):
    env = {k: v for k, v in toy.env.items() if k != "VFM_DATA"} | ({} if data is None else {"VFM_DATA": data})
    done = subprocess.run([*vfm(), "run", "hippocampus"], capture_output=True, text=True, env=env, cwd=toy.root)
    refused(done, "VFM_DATA")
    assert not toy.runs.exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(toy):
    done = toy.run("--dry-run")
    assert (
        done.returncode == 0
        and "2 of 2 notebooks to run" in done.stdout
        and "missing segmentation-profound_toy.mae_phantom-n4" in done.stdout
        and not toy.runs.exists()
    )
    done = toy.vfm("run", "phantom", "--dry-run", "--only", "task=translation")
    assert done.returncode == 0 and "5 of 5 notebooks" in done.stdout and not toy.runs.exists()


def test_status_and_table_of_a_study_that_never_ran(toy):
    done = toy.vfm("status", str(toy.study))
    assert done.returncode == 0 and "Study toy: 7 missing of 7 runs." in done.stdout
    assert "No records yet" in toy.vfm("table", str(toy.study)).stdout and not toy.runs.exists()


def test_a_study_that_ran(toy):
    done = toy.run()
    assert done.returncode == 0 and "7 of 7 runs done" in done.stdout, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum("done    " in line for line in lines) == 2 and lines[0].startswith("[00:00]")
    assert "7 done" in toy.vfm("status", str(toy.study)).stdout
    assert toy.vfm("table", str(toy.study)).stdout.startswith("segmentation: Dice, higher is better")
    for suffix, read in ((".csv", pd.read_csv), (".json", pd.read_json), (".parquet", pd.read_parquet)):
        file = toy.root/f"table{suffix}"
        assert toy.vfm("table", str(toy.study), "-o", str(file)).returncode == 0
        table = read(file)
        assert set(table.id) == set(toy.results()) and {
            i: m["dice"] for i, (_, m, _) in toy.results().items()
        } == pytest.approx(dict(zip(table.id, table.dice)))
    refused(toy.vfm("table", str(toy.study), "-o", "table.doc"), "table.doc", ".csv")


def test_doctor_and_lists(toy):
    done = toy.vfm("doctor")
    assert done.returncode == 0 and all(w in done.stdout for w in ("torch", "cores", "GiB free", "quarto", "VFM_DATA"))
    done = toy.vfm("data", "list")
    assert done.returncode == 0 and "phantom" in done.stdout and "hippocampus" in done.stdout
    refused(toy.vfm("data", "describe", "hipocampus"), "Unknown cohort 'hipocampus'", "'hippocampus'")
    assert not toy.runs.exists()


# Names are checked against the registries, in a worker that has imported them.
BAD_NAMES = {
    "task": (dict(tasks={"segmantation": {}}), ["Unknown task 'segmantation'", "Did you mean 'segmentation'?"]),
    "strategy": (dict(strategies=["scrach"]), ["Unknown strategy 'scrach'", "'scratch'"]),
    "backbone": (
        dict(backbones=["profund_toy.mae_phantom"], pretrain={"mae_phantom": {"backbone": "profund_toy"}}),
        ["Unknown backbone 'profund_toy'", "'profound_toy'"],
    ),
    "cohort": (dict(cohort="fantom"), ["Unknown cohort 'fantom'", "'phantom'"]),
    "weights": (dict(pretrain={}), ["mae_phantom", "pretrain"]),
    "objective": (
        dict(pretrain={"mae_phantom": {"backbone": "profound_toy", "objective": "masked"}}),
        ["Unknown objective 'masked'"],
    ),
    "size": (dict(spacing=[400.0, 1.5, 1.5]), ["spacing"]),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_unknown_names(toy, case):
    changes, words = BAD_NAMES[case]
    toy.write(**changes)
    refused(toy.vfm("run", str(toy.study)), *words)
    assert not toy.runs.exists()


def test_an_unreadable_volume(toy, real_data):
    broken = toy.root/"data"/"msd_hippocampus_100"
    (broken/"images").mkdir(parents=True)
    source = real_data/"msd_hippocampus_100"
    for path in source.iterdir():
        if path.name != "images": (broken/path.name).symlink_to(path)
    volumes = sorted((source/"images").iterdir())
    for path in volumes[1:]: (broken/"images"/path.name).symlink_to(path)
    (broken/"images"/volumes[0].name).write_bytes(volumes[0].read_bytes()[:500])
    study = load_study("hippocampus")
    refused(toy.vfm("run", "hippocampus", VFM_DATA=str(toy.root/"data")), volumes[0].name)
    assert study.cohort == "hippocampus" and not (toy.runs/"hippocampus").exists() and not list(toy.runs.rglob("*.npz"))
