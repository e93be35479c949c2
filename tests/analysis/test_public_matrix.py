"""Scores on a public matrix: the check values of an independent recomputation, loops, and closed forms."""
import io
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vfm_notes.analysis.public_matrix import (
    CONTROL_NAMES, REFERENCE, interval_over_targets, lp_times_fu, matrix_file, matrix_verdict, needed_table,
    public_matrix, rank_elsewhere, replay, replay_table, sign_flip_p, target_taus, targets_needed,
)

MEANS = {  # recomputed elsewhere from the same tables
    "dataset": {"LogME": 0.335, "SFDA": 0.267, "LEEP": 0.351, "N-LEEP": 0.411, "PARC": 0.297, "NCTI": 0.183,
                "LP": 0.440, "FU": 0.410, "LP × FU": 0.5226, REFERENCE: 0.561, "mean AUC elsewhere": 0.431},
    "model": {"LogME": 0.036, "SFDA": 0.187, "LEEP": -0.200, "N-LEEP": -0.151, "PARC": -0.104, "NCTI": -0.084,
              "LP": -0.211, "FU": -0.286, "LP × FU": -0.250, REFERENCE: 0.500, "parameter count": 0.425,
              "ImageNet accuracy": 0.240},
}
LP_FU = {"blood": 0.777, "breast": 0.441, "derma": 0.702, "oct": 0.452, "organa": 0.566, "organc": 0.109,
         "organs": 0.219, "path": 0.615, "pneumonia": 0.612, "retina": 0.602, "tissue": 0.653}


@pytest.mark.parametrize("scenario,name", [(s, n) for s in MEANS for n in MEANS[s]])
def test_mean_taus_are_those_of_an_independent_recomputation(scenario, name):
    places = len(str(MEANS[scenario][name]).partition(".")[2])
    assert replay(scenario)[name].mean() == pytest.approx(MEANS[scenario][name], abs=0.51 * 10**-max(places, 3))


def test_taus_of_the_product_target_by_target():
    found = replay("dataset")["LP × FU"]
    assert {t.removesuffix("mnist"): round(v, 3) for t, v in found.items()} == LP_FU


def test_the_tables_are_the_published_ones():
    kept = matrix_file()
    assert "MIT License" in kept["licence_text"] and "DovileDo" in kept["licence_text"] and len(kept["commit"]) >= 7
    raw = pd.read_csv(io.StringIO(kept["tables"]["AUCs_dataset.csv"]))
    assert raw.shape == (15, 14) and raw.loc[raw.source == "imagenet", "bloodmnist"].item() == 0.9984533762023934
    m = public_matrix("dataset")
    assert all(np.isnan(m.outcome.loc[t, t]) for t in m.outcome) and m.outcome.notna().sum().sum() == 15 * 12 - 12
    assert public_matrix("model").outcome.shape == (9, 11) and public_matrix("model").outcome.to_numpy().max() > 90


def test_a_source_is_not_asked_about_itself():
    "FU has a value where source = target; it scales the product, and enters no τ."
    m = public_matrix("dataset")
    fu, lp, t = m.values["fu"], m.values["lp"], "bloodmnist"
    assert np.isfinite(fu.loc[t, t]) and np.isnan(lp.loc[t, t])
    other = fu.copy()
    other.loc[t, t] = fu[t].max() + 1000  # it changes the range of the product ...
    assert not np.allclose(lp_times_fu(lp, fu)[t].drop(t), lp_times_fu(lp, other)[t].drop(t))
    assert target_taus(fu[[t]], m.outcome)[t] == target_taus(other[[t]], m.outcome)[t]  # ... but not τ of FU


def test_rank_elsewhere_by_loops():
    r = np.random.default_rng(0)
    outcome = pd.DataFrame(r.normal(size=(5, 4)), index=list("abcde"), columns=list("abcd"))
    for t in "abcd": outcome.loc[t, t] = np.nan
    found = rank_elsewhere(outcome)
    for s, t in product("abcde", "abcd"):
        ranks = [
            (1 + sum(outcome.loc[o, u] < outcome.loc[s, u] for o in "abcde" if o != u)) / 4
            for u in "abcd" if u not in (t, s)
        ]
        assert found.loc[s, t] == pytest.approx(np.mean(ranks))
    other = outcome.copy()
    other["b"] = r.normal(size=5)
    assert rank_elsewhere(other)["b"].equals(found["b"])  # the target itself is never looked at


def test_equal_and_reversed_orders():
    outcome = pd.DataFrame({"t": [3.0, 1.0, 2.0, 5.0]}, index=list("abcd"))
    assert target_taus(outcome, outcome)["t"] == pytest.approx(1)
    assert target_taus(-outcome, outcome)["t"] == pytest.approx(-1)


def test_sign_flips_by_enumeration():
    d = np.array([0.4, -0.1, 0.7, 0.2, 0.3])
    sums = [abs(np.dot(s, d)) for s in product((1, -1), repeat=5)]
    assert sign_flip_p(d) == pytest.approx(np.mean([s >= abs(d.sum()) - 1e-12 for s in sums]))
    assert sign_flip_p(np.ones(3)) == 0.25


def test_interval_over_targets_is_about_that_of_theory():
    x = np.random.default_rng(0).normal(size=200)
    mean, low, high = interval_over_targets(np.r_[x, np.nan])
    assert mean == pytest.approx(x.mean()) and (high - low) / 2 == pytest.approx(1.96 * x.std() / 200**0.5, rel=0.06)


def test_no_score_beats_the_control_and_the_words_say_so():
    table = replay_table("dataset").set_index("predictor")
    assert set(CONTROL_NAMES[2:]) < set(table.index)
    assert (table.low < table.tau).all() and (table.tau < table.high).all()
    assert table.tau.idxmax() == REFERENCE and not (table.more_low.drop(REFERENCE) > 0).any()
    said = matrix_verdict()
    assert "LP × FU" in said and "+0.52" in said and "+0.56" in said and "None of the scores beats it" in said
    assert "parameter count reaches +0.42" in said or "parameter count reaches +0.43" in said


def test_targets_needed_have_the_power_that_is_claimed():
    "By simulation of paired t-tests."
    n = targets_needed(0.5, 1.0)
    r = np.random.default_rng(0)
    power = lambda k: (stats.ttest_1samp(r.normal(0.5, 1, (4000, k)), 0, axis=1).pvalue < 0.05).mean()
    assert power(n) == pytest.approx(0.8, abs=0.03) and power(n // 2) < 0.6
    needed = needed_table()
    assert (needed.drop(columns="sources").diff().dropna() <= 0).all().all()  # more sources, fewer targets
    assert (needed["0.05"] > needed["0.1"]).all() and (needed["0.1"] > needed["0.2"]).all()
