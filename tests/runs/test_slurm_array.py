"""A thousand notebooks on a made-up Slurm where jobs are killed, cancelled and lost with their node at random:
complete in the end, each done once."""
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import StudySpec, run_id
from vfm_notes.runs import batch
from vfm_notes.runs.forkserver import python_path
from vfm_notes.runs.grid import known_records, jobs_of
from vfm_notes.runs.locks import job_lock
from vfm_notes.runs.record import missing_specs, new_record, write_record
from vfm_notes.runs.slurm import SlurmExecutor, slurm_settings
from vfm_notes.runs.watch import Display

SCRIPTS = {  # what Slurm's commands do here; the cluster is the process below
    "sbatch": 'case "$1" in --test-only) exit 0;; esac\nid=$$\ncp "$1" "$FAKE/inbox/.$id" && mv "$FAKE/inbox/.$id" '
    '"$FAKE/inbox/$id"\necho "Submitted batch job $id"',
    "squeue": 'if [ -e "$FAKE/silent" ]; then rm "$FAKE/silent"; echo "slurm_load_jobs error: Unable to contact slurm '
    'controller" >&2; exit 1; fi\ncat "$FAKE/queue"',
    "scontrol": 'grep "^JobId=$4 " "$FAKE/ended"',
    "scancel": 'echo "$1" >> "$FAKE/cancel"',
    "srun": "exit 1",
}


