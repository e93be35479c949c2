"""Tables, gain, convergence and association against libraries, brute force and closed forms, on records whose truth is
known."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from scipy import stats
from counting import calls
from vfm_notes.analysis import gain, prediction
from vfm_notes.analysis.association import associate, cell_points, association_words, block_permutations, run_points
from vfm_notes.analysis.contrasts import cell_scores
from vfm_notes.analysis.convergence import convergence_table, mean_interval, first_reached, run_convergence, time_words
from vfm_notes.analysis.crossed import association_table
from vfm_notes.analysis.findings import findings
from vfm_notes.analysis.gain import (
    Agreement, Means, Pair, Ranking, permutation_test, gain_interval, gain_table, holm, rpg, run_gains,
)
from vfm_notes.analysis.tables import class_scores, load_tables, positive_score
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.runs.record import failed_record, new_record, write_record

EPOCHS = np.arange(6)


def curve(metric, values, d2p=0.1):
    rows = [{"epoch": int(e), "seconds": 2.0 * e, "name": f"val_{metric}", "value": v} for e, v in zip(EPOCHS, values)]
    return rows + [{"epoch": int(e), "seconds": 2.0 * e, "name": "d2p_embed", "value": d2p * e} for e in EPOCHS]


def write(study, spec, metric, values, direction=1, curves=None, d2p=0.1):
    "One finished run with a value per case."
    cases = [{"case": f"c{i:02}", "patient": f"p{i:02}", "metric": metric, "value": v} for i, v in enumerate(values)]
    record = new_record(
        spec, study, metrics={metric: float(np.nanmean(values))}, primary=metric, directions={metric: direction},
        units={metric: ""}, controls={metric: 0.3},
        d2p=[
            {
                "layer": "stem", "mmd2": d2p / 2, "mmd2_independent": d2p / 2, "p_value": 0.01, "n": 24,
                "bandwidth": 1.0, "seed": 9,
            },
            {
                "layer": "embed", "mmd2": d2p, "mmd2_independent": d2p, "p_value": 0.01, "n": 24, "bandwidth": 1.0,
                "seed": 9,
            },
        ],
        cost={
            "seconds": {"total": 12.0, "training": 10.0}, "memory_mib": {"host": 100.0},
            "parameters": {"trainable": 10, "total": 20},
        },
    )
    write_record(
        run_folder(study, run_id(spec)), record, curves=curves or curve(metric, 0.1 * EPOCHS, d2p), cases=cases
    )


def class_cases(label, score):
    wide = pd.DataFrame({
        "case": [f"c{i:02}" for i in range(len(label))], "patient": [f"p{i:02}" for i in range(len(label))],
        "label": label,
    })
    for k in range(score.shape[1]): wide[f"score_{k}"] = score[:, k]
    return wide.melt(["case", "patient"], var_name="metric")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Two tasks x two backbones, three seeds; a failed run; a backbone without scratch."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("runs")))
        return make_study()


def make_study():
    r = np.random.default_rng(0)
    base = r.normal(0.6, 0.1, 20)
    truth = {
        ("segmentation", "a.x"): 1.10, ("segmentation", "b.x"): 0.95, ("translation", "a.x"): 1.02,
        ("translation", "b.x"): 1.30,
    }
    for i, ((task, backbone), factor) in enumerate(truth.items()):
        for s in range(3):
            for strategy in ("scratch", "full"):
                v = base * (factor if strategy == "full" else 1) + r.normal(0, 0.005, 20)
                rise = np.minimum(EPOCHS * (0.2 if strategy == "full" else 0.1), 0.5) * (
                    factor if strategy == "full" else 1
                )
                write(
                    "s", RunSpec(task=task, backbone=backbone, strategy=strategy, seed=s), "dice", v,
                    curves=curve("dice", 0.2 + rise, 0.1 * (i + 1)), d2p=0.1 * (i + 1),
                )
    write("s", RunSpec(task="segmentation", backbone="c.x", strategy="full", seed=0), "dice", base)
    bad = RunSpec(task="segmentation", backbone="a.x", strategy="full", seed=7)
    write_record(run_folder("s", run_id(bad)), failed_record(bad, "s", RuntimeError("boom")))
    return load_tables("s")


# --- tables

def test_tables_hold_every_run_and_value(study):
    assert len(study.runs) == 26 and (study.runs.status == "failed").sum() == 1
    assert study.runs.loc[study.runs.status == "failed", "error"].tolist() == ["boom"]
    assert len(study.cases) == 25 * 20 and len(study.curves) == 25 * 12 and len(study.d2p) == 50
    assert (
        study.d2p.groupby("id").seed.first().reindex(study.done().id).to_numpy() == study.done().seed.to_numpy()
    ).all()
    one = study.cases[study.cases.id == study.done().id.iloc[0]]
    assert one.loc[one.metric == "dice", "value"].mean() == pytest.approx(study.done().value.iloc[0])


def test_a_cell_is_scored_where_nobody_wrote_how_many_cases_it_was_trained_on(study):
    unknown = replace(study, runs=study.runs.assign(n_train=pd.array([pd.NA] * len(study.runs), "Int64")))
    whole, found = cell_scores(study), cell_scores(unknown)
    assert len(whole) == 9 and found.n_train.isna().all()
    assert found.drop(columns="n_train").equals(whole.drop(columns="n_train"))
    means = study.done().groupby(["task", "backbone", "strategy"])["value"].mean()  # by pandas
    assert np.allclose(found.set_index(["task", "backbone", "strategy"]).score.sort_index(), means.sort_index())


def test_an_empty_study_and_an_all_failed_one(runs_root):
    empty = load_tables("nothing")
    assert empty.runs.empty and gain_table(empty).empty and run_gains(empty).empty
    spec = RunSpec(strategy="full")
    write_record(run_folder("f", run_id(spec)), failed_record(spec, "f", RuntimeError("boom")))
    t = gain_table(load_tables("f"))
    assert t.reason.tolist() == ["no finished run"] and np.isnan(t.rpg[0])


def test_labels_and_scores_of_a_run_in_any_order():
    r = np.random.default_rng(0)
    label, score = r.integers(0, 3, 50), r.dirichlet([1, 1, 1], 50)
    cases = class_cases(label, score).sample(frac=1, random_state=0)
    found, scores = class_scores(cases)
    assert found.tolist() == label.tolist() and np.allclose(scores, score)
    assert np.allclose(positive_score(scores), score[:, 2]) and np.allclose(positive_score(scores, 1), 1 - score[:, 0])
    with pytest.raises(VfmError, match="label"): class_scores(cases[cases.metric == "score_0"])


# --- gain

@settings(max_examples=100, deadline=None)
@given(
    st.floats(-1e3, 1e3), st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-6), st.sampled_from([1, -1]),
    st.floats(1e-3, 1e3),
)
def test_rpg_laws(m, ref, s, c):
    assert rpg(m, ref, s) == pytest.approx(-rpg(m, ref, -s))
    assert rpg(ref, ref, s) == 0
    assert (rpg(m, ref, s) > 0) == (s * (m - ref) > 0) or abs(m - ref) < 1e-9 * abs(ref)
    assert rpg(c * m, c * ref, s) == pytest.approx(rpg(m, ref, s), rel=1e-6, abs=1e-6)


def test_rpg_undefined():
    assert np.isnan(rpg(1, 0)) and np.isnan(rpg(1, np.nan)) and np.isnan(rpg(np.nan, 1))
    np.testing.assert_allclose(rpg(np.array([2.0, 1.0]), np.array([1.0, 0.0])), [100, np.nan])
    assert rpg(-0.1, -0.2) == pytest.approx(50)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 40), st.integers(2, 4))
def test_weighted_scores_are_scores_of_redrawn_cases(seed, n, classes):
    r = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), r.integers(0, classes, n)])
    score = r.integers(0, 6, (2, len(label))) / 5  # many ties
    predicted = r.integers(0, classes, (2, len(label)))
    draws = np.stack([np.concatenate([np.arange(classes), r.integers(0, len(label), n)]) for _ in range(3)])
    w = np.stack([np.bincount(d, minlength=len(label)) for d in draws]).astype(float)
    auc, kappa = Ranking(score, label > 0).weighted(w), Agreement(predicted, label, classes).weighted(w)
    mean = Means(score).weighted(w)
    for s in range(2):
        for b, d in enumerate(draws):
            assert auc[s, b] == pytest.approx(roc_auc_score(label[d] > 0, score[s, d]))
            assert kappa[s, b] == pytest.approx(
                cohen_kappa_score(label[d], predicted[s, d], labels=range(classes), weights="quadratic")
            )
            assert mean[s, b] == pytest.approx(score[s, d].mean())


def test_undefined_scores_stay_undefined():
    assert np.isnan(Ranking(np.random.rand(1, 4), np.array([True] * 4)).weighted(np.ones((1, 4)))).all()
    assert np.isnan(Agreement(np.array([[0, 1, 2]]), np.array([1, 1, 1]), 3).weighted(np.ones((1, 3)))).all()
    assert np.isnan(Means(np.full((1, 3), np.nan)).weighted(np.ones((1, 3)))).all()


def test_gain_interval_against_least_squares():
    """Mean squares by least squares on dummies, of the slopes of the gain by changing one value a little; the case
    error is that of draws."""
    from scipy.stats import t as student
    r = np.random.default_rng(0)
    t, m = r.normal(1.2, 0.3, (3, 25)) + r.normal(0, 0.1, (3, 1)), r.normal(1.0, 0.3, (3, 25))
    found = gain_interval(Pair(Means(t), Means(m), [0, 1, 2], np.arange(25)), "psnr")
    assert found.value == pytest.approx(100 * (t.mean() / m.mean() - 1))
    slope = 1e-6  # what a small change of one value does to the gain, by changing it
    z = (
        np.array([
            [
                100
                * ((t.sum() + slope * (a - t.mean())) / (m.sum() + slope * (b - m.mean())) - t.sum() / m.sum())
                / slope
                for a, b in zip(x, y)
            ]
            for x, y in zip(t, m)
        ])
        * t.size
    )
    dummies = {"seed": np.kron(np.eye(3), np.ones((25, 1))), "case": np.kron(np.ones((3, 1)), np.eye(25))}
    left = lambda *names: np.linalg.lstsq(np.concatenate([dummies[n] for n in names], 1), z.ravel(), rcond=None)[:1]
    squares = lambda *names: float(
        np.sum((z.ravel() - np.concatenate([dummies[n] for n in names], 1) @ left(*names)[0]) ** 2)
    )
    seed, case, rest = (
        (squares("case") - squares("seed", "case")) / 2, (squares("seed") - squares("seed", "case")) / 24,
        squares("seed", "case") / 48,
    )
    np.testing.assert_allclose(
        [found.squares.seed, found.squares.case, found.squares.rest], [seed, case, rest], rtol=1e-4
    )
    only, few, many = max(0, case - rest), student.ppf(0.975, 2) ** 2, student.ppf(0.975, 24) ** 2
    share = seed**2 / (seed**2 + 2 / 3 * only**2)  # how much of Student's quantile is that of the seeds
    half = ((seed + only) * (share * few + (1 - share) * many) / 75) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-4)
    only = [100 * (t[:, c].mean() / m[:, c].mean() - 1) for c in r.integers(0, 25, (4000, 25))]
    assert found.case_error == pytest.approx(np.std(only), rel=0.1)


def test_patients_are_drawn_together():
    w = prediction.case_weights(np.array([0, 0, 1, 2, 2, 2]), 200, np.random.default_rng(0))
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 3] == w[:, 5]).all() and len(np.unique(w[:, 2] - w[:, 3])) > 2
    assert np.allclose(w[:, [0, 2, 3]].sum(1), 3)


def test_exchange_test_exact_and_uniform():
    from itertools import product
    r = np.random.default_rng(0)
    x, y = r.normal(0.4, 1, (2, 8)), r.normal(0, 1, (2, 8))
    d = (x - y).mean(0)
    all_sums = np.array([abs((np.array(f) * d).sum()) for f in product([1, -1], repeat=8)])
    p = permutation_test(Pair(Means(x), Means(y), [0, 1], np.arange(8)))
    assert p == pytest.approx((all_sums >= abs(d.sum()) - 1e-12).mean())
    null = []
    for i in range(200):
        r = np.random.default_rng(i)
        label = np.arange(30) % 2 == 0
        null.append(
            permutation_test(
                Pair(
                    Ranking(r.normal(size=(2, 30)), label), Ranking(100 * r.normal(size=(2, 30)), label), [0, 1],
                    np.arange(30),
                ),
                draws=99,
            )
        )
    assert min(null) >= 0.01 and np.mean(np.array(null) <= 0.05) < 0.1 and 0.35 < np.mean(np.array(null) <= 0.5) < 0.65
    sure = permutation_test(
        Pair(
            Ranking(np.tile(label, (2, 1)) + 0.0, label), Ranking(r.normal(size=(2, 30)), label), [0, 1], np.arange(30)
        ),
        draws=999,
    )
    assert sure < 0.01
    x, y = r.normal(size=(2, 30)), r.normal(size=(2, 30))
    p = permutation_test(Pair(Ranking(x, label), Ranking(y, label), [0, 1], np.arange(30)))
    # AUC knows no scale
    assert p == permutation_test(Pair(Ranking(np.exp(3 * x) + 50, label), Ranking(y, label), [0, 1], np.arange(30)))


def test_holm_against_the_definition():
    p = np.array([0.01, 0.02, 0.03, np.nan, 0.5])
    np.testing.assert_allclose(holm(p), [0.04, 0.06, 0.06, np.nan, 0.5])
    assert holm([]).size == 0 and np.isnan(holm([np.nan])).all()


def test_gain_table_finds_the_truth(study):
    t = gain_table(study).set_index(["task", "backbone"])
    for key, factor in {
        ("segmentation", "a.x"): 10, ("segmentation", "b.x"): -5, ("translation", "a.x"): 2, ("translation", "b.x"): 30,
    }.items():
        row = t.loc[key]
        assert row.low <= factor + 0.5 and row.high >= factor - 0.5 and row.high - row.low < 4
        assert (
            np.sign(row.rpg) == np.sign(factor)
            and (row.n_seeds, row.n_cases) == (3, 20)
            and row.p <= row.p_holm <= 0.05
        )
    lost = t.loc[("segmentation", "c.x")]
    assert np.isnan(lost.rpg) and "reference 'scratch'" in lost.reason
    assert (gain_table(study).set_index(["task", "backbone"]).low == t.low).sum() == 4  # same draws again
    per_run = run_gains(study)
    assert len(per_run) == 12
    np.testing.assert_allclose(
        per_run[(per_run.task == "translation") & (per_run.backbone == "b.x")].rpg.std(),
        t.loc[("translation", "b.x")].seed_sd,
    )


def test_gain_does_not_depend_on_order(study):
    mixed = replace(
        study, runs=study.runs.sample(frac=1, random_state=1), cases=study.cases.sample(frac=1, random_state=2),
        metrics=study.metrics.sample(frac=1, random_state=3),
    )
    a, b = gain_table(mixed), gain_table(study)
    columns = ["rpg", "low", "high", "p", "seed_sd"]
    pd.testing.assert_frame_equal(
        a.set_index(gain.CELL)[columns].sort_index(), b.set_index(gain.CELL)[columns].sort_index()
    )


def test_gain_needs_the_same_seeds_cases_and_size(runs_root):
    v = np.linspace(0.4, 0.8, 10)
    write("s", RunSpec(strategy="scratch", seed=0), "dice", v)
    write("s", RunSpec(strategy="scratch", seed=5), "dice", 100 * v)
    write("s", RunSpec(strategy="full", seed=0), "dice", 1.1 * v)
    write("s", RunSpec(strategy="full", seed=1), "dice", 50 * v)
    write("s", RunSpec(strategy="full", seed=0, n_train=12), "dice", v)
    t = gain_table(load_tables("s")).set_index("n_train")
    assert (
        t.loc[24].rpg == pytest.approx(10)
        and t.loc[24].n_seeds == 1
        and np.isnan(t.loc[24].seed_sd)
        and "left out: 1" in t.loc[24].note
        and "one seed" in t.loc[24].note
    )
    assert "no finished run of the reference" in t.loc[12].reason


def test_gain_directions_missing_values_and_zero(runs_root):
    v = np.linspace(2, 4, 15)
    hole = v.copy(); hole[:5] = np.nan
    write("s", RunSpec(strategy="scratch"), "hd95", v, -1)
    write("s", RunSpec(strategy="full"), "hd95", hole / 2, -1)
    write("s", RunSpec(task="z", strategy="scratch"), "dice", 0 * v)
    write("s", RunSpec(task="z", strategy="full"), "dice", v)
    write("s", RunSpec(task="w", strategy="scratch"), "dice", v - 3)
    write("s", RunSpec(task="w", strategy="full"), "dice", v)
    t = gain_table(load_tables("s")).set_index("task")
    assert t.loc["segmentation"].rpg == pytest.approx(50) and t.loc["segmentation"].n_cases == 10
    write("s", RunSpec(task="r", strategy="scratch"), "hd95", hole, -1)
    write("s", RunSpec(task="r", strategy="full"), "hd95", v / 2, -1)
    assert gain_table(load_tables("s")).set_index("task").loc["r"].rpg == pytest.approx(50)
    assert np.isnan(t.loc["z"].rpg) and t.loc["z"].reason == "the reference is 0"
    assert "close to 0" in t.loc["w"].note or "reference is 0" in t.loc["w"].reason
    with pytest.raises(VfmError, match="Did you mean 'hd95'"): gain_table(load_tables("s"), metric="hd59")
    assert gain_table(load_tables("s"), metric="hd95").task.tolist() == ["r", "segmentation"]


def test_other_references(runs_root):
    "Another strategy, and a specialist: another backbone that all cells of a task are compared with."
    v = np.linspace(0.4, 0.8, 12)
    for s in range(2):
        for backbone, strategy, factor in (
            ("a.x", "scratch", 1), ("a.x", "full", 1.2), ("a.x", "probe", 1.1), ("unet.none", "scratch", 1.5),
            ("zero.x", "scratch", 0), ("zero.x", "full", 1),
        ):
            write("s", RunSpec(backbone=backbone, strategy=strategy, seed=s), "dice", factor * v)
    tables = load_tables("s")
    t = gain_table(tables, reference="full").set_index(["backbone", "strategy"])
    assert (
        t.loc[("a.x", "probe")].rpg == pytest.approx(100 * (1.1 / 1.2 - 1))
        and t.versus.eq("full").all()
        and ("a.x", "full") not in t.index
    )
    t = gain_table(tables, reference="unet.none/scratch").set_index(["backbone", "strategy"])
    assert (
        t.loc[("a.x", "full")].rpg == pytest.approx(-20)
        and t.loc[("a.x", "scratch")].rpg == pytest.approx(100 * (1 / 1.5 - 1))
        and ("unet.none", "scratch") not in t.index
    )
    assert len(run_gains(tables, reference="unet.none/scratch")) == 2 * 5
    t = gain_table(tables, reference="specialist")
    assert (
        t.rpg.isna().all()
        and t.reason.eq("no finished run of the reference 'specialist'").all()
        and t.p_holm.isna().all()
    )
    assert gain_table(tables).set_index(["backbone", "strategy"]).loc[("zero.x", "full")].reason == "the reference is 0"


def two_networks(r, seeds, cases, seed_sd, case_sd, rest_sd, gain=0.0):
    """Scores of a tuned and a reference network (seeds, cases): hard cases are hard for both, each training is lucky
    by itself."""
    hard, own = r.normal(0, 0.1, cases), lambda: r.normal(0, case_sd / 2**0.5, cases)
    part = lambda: (
        0.7 + hard + own() + r.normal(0, seed_sd / 2**0.5, (seeds, 1)) + r.normal(0, rest_sd / 2**0.5, (seeds, cases))
    )
    return part() + 0.7 * gain / 100, part()


# standard deviations of a gain between seeds and between cases, in the metric's unit over a score of 0.7: the ratios
# are those that were measured on the phantom (AUC, distortion, Dice, super-resolution)
SPREADS = {
    "cases prevail": (0.005, 0.09), "both": (0.02, 0.12), "seeds prevail": (0.03, 0.09), "seeds alone": (0.06, 0.02),
}

@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_hold_and_nothing_is_found_where_nothing_is(seeds, spread):
    "Of 800 studies; drawn weights, whose gain is zero, are clear in at most 6 %."
    r, held, wrong = np.random.default_rng(seeds), 0, 0
    seed_sd, case_sd = SPREADS[spread]
    for _ in range(400):
        for size in (0.0, 10.0):
            t, m = two_networks(r, seeds, 40, seed_sd, case_sd, 0.05, size)
            found = gain_interval(Pair(Means(t), Means(m), list(range(seeds)), np.arange(40)), "psnr")
            held += found.low <= size <= found.high
            if not size: wrong += found.p <= 0.05
            assert (found.p <= 0.05) == (not found.low <= 0 <= found.high)
    assert held / 800 >= 0.94 and wrong / 400 <= 0.06, (held / 800, wrong / 400)
    assert seeds < 5 or held / 800 <= 0.98, held / 800


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_interval_of_an_auc_holds_too(seeds):
    "Scores of a binormal model, whose AUC is known; a training is better or worse as a whole."
    r, held, label = np.random.default_rng(1), 0, np.arange(60) % 2 == 0
    truth = stats.norm.cdf(1.2 / 2**0.5 / (1 + 0.3**2 / 2) ** 0.5)
    for _ in range(200):
        base = r.normal(size=60)
        make = lambda: Ranking(
            (1.2 + 0.3 * r.normal(size=(seeds, 1))) * label + 0.6 * base + 0.8 * r.normal(size=(seeds, 60)), label
        )
        found = gain_interval(Pair(make(), make(), list(range(seeds)), np.arange(60)), "auc")
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 200 and 0.7 < truth < 0.9


def test_gain_of_auc(runs_root):
    r = np.random.default_rng(0)
    label = r.integers(0, 3, 48)
    value = {}
    for strategy, noise in (("scratch", 1.5), ("full", 0.5)):
        for s in range(3):
            logit = -np.abs(np.arange(3) - label[:, None]) + noise * r.normal(size=(48, 3))
            score = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
            spec = RunSpec(task="classification", strategy=strategy, seed=s)
            value[strategy, s] = roc_auc_score(label == 2, score[:, 2])
            write_record(
                run_folder("s", run_id(spec)),
                new_record(
                    spec, "s", metrics={"auc": value[strategy, s], "kappa": 0.1}, primary="auc",
                    directions={"auc": 1, "kappa": 1},
                ),
                cases=class_cases(label, score),
            )
    row = gain_table(load_tables("s")).iloc[0]
    t, m = (np.mean([value[k, s] for s in range(3)]) for k in ("full", "scratch"))
    assert (
        row.rpg == pytest.approx(100 * (t / m - 1))
        and row.low < row.rpg < row.high
        and row.p < 0.05
        and row.n_cases == 48
    )
    assert np.isfinite(gain_table(load_tables("s"), metric="kappa").rpg[0])


@pytest.mark.parametrize("kind", [Means, Ranking, Agreement])
def test_draws_are_rows_of_an_array(kind):
    "A hundred times the draws are not a call more for each of them."
    r = np.random.default_rng(0)
    made = {
        Means: lambda: Means(r.normal(1, 0.1, (3, 48))),
        Ranking: lambda: Ranking(r.normal(size=(3, 48)), np.arange(48) % 3 == 2),
        Agreement: lambda: Agreement(r.integers(0, 3, (3, 48)), np.arange(48) % 3, 3),
    }[kind]
    pair = Pair(made(), made(), [0, 1, 2], np.arange(48))
    calls(permutation_test, pair, 20)  # what is imported and kept once
    assert calls(permutation_test, pair, 2000) < 1.1 * calls(permutation_test, pair, 20)


# --- convergence

def first(curve, target, direction=1):
    "The first epoch at or past a target, by a loop."
    for e, v in enumerate(curve):
        if direction * v >= direction * target - 1e-12: return e
    return None


def test_convergence_by_hand(study):
    runs = run_convergence(study).set_index(["task", "backbone", "strategy", "seed", "rule"])
    own = 0.2 + 1.1 * np.minimum(EPOCHS * 0.2, 0.5)
    for rule, target in (("scratch", 0.95 * 0.7), ("rise", 0.2 + 0.95 * 0.5), ("own", 0.95 * own.max())):
        row = runs.loc[("segmentation", "a.x", "full", 0, rule)]
        assert (
            row.target == pytest.approx(target)
            and row.epochs == first(own, target)
            and row.seconds == 2 * row.epochs
            and not row.censored
        )
        assert runs.loc[("segmentation", "a.x", "scratch", 0, rule)].epochs == 5
    late = runs.loc[("segmentation", "b.x", "full", 1, "rise")]  # ends at 0.2 + 0.475, exactly 95 % of the rise
    assert late.epochs == 3 and not late.censored
    lost = runs.loc[("segmentation", "c.x", "full", 0)]
    assert lost.loc["scratch"].reason and np.isnan(lost.loc["rise"].epochs) and lost.loc["own"].reason == ""
    assert runs.loc[("segmentation", "a.x", "full", 0, "own")].area == pytest.approx(((own[1:] + own[:-1]) / 2).mean())
    t = convergence_table(study).set_index(["task", "backbone", "strategy", "rule"])
    row = t.loc[("translation", "b.x", "full", "rise")]
    assert row.n_seeds == 3 and row.censored == 0 and row.sooner == 3 and row.seconds_sooner == 6
    assert (t.xs("scratch", level="strategy").sooner == 0).all()


def test_censored_runs_are_kept(runs_root):
    v = np.linspace(0.4, 0.8, 10)
    for s in range(2):
        write("s", RunSpec(strategy="scratch", seed=s), "dice", v, curves=curve("dice", 0.1 * EPOCHS))
        write(
            "s", RunSpec(strategy="full", seed=s), "dice", v, curves=curve("dice", 0.02 * EPOCHS if s else 0.2 * EPOCHS)
        )
    t = convergence_table(load_tables("s")).set_index(["strategy", "rule"]).loc[("full", "scratch")]
    assert t.censored == 1 and t.n_seeds == 2 and t.epochs == (3 + 5) / 2


def test_convergence_where_lower_is_better_and_where_it_means_nothing(runs_root):
    v = np.linspace(1, 2, 10)
    write("s", RunSpec(strategy="scratch"), "hd95", v, -1, curve("hd95", 10.0 - EPOCHS))
    write("s", RunSpec(strategy="full"), "hd95", v, -1, curve("hd95", [9, np.nan, 5.2, 4, 4, 4]))
    write("s", RunSpec(task="k", strategy="scratch"), "kappa", v, 1, curve("kappa", -0.1 - 0.1 * EPOCHS))
    write("s", RunSpec(task="k", strategy="full"), "kappa", v, 1, curve("kappa", 0.1 * EPOCHS))
    runs = run_convergence(load_tables("s")).set_index(["task", "strategy", "rule"])
    assert (
        runs.loc[("segmentation", "full", "scratch")].target == pytest.approx(5 / 0.95)
        and runs.loc[("segmentation", "full", "scratch")].epochs == 2
    )
    assert runs.loc[("segmentation", "full", "rise")].epochs == 2 and runs.loc[
        ("segmentation", "full", "rise")
    ].target == pytest.approx(10 - 0.95 * 5)
    for rule in ("scratch", "rise"):
        assert runs.loc[("k", "full", rule)].reason and np.isnan(runs.loc[("k", "full", rule)].epochs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(0.01, 1), st.sampled_from([1, -1]))
def test_reach_is_the_first_crossing(values, target, direction):
    c = pd.DataFrame({"epoch": range(len(values)), "seconds": np.arange(len(values)) * 1.5, "value": values})
    at = first(values, target, direction)
    e, s, late = first_reached(c, target, direction)
    assert (late, e) == ((True, len(values) - 1) if at is None else (False, at)) and s == 1.5 * e


def test_mean_interval_against_scipy():
    x = np.array([3.0, 4.0, 8.0])
    low, high = stats.t.interval(0.95, 2, loc=x.mean(), scale=stats.sem(x))
    assert mean_interval(x) == pytest.approx((5, low, high))
    assert np.isnan(mean_interval([1.0])[1]) and np.isnan(mean_interval([])[0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.sampled_from([(0, 1), (0, np.inf), (-np.inf, 1), (-1, 1)]))
def test_a_mean_and_its_interval_stay_within_bounds(x, bounds):
    mean, low, high = mean_interval(x, *bounds)
    assert bounds[0] <= low <= mean + 1e-12 and mean - 1e-12 <= high <= bounds[1] and mean == pytest.approx(np.mean(x))


def test_bounded_intervals_against_the_scales_that_they_are_made_on():
    x = np.array([0.90, 0.95, 0.99])
    mean, half = x.mean(), stats.t.ppf(0.975, 2) * stats.sem(x)
    logit = np.log(mean / (1 - mean)) + np.array([-1, 1]) * half / (mean * (1 - mean))
    assert mean + half > 1 and mean_interval(x, 0, 1)[1:] == pytest.approx(1 / (1 + np.exp(-logit)))
    assert mean_interval(x, 0)[1:] == pytest.approx(np.exp(np.log(mean) + np.array([-1, 1]) * half / mean))
    assert mean_interval(x - 0.5, -0.5, 0.5)[1:] == pytest.approx(1 / (1 + np.exp(-logit)) - 0.5) and mean_interval(
        [0.4, 0.4], 0, 1
    ) == (0.4, 0.4, 0.4)
    far = x * 1e-4 + 0.5  # far from both bounds, against its spread: Student's own
    assert mean_interval(far, 0, 1)[1:] == pytest.approx(mean_interval(far)[1:], abs=1e-9)
    with pytest.raises(VfmError, match="1.2 is not between 0 and 1"): mean_interval([0.5, 1.2], 0, 1)


def test_bounded_intervals_hold_the_truth_as_often_as_they_say():
    r, hit = np.random.default_rng(0), {}
    for n in (3, 5, 10):
        x = r.beta(8, 2, (3000, n))  # an AUC around .8, skewed
        ends = [mean_interval(v, 0, 1)[1:] for v in x]
        hit[n] = np.mean([a <= 0.8 <= b for a, b in ends])
    assert all(0.93 < h < 0.98 for h in hit.values()), hit


def test_times_beyond_the_budget_are_open():
    row = dict(
        epochs=6.0, epochs_low=3.0, epochs_high=7.5, sooner=1.0, sooner_low=-2.0, sooner_high=4.0, seconds=3.0,
        seconds_low=1.0, seconds_high=5.0, budget=8.0, seconds_budget=12.0, censored=0, censored_reference=0,
    )
    assert time_words(row, "epochs") == ("6.0", "[3.0, 7.5]") and time_words(row, "sooner") == ("+1.0", "[−2.0, +4.0]")
    late = row | dict(censored=1, epochs_high=np.inf, seconds_high=np.inf, sooner_low=-np.inf)
    assert (
        time_words(late, "epochs") == ("> 6.0", "[3.0, > 8.0]")
        and time_words(late, "sooner") == ("< +1.0", "[< −8.0, +4.0]")
        and time_words(late, "seconds") == ("> 3.0", "[1.0, > 12.0]")
    )
    ref = row | dict(censored_reference=1, sooner_high=np.inf)
    assert time_words(ref, "sooner") == ("> +1.0", "[−2.0, > +8.0]") and time_words(ref, "epochs") == (
        "6.0", "[3.0, 7.5]",
    )
    both = row | dict(censored=1, censored_reference=1, sooner_low=-np.inf, sooner_high=np.inf)
    assert time_words(both, "sooner") == ("+1.0", "[< −8.0, > +8.0]") and time_words(
        row | dict(epochs=np.nan), "epochs"
    ) == ("missing", "")
    assert time_words(row | dict(epochs_low=np.nan, epochs_high=np.nan), "epochs") == ("6.0", "")


# --- association

@settings(max_examples=30, deadline=None)
@given(st.integers(4, 12), st.integers(0, 10**6), st.booleans())
def test_rho_against_scipy(n, seed, ties):
    r = np.random.default_rng(seed)
    x, y = r.normal(size=n), r.integers(0, 4, n) if ties else r.normal(size=n)
    a = associate(x, y, draws=200)
    ref = stats.spearmanr(x, y).statistic if len(np.unique(y)) > 1 else np.nan
    assert a.rho == pytest.approx(ref, nan_ok=True) and a.n == n
    if a.tested:
        assert 0 < a.p <= 1 and a.low <= a.high
        shuffled = r.permutation(n)
        b = associate(x[shuffled], y[shuffled], draws=200)
        assert b.rho == pytest.approx(a.rho) and (not a.exact or b.p == pytest.approx(a.p))
        assert associate(y, x, draws=200).rho == pytest.approx(a.rho) and associate(
            -x, y, draws=200
        ).rho == pytest.approx(-a.rho)
        assert associate(np.exp(x), y, draws=200).rho == pytest.approx(a.rho)


def test_exact_p_against_scipy():
    r = np.random.default_rng(1)
    x, y = r.normal(size=7), r.normal(size=7)
    ref = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert associate(x, y).exact and associate(x, y).p == pytest.approx(ref.pvalue)
    a = associate(r.normal(size=10), r.normal(size=10))
    assert not a.exact and a.p >= 1 / 10_001


def test_bootstrap_of_rho_against_a_loop():
    r = np.random.default_rng(2)
    x = r.normal(size=12); y = x + r.normal(size=12)
    a = associate(x, y)
    values = [stats.spearmanr(x[i], y[i]).statistic for i in r.integers(0, 12, (3000, 12))]
    np.testing.assert_allclose([a.low, a.high], np.percentile(values, [2.5, 97.5]), atol=0.06)


def test_visible_is_the_critical_value():
    "For n = 10 the two-sided 5 % critical value of Spearman's rho in the tables is 0.648."
    r = np.random.default_rng(0)
    assert associate(r.normal(size=10), r.normal(size=10), draws=40_000).visible == pytest.approx(0.648, abs=0.015)


def test_blocks_look_inside_only():
    "Blocks that differ in both variables make a correlation of all, none inside; and the level holds."
    r = np.random.default_rng(0)
    block = np.repeat(np.arange(8), 3)
    x, y = block + 0.1 * r.normal(size=24), block + 0.1 * r.normal(size=24)
    assert associate(x, y).rho > 0.9 and abs(associate(x, y, block).rho) < 0.5
    y = block + 0.1 * r.normal(size=24) - (x - block)
    assert associate(x, y, block).rho < 0 and associate(x, y, block).blocks == 8
    def p(i):
        r = np.random.default_rng(i)
        return associate(block + r.normal(size=24), -3 * block + r.normal(size=24), block, draws=199).p
    p = np.array([p(i) for i in range(200)])
    assert (p <= 0.05).mean() < 0.1 and 0.35 < (p <= 0.5).mean() < 0.65


def test_orders_stay_in_their_block():
    block = np.repeat(np.arange(8), 3)
    index, whole = block_permutations(block, 500, 0)
    assert not whole and (block[index] == block).all() and len(np.unique(index, axis=0)) > 490
    index, whole = block_permutations(np.repeat([0, 1], [2, 4]), 5, 0)
    assert whole and len(np.unique(index, axis=0)) == len(index) == 2 * 24 and (index[:, :2] < 2).all()


def test_too_few_or_nothing():
    for x, y in (
        ([], []), ([1], [2]), ([1, 2, 3], [3, 2, 1]), ([1, 2, np.nan, 4], [1, 2, 3, 4]),
        ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]),
    ):
        a = associate(x, y)
        assert not a.tested and np.isnan(a.p) and "not tested" in association_words(a)
    assert associate([1, 2, 3], [3, 2, 1]).rho == -1


def test_points_and_views(study):
    gains = gain_table(study)
    cells = cell_points(study, gains).set_index(["task", "backbone"])
    assert (
        cells.loc[("translation", "b.x")].d2p == pytest.approx(0.4) and cells.loc[("translation", "b.x")].d2p_seeds == 3
    )
    assert len(run_points(study)) == 12 and run_points(study).d2p.notna().all()
    assert cell_points(study, gains, "stem").d2p.max() == pytest.approx(0.2)
    with pytest.raises(VfmError, match="Did you mean 'stem'"): cell_points(study, gains, "stm")
    marked = gains.assign(overlap=["seen" if b == "b.x" else "not seen" for b in gains.backbone])
    assert set(cell_points(study, marked).overlap) == {"seen", "not seen"}
    apart = cell_points(study, marked, leave_out=("seen", "possibly seen"))
    assert set(apart.backbone) == set(cell_points(study, marked).backbone) - {"b.x"}
    with pytest.raises(VfmError, match="Did you mean 'seen'"): cell_points(study, marked, leave_out=("sen",))
    t = association_table(study, gains, draws=500)
    assert len(t) == 6 and t[t["view"] == "cells"].n.tolist() == [4, 4]
    ref = stats.spearmanr([0.1, 0.2, 0.3, 0.4], [10, -5, 2, 30]).statistic
    assert t[t["view"] == "cells"].rho.iloc[0] == pytest.approx(ref) and t.says.str.len().min() > 20


# --- findings

def test_findings_say_what_the_tables_hold(study):
    said = findings(study)
    gains = gain_table(study).set_index(["task", "backbone"])
    top, low = gains.loc[("translation", "b.x")], gains.loc[("segmentation", "b.x")]
    assert len(said) >= 5 and all(s.endswith(".") for s in said)
    assert (
        "translation with b.x" in said[1]
        and f"; {top.rpg:+.1f} %;" in said[1]
        and f"{top.change:+.3f} Dice against scratch" in said[1]
        and f"{top.change_low:+.3f} to {top.change_high:+.3f}" in said[1]
        and "3 seeds, 20 test cases" in said[1]
    )
    assert (
        said[2].startswith("Largest loss: segmentation with b.x") and f"{low.rpg:+.1f} %".replace("-", "−") in said[2]
    )
    assert "Of 4 cells, 3 gain and 1 loses" in said[0] and "1 of 5 cells are missing" in said[0]
    t = convergence_table(study)
    sooner = t[(t.rule == "rise") & (t.strategy == "full")].sooner.dropna()
    assert f"{sooner.mean():.1f} epochs sooner" in said[3] and "4 cells, 12 runs" in said[3]
    assert (
        "over 4 cells of 2 tasks and 2 backbones" in said[4]
        and "no association, however strong" in said[4]
        and "1 run failed and is missing" in said[5]
    )


def test_findings_of_nothing_claim_nothing(runs_root):
    assert len(findings("nothing")) >= 3 and all("there is no result yet" in s for s in findings("nothing"))
    write("one", RunSpec(strategy="full"), "dice", np.linspace(0, 1, 5))
    assert len(findings("one")) >= 3 and "none of the 1 cells" in findings("one")[0]
    write("one", RunSpec(strategy="scratch"), "dice", np.linspace(0, 1, 5))
    assert len(findings("one")) >= 3 and findings("one")[0].startswith("Of 1 cell, 0 gain and 0 lose")
