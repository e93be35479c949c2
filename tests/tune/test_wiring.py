"""What lies between functions that are well tested alone: seeds, cases, scales, and what names depend on."""

import itertools
import os
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.cache import DecodePlan, CaseSource, case_key
from vfm_notes.data.cohort import CohortCard
from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.registry import backbones, tasks
from vfm_notes.foundation.spec import ExternalSpec, PretrainSpec, RunSpec, run_id
from vfm_notes.nets.decoder import Network
from vfm_notes.nets.mae3d import sincos_positions
from vfm_notes.nets.vit import resize_positions
from vfm_notes.pretrain.contrast import PatchContrast
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune import transfer as wiring
from vfm_notes.tune.fit import training_batches
from vfm_notes.tune.strategy import merge_lora
from vfm_notes.tune.metric import dice_per_class, ssim
from vfm_notes.tune.probe import CaseHead, NearestNeighbourHead
from vfm_notes.tune.strategy import apply_strategy
from vfm_notes.tune.task import TaskData, build_task, mask_rows
from vfm_notes.tune.transfer import (
    build_model, frozen_data, transferability_scores, run_data, recalibrate_batchnorm, transfer,
)

CASES = {"pretrain": 0, "train": 8, "val": 4, "test": 8}
SPEC = RunSpec(size=(4, 32, 32), spacing=(8.0, 3.0, 3.0), cases=CASES, n_train=8, epochs=1, lr=1e-2, strategy="full")


@pytest.fixture(scope="module")
def cohort():
    return load_cohort("phantom", SPEC.size, SPEC.spacing, CASES)


# --- seeds ---


def rows_of(seed, strategy="random", weights=""):
    spec = replace(SPEC, task="classification", strategy=strategy, seed=seed)
    task, data = run_data(spec)
    model = build_model(spec, task, 3, build_backbone(spec.backbone, 3).state_dict() if weights else None)
    apply_strategy(strategy, model)
    return frozen_data(spec, model, data, weights)[1]["train"].inputs


def test_every_seed_has_its_own_random_encoder_and_published_weights_are_shared():
    zero, one, again = rows_of(0), rows_of(1), rows_of(0)
    assert torch.equal(zero, again) and not torch.allclose(zero, one, atol=1e-3)
    torch.manual_seed(7)
    assert torch.equal(rows_of(0, "probe", "hash"), rows_of(1, "probe", "hash")), (
        "the same weights give the same rows, whatever the seed"
    )
    assert not torch.equal(rows_of(0, "probe", "hash"), rows_of(0, "probe", "other")), "other weights are other rows"


def test_batch_norms_of_a_random_encoder_get_the_statistics_of_the_training_cases():
    torch.manual_seed(0)
    net = nn.Module()
    net.norm, net.seen = nn.BatchNorm3d(2, momentum=0.1), []
    net.layers = lambda x: net.seen.append(len(x)) or net.norm(x)
    x = (
        torch.randn(6, 2, 3, 4, 5) * torch.tensor([2.0, 5.0])[:, None, None, None]
        + torch.tensor([1.0, -3.0])[:, None, None, None]
    )
    assert (
        recalibrate_batchnorm(net, x, batch_size=3) == 1
        and net.seen == [3, 3]
        and not net.norm.training
        and net.norm.momentum == 0.1
    )
    halves = x.split(3)
    np.testing.assert_allclose(
        net.norm.running_mean, np.mean([h.mean((0, 2, 3, 4)).numpy() for h in halves], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        net.norm.running_var, np.mean([h.var((0, 2, 3, 4)).numpy() for h in halves], 0), rtol=1e-5
    )


def test_a_random_encoder_with_batch_norm_is_settled_before_its_features_are_kept():
    spec = replace(SPEC, task="classification", backbone="resnet18_3d.random", strategy="random", size=(32, 32, 32))
    task, data = run_data(spec)
    model = build_model(spec, task, 3)
    apply_strategy("random", model)
    norm = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm3d))
    got = []
    norm.register_forward_pre_hook(lambda m, given: got.append(given[0].detach()) if m.training else None)
    frozen_data(spec, model, data, "")
    assert sum(map(len, got)) == 8, "each training case once"
    torch.testing.assert_close(
        norm.running_mean, torch.stack([g.mean((0, 2, 3, 4)) for g in got]).mean(0), rtol=1e-4, atol=1e-6
    )