class Cluster:
    "Forks a process for each job of an array, many at a time, and is unkind to them."
    def __init__(self, folder: Path, seed: int, slots: int = 16):
        self.folder, self.random, self.slots = folder, random.Random(seed), slots
        self.waiting, self.running, self.ended, self.faults = [], {}, {}, Counter()

    def loop(self) -> None:
        from submitit.core.submission import process_job  # imported once, for all jobs
        from vfm_notes.foundation.meter import provenance
        provenance()  # asked once, not by each job
        self.process_job, told = process_job, 0.0
        while not (self.folder/"over").exists():
            for script in (self.folder/"inbox").iterdir():
                if not script.name.startswith("."): self.take(script)
            self.start()
            self.bury()
            if self.random.random() < 0.02: (self.folder/"silent").touch()
            if time.monotonic() > told + 0.1:
                self.tell()
                told = time.monotonic()
            time.sleep(0.01)

    def tell(self) -> None:
        self.write(
            "queue",
            [
                f"{i}|{s}|None"
                for i, s in [
                    *((i, "PENDING") for i, _ in self.waiting),
                    *((i, "RUNNING") for _, (i, _, _) in self.running.items()),
                ]
            ],
        )
        self.write("ended", [f"JobId={i} JobState={s}" for i, s in self.ended.items()])
        (self.folder/"faults").write_text(repr(dict(self.faults)))

    def write(self, name, lines):
        (self.folder/f".{name}").write_text("".join(line + "\n" for line in lines))
        os.replace(self.folder/f".{name}", self.folder/name)

    def take(self, script) -> None:
        text = script.read_text(encoding="utf-8")
        array, folder = re.search(r"--array=0-(\d+)%", text), shlex.split(text.split("submitit.core._submit")[1])[0]
        ids = [f"{script.name}_{k}" for k in range(int(array[1]) + 1)] if array else [script.name]
        # it comes a moment after the script
        if not list(Path(folder.replace("%j", ids[-1])).glob("*submitted.pkl")): return
        self.waiting += [(id, folder) for id in ids]
        script.unlink()

    def start(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            id, folder = self.waiting.pop(0)
            if self.random.random() < 0.04:
                self.ended[id], self.faults = "CANCELLED", self.faults + Counter(cancelled=1)
                continue
            killed, when = (
                self.random.choice(("FAILED", "NODE_FAIL")) if self.random.random() < 0.15 else "",
                10 ** self.random.uniform(-4, -1.7),
            )
            pid = os.fork()
            if not pid:
                if killed: signal.setitimer(signal.ITIMER_REAL, when)  # its SIGALRM ends the process, wherever it is
                self.work(id, folder)
            self.running[pid] = id, folder, killed

    def work(self, id, folder) -> None:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2): os.dup2(null, fd)
            array, _, task = id.partition("_")
            os.environ |= {"SLURM_JOB_ID": id, "SUBMITIT_EXECUTOR": "slurm", "SLURM_PROCID": "0"} | (
                {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {}
            )
            self.process_job(folder)
            code = 0
        finally: os._exit(code)

    def bury(self) -> None:
        for pid, (id, folder, fate) in list(self.running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done: continue
            del self.running[pid]
            if not os.WIFSIGNALED(status): self.ended[id] = "COMPLETED" if status == 0 else "FAILED"
            elif fate == "NODE_FAIL" and self.random.random() < 0.5:  # Slurm puts it back into the queue itself
                self.waiting.append((id, folder))
                self.faults["requeued"] += 1
            else:
                self.ended[id] = fate
                self.faults[fate] += 1


@pytest.fixture
def made_up(tmp_path, monkeypatch, runs_root):
    folder = tmp_path/"slurm"
    (folder/"inbox").mkdir(parents=True)
    (folder/"bin").mkdir()
    for name, text in SCRIPTS.items():
        (folder/"bin"/name).write_text(f"#!/bin/sh\n{text}\n")
        (folder/"bin"/name).chmod(0o755)
    for name in ("queue", "ended", "cancel"): (folder/name).touch()
    monkeypatch.setenv("PATH", f"{folder/'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    # a small process, which forks a thousand times
    code = "import sys, test_slurm_array as t; t.Cluster(t.Path(sys.argv[1]), seed=7).loop()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([python_path(), os.path.dirname(__file__)])}
    cluster = subprocess.Popen([sys.executable, "-c", code, folder], env=env)
    yield folder
    (folder/"over").touch()
    assert cluster.wait(300) == 0


def quick_job(job, study, engine="forked", retry=False, limit=0.0) -> str:
    "As batch.run_job, without a notebook: what is missing is computed and leaves a line in a log."
    with job_lock(study, job.name) as mine:
        if not mine: return "busy"
        for spec in missing_specs(study, job.specs, failed=retry):
            folder = run_folder(study, run_id(spec))
            write_record(
                folder,
                new_record(spec, study, metrics={"dice": 0.5}, primary="dice", cost={"seconds": {"total": 0.01}}),
            )
            with open(folder.parent/"log", "a") as f: f.write(f"{run_id(spec)}\n")
        batch.write_outcome(study, job, None, 0.01)
    return "ran"


def test_a_thousand_jobs_end_complete(made_up, tmp_path, runs_root, monkeypatch):
    monkeypatch.setattr(batch, "run_job", quick_job)
    study = StudySpec(
        name="big", title="big", cohort="phantom", size=(4, 8, 8), spacing=(4, 1.5, 1.5),
        cases=dict(pretrain=0, train=250, val=2, test=2), backbones=["profound_toy.x"],
        tasks={t: {} for t in ("segmentation", "classification", "super_resolution", "translation")},
        strategies=["scratch"], seeds=[0], n_train=list(range(1, 251)),
    )
    jobs = jobs_of(study)
    assert len(jobs) == 1000
    (runs_root/"big"/"progress").mkdir(parents=True)
    commands = 0
    while todo := batch.pending_jobs("big", jobs, retry=True):  # the same command, again and again
        commands += 1
        assert commands < 12, f"{len(todo)} are left"
        with SlurmExecutor(settings=slurm_settings({"time": 1}), folder=tmp_path/"calls", poll=0.1) as pool:
            batch.Batch("big", jobs, todo, pool, retry=True).loop(Display(1000, every=1e9))
    records = known_records("big")
    assert set(records) == {id for j in jobs for id in j.runs} and {r["status"] for r in records.values()} == {"done"}
    done = Counter((runs_root/"big"/"log").read_text(encoding="utf-8").split())
    # a record may lack its line, where the process died between the two; none has two
    assert max(done.values()) == 1 and len(done) >= 990
    faults = eval((made_up/"faults").read_text(encoding="utf-8"))
    assert min(faults.get(k, 0) for k in ("cancelled", "FAILED", "NODE_FAIL", "requeued")) >= 5, faults
    assert not subprocess.run(["squeue"], capture_output=True, text=True).stdout
