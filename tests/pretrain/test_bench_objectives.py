"""The parts of the objectives' benchmark that choose and count, on a CPU: its loops do the same work, its choices are
the right ones."""
import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "bench_objectives", Path(__file__).parents[1] / "bench" / "bench_objectives.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_ways_train_and_tell_their_steps(bench):
    volumes, labels = bench.data((4, 32, 32), 8)
    ways, before = bench.loops("autoencoding", "profound_toy", volumes, labels, 4), volumes.clone()
    assert {k: next(steps) for k, steps in ways.items()} == {"ours": 2, "plain": 1, "dummy": 1}
    assert torch.equal(volumes, before)
    found = [b["volumes"] for b, _ in zip(bench.in_memory(volumes, labels, 4), range(2))]
    plain = sorted(float(v.square().sum()) for b in found for v in b)
    # every case once, mirrored or not
    assert torch.allclose(torch.tensor(plain), torch.tensor(sorted(float(v.square().sum()) for v in volumes)))


def test_seconds_per_step_by_a_clock_of_our_own(bench, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench, "CLOCK", lambda: now[0])
    def waits(seconds, steps):  # every third call is disturbed
        for i in range(1000):
            now[0] += seconds * steps * (3 if i % 3 == 2 else 1)
            yield steps
    took = bench.compared({"one": waits(0.02, 1), "four": waits(0.005, 4)}, least=0.01, repeats=4)
    assert abs(took["one"] - 0.02) < 1e-9 and abs(took["four"] - 0.005) < 1e-9


def test_the_fastest_variant_and_why_one_is_left_out(bench, monkeypatch):
    volumes, labels = bench.data((4, 32, 32), 2)
    make, batch = lambda: bench.build("autoencoding", "profound_toy"), {"volumes": volumes, "labels": labels}
    bench.stepper(make(), batch, False, False, False)()  # what torch imports at a first step may compile
    monkeypatch.setattr(torch, "compile", lambda f: (_ for _ in ()).throw(RuntimeError("no compiler")))
    best, took, why = bench.fastest(make, batch)
    assert set(took) == {"plain", "bf16", "last", "bf16 + last"} and set(why) == {
        "compiled", "bf16 + compiled", "compiled + last", "bf16 + compiled + last",
    }
    assert took[best] == min(took.values()) and set(why.values()) == {"no compiler"}


def test_largest_batch_is_found_by_doubling(bench):
    asked = []
    def fits(n):
        asked.append(n)
        if n > 23: raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert bench.largest(fits) == 16 and asked == [1, 2, 4, 8, 16, 32]
    assert bench.largest(lambda n: None, most=8) == 8
    with pytest.raises(RuntimeError, match="another"):
        bench.largest(lambda n: (_ for _ in ()).throw(RuntimeError("another")))


def test_operations_of_a_step_by_hand(bench):
    "One convolution of kernel 1 without bias: forward and both gradients, two operations per product."
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = torch.nn.Parameter(torch.ones(1)), torch.nn.Conv3d(3, 5, 1, bias=False)
        def loss(self, batch): return self.conv(batch["volumes"] * self.first).sum(), {}
    assert bench.operations(One, {"volumes": torch.randn(2, 3, 4, 6, 6)}) == 3 * 2 * 2 * 3 * 5 * 4 * 6 * 6


def test_a_rate_is_positive_and_no_gpu_is_said(bench, capsys):
    assert bench.matmul_rate("cpu", 64) > 0
    if not torch.cuda.is_available():
        bench.gpu(["autoencoding"])
        assert "left out" in capsys.readouterr().out


def test_on_a_gpu(bench, capsys, monkeypatch):
    if not torch.cuda.is_available(): pytest.skip("torch sees no GPU")
    monkeypatch.setattr(bench, "WHOLE", "profound_toy")
    monkeypatch.setattr(bench, "WHOLE_SIZE", (12, 64, 64))
    bench.gpu(["autoencoding"])
    assert "cases/s with" in capsys.readouterr().out
