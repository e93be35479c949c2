"""Transferability scores against other ways to compute them, one contract for the registry, and where their rows come
from."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn
from vfm_notes.foundation.registry import VfmError, scores
import vfm_notes.shift.more_scores  # noqa: F401  fills the registry
from vfm_notes.shift.scores import (
    gbc, hscore, knn_score, leep, logme, nleep, one_hot, principal_components, probe_score,
)
from vfm_notes.shift.scores import cell_labels, cell_rows, cell_values, draw_cells, transferability

NAMES = ["logme", "hscore", "gbc", "nleep", "knn", "probe"]
TAKES = [(name, kind) for name in scores for kind in scores.card(name)["takes"]]


def score(name, x, y):
    "A score, with cases of nine rows for those that compare cases."
    cases = (np.arange(len(y)) // 9,) if scores.card(name).get("needs") == "cases" else ()
    return scores[name](x, y, *cases)


def table(n=90, f=10, classes=3, gap=1.5, seed=0):
    r = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return r.normal(size=(n, f)) + gap * one_hot(y) @ r.normal(size=(classes, f)), y


def target(kind, n=90, f=10, gap=1.5, seed=0):
    x, y = table(n, f, gap=gap, seed=seed)
    r = np.random.default_rng(seed + 1)
    return (x, y) if kind == "classes" else (x, x[:, :3] @ r.normal(size=(3, 2)) * (gap > 0) + r.normal(size=(n, 2)))


# ---- the contract: every entry of the registry ----

def test_registry_is_full(): assert set(NAMES) <= set(scores)


@pytest.mark.parametrize("name", list(scores))
def test_card_is_complete(name):
    card = scores.card(name)
    assert (
        card["title"]
        and card["source"]
        and card["direction"] in (1, -1)
        and set(card["takes"]) <= {"classes", "values"}
        and card["takes"]
    )
    assert isinstance(card["rotation"], bool)


@pytest.mark.parametrize("name,kind", TAKES)
def test_true_labels_beat_shuffled_ones(name, kind):
    "Or the card states that they do not, and then they do not."
    x, y = target(kind)
    r, sign = np.random.default_rng(5), scores.card(name)["direction"]
    if not scores.card(name).get("prefers_true_labels", True): sign = -sign
    value = score(name, x, y)
    assert isinstance(value, float) and np.isfinite(value) and value == score(name, x, y)
    assert all(sign * value > sign * score(name, x, r.permutation(y)) for _ in range(5))


@pytest.mark.parametrize("name,kind", TAKES)
def test_invariances(name, kind):
    x, y = target(kind)
    r, needs = np.random.default_rng(6), scores.card(name).get("needs")
    q, order, near = (
        np.linalg.qr(r.normal(size=(10, 10)))[0], r.permutation(90),
        pytest.approx(score(name, x, y), rel=1e-6, abs=1e-9),
    )
    unit = scores.card(name).get("unit", True)  # of the features
    assert all(score(name, u * x, y) == near for u in (0.05, 3.7)) == unit
    if scores.card(name)["rotation"]: assert score(name, x @ q, y) == near
    else: assert score(name, x * r.uniform(0.1, 10, 10) + 5, y) == near  # the unit of each feature
    # names of classes
    if kind == "classes" and name not in ("probe", "nleep") and not needs: assert score(name, x, (y + 1) % 3) == near
    if name not in ("probe", "nleep") and not needs: assert score(name, x[order], y[order]) == near
    assert score(name, x.astype(np.float32), y) == pytest.approx(score(name, x, y), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name,kind", TAKES)
@pytest.mark.parametrize("n,f", [(24, 60), (200, 3), (12, 1)])
def test_few_rows_and_few_features(name, kind, n, f):
    if n == 12 and scores.card(name).get("needs"): pytest.skip("one case and a bit")
    r = np.random.default_rng(0)
    x, y = r.normal(size=(n, f)), np.arange(n) % 3 if kind == "classes" else r.normal(size=(n, 2))
    assert np.isfinite(score(name, x, y))


@pytest.mark.parametrize("name", list(scores))
def test_bad_input(name):
    x, y = table(20)
    bad = x.copy(); bad[2, 3] = np.nan
    for args, word in [
        ((x, y[:9]), "shape"), ((bad, y), "NaN"), ((np.ones((20, 3)), y), "constant features"),
        ((x, np.zeros(20, int)), "two classes"), ((x, np.r_[0, np.ones(19, int)]), "two rows"),
        ((x, np.ones((20, 1))), "constant"),
    ]:
        with pytest.raises(VfmError, match=word): scores[name](*args)


@pytest.mark.parametrize("name", [n for n in scores if scores.card(n).get("needs") == "cases"])
def test_scores_of_cases_refuse_rows_without_a_case(name):
    x, y = table(20)
    with pytest.raises(VfmError, match="give"): scores[name](x, y, np.arange(20))


# ---- values against something independent ----

@pytest.mark.parametrize("n,f", [(40, 6), (12, 20)])
def test_logme_by_direct_maximisation(n, f):
    "The Gaussian density of the labels written out with its n×n covariance, over both precisions at once."
    r = np.random.default_rng(n)
    x, y = r.normal(size=(n, f)), r.normal(size=(n, 2))
    y[:, 0] += x @ r.normal(size=f)
    def best(column):
        def minus(p):
            return (
                -stats.multivariate_normal(np.zeros(n), np.exp(p[1]) * np.eye(n) + np.exp(p[0]) * x @ x.T).logpdf(
                    column
                )
                / n
            )
        return max(
            -optimize.minimize(
                minus, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-11, "maxiter": 2000}
            ).fun
            for start in ((0, 0), (-3, 0))
        )
    assert logme(x, y) == pytest.approx(np.mean([best(c) for c in y.T]), abs=1e-5)


def test_logme_by_the_papers_fixed_point():
    x, y = table(80, 6)
    def one(column, a=1.0, b=1.0, n=80, d=6):
        for _ in range(500):
            m = np.linalg.solve(a * np.eye(d) + b * x.T @ x, b * x.T @ column)
            gamma = (b * np.linalg.eigvalsh(x.T @ x) / (a + b * np.linalg.eigvalsh(x.T @ x))).sum()
            a, b = gamma / (m @ m), (n - gamma) / ((column - x @ m) ** 2).sum()
        m = np.linalg.solve(a * np.eye(d) + b * x.T @ x, b * x.T @ column)
        return (
            (
                n * np.log(b)
                + d * np.log(a)
                - n * np.log(2 * np.pi)
                - b * ((column - x @ m) ** 2).sum()
                - a * m @ m
                - np.linalg.slogdet(a * np.eye(d) + b * x.T @ x)[1]
            )
            / 2
            / n
        )
    assert logme(x, y) == pytest.approx(np.mean([one(c) for c in one_hot(y).T]), abs=1e-9)


def test_logme_of_an_exact_answer_is_finite():
    x, _ = table(60, 4)
    assert 5 < logme(x, x[:, :1]) < 50


def test_hscore_written_out():
    x, y = table(80, 5)
    means = np.stack([x[y == c].mean(0) for c in y])
    between, whole = np.cov(means.T, bias=True), np.cov(x.T, bias=True)
    assert hscore(x, y, shrinkage=0.0) == pytest.approx(np.trace(np.linalg.inv(whole) @ between), rel=1e-9)
    from sklearn.covariance import LedoitWolf
    lw = LedoitWolf().fit(x)
    assert hscore(x, y) == pytest.approx(
        (1 - lw.shrinkage_) * np.trace(np.linalg.inv(lw.covariance_) @ between), rel=1e-9
    )
    wide, labels = np.random.default_rng(0).normal(size=(20, 100)), np.arange(20) % 2
    # why it is shrunk
    assert hscore(wide, labels, shrinkage=0.0) == pytest.approx(1, rel=1e-9) and hscore(wide, labels) < 0.7
    values = np.c_[x[:, 0], np.arange(80)]
    cut = [np.digitize(v, np.quantile(v, [0.25, 0.5, 0.75])) for v in values.T]
    assert hscore(x, values) == pytest.approx(np.mean([hscore(x, c) for c in cut]), rel=1e-12)


def test_gbc_written_out():
    x, y = table(90, 5)
    z = (x - x.mean(0)) @ np.linalg.eigh(np.cov(x.T))[1]
    total = 0
    for a in range(3):
        for b in range(3):
            if a == b: continue
            p, q = (stats.norm(z[y == c].mean(0), z[y == c].std(0, ddof=1)) for c in (a, b))
            grid = np.linspace(-30, 30, 60001)[:, None]
            # the coefficient is this integral
            total += np.prod(np.trapezoid(np.sqrt(p.pdf(grid) * q.pdf(grid)), grid, axis=0))
    assert gbc(x, y) == pytest.approx(-total, rel=1e-6)


def test_leep_by_loops_and_nleep_by_its_parts():
    r = np.random.default_rng(0)
    source, y = r.dirichlet(np.ones(4), 30), np.arange(30) % 3
    total = 0.0
    for i in range(30):
        p = 0.0
        for z in range(4):
            p += (
                source[i, z]
                * sum(source[j, z] for j in range(30) if y[j] == y[i])
                / sum(source[j, z] for j in range(30))
            )
        total += np.log(p)
    assert leep(source, y) == pytest.approx(total / 30, rel=1e-12)
    assert leep(one_hot(y), y) == pytest.approx(0, abs=1e-12) and leep(np.full((30, 2), 0.5), y) == pytest.approx(
        np.log(1 / 3)
    )
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture
    x, y = table(120, 8)
    z = PCA(0.8, svd_solver="full").fit_transform(x)
    assert principal_components(x, share=0.8).shape == z.shape and np.allclose(
        np.abs(principal_components(x, share=0.8)), np.abs(z)
    )
    m = GaussianMixture(12, covariance_type="diag", reg_covar=1e-3, max_iter=50, tol=1e-2, random_state=0).fit(
        z / z.std()
    )
    logs = np.stack(
        [
            stats.multivariate_normal(mu, np.diag(v)).logpdf(z / z.std()) + np.log(w)
            for mu, v, w in zip(m.means_, m.covariances_, m.weights_)
        ],
        1,
    )
    # signs of the components may differ
    assert nleep(x, y) == pytest.approx(leep(np.exp(logs - np.logaddexp.reduce(logs, 1)[:, None]), y), abs=0.02)


def test_knn_by_loops():
    for kind in ("classes", "values"):
        x, y = target(kind, 40, 4)
        groups, z, guess = np.arange(40) // 4, (x - x.mean(0)) / x.std(0), []
        for i in range(40):
            near = sorted((j for j in range(40) if groups[j] != groups[i]), key=lambda j: ((z[i] - z[j]) ** 2).sum())[
                :5
            ]
            guess.append(np.bincount(y[near], minlength=3).argmax() if kind == "classes" else y[near].mean(0))
        from sklearn.metrics import balanced_accuracy_score, r2_score
        assert knn_score(x, y, groups) == pytest.approx(
            (balanced_accuracy_score if kind == "classes" else r2_score)(y, np.array(guess)), rel=1e-12
        )
    with pytest.raises(VfmError, match="one group"): knn_score(x, y, np.zeros(40))


def test_held_out_rows_are_of_other_groups():
    "Rows of a group are copies of each other: only a score that leaks would know their class."
    r = np.random.default_rng(0)
    x, y, g = np.repeat(r.normal(size=(30, 20)), 6, 0), np.repeat(np.arange(30) % 2, 6), np.repeat(np.arange(30), 6)
    for name in ("knn", "probe"): assert scores[name](x, y) > 0.85 and scores[name](x, y, g) < 0.75


def test_probe_by_hand():
    x, y = target("values", 60, 4)
    pred = np.empty_like(y)
    for fold in range(5):
        test = np.arange(60) % 5 == fold
        mean, sd = x[~test].mean(0), x[~test].std(0)
        z, c = (x - mean) / sd, y[~test].mean(0)
        fits = []
        for a in np.logspace(0, 4, 5):  # leave-one-out error of ridge regression, with the hat matrix
            zt = z[~test]
            h = zt @ np.linalg.solve(zt.T @ zt + a * np.eye(4), zt.T) + 1 / len(zt)
            fits.append((((y[~test] - c - (h - 1 / len(zt)) @ (y[~test] - c)) / (1 - np.diag(h))[:, None]) ** 2).mean())
        a = np.logspace(0, 4, 5)[np.argmin(fits)]
        pred[test] = c + z[test] @ np.linalg.solve(z[~test].T @ z[~test] + a * np.eye(4), z[~test].T @ (y[~test] - c))
    from sklearn.metrics import r2_score
    assert probe_score(x, y) == pytest.approx(r2_score(y, pred), abs=1e-6)
    with pytest.raises(VfmError, match="one class only"):
        probe_score(x, np.r_[np.zeros(58, int), 1, 1], np.r_[np.arange(58), 58, 58])


# ---- rows ----

class Grid(nn.Module):
    "A backbone whose features are the voxels themselves."
    in_channels, strides, widths = 1, [(1, 2, 2), (2, 4, 4)], [8, 2]
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1)); self.drop = nn.Dropout(0.9)
    def pyramid(self, x):
        assert x.shape[1] == 1
        cells = x.unfold(2, 1, 1).unfold(3, 2, 2).unfold(4, 2, 2).flatten(5)[:, 0].permute(0, 4, 1, 2, 3)
        coarse = nn.functional.avg_pool3d(x, (2, 4, 4))
        return [self.drop(torch.cat([cells, cells**2], 1)) * self.w, torch.cat([coarse, coarse**2], 1)]
    def layers(self, x):
        return {"mean": x.mean((2, 3, 4)), "embed": torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)}


def task_data(kind, n=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 4, 8, 8, generator=g)
    y = {"class": torch.arange(n) % 2, "labels": (x[:, 0] > 0.5).long(), "image": x * 2 + 1}[kind]
    if kind == "class": x = x * (1 + y[:, None, None, None, None])
    return SimpleNamespace(inputs=x, target=y, patients=[f"p{i // 2}" for i in range(n)])


def test_cells_are_where_they_should_be():
    t = torch.arange(2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    labels, values = cell_labels(t, (2, 4, 4)), cell_values(t[:, None], (2, 4, 4))
    for case in range(2):
        for i, (d, h, w) in enumerate(np.ndindex(2, 2, 2)):
            assert labels[case, i] == t[case, 2 * d + 1, 4 * h + 2, 4 * w + 2]
            assert values[case, i].tolist() == [
                t[case, 2 * d + a, 4 * h + b, 4 * w + c].item() for a in (0, 1) for b in (1, 3) for c in (1, 3)
            ]
    assert cell_values(t[:, None], (1, 1, 1)).shape == (2, 256, 1)
    labels = np.r_[np.zeros(900), np.ones(80), np.full(5, 2)]
    cells = draw_cells(labels, 985, 90, np.random.default_rng(0))
    assert np.bincount(labels[cells].astype(int)).tolist() == [30, 30, 5] and len(set(cells)) == 65


@pytest.mark.parametrize("kind", ["labels", "image"])
def test_rows_hold_a_cells_features_and_its_target(kind):
    data, net = task_data(kind), Grid()
    net.train()
    fine, coarse = cell_rows(net, data.inputs, data.target, data.patients, rows=40, batch_size=3)
    assert net.training and net.drop.training and (fine.layer, coarse.layer) == ("pyramid 0", "pyramid 1")
    assert len(fine.features) <= 40 and fine.features.shape[1] == 8 and set(fine.groups) <= set(range(5))
    if kind == "labels":  # the middle of a 1×2×2 cell is its last voxel
        assert ((fine.features[:, 3] > 0.5) == fine.target).all() and np.bincount(fine.target).tolist() == [20, 20]
    else: np.testing.assert_allclose(fine.target, fine.features[:, :4] * 2 + 1, rtol=1e-5)


def test_the_first_guess_is_taken_off():
    data = task_data("image")
    rows = next(cell_rows(Grid(), torch.cat([data.inputs, data.inputs * 2], 1), data.target, data.patients, rows=30))
    np.testing.assert_allclose(rows.target, 1, rtol=1e-5)


@pytest.mark.parametrize(
    "kind,layers",
    [("class", ["mean", "embed"]), ("labels", ["pyramid 0", "pyramid 1"]), ("image", ["pyramid 0", "pyramid 1"])],
)
def test_table_of_a_task(kind, layers):
    data, val, wrong = task_data(kind, 20), task_data(kind, 10, 1), task_data(kind, 20, 2)
    t = transferability(Grid(), data, val, rows=200)
    takes = {n for n in scores if ("values" if kind == "image" else "classes") in scores.card(n)["takes"]}
    assert (
        set(t.score) == takes
        and list(dict.fromkeys(t.layer)) == layers
        and (t.reason == "").all()
        and t.value.notna().all()
        and (t.direction == 1).all()
    )
    assert t[t.layer == layers[0]].n.iloc[0] == (30 if kind == "class" else 200)
    again = transferability(Grid(), data, val, rows=200)
    assert (t.value == again.value).all()
    other = SimpleNamespace(inputs=wrong.inputs, target=data.target, patients=data.patients)  # other cases' labels
    lost = transferability(Grid(), other, rows=200)
    best, worst = t.set_index(["layer", "score"]).value, lost.set_index(["layer", "score"]).value
    if kind != "class":
        for s in takes:
            if not scores.card(s).get("prefers_true_labels", True): continue
            if s == "ccfv": continue  # random classes are alike in all cases, too
            assert best[layers[0], s] > worst[layers[0], s]
    assert transferability(Grid(), data, val, cases=12, names=["logme"]).n.max() <= (12 if kind == "class" else 600)


def test_an_undefined_score_says_why():
    data = task_data("class", 6)
    data.target = torch.tensor([0, 0, 0, 0, 0, 1])
    t = transferability(Grid(), data)
    assert t.value.isna().all() and t.reason.str.contains("two rows each").all()
