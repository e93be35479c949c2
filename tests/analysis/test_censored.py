"""Product-limit curves and the log-rank test against published numbers, scipy and loops."""
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from vfm_notes.analysis.convergence import (
    excess_arrivals, half_time, log_rank, kaplan_meier, reached_by, resample_blocks,
)
from vfm_notes.analysis.convergence import ALL_TASKS, reached_curves, reached_table, run_convergence
from vfm_notes.analysis.tables import Tables

# Remission in weeks of 42 patients with leukaemia (Freireich et al., Blood 1963), the textbook example of the method
DRUG = np.array([6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35.0])
DRUG_LATE = np.arange(21) >= 9
PLACEBO = np.array([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23.0])


def loop(time, late):
    "Share that has arrived, event by event."
    left, out = 1.0, []
    for t in sorted(set(time)):
        on_the_way = sum(u >= t for u in time)
        left *= 1 - sum(u == t and not c for u, c in zip(time, late)) / on_the_way
        out.append(1 - left)
    return out


def test_published_curve_median_and_test():
    curve = reached_by(DRUG, DRUG_LATE).set_index("at").share
    for t, left in {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448, 35: 0.448}.items():
        assert 1 - curve[t] == pytest.approx(left, abs=5e-4)
    assert half_time(DRUG, DRUG_LATE)[0] == 23 and half_time(PLACEBO, np.zeros(21))[0] == 8
    time, late = np.concatenate([PLACEBO, DRUG]), np.concatenate([np.zeros(21, bool), DRUG_LATE])
    o, v = excess_arrivals(time, late, (np.arange(42) < 21)[None].astype(float))
    assert o[0] == pytest.approx(21 - 10.75, abs=0.01) and o[0] ** 2 / v[0] == pytest.approx(16.79, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=25))
def test_curve_against_scipy_and_a_loop(runs):
    time, late = map(np.array, zip(*runs))
    ours = reached_by(time, late, draws=50)
    np.testing.assert_allclose(ours.share, loop(time, late), atol=1e-12)
    if not late.all():
        np.testing.assert_allclose(
            ours.share, stats.ecdf(stats.CensoredData.right_censored(time, late)).cdf.evaluate(ours["at"]), atol=1e-12
        )
    assert (
        ours.share.is_monotonic_increasing
        and (ours.low <= ours.high).all()
        and ours.low.is_monotonic_increasing
        and ours.share.between(0, 1).all()
    )
    assert ours.waiting.iloc[0] == len(time) and ours.reached.sum() == (~late).sum()
    shuffled = np.random.default_rng(0).permutation(len(time))
    pd.testing.assert_frame_equal(
        reached_by(time[shuffled], late[shuffled], draws=2)[["at", "share", "waiting"]],
        ours[["at", "share", "waiting"]],
    )


def test_weights_are_repeated_runs_and_blocks_stay_together():
    r = np.random.default_rng(0)
    time, late, block = r.integers(1, 6, 12), r.random(12) < 0.3, np.repeat(["a", "b", "c", "d"], 3)
    w = resample_blocks(block, 40, 1)
    assert (w.reshape(40, 4, 3) == w.reshape(40, 4, 3)[:, :, :1]).all() and (w.sum(1) == 12).all()
    at, share = kaplan_meier(time, late, w)
    for row, weight in zip(share, w.astype(int)):
        again = np.repeat(np.arange(12), weight)
        alone = reached_by(time[again], late[again], draws=1).set_index("at").share
        for t, v in zip(at, row):
            if t in alone.index: assert v == pytest.approx(alone[t])


def test_interval_covers_the_truth():
    "Exponential times, watched until 1: the interval at the end holds the true share in about 95 of 100."
    hit = 0
    for i in range(200):
        t = np.random.default_rng(i).exponential(1, 40)
        c = reached_by(np.minimum(t, 1), t > 1, draws=200, seed=i).iloc[-1]
        hit += c.low <= 1 - np.exp(-1) <= c.high
    assert 0.88 <= hit / 200 <= 0.99


def test_half_time_may_be_later_than_the_budget():
    assert half_time([8, 8, 8], [True] * 3) == (np.inf, np.inf, np.inf)
    low, high = half_time([1, 2, 3, 4, 8, 8], [False] * 4 + [True] * 2)[1:]
    assert low < 4 and (high == np.inf or high >= 4)
    assert np.isnan(half_time([], [])[0]) and reached_by([], []).empty


def test_log_rank_against_scipy_and_all_swaps():
    r = np.random.default_rng(3)
    time, late = r.integers(1, 9, (7, 2)).astype(float), r.random((7, 2)) < 0.2
    z, p = log_rank(time, late, np.zeros(7))
    a, b = (stats.CensoredData.right_censored(time[:, i], late[:, i]) for i in (0, 1))
    assert z**2 == pytest.approx(stats.logrank(a, b).statistic ** 2)
    strata = np.array(list("aaabbbb"))
    def total(swap):
        "Observed minus expected of the first group, stratum by stratum, event by event."
        out = 0.0
        for s in "ab":
            rows = [(time[i, j], late[i, j], j == int(f)) for i, f in enumerate(swap) if strata[i] == s for j in (0, 1)]
            for t in {u for u, c, _ in rows if not c}:
                risk = [x for x in rows if x[0] >= t]
                now = [x for x in rows if x[0] == t and not x[1]]
                out += sum(x[2] for x in now) - len(now) * sum(x[2] for x in risk) / len(risk)
        return out
    null = np.array([abs(total(s)) for s in product([False, True], repeat=7)])
    z, p = log_rank(time, late, strata)
    assert p == pytest.approx((null >= null[0] - 1e-9).mean()) and np.sign(z) == np.sign(total([False] * 7))


