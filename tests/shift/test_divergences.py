"""Divergences against other ways to compute them, and one contract for the whole registry."""
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import linalg, spatial, stats
from vfm_notes.foundation.registry import VfmError, divergences
from vfm_notes.shift import divergences as module, mmd  # mmd registers mmd2
from vfm_notes.shift.mmd import mmd2_paired
from vfm_notes.shift.divergences import (
    cka_linear, cka_rbf, coral, cosine_drift, energy, frechet, mean_shift, paired_interval, procrustes,
    sliced_wasserstein,
)
from vfm_notes.shift.mmd import resamples

NAMES = [
    "mmd2", "mean_shift", "coral", "frechet", "energy", "sliced_wasserstein", "mmd2_paired", "cosine_drift",
    "procrustes", "cka_linear", "cka_rbf",
]
PAIRED = {"mmd2_paired", "cosine_drift", "procrustes", "cka_linear", "cka_rbf"}


def card(name):
    return {"paired": False, "rotation": "same", "least": -np.inf, "symmetric": True} | divergences.card(name)
def sets(n=50, m=50, f=6, g=None, offset=0.0, seed=0):
    r = np.random.default_rng(seed)
    x = r.normal(size=(n, f)) @ r.normal(size=(f, f))
    y = x @ r.normal(size=(f, g or f)) + r.normal(size=(n, g or f)) if n == m else r.normal(size=(m, g or f)) + 0.4
    return x + offset, y + offset


def rotation(f, seed=1): return np.linalg.qr(np.random.default_rng(seed).normal(size=(f, f)))[0]


# ---- the contract: every entry of the registry, whoever registered it ----

def test_registry_is_full(): assert set(NAMES) <= set(divergences)


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name):
    c = divergences.card(name)
    assert all(isinstance(c[k], str) and c[k] for k in ("title", "zero", "cost"))
    if name != "mmd2": assert c["rotation"] in ("each", "same", "none") and c["paired"] == (name in PAIRED)
    assert c.get("least") == (None if name.startswith("mmd2") else 0)


@pytest.mark.parametrize("shape", [(4, 4, 3), (30, 30, 6), (12, 12, 40), (9, 9, 1)])
@pytest.mark.parametrize("name", list(divergences))
def test_finite_symmetric_and_not_below_its_least(name, shape):
    x, y = sets(*shape)
    value = divergences[name](x, y)
    assert isinstance(value, float) and np.isfinite(value) and value >= card(name)["least"]
    if card(name)["symmetric"]: assert divergences[name](y, x) == pytest.approx(value, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(50, 50, 6), (12, 12, 40), (600, 600, 3)])
@pytest.mark.parametrize("name", list(divergences))
def test_zero_on_equal_sets(name, shape, offset):
    x, _ = sets(*shape, offset=offset)
    options = {"unbiased": False} if name == "mmd2" else {}
    assert abs(divergences[name](x, x.copy(), **options)) < 1e-9
    if not card(name)["paired"]:  # the sets are equal in any order
        assert abs(divergences[name](x, x[::-1], **options)) < 1e-9


