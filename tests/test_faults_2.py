"""More faults done for real: asked to leave, no memory, no space, no end, no reliable clock, another template."""
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from toy_batch import Toy, TRAINING, undisturbed, wait_until, write_template


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and mounts as on Linux")


@pytest.fixture(scope="module", autouse=True)
def shared_server(toy_server):
    "One fork server for most of these tests, which saves each of them its imports."
    Toy.server = toy_server
    yield
    Toy.server = None


@pytest.fixture
def toy(tmp_path) -> Toy: return Toy(tmp_path)


@pytest.fixture(scope="module")
# what is left where nothing happens
def table(tmp_path_factory) -> dict: return undisturbed(tmp_path_factory.mktemp("undisturbed")).table()


def mended(toy: Toy, table: dict, flag: str) -> bool:
    "Without its fault, does the study end as an undisturbed one, no run computed twice?"
    toy.flag(flag, False)
    done = toy.run("--retry-failed")
    assert done.returncode == 0, done.stdout + done.stderr
    return toy.table() == table and set(Counter(toy.log()).values()) == {1}


def kernel_at_work(toy: Toy) -> int:
    "Process number of the one that holds, as it says itself."
    return int(wait_until(lambda: list(toy.flags.glob("holding-*")))[0].name.split("-")[1])


# ---- asked to leave

@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    "Results of a real training that nobody disturbs."
    toy = training(tmp_path_factory.mktemp("trained"))
    assert toy.run(*ONLY).returncode == 0
    return numbers(toy)


ONLY = ("--only", "kind=pretrain")


def training(root) -> Toy:
    "A toy whose one pretraining takes steps of a real net, slowly enough to be asked to leave."
    toy = Toy(root, tasks={"segmentation": {"flags": str(root/"flags")}}, strategies=["scratch"], seeds=[0])
    write_template(toy.templates/"pretrain.ipynb", "pretrain", body=TRAINING)
    return toy


def numbers(toy: Toy) -> dict:
    return {i.rsplit("-", 1)[0]: (r["status"], r["metrics"]) for i, r in toy.records().items()}


@pytest.mark.parametrize("whom", ["runner", "worker", "kernel"])
def test_sigterm_ends_the_epoch_and_leaves_a_checkpoint(tmp_path, trained, whom):
    toy = training(tmp_path)
    toy.flag("slow")
    runner = toy.start_run(*ONLY)
    kernel = kernel_at_work(toy)
    worker = int(
        (toy.runs / "toy" / "locks" / "pretrain-profound_toy.mae_phantom.lock").read_text(encoding="utf-8").split()[0]
    )
    os.kill({"runner": runner.pid, "worker": worker, "kernel": kernel}[whom], signal.SIGTERM)
    out, err = runner.communicate(timeout=300)
    assert (
        runner.returncode == 1
        and "missing pretrain" in out and ": paused as requested" in out
        and not any(r["status"] == "failed" for r in toy.records().values())
    ), out + err
    assert whom != "runner" or ("stop requested" in out and not toy.records() and "SIGTERM" in err)
    kept, = (toy.runs/"toy"/"checkpoints").glob("*.pt")
    epochs = (toy.flags/"epochs").read_text(encoding="utf-8").split()
    import torch
    at = torch.load(kept, weights_only=True)
    # after a whole epoch, long before the end
    assert (at["epoch"], at["done"]) == (int(epochs[-1]) + 1, 0) and int(epochs[-1]) < 40
    toy.flag("slow", False)
    again = toy.run(*ONLY)
    assert again.returncode == 0 and numbers(toy) == trained, again.stdout + again.stderr
    # none was taken twice
    assert (toy.flags/"epochs").read_text(encoding="utf-8").split() == [str(e) for e in range(1, 41)]
    assert not kept.exists()


def test_an_epoch_that_is_too_long_is_cut_but_its_steps_are_kept(tmp_path, trained):
    toy = training(tmp_path)
    toy.flag("endless-step-7")
    runner = toy.start_run(*ONLY, VFM_GRACE="1")
    kernel_at_work(toy)
    wait_until(lambda: (toy.flags/"endless").exists())
    runner.send_signal(signal.SIGTERM)
    out, err = runner.communicate(timeout=300)
    assert runner.returncode == 1 and not toy.records(), out + err
    assert "missing pretrain" in out and ": paused as requested" in out
    toy.flag("endless-step-7", False)
    assert toy.run(*ONLY).returncode == 0 and numbers(toy) == trained