def test_the_order_of_the_cases_follows_the_seed_and_the_epoch():
    data = TaskData(
        torch.arange(8.0).reshape(8, 1, 1, 1, 1), torch.arange(8), list("abcdefgh"), list("abcdefgh"), (1, 1, 1)
    )

    def order(seed, epoch):
        return [
            int(t)
            for b in training_batches(data, replace(SPEC, seed=seed, batch_size=2), ()).epoch(epoch)
            for t in b["target"]
        ]

    assert order(0, 1) == order(0, 1) and sorted(order(0, 1)) == list(range(8))
    assert len({tuple(order(s, e)) for s, e in itertools.product((0, 1, 2), (1, 2, 3))}) == 9


def test_scores_known_before_are_of_training_and_validation_cases_only(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        wiring,
        "transferability",
        lambda backbone, *splits, names=None: (
            seen.update(names=[s.names for s in splits], scores=names) or pd.DataFrame({"score": []})
        ),
    )
    wiring._known.clear()
    task, data = run_data(replace(SPEC, task="classification"))
    transferability_scores(
        replace(SPEC, task="classification"), Network(build_backbone("profound_toy", 3), nn.Identity()), data, "h"
    )
    assert seen["names"] == [data["train"].names, data["val"].names]
    assert "probe" in seen["scores"] and "lp" not in seen["scores"]  # which takes seconds for each layer
    wiring._known.clear()


# --- controls, scales, channels ---


@pytest.mark.parametrize("name", [n for n in tasks if n not in ("detection",)])
def test_the_trivial_control_answers_without_the_test_labels(name, cohort, monkeypatch):
    "Whatever the test labels are, what the control says of the test cases is the same."
    try:
        task = build_task(name, cohort.card, {})
    except Exception as e:
        pytest.skip(f"not on the phantom: {e}")
    task.learn(cohort.subset("train"))
    train, test = task.prepare(cohort.subset("train")), task.prepare(cohort.subset("test"))
    said = []
    for method in ("evaluate", "rows"):
        if hasattr(task, method):
            real = getattr(task, method)
            monkeypatch.setattr(task, method, lambda answer, data, real=real: said.append(answer) or real(answer, data))

    def answers(target):
        said.clear()
        task.control(train, replace(test, target=target))
        return [np.asarray(a) if not isinstance(a, (tuple, list)) else [np.asarray(x) for x in a] for a in said]

    true = answers(test.target)
    for other in (test.target.flip(0), test.target[-1:].expand_as(test.target).clone()):  # the second has another mean
        assert true and not torch.equal(test.target, other)
        for a, b in zip(true, answers(other)):
            for x, y in zip(a, b) if isinstance(a, list) else [(a, b)]:
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["super_resolution", "distortion_correction", "translation"])
def test_inputs_know_nothing_of_the_target(name, cohort):
    task, part = build_task(name, cohort.card, {}), cohort.subset("test")
    inputs, target = part.volumes, part.volumes[:, 1]
    plain, other = (task.pair(inputs, t, inputs[:, 1], part) for t in (target, 3 * target[::-1] + 7))
    assert torch.equal(plain.inputs, other.inputs) and not torch.equal(plain.target, other.target)


def test_the_target_has_the_scale_of_the_volume_that_is_named(cohort):
    "Mean and spread over the non-zero voxels of `like`, not of the target itself."
    task, part = build_task("super_resolution", cohort.card, {}), cohort.subset("test")
    like = 2 * part.volumes[:, 0] + (part.volumes[:, 0] != 0)
    got = task.pair(part.volumes, part.volumes[:, 0], like, part).target[:, 0].numpy()
    for k in range(len(part)):
        inside, x = like[k][like[k] != 0].astype(float), part.volumes[k, 0].astype(float)
        np.testing.assert_allclose(got[k], np.where(x != 0, (x - inside.mean()) / inside.std(), 0), atol=2e-3)


