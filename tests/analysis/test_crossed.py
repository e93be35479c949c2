"""Mixed model, two-way bootstrap and two-way test against closed forms, another parametrisation of the likelihood, and
loops."""
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.optimize import minimize
from vfm_notes.analysis.crossed import (
    crossed_association, crossed_table, crossed_words, leave_one_out, two_way, two_way_test, weighted_rho,
    weighted_rho_of,
)
from vfm_notes.analysis.gain import CELL
from vfm_notes.analysis.mixed import fit_variance_ratios, indicators, mixed_slope, profile_likelihood
from vfm_notes.analysis.tables import Tables


def grid(tasks, backbones): return (i.ravel() for i in np.indices((tasks, backbones)))


def restricted(parameters, x, y, z):
    "−2 log restricted likelihood by its definition: the density of contrasts that know nothing of the line."
    variances = np.exp(parameters)
    v = variances[-1] * np.eye(len(y)) + sum(s * zi @ zi.T for s, zi in zip(variances, z))
    contrasts = np.linalg.svd(x, full_matrices=True)[0][:, x.shape[1]:]
    return -2 * stats.multivariate_normal(np.zeros(contrasts.shape[1]), contrasts.T @ v @ contrasts).logpdf(
        contrasts.T @ y
    )


# --- mixed model

@pytest.mark.parametrize("seed", range(4))
def test_balanced_table_is_the_analysis_of_variance(seed):
    r = np.random.default_rng(seed)
    tasks, backbones = 7, 5
    y = r.normal(0, 2, (tasks, 1)) + r.normal(0, 1.5, (1, backbones)) + r.normal(0, 0.5, (tasks, backbones))
    rest = ((y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()) ** 2).sum() / ((tasks - 1) * (backbones - 1))
    t, b = grid(tasks, backbones)
    lam = fit_variance_ratios(np.ones((y.size, 1)), y.ravel(), [indicators(t), indicators(b)])
    _, beta, covariance, sigma2 = profile_likelihood(
        lam, np.ones((y.size, 1)), y.ravel(), [indicators(t), indicators(b)]
    )
    a, c = backbones * y.mean(1).var(ddof=1), tasks * y.mean(0).var(ddof=1)  # mean squares
    np.testing.assert_allclose([sigma2, *lam * sigma2], [rest, (a - rest) / backbones, (c - rest) / tasks], rtol=1e-3)
    assert beta[0] == pytest.approx(y.mean()) and covariance[0, 0] == pytest.approx((a + c - rest) / y.size, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_likelihood_and_slope_against_the_definition(seed):
    "Holes in the table, a covariate, and a search over log variances of the density itself."
    r = np.random.default_rng(seed)
    t, b = (i[:-2] for i in grid(6, 4))
    x = r.normal(size=len(t)) + 0.5 * t
    y = 1.5 * x + r.normal(0, 2, 6)[t] + r.normal(0, 1, 4)[b] + r.normal(0, 0.7, len(t))
    found, design, z = (
        mixed_slope(x, y, {"task": t, "backbone": b}), np.stack([np.ones(len(t)), x], 1),
        [indicators(t), indicators(b)],
    )
    lam = np.array([found.sd["task"], found.sd["backbone"]]) ** 2 / found.sd["rest"] ** 2
    twice, beta, covariance, _ = profile_likelihood(lam, design, y, z)
    variances = np.array([found.sd["task"], found.sd["backbone"], found.sd["rest"]]) ** 2 + 1e-14
    constant = -np.linalg.slogdet(design.T @ design)[1]
    assert twice + constant == pytest.approx(restricted(np.log(variances), design, y, z), abs=1e-5)
    other = min(
        (
            minimize(
                restricted, s, (design, y, z), method="Nelder-Mead", options=dict(maxiter=4000, xatol=1e-8, fatol=1e-10)
            ).fun
            for s in product((-1.0, 1.5), (-1.0, 1.5), (-0.5,))
        )
    )
    assert twice + constant <= other + 1e-5
    assert found.slope == pytest.approx(beta[1], rel=1e-6) and found.free == len(t) - (1 + 1 + 5 + 3)
    half = stats.t.ppf(0.975, found.free) * np.sqrt(covariance[1, 1])
    assert (found.low, found.high) == pytest.approx((beta[1] - half, beta[1] + half))


def test_without_variation_between_groups_it_is_least_squares():
    r = np.random.default_rng(1)
    t, b = grid(5, 3)
    x = r.normal(size=15)
    e = r.normal(size=15).reshape(5, 3)
    # no task and no backbone stands out: both variances are at their border
    e = (e - e.mean(1, keepdims=True) - e.mean(0) + e.mean()).ravel()
    found = mixed_slope(x, e, {"task": t, "backbone": b})
    assert found.sd["task"] == pytest.approx(0, abs=1e-3) and found.sd["backbone"] == pytest.approx(0, abs=1e-3)
    assert found.slope == pytest.approx(stats.linregress(x, e).slope, rel=1e-3)


def test_interval_of_the_slope_keeps_its_level():
    "Five tasks and two backbones, the default study: a true slope of 1 lies inside in about 95 of 100."
    t, b = grid(5, 2)
    def inside(i):
        r = np.random.default_rng(i)
        x = r.normal(size=10) + r.normal(size=5)[t]
        m = mixed_slope(
            x, x + r.normal(0, 2, 5)[t] + r.normal(0, 1, 2)[b] + r.normal(0, 1, 10), {"task": t, "backbone": b}
        )
        return m.low <= 1 <= m.high
    assert np.mean([inside(i) for i in range(25)]) >= 0.88


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-100, 100))
def test_slope_laws(seed, scale, shift):
    r = np.random.default_rng(seed)
    t, b = grid(4, 3)
    x, y = r.normal(size=12), r.normal(size=12) + t
    one, other = (
        mixed_slope(x, y, {"task": t, "backbone": b}),
        mixed_slope(scale * x + shift, 3 * y - shift, {"task": t, "backbone": b}),
    )
    assert other.slope == pytest.approx(3 * one.slope / scale, rel=1e-3, abs=1e-4 / scale) and other.free == one.free
    assert mixed_slope(-x, y, {"task": t, "backbone": b}).slope == pytest.approx(-one.slope, rel=1e-3, abs=1e-4)


