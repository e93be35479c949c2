"""Sliding windows: the same as whole volumes where a window covers them, the blending against its definition, whole
runs."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import ExternalSpec, RunSpec, run_id
from vfm_notes.nets.files import forward_flops
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune.fit import OVERLAP, center_crop, predict, training_batches
from vfm_notes.tune.task import TaskData
from vfm_notes.tune.transfer import build_model, run_data, transfer

SPEC = RunSpec(
    size=(4, 32, 48), spacing=(8, 3, 2), cases={"pretrain": 0, "train": 2, "val": 2, "test": 3}, n_train=2, epochs=1,
    batch_size=2, strategy="scratch", window=(4, 32, 32),
)


def test_a_window_that_covers_the_volume_changes_nothing():
    task, data = run_data(replace(SPEC, window=()))
    model = build_model(SPEC, task, 3)
    x = data["test"].inputs
    whole = predict(model, x)
    assert torch.equal(whole, predict(model, x, window=(4, 32, 48))) and torch.equal(
        whole, predict(model, x, window=(12, 64, 48))
    )
    assert not torch.allclose(whole, predict(model, x, window=(4, 32, 32)), atol=1e-3)


@pytest.mark.parametrize("size, window", [((5, 11, 9), (4, 6, 5)), ((4, 16, 7), (4, 8, 7))])
def test_blending_against_its_definition(size, window):
    """Every voxel is the mean of the windows over it, weighted by a Gaussian around each window's middle with an
    eighth of its side as standard deviation."""
    torch.manual_seed(0)
    net, x = nn.Conv3d(2, 3, 3, padding=1), torch.randn(2, 2, *size)
    starts = []
    for s, w in zip(size, window):
        step = max(int(w * (1 - OVERLAP)), 1) if w < s else w
        starts.append(sorted({min(i, s - w) for i in range(0, s - w + step, step)}))
    bell = [np.exp(-0.5 * ((np.arange(w) - (w - 1) / 2) / (w / 8)) ** 2) for w in window]
    weight = bell[0][:, None, None] * bell[1][:, None] * bell[2]
    weight = np.maximum(weight, max(weight[weight > 0].min(), 1e-3))  # MONAI's floor
    total, parts = np.zeros((2, 3, *size)), np.zeros(size)
    for d in starts[0]:
        for h in starts[1]:
            for w in starts[2]:
                at = np.s_[d:d + window[0], h:h + window[1], w:w + window[2]]
                with torch.no_grad(): total[(..., *at)] += net(x[(..., *at)]).numpy() * weight
                parts[at] += weight
    np.testing.assert_allclose(predict(net, x, 4, window).numpy(), total / parts, atol=1e-4)


def test_pieces_are_the_same_place_of_inputs_and_target_and_change_with_the_epoch():
    volume = torch.arange(5 * 6 * 20 * 20.).reshape(5, 1, 6, 20, 20)
    data = TaskData(volume, volume[:, 0].long(), list("abcde"), list("abcde"), (1, 1, 1))
    loader = training_batches(data, RunSpec(batch_size=2, window=(4, 8, 32)), ())
    corners = set()
    for epoch in (1, 2, 3):
        for batch in loader.epoch(epoch):
            assert batch["inputs"].shape == (2, 1, 4, 8, 20) and torch.equal(
                batch["inputs"][:, 0].long(), batch["target"]
            )
            first = batch["inputs"][0, 0]
            assert first[1, 0, 0] - first[0, 0, 0] == 400 and first[0, 1, 0] - first[0, 0, 0] == 20  # in one piece
            corners.add(int(first[0, 0, 0]) % 2400)
    again = training_batches(data, RunSpec(batch_size=2, window=(4, 8, 32)), ())
    assert len(corners) > 3 and all(
        torch.equal(a["inputs"], b["inputs"]) for a, b in zip(loader.epoch(2), again.epoch(2))
    )
    assert (
        center_crop(volume, (4, 8, 32)).shape == (5, 1, 4, 8, 20)
        and center_crop(volume, (4, 8, 20))[0, 0, 0, 0, 0] == volume[0, 0, 1, 6, 0]
    )


@pytest.mark.parametrize("task, strategy", [("super_resolution", "scratch"), ("segmentation", "decoder")])
def test_a_whole_run_in_windows(task, strategy):
    spec = replace(SPEC, task=task, strategy=strategy)
    model = build_model(replace(spec, strategy="scratch"), run_data(spec)[0], 3)
    one, two = (transfer(spec, model.backbone.state_dict() if strategy == "decoder" else None) for _ in range(2))
    assert one.cases.equals(two.cases) and one.cases.case.nunique() == 3
    assert sum("sliding windows of that size" in n for n in one.summary["notes"]) == 1 and not any(
        "computed once" in n for n in one.summary["notes"]
    )
    at_once = forward_flops(lambda: predict(model, run_data(spec)[1]["test"].inputs[:1]))
    assert one.summary["cost"]["flops_per_case"] > at_once["flops_per_case"]


def test_a_window_needs_an_answer_for_every_voxel():
    with pytest.raises(VfmError, match="target for every voxel"): transfer(replace(SPEC, task="classification"))


def test_a_run_with_a_window_has_another_name():
    assert run_id(replace(SPEC, window=())).endswith(
        run_id(RunSpec(**{k: v for k, v in vars(SPEC).items() if k != "window"})).rpartition("-")[2]
    )
    assert run_id(SPEC) != run_id(replace(SPEC, window=())) and run_id(ExternalSpec()) != run_id(
        ExternalSpec(window=(4, 8, 8))
    )
