"""What a cluster does to jobs, on a real Slurm of one node: preempted, out of time, their node gone; the study goes on
where it was."""
import os

import pytest
from slurm_cluster import absent, cluster
from toy_batch import Toy, TRAINING, wait_until, write_template

from vfm_notes.runs.slurm import SlurmExecutor, slurm_settings

ONLY = ("--only", "kind=pretrain")
SETTINGS = {"cpus": 1, "memory": "0", "time": 10}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := absent(): pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")/"c") as ask: yield ask


def training(root, **more) -> Toy:
    "A study whose one pretraining takes 40 epochs of a real net."
    toy = Toy(
        root, tasks={"segmentation": {"flags": str(root / "flags")}}, strategies=["scratch"], seeds=[0],
        slurm=SETTINGS | more,
    )
    write_template(toy.templates/"pretrain.ipynb", "pretrain", body=TRAINING)
    return toy


def numbers(toy): return [(r["status"], r["metrics"]) for r in toy.records().values()]
def epochs(toy):
    return (toy.flags/"epochs").read_text(encoding="utf-8").split() if (toy.flags/"epochs").exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "What that training gives when nothing happens to it, without Slurm."
    toy = training(tmp_path_factory.mktemp("undisturbed"))
    assert toy.run(*ONLY).returncode == 0
    return numbers(toy)


def begun(toy, slurm):
    "The study on its way, and the id of its job once that trains."
    toy.flag("slow")
    runner = toy.start_run("--executor", "slurm", *ONLY)
    wait_until(lambda: len(epochs(toy)) >= 3)
    return runner, slurm("squeue", "-h", "-r", "-o", "%i").stdout.split()[0]


def goes_on(toy, runner, undisturbed):
    "The study ends as if nothing had happened."
    toy.flag("slow", False)
    out, err = runner.communicate(timeout=300)
    assert runner.returncode == 0, out + err
    assert numbers(toy) == undisturbed and len(toy.records()) == 1, numbers(toy)


def restarts(slurm, id): return int(slurm("scontrol", "-o", "show", "job", id).stdout.split("Restarts=")[1].split()[0])


def test_out_of_time_it_writes_a_checkpoint_and_goes_back_into_the_queue(slurm, tmp_path, undisturbed):
    toy = training(tmp_path)
    runner, id = begun(toy, slurm)
    slurm("scancel", "--signal=USR2", id)  # what Slurm sends ahead of the end of the time
    wait_until(lambda: restarts(slurm, id) == 1)
    goes_on(toy, runner, undisturbed)
    assert epochs(toy) == [str(e) for e in range(1, 41)]  # none was taken twice


def test_preempted_by_somebody_more_important_it_goes_on_afterwards(slurm, tmp_path, undisturbed):
    toy = training(tmp_path)
    runner, id = begun(toy, slurm)
    urgent = slurm(
        "sbatch", "-p", "urgent", "-c", "2", "-o", "/dev/null", "--wrap", f"touch {tmp_path}/urgent; sleep 1"
    )
    assert urgent.returncode == 0, urgent.stderr
    wait_until(lambda: (tmp_path/"urgent").exists())  # it has the machine
    assert (
        list((toy.runs / "toy" / "checkpoints").glob("*.pt"))
        and not toy.records()
        and " done" not in toy.vfm("status", str(toy.study)).stdout
    )
    goes_on(toy, runner, undisturbed)
    assert restarts(slurm, id) == 1 and epochs(toy) == [str(e) for e in range(1, 41)]


def test_a_node_that_disappears(slurm, tmp_path, undisturbed):
    toy = training(tmp_path)
    runner, id = begun(toy, slurm)
    slurm.kill_node()
    wait_until(lambda: "down" in slurm("sinfo", "-h", "-o", "%t").stdout)
    slurm.start_node()
    toy.flag("slow", False)
    out, err = runner.communicate(timeout=300)
    # Slurm did not put it back into the queue: the same command does
    if runner.returncode: assert toy.run("--executor", "slurm", *ONLY).returncode == 0
    assert numbers(toy) == undisturbed and set(epochs(toy)) == {str(e) for e in range(1, 41)}, out + err


def test_setup_lines_and_containers_of_a_profile(slurm, tmp_path):
    wrapper = tmp_path/"container"
    wrapper.write_text("#!/bin/sh\nexport CONTAINER=mine\nexec \"$@\"\n")
    wrapper.chmod(0o755)
    import sys
    (tmp_path / "cluster.yaml").write_text(
        f"setup: ['module() {{ export LOADED=$2; }}', 'module load cuda/12']\npython: {wrapper} {sys.executable}\n"
        "cpus: 2\nprocesses: 2\n"
    )
    with SlurmExecutor(
        settings=slurm_settings(SETTINGS, tmp_path / "cluster.yaml"), folder=tmp_path / "jobs", poll=0.3
    ) as executor:
        futures = [executor.submit(os.getenv, k) for k in ("LOADED", "CONTAINER", "OMP_NUM_THREADS", "VFM_PROCESSES")]
        assert [f.result(300) for f in futures] == ["cuda/12", "mine", "1", "2"]