def test_what_cannot_be_fitted_says_why():
    assert "too few" in mixed_slope([1, 2], [1, 2], {"task": [0, 1]}).why
    assert "vary" in mixed_slope([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], {"task": [0, 0, 1, 1, 1]}).why
    assert "as many levels" in mixed_slope([1, 2, 3, 4.0], [1, 3, 2, 5], {"task": [0, 1, 2, 3]}).why
    t, b = grid(5, 2)
    assert "no scatter" in mixed_slope(np.arange(10.0) ** 2, 3.0 * t + b, {"task": t, "backbone": b}).why
    one = mixed_slope(np.arange(6.0), [1, 3, 2, 5, 4, 7], {"task": [0, 0, 1, 1, 2, 2], "backbone": ["a"] * 6})
    assert one.left_out == ("backbone",) and "backbone" not in one.sd and np.isfinite(one.low)
    full = mixed_slope([1, 2, 3, 5.0], [1, 3, 2, 5], {"task": [0, 0, 1, 1], "backbone": [0, 1, 0, 1]})
    assert full.free == 0 and np.isfinite(full.slope) and np.isnan(full.low) and "freedom" in full.why
    assert mixed_slope([1, 2, np.nan, 4, 5, 6], [1, 3, 2, 5, np.nan, 7], {"task": [0, 0, 1, 1, 2, 2]}).n == 4


# --- two-way bootstrap and test

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 10))
def test_weighted_rho_is_rho_of_repeated_points(seed, n):
    r = np.random.default_rng(seed)
    x, y, w = r.integers(0, 5, n).astype(float), r.normal(size=n), r.integers(0, 4, (5, n)).astype(float)
    for value, row in zip(weighted_rho(x, y, w), w.astype(int)):
        i = np.repeat(np.arange(n), row)
        ref = stats.spearmanr(x[i], y[i]).statistic if len(np.unique(x[i])) > 1 and len(np.unique(y[i])) > 1 else np.nan
        assert value == pytest.approx(ref, nan_ok=True, abs=1e-9)


