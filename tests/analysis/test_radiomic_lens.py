"The comparison of radiomic families: paired intervals against scipy and redrawn truths, and what is not tested."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from vfm_notes.analysis.radiomics import lens_table, lens_words
from vfm_notes.analysis.tables import Tables

CELL = dict(task="segmentation", backbone="a.b", n_train=8)


def tables(values: dict, strategy="full") -> Tables:  # (region, family) → when → (seeds, cases)
    rows, seeds = [], len(next(iter(next(iter(values.values())).values())))
    runs = [dict(id=f"r{s}", kind="transfer", status="done", strategy=strategy, seed=s, **CELL) for s in range(seeds)]
    for (region, family), of in values.items():
        for when, table in of.items():
            rows += [dict(id=f"r{s}", case=f"c{c}", patient=f"c{c}", region=region, family=family, when=when,
                          features=2, value=float(v)) for s, own in enumerate(table) for c, v in enumerate(own)]
    return Tables("made", pd.DataFrame(runs), *[pd.DataFrame()] * 4, radiomics=pd.DataFrame(rows))


def test_with_one_seed_it_is_the_paired_t_test():
    draw = np.random.default_rng(0)
    before = draw.normal(0.6, 0.3, (1, 40))
    after, random = before - 0.1 + draw.normal(0, 0.2, (1, 40)), draw.normal(0.1, 0.3, (1, 40))
    row = lens_table(tables({("gland", "shape"): {"before": before, "after": after, "random": random}})).iloc[0]
    test = ttest_rel(after[0], before[0])
    span = test.confidence_interval(0.95)
    assert (row.change, row.low, row.high, row.p) == pytest.approx(
        (after.mean() - before.mean(), span.low, span.high, test.pvalue), rel=1e-6)
    assert (row.before, row.after, row.random) == pytest.approx((before.mean(), after.mean(), random.mean()))
    assert row.known == pytest.approx(before.mean() - random.mean()) and row.known_p < 0.01
    assert (row.n_seeds, row.n_cases) == (1, 40)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    "200 made studies of three seeds and 30 cases, a change of −0.2; a paired spread smaller than that of the cases."
    draw, held = np.random.default_rng(1), 0
    for _ in range(200):
        case, seed = draw.normal(0.5, 0.5, 30), draw.normal(0, 0.05, (3, 1))
        before = case + draw.normal(0, 0.05, (3, 30))
        after = case - 0.2 + seed + 0.2 * draw.normal(size=30) + draw.normal(0, 0.05, (3, 30))
        row = lens_table(tables({("gland", "shape"): {"before": before, "after": after, "random": before}})).iloc[0]
        held += row.low <= -0.2 <= row.high
    assert 0.90 <= held / 200 <= 0.99


def test_a_frozen_encoder_is_not_tested_and_takes_nothing_from_the_correction():
    draw = np.random.default_rng(2)
    same = draw.normal(size=(2, 20))
    lost = {"before": same, "after": same - 1 + 0.1 * draw.normal(size=same.shape), "random": same}
    frozen = {"before": same, "after": same, "random": same}
    found = lens_table(tables({("gland", "shape"): lost, ("gland", "texture"): frozen})).set_index("family")
    texture = found.loc["texture"]
    assert texture.change == 0 and texture[["p", "p_holm", "low", "high"]].isna().all()
    assert found.loc["shape", "p_holm"] == found.loc["shape", "p"]
    assert "Of 1 comparison (" in lens_words(found.reset_index())
    assert lens_words(found.loc[["texture"]].reset_index()) == (
        "No tuned encoder was asked what it tells of radiomic values."
    )


def test_specialists_are_no_pretrained_networks_and_no_rows_are_no_table():
    same = np.zeros((1, 20))
    values = {("gland", "shape"): {"before": same, "after": same, "random": same}}
    assert len(lens_table(tables(values, "specialist"))) == 0
    bare = tables(values)
    bare.radiomics = bare.radiomics.iloc[:0]
    assert len(lens_table(bare)) == 0 and lens_words(lens_table(bare)).startswith("No tuned encoder")
