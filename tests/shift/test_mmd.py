"""MMD against its equation written out, against another library, and against what a test must do."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import rbf_kernel
from vfm_notes.foundation.registry import VfmError, divergences
from vfm_notes.shift import mmd as module
from vfm_notes.shift.mmd import mmd2, two_sample_test


def brute(x, y, sigma, unbiased=True, pairs=True):
    "The equation with explicit differences, float64, no tiles."
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    def k(a, b): return np.exp(-np.stack([((r - b) ** 2).sum(1) for r in a]) / (2 * sigma**2))
    xx, yy, xy = k(x, x), k(y, y), k(x, y)
    if not pairs: return (xx.sum() - n + yy.sum() - n - 2 * (xy.sum() - np.trace(xy))) / (n * (n - 1))
    if not unbiased: return xx.mean() + yy.mean() - 2 * xy.mean()
    return (xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1)) - 2 * xy.mean()


def sets(n=300, m=300, d=64, offset=0.0, move=0.1, seed=0):
    r = np.random.default_rng(seed)
    return offset + r.normal(size=(n, d)), offset + move + r.normal(size=(m, d))


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("tile", [64, 100, 1024])
def test_value_against_brute_force(offset, unbiased, tile, monkeypatch):
    monkeypatch.setitem(module.TILE, "cpu", tile)
    x, y = sets(offset=offset)
    sigma = np.sqrt(np.median(pdist(np.concatenate([x, y])) ** 2) / 2)
    assert mmd2(x, y, unbiased=unbiased) == pytest.approx(brute(x, y, sigma, unbiased), abs=1e-9)
    assert mmd2(x, y, bandwidth=5.0, unbiased=unbiased) == pytest.approx(brute(x, y, 5.0, unbiased), abs=1e-9)
    assert mmd2(x, y[:77], bandwidth=5.0, unbiased=unbiased) == pytest.approx(brute(x, y[:77], 5.0, unbiased), abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_keeps_the_small_differences(offset, monkeypatch):
    monkeypatch.setattr(module, "FLOAT64_POINTS", 0)
    x, y = (a.astype(np.float32) for a in sets(700, 600, offset=offset, move=0.02))
    exact = brute(x, y, 8.0)
    assert mmd2(x, y, bandwidth=8.0) == pytest.approx(exact, abs=2e-9)
    r32 = two_sample_test(x, y, paired=False, permutations=200, bandwidth=8.0)
    r64 = two_sample_test(x.astype(np.float64), y.astype(np.float64), paired=False, permutations=200, bandwidth=8.0)
    assert r32.mmd2 == pytest.approx(exact, abs=5e-9) and abs(r32.p_value - r64.p_value) <= 1 / 201


def test_the_result_says_what_was_done():
    x, y = sets(40, 30, 5)
    r = two_sample_test(x, y, paired=False, permutations=50)
    sigma = np.sqrt(np.median(pdist(np.concatenate([x, y])) ** 2) / 2)
    assert (r.n, r.m, r.paired, r.permutations) == (40, 30, False, 50)
    assert r.bandwidth == pytest.approx(sigma, rel=1e-12) and r.bandwidth_rule == "median, exact"
    assert r.mmd2 == pytest.approx(mmd2(x, y), abs=1e-12)
    assert two_sample_test(x, y, paired=False, permutations=50, bandwidth=2).bandwidth_rule == "given"


def test_subsampled_median_is_said_and_close(monkeypatch):
    monkeypatch.setattr(module, "MEDIAN_EXACT", 500)
    monkeypatch.setattr(module, "MEDIAN_DRAWN", 400)
    x, y = sets(400, 400, 16)
    r = two_sample_test(x, y, paired=False, permutations=1)
    assert r.bandwidth_rule == "median of 400 of 800 points"
    assert r.bandwidth == pytest.approx(np.sqrt(np.median(pdist(np.concatenate([x, y])) ** 2) / 2), rel=0.01)


def test_parity_with_sklearn():
    x, y = sets(120, 90, 10)
    sigma = 2.5
    xx, yy, xy = (rbf_kernel(a, b, gamma=1 / (2 * sigma**2)) for a, b in ((x, x), (y, y), (x, y)))
    value = (xx.sum() - np.trace(xx)) / (120 * 119) + (yy.sum() - np.trace(yy)) / (90 * 89) - 2 * xy.mean()
    assert mmd2(x, y, bandwidth=sigma) == pytest.approx(value, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_laws(n, m, d, seed):
    x, y = sets(n, m, d, seed=seed)
    r = np.random.default_rng(seed)
    value = mmd2(x, y, bandwidth=1.5)
    assert value == pytest.approx(mmd2(y, x, bandwidth=1.5), abs=1e-12)
    assert value == pytest.approx(mmd2(r.permutation(x), r.permutation(y), bandwidth=1.5), abs=1e-12)
    assert value == pytest.approx(mmd2(x + 7, y + 7, bandwidth=1.5), abs=1e-10)
    assert mmd2(x, y) == pytest.approx(mmd2(3 * x, 3 * y), abs=1e-10)
    assert mmd2(x, y, unbiased=False) >= -1e-12 and value <= 2
    assert mmd2(x, x, bandwidth=1.5, unbiased=False) == pytest.approx(0, abs=1e-12)


def test_kinds_of_input():
    x, y = sets(20, 20, 4)
    value = mmd2(x, y, bandwidth=2)
    assert mmd2(torch.from_numpy(x), y, bandwidth=2) == pytest.approx(value, abs=1e-14)
    assert mmd2(torch.from_numpy(x).float().requires_grad_(), y.astype(np.float32), bandwidth=2) == pytest.approx(
        value, abs=1e-6
    )
    assert mmd2((10 * x).astype(int), (10 * y).astype(np.int32), bandwidth=20) == pytest.approx(
        brute((10 * x).astype(int), (10 * y).astype(int), 20), abs=1e-12
    )
    x.flags.writeable = False
    assert mmd2(x, y, bandwidth=2) == pytest.approx(value, abs=1e-14)


def test_permuted_values_against_brute_force(monkeypatch):
    "Every re-labelling's value and the p-value, one by one."
    monkeypatch.setitem(module.TILE, "cpu", 7)
    x, y = sets(14, 11, 3, move=0.4)
    z = np.concatenate([x, y])
    r = two_sample_test(x, y, paired=False, permutations=60, bandwidth=1.7, seed=3)
    w = module.labellings(14, 11, False, 60, 3).numpy().astype(bool)
    values = np.array([brute(z[u], z[~u], 1.7) for u in w.T])
    assert values[0] == pytest.approx(r.mmd2, abs=1e-12)
    assert r.p_value == (1 + (values[1:] >= values[0] - 1e-12).sum()) / 61


def test_paired_values_against_brute_force():
    x, y = sets(16, 16, 3, move=0.3)
    r = two_sample_test(x, y, paired=True, permutations=60, bandwidth=1.7, seed=3)
    w = module.labellings(16, 16, True, 60, 3).numpy()[:16].astype(bool)
    for pairs in (True, False):
        values = np.array([
            brute(np.where(s[:, None], x, y), np.where(s[:, None], y, x), 1.7, pairs=pairs) for s in w.T
        ])
        assert values[0] == pytest.approx(r.mmd2 if pairs else r.mmd2_paired, abs=1e-12)
        assert r.p_value == (1 + (values[1:] >= values[0] - 1e-12).sum()) / 61


@pytest.mark.parametrize("n,m,paired,kinds", [(3, 3, False, 20), (2, 4, False, 15), (4, 1, False, 5), (3, 3, True, 8)])
def test_labellings_are_uniform(n, m, paired, kinds):
    "Each split of the points into n and m, each swap of the pairs, equally often."
    w = module.labellings(n, m, paired, 4000, 1).numpy()[:, 1:]
    count = np.unique(w, axis=1, return_counts=True)[1]
    assert (w.sum(0) == n).all() and len(count) == kinds and stats.chisquare(count).pvalue > 1e-3


@pytest.mark.parametrize("paired", [False, True])
def test_null_p_values_are_uniform(paired):
    def one(i):
        r = np.random.default_rng(i)
        return two_sample_test(
            r.normal(size=(20, 4)), r.normal(size=(20, 4)), paired=paired, permutations=99, seed=i
        ).p_value
    p = np.array([one(i) for i in range(400)])
    assert p.min() >= 0.01 and stats.kstest(p - np.random.default_rng(0).uniform(0, 0.01, 400), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "rho,move,low,high,pooled_high",
    [(0.5, 0.0, 0.0, 0.12, 0.02), (0.9, 0.0, 0.0, 0.12, 0.0), (0.5, 0.3, 0.4, 0.8, 0.05), (0.9, 0.3, 0.95, 1.0, 0.0)],
)
def test_paired_level_and_power(rho, move, low, high, pooled_high):
    "Cases that resemble themselves: swaps keep the level and find the move, the pooled permutation does neither."
    def reject(i, paired):
        r = np.random.default_rng(i)
        x, e = r.normal(size=(200, 32)), r.normal(size=(200, 32))
        y = rho * x + np.sqrt(1 - rho**2) * e + move / np.sqrt(32)
        return two_sample_test(x, y, paired=paired, permutations=199, seed=i, bandwidth=5.6).p_value <= 0.05
    swaps = np.mean([reject(i, True) for i in range(60)])
    pooled = np.mean([reject(i, False) for i in range(30)])
    assert low <= swaps <= high and pooled <= pooled_high


def test_p_is_never_zero_and_repeats():
    x, y = sets(30, 30, 4, move=5.0)
    for paired in (False, True):
        r = two_sample_test(x, y, paired=paired, permutations=99)
        assert r.p_value == 0.01
        assert r.p_value == two_sample_test(x, y, paired=paired, permutations=99).p_value
    a = {two_sample_test(*sets(30, 30, 4, move=0.2), paired=False, permutations=99, seed=s).p_value for s in range(6)}
    assert len(a) > 1


def test_nothing_moved():
    x, _ = sets(24, 24, 128)
    r = two_sample_test(x, x.copy(), paired=True)
    assert r.p_value == 1 and r.mmd2_paired == pytest.approx(0, abs=1e-12) and r.mmd2 < 0


@pytest.mark.parametrize("x,y,options,words", [
    (np.zeros((1, 3)), np.zeros((5, 3)), {}, "at least 2"),
    (np.random.rand(5, 3), np.random.rand(4, 3), {"paired": True}, "x has 5 rows and y has 4"),
    (np.array([[0.0, np.nan], [1, 2]]), np.random.rand(4, 2), {}, "x has 1 value(s) that are NaN"),
    (np.random.rand(4, 2), np.array([[0.0, np.inf], [1, 2]]), {}, "y has 1 value(s) that are NaN"),
    (np.full((6, 3), 4.2), np.full((6, 3), 4.2), {}, "bandwidth is 0"),
    (np.full((6, 3), 0.1, np.float32), np.full((6, 3), 0.1, np.float32), {}, "bandwidth is 0"),
    (np.random.rand(5, 3), np.random.rand(5, 4), {}, "3 features and y has 4"),
    (np.random.rand(5), np.random.rand(5, 4), {}, "shape (5,)"),
    (np.random.rand(5, 3), np.random.rand(5, 3), {"bandwidth": -1}, "bandwidth is -1"),
    (np.random.rand(5, 3), np.random.rand(5, 3), {"bandwidth": "mean"}, "'median'"),
    (np.random.rand(5, 3), np.random.rand(5, 3), {"permutations": 0}, "permutations is 0"),
])
def test_bad_input(x, y, options, words):
    with pytest.raises(VfmError) as e: two_sample_test(x, y, **{"paired": False, "permutations": 9, **options})
    assert words in str(e.value) and str(e.value).count(". ") == 0


def test_registered(): assert divergences["mmd2"] is mmd2
