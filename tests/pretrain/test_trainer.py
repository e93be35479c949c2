"""The trainer: exact resume after a real kill, memory that really runs out, a disk that is really full, two processes
that give what one gives."""
import copy
import os
import signal
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn

from vfm_notes.foundation.registry import VfmError
from vfm_notes.pretrain.trainer import (
    Diverged, Checkpointer, TrainConfig, Stopped, Trainer, is_out_of_memory, microbatches, lr_factor, train,
)

TOY = '''
import sys, time, torch
from pathlib import Path
from torch import nn
from vfm_notes.data.augment import augment
from vfm_notes.data.loader import Loader
from vfm_notes.pretrain.trainer import Checkpointer, TrainConfig, Trainer, train

def toy(**recipe):
    "A small net with dropout and flips, so that random state and data order matter."
    torch.manual_seed(0)
    x = torch.randn(10, 1, 4, 6, 6)
    net = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Dropout(0.3), nn.Conv3d(3, 1, 1))
    def loss(module, batch):
        return (module(batch["inputs"]) - batch["target"]).square().mean(), {}
    loader = Loader({"inputs": x, "target": x.roll(1, -1)}, 4, seed=3, change=augment(("flip",)))
    return Trainer(net, loss, loader, TrainConfig(**{"epochs": 6, "lr": 0.01} | recipe))
'''
exec(TOY, made := {})
toy = made["toy"]


def run(code: str, *args, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", TOY + textwrap.dedent(code), *map(str, args)], capture_output=True, text=True,
        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_plain_loop_gives_the_same_weights():
    ours, plain = toy(), toy()
    train(ours, lambda e, l: {}, [])
    torch.manual_seed(0); torch.randn(10, 1, 4, 6, 6)
    net = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Dropout(0.3), nn.Conv3d(3, 1, 1))
    decay, rest = (
        [p for p in net.parameters() if p.dim() > 1 and p.numel() > max(p.shape)],
        [p for p in net.parameters() if not (p.dim() > 1 and p.numel() > max(p.shape))],
    )
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=0.01
    )
    net.train()
    step = 0
    for epoch in range(1, 7):
        for batch in plain.loader.epoch(epoch):
            for group in optimiser.param_groups: group["lr"] = 0.01 * lr_factor(step, 18, 0.1)
            optimiser.zero_grad()
            (net(batch["inputs"]) - batch["target"]).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            step += 1
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours.module.parameters(), net.parameters()))


KILLED = '''
def finish(kept):
    "The training from its checkpoint on, to its end."
    trainer = toy(ema=0.9)
    rows = train(trainer, lambda e, l: {}, [], Checkpointer(kept, "run", minutes=0))
    return {"net": trainer.module.state_dict(), "average": trainer.average.module.state_dict()}, [r[3] for r in rows]

if __name__ == "__main__":  # a process that says when it has taken so many steps, and waits two steps later
    toy, free, steps = lambda **recipe: slowed(free(**recipe)), toy, iter(range(100))
    def slowed(trainer, plain=None):
        plain = trainer.step.loss
        def loss(module, batch):
            step = next(steps)
            if step == int(sys.argv[2]): print("now", flush=True)
            time.sleep(600 if step == int(sys.argv[2]) + 2 else 0)
            return plain(module, batch)
        trainer.step.loss = loss
        return trainer
    finish(Path(sys.argv[1]))
'''
exec(KILLED.split("if __name__")[0], made)
finish = made["finish"]


@pytest.fixture
def one_thread():
    "As in the processes that these tests start."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_weights(tmp_path, one_thread):
    want, want_rows = finish(tmp_path/"a.pt")
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", TOY + KILLED, tmp_path / "b.pt", "4"], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, text=True,
        )
        assert process.stdout.readline() == "now\n", "it ended before it was killed"
        process.send_signal(signal.SIGKILL)  # a few checkpoints, then the end, in whatever step it is
        process.communicate()
        assert (tmp_path/"b.pt").exists()
    found, rows = finish(tmp_path/"b.pt")
    assert rows == want_rows and all(
        torch.equal(found[k][n], v) for k in ("net", "average") for n, v in want[k].items()
    )