def test_unbiased_mmd2_is_zero_on_average():
    r = np.random.default_rng(0)
    values = [divergences["mmd2"](r.normal(size=(20, 3)), r.normal(size=(20, 3))) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5


@pytest.mark.parametrize("name", list(divergences))
def test_order_of_cases_does_not_matter(name):
    x, y = sets()
    i, j = np.random.default_rng(3).permutation(50), np.random.default_rng(4).permutation(50)
    value = divergences[name](x, y)
    assert divergences[name](x[i], y[i]) == pytest.approx(value, rel=1e-10, abs=1e-13)
    apart = divergences[name](x, y[j])
    # pairs matter just where the card says so
    assert (apart == pytest.approx(value, rel=1e-10, abs=1e-13)) != card(name)["paired"]


@pytest.mark.parametrize("name", list(divergences))
def test_grows_with_a_push(name):
    r = np.random.default_rng(2)
    x, noise = r.normal(size=(80, 5)), 0.5 + r.normal(size=(80, 5))
    values = [divergences[name](x, x + s * noise) for s in (0.1, 0.3, 0.6, 1.0, 2.0)]
    assert (np.diff(values) > 0).all(), values


@pytest.mark.parametrize("name", list(divergences))
def test_rotation(name):
    x, y = sets()
    value, q, p = divergences[name](x, y), rotation(6), rotation(6, 2)
    near = pytest.approx(value, rel=1e-9, abs=1e-12)
    both, each = divergences[name](x @ q, y @ q), divergences[name](x @ q, y @ p)
    assert (both == near) == (card(name)["rotation"] != "none")
    assert (each == near) == (card(name)["rotation"] == "each")


@pytest.mark.parametrize("name", list(divergences))
def test_kinds_of_input(name):
    x, y = sets()
    value = divergences[name](x, y)
    x32, y32 = torch.tensor(x, dtype=torch.float32, requires_grad=True), torch.tensor(y, dtype=torch.float32)
    assert divergences[name](torch.tensor(x), torch.tensor(y)) == value  # nothing is lost in float64
    assert divergences[name](x32, y32) == pytest.approx(value, rel=1e-4, abs=1e-6) and divergences[name](
        x32, y
    ) == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert np.isfinite(divergences[name](np.arange(24).reshape(8, 3) % 7, np.arange(24).reshape(8, 3) % 5))
    before = x.copy(), y.copy()
    divergences[name](x, y)
    assert (x == before[0]).all() and (y == before[1]).all()  # the tables are not touched


@pytest.mark.parametrize("name", list(divergences))
def test_bad_input_is_named(name):
    x, y = sets()
    nan = y.copy(); nan[3, 2] = np.nan
    for a, b, word in [(x, nan, "y has 1 value"), (x[:1], y[:1], "1 case"), (x[0], y, "shape (6,)")]:
        with pytest.raises(VfmError) as e: divergences[name](a, b)
        assert word in str(e.value)
    if card(name)["paired"]:
        with pytest.raises(VfmError, match="50 rows and y has 40"): divergences[name](x, y[:40])
    else: assert np.isfinite(divergences[name](x, y[:40]))
    if card(name)["rotation"] == "each": assert np.isfinite(divergences[name](x, y[:, :4]))  # layers of different width
    else:
        with pytest.raises(VfmError, match="same layer"): divergences[name](x, y[:, :4])


@pytest.mark.parametrize(
    "bad, word",
    [
        (procrustes, "constant features"), (cka_linear, "constant features"), (cka_rbf, "constant features"),
        (cosine_drift, "only zeros"),
    ],
)
def test_features_that_say_nothing(bad, word):
    x, y = sets()
    for flat in (np.zeros_like(y), np.full_like(y, 0.1 if bad is not cosine_drift else 0.0)):
        with pytest.raises(VfmError, match=word): bad(x, flat)


# ---- values against something independent ----

def test_mean_shift_and_coral_by_numpy():
    x, y = sets(40, 30)
    assert mean_shift(x, y) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-12)
    assert coral(x, y) == pytest.approx(np.linalg.norm(np.cov(x.T) - np.cov(y.T)) ** 2 / (4 * 36), rel=1e-12)


@pytest.mark.parametrize("n, m, f", [(60, 45, 5), (40, 40, 12), (10, 14, 25), (7, 60, 20)])
def test_frechet_by_a_matrix_square_root(n, m, f):
    x, y = sets(n, m, f)
    c, d = np.cov(x.T), np.cov(y.T)
    half = linalg.sqrtm(c + 1e-13 * np.eye(f)).real  # the symmetric form: square root of C^½ D C^½
    root = np.sqrt(np.clip(linalg.eigvalsh(half @ d @ half), 0, None)).sum()
    value = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * root
    assert frechet(x, y) == pytest.approx(value, rel=1e-5)
    if min(n, m) > f:
        value = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
        assert frechet(x, y) == pytest.approx(value, rel=1e-9)


def test_energy_by_scipy_and_by_loops(monkeypatch):
    r = np.random.default_rng(0)
    u, v = r.normal(size=(40, 1)), r.gamma(2, size=(25, 1))
    assert energy(u, v) == pytest.approx(stats.energy_distance(u[:, 0], v[:, 0]) ** 2, rel=1e-10)
    x, y = sets(31, 22, 4)
    def mean(a, b): return np.mean([[np.linalg.norm(i - j) for j in b] for i in a])
    loops = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    assert energy(x, y) == pytest.approx(loops, rel=1e-10)
    monkeypatch.setattr(module, "ROWS", 7)
    assert energy(x, y) == pytest.approx(loops, rel=1e-10)


