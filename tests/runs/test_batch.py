"""A batch without processes: what it hands out, what it does with every end of a notebook, and how it counts."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_batch import Toy

from vfm_notes.foundation import shutdown as leave
from vfm_notes.foundation.places import DiskFull
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import RunSpec, load_study, run_id
from vfm_notes.runs import batch, executors, forkserver, notebook, notebook as preflight
from vfm_notes.runs.batch import (
    Batch, Summary, is_complete, run_job, stale_records, startable_jobs, count_records, pending_jobs,
)
from vfm_notes.runs.executors import Cancelled, Died, LocalExecutor, Lost
from vfm_notes.runs.grid import Job, known_records, jobs_of
from vfm_notes.foundation.places import pid_alive
from vfm_notes.runs.locks import job_lock, progress_file
from vfm_notes.runs.watch import JobStatus, job_status
from vfm_notes.runs.record import failed_record, new_record, read_record, write_record


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A study of seven runs in two notebooks: a pretraining, and six that need it."
    toy = Toy(tmp_path)
    monkeypatch.setenv("VFM_RUNS", str(toy.runs))
    toy.spec = load_study(toy.study)
    toy.jobs = jobs_of(toy.spec, templates=toy.templates)
    return toy


def keep(spec, failed="", **values):
    "A record of a run."
    record = (
        failed_record(spec, "toy", {"type": "ValueError", "message": failed})
        if failed
        else new_record(spec, "toy", metrics={"dice": 0.5}, primary="dice", **values)
    )
    write_record(run_folder("toy", run_id(spec)), record)


def finish(job, error=None, failed=()):
    "All records of a job, and the note that its notebook ended."
    for s in job.specs:
        keep(s, "no" if run_id(s) in failed else "")
    batch.write_outcome("toy", job, error, 2.0)


def states(job):
    return [(r := read_record(run_folder("toy", i))) and r["status"] for i in job.runs]


class Show(list):
    "What a batch says."

    updates = ()

    def say(self, text):
        self.append(text)

    def update(self, done, looks, left):
        self.updates = (*self.updates, (done, len(looks), left))


class Pool:
    "Runs what is asked at once; a list of ends for each job comes first."

    jobs = 2

    def __init__(self, study, **ends):
        self.study, self.ends, self.asked = study, ends, []

    def leave(self):
        return True

    def submit(self, function, job, *args, log=None):
        assert function is run_job and log.parent.is_dir()
        self.asked.append(job.name)
        end = self.ends.get(job.kind, []).pop(0) if self.ends.get(job.kind) else "ran"
        if end == "ran":
            finish(job)
        error = end if isinstance(end, BaseException) else None
        return SimpleNamespace(
            done=lambda: True, exception=lambda: error, result=lambda: end, process=1, cancel=lambda: None
        )


def run(toy, pool, **more):
    "A batch to its end."
    show, made = (
        Show(), Batch("toy", toy.jobs, startable_jobs("toy", toy.jobs, pending_jobs("toy", toy.jobs)), pool, **more),
    )
    made.loop(show)
    return made, show


# --- what is there to do


def test_a_batch_does_what_is_needed_first_and_counts(toy):
    first, *others = toy.jobs
    assert first.kind == "pretrain" and [len(j.runs) for j in others] == [6] and others[0].needs == (first.name,)
    pool = Pool("toy")
    made, show = run(toy, pool)
    assert (
        pool.asked[0] == first.name
        and sorted(pool.asked) == sorted(j.name for j in toy.jobs)
        and made.ran == len(toy.jobs)
    )
    assert (
        f"done    {first.name}: 1 run, 2 s" in show
        and f"done    {others[0].name}: 6 runs, 2 s" in show
        and show.updates[0][:2] == (1, 0)
    )
    total = count_records("toy", toy.jobs, 5.0, made.ran)
    assert (total.done, total.failed, total.missing, total.skipped, total.problems, total.others, total.status) == (
        7,
        {},
        [],
        {},
        {},
        0,
        0,
    )
    assert (
        pending_jobs("toy", toy.jobs) == []
        and run(toy, pool)[0].ran == 0
        and all(is_complete("toy", j) for j in toy.jobs)
    )


def test_what_stands_in_a_summary(toy):
    first, job = toy.jobs[0], toy.jobs[-1]
    finish(first, {"type": "ValueError", "message": "late", "cell": 3})
    keep(job.specs[0])
    keep(job.specs[1], "no")
    keep(RunSpec(seed=77))
    total = count_records("toy", toy.jobs)
    assert (
        total.done == 2
        and total.failed == {job.runs[1]: "ValueError: no"}
        and total.problems == {first.name: "cell 3: ValueError: late"}
        and total.others == 1
        and total.status == 1
    )
    assert sorted(total.missing) == sorted(i for j in toy.jobs[1:] for i in j.runs if i not in job.runs[:2])
    assert (
        Summary("s").status == 0
        and Summary("s", missing=["a"]).status
        == Summary("s", problems={"a": "b"}).status
        == Summary("s", failed={"a": "b"}).status
        == 1
    )
    assert (
        [j.name for j in startable_jobs("toy", toy.jobs, [job])] == [job.name]
        and is_complete("toy", first)
        and not is_complete("toy", first, retry=True)
    )


def test_records_of_an_edited_template_are_counted(toy):
    job = toy.jobs[-1]
    for s, h in zip(job.specs, (notebook.template_hash(job.template), "old", "older")):
        keep(s, template_hash=h)
    assert stale_records("toy", toy.jobs, known_records("toy")) == {str(job.template): 2}
    batch.write_outcome("toy", job, None, 1.0)
    assert stale_records("toy", [job], known_records("toy")) == {str(job.template): 2}
    progress_file("toy", job.name).write_text("{}")  # at work
    assert stale_records("toy", [job], known_records("toy")) == {}


def test_nothing_starts_without_what_it_needs_or_late(toy):
    first, job = toy.jobs[0], next(j for j in toy.jobs if j.needs)
    assert startable_jobs("toy", toy.jobs, [job]) == [] and startable_jobs("toy", toy.jobs, [first, job]) == [
        first, job,
    ]
    blocked, show = run(SimpleNamespace(jobs=toy.jobs), Pool("toy", pretrain=[Died("killed"), Died("killed")]))
    assert (
        states(first) == ["failed"]
        and any(s.startswith(f"missing {job.name}: what it needs ({first.name}) is not done") for s in show)
        and states(job) == [None] * len(job.runs)
    )
    late, show = run(toy, Pool("toy"), until=time.monotonic() - 1)
    assert late.ran == 0 and any("the time is over" in s for s in show)
    with job_lock("toy", job.name):
        assert not late.ready(job)
    assert late.ready(job)


def test_when_the_time_is_over_what_waits_in_the_queue_is_taken_back_and_what_runs_is_not(toy):
    keep(toy.jobs[0].specs[0])
    asked, taken = [], []
    class Queue:
        jobs = 1
        def submit(self, function, job, *rest, **more):
            asked.append(job.name)
            return SimpleNamespace(done=lambda: False, cancel=lambda: taken.append(job.name), process=None)
    job = next(j for j in toy.jobs if j.needs)
    later = [job, replace(job, name="second"), replace(job, name="third")]
    made, said = Batch("toy", toy.jobs, list(later), Queue(), until=time.monotonic() + 1e6), []
    show = SimpleNamespace(say=said.append)
    made.start_ready(show)
    assert asked == [j.name for j in later] and not made.pending and not said  # all wait in the executor's queue
    with job_lock("toy", later[0].name):  # the first is at work
        made.until = time.monotonic() - 1
        made.start_ready(show)
    assert taken == [j.name for j in later[1:]] and list(made.running) == [later[0].name]
    assert said == [f"the time is over: {len(later) - 1} notebooks are not started; running ones finish"]


# --- how a notebook ends


def test_a_worker_that_dies_has_a_second_chance(toy):
    pool = Pool("toy", pretrain=[Died("killed")])
    made, show = run(toy, pool)
    assert (
        states(toy.jobs[0]) == ["done"]
        and pool.asked[:2] == [toy.jobs[0].name] * 2
        and f"queued  {toy.jobs[0].name}: tried again: killed" in show
    )


def test_a_worker_that_dies_twice_is_blamed(toy):
    made, show = run(toy, Pool("toy", pretrain=[Died("killed"), Died("killed")]))
    record = read_record(run_folder("toy", toy.jobs[0].runs[0]))
    assert (
        record["status"] == "failed"
        and record["error"]["message"] == "killed"
        and record["error"]["type"] == "Died"
        and any(s.startswith(f"failed  {toy.jobs[0].name}: 1 of 1 run") for s in show)
    )


def test_a_lost_machine_is_nobodys_fault(toy):
    made, show = run(toy, Pool("toy", pretrain=[Lost("gone")] * 5))
    assert states(toy.jobs[0]) == ["done"] and sum("again" in s for s in show) == 5


def test_a_machine_that_is_always_lost_is_left(toy):
    made, show = run(SimpleNamespace(jobs=toy.jobs[:1]), Pool("toy", pretrain=[Lost("gone")] * 6))
    assert (
        states(toy.jobs[0]) == [None]
        and made.ran == 0
        and f"missing {toy.jobs[0].name}: gone The same command continues." in show
    )


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Cancelled("by hand"), "missing {}: its job was cancelled (by hand)"),
        ("left", "missing {}: paused as requested; the same command continues there"),
    ],
)
def test_who_leaves_leaves_nothing_behind(toy, end, said):
    made, show = run(SimpleNamespace(jobs=toy.jobs[:1]), Pool("toy", pretrain=[end]))
    assert states(toy.jobs[0]) == [None] and made.ran == 0 and said.format(toy.jobs[0].name) in show


def test_a_busy_job_comes_again_and_a_full_disk_ends_all(toy):
    pool = Pool("toy", pretrain=["busy"])
    made, _ = run(toy, pool)
    assert (
        pool.asked[:2] == [toy.jobs[0].name] * 2 and made.ran == len(toy.jobs) and not made.deaths.get(toy.jobs[0].name)
    )
    for j in toy.jobs:
        for i in j.runs:
            batch.drop_record(run_folder("toy", i))
    full, _ = run(toy, Pool("toy", pretrain=[DiskFull("no space left")]))
    assert full.stopped == "no space left" and full.ran == 0 and not full.pending and states(toy.jobs[0]) == [None]


def test_a_batch_that_is_asked_to_leave_starts_nothing_more(toy, monkeypatch):
    monkeypatch.setattr(batch, "stop_requested", lambda: signal.SIGTERM)
    made, show = run(toy, pool := Pool("toy"))
    assert (
        pool.asked == []
        and made.stopped == "Stop requested (SIGTERM); the same command continues."
        and not made.pending
    )


# --- one notebook


def notebooks(monkeypatch, *ends):
    "Notebooks that end as told: which of the missing runs they leave, and the error."
    ends, seen = list(ends), []

    def execute(job, study, engine, limit):
        count, error = ends.pop(0)
        left = batch.missing_specs(study, job.specs)
        seen.append(len(left))
        for s in left[:count]:
            keep(s)
        return error and {"type": error, "message": "m", "cell": 1, "traceback": ""}

    monkeypatch.setattr(batch, "execute", execute)
    return seen


@pytest.mark.parametrize(
    ("ends", "said", "end"),
    [
        ([(3, None)], "ran", ["done"] * 3),
        ([(3, "ValueError")], "ran", ["done"] * 3),
        ([(1, "ValueError")], "ran", ["done", "failed", "failed"]),
        ([(0, None)], "ran", ["failed"] * 3),
        ([(1, "KernelDied"), (2, None)], "ran", ["done"] * 3),
        ([(0, "KernelDied"), (1, "KernelDied"), (2, None)], "ran", ["done"] * 3),
        ([(1, "KernelDied"), (0, "KernelDied")], "ran", ["done", "failed", "failed"]),
        ([(1, "Stopped")], "left", ["done", None, None]),
    ],
)
def test_a_notebook_ends(toy, monkeypatch, ends, said, end):
    job = replace(toy.jobs[-1], specs=toy.jobs[-1].specs[:3])
    seen = notebooks(monkeypatch, *ends)
    assert run_job(job, "toy") == said and states(job) == end and len(seen) == len(ends)
    note = json.loads(progress_file("toy", job.name).read_text()) if said == "ran" else None
    assert note is None or (note["runs"], note["template"], (note["error"] or {}).get("type")) == (
        list(job.runs),
        str(job.template),
        ends[-1][1],
    )
    if "failed" in end:
        assert {read_record(run_folder("toy", i))["error"]["type"] for i, s in zip(job.runs, end) if s == "failed"} == {
            ends[-1][1] or "NoRecord"
        }


def test_a_notebook_runs_once_and_failures_only_when_asked(toy, monkeypatch):
    job = toy.jobs[0]
    notebooks(monkeypatch, (0, "ValueError"), (1, None))
    with job_lock("toy", job.name):
        assert run_job(job, "toy") == "busy"
    assert run_job(job, "toy") == "ran" and run_job(job, "toy") == "nothing to do" and states(job) == ["failed"]
    assert (
        run_job(job, "toy", retry=True) == "ran"
        and states(job) == ["done"]
        and run_job(job, "toy", retry=True) == "nothing to do"
    )
    monkeypatch.setattr(batch, "stop_requested", lambda: signal.SIGTERM)
    assert run_job(toy.jobs[1], "toy") == "left" and leave.stop_requested() == 0


def test_only_the_run_at_work_is_blamed(toy):
    job = toy.jobs[-1]
    progress_file("toy", job.name).parent.mkdir(parents=True, exist_ok=True)
    progress_file("toy", job.name).write_text(json.dumps({"run": job.runs[1]}))
    batch.record_failures("toy", job, {"type": "E", "message": "m"})
    assert states(job)[:3] == [None, "failed", None] and notebook.current_run("toy", job) == job.runs[1]
    cells = toy.root / "nb.ipynb"
    cells.write_text(
        json.dumps(
            {
                "cells": [
                    {"metadata": {"papermill": {"start_time": "x"}}},
                    {"metadata": {"papermill": {"start_time": "y"}}},
                    {"metadata": {"papermill": {"start_time": None}}},
                ]
            }
        )
    )
    assert notebook.current_cell(cells) == 1 and notebook.current_cell(toy.root / "none") is None


# --- before it begins


def test_the_disk_must_hold_what_is_missing(toy, monkeypatch):
    job, space = toy.jobs[-1], []
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=space[0]))

    def fits(free):
        space[:] = [free]
        try:
            return preflight.check_disk("toy", [job]) is None
        except VfmError as error:
            return str(error).split(" in ")[0]

    n = len(job.runs)
    assert fits(100e6 + n * 1e6) is True  # a megabyte each, where none is known
    assert fits(100e6 + n * 1e6 - 1) == f"{n} runs will need about 0.1 GB"
    write_record(
        run_folder("toy", job.runs[0]),
        new_record(job.specs[0], "toy", metrics={}),
        cases=[{"case": "c", "patient": "p", "metric": "m", "value": 1.0}],
    )
    size = sum(f["bytes"] for f in read_record(run_folder("toy", job.runs[0]))["files"].values())
    assert fits(100e6 + (n - 1) * size) is True and fits(100e6 + (n - 1) * size - 1) is not True


# --- calls to other processes


def test_a_call_and_its_answer_travel_whole(tmp_path):
    spec = RunSpec(seed=3, size=(4, 8, 8), cases={"train": 2})
    values = [None, True, 2, 0.5, "x", tmp_path, (1, (2, "a")), {"k": [1], 2: (3,)}, spec]
    assert executors.unpack_value(json.loads(json.dumps(executors.pack(values)))) == values
    with pytest.raises(VfmError, match="A set cannot be handed"):
        executors.pack({1})
    with pytest.raises(VfmError, match="none of vfm_notes"):
        executors.unpack_value({"class": "os:system", "fields": {}})
    call, result = tmp_path / "c", tmp_path / "r"

    def answered(function, *args):
        call.write_bytes(executors.encode(function, *args))
        executors.write_answer(executors.run_call(str(call)), str(result))
        return executors.read_answer(result)

    assert answered(run_id, spec) == (True, run_id(spec))
    for error, kind, text in (
        (VfmError("a"), VfmError, "a"),
        (DiskFull("full"), DiskFull, "full"),
        (KeyError("k"), KeyError, "'k'"),
        (ValueError(1, 2), ValueError, "(1, 2)"),
        (Odd("o"), RuntimeError, "Odd: o"),
    ):
        result.write_text(json.dumps(executors.pack_error(error)))
        fine, back = executors.read_answer(result)
        assert not fine and type(back) is kind and str(back) == text
    fine, error = answered(load_study, "nowhere.yaml")
    assert not fine and isinstance(error, VfmError) and "In the worker" in error.__notes__[0]


class Odd(Exception):
    "Known to this file alone."


def test_a_forked_process_that_vanishes_counts_as_killed():
    gone = forkserver.Forked.__new__(forkserver.Forked)
    gone.returncode, gone.pid, gone._lease = None, -5, SimpleNamespace(close=lambda: None)
    gone._answers = SimpleNamespace(readline=lambda: "")
    gone.started.add(gone.pid)
    gone._read()
    assert gone.returncode == -9 and -5 not in gone.started
    assert str(Path(sys.modules["vfm_notes"].__file__).parents[1]) in forkserver.python_path().split(
        ":"
    ) and "" not in forkserver.python_path().split(":")


def test_workers_start_in_turn_and_end_with_their_pool(monkeypatch):
    for name in ("VFM_FORKSERVER", "VFM_GPUS"):
        monkeypatch.delenv(name, raising=False)
    with LocalExecutor(2, modules=["json"]) as pool:
        asked, sleeping, third = (
            pool.submit(run_id, RunSpec(seed=5)),
            pool.submit(time.sleep, 100),
            pool.submit(os._exit, 3),
        )
        assert third.process is None and sleeping.running() and pool.server.process.poll() is None  # two at a time
        assert asked.result(60) == run_id(RunSpec(seed=5)) and str(third.exception(60)).startswith(
            "The worker ended with status 3 and no result"
        )
        assert {sleeping.process.pid} == forkserver.Forked.started and sleeping.process.poll() is None
        with pytest.raises(TimeoutError):
            sleeping.exception(0.05)
        sleeping.cancel()
        assert (
            isinstance(sleeping.exception(60), Died)
            and str(sleeping.exception()) == "The worker was killed by signal 9."
            and not forkserver.Forked.started
        )
        last = pool.submit(time.sleep, 100)
        assert last.process and (folder := pool.folder).is_dir()
    assert not pid_alive(last.process.pid) and pool.server.process.returncode == 0 and not folder.exists()
    with LocalExecutor(1, fast=False) as plain:
        assert (
            plain.server is None
            and plain.submit(run_id, RunSpec(seed=6)).result(120) == run_id(RunSpec(seed=6))
            and "OMP_NUM_THREADS" in plain.env
        )
        first, waiting = plain.submit(time.sleep, 100), plain.submit(time.sleep, 100)
        waiting.cancel()
        assert isinstance(waiting.exception(1), Cancelled) and first.running()
    assert first.process.wait(60) == -signal.SIGKILL


# --- a whole batch, and what stands beside it


def test_a_study_is_run_with_the_executor_that_was_asked_for(toy, monkeypatch):
    made = []

    class Asked(Pool):
        def __init__(self, jobs, fast):
            super().__init__("toy")
            made.append((jobs, fast))

        def shutdown(self):
            made.append("shut")

    def maker(executor, study, profile):
        assert (executor, study.name, profile) == ("local", "toy", None)
        return Asked

    monkeypatch.setattr(batch, "make_executor", maker)
    total = batch.run_study(str(toy.study), 3, templates=toy.templates)
    assert made == [(3, True), "shut"] and (total.done, total.ran, total.status, total.stopped) == (7, 2, 0, "")
    again = batch.run_study(str(toy.study), 3, templates=toy.templates)
    assert again.done == 7 and again.ran == 0 and len(made) == 2  # nothing to do: no executor
    toy.write(name="other", cohort="prostate_cases", pretrain={}, backbones=["profound_toy.random"])
    with pytest.raises(VfmError, match="VFM_DATA"):
        batch.run_study(str(toy.study), templates=toy.templates)


def test_the_first_question_is_asked_in_a_worker(toy, monkeypatch):
    asked = []

    class Here(preflight.LocalExecutor):
        def __init__(self, jobs=1, fast=True):
            self.queue, self.active, self.server, self.folder = [], [], None, toy.root / "none"

        def submit(self, function, study, jobs):
            asked.append((function, study.name, len(jobs)))
            return SimpleNamespace(result=lambda: None)

    monkeypatch.setattr(preflight, "LocalExecutor", Here)
    for pool in (Here(), object()):
        preflight.check_first(pool, toy.spec, toy.jobs)
    assert asked == [(preflight.preflight, "toy", 2)] * 2


def test_a_kernel_is_ready_when_its_own_question_is_answered():
    import asyncio

    from vfm_notes.runs.engine import ForkedClient

    answer = lambda own, state: {"parent_header": {"msg_id": own}, "content": {"execution_state": state}}
    coming, handled = [answer("old", "idle"), answer("q", "busy"), answer("q", "idle"), answer("q", "late")], []

    async def message(timeout):
        return coming.pop(0)

    async def reply(own, timeout):
        return own

    client = SimpleNamespace(
        session=SimpleNamespace(msg=lambda kind: {"header": {"msg_id": "q"}}),
        shell_channel=SimpleNamespace(send=lambda question: None),
        iopub_channel=SimpleNamespace(get_msg=message),
        _handle_kernel_info_reply=handled.append,
        _async_recv_reply=reply,
    )
    client.answers = lambda *given: ForkedClient.answers(client, *given)
    asyncio.run(ForkedClient.wait_for_ready(client, 5))
    assert handled == ["q"] and len(coming) == 1


def test_kernels_are_those_forked_and_those_started_plainly(monkeypatch):
    import psutil

    children = [SimpleNamespace(pid=11, cmdline=lambda: ["python", "-m", "ipykernel_launcher"])]
    children.append(SimpleNamespace(pid=12, cmdline=lambda: ["sleep"]))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(children=lambda: children))
    monkeypatch.setattr(forkserver.Forked, "started", {os.getpid(), 2**22 + 1})
    assert notebook.kernel_processes() == [os.getpid(), 11]


def test_a_look_extrapolates_when_a_twentieth_is_done():
    whole = lambda part, said: JobStatus(None, {}, since=100.0, part=part, said=said).whole
    assert whole(0.05, 110.0) is None and whole(0.06, 110.0) == pytest.approx(10 / 0.06) and whole(0.5, 100.0) is None
    assert JobStatus(None, {"a": "done", "b": "queued", "c": "missing", "d": "running", "e": "failed"}).left == 3


def test_a_look_trusts_no_clock_of_a_notebook(tmp_path, monkeypatch):
    """The clock of another machine, or one that is set anew, is days ahead: start and progress are both dated by the
    disk."""
    from vfm_notes.runs import locks, record

    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    job = Job("segmentation-a", "transfer", Path("t.ipynb"), {}, ())
    with locks.job_lock("s", job.name):
        locks.progress_file("s", job.name).parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("VFM_PROGRESS", str(locks.progress_file("s", job.name)))
        monkeypatch.setattr(record, "_last", {"time": 0.0, "run": ""})
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 9e9)
            record.report_progress(1, 2, "half")
        start = locks.running_since("s", job.name)
        assert abs(locks.progress_file("s", job.name).stat().st_mtime - start) < 600
        os.utime(locks.progress_file("s", job.name), (start + 10, start + 10))
        look = job_status("s", job, {})
        assert look.part == 0.5 and look.whole == pytest.approx(20)


def test_progress_names_the_run_at_work(tmp_path, monkeypatch):
    from vfm_notes.runs import record

    target = tmp_path / "progress.json"
    monkeypatch.setenv("VFM_PROGRESS", str(target))
    monkeypatch.setattr(record, "_last", {"time": 0.0, "run": ""})
    read = lambda: (lambda r: (r["done"], r["total"], r["text"], r["run"]))(json.loads(target.read_text()))
    record.report_progress(1, 4, "one", run="r1")
    assert read() == (1, 4, "one", "r1")
    record.report_progress(2, 4, "two")
    assert read() == (1, 4, "one", "r1")  # at most five times a second
    record.report_progress(4, 4, "end")
    assert read() == (4, 4, "end", "r1")
    record.report_progress(0, 4, "next", run="r2")
    assert read() == (0, 4, "next", "r2") and [p.name for p in tmp_path.iterdir()] == ["progress.json"]


def test_a_cluster_is_asked_in_words_and_answers_in_words(monkeypatch):
    from vfm_notes.runs import slurm

    assert slurm.run_slurm("echo", "two words") == "two words\n"
    for command, said in (
        (["sh", "-c", "echo a note; echo why >&2; exit 3"], "sh failed: why"),
        (["sh", "-c", "echo all; exit 1"], "sh failed: all"),
        (["no-such-command"], "There is no no-such-command on PATH"),
    ):
        with pytest.raises(VfmError, match=said):
            slurm.run_slurm(*command)
    rows = "1_0|RUNNING|None\n1_1|PENDING|Resources\n2|PENDING|\n"
    monkeypatch.setattr(slurm, "run_slurm", lambda *command: rows)
    assert slurm.queued_tasks() == {"1_0": "RUNNING", "1_1": "PENDING (Resources)", "2": "PENDING"}


def test_a_notebook_is_given_its_parameters_and_its_error_comes_back(toy, monkeypatch):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    job, asked, fails = toy.jobs[-1], [], []

    def executed(template, target, parameters, **more):
        asked.append((template, target, parameters, more["engine_name"], os.environ["VFM_JOB"]))
        if fails:
            raise fails.pop()

    monkeypatch.setattr(papermill, "execute_notebook", executed)
    for name in ("VFM_JOB", "VFM_PROGRESS", "VFM_TEMPLATE_HASH", "PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")  # what it sets is taken back
    assert notebook.execute(job, "toy", None) is None  # the first time there is no progress to forget
    progress_file("toy", job.name).write_text("{}")
    assert notebook.execute(job, "toy", None) is None and not progress_file("toy", job.name).exists()
    assert asked[0] == (job.template, notebook.notebook_file("toy", job.name), job.parameters, None, job.name)
    assert os.environ["VFM_TEMPLATE_HASH"] == notebook.template_hash(job.template)
    fails.append(PapermillExecutionError(3, 2, "source", "ValueError", "no", ["a", "b"]))
    assert notebook.execute(job, "toy", None) == {"type": "ValueError", "message": "no", "cell": 3, "traceback": "a\nb"}
    fails.append(KeyError("k"))
    assert notebook.execute(job, "toy", None) == {"type": "KeyError", "message": "'k'"}
    fails.append(PapermillExecutionError(3, 2, "source", "DiskFull", "no room", []))
    with pytest.raises(DiskFull, match="no room"):
        notebook.execute(job, "toy", None)


def test_a_plan_is_told_line_by_line(toy, monkeypatch, capsys):
    from vfm_notes.report import cli
    from vfm_notes.tune import study_names

    monkeypatch.setattr(study_names, "weights_problems", lambda spec: ["one", "two"])
    monkeypatch.setattr(preflight, "known_conflicts", lambda spec, jobs: ["one", f"{len(jobs)} jobs"])
    finish(toy.jobs[0])
    cli.show_plan(str(toy.study), None, toy.templates, False)
    said, width = capsys.readouterr().out.splitlines(), max(len(j.name) for j in toy.jobs)
    first, job = toy.jobs
    assert said[:2] == [f"{'done':8}{first.name:{width}} 1 done", f"{'missing':8}{job.name:{width}} 6 missing"]
    assert said[2] == "Study toy: 1 done, 6 missing of 7 runs." and said[3].startswith(
        "Study toy: 1 of 2 notebooks to run, "
    )
    assert said[4:] == ["cannot work: one", "cannot work: 1 jobs", "missing: two"]
