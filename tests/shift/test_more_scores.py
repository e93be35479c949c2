"""The scores of shift.more_scores against closed forms, loops and other libraries."""
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import nn

from vfm_notes.foundation.registry import VfmError, scores
from vfm_notes.shift.more_scores import (
    ccfv, feature_usefulness, fisher_space, gaussian_distance, grtd, label_predictability, lbtc, ncti_of, ncti_parts,
    parc, semantic_share, sfda, sphere_energy, tree_edges, triplet_loss,
)
from vfm_notes.shift.scores import one_hot


def blobs(n=90, f=8, gap=1.5, seed=0):
    r = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return r.normal(size=(n, f)) + gap * one_hot(y) @ r.normal(size=(3, f)), y, np.arange(n) // 18


# ---- PARC

def test_parc_of_labels_as_features_is_100():
    y = np.arange(60) % 3
    assert parc(one_hot(y), y) == pytest.approx(100)
    r = np.random.default_rng(0)
    assert abs(np.mean([parc(one_hot(y), r.permutation(y)) for _ in range(40)])) < 5


def test_parc_by_loops():
    from sklearn.decomposition import PCA
    x, y, _ = blobs(40, 50)
    z = PCA(32, svd_solver="full").fit_transform(x)
    for column in z.T: column *= np.sign(max(column, key=abs)) / column.std()
    pairs = list(combinations(range(40), 2))
    far = [1 - stats.pearsonr(z[i], z[j]).statistic for i, j in pairs]
    labels = [0.0 if y[i] == y[j] else 1.5 for i, j in pairs]  # of three classes, one minus −1/2
    assert parc(x, y) == pytest.approx(100 * stats.spearmanr(far, labels).statistic, abs=0.05)


# ---- label predictability and the gradient of features

def test_label_predictability_of_separate_and_of_meaningless_features():
    x, y, _ = blobs(gap=20)
    assert label_predictability(x, y) == 1.0
    r = np.random.default_rng(0)
    noise = label_predictability(r.normal(size=(300, 2)), np.arange(300) % 3)
    assert 1 / 3 < noise < 0.65  # the row itself is one of five


def test_triplet_loss_by_loops():
    r = np.random.default_rng(0)
    x, y = r.normal(size=(9, 4)), np.arange(9) % 3
    found = [
        gap for a, p, n in permutations(range(9), 3) if y[a] == y[p] and y[a] != y[n]
        and (gap := np.linalg.norm(x[a] - x[p]) - np.linalg.norm(x[a] - x[n]) + 0.05) > 0
    ]
    assert float(triplet_loss(torch.tensor(x), torch.tensor(y))) == pytest.approx(np.mean(found), rel=1e-6)


class Two(nn.Module):
    "Two layers; the gradient of each can be had by finite differences."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv3d(1, 3, 2).double(), nn.Linear(3, 4).double()

    def embed(self, x): return self.two(torch.tanh(self.one(x)).mean((2, 3, 4)))


def test_usefulness_is_a_ratio_of_numerical_gradients():
    net, r = Two(), torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 1, 3, 3, 3, generator=r).double(), torch.arange(12) % 2

    def lengths(weight, part):
        grad, flat = torch.zeros(weight.numel()), weight.data.view(-1)
        for i in range(len(flat)):
            ends = []
            for step in (1e-6, -1e-6):
                flat[i] += step
                ends.append(float(triplet_loss(net.embed(x[part]), y[part])))
                flat[i] -= step
            grad[i] = (ends[0] - ends[1]) / 2e-6
        return float(grad.norm())

    parts = [slice(0, 6), slice(6, 12)]
    with torch.no_grad():
        first, second = (np.mean([lengths(w, p) for p in parts]) for w in (net.one.weight, net.two.weight))
    assert feature_usefulness(net, x, y, batches=2) == pytest.approx(second / first, rel=1e-4)
    with pytest.raises(VfmError, match="two layers"): feature_usefulness(nn.Linear(2, 2), x, y)