def test_log_rank_is_uniform_without_a_difference_and_strong_with_one():
    p = []
    for i in range(200):
        r = np.random.default_rng(i)
        t = np.repeat([1.0, 3.0, 9.0], 5)[:, None] * r.exponential(1, (15, 2))
        p.append(log_rank(np.minimum(t, 8), t > 8, np.repeat(list("abc"), 5), draws=199, seed=i)[1])
    assert (np.array(p) <= 0.05).mean() < 0.1 and 0.38 < (np.array(p) <= 0.5).mean() < 0.62
    assert (
        log_rank(np.column_stack([np.arange(1, 11), np.arange(4, 14)]) * 1.0, np.zeros((10, 2)), np.zeros(10))[1]
        <= 0.05
    )
    assert (
        np.isnan(log_rank(np.ones((4, 2)), np.ones((4, 2)), np.zeros(4))).all()
        and np.isnan(log_rank(np.zeros((0, 2)), np.zeros((0, 2)), [])).all()
    )
    assert log_rank(np.array([[1.0, 2], [3, 4]]), np.zeros((2, 2)), [0, 0])[0] == pytest.approx(
        -log_rank(np.array([[2.0, 1], [4, 3]]), np.zeros((2, 2)), [0, 0])[0]
    )


def study(tasks=2, backbones=2, seeds=3, device="cpu"):
    "Tuned runs twice as fast; one tuned run never arrives."
    runs, curves = [], []
    for t, b, s, strategy in product(range(tasks), range(backbones), range(seeds), ("scratch", "full")):
        key = dict(id=f"{t}{b}{s}{strategy}", task=f"t{t}", backbone=f"b{b}", strategy=strategy, n_train=8, seed=s)
        runs.append(key | dict(kind="transfer", status="done", metric="dice", direction=1, device=device))
        rate = 0.02 if (t, b, s, strategy) == (0, 0, 0, "full") else {"scratch": 0.1, "full": 0.2}[strategy]
        curves += [key | dict(epoch=e, seconds=3.0 * e, name="val_dice", value=min(0.8, rate * e)) for e in range(11)]
    return Tables("s", pd.DataFrame(runs), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(curves), pd.DataFrame())


def test_reached_tables_of_a_study():
    runs = run_convergence(study())
    t = reached_table(runs).set_index(["rule", "task", "strategy"])
    assert (
        t.loc[("scratch", "t0", "scratch")].half == 8
        and t.loc[("scratch", "t1", "full")].half == 4
        and t.loc[("scratch", "t0", "full")].censored == 1
    )
    whole = t.loc[("scratch", ALL_TASKS, "full")]
    assert (
        (whole.n_runs, whole.n_cells, whole.pairs, whole.drawn) == (12, 4, 12, "cells")
        and whole.z > 0
        and whole.p <= 0.01
        and t.loc[("scratch", "t0", "full")].drawn == "runs"
    )
    assert (
        reached_table(runs, unit="seconds").set_index(["rule", "task", "strategy"]).loc[("scratch", "t1", "full")].half
        == 12
    )
    assert reached_table(runs, unit="gpu_hours").empty and runs.gpu_hours.isna().all()
    on_gpu = run_convergence(study(device="cuda (NVIDIA H200)"))
    np.testing.assert_allclose(on_gpu.gpu_hours, on_gpu.seconds / 3600)
    few = reached_table(run_convergence(study(1, 1)))
    assert few.p.isna().all() and few.pairs.max() == 3  # three pairs: shown, not tested
    curves = reached_curves(runs, "scratch")
    last = curves[(curves.task == ALL_TASKS) & (curves.strategy == "full")].iloc[-1]
    assert (
        last["at"] == 10
        and last.share == pytest.approx(11 / 12)
        and curves.groupby(["task", "strategy"]).share.first().eq(0).all()
    )


def test_nothing_to_reach():
    empty = Tables("s", study().runs, pd.DataFrame(), pd.DataFrame(), study().curves[:0], pd.DataFrame())
    assert reached_table(run_convergence(empty)).empty and reached_curves(run_convergence(empty)).empty


def test_every_curve_goes_from_nothing_to_the_longest_budget():
    """By hand: of three runs that all arrive, the share that has arrived; one that is early goes on flat, one that is
    late has no second end."""
    times = {"full": [1.0, 2.0, 3.0], "scratch": [2.0, 5.0, 9.0], "probe": [0.0, 4.0, 4.0]}
    runs = pd.DataFrame([
        dict(rule="rise", reason="", task="t", backbone="b", n_train=4, strategy=s, seed=i, epochs=e, censored=False)
        for s, own in times.items()
        for i, e in enumerate(own)
    ])
    found = reached_curves(runs).groupby("strategy")
    arrived = {s: [(a, round(3 * b)) for a, b in zip(g["at"], g.share)] for s, g in found}
    assert arrived == {"full": [(0, 0), (1, 1), (2, 2), (3, 3), (9, 3)], "scratch": [(0, 0), (2, 1), (5, 2), (9, 3)],
                       "probe": [(0, 1), (4, 3), (9, 3)]}
    assert {s: g.waiting.iloc[-1] for s, g in found if s != "scratch"} == {"full": 0, "probe": 0} and set(
        found.n_runs.first()
    ) == {3}