def test_two_way_interval_against_a_loop():
    r = np.random.default_rng(0)
    t, b = grid(6, 4)
    x = r.normal(size=24); y = 0.7 * x + r.normal(size=24)
    low, high = two_way(x, y, t, b, 4000)
    values = []
    for _ in range(2000):
        a, c = r.integers(0, 6, 6), r.integers(0, 4, 4)
        i = (a[:, None] * 4 + c).ravel()
        values.append(stats.spearmanr(x[i], y[i]).statistic)
    np.testing.assert_allclose([low, high], np.nanpercentile(values, [2.5, 97.5]), atol=0.05)
    assert np.isnan(two_way(x[:4], y[:4], t[:4], b[:4])).all()  # one task


def test_two_way_interval_covers_where_cells_share_tasks():
    """No association, but tasks that differ much: the interval that re-draws cells is too sure of itself, this one is
    not."""
    t, b = grid(5, 2)
    def inside(i):
        r = np.random.default_rng(i)
        low, high = two_way(
            3 * r.normal(size=5)[t] + r.normal(size=10), 3 * r.normal(size=5)[t] + r.normal(size=10), t, b, 400, i
        )
        return low <= 0 <= high
    assert np.mean([inside(i) for i in range(150)]) >= 0.85


def test_two_way_test_against_all_exchanges():
    r = np.random.default_rng(2)
    t, b = grid(4, 3)
    x, y = r.normal(size=12), r.normal(size=12)
    rho = [
        stats.spearmanr(x.reshape(4, 3)[list(p)][:, list(q)].ravel(), y).statistic
        for p in permutations(range(4))
        for q in permutations(range(3))
    ]
    p, n, least = two_way_test(x, y, t, b, np.zeros(12))
    assert (
        n == 144
        and p == pytest.approx((np.abs(rho) >= abs(rho[0]) - 1e-9).mean())
        and np.mean(np.abs(rho) >= least - 1e-9) <= 0.05
    )
    keep = np.arange(12) != 5  # a hole: pairs that meet it are left out
    rows = []
    for pr in permutations(range(4)):
        for q in permutations(range(3)):
            pairs = [
                (x.reshape(4, 3)[pr[i], q[j]], y.reshape(4, 3)[i, j])
                for i in range(4)
                for j in range(3)
                if keep.reshape(4, 3)[i, j] and keep.reshape(4, 3)[pr[i], q[j]]
            ]
            rows.append(stats.spearmanr(*zip(*pairs)).statistic)
    assert two_way_test(x[keep], y[keep], t[keep], b[keep], np.zeros(11))[0] == pytest.approx(
        (np.abs(rows) >= abs(rows[0]) - 1e-9).mean()
    )


def test_two_way_test_keeps_its_level_where_the_simple_one_does_not():
    t, b = grid(5, 2)
    from vfm_notes.analysis.association import associate
    ours, simple = [], []
    for i in range(200):
        r = np.random.default_rng(i)
        x, y = (3 * r.normal(size=5)[t] + r.normal(size=10) for _ in range(2))
        ours.append(two_way_test(x, y, t, b, np.zeros(10), seed=i)[0])
        simple.append(associate(x, y, draws=199, seed=i).p)
    assert np.mean(np.array(ours) <= 0.05) <= 0.085 and np.mean(np.array(simple) <= 0.05) > 0.12


def test_rho_over_pairs_that_exist():
    r = np.random.default_rng(0)
    x, y, there = r.normal(size=(6, 9)), r.normal(size=9), r.random((6, 9)) < 0.8
    np.testing.assert_allclose(
        weighted_rho_of(x, y, there), [stats.spearmanr(a[k], y[k]).statistic for a, k in zip(x, there)]
    )


