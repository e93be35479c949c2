"""Every registered task on a toy cohort; heads, losses and scores against independent calculations."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import binary_dilation, label as components
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.tables import Tables
from vfm_notes.backbones.keys import build_tiny
from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.registry import VfmError, cohorts, tasks
from vfm_notes.foundation.spec import RunSpec, load_study, run_specs
from vfm_notes.nets.decoder import Network
from vfm_notes.tune import study_names
from vfm_notes.tune.case_task import corn_loss, corn_probabilities
from vfm_notes.tune.fit import predict
from vfm_notes.tune.metric import Candidate, CaseDetections, average_precision, lesion_candidates, match_lesions
from vfm_notes.foundation.quantity import METRICS
from vfm_notes.tune.metric import binary_f1, class_hits, r_squared, recall_parts
from vfm_notes.tune.task import build_task
from vfm_notes.tune.transfer import build_model, run_data, transfer

CASES = {"pretrain": 0, "train": 8, "val": 6, "test": 8}
SPEC = RunSpec(
    cohort="everything", size=(4, 32, 32), spacing=(8.0, 3.0, 3.0), cases=CASES, n_train=8, epochs=1, lr=1e-2,
    strategy="scratch",
)


@cohorts("everything", modules=("vfm_notes.data.anatomy", "vfm_notes.data.phantom"))
def everything(size, spacing, n, seed):
    "The phantom with several labels per case, so that every task has its inputs."
    made = cohorts["phantom"](size, spacing, n, seed)
    targets = np.stack([made.grade > 0, made.grade > 1, np.arange(len(made)) % 2], 1).astype(np.uint8)
    return replace(
        made, card=replace(made.card, name="everything", targets=("lesion", "significant", "odd")), targets=targets
    )


@pytest.fixture(scope="module")
def cohort(): return load_cohort("everything", SPEC.size, SPEC.spacing, CASES)


# --- the contract of a task ---

@pytest.mark.parametrize("backbone", ["profound_toy.x", "provicnet_toy.x"])
@pytest.mark.parametrize("name", list(tasks))
def test_task_contract(name, backbone, cohort):
    spec = replace(SPEC, task=name, backbone=backbone)
    task, data = run_data(spec)
    model = build_model(spec, task, len(task.card.sequences))
    x, y = data["train"].inputs[:4], data["train"].target[:4]
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(5):
        losses.append(task.loss(model(x), y))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    losses = [v.item() for v in losses]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    output = predict(model, data["test"].inputs)
    cases = task.evaluate(output, data["test"])
    assert list(cases.columns) == ["case", "patient", "metric", "value"] and set(cases.case) == set(data["test"].names)
    assert not cases.duplicated(["case", "metric"]).any()
    found, control = task.summary(cases), task.summary(task.control(data["train"], data["test"]))
    assert task.primary in task.metrics and set(found) == set(control) == set(task.metrics)
    assert math.isfinite(found[task.primary]) and math.isfinite(control[task.primary])
    assert len(task.undefined(cases)) == sum(map(math.isnan, found.values()))
    assert all(METRICS[m].direction in (1, -1) and isinstance(task.unit(m), str) for m in task.metrics)
    assert task.validate(output, data["test"]) == pytest.approx(found[task.primary], rel=1e-5)
    pictures = task.pictures(output, data["test"])
    assert "input" in pictures and all(len(v) == len(data["test"]) for v in pictures.values())
    with pytest.raises(VfmError, match="no option"): build_task(name, cohort.card, {"nonsense": 1})


@pytest.mark.parametrize("name", list(tasks))
def test_tasks_work_on_pictures(name):
    flat = replace(
        SPEC, task=name, size=(1, 64, 64), backbone="resnet50.x",
        options={"factor": [1, 2, 2]} if name == "super_resolution" else {},
    )
    task, data = run_data(flat)
    backbone = build_tiny("resnet50", 3)
    model = Network(backbone, task.head(backbone, 3))
    assert math.isfinite(task.loss(model(data["train"].inputs[:4]), data["train"].target[:4]))
    cases = task.evaluate(predict(model, data["test"].inputs), data["test"])
    assert math.isfinite(task.summary(cases)[task.primary])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("segmentation", {"head": "upernet", "width": 8}),
        ("segmentation_and_presence", {"head": "upernet", "width": 8}), ("detection", {"head": "unetr", "width": 4}),
        ("multi_label", {"head": "linear"}), ("ordinal", {"head": "deit"}),
        ("regression", {"head": "deit", "of": "grade"}),
    ],
)
def test_other_heads(name, options):
    spec = replace(SPEC, task=name, options=options)
    task, data = run_data(spec)
    model = build_model(spec, task, 3)
    loss = task.loss(model(data["train"].inputs[:4]), data["train"].target[:4])
    loss.backward()
    assert math.isfinite(loss.item()) and all(p.grad is not None for p in model.head.parameters())
    assert math.isfinite(task.validate(predict(model, data["test"].inputs), data["test"]))


@pytest.mark.parametrize("source", ["t2w", "dwi", "adc"])
@pytest.mark.parametrize("target", ["t2w", "dwi", "adc"])
def test_translation_of_every_pair(source, target, cohort):
    if source == target:
        with pytest.raises(VfmError, match="copying"):
            build_task("translation", cohort.card, dict(source=source, target=target))
        return
    task, data = run_data(replace(SPEC, task="translation", options=dict(source=source, target=target)))
    i, test = task.card.sequences.index(target), cohort.subset("test").volumes
    assert [bool(data["test"].inputs[:, k].any()) for k in range(3)] == [
        k == task.card.sequences.index(source) for k in range(3)
    ]
    for got, volume in zip(data["test"].target[:, 0].numpy(), test[:, i]):
        seen = volume != 0
        np.testing.assert_allclose(got[seen], (volume[seen] - volume[seen].mean())/volume[seen].std(), atol=1e-2)


# --- metrics and losses by hand ---

def test_macro_recall_f1_and_hits_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 4, (2, 60))
    assert recall_parts(label, predicted).mean() == pytest.approx(recall_score(label, predicted, average="macro"))
    a, b = label > 1, predicted > 1
    assert binary_f1(a, b) == pytest.approx(f1_score(a, b)) and math.isnan(binary_f1(a & False, b))
    assert np.nanmean(class_hits(a, b, 1)) == pytest.approx(recall_score(a, b)) and np.nanmean(
        class_hits(a, b, 0)
    ) == pytest.approx(recall_score(~a, ~b))


def test_corn_by_loops():
    torch.manual_seed(0)
    output, target = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 1, 0])
    terms = [
        math.log(1 + math.exp((1 if target[i] <= k else -1) * output[i, k]))
        for i in range(7)
        for k in range(3)
        if target[i] >= k
    ]
    assert corn_loss(output, target).item() == pytest.approx(np.mean(terms))
    p = torch.sigmoid(output)
    by_hand = torch.stack([1 - p[:, 0], p[:, 0]*(1 - p[:, 1]), p[:, 0]*p[:, 1]*(1 - p[:, 2]), p.prod(1)], 1)
    torch.testing.assert_close(corn_probabilities(output), by_hand)


def test_presence_loss_by_loops(cohort):
    torch.manual_seed(0)
    task = build_task("segmentation_and_presence", cohort.card, {})
    target = torch.zeros(2, 2, 3, 3, dtype=torch.long)
    target[:, 0], target[0, 1] = 1, 2
    voxels, case = torch.randn(2, 3, 2, 3, 3), torch.randn(2, 2)
    p, masks = voxels.softmax(1), torch.stack([target == k for k in range(3)], 1).float()
    weight = 1/masks.sum((0, 2, 3, 4))**2
    dice = 1 - 2*(weight*(p*masks).sum((0, 2, 3, 4))).sum()/(weight*(p + masks).sum((0, 2, 3, 4))).sum()
    focal = -(masks*(1 - p)**2*p.log()).mean()
    cross = -(case.log_softmax(1)[0, 1] + case.log_softmax(1)[1, 0])/2
    got = task.loss(torch.cat([voxels, case[:, :, None, None, None].expand(-1, -1, 2, 3, 3)], 1), target)
    assert got.item() == pytest.approx((0.8*(dice + focal) + 0.2*cross).item(), rel=1e-4)


def test_the_loss_of_masks_by_loops(cohort):
    """Soft Dice of the foreground over the whole batch, cross-entropy of all classes, a training head with a weight of
    0.4."""
    torch.manual_seed(1)
    target, first, second = torch.randint(0, 3, (2, 2, 3, 3)), torch.randn(2, 3, 2, 3, 3), torch.randn(2, 3, 2, 3, 3)
    weights = [1.0, 2.0, 5.0]
    def by_loops(output, weights):
        p, dice = output.softmax(1), []
        for k in (1, 2):
            mask = (target == k).float()
            dice.append(1 - (2 * (p[:, k] * mask).sum() + 1e-5) / ((p[:, k] + mask).sum() + 1e-5))
        per = torch.stack([-output.log_softmax(1)[i, t, z, y, x] for (i, z, y, x), t in np.ndenumerate(target.numpy())])
        w = torch.tensor([weights[t] for t in target.flatten()])
        return (sum(dice) / 2 + (per * w).sum() / w.sum()).item()
    for options, own in (({}, [1.0] * 3), ({"class_weights": weights}, weights)):
        task = build_task("segmentation", cohort.card, options)
        assert task.loss(first, target).item() == pytest.approx(by_loops(first, own), rel=1e-4)
        assert task.loss([first, second], target).item() == pytest.approx(
            by_loops(first, own) + 0.4 * by_loops(second, own), rel=1e-4
        )


def test_the_transformer_head_adds_places_to_tokens_slice_by_slice():
    from vfm_notes.nets.vit import resize_positions
    from vfm_notes.tune.task import DeiTHead
    torch.manual_seed(0)
    head = DeiTHead(build_tiny("provicnet_toy", 3), 2)
    d, h, w = 2, 3, 2
    x = torch.zeros(1, 3, *(n * s for n, s in zip((d, h, w), head.stride)))
    tokens, seen = torch.randn(1, d * h * w, head.enter[0].in_features), []
    with torch.no_grad():
        head.places.normal_(), head.token.normal_()
        head.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        head.blocks[0].register_forward_hook(lambda block, given, out: seen.append(out))
        out = head(tokens, x)
        table, entered = resize_positions(head.places, (h, w))[0], head.enter(tokens)[0]
        for i in range(d * h * w): torch.testing.assert_close(seen[0][0, 1 + i], entered[i] + table[1 + i % (h * w)])
        torch.testing.assert_close(seen[0][0, 0], head.token[0, 0] + table[0])
        torch.testing.assert_close(out[0], head.last(head.norm(head.token[0, 0] + table[0])))


def test_the_first_guess_of_an_image_task_is_the_last_input_or_the_mean_image(cohort):
    from vfm_notes.tune.metric import psnr
    for name, guess in (
        ("super_resolution", lambda train, test: test.inputs[:, -1:]),
        ("translation", lambda train, test: train.target.mean(0)[None].repeat(len(test), 1, 1, 1, 1)),
    ):
        task = build_task(name, cohort.card, {})
        train, test = (task.prepare(cohort.subset(k)) for k in ("train", "test"))
        found = task.control(train, test)
        assert found[found.metric == "psnr"].value.to_numpy() == pytest.approx(
            np.asarray(psnr(guess(train, test), test.target))
        )
        shown = task.pictures(test.target, test)
        assert (
            not shown["error"].any()
            and (shown["input"] == test.inputs[:, -1 if name == "super_resolution" else 0].numpy()).all()
        )


def test_multi_label_auc_leaves_out_what_is_undefined(cohort):
    task = build_task("multi_label", cohort.card, {})
    data = task.prepare(cohort.subset("test"))
    output = torch.randn(len(data), 3, generator=torch.Generator().manual_seed(0))
    data.target[:, 0] = 1
    cases = task.evaluate(output, data)
    expected = np.mean([roc_auc_score(data.target[:, k], output[:, k]) for k in (1, 2)])
    assert task.summary(cases)["mean_auc"] == pytest.approx(expected)
    assert task.undefined(cases) == [
        "the AUC of lesion is undefined on the 8 test cases, all of which have the label or none; the mean is over 2 "
        "of 3 labels"
    ]
    data.target[:] = 1
    assert math.isnan(task.summary(task.evaluate(output, data))["mean_auc"])


def test_volume_is_counted_in_ml_and_comes_back_in_ml(cohort):
    task, data = run_data(replace(SPEC, task="regression", options={"of": "lesion"}))
    by_hand = [(labels == 2).sum()*8*3*3/1000 for labels in cohort.subset("test").labels]
    np.testing.assert_allclose(data["test"].target[:, 0], by_hand, rtol=1e-6)
    model = build_model(replace(SPEC, task="regression"), task, 3)
    answer = predict(model, data["train"].inputs)
    assert abs(answer.mean() - data["train"].target.mean()) < 2*data["train"].target.std(), "it starts around the mean"
    assert task.unit("mae") == task.unit("rmse") == "ml" and task.unit("r2") == ""
    truth = data["test"].target[:, 0].numpy()
    assert task.summary(task.evaluate(data["test"].target + 1, data["test"])) == pytest.approx(
        {"mae": 1, "rmse": 1, "r2": 1 - 1 / truth.var()}, rel=1e-4
    )
    assert math.isnan(r_squared(np.ones(3), np.arange(3.)))


# --- detection ---

def brute_average_precision(found):
    "The definition, threshold by threshold."
    pool, lesions = [(c, h) for f in found for c, h in zip(f.confidence, f.hit)], sum(f.lesions for f in found)
    area, before = 0.0, 0.0
    for t in sorted({c for c, _ in pool}, reverse=True):
        kept = [h for c, h in pool if c >= t]
        area, before = area + (sum(kept)/lesions - before)*sum(kept)/len(kept), sum(kept)/lesions
    return area


def test_average_precision_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = [
            CaseDetections(
                n := int(rng.integers(0, 3)), (c := rng.random(rng.integers(0, 5)).round(1)).tolist(),
                [bool(i < n and rng.random() < 0.7) for i in range(len(c))],
            )
            for _ in range(8)
        ]
        if sum(f.lesions for f in found):
            assert average_precision(found) == pytest.approx(brute_average_precision(found))
    assert (
        math.isnan(average_precision([CaseDetections(0, [0.5], [False])]))
        and average_precision([CaseDetections(1, [], [])]) == 0
    )


def test_candidates_and_lesions_are_paired_one_to_one_with_most_pairs_first():
    def box(a, b): m = np.zeros((1, 1, 20), bool); m[..., a:b] = True; return m
    one, two = box(0, 6), box(8, 12)
    wide = Candidate(box(0, 12), 0.9)   # overlaps both: 6/12 and 4/12
    left = Candidate(box(0, 5), 0.8)    # overlaps the first: 5/6
    result = match_lesions([wide, left], one | two)
    assert (result.lesions, result.hit) == (2, [True, True]), "the wide one takes the second lesion"
    result = match_lesions([wide, left, Candidate(box(15, 17), 0.3)], one)
    assert result.confidence == [0.8, 0.3] and result.hit == [True, False], (
        "an overlapping candidate without a lesion is neither"
    )
    assert match_lesions([Candidate(box(0, 1), 0.5)], box(0, 10)).hit == [True] and match_lesions(
        [Candidate(box(0, 1), 0.5)], box(0, 11)
    ).hit == [False], "intersection over union of at least 0.10"
    assert match_lesions([], one).lesions == 1 and match_lesions([left], one & False).hit == [False]


def test_candidates_do_not_touch_and_fall_in_confidence():
    rng = np.random.default_rng(1)
    p = rng.random((8, 24, 24))**6
    found = lesion_candidates(p, (3.0, 1.5, 1.5), smallest=7.5)
    assert len(found) == 5 or found
    assert [c.confidence for c in found] == sorted((c.confidence for c in found), reverse=True)
    for i, c in enumerate(found):
        assert (
            c.confidence == p[c.mask].max()
            and c.mask.sum() * 6.75 > 7.5
            and components(c.mask, np.ones((3, 3, 3)))[1] == 1
        )
        assert not any((binary_dilation(c.mask, np.ones((3, 3, 3))) & d.mask).any() for d in found[:i])


def test_detection_scores_can_be_computed_again_from_the_rows(cohort):
    task = build_task("detection", cohort.card, {})
    data = task.prepare(cohort)
    noisy = (data.target + 0.8*torch.rand(data.target.shape, generator=torch.Generator().manual_seed(0)))/2
    cases = task.evaluate(noisy, data)
    found = [
        match_lesions(lesion_candidates(p, data.spacing), t)
        for p, t in zip(noisy.double().numpy(), data.target.bool().numpy())
    ]
    got = task.summary(cases)
    assert got["ap"] == pytest.approx(brute_average_precision(found))
    assert got["auc"] == pytest.approx(
        roc_auc_score([f.lesions > 0 for f in found], [max(f.confidence, default=0) for f in found])
    )
    assert got["picai"] == pytest.approx((got["ap"] + got["auc"])/2)


def test_detection_agrees_with_picai_eval(cohort):
    "The challenge's own packages, where they are installed."
    evaluate = pytest.importorskip("picai_eval").evaluate
    extract = pytest.importorskip("report_guided_annotation").extract_lesion_candidates
    rng, task = np.random.default_rng(3), build_task("detection", cohort.card, {})
    data = task.prepare(cohort)
    data.spacing = (3.0, 0.5, 0.5)  # where 10 voxels are 7.5 mm³
    smooth = torch.nn.functional.avg_pool3d(torch.from_numpy(rng.random(data.target.shape)), 3, 1, 1)
    p = (0.6*data.target*torch.from_numpy(rng.random((len(data), 1, 1, 1))) + smooth**2).clamp(0, 1)
    theirs = evaluate(
        [extract(v, threshold="dynamic-v2")[0] for v in p.numpy()], list(data.target.numpy()), num_parallel_calls=1
    )
    ours = task.summary(task.evaluate(p, data))
    assert (
        ours["auc"] == pytest.approx(theirs.auroc)
        and ours["ap"] == pytest.approx(theirs.AP)
        and ours["picai"] == pytest.approx(theirs.score)
    )
    assert 0 < ours["ap"] < 1


# --- specialists ---

@pytest.mark.parametrize(
    ("task", "network"),
    [
        ("segmentation", "unet_3d"), ("super_resolution", "srresnet_3d"), ("segmentation_and_presence", "unet_2d"),
        ("classification", "cnn_3d"),
    ],
)
def test_a_specialist_learns_its_task(task, network):
    task, data = run_data(replace(SPEC, task=task))
    backbone = build_tiny(network, 3)
    model = Network(backbone, task.head(backbone, 3))
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(6):
        losses.append(task.loss(model(data["train"].inputs[:4]), data["train"].target[:4]))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1].item() < losses[0].item()
    assert math.isfinite(task.validate(predict(model, data["test"].inputs), data["test"]))


def test_a_study_runs_its_specialists_once_and_gains_refer_to_them():
    study = replace(load_study("phantom"), specialists={"segmentation": "unet_3d"})
    more = run_specs(study)[len(run_specs(load_study("phantom"))):]
    assert [(s.task, s.backbone, s.strategy, s.seed, s.parent) for s in more] == [
        ("segmentation", "unet_3d", "specialist", k, "") for k in study.seeds
    ]
    study_names.check_names(study)
    with pytest.raises(VfmError, match="specialists"): replace(study, specialists={"detection": "unet_3d"})
    with pytest.raises(VfmError, match="Did you mean 'unet_3d'"):
        study_names.check_names(replace(study, specialists={"segmentation": "unet_3"}))
    runs = [
        ("a", "profound_toy.x", "full", 0.8), ("b", "unet_3d", "specialist", 0.5),
        ("c", "provicnet_toy.x", "scratch", 0.4),
    ]
    rows = pd.DataFrame([
        dict(
            id=i, task="segmentation", backbone=b, strategy=s, n_train=8, seed=0, kind="transfer", status="done",
            positive=None, metric="dice", direction=1,
        )
        for i, b, s, _ in runs
    ])
    cases = pd.DataFrame([
        dict(id=i, case=f"c{k}", patient=f"c{k}", metric="dice", value=v + 0.01 * k)
        for i, _, _, v in runs
        for k in range(3)
    ])
    metrics = rows[["id", "task", "backbone", "strategy", "n_train", "seed"]].assign(
        metric="dice", value=0.0, control=0.0, direction=1, unit="", primary=True
    )
    table = gain_table(
        Tables("made", rows, metrics, cases, pd.DataFrame(), pd.DataFrame()), reference="specialist"
    ).set_index("backbone")
    assert set(table.index) == {"profound_toy.x", "provicnet_toy.x"} and table.rpg["profound_toy.x"] == pytest.approx(
        100 * (0.81 - 0.51) / 0.51
    )


# --- bad input, one sentence each ---

def test_what_a_task_cannot_do_is_told(cohort):
    card, train = cohort.card, cohort.subset("train")
    def told(words, name, options=None, card=card, learn=None):
        with pytest.raises(VfmError, match=words):
            task = build_task(name, card, options or {})
            if learn is not None: task.learn(learn)
    bare = replace(card, classes=("background",), targets=(), grades=())
    for name in ("segmentation", "detection", "segmentation_and_presence", "regression"):
        told("no (class|masks)", name, card=bare)
    for name in ("classification", "multi_class", "ordinal"): told("no grades", name, card=bare)
    told("has none: leave", "multi_label", card=bare)
    told("set of: grade", "regression", card=replace(bare, grades=("a", "b")))
    told("no head 'linaer'. Did you mean 'linear'", "ordinal", {"head": "linaer"})
    told("no head 'unet'. Did you mean 'unetr'", "segmentation", {"head": "unet"})
    told("no class 'lesoin'. Did you mean 'lesion'", "detection", {"structure": "lesoin"})
    told("no loss 'corm'", "ordinal", {"loss": "corm"})
    told("class_weights has 3 values", "detection", {"class_weights": [1, 1, 1]})
    told("positive is 7, expected a grade from 1 to 2", "classification", {"positive": 7})
    alike = train.pick([i for i in range(8) if train.grade[i] == 0])
    told("none of the .* has the grade", "multi_class", learn=alike)
    told("0 of the .* are positive", "classification", learn=alike)
    told("so presence cannot be learned", "detection", learn=alike)
    told("nothing to learn", "regression", {"of": "grade"}, learn=alike)
    told("nothing to learn", "multi_label", learn=replace(train, targets=train.targets*0))
    with pytest.raises(VfmError, match="transformer of a head is 'swin'"):
        build_task("ordinal", card, {"head": "deit", "deit": "swin"}).head(build_tiny("profound_toy", 3), 3)
    with pytest.raises(VfmError, match="leaves nothing of volumes"):
        build_task("super_resolution", card, {"factor": [9, 2, 2]}).prepare(cohort)


@pytest.mark.parametrize("name", ["multi_class", "ordinal", "multi_label", "segmentation", "segmentation_and_presence"])
def test_a_head_with_another_number_of_scores_is_told(name):
    spec = replace(SPEC, task=name)
    task, data = run_data(spec)
    output = build_model(spec, task, 3)(data["train"].inputs[:2])
    with pytest.raises(VfmError, match="head gives"): task.loss(output[:, 1:], data["train"].target[:2])


def test_undefined_metrics_are_told_in_the_notes_of_a_run():
    few = replace(SPEC, task="classification", cases=CASES | {"val": 1})
    outcome = transfer(few)
    assert outcome.curves[outcome.curves.name == "val_auc"].value.isna().all()
    assert any("AUC is undefined on the 1 validation cases" in n for n in outcome.summary["notes"])


def test_a_cohort_with_another_spacing_is_refused(monkeypatch):
    from vfm_notes.tune import transfer as module
    made = load_cohort("everything", SPEC.size, SPEC.spacing, CASES)
    monkeypatch.setattr(
        module, "run_cohort", lambda spec: replace(made, card=replace(made.card, spacing=(4.0, 3.0, 3.0)))
    )
    with pytest.raises(VfmError, match="voxels of .4.0, 3.0, 3.0. mm, but the study requires"): run_data(SPEC)
    for off, fine in ((0.0009, True), (0.0015, False)):  # a thousandth of a millimetre is rounding
        monkeypatch.setattr(
            module, "run_cohort", lambda spec: replace(made, card=replace(made.card, spacing=(8.0, 3.0, 3.0 + off)))
        )
        try: assert run_data(SPEC) and fine
        except VfmError: assert not fine