def test_a_first_guess_comes_last_and_sequences_keep_their_places(cohort):
    part = cohort.subset("test")
    task = build_task("translation", cohort.card, {"source": "dwi", "target": "t2w"})
    data = task.prepare(part)
    filled = [bool(data.inputs[:, c].abs().sum() > 0) for c in range(3)]
    assert cohort.card.sequences == ("t2w", "dwi", "adc") and filled == [False, True, False]
    task = build_task("super_resolution", cohort.card, {"sequence": "adc"})
    data = task.prepare(part)
    assert (
        data.inputs.shape[1] == 4 and np.corrcoef(data.inputs[0, 3].flatten(), data.target[0, 0].flatten())[0, 1] > 0.8
    )
    assert np.corrcoef(data.inputs[0, 3].flatten(), data.inputs[0, 2].flatten())[0, 1] > 0.99, (
        "the guess is the adc of the inputs"
    )


def test_ssim_is_scaled_by_the_references_range():
    "By its definition (Wang et al. 2004), Gaussian window of sigma 1.5, 7 voxels, for a prediction of another range."
    draw = np.random.default_rng(0)
    reference = draw.normal(size=(9, 9, 9)) * 2 + 5
    predicted = 3 * reference + draw.normal(size=(9, 9, 9))
    low, span = reference.min(), np.ptp(reference)
    x, y = (predicted - low) / span, (reference - low) / span
    bell = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    window = np.einsum("i,j,k->ijk", bell, bell, bell)
    window /= window.sum()

    def mean(a):
        parts = np.lib.stride_tricks.sliding_window_view(a, (7, 7, 7))
        return (parts * window).sum((-3, -2, -1))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    wanted = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    found = ssim(*(torch.from_numpy(v[None, None].astype("float32")) for v in (predicted, reference)))
    np.testing.assert_allclose(found, [wanted], atol=2e-4)


def test_a_class_that_is_not_there_has_no_dice():
    reference = torch.zeros(2, 2, 4, 4, dtype=torch.long)
    reference[0, 0, 0, 0], reference[:, 1] = 2, 1
    predicted = reference.clone()
    predicted[1, 0, 0, 0] = 2  # found where there is none
    predicted[:, 1, 0] = 0
    dice = dice_per_class(predicted, reference, 3)
    np.testing.assert_allclose(dice, [[2 * 12 / 28, 1], [2 * 12 / 28, np.nan]])
    data = TaskData(torch.zeros(2, 1, 2, 4, 4), reference, ["a", "b"], ["a", "b"], (1, 1, 1))
    rows = mask_rows(predicted, data, ("background", "one", "two"))
    mean = rows[rows.metric == "dice"].set_index("case").value
    assert mean["a"] == pytest.approx((24 / 28 + 1) / 2) and mean["b"] == pytest.approx(24 / 28), (
        "the mean is over what is there"
    )


# --- objectives and position tables ---


def test_the_contrast_has_the_small_weight_and_the_segmentation_the_large_one():
    "0.95 of weighted cross-entropy and Dice, 0.05 of the contrast (arXiv 2502.00366), the first by its definition."
    torch.manual_seed(0)
    net = PatchContrast(backbones["provicnet_toy"](3), a=0.05, anchor_share=0.3)
    x, labels = torch.randn(2, 3, 2, 64, 64), torch.zeros(2, 2, 64, 64, dtype=torch.long)
    labels[:, :, 8:32, 8:32], labels[:, :, 40:, 40:] = 2, 1
    with torch.no_grad():
        total, parts = net.loss({"volumes": x, "labels": labels})
        scores = net.head([net.backbone.pyramid(x)[-1]], x)
    p, weight = scores.softmax(1).double().numpy(), np.array([0.02, 0.04, 0.5])
    truth = np.stack([labels.numpy() == k for k in range(3)], 1)
    w = weight[labels.numpy()]
    entropy = -(w * np.log((p * truth).sum(1))).sum() / w.sum()
    dice = 1 - (2 * (p * truth).sum((2, 3, 4)) + 1e-5) / ((p + truth).sum((2, 3, 4)) + 1e-5)
    segmentation = entropy + (dice.mean(0) * weight).sum() / weight.sum()
    assert parts["pairs"] > 0 and parts["dice_ce"] == pytest.approx(segmentation, rel=1e-4)
    assert (
        float(total) == pytest.approx(0.95 * segmentation + 0.05 * parts["contrast"], rel=1e-5)
        and 0 <= parts["contrast"] < 1.5
    )


