"""Faults that really happen, done for real: after each no finished work is lost or repeated, and the results are those
of an undisturbed batch."""
import os
import signal
import subprocess
import sys
from collections import Counter

import nbformat
import pytest
import toy_batch
from toy_batch import alive_with, Toy, wait_until

from vfm_notes.runs.forkserver import ForkServer, python_path
from vfm_notes.foundation.places import pid_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, locks and forks as on Linux")


@pytest.fixture(scope="module", autouse=True)
def shared_server(toy_server):
    "One fork server for most of these tests, which saves each of them its imports."
    Toy.server = toy_server
    yield
    Toy.server = None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Toy: return toy_batch.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def toy(tmp_path) -> Toy: return Toy(tmp_path)


def same(toy: Toy, reference: Toy) -> bool:
    "Same runs, metrics and files?"
    return toy.table() == reference.table()


def test_an_undisturbed_study(undisturbed):
    toy = undisturbed
    assert (
        len(toy.results()) == 7
        and {r[0] for r in toy.results().values()} == {"done"}
        and Counter(toy.log()) == Counter(list(toy.results()))
    )
    stats = {p: p.stat().st_mtime_ns for p in toy.runs.rglob("*") if p.is_file()}
    again = toy.run(VFM_FORKSERVER=str(toy.root/"nobody listens here"))  # nothing is started
    assert (
        again.returncode == 0 and "everything is up to date (7 of 7 runs done)" in again.stdout and len(toy.log()) == 7
    )
    assert stats == {p: p.stat().st_mtime_ns for p in toy.runs.rglob("*") if p.is_file()}, "nothing is written again"
    nb = nbformat.read(toy.runs/"toy"/"notebooks"/"segmentation-profound_toy.mae_phantom-n4.ipynb", 4)
    assert all(c.metadata.papermill.status == "completed" for c in nb.cells) and not list((toy.runs/"toy").glob(".*"))
    assert {r["notebook"] for r in toy.records().values()} == {
        "pretrain-profound_toy.mae_phantom", "segmentation-profound_toy.mae_phantom-n4",
    }
    assert all(len(r["template_hash"]) == 64 and r["threads"] == 1 for r in toy.records().values())


def test_widening_computes_only_what_is_missing(tmp_path):
    toy = Toy(tmp_path, seeds=[0])
    assert toy.run().returncode == 0
    first = toy.results()
    toy.write(seeds=[0, 1])
    assert toy.run("--only", "strategy=full").returncode == 0 and len(toy.results()) == 4
    assert toy.run().returncode == 0
    assert first.items() <= toy.results().items() and set(Counter(toy.log()).values()) == {1} and len(toy.log()) == 5


def test_a_run_that_raises_is_recorded_and_the_others_go_on(toy, undisturbed):
    toy.flag("raise-transfer-full-1")
    done = toy.run()
    assert done.returncode == 1 and Counter(r[0] for r in toy.results().values()) == {"done": 6, "failed": 1}
    bad, = (r for r in toy.records().values() if r["status"] == "failed")
    assert (
        bad["id"] in done.stdout
        and bad["error"]["message"] == "told to fail: transfer-full-1"
        and "in work" in bad["error"]["traceback"]
    )
    status = toy.vfm("status", str(toy.study))
    assert (
        status.returncode == 1
        and bad["id"] in status.stdout
        and "told to fail" in status.stdout
        and "6 done" in status.stdout
    )
    toy.flag("raise-transfer-full-1", False)
    again = toy.run()
    # said, not retried
    assert (
        again.returncode == 1 and bad["id"] in again.stdout and "--retry-failed" in again.stdout and len(toy.log()) == 6
    )
    assert (
        toy.run("--retry-failed").returncode == 0
        and set(Counter(toy.log()).values()) == {1}
        and same(toy, undisturbed)
        and len(toy.log()) == 7
    )


def test_a_failed_pretraining_blocks_only_what_needs_it(tmp_path):
    toy = Toy(tmp_path, backbones=["profound_toy.mae_phantom", "provicnet_toy.contrast_phantom"])
    toy.write(
        pretrain=toy.values["pretrain"]
        | {"contrast_phantom": {"backbone": "provicnet_toy", "seed": 7, "options": {"flags": str(toy.flags)}}}
    )
    toy.flag("raise-pretrain--7")
    done = toy.run()
    assert (
        done.returncode == 1
        and "missing segmentation-provicnet_toy.contrast_phantom-n4: what it needs" in done.stdout
        and "missing 6 runs" in done.stdout
    )
    assert Counter((r["kind"], r["status"]) for r in toy.records().values()) == {
        ("pretrain", "done"): 1, ("pretrain", "failed"): 1, ("transfer", "done"): 6,
    }
    again = toy.run()
    assert (
        again.returncode == 1
        and "pretrain-provicnet_toy" in again.stdout
        and "missing 6 runs" in again.stdout
        and "notebooks to run" not in again.stdout
    )