def test_sliced_wasserstein_by_scipy():
    r = np.random.default_rng(0)
    u, v = r.normal(size=(40, 1)).round(1), r.gamma(2, size=(25, 1)).round(1)  # with ties
    assert sliced_wasserstein(u, v) == pytest.approx(stats.wasserstein_distance(u[:, 0], v[:, 0]), rel=1e-12)
    x, y = sets(31, 22, 4)
    theta = torch.randn(70, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    theta /= np.linalg.norm(theta, axis=1, keepdims=True)
    slices = [stats.wasserstein_distance(x @ t, y @ t) for t in theta]
    assert sliced_wasserstein(x, y, directions=70, seed=5) == pytest.approx(np.mean(slices), rel=1e-10)
    assert sliced_wasserstein(x, y, seed=1) == sliced_wasserstein(x, y, seed=1) != sliced_wasserstein(x, y, seed=2)
    # E|θ₁| on the 3-sphere is 4/(3π)
    assert sliced_wasserstein(x, x + [3, 0, 0, 0], directions=4000) == pytest.approx(3 * 0.42441, rel=0.03)
    with pytest.raises(VfmError, match="directions is 0"): sliced_wasserstein(x, y, directions=0)


def test_mmd_of_pairs_by_the_equation():
    x, y = sets(20, 20, 4)
    def k(a, b): return np.exp(-spatial.distance.cdist(a, b, "sqeuclidean") / (2 * 3.0**2))
    h = k(x, x) + k(y, y) - k(x, y) - k(x, y).T  # Gretton et al. 2012, equation 4
    assert mmd2_paired(x, y, bandwidth=3.0) == pytest.approx((h.sum() - np.trace(h)) / (20 * 19), rel=1e-9)


def test_cosine_drift_by_scipy():
    x, y = sets()
    assert cosine_drift(x, y) == pytest.approx(
        np.mean([spatial.distance.cosine(a, b) for a, b in zip(x, y)]), rel=1e-10
    )
    assert cosine_drift(x, -x) == pytest.approx(2) and cosine_drift(x, 3 * x) < 1e-15


@pytest.mark.parametrize("n, f", [(50, 6), (12, 30)])
def test_procrustes_by_scipy(n, f):
    x, y = sets(n, n, f)
    a, b = (t - t.mean(0) for t in (x, y))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    q, s = linalg.orthogonal_procrustes(a, b)
    assert (
        procrustes(x, y)
        == pytest.approx(np.linalg.norm(a @ q - b) ** 2, rel=1e-9)
        == pytest.approx(2 - 2 * s, rel=1e-9)
    )
    # with the best scale
    assert 1 - (1 - procrustes(x, y) / 2) ** 2 == pytest.approx(spatial.procrustes(x, y)[2], rel=1e-9)


def hsic_by_loops(k, l):
    "Song et al. 2012, equation 5, sum by sum."
    n, trace, ks, ls, klsum = len(k), 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        for j in range(n):
            if i == j: continue
            trace, ks, ls = trace + k[i, j] * l[j, i], ks + k[i, j], ls + l[i, j]
            klsum += sum(k[i, j] * l[j, h] for h in range(n) if h != j)
    return (trace + ks * ls / ((n - 1) * (n - 2)) - 2 / (n - 2) * klsum) / (n * (n - 3))


def kernels(x, rbf):
    if not rbf: return x @ x.T
    d = spatial.distance.pdist(x, "sqeuclidean")
    return np.exp(-spatial.distance.squareform(d) / np.median(d))  # 2σ² = the median of the squared distances


@pytest.mark.parametrize("tile", [512, 5])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("rbf", [False, True])
def test_cka_by_loops(rbf, offset, tile, monkeypatch):
    monkeypatch.setattr(module, "ROWS", tile)
    x, y = sets(13, 13, 4, g=7, offset=offset)
    k, l = kernels(x - x.mean(0), rbf), kernels(y - y.mean(0), rbf)
    value = 1 - hsic_by_loops(k, l) / np.sqrt(hsic_by_loops(k, k) * hsic_by_loops(l, l))
    assert (cka_rbf if rbf else cka_linear)(x, y) == pytest.approx(value, rel=1e-9)


def test_hsic1_is_the_mean_over_all_ordered_fours():
    x, y = sets(6, 6, 3)
    k, l = kernels(x, True), kernels(y, True)
    fours = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(6), 4)]
    k0, l0 = (torch.tensor(t - np.diag(np.diag(t))) for t in (k, l))
    assert (
        module.hsic1(float((k0 * l0).sum()), k0.sum(1), l0.sum(1))
        == pytest.approx(np.mean(fours), rel=1e-10)
        == pytest.approx(hsic_by_loops(k, l), rel=1e-10)
    )


