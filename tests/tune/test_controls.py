"""Lesion Dice as a primary metric, the hand-made control, and the slice that every run shows."""
import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from vfm_notes.data.cohort import CohortCard
from vfm_notes.foundation.registry import VfmError
from vfm_notes.tune.case_task import Classification
from vfm_notes.tune.task import Segmentation, TaskData, contrast_statistics
from vfm_notes.tune.monitor import case_pictures

CARD = CohortCard("made", "Made", "Apache-2.0", "here", "none", ("dwi", "adc"), ("background", "gland", "lesion"),
                  ("low", "high"), (3.0, 1.0, 1.0))


def data(inputs, target):
    names = [f"case-{i:03d}" for i in range(len(inputs))]
    return TaskData(torch.as_tensor(inputs), torch.as_tensor(target), names, names, CARD.spacing)


def masks(n=6):
    "Random labels; the first case has no lesion."
    labels = np.random.default_rng(0).integers(0, 3, (n, 4, 8, 8))
    labels[0][labels[0] == 2] = 1
    return labels


def test_the_dice_of_one_class_can_be_what_counts():
    truth, said = masks(), np.random.default_rng(1).integers(0, 3, (6, 4, 8, 8))
    task, split = Segmentation(CARD, judged_by="lesion"), data(np.zeros((6, 2, 4, 8, 8), np.float32), truth)
    by_hand = [
        2 * ((t == 2) & (p == 2)).sum() / ((t == 2).sum() + (p == 2).sum()) for t, p in zip(truth[1:], said[1:])
    ]
    output = torch.as_tensor(said)
    assert task.primary == "dice_lesion" and task.validate(output, split) == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert task.summary(task.evaluate(output, split))["dice_lesion"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert Segmentation(CARD).primary == "dice" and Segmentation(CARD).validate(output, split) != pytest.approx(
        np.mean(by_hand), abs=1e-3
    )
    with pytest.raises(VfmError, match="judged_by is 'leison', which is no class of cohort 'made'. Did you mean"):
        Segmentation(CARD, judged_by="leison")


def test_contrasts_are_the_largest_smoothed_differences():
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 9, 9)).astype("float32")
    found = contrast_statistics(torch.as_tensor(x))
    for i, case in enumerate(x):
        smooth = uniform_filter((case[0] - case[1]).astype(float), (1, 3, 3), mode="constant")
        known = [smooth.max(), -smooth.min(), np.percentile(smooth, 99.5)]
        assert found[i, :3] == pytest.approx(known, abs=1e-5)


def test_the_hand_made_control_sees_a_spot_that_the_trivial_one_does_not():
    rng, grade = np.random.default_rng(0), np.arange(80) % 2
    x = rng.normal(size=(80, 2, 4, 24, 24)).astype("float32")
    for i, sick in enumerate(grade):  # a bright spot in both sequences: in one place, or in two
        x[i, 0, 2, 4:8, 4:8] += 3
        x[i, 1, 2, 12:16, 12:16] += 3 * sick
        x[i, 1, 2, 4:8, 4:8] += 3 * (1 - sick)
    task = Classification(CARD)
    train, test = data(x[:40], grade[:40]), data(x[40:], grade[40:])
    hand, trivial = (task.summary(f(train, test))["auc"] for f in (task.hand_made, task.control))
    assert hand > trivial + 0.1 and hand > 0.95
    assert Segmentation(CARD).hand_made(train, test) is None


def test_every_run_of_a_task_shows_the_same_slice():
    labels = np.zeros((3, 5, 6, 6), np.int64)
    labels[:, 1:4, 1:5, 1:5] = 1
    labels[1, 3, 2:4, 2:4], labels[2, 2, 2:5, 2:5] = 2, 2
    inputs = np.random.default_rng(0).normal(size=(3, 2, 5, 6, 6)).astype("float32")
    for seed in range(2):
        output = torch.randn(3, 3, 5, 6, 6, generator=torch.Generator().manual_seed(seed))
        about, shown = case_pictures(Segmentation(CARD), output, data(inputs, labels))
        assert about == {"case": "case-001", "slice": 3, "spacing": [3.0, 1.0, 1.0], "classes": [*CARD.classes]}
        assert (shown["input"] == inputs[1, 0, 3]).all() and (shown["target"] == labels[1, 3]).all()
        assert (shown["prediction"] == output[1].argmax(0)[3].numpy()).all()