def test_a_notebook_that_stops_after_its_runs(toy):
    toy.flag("raise-at-the-end")
    done = toy.run()
    assert (
        done.returncode == 1
        and {r[0] for r in toy.results().values()} == {"done"}
        and "told to fail at the end" in done.stdout
        and "cell 4" in done.stdout
    )
    log = toy.log()
    toy.flag("raise-at-the-end", False)
    assert toy.run().returncode == 1 and toy.vfm("status", str(toy.study)).returncode == 1
    assert toy.run("--retry-failed").returncode == 0 and toy.log() == log and toy.run().returncode == 0


def test_a_killed_kernel_gets_a_second_chance_then_only_its_run_fails(toy, undisturbed):
    toy.flag("die-once-transfer-scratch-0")
    toy.flag("die-transfer-full-1")
    done = toy.run()
    states = {
        (r["spec"]["strategy"], r["spec"]["seed"]): (r["status"], (r["error"] or {}).get("type"))
        for r in toy.records().values()
        if r["kind"] == "transfer"
    }
    assert (
        done.returncode == 1
        and states.pop(("full", 1)) == ("failed", "KernelDied")
        and set(states.values()) == {("done", None)}
        and len(states) == 5
    )
    toy.flag("die-transfer-full-1", False)
    assert (
        toy.run("--retry-failed").returncode == 0 and same(toy, undisturbed) and set(Counter(toy.log()).values()) == {1}
    )


def test_a_killed_worker_gets_a_second_chance(toy, undisturbed):
    toy.flag("hold")
    runner = toy.start_run("--jobs", "1")
    wait_until(lambda: list(toy.flags.glob("holding-*")))
    lock = toy.runs/"toy"/"locks"/"pretrain-profound_toy.mae_phantom.lock"
    worker = int(lock.read_text(encoding="utf-8").split()[0])
    os.kill(worker, signal.SIGKILL)
    kernel = int(next(toy.flags.glob("holding-*")).name.split("-")[1])
    wait_until(lambda: not pid_alive(kernel))  # a kernel does not outlive its worker
    toy.flag("hold", False)
    out, err = runner.communicate(timeout=300)
    assert (
        runner.returncode == 0 and "again" in out and same(toy, undisturbed) and set(Counter(toy.log()).values()) == {1}
    ), out + err


@pytest.mark.parametrize("engine", ["forked", "plain"])
def test_kill_9_of_the_runner_then_the_same_command(tmp_path, undisturbed, engine):
    toy = Toy(tmp_path, sleep=0.2)
    toy.server = None  # the runner's own server must die with it, too
    runner = toy.start_run("--engine", engine)
    wait_until(lambda: len(toy.log()) >= 3)
    runner.kill()
    runner.wait()
    before = toy.records()
    wait_until(lambda: not alive_with(str(toy.runs)))  # no worker, kernel or fork server survives
    assert 0 < len(before) < 7
    finished = {i: (toy.runs/"toy"/i/"record.json").stat().st_mtime_ns for i in toy.records()}
    again = toy.run("--engine", engine)
    assert again.returncode == 0, again.stdout + again.stderr
    assert finished.items() <= {i: (toy.runs/"toy"/i/"record.json").stat().st_mtime_ns for i in toy.records()}.items()
    assert len(toy.results()) == 7 and same(toy, undisturbed) and not list((toy.runs/"toy").glob(".*"))
    unfinished = [i for i, n in Counter(toy.log()).items() if n > 1]
    assert not set(unfinished) & set(finished)  # a run that was hit at work may appear twice, a finished one never
    assert "up to date" in toy.run().stdout


def test_two_runners_do_each_job_once(tmp_path, undisturbed):
    toy = Toy(tmp_path, sleep=0.1, tasks={})
    options = toy.values["pretrain"]["mae_phantom"]["options"]
    toy.write(tasks={t: options for t in ("segmentation", "classification", "translation")}, seeds=[0, 1])
    runners = [toy.start_run("--jobs", "2") for _ in range(2)]
    said = [r.communicate(timeout=300) for r in runners]
    assert [r.returncode for r in runners] == [0, 0], said
    assert len(toy.results()) == 13 and set(Counter(toy.log()).values()) == {1}


def test_a_corrupt_record_is_said_and_computed_again(toy, undisturbed):
    assert toy.run().returncode == 0
    victim = next(i for i in toy.results() if "full-n4-s2" in i)
    before = toy.results()
    (toy.runs/"toy"/victim/"curves.parquet").write_bytes(b"half")
    again = toy.run()
    assert again.returncode == 0 and victim in again.stderr and f"{victim}.corrupt-1" in again.stderr
    assert (
        toy.results() == before and same(toy, undisturbed) and Counter(toy.log())[victim] == 2 and len(toy.log()) == 8
    )