def test_slices_know_their_number_and_how_many_there_are():
    torch.manual_seed(0)
    net = backbones["provicnet_toy"](3)
    images, place = net.images(torch.randn(2, 3, 5, 64, 64))
    assert place.shape == (10, 2, net.embed_dim)
    number = (place[:, 0] - net.axis_pos.bias) @ net.axis_pos.weight[:, 0] / net.axis_pos.weight.square().sum()
    count = (place[:, 1] - net.axis_max.bias) @ net.axis_max.weight[:, 0] / net.axis_max.weight.square().sum()
    assert len(set(number.round(decimals=4).tolist())) == 5 and torch.allclose(number[:5], number[5:], atol=1e-4), (
        "the number of the slice, in every case"
    )
    assert torch.all(number[1:5] > number[:4]) and torch.allclose(count, count[:1].expand(10), atol=1e-4), (
        "growing; the count is one"
    )


def test_position_tables_are_read_slice_row_column():
    "Interpolating a table that grows along one axis grows along that axis."
    ramp = torch.arange(6.0)
    for axis in (0, 1):
        grid = (ramp[:, None] if axis == 0 else ramp[None]).expand(6, 6)
        table = torch.cat([torch.zeros(1, 1, 1), grid.reshape(1, 36, 1)], 1)
        out = resize_positions(table, (3, 4))[0, 1:, 0].reshape(3, 4)
        assert torch.all(out.diff(dim=axis) > 0.5) and out.diff(dim=1 - axis).abs().max() < 1e-4
    table = sincos_positions((2, 3, 4), 24)
    flat = table.reshape(2, 3, 4, 24)
    for axis in range(3):
        moved = [bool((flat.diff(dim=axis).abs() > 1e-6).any(dim=(0, 1, 2))[k]) for k in range(24)]
        assert sum(moved) >= 6, "every axis has its own share of the width"


# --- strategies, by a literal table ---

TRAINED = {  # names of a 3-stage toy's tensors that each strategy trains; h: the head's own
    "scratch": "all",
    "full": "all",
    "specialist": "all",
    "random": "h",
    "decoder": "h",
    "probe": "h",
    "knn": "",
    "top": "last block and h",
    "lora rank=2 targets=linear": "updates and h",
}


@pytest.mark.parametrize("line", TRAINED)
def test_a_literal_table_of_what_is_trained(line):
    torch.manual_seed(0)
    net = backbones["provicnet_toy"](3)
    model = Network(net, CaseHead(net, 3))
    names = {k for k, _ in model.named_parameters()}
    apply_strategy(line, model)
    found = {k for k, p in model.named_parameters() if p.requires_grad}
    head = {"head.layers.0.weight", "head.layers.0.bias", "head.layers.1.weight", "head.layers.1.bias"}
    linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    last = {k for k in names if k.startswith(("backbone.backbone.blocks.2.", "backbone.backbone.norm."))}
    updates = {
        f"backbone.backbone.blocks.{i}.{part}.lora_{ab}.default.weight"
        for i in range(3)
        for part in linear
        for ab in "AB"
    }
    match TRAINED[line]:
        case "all":
            assert found == names
        case "h":
            assert found == head
        case "":
            assert not found & names
        case "last block and h":
            assert found == last | head and len(last) == 16
        case "updates and h":
            assert found >= updates | head and not found & names - head, "the network's own tensors stay"


@pytest.mark.parametrize("alpha", [None, 8])
def test_merged_updates_are_those_of_peft(alpha):
    "Against peft's own merge: W + alpha/rank * B A."
    torch.manual_seed(0)
    net = backbones["provicnet_toy"](3)
    model = Network(net, CaseHead(net, 3))
    apply_strategy("lora rank=2" + (f" alpha={alpha}" if alpha else ""), model)
    layers = {k: m for k, m in net.named_modules() if hasattr(m, "lora_B")}
    for m in layers.values():
        nn.init.normal_(m.lora_B["default"].weight, std=0.3)
    theirs = {
        k: (m.get_base_layer().weight + m.get_delta_weight("default")).detach().clone() for k, m in layers.items()
    }
    for m in layers.values():
        a, b = m.lora_A["default"].weight.double(), m.lora_B["default"].weight.double()
        torch.testing.assert_close(
            m.get_delta_weight("default").double(), (alpha or 2) / 2 * b @ a, rtol=1e-4, atol=1e-5
        )
    merge_lora(model)
    assert len(theirs) >= 12
    for k, wanted in theirs.items():
        torch.testing.assert_close(net.get_submodule(k).weight.detach(), wanted)


