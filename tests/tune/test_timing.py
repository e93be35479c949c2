"""The first estimate: scaled by a step timed here, and by operations where nobody measured a backbone."""
import json
from dataclasses import replace

import pytest

from vfm_notes.foundation.spec import PretrainSpec
from vfm_notes.runs import timed, watch
from vfm_notes.tune import timing


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    timed.timing_file().parent.mkdir(parents=True)
    return PretrainSpec(backbone="profound_toy.mine", epochs=3, cases=dict(pretrain=50, train=1, val=1, test=1))


def keep(**values): timed.timing_file().write_text(json.dumps({"machine": timed.cpu_name(), "costs": {}} | values))


def test_a_slow_machine_takes_longer_and_another_machines_step_is_not_used(here, monkeypatch):
    there = watch.run_time("pretrain", vars(here), {})
    assert str(there).startswith("very roughly") and "timed here" not in there.basis
    keep(ratio=2.5)
    slow = watch.run_time("pretrain", vars(here), {})
    assert slow.seconds == pytest.approx(2.5 * there.seconds) and str(slow).startswith("roughly")
    assert "scaled by a step timed here" in slow.basis
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the notebook that timed it had other threads than who asks
    assert watch.run_time("pretrain", vars(here), {}).seconds == slow.seconds
    keep(ratio=2.5, machine="another")
    assert watch.run_time("pretrain", vars(here), {}).seconds == pytest.approx(there.seconds)
    record = {"kind": "pretrain", "spec": vars(here), "cost": {"seconds": {"total": 77.0}}}
    keep(ratio=2.5)  # a run of one's own says more
    assert watch.run_time("pretrain", vars(here), watch.measure_speeds([record])).seconds == pytest.approx(77)


def test_a_backbone_that_nobody_measured_costs_what_its_operations_do(here):
    own = replace(here, backbone="my_net.mine")
    before = watch.core_seconds("pretrain", vars(own))
    keep(ratio=1.0, costs={"my_net": [1e-7, 4e-7]})
    voxels = 12 * 64 * 64
    assert watch.core_seconds("pretrain", vars(own)) == pytest.approx(watch.OVERHEAD_SECONDS + 3 * 50 * 4e-7 * voxels)
    assert before != watch.core_seconds("pretrain", vars(own))


def test_one_step_is_timed_and_kept(here):
    from vfm_notes.foundation.spec import load_study
    study = replace(load_study("phantom"), name="fresh")
    timed.time_first_step(study)
    assert timed.timed_here()["ratio"] > 0 and timed.timed_here()["costs"] == {}
    assert timing.own_costs(["no_such_net"], (8, 32, 32)) == {}


def test_operations_are_those_of_convolutions():
    import torch
    from torch import nn
    from vfm_notes.backbones.protocol import Backbone
    from vfm_notes.foundation.registry import backbones

    class One(Backbone):
        def __init__(self, in_channels=2):
            super().__init__()
            self.name, self.in_channels = "one_conv", in_channels
            self.conv = nn.Conv3d(in_channels, 5, 3, padding=1)
        def pyramid(self, x): return [self.conv(x)]

    backbones("one_conv", sequences=("a", "b"))(One)
    try: assert timing.count_flops("one_conv", (4, 6, 8)) == 2 * 4 * 6 * 8 * 5 * 2 * 27
    finally: del backbones._entries["one_conv"], backbones._cards["one_conv"]
    assert torch.get_default_device().type == "cpu"