@pytest.mark.parametrize("cka", [cka_linear, cka_rbf])
def test_cka_of_unrelated_tables_is_not_alignment(cka):
    r = np.random.default_rng(0)
    values = [cka(r.normal(size=(16, 200)), r.normal(size=(16, 200))) for _ in range(60)]
    assert abs(np.mean(values) - 1) < 4 * np.std(values) / 60**0.5
    with pytest.raises(VfmError, match="at least 4"): cka(*sets(3, 3))


# ---- intervals ----

@pytest.mark.parametrize("name", list(divergences))
def test_interval_holds_its_value_and_repeats(name):
    x, y = sets(24, 24, 4)
    r = paired_interval(name, x, y, draws=40, seed=3)
    assert r.low <= r.value <= r.high and r.value == divergences[name](x, y) and (r.n, r.draws, r.seed) == (24, 40, 3)
    assert (
        r
        == paired_interval(name, torch.tensor(x), y, draws=40, seed=3)
        != paired_interval(name, x, y, draws=40, seed=4)
    )
    narrow = paired_interval(name, x, y, draws=40, level=0.5, seed=3)
    assert narrow.high - narrow.low < r.high - r.low


def test_interval_of_a_mean_by_scipy():
    x, y = sets(60, 60)
    each = np.array([spatial.distance.cosine(a, b) for a, b in zip(x, y)])
    r = paired_interval("cosine_drift", x, y, draws=2000)
    other = stats.bootstrap((each,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert (r.low, r.high) == pytest.approx(tuple(other), abs=0.1 * (other.high - other.low)) and abs(r.shift) < 0.02


def test_interval_resamples_the_same_cases_in_both_tables():
    x, _ = sets(20, 20)
    for name in ("mean_shift", "energy", "sliced_wasserstein", "frechet", "cosine_drift", "mmd2_paired"):
        assert paired_interval(name, x, x, draws=30).high < 1e-12
    # every case moved alike: no scatter
    assert paired_interval("mean_shift", x, x + 1, draws=30).high == pytest.approx(6**0.5)


@pytest.mark.parametrize("name", ["cosine_drift", "cka_linear", "mean_shift", "mmd2_paired"])
def test_interval_covers(name):
    def make(n, r): x = r.normal(size=(n, 3)) * [2, 1, 1]; return x, x + 0.5 + 0.6 * r.normal(size=(n, 3))
    r = np.random.default_rng(0)
    truth = divergences[name](*make(2000, r))
    found = [paired_interval(name, *make(40, r), draws=60, level=0.9, seed=i) for i in range(60)]
    assert np.mean([i.low <= truth <= i.high for i in found]) > 0.75


def test_resamples_are_whole_enough():
    rows = resamples(8, 2000)
    assert rows.shape == (2000, 8) and min(len(set(r)) for r in rows.tolist()) >= 4 and abs(rows.mean() - 3.5) < 0.1


def test_interval_refuses_what_it_cannot_do():
    x, y = sets()
    for args, word in [
        ((x, y[:40]), "50 rows and y has 40"), ((x[:7], y[:7]), "at least 8"), ((x, y, 5), "draws is 5"),
        ((x, y, 50, 1.0), "level is 1.0"),
    ]:
        with pytest.raises(VfmError, match=word): paired_interval("energy", *args)
    with pytest.raises(VfmError, match="Did you mean 'frechet'"): paired_interval("frechett", x, y)
