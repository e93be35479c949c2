"""Tasks, strategies, the loop and whole runs, against independent calculations."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from scipy.stats import rankdata

from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.pretrain.trainer import lr_factor
from vfm_notes.tune.fit import fit, predict, training_batches
from vfm_notes.tune.metric import auc, dice_per_class, hausdorff_per_class, class_masks, psnr, quadratic_kappa, ssim
from vfm_notes.tune.task import TaskData, build_task
from vfm_notes.tune.transfer import build_model, input_scale, run_data, transfer

CASES = {"pretrain": 0, "train": 8, "val": 4, "test": 8}
SPEC = RunSpec(size=(4, 32, 32), spacing=(8.0, 3.0, 3.0), cases=CASES, n_train=8, epochs=1, strategy="scratch")


@pytest.fixture(scope="module", autouse=True)
def scratch_runs(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("runs")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def cohort(scratch_runs): return load_cohort("phantom", SPEC.size, SPEC.spacing, CASES)


# --- metrics against independent calculations ---

def test_hausdorff_distances_equal_a_distance_transform_and_monai():
    from monai.metrics import compute_hausdorff_distance
    rng, spacing = np.random.default_rng(0), (4.0, 1.5, 1.5)
    labels = [
        torch.tensor((smooth > np.quantile(smooth, (0.5, 0.8))[:, None, None, None]).sum(0))
        for smooth in gaussian_filter(rng.normal(size=(2, 3, 8, 20, 20)), (0, 0, 1, 2, 2)).reshape(6, 8, 20, 20)
    ]
    made, true = torch.stack(labels[:3]), torch.stack(labels[3:])  # they touch the border, too
    made[2][made[2] == 2] = 0  # a class that was not found
    got = hausdorff_per_class(made, true, 3, spacing)
    for j, percentile in enumerate((95, 100)):
        for i in range(3):
            for k in (1, 2):
                a, b = (m[i].numpy() == k for m in (made, true))
                if not a.any(): assert np.isnan(got[j, i, k - 1]) and (i, k) == (2, 2); continue
                edge = [m & ~binary_erosion(m) for m in (a, b)]
                ways = [distance_transform_edt(~edge[1 - n], sampling=spacing)[edge[n]] for n in (0, 1)]
                assert got[j, i, k - 1] == pytest.approx(max(np.percentile(d, percentile) for d in ways))
        theirs = compute_hausdorff_distance(
            class_masks(made[:2], 3), class_masks(true[:2], 3), percentile=percentile, spacing=list(spacing)
        ).numpy()
        np.testing.assert_allclose(got[j, :2], theirs, rtol=1e-5)


def test_dice_is_twice_the_overlap_over_the_sum():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 3, (2, 2, 4, 8, 8))
    got = dice_per_class(torch.tensor(a), torch.tensor(b), 3)
    for i in range(2):
        for k in (1, 2):
            assert got[i, k - 1] == pytest.approx(
                2 * ((a[i] == k) & (b[i] == k)).sum() / ((a[i] == k).sum() + (b[i] == k).sum())
            )


def test_auc_is_the_mann_whitney_statistic():
    rng = np.random.default_rng(2)
    label, score = rng.integers(0, 2, 50), rng.normal(size=50).round(1)
    ranks = rankdata(score)
    n1, n0 = label.sum(), (1 - label).sum()
    assert auc(label, score) == pytest.approx((ranks[label == 1].sum() - n1*(n1 + 1)/2)/(n1*n0))
    assert math.isnan(auc(np.ones(4), np.arange(4)))


def test_quadratic_kappa_by_hand():
    label, predicted = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    weight = np.subtract.outer(np.arange(3), np.arange(3))**2/4
    seen = np.zeros((3, 3))
    for i, j in zip(label, predicted): seen[i, j] += 1
    chance = np.outer(seen.sum(1), seen.sum(0))/seen.sum()
    assert quadratic_kappa(label, predicted) == pytest.approx(1 - (weight*seen).sum()/(weight*chance).sum())


def test_psnr_and_ssim_know_the_identity():
    x = torch.rand(2, 1, 8, 16, 16)
    assert np.allclose(ssim(x, x), 1, atol=1e-5) and (ssim(x.flip(-1), x) < 0.9).all()
    y = x.clone(); y[0] += 0.1
    span = (x[0].max() - x[0].min()).item()
    assert psnr(y, x)[0] == pytest.approx(20*math.log10(span/0.1), abs=1e-3)


# --- inputs on the backbone's scale, targets on the task's ---

@pytest.mark.parametrize("name", ["super_resolution", "distortion_correction", "translation", "segmentation"])
def test_inputs_follow_the_backbones_card_and_targets_do_not(name, cohort):
    z, whole = (replace(SPEC, task=name, n_train=4, backbone=b) for b in ("profound_toy.x", "efficientnet_lite0.in1k"))
    (task, a), (other, b) = run_data(z), run_data(whole)
    how, (mean, sd) = other.scale.keywords.values()
    train = cohort.subset("train", 4).volumes.astype("float64")
    assert task.scale.keywords == {"how": "zscore_nonzero"} and how == "cohort"
    np.testing.assert_allclose(mean, train.mean((0, 2, 3, 4)), err_msg="the cases that the run trains on, and no other")
    np.testing.assert_allclose(sd, train.std((0, 2, 3, 4)))
    assert all(torch.equal(a[k].target, b[k].target) for k in a), "one target for all backbones"
    assert b["test"].inputs.shape == a["test"].inputs.shape and not torch.allclose(
        b["test"].inputs[:, 0], a["test"].inputs[:, 0], atol=0.01
    )
    raw = b["test"].inputs[:, 0].numpy()*sd[0] + mean[0]
    if name in ("segmentation", "distortion_correction"):
        np.testing.assert_allclose(raw, cohort.subset("test").volumes[:, 0], atol=0.01*sd[0])
    guesses = [task.control(d["train"], d["test"]).value.to_numpy() for d in (a, b)]
    np.testing.assert_array_equal(*guesses)
    if task.primary == "psnr" and task.residual is not None:
        first = predict(build_model(whole, other, 3), b["test"].inputs)
        assert torch.equal(first, a["test"].inputs[:, -1:]), (
            "an untrained network answers with the first guess, in the units of the target"
        )


def test_published_statistics_come_before_those_of_the_training_cases(cohort):
    given = replace(cohort, card=replace(cohort.card, mean=(1.0, 2.0, 3.0), sd=(4.0, 5.0, 6.0)))
    assert input_scale("efficientnet_lite0.in1k", given) == {"how": "cohort", "moments": ([1, 2, 3], [4, 5, 6])}
    assert input_scale("profound_toy.x", given) == {"how": "zscore_nonzero"}


# --- the loop ---

def test_batches_show_every_case_once_and_flip_target_with_input():
    n = 6
    x = torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1, 1) + torch.tensor([0.0, 0.25, 0.5]).reshape(
        1, 1, 1, 1, 3
    )
    data = TaskData(x, x.clone(), list("abcdef"), list("abcdef"), (1, 1, 1))
    seen = []
    for batch in training_batches(data, SPEC).epoch(1):
        a, b = batch["inputs"], batch["target"]
        assert torch.equal(a, b) and len(a) == 4
        seen += [int(v) for v in a.amin((1, 2, 3, 4)).floor()]
    assert set(seen) == set(range(n)) and len(seen) == 8
    assert torch.equal(data.inputs, x)  # the data themselves are never flipped


def test_rate_is_warm_up_then_cosine():
    values = [lr_factor(i, 100, 0.1) for i in range(100)]
    assert values[9] == 1.0 and np.argmax(values) in (9, 10) and all(np.diff(values[10:]) < 0)
    assert values[55] == pytest.approx(0.5*(1 + math.cos(math.pi*45/90)))


def test_a_loss_that_explodes_is_told():
    task, data = run_data(SPEC)
    data["train"].inputs[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(VfmError, match="loss became nan in epoch 1"):
        fit(build_model(SPEC, task, 3), task, training_batches(data["train"], SPEC), SPEC, lambda epoch: {})


# --- whole runs ---

def test_scratch_and_full_start_with_the_same_head():
    task, _ = run_data(SPEC)
    state = build_model(replace(SPEC, seed=99), task, 3).backbone.state_dict()
    scratch, full = build_model(SPEC, task, 3), build_model(replace(SPEC, strategy="full"), task, 3, state)
    assert all(torch.equal(a, b) for a, b in zip(scratch.head.state_dict().values(), full.head.state_dict().values()))
    assert all(torch.equal(full.backbone.state_dict()[k], v) for k, v in state.items())
    with pytest.raises(VfmError, match="missing"): build_model(replace(SPEC, strategy="full"), task, 3)


@pytest.mark.parametrize("backbone", ["profound_toy.x", "provicnet_toy.x"])
def test_a_run_is_a_pure_function_of_its_spec(backbone):
    spec = replace(SPEC, backbone=backbone)
    one, two = transfer(spec), transfer(spec)
    assert one.summary["metrics"] == two.summary["metrics"] and one.cases.equals(two.cases)
    assert all(np.array_equal(v, two.weights[k]) for k, v in one.weights.items())
    assert one.curves.drop(columns="seconds").equals(two.curves.drop(columns="seconds"))
    other = transfer(replace(spec, seed=1))
    assert any(not np.array_equal(v, other.weights[k]) for k, v in one.weights.items())


def test_the_distance_is_zero_before_training_and_grows():
    curves = transfer(replace(SPEC, epochs=2, lr=3e-3)).curves
    d2p = curves[curves.name == "d2p_embed"].set_index("epoch").value
    assert d2p[0] == pytest.approx(0, abs=1e-9) and d2p[2] > 0


def test_grades_are_needed_for_classification(cohort):
    blind = replace(cohort.card, grades=())
    with pytest.raises(VfmError, match="no grades"): build_task("classification", blind, {})
    with pytest.raises(VfmError, match="needs the sequence 'flair'"):
        build_task("translation", cohort.card, {"source": "flair"})