def test_memory_that_really_runs_out(tmp_path):
    code = '''
    import resource
    def hungry(module, batch):
        waste = torch.empty(len(batch["inputs"]), 100_000_000)  # 400 MB a case
        value = (module(batch["inputs"]) - batch["target"]).square().mean()
        return value + 0 * waste[:, 0].nan_to_num(0, 0, 0).sum(), {}
    free, tight = toy(), toy()
    for m in (free.module, tight.module): m[2].p = 0.0  # dropout draws differ between parts
    tight.step.loss = hungry
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
    train(free, lambda e, l: {}, []); train(tight, lambda e, l: {}, [])
    assert tight.micro in (1, 2) and len(tight.notes) >= 1, tight.notes
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(free.module.parameters(), tight.module.parameters()))
    print(tight.notes[0])
    '''
    done = run(code)
    assert done.returncode == 0, done.stderr[-800:]
    assert "out of memory in epoch 1: batches of 4 are computed" in done.stdout


def test_a_failed_pass_is_freed_before_the_memory_is_given_back(monkeypatch):
    "Inside the handler the error would keep the frames of the failed pass, and their tensors; and random numbers."
    trainer, seen = toy(), {}
    def hungry(module, batch):
        large = module(batch["inputs"])
        if len(batch["inputs"]) > 2:
            seen["held"] = weakref.ref(large)
            torch.rand(7)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return (large - batch["target"]).square().mean(), {}
    def look():
        seen.update(alive=seen["held"]() is not None, handling=sys.exc_info()[0])
        halve()
    trainer.step.loss, halve = hungry, trainer.halve_microbatches
    trainer.halve_microbatches = look
    before = torch.get_rng_state()
    monkeypatch.setattr("vfm_notes.pretrain.trainer.set_random_states",
                        lambda device, states: seen.update(back=torch.equal(states[0], before)))
    trainer.compute_gradients(next(iter(trainer.loader.epoch(1))))
    assert seen["alive"] is False and seen["handling"] is None and seen["back"]


@pytest.mark.parametrize("said, counts", [
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", True),
    ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", True), ("shapes do not match", False)])
def test_what_counts_as_out_of_memory(said, counts): assert is_out_of_memory(RuntimeError(said)) is counts


def test_objectives_that_compare_cases_are_refused_instead_of_cut():
    trainer = toy()
    trainer.module.whole_batches = True
    def hungry(module, batch): raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    trainer.step.loss = hungry
    with pytest.raises(VfmError, match="cannot be cut: lower batch_size"): trainer.run_epoch()
    with pytest.raises(VfmError, match="cannot be cut: set accumulate to 1"):
        Trainer(trainer.module, hungry, trainer.loader, TrainConfig(epochs=1, lr=0.1, accumulate=2))


@pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="a full disk is made by root, with a small tmpfs"
)
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, capsys):
    disk = tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        trainer = toy()
        assert trainer.save(disk/"c.pt", "run", {"rows": [1]})
        trainer.run_epoch()
        (disk/"filler").write_bytes(b"0" * (200_000 - sum(f.stat().st_size for f in disk.iterdir()) - 4000))
        kept = (disk/"c.pt").read_bytes()
        assert (
            not trainer.save(disk / "c.pt", "run", {"rows": [1, 2]})
            and "the one before is kept" in capsys.readouterr().out
        )
        assert (disk/"c.pt").read_bytes() == kept and sorted(f.name for f in disk.iterdir()) == ["c.pt", "filler"]
        fresh = toy()
        assert fresh.restore(disk/"c.pt", "run") == {"rows": [1]} and fresh.epoch == 1
    finally: subprocess.run(["umount", disk])


def test_two_processes_give_what_one_gives(tmp_path, one_thread):
    script = tmp_path/"job.py"
    script.write_text(TOY + """
trainer = toy()
trainer.module[2].p = 0.0  # each process draws its own dropout
train(trainer, lambda e, l: {}, [])
if trainer.accelerator.is_main_process:
    torch.save([trainer.accelerator.num_processes, trainer.module.state_dict()], sys.argv[1])
trainer.accelerator.wait_for_everyone()  # none leaves while another still needs it
trainer.accelerator.end_training()
""")
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script,
            tmp_path / "2.pt",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    one = toy()
    one.module[2].p = 0.0
    train(one, lambda e, l: {}, [])
    n, two = torch.load(tmp_path/"2.pt", weights_only=True)
    assert (one.accelerator.num_processes, n) == (1, 2) and all(
        torch.allclose(v, two[k], atol=1e-5) for k, v in one.module.state_dict().items()
    )