# ---- memory, space, time

def test_a_run_that_wants_too_much_memory_fails_alone(toy, table):
    toy.flag("hungry-transfer-full-1")
    done = toy.run()
    assert done.returncode == 1 and Counter(r["status"] for r in toy.records().values()) == {"done": 6, "failed": 1}
    bad, = (r for r in toy.records().values() if r["status"] == "failed")
    assert (
        "full" in bad["id"]
        and bad["error"]["type"] in ("MemoryError", "_ArrayMemoryError")
        and "allocate" in bad["error"]["message"]
    )
    assert mended(toy, table, "hungry-transfer-full-1")


def test_a_kernel_that_the_system_kills_for_memory(toy, table):
    group = f"/sys/fs/cgroup/memory/vfm-test-{os.getpid()}"
    try:
        os.mkdir(group)
        with open(f"{group}/memory.limit_in_bytes", "w") as f: f.write(str(600 << 20))
        with open(f"{group}/cgroup.procs"): pass
    except OSError as error: pytest.skip(f"no memory cgroup can be made here ({error})")
    try:
        toy.flag("hungry-group-transfer-full-1")
        toy.write(tasks={"segmentation": toy.values["tasks"]["segmentation"] | {"group": group}})
        done = toy.run()
        assert done.returncode == 1, done.stdout + done.stderr
        bad, = (r for r in toy.records().values() if r["status"] == "failed")
        assert (
            bad["error"]["type"] == "KernelDied"
            and "memory runs out" in bad["error"]["message"]
            and bad["error"]["cell"] == 3
            and "full" in bad["id"]
        )
        assert Counter(r["status"] for r in toy.records().values()) == {"done": 6, "failed": 1} and mended(
            toy, table, "hungry-group-transfer-full-1"
        )
    finally: os.rmdir(group)


def test_a_run_that_hangs_is_ended_and_names_its_cell(toy, table):
    toy.flag("hang-transfer-scratch-1")
    done = toy.run("--time-limit", "0.4")  # minutes; the others take a moment
    assert done.returncode == 1 and Counter(r["status"] for r in toy.records().values()) == {"done": 6, "failed": 1}, (
        done.stdout + done.stderr
    )
    bad, = (r for r in toy.records().values() if r["status"] == "failed")
    assert (
        "scratch-n4-s1" in bad["id"]
        and bad["error"]["type"] == "TimeLimit"
        and bad["error"]["cell"] == 3
        and "0.4 minutes" in bad["error"]["message"]
        and "cell 3" in done.stdout
    )
    toy.write(time_limit=1)
    assert mended(toy, table, "hang-transfer-scratch-1")


def test_a_notebook_that_hangs_outside_of_its_runs(toy):
    toy.flag("hang-at-the-end")
    toy.write(time_limit=0.4)
    done = toy.run("--only", "kind=pretrain")
    assert (
        done.returncode == 1 and "cell 4" in done.stdout and [r["status"] for r in toy.records().values()] == ["done"]
    ), done.stdout + done.stderr


def test_a_disk_that_becomes_full(tmp_path, table):
    toy, disk = Toy(tmp_path), tmp_path/"disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("a small tmpfs needs root")
    try:
        toy.runs = disk/"runs"
        toy.flag("fill-transfer-full-0")
        (toy.flags/"where").write_text(str(disk/"filler"))
        full = toy.run("--jobs", "1")
        said = f"The disk of {disk}/runs/toy is full: make space"
        assert full.returncode == 1 and full.stderr.count(said) == 1 and "Traceback" not in full.stderr, (
            full.stdout + full.stderr
        )
        whole = toy.results()
        assert whole and {r[0] for r in whole.values()} == {"done"} and not list((toy.runs/"toy").glob(".*"))
        toy.flag("fill-transfer-full-0", False)
        (disk/"filler").unlink()
        again = toy.run()
        assert again.returncode == 0 and toy.table() == table and whole.items() <= toy.results().items(), (
            again.stdout + again.stderr
        )
        assert not set(whole) & {i for i, n in Counter(toy.log()).items() if n > 1}
    finally: subprocess.run(["umount", disk])


