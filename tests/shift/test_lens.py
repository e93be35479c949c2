"The radiomic lens against scikit-learn, a ridge solved by hand, the delta method, and planted truths."
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vfm_notes.foundation.registry import VfmError
from vfm_notes.shift.lens import FEWEST, FOLDS, PENALTIES, explained_shares, family_shares, out_of_fold


def made(n=40, f=12, k=3, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, f)) * draw.uniform(0.1, 30, f)
    return x, x @ draw.normal(size=(f, k)) + draw.normal(size=(n, k)) * 20, draw.integers(0, n // 2, n).astype(str)


def test_predictions_are_those_of_scikit_learn_value_by_value():
    x, y, patients = made()
    told = out_of_fold(x, y, patients)
    for j in range(y.shape[1]):
        ridge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        alone = cross_val_predict(ridge, x, y[:, j], groups=patients, cv=GroupKFold(FOLDS))
        assert np.allclose(told[:, j], alone)
    assert np.allclose(explained_shares(y, told).mean(0), r2_score(y, told, multioutput="raw_values"))


def test_a_fold_is_a_ridge_solved_by_hand_and_a_patient_is_never_on_both_sides():
    "The penalty is the one with the least error of leaving one case out, refitted without it."
    x, y, patients = made(n=25, f=3, k=1)
    told = out_of_fold(x, y, patients)
    for train, test in GroupKFold(FOLDS).split(x, groups=patients):
        assert not set(patients[train]) & set(patients[test])
        mean, sd = x[train].mean(0), x[train].std(0)
        a, b, level = (x[train] - mean) / sd, (x[test] - mean) / sd, y[train].mean()
        def solve(rows, penalty):
            centre, m = a[rows].mean(0), y[train][rows].mean()
            c = a[rows] - centre
            w = np.linalg.solve(c.T @ c + penalty * np.eye(3), c.T @ (y[train][rows, 0] - m))
            return lambda z: (z - centre) @ w + m
        every = np.arange(len(train))
        loss = [sum((solve(every != i, p)(a[i]) - y[train][i, 0])**2 for i in every) for p in PENALTIES]
        assert np.allclose(told[test, 0], solve(every >= 0, PENALTIES[int(np.argmin(loss))])(b)), level


def test_the_spread_of_the_shares_is_that_of_the_ratio():
    "Standard error of R² over cases: from the shares, and from ten thousand redrawn samples of cases."
    draw = np.random.default_rng(1)
    y = draw.gamma(2.0, size=(200, 1))
    told = y + 0.5 * draw.normal(size=y.shape)
    shares = explained_shares(y, told)[:, 0]
    at = draw.integers(0, 200, (10_000, 200))
    error, spread = ((y - told)**2)[at, 0], (y[at, 0] - y[at, 0].mean(1, keepdims=True))**2
    redrawn = 1 - error.mean(1) / spread.mean(1)
    assert shares.std(ddof=1) / np.sqrt(200) == pytest.approx(redrawn.std(), rel=0.1)


def table(values: dict, names: list) -> pd.DataFrame:
    return pd.DataFrame([dict(case=c, region=region, family=family, feature=f"f{j}", value=float(v))
                         for (region, family), y in values.items() for j, column in enumerate(y.T)
                         for c, v in zip(names, column) if np.isfinite(v)])


def test_planted_truths_come_back():
    "What the features hold linearly is told; what they do not hold is not; a lost half is a lost half."
    draw, n = np.random.default_rng(2), 150
    names, core = [f"c{i}" for i in range(n)], draw.normal(size=(n, 4))
    noise = draw.normal(size=(n, 30))
    values = {("gland", "shape"): core @ draw.normal(size=(4, 5)) * 1e4 + 3,
              ("gland", "texture"): draw.normal(size=(n, 5))}
    half = core + draw.normal(size=core.shape)  # signal and error of the same size
    found = family_shares(table(values, names), {"before": np.hstack([core, noise]), "after": half, "random": noise},
                          names, names)
    r2 = found.groupby(["family", "when"]).value.mean()
    assert r2["shape", "before"] > 0.99 and 0.35 < r2["shape", "after"] < 0.55
    assert all(-0.1 < r2[key] < 0.05 for key in r2.index if key[0] == "texture" or key[1] == "random")
    assert set(found.features) == {5} and len(found) == 2 * 3 * n


def test_what_does_not_vary_and_what_few_have_is_left_out():
    draw, n = np.random.default_rng(3), 30
    names, x = [f"c{i}" for i in range(n)], draw.normal(size=(n, 3))
    lesion = np.where(np.arange(n)[:, None] < FEWEST - 1, x[:, :1], np.nan)
    values = {("gland", "shape"): np.hstack([x[:, :1], np.full((n, 1), 7.0)]), ("lesion", "shape"): lesion}
    found = family_shares(table(values, names), {"before": x}, names, names)
    assert set(found.region) == {"gland"} and set(found.features) == {1}
    enough = np.where(np.arange(n)[:, None] < FEWEST, x[:, :1], np.nan)
    found = family_shares(table({("lesion", "shape"): enough}, names), {"before": x}, names, names)
    assert set(found.case) == set(names[:FEWEST])
    with pytest.raises(VfmError, match="29 rows for 30 cases"):
        family_shares(table(values, names), {"before": x[1:]}, names, names)
