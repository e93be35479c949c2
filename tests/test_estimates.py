"""Kernels by name, intervals over cases, the streaming median and the screening estimates, against float64 written out."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics import pairwise
from vfm_notes.foundation.registry import VfmError
from vfm_notes.shift import mmd as module
from vfm_notes.shift.estimates import across_bandwidths, mmd2_interval, resamples, screen_linear_time, screen_random_features, streaming_median
from vfm_notes.shift.mmd import kernels, mixture, mmd2, mmd2_paired, two_sample_test

SIGMA = 2.3
FORMS = {  # independent formulas: numpy and scipy distances, never a product of norms
    "gaussian": lambda a, b, s: np.exp(-cdist(a, b, "sqeuclidean") / (2 * s**2)),
    "laplace": lambda a, b, s: np.exp(-cdist(a, b) / s),
    "linear": lambda a, b, s: np.einsum("if,jf->ij", a, b),
    "polynomial": lambda a, b, s: (np.einsum("if,jf->ij", a, b) / a.shape[1] + 1) ** 3,
    "mixture": lambda a, b, s: sum(np.exp(-cdist(a, b, "sqeuclidean") / (2 * (c * s) ** 2)) for c in (0.5, 1, 2)) / 3,
}
WITH_SIGMA = ["gaussian", "laplace", "mixture"]


def sets(n=40, m=40, d=5, offset=0.0, move=0.3, seed=0):
    r = np.random.default_rng(seed)
    return offset + r.normal(size=(n, d)), offset + move + r.normal(size=(m, d))


def given_sigma(kernel): return {"bandwidth": SIGMA} if kernels.card(kernel)["form"] == "distance" else {}
def written_out(k, x, y, unbiased=True):
    n, m, xx, yy, xy = len(x), len(y), k(x, x), k(y, y), k(x, y)
    if not unbiased: return xx.mean() + yy.mean() - 2 * xy.mean()
    return (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()


def of_pairs(k, x, y, w=None):
    "The U-statistic over pairs of different cases, each with its weight."
    w = np.ones(len(x)) if w is None else w
    h, ww = k(x, x) + k(y, y) - k(x, y) - k(x, y).T, np.outer(w, w)
    off = ~np.eye(len(x), dtype=bool)
    return (ww * h)[off].sum() / ww[off].sum()


# ---- every registered kernel ----

def test_kernels_with_a_formula_here(): assert set(FORMS) <= set(kernels)


@pytest.mark.parametrize("kernel", list(kernels))
def test_contract_of_a_kernel(kernel):
    card = kernels.card(kernel)
    assert card["form"] in ("distance", "product") and card["title"]
    t = -torch.rand(50, dtype=torch.float64) * 3
    new = kernels[kernel](t.clone())
    assert new.shape == t.shape and new.dtype == t.dtype and bool(torch.isfinite(new).all())
    if card["form"] == "distance": assert float(kernels[kernel](torch.zeros(1))) == 1 and bool(((new > 0) & (new < 1)).all())
    x, y = sets()
    z = np.concatenate([x, y])
    k = np.array([[float(kernels[kernel](torch.tensor(-0.5 * ((a - b) ** 2).sum() if card["form"] == "distance" else a @ b))) for b in z[::8]] for a in z[::8]])
    assert np.linalg.eigvalsh(k).min() > -1e-9 * np.abs(k).max()  # positive definite, or MMD² may be negative
    assert abs(mmd2(x, x, kernel=kernel, unbiased=False)) < 1e-10 and abs(mmd2_paired(x, x, kernel=kernel)) < 1e-10
    assert mmd2(x, y, kernel=kernel) == pytest.approx(mmd2(y, x, kernel=kernel), rel=1e-9)
    r = np.random.default_rng(1)
    assert mmd2(x, y, kernel=kernel) == pytest.approx(mmd2(r.permutation(x), r.permutation(y), kernel=kernel), rel=1e-9)
    assert mmd2(x, x[:20] + 3, kernel=kernel, unbiased=False) > 0
    t = two_sample_test(x, x + 0.3 + 0.1 * y, paired=True, permutations=99, kernel=kernel)
    assert t.p_value == 0.01 and t.kernel == kernel and card["title"] in t.estimator


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("kernel", FORMS)
def test_kernel_values_written_out(kernel, offset, monkeypatch):
    monkeypatch.setitem(module.TILE, "cpu", 64)
    x, y = sets(300, 300, 64, offset, 0.1)
    def k(a, b): return FORMS[kernel](a, b, SIGMA)
    near = {"abs": 1e-9} if kernel in WITH_SIGMA else {"rel": 1e-9, "abs": 1e-9} if not offset else {"rel": 1e-6, "abs": 1e-7}
    options = given_sigma(kernel) | {"kernel": kernel}
    for unbiased in (True, False):
        assert mmd2(x, y, unbiased=unbiased, **options) == pytest.approx(written_out(k, x, y, unbiased), **near)
        assert mmd2(x, y[:77], unbiased=unbiased, **options) == pytest.approx(written_out(k, x, y[:77], unbiased), **near)
    assert mmd2_paired(x, y, **options) == pytest.approx(of_pairs(k, x, y), **near)
    t = two_sample_test(x, y, paired=True, permutations=2, **options)
    assert (t.mmd2, t.mmd2_paired) == pytest.approx((mmd2(x, y, **options), mmd2_paired(x, y, **options)), rel=1e-8, abs=1e-11)


def test_parity_with_sklearn():
    x, y = sets(60, 50, 7)
    others = {"gaussian": lambda a, b: pairwise.rbf_kernel(a, b, gamma=1 / (2 * SIGMA**2)), "linear": pairwise.linear_kernel, "polynomial": pairwise.polynomial_kernel}
    for kernel, k in others.items(): assert mmd2(x, y, kernel=kernel, **given_sigma(kernel)) == pytest.approx(written_out(k, x, y), rel=1e-9)
    one, two = sets(60, 50, 1)  # of one feature both Laplace kernels are the same
    assert mmd2(one, two, kernel="laplace", bandwidth=2.0) == pytest.approx(written_out(lambda a, b: pairwise.laplacian_kernel(a, b, gamma=0.5), one, two), rel=1e-9)


@pytest.mark.parametrize("kernel", FORMS)
def test_p_value_of_a_kernel_written_out(kernel):
    x, y = sets(14, 11, 3, move=0.4)
    z, k = np.concatenate([x, y]), lambda a, b: FORMS[kernel](a, b, SIGMA)
    r = two_sample_test(x, y, paired=False, permutations=40, seed=3, kernel=kernel, **given_sigma(kernel))
    w = module.labellings(14, 11, False, 40, 3).numpy().astype(bool)
    values = np.array([written_out(k, z[u], z[~u]) for u in w.T])
    assert values[0] == pytest.approx(r.mmd2, rel=1e-9) and r.p_value == (1 + (values[1:] >= values[0] - 1e-11 * abs(values).max()).sum()) / 41


@pytest.mark.parametrize("kernel", FORMS)
def test_float32_and_many_points(kernel, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    x, y = (t.astype(np.float32) for t in sets(300, 200, 8))
    exact = written_out(lambda a, b: FORMS[kernel](a, b, SIGMA), x.astype(float), y.astype(float))
    assert mmd2(x, y, kernel=kernel, **given_sigma(kernel)) == pytest.approx(exact, rel=1e-5, abs=2e-8)


def test_own_mixture_and_wrong_names():
    x, y = sets()
    kernels("of_this_test", title="a narrow and a wide Gaussian", form="distance")(mixture(0.25, 4))
    try: assert mmd2(x, y, bandwidth=SIGMA, kernel="of_this_test") == pytest.approx((mmd2(x, y, bandwidth=SIGMA / 4) + mmd2(x, y, bandwidth=SIGMA * 4)) / 2, rel=1e-9)
    finally: kernels._entries.pop("of_this_test"), kernels._cards.pop("of_this_test")
    with pytest.raises(VfmError, match="Did you mean 'laplace'"): mmd2(x, y, kernel="laplac")
    with pytest.raises(VfmError, match="linear kernel has none"): mmd2(x, y, kernel="linear", bandwidth=2.0)
    with pytest.raises(VfmError, match="40 rows and y has 30"): mmd2_paired(x, y[:30])


# ---- intervals ----

@pytest.mark.parametrize("kernel", ["gaussian", "polynomial"])
def test_interval_written_out(kernel, monkeypatch):
    monkeypatch.setitem(module.TILE, "cpu", 7)
    x, y = sets(20, 20, 3)
    def k(a, b): return FORMS[kernel](a, b, SIGMA)
    r = mmd2_interval(x, y, paired=True, draws=30, level=0.8, seed=5, kernel=kernel, **given_sigma(kernel))
    w = [np.bincount(rows, minlength=20) for rows in resamples(20, 30, 5)]
    values = [of_pairs(k, x, y, u) for u in w]
    assert (r.low, r.high) == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])), rel=1e-9) and r.value == pytest.approx(of_pairs(k, x, y), rel=1e-9)
    assert r.shift == pytest.approx(np.mean(values) - r.value, abs=1e-9) and "pairs of cases" in r.method
    v = [np.bincount(rows, minlength=16) for rows in resamples(16, 30, 6)]
    y = y[:16]
    def mean(kk, a): off = np.outer(a, a) * (1 - np.eye(len(a))); return (off * kk).sum() / off.sum()
    values = [mean(k(x, x), a) + mean(k(y, y), b) - 2 * a @ k(x, y) @ b / (20 * 16) for a, b in zip(w, v)]
    r = mmd2_interval(x, y, paired=False, draws=30, level=0.8, seed=5, kernel=kernel, **given_sigma(kernel))
    assert (r.low, r.high) == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])), rel=1e-9) and r.value == pytest.approx(written_out(k, x, y), rel=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_interval_covers_where_the_sets_differ(paired):
    def make(n, r):
        x = r.normal(size=(n, 3))
        return (x, x + 0.5 + 0.8 * r.normal(size=(n, 3))) if paired else (x, 0.7 + r.normal(size=(n, 3)))
    r = np.random.default_rng(0)
    truth = np.mean([(mmd2_paired if paired else mmd2)(*make(1000, r), bandwidth=2.0) for _ in range(4)])
    found = [mmd2_interval(*make(40, r), paired=paired, bandwidth=2.0, draws=100, level=0.9, seed=i) for i in range(100)]
    assert 0.8 <= np.mean([i.low <= truth <= i.high for i in found]) <= 0.98


def test_interval_when_nothing_moved_is_wide_and_holds_zero():
    def one(i):
        r = np.random.default_rng(i)
        z = r.normal(size=(30, 3))
        return mmd2_interval(z + r.normal(size=(30, 3)), z + r.normal(size=(30, 3)), paired=True, bandwidth=2.0, draws=60, seed=i)
    found = [one(i) for i in range(60)]
    assert np.mean([i.low <= 0 <= i.high for i in found]) >= 0.93
    x, _ = sets()
    same = mmd2_interval(x, x, paired=True)
    assert max(abs(same.low), abs(same.high)) < 1e-12
    with pytest.raises(VfmError, match="at least 8"): mmd2_interval(x[:7], x[:7], paired=True)
    with pytest.raises(VfmError, match="draws is 5"): mmd2_interval(x, x, paired=True, draws=5)


# ---- bandwidths ----

@pytest.mark.parametrize("bins,few", [(4096, 10**6), (8, 20), (64, 300)])
@pytest.mark.parametrize("grid", [False, True])
def test_streaming_median_is_the_median(bins, few, grid, monkeypatch):
    monkeypatch.setitem(module.TILE, "cpu", 33)
    x, y = sets(90, 71, 4)
    if grid: x, y = x.round(), y.round()  # many equal distances
    exact = np.sqrt(np.median(pdist(np.concatenate([x, y]), "sqeuclidean")) / 2)
    assert streaming_median(x, y, bins, few) == pytest.approx(exact, rel=1e-9)


def test_streaming_median_where_the_rule_draws(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 500); monkeypatch.setattr(module, "DRAWN", 300); monkeypatch.setattr(module, "SMALL", 0)
    x, y = (t.astype(np.float32) for t in sets(700, 600, 16))
    drawn, exact = two_sample_test(x, y, paired=False, permutations=1), np.sqrt(np.median(pdist(np.concatenate([x, y]).astype(float), "sqeuclidean")) / 2)
    assert drawn.bandwidth_rule == "median of 300 of 1300 points" and 1e-6 < abs(drawn.bandwidth / exact - 1) < 0.02
    assert streaming_median(x, y) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(VfmError, match="bandwidth is 0"): streaming_median(np.ones((9, 2)), np.ones((9, 2)))


def test_across_bandwidths():
    x, y = sets()
    t = across_bandwidths(x, y, paired=True, permutations=49, multiples=(0.5, 1))
    assert t.bandwidth[0] == pytest.approx(t.bandwidth[1] / 2) and t.mmd2[1] == pytest.approx(mmd2_paired(x, y)) and t.p_value.between(0.02, 1).all()
    assert across_bandwidths(x, y[:30], paired=False, permutations=9).mmd2[1] == pytest.approx(mmd2(x, y[:30]))


# ---- screening ----

@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("n,m", [(31, 31), (24, 31)])
def test_linear_time_written_out(kernel, n, m):
    x, y = sets(n, m, 4)
    r = np.random.default_rng(7)
    i = r.permutation(n)
    j = i if n == m else r.permutation(m)
    half, h = min(n, m) // 2, []
    for a in range(half):
        b = a + half
        k = FORMS[kernel](np.stack([x[i[a]], x[i[b]], y[j[a]], y[j[b]]]), np.stack([x[i[a]], x[i[b]], y[j[a]], y[j[b]]]), SIGMA)
        h.append(k[0, 1] + k[2, 3] - k[0, 3] - k[1, 2])
    s = screen_linear_time(x, y, kernel=kernel, seed=7, **given_sigma(kernel))
    assert s.mmd2 == pytest.approx(np.mean(h), rel=1e-9) and s.standard_error == pytest.approx(stats.sem(h), rel=1e-9)
    assert s.p_value == pytest.approx(stats.norm.sf(np.mean(h) / stats.sem(h)), rel=1e-6) and s.estimator.startswith("screening: linear-time")


def test_linear_time_is_unbiased_and_keeps_its_level():
    def one(i, move=0.0, rho=0.0):
        r = np.random.default_rng(i)
        x = r.normal(size=(200, 3))
        return screen_linear_time(x, rho * x + (1 - rho**2) ** 0.5 * r.normal(size=(200, 3)) + move, bandwidth=2.0, seed=i)
    for rho in (0.0, 0.8): assert 0.01 <= np.mean([one(i, rho=rho).p_value <= 0.05 for i in range(300)]) <= 0.1  # also for pairs
    values = [one(i, 0.5).mmd2 for i in range(300)]
    r = np.random.default_rng(0)
    assert abs(np.mean(values) - mmd2(r.normal(size=(3000, 3)), r.normal(size=(3000, 3)) + 0.5, bandwidth=2.0)) < 4 * np.std(values) / 300**0.5 + 2e-3
    with pytest.raises(VfmError, match="at least 4"): screen_linear_time(*sets(3, 9))


@pytest.mark.parametrize("paired", [False, True])
def test_random_features_close_in_on_the_statistic(paired):
    x, y = sets(60, 60, 6)
    full = (mmd2_paired if paired else mmd2)(x, y, bandwidth=SIGMA)
    few, many = (np.array([(s.mmd2 - full, s.standard_error) for i in range(20) for s in [screen_random_features(x, y, paired=paired, bandwidth=SIGMA, frequencies=d, seed=i)]]) for d in (64, 4096))
    assert np.abs(many[:, 0]).mean() < np.abs(few[:, 0]).mean() / 4
    for errors in (few, many): assert (np.abs(errors[:, 0]) < 3.5 * errors[:, 1]).all() and np.std(errors[:, 0]) == pytest.approx(errors[:, 1].mean(), rel=0.5)
    assert screen_random_features(x, y, bandwidth=SIGMA).estimator.startswith("screening: random")
    with pytest.raises(VfmError, match="frequencies is 1"): screen_random_features(x, y, frequencies=1)


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 14), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(sorted(FORMS)))
def test_laws(n, d, seed, kernel):
    x, y = sets(n, n, d, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    value = mmd2_paired(x, y, kernel=kernel)
    near = pytest.approx(value, rel=1e-9, abs=1e-10)
    assert mmd2_paired(y, x, kernel=kernel) == near and mmd2_paired(x[order], y[order], kernel=kernel) == near
    if not kernels.card(kernel).get("origin"): assert mmd2_paired(x + 7, y + 7, kernel=kernel) == pytest.approx(value, rel=1e-8, abs=1e-9)
    if kernel in WITH_SIGMA: assert mmd2_paired(3 * x, 3 * y, kernel=kernel) == near and value <= 2
    r = mmd2_interval(x, y, paired=True, kernel=kernel, draws=20)
    assert r.value == near and np.isfinite([r.low, r.high]).all() and r.low <= r.high


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees():
    x, y = (torch.from_numpy(t) for t in sets(300, 300, 16))
    for kernel in kernels: assert mmd2_paired(x.cuda(), y.cuda(), kernel=kernel) == pytest.approx(mmd2_paired(x, y, kernel=kernel), rel=1e-9)
    assert mmd2_interval(x.cuda(), y.cuda(), paired=True, draws=50).low == pytest.approx(mmd2_interval(x, y, paired=True, draws=50).low, rel=1e-9)
    assert screen_random_features(x.cuda(), y.cuda()).mmd2 == pytest.approx(screen_random_features(x, y).mmd2, rel=1e-6)


LARGE = """
import torch
from vfm_notes.shift.estimates import mmd2_interval, screen_random_features, streaming_median
from vfm_notes.shift.mmd import mmd2, mmd2_paired, two_sample_test
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
def everything(x, y):
    mmd2(x, y), mmd2_paired(x, y, kernel="mixture"), two_sample_test(x, y, paired=True, permutations=20), two_sample_test(x, y, paired=False, permutations=20)
    mmd2_interval(x, y, paired=True, draws=20), screen_random_features(x, y), streaming_median(x, y)
x, y = torch.randn(4500, 8), torch.randn(4500, 8)
everything(x[:300], y[:300])
before = peak()
everything(x, y)
print(peak() - before)
"""


def test_many_points_need_no_table():
    "The table of 9000 points would be 309 MiB in float32, 618 in float64."
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 150, done.stdout