# ---- clocks and templates

JUMPS = '''
import random, time
real = time.time
time.time = lambda: real() + random.choice((-86400.0, 0.0, 86400.0))  # a clock that jumps by a day at every look
'''


def test_a_clock_that_jumps_changes_nothing(tmp_path, table):
    toy = Toy(tmp_path, sleep=0.05)
    toy.server = None
    (tmp_path/"jumps").mkdir()
    (tmp_path/"jumps"/"sitecustomize.py").write_text(JUMPS)
    path = f"{tmp_path/'jumps'}{os.pathsep}{toy.env['PYTHONPATH']}"
    probe = subprocess.run(
        [sys.executable, "-c", "import time; print(max(abs(time.time() - time.time()) for _ in range(50)))"],
        env=toy.env | {"PYTHONPATH": path}, capture_output=True, text=True,
    )
    assert float(probe.stdout) > 80000, probe.stderr
    runner = toy.start_run("--jobs", "1", PYTHONPATH=path)
    lock = toy.runs/"toy"/"locks"/"pretrain-profound_toy.mae_phantom.lock"
    wait_until(lock.exists)
    os.utime(lock, (time.time() + 1e6, time.time() + 1e6))  # begun in the future
    status = toy.vfm("status", str(toy.study), PYTHONPATH=path)
    assert status.returncode == 0, status.stdout
    for line in status.stdout.splitlines():
        if line.startswith("running"): assert not re.search(r" -\d", line), "no negative times"
    out, err = runner.communicate(timeout=300)
    assert (
        runner.returncode == 0 and " h " not in out and toy.table() == table and set(Counter(toy.log()).values()) == {1}
    ), out + err
    assert "up to date" in toy.run(PYTHONPATH=path).stdout
    files = [p for p in (toy.runs/"toy").rglob("*") if p.is_file()]
    for p in files: os.utime(p, (time.time() + 1e7, time.time() + 1e7))
    assert "up to date" in toy.run().stdout and toy.vfm("status", str(toy.study)).returncode == 0


def test_a_template_edited_in_the_middle_of_a_study_is_told(toy, table):
    assert toy.run("--seeds", "0").returncode == 0 and "another version" not in toy.vfm("status", str(toy.study)).stdout
    template = toy.templates/"transfer.ipynb"
    template.write_text(template.read_text(encoding="utf-8").replace("# files in this folder cause faults", "# edited"))
    before = toy.results()
    status = toy.vfm("status", str(toy.study)).stdout
    assert f"2 records were made by another version of {template}" in status
    done = toy.run()
    assert (
        done.returncode == 0
        and f"2 records were made by another version of {template}" in done.stdout
        and before.items() <= toy.results().items()
    )
    hashes = Counter(r["template_hash"] for r in toy.records().values() if r["kind"] == "transfer")
    assert sorted(hashes.values()) == [2, 4] and toy.table() == table


def test_a_changed_study_lists_old_records_and_never_mixes_them(toy):
    assert toy.run("--seeds", "0").returncode == 0
    toy.write(size=[4, 8, 16])
    status = toy.vfm("status", str(toy.study))
    assert (
        "3 records belong to no run of the study file as it is now" in status.stdout
        and "Study toy: 7 missing of 7 runs" in status.stdout
    )
    assert toy.run("--seeds", "0").returncode == 0 and len(toy.records()) == 6
    table = toy.vfm("table", str(toy.study))
    assert "3 records belong to no run" in table.stderr and "Study toy: 3 done, 4 missing of 7 runs" in table.stderr
    assert "scratch" in table.stdout, table


def test_status_can_be_watched_to_the_end(tmp_path):
    toy = Toy(tmp_path, seeds=[0])
    toy.flag("hold")
    runner = toy.start_run()
    kernel_at_work(toy)
    watcher = toy.start("status", str(toy.study), "--watch", "--every", "0.2")
    wait_until(lambda: "of 3 runs; 1 notebook at work" in watcher.stdout.readline())
    toy.flag("hold", False)
    assert runner.wait(300) == 0
    out, err = watcher.communicate(timeout=300)
    assert watcher.returncode == 0 and "3 done of 3 runs." in out and "running " not in out.splitlines()[-1], out + err
    runner.communicate()