def test_a_loss_that_is_no_number_stops_with_the_last_good_weights():
    trainer = toy()
    trainer.run_epoch()
    good = copy.deepcopy(trainer.module.state_dict())
    def bad(module, batch): return (module(batch["inputs"])).sum() * float("nan"), {}
    trainer.step.loss = bad
    with pytest.raises(Diverged, match=r"nan in epoch 2, step 1 \(learning rate 0.01\)") as raised: trainer.run_epoch()
    assert all(torch.equal(v, good[k]) for k, v in raised.value.state.items())


def test_a_request_that_comes_between_two_epochs_loses_none(tmp_path):
    "It arrives while the curves are written: after the epoch's last look at it, before the next epoch begins."
    class Late(Checkpointer):
        def write_curves(self, epochs, rows):
            super().write_curves(epochs, rows)
            asked.append(epochs)
    asked, seen = [], []
    keeper = Late(tmp_path/"c.pt", "run", stop=lambda: bool(asked))
    with pytest.raises(Stopped, match="after epoch 1 of 6.*continues from there"):
        train(toy(), lambda e, l: seen.append(e) or {}, [], keeper)
    assert seen == [1] and (tmp_path/"c.pt").is_file()
    train(toy(), lambda e, l: seen.append(e) or {}, [], Checkpointer(tmp_path/"c.pt", "run"))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_asked_to_stop_it_leaves_after_the_epoch_and_goes_on_later(tmp_path):
    seen = []
    keeper = Checkpointer(tmp_path/"c.pt", "run", stop=lambda: len(seen) == 2)
    with pytest.raises(Stopped, match="after epoch 2 of 6.*continues from there"):
        train(toy(), lambda e, l: seen.append(e) or {}, [], keeper)
    later, rows = toy(), []
    train(later, lambda e, l: {}, rows, Checkpointer(tmp_path/"c.pt", "run"))
    whole = toy()
    train(whole, lambda e, l: {}, [])
    assert same(later.module, whole.module) and [r[0] for r in rows] == [1, 2, 3, 4, 5, 6]


def test_average_is_the_closed_form():
    trainer = toy(ema=0.8, epochs=1)
    weights = [copy.deepcopy(trainer.module[3].bias.item())]
    trainer.run_epoch(lambda: weights.append(trainer.module[3].bias.item()))
    average = weights[1]  # torch's average begins with the first weights that it is given
    for w in weights[2:]: average = 0.8 * average + 0.2 * w
    assert abs(trainer.average.module[3].bias.item() - average) < 1e-6


def test_bf16_learns_and_32_bit_comes_back():
    half = toy(precision="bf16")
    first = half.run_epoch()["loss"]
    while half.epoch <= 6: last = half.run_epoch()["loss"]
    assert last < first and {p.dtype for p in half.module.parameters()} == {torch.float32}
    full = toy()
    assert str(full.accelerator.mixed_precision) == "no" and full.run_epoch()["loss"] > 0


@pytest.mark.parametrize("n,size", [(7, 3), (1, 4), (8, 8)])
def test_parts_weigh_their_cases(n, size):
    x = torch.randn(n)
    assert torch.allclose(sum(p["x"].mean() * share for p, share in microbatches({"x": x}, size)), x.mean(), atol=1e-6)


def test_bad_values_and_files(tmp_path):
    for field, value in {"schedule": "cosinus", "precision": "fp8", "accumulate": 0, "ema": 1.0}.items():
        with pytest.raises(VfmError, match=f"{field} is"): TrainConfig(epochs=1, lr=0.1, **{field: value})
    trainer = toy()
    trainer.save(tmp_path/"c.pt", "run a")
    with pytest.raises(VfmError, match="belongs to run run a, not to run b"): trainer.restore(tmp_path/"c.pt", "run b")
    (tmp_path/"c.pt").write_bytes((tmp_path/"c.pt").read_bytes()[:500])
    with pytest.raises(VfmError, match="cannot be read.*delete it"): trainer.restore(tmp_path/"c.pt", "run a")
    assert trainer.restore(tmp_path/"none.pt", "run a") is None