# ---- SFDA

def sfda_written_out(x, y):
    "All generalised eigenvectors are kept, so E Eᵀ is the inverse of the spread within classes."
    def answers(x, shrink):
        classes = np.unique(y)
        means = np.stack([x[y == c].mean(0) for c in classes])
        within = sum((y == c).mean() * np.cov(x[y == c].T, bias=True) for c in classes)
        if shrink is None: shrink = np.exp(-5 * np.linalg.eigvalsh(within).max())
        within = (1 - shrink) * within + shrink * np.trace(within) / x.shape[1] * np.eye(x.shape[1])
        inverse = np.linalg.inv(within)
        one = lambda c, m: x @ inverse @ m - 0.5 * m @ inverse @ m + np.log((y == c).mean())
        z = np.stack([one(c, m) for c, m in zip(classes, means)], 1)
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True), shrink, means
    p, shrink, means = answers(x, None)
    again = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    mixed = np.array([
        again[i, y[i]] * x[i] + (1 - again[i, y[i]]) * np.mean([m for c, m in enumerate(means) if c != y[i]], axis=0)
        for i in range(len(y))
    ])
    return np.mean([row[k] for row, k in zip(answers(mixed, shrink)[0], y)])


def test_sfda_written_out_with_an_inverse():
    for gap, scale in ((1.0, 1.0), (1.5, 0.4)):
        x, y, _ = blobs(gap=gap)
        assert sfda(scale * x, y) == pytest.approx(sfda_written_out(scale * x, y), abs=1e-6)


def test_sfda_leaves_the_features_alone():
    x, y, _ = blobs()
    kept = x.copy()
    sfda(x, y)
    assert np.array_equal(x, kept) and fisher_space(x, y)[0].sum(1) == pytest.approx(1)


# ---- NCTI

def test_parts_of_ncti_against_scikit_learn_and_norms():
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    x, y, _ = blobs(120, 80)
    x = 3 * x  # the shrinkage is then its floor, and the solver svd
    z = PCA(64, svd_solver="full").fit_transform(x)
    lda = LinearDiscriminantAnalysis().fit(z, y)
    p, low = lda.predict_proba(z), lda.transform(z)
    ncc, seli, vc = ncti_parts(x, y)
    assert ncc == pytest.approx(np.mean(p[range(120), y]), abs=1e-6)
    gram = (low - low.mean(0)).T @ (low - low.mean(0))
    assert seli == pytest.approx(np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum(), rel=1e-6)
    assert vc == pytest.approx(np.log(sum(np.linalg.norm(p[y == c], "nuc") for c in range(3))), rel=1e-6)
    assert scores["ncti"](x, y) == ncc


def test_ncti_over_models_subtracts_the_third_part():
    parts = np.array([[0.2, 10.0, 3.0], [0.6, 30.0, 1.0], [0.4, 20.0, 2.0]])
    assert ncti_of(parts).tolist() == pytest.approx([-1, 2, 0.5])


# ---- CC-FV

def whitened(n, f, seed):
    x = np.random.default_rng(seed).normal(size=(n, f))
    x = x - x.mean(0)
    return x @ np.linalg.inv(linalg.cholesky(x.T @ x / n))


def test_distance_of_gaussians_in_closed_form():
    x = whitened(50, 4, 0)
    shift = np.array([1.0, 2.0, 0.0, -2.0])
    assert gaussian_distance(x, x + shift) == pytest.approx(3.0)  # equal covariance: the distance of the means
    assert gaussian_distance(2 * x, 5 * whitened(60, 4, 1)) == pytest.approx(2 * 3.0)  # √D |a − b|
    a, b = x @ np.random.default_rng(1).normal(size=(4, 4)), whitened(70, 4, 2) @ np.diag([1, 2, 3, 4.0]) + 1
    ca, cb, root = np.cov(a.T, bias=True), np.cov(b.T, bias=True), linalg.sqrtm(np.cov(a.T, bias=True))
    square = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(root @ cb @ root).real)
    assert gaussian_distance(a, b) == pytest.approx(square**0.5, rel=1e-6)