def test_neighbours_by_angle_do_not_care_for_length():
    head = NearestNeighbourHead(2, 1, "cosine")
    head.remember(torch.tensor([[1.0, 0.0], [10.0, 9.0]]), torch.tensor([0, 1]))
    assert head(torch.tensor([[5.0, 1.0], [0.1, 0.09]])).argmax(1).tolist() == [0, 1]


# --- names and keys ---

OTHER = {
    "cohort": "another",
    "size": (6, 64, 64),
    "spacing": (3.0, 1.5, 1.5),
    "cases": {"pretrain": 1, "train": 24, "val": 12, "test": 48},
    "backbone": "vit_3d.other",
    "objective": "nt_xent",
    "task": "classification",
    "strategy": "top k=2",
    "schedule": "constant",
    "precision": "bf16",
    "keep": "best",
    "options": {"a": 1},
    "parent": "p",
    "bad_cases": "exclude",
    "augment": {"flip": {}},
    "window": (4, 32, 32),
    "start": "profound_toy.x",
    "parents": ("p",),
    "divergences": ("energy",),
    "expected": "gain",
    "plugins": {"my_code.py": "0" * 64},
    "grid": "published",
}
# looks at the encoder on the way, and pictures on the way; neither changes weights
UNNAMED = {("pretrain", "probe_every"), ("transfer", "shown_epochs")}


@pytest.mark.parametrize(
    "cls, name",
    [(c, f.name) for c in (PretrainSpec, RunSpec, ExternalSpec) for f in fields(c)],
    ids=lambda v: getattr(v, "kind", v),
)
def test_every_field_of_a_spec_is_part_of_its_name(cls, name):
    spec = cls()
    value = getattr(spec, name)
    changed = OTHER[name] if name in OTHER else (not value if isinstance(value, bool) else value + 1)
    same = run_id(spec) == run_id(replace(spec, **{name: changed}))
    assert same == ((cls.kind, name) in UNNAMED)


def test_everything_that_decides_the_voxels_is_part_of_a_cases_key(tmp_path):
    file = tmp_path / "a.nii"
    file.write_bytes(b"1234")
    card = CohortCard("c", "C", "CC0", "here", "none", ("t2w",), ("background", "organ"), (), (3.0, 1.0, 1.0))
    source = CaseSource("a", "p", lambda: None, (file,), ("recipe",))
    plan = DecodePlan(card, [source], (4, 8, 8), {}, 0, {})

    def key(plan=plan, source=source, code="code"):
        return case_key(plan, source, code)

    keys = {
        key(),
        key(code="other"),
        key(source=replace(source, name="b")),
        key(source=replace(source, recipe=("other",))),
        key(replace(plan, size=(4, 8, 9))),
    }
    for field, value in {
        "spacing": (3.0, 1.0, 1.1),
        "sequences": ("dwi",),
        "classes": ("background", "lesion"),
    }.items():
        keys.add(key(replace(plan, card=replace(card, **{field: value}))))
    assert len(keys) == 8
    before, time = key(), file.stat().st_mtime_ns
    os.utime(file, ns=(time, time + 1))
    touched = key()
    file.write_bytes(b"12345")
    os.utime(file, ns=(time, time + 1))
    assert len({before, touched, key()}) == 3, "time and size of the files"
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "1").write_bytes(b"1")
    alone = key(source=replace(source, files=(folder,)))
    (folder / "2").write_bytes(b"1")
    assert alone != key(source=replace(source, files=(folder,)))


# --- the measured numbers of a run ---