def test_forked_and_plain_kernels_give_the_same_cell_by_cell(tmp_path):
    toys = {}
    for engine in ("forked", "plain"):  # the same study file, so that the specs are the same
        toys[engine] = Toy(tmp_path/engine, seeds=[0])
        toys[engine].study, toys[engine].flags = tmp_path/"toy.yaml", tmp_path/"none"
        toys[engine].write(pretrain={"mae_phantom": {"backbone": "profound_toy"}}, tasks={"segmentation": {}})
        done = toys[engine].run("--engine", engine)
        assert done.returncode == 0, done.stdout + done.stderr
    assert toys["forked"].results() == toys["plain"].results() and len(toys["plain"].results()) == 3
    def cells(toy):
        return [
            (c.cell_type, c.source, c.get("execution_count"), c.get("outputs"))
            for f in sorted((toy.runs / "toy" / "notebooks").glob("*.ipynb"))
            for c in nbformat.read(f, 4).cells
        ]
    assert cells(toys["forked"]) == cells(toys["plain"])


def test_without_fork_it_says_so_and_works(tmp_path):
    toy = Toy(tmp_path, seeds=[0], strategies=["scratch"])
    toy.server = None
    done = toy.run(VFM_FORK="0")
    assert done.returncode == 0 and "No fast starts (VFM_FORK=0)" in done.stderr and len(toy.results()) == 2


def test_progress_can_be_watched_from_outside(tmp_path):
    toy = Toy(tmp_path, seeds=[0])
    toy.flag("hold")
    runner = toy.start_run()
    wait_until(lambda: list(toy.flags.glob("holding-*")))
    status = toy.vfm("status", str(toy.study))
    assert (
        "running pretrain-profound_toy.mae_phantom" in status.stdout
        and "1 running, 2 missing of 3 runs; 1 notebook at work" in status.stdout
        and status.returncode == 0
    )
    toy.flag("hold", False)
    assert runner.wait(300) == 0 and "running " not in toy.vfm("status", str(toy.study)).stdout
    runner.communicate()


def test_threads_are_set_after_the_fork_and_operations_work_there():
    pytest.importorskip("torch")
    from vfm_notes.runs.forkserver import Forked
    with ForkServer(["torch", "numpy"]) as server:
        code = (
            "import sys, torch; torch.manual_seed(0); a = torch.randn(300, 300); print(torch.get_num_threads(), "
            "float((a @ a.T).sum()), float(torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3]).sum()))"
        )
        said = []
        for n in ("1", "2"):
            log = server.log.with_name(f"child-{n}")
            assert (
                Forked(server.address, "builtins:exec", code, env=os.environ | {"OMP_NUM_THREADS": n}, log=log).wait(
                    300
                )
                == 0
            )
            said.append(log.read_text(encoding="utf-8").split())
    import torch
    torch.manual_seed(0)
    a = torch.randn(300, 300)
    assert [s[0] for s in said] == ["1", "2"]
    for s in said:
        assert [float(x) for x in s[1:]] == pytest.approx(
            [float((a @ a.T).sum()), float(torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3]).sum())],
            rel=1e-4,
        )


@pytest.mark.parametrize("first", ["vfm_notes.runs.engine", "papermill"])
def test_papermill_finds_the_engine_whoever_is_imported_first(tmp_path, first):
    info = tmp_path/"fake-1.0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    (info/"entry_points.txt").write_text("[papermill.engine]\nforked = vfm_notes.runs.engine:ForkedEngine\n")
    code = (
        f"import {first}; from papermill.engines import papermill_engines as e; from vfm_notes.runs.engine import "
        "ForkedEngine as f; assert e.get_engine('forked') is f and f is not None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{python_path()}"},
    )
    assert done.returncode == 0, done.stderr


def test_two_shards_at_once_share_the_pretraining_and_finish_the_study(tmp_path, undisturbed):
    tasks = {
        t: {"flags": str(tmp_path / "flags"), "sleep": 0.05}
        for t in ("segmentation", "super_resolution", "distortion_correction")
    }
    toy = Toy(tmp_path, tasks=tasks)
    both = [toy.start_run("--shard", f"{i}/2") for i in (1, 2)]
    for process in both: process.communicate(timeout=300)
    assert [p.returncode for p in both] == [0, 0]
    assert len(toy.records()) == 1 + 3 * 6 and set(Counter(toy.log()).values()) == {1}


def test_after_its_hours_it_starts_nothing_more(tmp_path):
    toy = Toy(tmp_path)
    done = toy.run("--max-hours", "0.0000001")
    assert done.returncode == 1 and "the time is over" in done.stdout and not toy.records()
    assert toy.run("--max-hours", "1", "--seeds", "0-1").returncode == 0 and len(toy.records()) == 5


def test_a_disk_that_is_too_small_is_told_before_the_first_notebook(tmp_path):
    toy, disk = Toy(tmp_path), tmp_path/"disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("a small tmpfs needs root")
    try:
        done = toy.run(VFM_RUNS=str(disk/"runs"))
        assert (
            done.returncode == 2
            and "7 runs will need about 0.1 GB" in done.stderr
            and "VFM_RUNS" in done.stderr
            and not list(disk.rglob("record.json"))
        )
    finally: subprocess.run(["umount", disk])