def test_leaving_one_out():
    x, y, b = np.arange(6.0), np.array([1, 2, 3, 9, 8, 7.0]), np.array(list("aabbcc"))
    out = leave_one_out(x, y, b)
    assert (
        set(out) == set("abc")
        and out["a"] == pytest.approx(stats.spearmanr(x[2:], y[2:]).statistic)
        and leave_one_out(x[:4], y[:4], b[:4]) == {}
    )


def points(tasks=5, backbones=2, slope=4.0, strategies=("full",), seed=0):
    r = np.random.default_rng(seed)
    t = pd.DataFrame([
        dict(task=f"t{i}", backbone=f"b{j}", strategy=s, n_train=8, d2p=r.random())
        for i in range(tasks)
        for j in range(backbones)
        for s in strategies
    ])
    return t.assign(rpg=slope * t.d2p + r.normal(0, 0.2, len(t)))


def test_words_say_what_the_cells_share():
    clear, none, few, one = (
        crossed_words(crossed_association(p, draws=500))
        for p in (points(), points(slope=0), points(1, 3), points(5, 1))
    )
    assert (
        "5 tasks and 2 backbones" in clear
        and "240 exchanges" in clear
        and "The ranks show an association" in clear
        and "2 backbones cannot show what holds for others" in clear
    )
    assert "The ranks show neither an association nor its absence" in none and "mixed model" in none
    assert "not tested" in few and "5 tasks and 1 backbone:" in one
    six = crossed_association(points(5, 2, strategies=("full", "probe", "lora", "top", "decoder")), draws=200)
    assert (
        six.simple.n == 50
        and six.ways == 201
        and np.isfinite(six.line.low)
        and set(six.without_backbone) == {"b0", "b1"}
    )
    mixed = points().sample(frac=1, random_state=1)
    assert crossed_words(crossed_association(mixed, draws=500)) == clear  # order does not matter
    assert "not tested" in crossed_words(
        crossed_association(points().assign(d2p=1.0))
    ) and "not tested" in crossed_words(crossed_association(points().assign(d2p=np.nan)))


def test_table_of_distances_and_outcomes():
    rows = points().assign(seed=0, learned=True, id=lambda t: t.task + t.backbone)
    runs = rows.assign(kind="transfer", status="done", metric="dice", direction=1, seconds_training=np.arange(10.0))
    moved = rows.assign(layer="embed", mmd2=rows.d2p)
    tables = Tables(
        "s", runs, runs, pd.DataFrame(),
        pd.DataFrame(columns=[*CELL, "id", "seed", "epoch", "seconds", "name", "value"]), moved,
        moved.assign(when="early", mmd2=-rows.d2p),
    )
    t = crossed_table(tables, rows, draws=200).set_index(["distance", "outcome"])
    assert (
        len(t) == 6
        and t.n.xs("gain", level=1).tolist() == [10, 10]
        and t.n.xs("epochs sooner than scratch", level=1).tolist() == [0, 0]
    )
    end, early = t.rho.xs("gain", level=1)
    assert end == pytest.approx(stats.spearmanr(rows.d2p, rows.rpg).statistic) and early == pytest.approx(-end)
    assert t.rho.xs("seconds of training", level=1).iloc[0] == pytest.approx(
        stats.spearmanr(rows.d2p, np.arange(10)).statistic
    )
    assert crossed_table(Tables("s", runs, runs, pd.DataFrame(), tables.curves, moved[:0]), rows).empty


@pytest.mark.parametrize("seed", range(6))
def test_the_higher_of_two_tops_is_found(seed):
    "Large differences between tasks against a slope of its own inside them: the likelihood has a second, lower top."
    rng = np.random.default_rng(seed)
    level = np.repeat(np.arange(6.0), 3)
    x = level + rng.normal(0, 0.3, 18)
    y = 4 * level - 2 * (x - level) + rng.normal(0, 0.2, 18)
    inside = x - np.repeat(x.reshape(6, 3).mean(1), 3)
    assert (
        abs(mixed_slope(x, y, {"task": level, "backbone": np.tile(range(3), 6)}).slope - inside @ y / (inside @ inside))
        < 0.4
    )