def test_a_run_measures_the_cases_that_it_says():
    "Features before: the pretrained encoder on the test cases; after: the tuned one; scores: those of its answers."
    state = build_backbone("profound_toy", 3).state_dict()
    out = transfer(SPEC, state)
    task, data = run_data(SPEC)
    net = build_backbone("profound_toy", 3)
    net.load_state_dict(state)
    with torch.no_grad():
        before = net.eval().layers(data["test"].inputs)
    for layer, value in before.items():
        np.testing.assert_allclose(out.features[f"before.{layer}"], value, atol=1e-5)
    tuned = wiring.tuned_model(SPEC, task, 3, {k: torch.from_numpy(v) for k, v in out.weights.items()}).eval()
    with torch.no_grad():
        for layer, value in tuned.backbone.layers(data["test"].inputs).items():
            np.testing.assert_allclose(out.features[f"after.{layer}"], value, atol=1e-5)
        answer = tuned(data["test"].inputs).argmax(1).numpy()
    label, dice = data["test"].target.numpy(), []
    for a, b in zip(answer, label):
        each = [
            2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum())
            for k in range(1, len(task.classes))
            if (b == k).any()
        ]
        dice.append(np.mean(each))
    assert out.summary["metrics"]["dice"] == pytest.approx(np.mean(dice), abs=1e-5)
    assert out.cases[out.cases.metric == "dice"].case.tolist() == data["test"].names
    usual = np.stack([(data["train"].target.numpy() == k).mean(0) for k in range(len(task.classes))]).argmax(0)
    each = [
        np.mean(
            [
                2 * ((usual == k) & (b == k)).sum() / ((usual == k).sum() + (b == k).sum())
                for k in range(1, len(task.classes))
                if (b == k).any()
            ]
        )
        for b in label
    ]
    assert out.summary["controls"]["dice"] == pytest.approx(np.mean(each), abs=1e-5)


def test_depth_follows_the_way_of_the_data_not_the_list_of_the_class():
    "ConvNeXt lists all its downsamplings first, ProViCNet its slice numbers last."
    from vfm_notes.tune.strategy import block_names, parameter_depths

    def depth_of(name):
        net = backbones[name](3)
        return parameter_depths(Network(net, CaseHead(net, 2)), block_names(net))

    toy = depth_of("profound_toy")
    starts = {
        k: next(toy[n] for n in toy if n.startswith(f"backbone.encoder.downsample_layers.{k}.")) for k in range(4)
    }
    stages = {k: next(toy[n] for n in toy if n.startswith(f"backbone.encoder.stages.{k}.")) for k in range(4)}
    assert (
        starts[0] == 0
        and all(starts[k] == stages[k] for k in (1, 2, 3))
        and sorted(stages.values()) == list(stages.values())
    )
    slices = depth_of("provicnet_toy")
    assert {slices[k] for k in slices if ".axis_" in k} == {0} and slices["backbone.backbone.norm.weight"] == 4


def test_a_coarser_grid_gets_a_blurred_wave_by_the_closed_form():
    "A Gaussian of variance (t² − s²)/2.355² takes exp(−2π² variance / period²) of a wave; finer grids change nothing."
    import SimpleITK as sitk

    from vfm_notes.data.volume import grid_around, resample

    def wave(period, axis, phase=0.0, spacing=0.5, n=96):
        x = np.arange(n) * spacing
        shape = [1, 1, 1]
        shape[axis] = n
        volume = np.broadcast_to(
            np.sin(2 * np.pi * x / period + phase).reshape(shape), [12 if a != axis else n for a in range(3)]
        )
        image = sitk.GetImageFromArray(np.ascontiguousarray(volume, np.float32))
        image.SetSpacing([spacing] * 3)
        return image

    for axis in range(3):
        size, mm = [4, 4, 4], [0.5, 0.5, 0.5]
        size[axis], mm[axis] = 16, 2.0
        for period in (6.0, 9.0):
            image = wave(period, axis)
            centre = [s * (n - 1) / 2 for s, n in zip(image.GetSpacing(), image.GetSize())]
            grid = grid_around(image, centre, size, mm)
            got = resample(image, grid)
            places = centre[2 - axis] + (np.arange(16) - 7.5) * 2.0
            line = np.moveaxis(got, axis, -1)[2, 2]
            wanted = np.exp(-2 * np.pi**2 * (2.0**2 - 0.5**2) / 2.355**2 / period**2) * np.sin(
                2 * np.pi * places / period
            )
            np.testing.assert_allclose(line[3:-3], wanted[3:-3], atol=0.03)
        stripes = resample(wave(1.0, axis, np.pi / 2), grid)
        assert np.abs(np.moveaxis(stripes, axis, -1)[2, 2, 3:-3]).max() < 0.02, "what the grid cannot hold is gone"
    image = wave(6.0, 0)
    same = grid_around(
        image, [s * (n - 1) / 2 for s, n in zip(image.GetSpacing(), image.GetSize())], (96, 12, 12), (0.5, 0.5, 0.5)
    )
    np.testing.assert_allclose(resample(image, same), sitk.GetArrayFromImage(image), atol=1e-5)