def test_energy_of_antipodes():
    assert sphere_energy(np.array([[0.0, 3.0], [0.0, -5.0]])) == pytest.approx(1.0)
    u = np.random.default_rng(0).normal(size=(7, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    assert sphere_energy(4 * u) == pytest.approx(sum(1 / np.linalg.norm(a - b) for a, b in permutations(u, 2)))


def test_ccfv_by_loops_and_without_the_background():
    x, y, g = blobs(90, 5)
    far, energies = [], []
    for c in (1, 2):
        own = [x[(y == c) & (g == k)] for k in range(5)]
        far += [gaussian_distance(a, b) for a, b in combinations(own, 2)]
    for k in range(5):
        u = [v / np.linalg.norm(v) for v in x[(g == k) & (y > 0)]]
        energies.append(np.mean([1 / np.linalg.norm(a - b) for a, b in permutations(u, 2)]))
    assert ccfv(x, y, g) == pytest.approx(np.log(1 / np.mean(energies) / np.mean(far)), rel=1e-5)
    other = x.copy()
    other[y == 0] += 100
    assert ccfv(other, y, g) == pytest.approx(ccfv(x, y, g))


# ---- GRTD and LBTC

def kruskal(distances):
    n, home, out = len(distances), list(range(len(distances))), []
    for w, i, j in sorted((distances[i, j], i, j) for i, j in combinations(range(n), 2)):
        a, b = home[i], home[j]
        if a != b:
            out.append((i, j, w))
            home = [a if h == b else h for h in home]
    return out


def test_grtd_by_kruskals_tree():
    x, y, g = blobs(54, 4)
    deltas = []
    for k in range(3):
        a, b = x[g == k], y[g == k]
        d = np.linalg.norm(a[:, None] - a, axis=-1)
        cap, tree = np.median(d[~np.eye(len(a), dtype=bool)]), kruskal(d)
        own = []
        for c in np.unique(b):
            edges = [(i, j, w) for i, j, w in tree if c in (b[i], b[j])]
            whole = sum(w for *_, w in edges)
            own.append((whole - sum(min(w, cap) for i, j, w in edges if b[i] != b[j])) / whole)
        deltas.append(np.mean(own))
    assert grtd(x, y, g) == pytest.approx(-np.mean(deltas), rel=1e-6)


def test_grtd_of_classes_that_are_points_is_zero():
    y = np.arange(20) % 2
    assert semantic_share(10.0 * one_hot(y), y) == pytest.approx(0, abs=1e-6)
    i, j, w = tree_edges(np.linalg.norm(one_hot(y)[:, None] - one_hot(y), axis=-1))
    assert len(w) == 19 and w.sum() == pytest.approx(2**0.5)  # coinciding points still belong to the tree


def test_grtd_with_its_published_sign_prefers_shuffled_labels():
    x, y, g = blobs(180, 8, gap=2)
    r = np.random.default_rng(0)
    assert all(grtd(x, y, g) < grtd(x, r.permutation(y), g) for _ in range(10))
    assert scores.card("grtd")["direction"] == 1 and scores.card("grtd")["prefers_true_labels"] is False


def test_lbtc_of_separate_blobs_and_of_random_labels():
    x, y, _ = blobs(240, 4, gap=50)
    assert lbtc(x, y, np.arange(240) // 60) == 1.0  # twenty rows of a class, sixteen neighbours
    assert lbtc(x, y, np.arange(240) // 30) < 1.0  # ten of a class: every neighbourhood has a bridge
    r = np.random.default_rng(0)
    noise = r.normal(size=(2000, 4))
    assert lbtc(noise, r.integers(0, 2, 2000), np.arange(2000) // 200) == pytest.approx(0.5, abs=0.04)
