"""Kernels by name and the median rule where it draws, against float64 written out."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics import pairwise
from vfm_notes.foundation.registry import VfmError
from vfm_notes.shift import mmd as module
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


def of_pairs(k, x, y):
    "The U-statistic over pairs of different cases."
    h = k(x, x) + k(y, y) - k(x, y) - k(x, y).T
    return h[~np.eye(len(x), dtype=bool)].mean()


# ---- every registered kernel ----

def test_kernels_with_a_formula_here(): assert set(FORMS) <= set(kernels)


@pytest.mark.parametrize("kernel", list(kernels))
def test_contract_of_a_kernel(kernel):
    card = kernels.card(kernel)
    assert card["form"] in ("distance", "product") and card["title"]
    t = -torch.rand(50, dtype=torch.float64) * 3
    new = kernels[kernel](t.clone())
    assert new.shape == t.shape and new.dtype == t.dtype and bool(torch.isfinite(new).all())
    if card["form"] == "distance":
        assert float(kernels[kernel](torch.zeros(1))) == 1 and bool(((new > 0) & (new < 1)).all())
    x, y = sets()
    z = np.concatenate([x, y])
    k = np.array([
        [
            float(kernels[kernel](torch.tensor(-0.5 * ((a - b) ** 2).sum() if card["form"] == "distance" else a @ b)))
            for b in z[::8]
        ]
        for a in z[::8]
    ])
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
    near = (
        {"abs": 1e-9}
        if kernel in WITH_SIGMA
        else {"rel": 1e-9, "abs": 1e-9}
        if not offset
        else {"rel": 1e-6, "abs": 1e-7}
    )
    options = given_sigma(kernel) | {"kernel": kernel}
    for unbiased in (True, False):
        assert mmd2(x, y, unbiased=unbiased, **options) == pytest.approx(written_out(k, x, y, unbiased), **near)
        assert mmd2(x, y[:77], unbiased=unbiased, **options) == pytest.approx(
            written_out(k, x, y[:77], unbiased), **near
        )
    assert mmd2_paired(x, y, **options) == pytest.approx(of_pairs(k, x, y), **near)
    t = two_sample_test(x, y, paired=True, permutations=2, **options)
    assert (t.mmd2, t.mmd2_paired) == pytest.approx(
        (mmd2(x, y, **options), mmd2_paired(x, y, **options)), rel=1e-8, abs=1e-11
    )


def test_parity_with_sklearn():
    x, y = sets(60, 50, 7)
    others = {
        "gaussian": lambda a, b: pairwise.rbf_kernel(a, b, gamma=1 / (2 * SIGMA**2)), "linear": pairwise.linear_kernel,
        "polynomial": pairwise.polynomial_kernel,
    }
    for kernel, k in others.items():
        assert mmd2(x, y, kernel=kernel, **given_sigma(kernel)) == pytest.approx(written_out(k, x, y), rel=1e-9)
    one, two = sets(60, 50, 1)  # of one feature both Laplace kernels are the same
    assert mmd2(one, two, kernel="laplace", bandwidth=2.0) == pytest.approx(
        written_out(lambda a, b: pairwise.laplacian_kernel(a, b, gamma=0.5), one, two), rel=1e-9
    )


@pytest.mark.parametrize("kernel", FORMS)
def test_p_value_of_a_kernel_written_out(kernel):
    x, y = sets(14, 11, 3, move=0.4)
    z, k = np.concatenate([x, y]), lambda a, b: FORMS[kernel](a, b, SIGMA)
    r = two_sample_test(x, y, paired=False, permutations=40, seed=3, kernel=kernel, **given_sigma(kernel))
    w = module.labellings(14, 11, False, 40, 3).numpy().astype(bool)
    values = np.array([written_out(k, z[u], z[~u]) for u in w.T])
    assert (
        values[0] == pytest.approx(r.mmd2, rel=1e-9)
        and r.p_value == (1 + (values[1:] >= values[0] - 1e-11 * abs(values).max()).sum()) / 41
    )


@pytest.mark.parametrize("kernel", FORMS)
def test_float32_and_many_points(kernel, monkeypatch):
    monkeypatch.setattr(module, "FLOAT64_POINTS", 0)
    x, y = (t.astype(np.float32) for t in sets(300, 200, 8))
    exact = written_out(lambda a, b: FORMS[kernel](a, b, SIGMA), x.astype(float), y.astype(float))
    assert mmd2(x, y, kernel=kernel, **given_sigma(kernel)) == pytest.approx(exact, rel=1e-5, abs=2e-8)


def test_own_mixture_and_wrong_names():
    x, y = sets()
    kernels("of_this_test", title="a narrow and a wide Gaussian", form="distance")(mixture(0.25, 4))
    try:
        assert mmd2(x, y, bandwidth=SIGMA, kernel="of_this_test") == pytest.approx(
            (mmd2(x, y, bandwidth=SIGMA / 4) + mmd2(x, y, bandwidth=SIGMA * 4)) / 2, rel=1e-9
        )
    finally: kernels._entries.pop("of_this_test"), kernels._cards.pop("of_this_test")
    with pytest.raises(VfmError, match="Did you mean 'laplace'"): mmd2(x, y, kernel="laplac")
    with pytest.raises(VfmError, match="linear kernel has none"): mmd2(x, y, kernel="linear", bandwidth=2.0)
    with pytest.raises(VfmError, match="40 rows and y has 30"): mmd2_paired(x, y[:30])


# ---- bandwidths ----

def test_the_median_rule_where_it_draws(monkeypatch):
    monkeypatch.setattr(module, "MEDIAN_EXACT", 500)
    monkeypatch.setattr(module, "MEDIAN_DRAWN", 300); monkeypatch.setattr(module, "FLOAT64_POINTS", 0)
    x, y = (t.astype(np.float32) for t in sets(700, 600, 16))
    drawn, exact = (
        two_sample_test(x, y, paired=False, permutations=1),
        np.sqrt(np.median(pdist(np.concatenate([x, y]).astype(float), "sqeuclidean")) / 2),
    )
    assert drawn.bandwidth_rule == "median of 300 of 1300 points" and 1e-6 < abs(drawn.bandwidth / exact - 1) < 0.02


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 14), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(sorted(FORMS)))
def test_laws(n, d, seed, kernel):
    x, y = sets(n, n, d, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    value = mmd2_paired(x, y, kernel=kernel)
    near = pytest.approx(value, rel=1e-9, abs=1e-10)
    assert mmd2_paired(y, x, kernel=kernel) == near and mmd2_paired(x[order], y[order], kernel=kernel) == near
    if not kernels.card(kernel).get("origin"):
        assert mmd2_paired(x + 7, y + 7, kernel=kernel) == pytest.approx(value, rel=1e-8, abs=1e-9)
    if kernel in WITH_SIGMA: assert mmd2_paired(3 * x, 3 * y, kernel=kernel) == near and value <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees():
    x, y = (torch.from_numpy(t) for t in sets(300, 300, 16))
    for kernel in kernels:
        assert mmd2_paired(x.cuda(), y.cuda(), kernel=kernel) == pytest.approx(
            mmd2_paired(x, y, kernel=kernel), rel=1e-9
        )


LARGE = """
import torch
from vfm_notes.shift.mmd import mmd2, mmd2_paired, two_sample_test
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
def everything(x, y):
    (
        mmd2(x, y), mmd2_paired(x, y, kernel="mixture"), two_sample_test(x, y, paired=True, permutations=20),
        two_sample_test(x, y, paired=False, permutations=20),
    )
x, y = torch.randn(4500, 8), torch.randn(4500, 8)
everything(x[:300], y[:300])
before = peak()
everything(x, y)
print(peak() - before)
"""


def test_many_points_need_no_table():
    "The table of 9000 points would be 309 MiB in float32, 618 in float64."
    done = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 150, done.stdout
