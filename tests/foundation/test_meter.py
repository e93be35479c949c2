"""The cost of a run against independent measures: allocations of known size, a subprocess's own highest memory, closed
forms of forward operations, a made-up driver."""
import subprocess
import sys
import textwrap
import time
import types

import pytest
import torch
from torch import nn

from vfm_notes.analysis.tables import cost_columns, runs_table
from vfm_notes.foundation import meter as meters
from vfm_notes.foundation.meter import Meter, PeakMemory, epoch_seconds, combine_costs
from vfm_notes.foundation.registry import backbones
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.nets.files import forward_flops
from vfm_notes.runs.record import new_record
from vfm_notes.tune import catalog  # fills the registries


def measured(size, held=0):
    "MiB that the meter tells for a block of `size` MiB, in a process that already holds `held` and once held 400 MiB."
    program = f"""
        from vfm_notes.foundation.meter import PeakMemory
        large = bytearray(400 * 2**20); del large
        held = bytearray({held} * 2**20)
        with PeakMemory() as memory: block = bytearray({size} * 2**20); del block
        print(memory.host_mib)"""
    return float(
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.parametrize("size, held", [(64, 0), (64, 200), (8, 200)])
def test_memory_is_the_runs_own(size, held): assert measured(size, held) == pytest.approx(size, abs=4)


def test_memory_is_sampled_where_the_kernel_does_not_forget(monkeypatch):
    monkeypatch.setattr(meters, "reset_peak", lambda: False)
    with PeakMemory() as memory:
        block = bytearray(64 * 2**20)
        end = time.monotonic() + 300
        # until it has been looked at; at first nobody has looked
        while max(memory.sampled, default=0) < memory.level + 60 and time.monotonic() < end: time.sleep(0.01)
        del block
    assert memory.host_mib == pytest.approx(64, abs=6)


def test_memory_is_none_where_nobody_tells(monkeypatch):
    monkeypatch.setattr(meters, "process_memory", lambda key="VmRSS": None)
    with PeakMemory() as memory: bytearray(8 * 2**20)
    assert memory.host_mib is None and memory.mib is None
    meter = Meter()
    assert meter.cost(1.0, 0.0, [1.0], {}, {})["memory_mib"] == {"host": None, "device": None}


@pytest.fixture
def clock(monkeypatch):
    "A clock that goes when it is told to."
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_seconds_are_those_of_a_clock(clock):
    meter = Meter()
    with meter.paused() as took: clock(0.2)
    clock(0.1)
    cost = meter.cost(
        0.05, 0.01, [0.02, 0.03], {"trainable": 1, "total": 2}, {"flops_per_case": 3.0, "flops_counted": ""},
        {"scores": took[0]}, evaluation=0.04,
    )
    assert took[0] == pytest.approx(0.2) and cost["seconds"]["total"] == pytest.approx(0.1)
    assert (
        cost["gpu_hours"] == 0
        and cost["energy_j"] is None
        and cost["memory_mib"]["device"] is None
        and cost["processes"] == 1
    )
    meter.count(10.0)
    meter.lap()
    assert list(meter.carried["spent"].values())[0]["total"] == pytest.approx(10.1)


def test_a_killed_run_counts_on(clock):
    carried = {}
    first = Meter(carried)
    clock(0.1)
    first.lap(evaluation=0.02)
    kept = {"spent": {k: dict(v) for k, v in carried["spent"].items()}}  # what a checkpoint holds
    second = Meter()
    second.carried.update(kept)
    clock(0.05)
    cost = second.cost(1.0, 0.0, [0.5, 0.5], {}, {}, evaluation=0.03)
    assert (
        cost["seconds"]["total"] == pytest.approx(0.15)
        and cost["seconds"]["evaluation"] == pytest.approx(0.05)
        and cost["processes"] == 2
    )


def test_highest_memory_and_sum_of_energy_over_processes():
    part = dict(total=1.0, gpu_hours=0.5, seconds={})
    cost = combine_costs(
        [part | dict(host=5.0, device=None, energy_j=None), part | dict(host=3.0, device=9.0, energy_j=7.0)], {}, {}, {}
    )
    assert cost["memory_mib"] == {"host": 5.0, "device": 9.0} and cost["energy_j"] == 7.0 and cost["gpu_hours"] == 1.0


def test_seconds_of_each_epoch():
    assert (
        epoch_seconds([0, 1, 1, 2, 3], [0.0, 2.0, 2.0, 3.0, 7.0]) == [2.0, 1.0, 4.0] and epoch_seconds([0], [0.0]) == []
    )


# --- a driver that reports energy ---

class Driver(types.ModuleType):
    "What nvidia-ml-py offers, for two GPUs."
    class NVMLError(Exception): pass
    used, refuses = {"GPU-a": 5_000, "GPU-b": 70_000}, False  # mJ
    def nvmlInit(self): pass
    def nvmlDeviceGetHandleByUUID(self, uuid): return uuid
    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.refuses: raise self.NVMLError("not supported")
        return self.used[handle]


@pytest.fixture
def gpu(monkeypatch):
    cuda = types.SimpleNamespace(
        reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 3 * 2**20, device_count=lambda: 2,
        current_device=lambda: 1, get_device_properties=lambda i: types.SimpleNamespace(uuid="ab"[i]),
    )
    monkeypatch.setattr(meters, "loaded_cuda", lambda: cuda)
    driver = Driver("pynvml")
    driver.used = dict(Driver.used)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


def test_energy_of_the_gpu_in_use(gpu):
    meter = Meter()
    gpu.used["GPU-b"] += 2_500
    with meter.paused(): gpu.used["GPU-b"] += 900_000
    cost = meter.cost(1.0, 0.0, [], {}, {})
    assert (
        cost["energy_j"] == pytest.approx(2.5)
        and cost["memory_mib"]["device"] == 3
        and cost["gpu_hours"] == pytest.approx(cost["seconds"]["total"] / 3600)
    )


def test_energy_and_hours_of_two_processes_with_a_gpu_each(gpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    meter = Meter()
    gpu.used = {k: v + 1_000 for k, v in gpu.used.items()}
    cost = meter.cost(1.0, 0.0, [], {}, {})
    assert cost["energy_j"] == pytest.approx(2.0) and cost["gpu_hours"] == pytest.approx(
        2 * cost["seconds"]["total"] / 3600
    )


def test_energy_is_none_where_the_driver_refuses_or_is_not_there(gpu, monkeypatch):
    gpu.refuses = True
    assert Meter().cost(1.0, 0.0, [], {}, {})["energy_j"] is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it was not installed
    assert Meter().cost(1.0, 0.0, [], {}, {})["energy_j"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_device_memory_of_a_real_gpu():
    with PeakMemory() as memory: torch.zeros(2**20, device="cuda").sum().item()
    assert memory.device_mib >= 4


# --- operations of a forward pass ---

def by_hand(net, x):
    "Multiply-adds of convolutions and linear layers, twice, from the shapes that pass through them."
    found = []
    def see(module, given, out):
        if isinstance(module, nn.Linear): found.append(2 * given[0].numel() * module.out_features)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)): found.append(2 * out.numel() * module.weight[0].numel())
        if isinstance(module, nn.ConvTranspose3d): found.append(2 * given[0].numel() * module.weight[0].numel())
    hooks = [m.register_forward_hook(see) for m in net.modules()]
    with torch.no_grad(): net(x)
    for h in hooks: h.remove()
    return sum(found)


@pytest.mark.parametrize("name", ["unet_3d", "profound_toy"])
def test_operations_of_convolutions_and_linear_layers(name):
    net = backbones[name](3).eval()
    net.forward = net.pyramid
    x = torch.zeros(2, 3, 8, 32, 32)
    assert forward_flops(lambda: net(x), 2)["flops_per_case"] == pytest.approx(by_hand(net, x) / 2, rel=1e-6)


def test_operations_of_a_transformer_layer():
    n, width, heads = 20, 16, 4
    net = nn.TransformerEncoderLayer(width, heads, 32, batch_first=True).eval()
    # projections, two products, output, MLP
    expected = 2 * n * width * 3 * width + 2 * 2 * n * n * width + 2 * n * width * width + 2 * 2 * n * width * 32
    assert forward_flops(lambda: net(torch.zeros(3, n, width)), 3)["flops_per_case"] == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_changes_nothing():
    net, x = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Dropout(0.5)).train(), torch.randn(2, 1, 4, 8, 8)
    before = torch.get_rng_state()
    forward_flops(lambda: net.eval()(x))
    assert torch.equal(before, torch.get_rng_state()) and net[1].num_batches_tracked == 0


# --- records and tables ---

def test_a_row_of_costs_states_what_was_not_measured():
    new = new_record(
        RunSpec(), "s",
        cost={
            "seconds": {"total": 9.0, "training": 6.0, "per_epoch": [1.0, 5.0, 2.0]},
            "memory_mib": {"host": 70.0, "device": 900.0}, "gpu_hours": 0.0025, "flops_per_case": 1e9, "energy_j": None,
            "parameters": {"trainable": 1, "total": 2},
        },
    )
    little = new_record(
        RunSpec(), "s", cost={"seconds": {"total": 4.0}, "memory_mib": {"device": 310.0}, "parameters": {"total": 5}}
    )
    a, b = runs_table([new, little]).to_dict("records")
    assert (a["seconds_epoch"], a["peak_memory_mib"], a["host_memory_mib"], a["gpu_hours"]) == (
        2.0, 900.0, 70.0, 0.0025,
    ) and a["energy_j"] != a["energy_j"]
    assert (b["seconds_total"], b["peak_memory_mib"], b["parameters_total"]) == (4.0, 310.0, 5.0) and b[
        "flops_per_case"
    ] != b["flops_per_case"]
    assert cost_columns({}).keys() == cost_columns(new["cost"]).keys()
