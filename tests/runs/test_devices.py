"""Places on GPUs: never more than there are, each notebook sees its own, and the parent of all never touches CUDA."""
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_batch import Toy, wait_until

from vfm_notes.foundation.registry import VfmError
from vfm_notes.runs.executors import Device, LocalSettings, Slots, choose_devices, found_devices, local_settings
from vfm_notes.runs.executors import LocalExecutor
from vfm_notes.runs.forkserver import Forked, ForkServer

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks as on Linux")


@given(
    st.lists(st.floats(1, 100), min_size=1, max_size=5), st.floats(5, 60), st.integers(1, 3),
    st.lists(st.integers(0, 20), max_size=40),
)
@settings(max_examples=80, deadline=None)
def test_no_gpu_is_ever_promised_more_than_it_has(memories, need, processes, moves):
    devices = {f"g{i}": m for i, m in enumerate(memories)}
    try: slots = Slots([Device(str(i), n, m) for i, (n, m) in enumerate(devices.items())], need, processes)
    except VfmError:
        assert sum(m >= need for m in memories) < processes
        return
    taken = []
    for move in moves:  # a notebook begins, or one of those at work ends
        if move < 12:
            names = slots.take()
            if names is None:  # only when there really is no place
                used = Counter(n for t in taken for n in t)
                assert sum(m - used[n] * need >= need * (1 + 1e-9) for n, m in devices.items()) < processes
                continue
            assert len(names) == len(set(names)) == processes
            taken.append(names)
        elif taken: slots.give(taken.pop(move % len(taken)))
        used = Counter(n for t in taken for n in t)
        assert all(used[n] * need <= m * (1 + 1e-9) for n, m in devices.items())
    for names in taken: slots.give(names)
    # how many sets of different GPUs there are
    best = max(k for k in range(120) if sum(min(k, int(m // need)) for m in memories) >= k * processes)
    assert slots.total() == best


def test_without_a_memory_request_each_has_a_gpu_of_its_own():
    slots = Slots([Device("0", "a", 80.0), Device("1", "b", 0.0)])
    assert [slots.take(), slots.take(), slots.take()] == [("a",), ("b",), None]


def test_what_nvidia_smi_says_is_taken_and_a_choice_of_others_respected(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho '0, GPU-aa, 80000'\necho '1, GPU-bb, 40000'\necho '2, GPU-cc, [N/A]'\n"
    )
    (tmp_path/"nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(d.name, round(d.memory)) for d in found_devices()] == [("GPU-aa", 78), ("GPU-bb", 39), ("GPU-cc", 0)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb,0")
    assert [d.name for d in found_devices()] == ["GPU-bb", "GPU-aa"] and [
        d.name for d in choose_devices("1", found_devices())
    ] == ["GPU-bb"]
    (tmp_path/"nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert found_devices() == []


def test_settings_are_read_strictly(tmp_path):
    (tmp_path/"mine.yaml").write_text("gpu_memory: 10\n")
    assert local_settings({"gpu_memory": 20, "processes": 2}, tmp_path / "mine.yaml") == LocalSettings(
        gpu_memory=10, processes=2
    )
    for wrong, said in (
        ({"gpu_memory": -1}, "gpu_memory is -1"), ({"processes": 0}, "processes is 0"),
        ({"processes": "two"}, "processes is 'two'"), ({"gpu": 1}, "unknown key 'gpu'.*gpus"),
    ):
        with pytest.raises(VfmError, match=said): local_settings(wrong)


SEE = (
    "import json, os, sys; torch = sys.modules.get('torch'); "
    "print(json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), torch is not None, torch.cuda.is_initialized() or "
    "torch.cuda._is_in_bad_fork(), torch.get_num_threads()]), flush=True)\nwhile not os.path.exists({go!r}): "
    "__import__('time').sleep(0.01)"
)


@linux
def test_each_forked_process_sees_its_own_gpu_and_nothing_was_touched_before(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_GPUS", "a:40,b:20")
    monkeypatch.delenv("VFM_FORKSERVER", raising=False)
    with LocalExecutor(modules=["torch"], settings=LocalSettings(gpu_memory=20)) as executor:
        assert executor.jobs == min(3, os.cpu_count())
        executor.jobs, end = 8, time.monotonic() + 300  # more than there are places
        futures, most = (
            [executor.submit(exec, SEE.format(go=str(tmp_path / "go")), log=tmp_path / f"{i}.log") for i in range(5)],
            0,
        )
        while not all([f.done() for f in futures]):
            at_work = Counter(f.gpus[0] for f in executor.active)
            assert at_work["a"] <= 2 and at_work["b"] <= 1
            most = max(most, at_work.total())
            if most == 3 or time.monotonic() > end: (tmp_path/"go").touch()  # all places are taken
            time.sleep(0.01)
        maps = Path(f"/proc/{executor.server.process.pid}/maps").read_text()
    seen = [json.loads((tmp_path/f"{i}.log").read_text(encoding="utf-8").splitlines()[0]) for i in range(5)]
    assert [s[0] for s in seen] == [f.gpus[0] for f in futures] and {"a", "b"} == {s[0] for s in seen} and most == 3
    assert (
        all(torch and not touched for _, torch, touched, _ in seen) and "libtorch" in maps and "/dev/nvidia" not in maps
    )


@linux
def test_a_server_that_has_touched_cuda_forks_nothing(tmp_path):
    (tmp_path/"touches.py").write_text("import torch\ntorch.cuda.is_initialized = lambda: True\n")
    env = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env or ''}"
    try: server = ForkServer(["touches"], log=tmp_path/"log")
    finally: os.environ.pop("PYTHONPATH") if env is None else os.environ.update(PYTHONPATH=env)
    with server:
        with pytest.raises((VfmError, OSError)):
            Forked(server.address, "os:getpid")
            raise AssertionError("it forked")
        wait_until(lambda: "has begun to use CUDA" in (tmp_path/"log").read_text(encoding="utf-8"))


@linux
def test_notebooks_of_a_study_share_two_made_up_gpus(tmp_path, toy_server):
    tasks = {
        t: {"flags": str(tmp_path / "flags")}
        for t in ("segmentation", "super_resolution", "distortion_correction", "translation", "classification")
    }
    toy = Toy(tmp_path, tasks=tasks, seeds=[0], strategies=["scratch"], local={"gpu_memory": 30})
    for kind in ("pretrain", "transfer"):
        path = toy.templates/f"{kind}.ipynb"
        said = "open(flags/('gpu-' + os.environ['CUDA_VISIBLE_DEVICES']), 'a').write('x')"
        path.write_text(path.read_text(encoding="utf-8").replace("# files in this folder cause faults", rf"\n{said}"))
    toy.server = toy_server
    done = toy.run("--gpus", "one:80,two:40", "--jobs", "3")
    assert done.returncode == 0 and "3 at a time on 2 GPUs" in done.stdout, done.stdout + done.stderr
    assert {p.name for p in toy.flags.glob("gpu-*")} <= {"gpu-one", "gpu-two"} and sum(
        len(p.read_text(encoding="utf-8")) for p in toy.flags.glob("gpu-*")
    ) == 1 + 5
    none = Toy(tmp_path/"none", seeds=[0], strategies=["scratch"])
    none.server = toy_server
    big = none.run("--gpus", "one:20", "--profile", write(tmp_path/"mine.yaml", "gpu_memory: 30\n"))
    assert (
        big.returncode == 2
        and "needs 30 GiB of a GPU, and the largest here has 20.0 GiB" in big.stderr
        and not none.records()
    )


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)
