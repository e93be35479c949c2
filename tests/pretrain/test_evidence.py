"""The evidence for each objective: its readers beside other computations, and one kept cell made again."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from vfm_notes.foundation.registry import VfmError, objectives
from vfm_notes.pretrain import evidence
from vfm_notes.analysis.findings import probe_gains, count_helpful, read_evidence, objective_verdict
from vfm_notes.pretrain.evidence import EvidencePlan, probe_pretrained, probe_gain, probe_random_weights

SMALL = EvidencePlan(
    size=(4, 16, 16), spacing=(12.0, 6.0, 6.0), cases={"pretrain": 8, "train": 12, "test": 10}, epochs=1
)


def test_dice_by_monai():
    from monai.metrics import DiceMetric
    torch.manual_seed(0)
    found, true = torch.rand(6, 3, 8, 8) > 0.5, torch.rand(6, 3, 8, 8) > 0.8
    true[2] = False  # a case without any is left out
    there = [i for i in range(6) if i != 2]
    assert np.isclose(
        evidence.mean_dice(found, true),
        DiceMetric(include_background=True)(found[there, None].float(), true[there, None].float()).mean(), atol=1e-6,
    )


def test_readers_see_no_test_case_when_they_are_fitted():
    torch.manual_seed(0)
    x, y, labels = torch.randn(20, 4), torch.randn(20, 4), np.arange(20) % 2
    a = evidence.standardise_both(x, y, (0,))[0]
    assert torch.equal(a, evidence.standardise_both(x, 9 * y + 1, (0,))[0]) and torch.allclose(
        a.mean(0), torch.zeros(4), atol=1e-6
    )
    assert evidence.probe_classes(x, x, (labels, labels)) > evidence.probe_classes(x, y, (labels, labels))


def test_before_any_training_nothing_is_gained():
    "A pretraining without steps leaves the encoder that the random one is."
    plan = replace(SMALL, epochs=0)
    cohort = plan.cohort()
    assert probe_pretrained("autoencoding", 3, plan, cohort)[0] == probe_random_weights(3, plan, cohort)


def test_seeds_pair_and_repeat():
    frame = probe_gain(["autoencoding"], [0, 1], SMALL)
    again = probe_gain(["autoencoding"], [1], SMALL)
    assert list(frame.seed.unique()) == [0, 1] and np.allclose(frame.gain, frame.value - frame.random)
    assert frame[frame.seed == 1].drop(columns="seconds").reset_index(drop=True).equals(again.drop(columns="seconds"))
    assert frame[frame.seed == 0].random.tolist() != frame[frame.seed == 1].random.tolist()
    table = probe_gains(frame)
    assert (table.low <= table.gain).all() and (table.gain <= table.high).all() and (table.n == 2).all()


def test_an_objective_that_does_not_fit_is_told_not_hidden(tmp_path):
    frame = probe_gain(["masked_tokens"], [0], replace(SMALL, backbone="profound_toy"))
    assert "no plain transformer" in frame.reason[0] and len(frame) == 1


def test_kept_evidence_is_whole():
    head, frame = read_evidence()
    assert head["origin"]["versions"]["torch"] and len({p["backbone"] for p in head["plans"]}) == 2
    for plan in head["plans"]:
        rows = frame[frame.backbone == plan["backbone"]]
        assert set(rows.objective) == set(objectives) - {"task"} and rows.seed.nunique() == 5
        told = rows.dropna(subset=["gain"])
        assert (
            (told.groupby(["objective", "seed"]).size() == 3).all()
            and told.value.between(0, 1).all()
            and (told.seconds > 0).all()
        )
        assert set(rows[rows.gain.isna()].objective) <= {"masked_tokens"}
        twice = told.dropna(subset=["elsewhere"])  # one seed of each, with the kernels of an older processor
        assert set(twice.seed) == {0} and len(twice) == 3 * told.objective.nunique()
        moved = (twice.elsewhere - twice.value).abs()
        assert 0 < moved.max() < 0.2 and moved.median() < 0.02


def test_one_kept_cell_made_again():
    head, frame = read_evidence()
    values = next(p for p in head["plans"] if p["backbone"] == "provicnet_toy")
    plan = EvidencePlan(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    again = probe_gain(["masked_tokens"], [4], plan).set_index("probe")
    kept = frame[
        (frame.backbone == plan.backbone) & (frame.objective == "masked_tokens") & (frame.seed == 4)
    ].set_index("probe")
    for name in kept.index:
        assert abs(kept.value[name] - again.value[name]) < 0.02 and abs(kept.random[name] - again.random[name]) < 0.005


def test_missing_file(tmp_path):
    with pytest.raises(VfmError, match="does not exist; make it with make evidence"):
        read_evidence(tmp_path/"none.json")


def made_up(**effects):
    "Rows of objectives on two backbones, with the gains that are asked for and a small spread over five seeds."
    import pandas as pd
    spread = np.array([-2, -1, 0, 1, 2]) * 0.01
    return pd.DataFrame([
        {
            "backbone": b, "objective": o, "seed": s, "probe": p, "random": 0.5, "value": 0.5 + g + spread[s],
            "gain": g + spread[s], "seconds": 1.0,
        }
        for o, cells in effects.items()
        for (b, p), g in cells.items()
        for s in range(5)
    ])


def test_verdicts_hold_after_correction():
    "By scipy's t-test and Holm's rule, step by step."
    from scipy.stats import ttest_1samp
    frame = made_up(good={("a", "AUC"): 0.2, ("b", "AUC"): 0.021}, bad={("a", "AUC"): -0.2, ("b", "AUC"): 0.0})
    table = probe_gains(frame)
    p = np.array([
        ttest_1samp(g.gain, 0).pvalue for _, g in frame.groupby(["backbone", "objective", "probe"], sort=False)
    ])
    corrected, worst = np.empty(4), 0.0
    for k, i in enumerate(np.argsort(p)): corrected[i] = worst = max(worst, min(1, p[i] * (4 - k)))
    assert np.allclose(table.p, p) and np.allclose(table.p_holm, corrected)
    assert (
        list(table.verdict) == ["raises", "undecided", "lowers", "undecided"]
        and table.low[1] > 0
        and table.p[1] < 0.05 < table.p_holm[1]
    )
    assert (
        count_helpful(table)
        == "On a 1 of 2 objectives raises a probe and 1 lowers one and on b none of 2 objectives raises a probe"
    )
    assert (
        objective_verdict("good", "good one", table)
        == "Good one: on a it raises AUC (+0.200 [+0.180, +0.220]); on b it shows no gain in 5 seeds (gains from "
        "+0.027 on would have been seen in 80 of 100 such measurements), uncorrected intervals alone would suggest a "
        "rise of AUC (+0.021 [+0.001, +0.041])."
    )
    assert (
        "lowers AUC (−0.20" in objective_verdict("bad", "bad", table)
        and objective_verdict("other", "other", table) == "Other: not measured."
    )


def test_a_reader_that_finds_nothing_is_said():
    frame = made_up(a={("x", "Dice"): 0.1}).assign(value=0.0, random=0.0, gain=0.0)
    assert list(probe_gains(frame).verdict) == [
        "reads nothing"
    ] and "finds nothing before or after: Dice" in objective_verdict("a", "a", probe_gains(frame))
