"""A combination of scores against scikit-learn, and that it never sees the outcome of its own target."""
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from vfm_notes.analysis.combination import PENALTY, combined_scores, ridge_weights, within_target
from vfm_notes.analysis.public_matrix import public_matrix, replay


def made(seed=0, sources=8, targets=5):
    r = np.random.default_rng(seed)
    frame = lambda x: pd.DataFrame(x, [f"s{i}" for i in range(sources)], [f"t{i}" for i in range(targets)])
    truth = r.normal(size=(sources, targets))
    return {k: frame(truth * w + r.normal(size=truth.shape)) for k, w in (("a", 2), ("b", 1), ("c", 0))}, frame(truth)


def test_weights_are_those_of_scikit_learn():
    r = np.random.default_rng(0)
    x, y = r.normal(size=(40, 3)), r.normal(size=40)
    assert ridge_weights(x, y) == pytest.approx(Ridge(PENALTY * 40, fit_intercept=False).fit(x, y).coef_)


def test_a_target_is_predicted_by_weights_of_the_others():
    values, truth = made()
    found = combined_scores(values, truth)
    x = lambda t: np.stack([within_target(v)[t] for v in values.values()], 1)
    others = [t for t in truth if t != "t2"]
    weights = ridge_weights(np.concatenate([x(t) for t in others]),
                            np.concatenate([within_target(truth)[t] for t in others]))
    assert found["t2"].to_numpy() == pytest.approx(x("t2") @ weights)
    other = truth.copy()
    other["t2"] = -5 * truth["t2"] + 1  # its own outcome
    assert combined_scores(values, other)["t2"].equals(found["t2"])
    assert not combined_scores(values, other)["t1"].equals(found["t1"])


def test_missing_outcomes_are_left_out():
    values, truth = made()
    truth.loc["s3", "t1"] = np.nan
    found = combined_scores(values, truth)
    assert np.isnan(found.loc["s3", "t1"]) and found.notna().sum().sum() == 8 * 5 - 1


def test_on_the_public_matrix_it_is_no_better_than_its_best_part():
    "A negative result that is kept: eight scores together do not beat the mean rank elsewhere, either."
    taus = replay("dataset").mean()
    assert taus["combination"] < taus["mean rank elsewhere"]
    m = public_matrix("dataset")
    assert set(replay("dataset").index) == {t for t in m.values["lp"]}
