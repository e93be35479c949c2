"""Picks of early numbers against enumeration, loops and studies whose truth is known."""
from dataclasses import replace
from itertools import permutations, product
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from vfm_notes.analysis.findings import findings
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.prediction import (
    Question, score_answer, answers, judge_predictor, cell_outcomes, prediction_points, pool_answers,
    prediction_finding, prediction_table, prediction_words, predictors, random_regret, regret, right_pairs, rights_test,
    task_rights,
)
from vfm_notes.analysis.tables import load_tables, moments_table, scores_table
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.quantity import EXACT
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.runs.record import new_record, write_record

values = st.lists(st.integers(-3, 3), min_size=2, max_size=6)


def question(value, outcome, task="a", strategy="full"):
    return Question(
        (task, strategy, 8), tuple(f"b{i}" for i in range(len(value))), np.array(value, float),
        np.atleast_2d(np.array(outcome, float)),
    )


# --- one pick

@settings(max_examples=100, deadline=None)
@given(values, st.integers(0, 10**6))
def test_laws_of_a_pick(value, seed):
    r, v = np.random.default_rng(seed), np.array(value, float)
    o = r.integers(-4, 5, len(v)).astype(float)
    tied = [o[i] for i in range(len(v)) if v[i] == max(v)]
    assert regret(v, o) == pytest.approx(max(o) - sum(tied) / len(tied)) and regret(v, o) >= 0
    assert random_regret(o) == pytest.approx(np.mean([max(o) - x for x in o]))
    assert (
        regret(o, o) == 0 and regret(np.exp(v), o) == regret(v, o) and regret(v, o + 7) == pytest.approx(regret(v, o))
    )
    loop = sum(
        1.0 if (v[i] - v[j]) * (o[i] - o[j]) > 0 else 0.5 if (v[i] - v[j]) * (o[i] - o[j]) == 0 else 0.0
        for i in range(len(v))
        for j in range(i)
    )
    pairs = len(v) * (len(v) - 1) / 2
    assert right_pairs(v, o) == loop and right_pairs(-v, o) == pairs - loop and right_pairs(o, v) == loop
    if len(set(v)) == len(v) and len(set(o)) == len(o):
        assert 2 * loop / pairs - 1 == pytest.approx(stats.kendalltau(v, o).statistic)


def test_random_pick_is_the_mean_over_all_orders():
    o = np.array([3.0, 1.0, 4.0, 1.5])
    assert np.mean([regret(np.array(p, float), o) for p in permutations(range(4))]) == pytest.approx(random_regret(o))
    assert np.mean([right_pairs(np.array(p, float), o) for p in permutations(range(4))]) == 3


def weighted(x, y):
    "Vigna's additive hyperbolic τ by its definition, mean of the ranks by x and by y."
    def one(order):
        rank = np.empty(len(x)); rank[order] = np.arange(len(x))
        w = lambda i, j: 1 / (rank[i] + 1) + 1 / (rank[j] + 1)
        pairs = [(i, j) for i in range(len(x)) for j in range(i)]
        return sum(w(i, j) * np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs) / sum(
            w(i, j) for i, j in pairs
        )
    return (one(np.argsort(-x)) + one(np.argsort(-y))) / 2


def test_answer_of_one_question():
    r = np.random.default_rng(0)
    v, o = r.normal(size=6), r.normal(size=6)
    row = score_answer(question(v, np.stack([o, *(o + 0.1 * r.normal(size=(300, 6)))])))
    assert (
        row["tau"] == pytest.approx(weighted(v, o))
        and row["rho"] == pytest.approx(stats.spearmanr(v, o).statistic)
        and row["tested"]
    )
    assert (
        row["picked"] == f"b{v.argmax()}"
        and row["best"] == f"b{o.argmax()}"
        and row["low"] <= row["high"]
        and row["regret"] == pytest.approx(o.max() - o[v.argmax()])
    )
    two = score_answer(question([1, 2], [5, 3]))
    assert (
        (two["tau"], two["right"], two["regret"], two["random"]) == (-1, 0, 2, 1)
        and not two["tested"]
        and "fewer than 4" in two["why"]
    )
    flat = score_answer(question([1, 1, 1], [5, 3, 1]))
    assert (
        flat["regret"] == flat["random"] == 2
        and np.isnan(flat["tau"])
        and "same for all" in flat["why"]
        and flat["picked"] == "b0 or b1 or b2"
    )
    assert (
        "fewer than two" in score_answer(question([1], [5]))["why"] and score_answer(question([1], [5]))["pairs"] == 0
    )


# --- all tasks

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3), st.integers(2, 3))
def test_p_against_all_orders(seed, k, tasks):
    r = np.random.default_rng(seed)
    v, o = r.integers(0, 4, (tasks, 2, k)).astype(float), r.normal(size=(tasks, 2, k))  # two strategies a task
    pairs = tasks * 2 * k * (k - 1) // 2
    p, least = rights_test([task_rights(a, b) for a, b in zip(v, o)], pairs)
    total = [
        sum(right_pairs(v[t, s][list(ps[t])], o[t, s]) for t in range(tasks) for s in range(2))
        for ps in product(permutations(range(k)), repeat=tasks)
    ]
    far = np.abs(np.array(total) - pairs / 2)
    assert (
        p == pytest.approx((far >= far[0] - 1e-9).mean())
        and least == pytest.approx((far >= far.max() - 1e-9).mean())
        and least <= p + 1e-12
    )


def test_drawn_orders_are_orders_drawn_alike():
    "Nine backbones have more orders than are counted: right pairs scatter as those of all orders (Kendall 1938)."
    k, draws = 9, 4000
    assert factorial(k) > EXACT
    rights = task_rights(np.arange(k)[None], np.arange(k)[None].astype(float), draws, 0) / 2
    assert rights[0] == k * (k - 1) / 2 and len(rights) == draws + 1
    sd = (k * (k - 1) * (2 * k + 5) / 72) ** 0.5
    assert abs(rights[1:].mean() - k * (k - 1) / 4) < 4 * sd / draws**0.5
    assert rights[1:].std() == pytest.approx(sd, rel=0.05)


def test_pooled_numbers_by_hand():
    asked = [
        question([1, 2], [1, 3], "a"), question([1, 2], [4, 1], "b"), question([5, 1, 3], [6, 0, 5], "c"),
        question([1], [1], "d"),
    ]
    row = pool_answers(asked)
    assert (row["questions"], row["tasks"], row["pairs"], row["cells"]) == (3, 3, 5, 7)
    assert (
        row["right"] == pytest.approx((1 + 0 + 3) / 5)
        and row["regret"] == pytest.approx((0 + 3 + 0) / 3)
        and row["random"] == pytest.approx((1 + 1.5 + (6 + 1) / 3) / 3)
    )
    # no draws, no interval
    assert row["saved"] == pytest.approx(row["random"] - row["regret"]) and row["tested"] and np.isnan(row["right_low"])
    assert (
        not pool_answers(asked[:1])["tested"]
        and "fewer than 4" in pool_answers(asked[:1])["why"]
        and pool_answers([asked[3]])["pairs"] == 0
        and pool_answers([])["questions"] == 0
    )


def test_pooled_interval_against_a_loop():
    r = np.random.default_rng(0)
    asked = [
        question(r.normal(size=4), o + 0.2 * np.concatenate([np.zeros((1, 4)), r.normal(size=(2000, 4))]), f"t{i}")
        for i, o in enumerate(r.normal(size=(6, 4)))
    ]
    row, found = pool_answers(asked), []
    for _ in range(2000):
        pick, d = r.integers(0, 6, 6), r.integers(1, 2001)
        found.append(
            np.mean([random_regret(asked[i].outcome[d]) - regret(asked[i].value, asked[i].outcome[d]) for i in pick])
        )
    np.testing.assert_allclose([row["saved_low"], row["saved_high"]], np.percentile(found, [2.5, 97.5]), atol=0.08)


def test_p_is_uniform_when_a_score_knows_nothing():
    p = []
    for i in range(300):
        r = np.random.default_rng(i)
        p.append(pool_answers([question(r.normal(size=4), r.normal(size=4), f"t{t}") for t in range(5)])["p"])
    assert np.mean(np.array(p) <= 0.05) <= 0.08 and 0.35 < np.mean(np.array(p) <= 0.5) < 0.62


# --- a study

def write(task, backbone, strategy, seed, factor, score=None, early=None, reason="", n_train=24, direction=1):
    easy = np.random.default_rng([len(task), 1]).normal(0.6, 0.05, 16)
    v = easy * factor + 0.001 * np.random.default_rng([seed, len(backbone)]).normal(size=16)
    spec = RunSpec(task=task, backbone=backbone, strategy=strategy, seed=seed, n_train=n_train)
    cases = [{"case": f"c{i:02}", "patient": f"p{i:02}", "metric": "dice", "value": x} for i, x in enumerate(v)]
    rows = (
        []
        if strategy == "scratch"
        else [
            dict(score=s, layer=l, value=score, n=40, features=8, direction=1, seconds=0.1, reason=reason)
            for s in ("logme", "knn")
            for l in ("embed", "stem")
        ]
    )
    moments = (
        []
        if early is None
        else [
            dict(
                when="early", step=2, layer="embed", mmd2=early, mmd2_independent=early, p_value=0.1, bandwidth=1.0,
                n=24, seed=0,
            )
        ]
    )
    write_record(
        run_folder("s", run_id(spec)),
        new_record(
            spec, "s", metrics={"dice": float(v.mean())}, primary="dice", directions={"dice": direction}, scores=rows,
            d2p_moments=moments, d2p=[dict(layer="embed", mmd2=0.1, seed=0)],
        ),
        cases=cases,
    )


def small(tasks=3, strategies=("full",), broken=False):
    for t, (i, b), s in product([f"task{'x' * t}" for t in range(tasks)], enumerate(("a.x", "b.x", "c.x")), range(2)):
        write(t, b, "scratch", s, 1.0)
        for strategy in strategies:
            write(
                t, b, strategy, s, 1 + 0.1 * i, None if broken and i == 0 else 0.5 + i, 0.3 - 0.1 * i,
                "one class only" if broken and i == 0 else "",
            )
    return load_tables("s")


def test_a_study_where_the_score_knows(runs_root):
    tables = small()
    t = prediction_table(tables, draws=200)
    assert (
        set(t.predictor) == {"logme", "knn", "early distance"}
        and t.counts.sum() == 3
        and set(t.layer) == {"", "embed", "stem"}
    )
    row = t[t.counts & (t.predictor == "logme")].iloc[0]
    assert (
        (row.right, row.regret, row.tau, row.pairs) == (1, 0, 1, 9)
        and row.random == pytest.approx(10, abs=0.5)
        and row.saved_low > 5
        and row.p < 0.01
        and row.p_holm >= row.p
    )
    assert t[t.counts & (t.predictor == "early distance")].right.iloc[0] == 1  # less is better
    assert "9 of 9 pairs" in prediction_words(row) and "picked better than chance" in prediction_finding(t)
    by_score = prediction_table(tables, outcome="score", draws=50)
    assert by_score[by_score.counts].right.eq(1).all() and "of the score" in prediction_words(by_score.iloc[0])
    end, gains = cell_outcomes(tables, draws=100), gain_table(tables).set_index(["task", "backbone"])
    for key, brought in end.items():
        for b, v in brought.items():
            assert (
                v[0] == pytest.approx(gains.loc[(key[0], b)].rpg)
                and abs(np.percentile(v[1:], 97.5) - gains.loc[(key[0], b)].high) < 1
            )
    by = answers(tables, draws=50)
    assert len(by) == 3 * (2 * 2 + 1) and (by.picked == "c.x").all() and (by.best == "c.x").all()
    shown = prediction_points(tables, gain_table(tables))
    assert (
        len(shown) == 3 * 3 * 3
        and shown.groupby(["predictor", "task"]).place.mean().abs().max() < 1e-9
        and (shown[shown.backbone == "c.x"].place > 0.9).all()
    )
    assert any(f.startswith("Known before fine-tuning") for f in findings(tables))
    with pytest.raises(VfmError, match="Did you mean 'score'"): prediction_table(tables, outcome="scor")


def test_lower_is_better_turns_the_score_around(runs_root):
    for (i, b), s in product(enumerate(("a.x", "b.x")), range(2)):
        for strategy in ("scratch", "full"):
            write("task", b, strategy, s, 1 + 0.1 * i * (strategy == "full"), float(i), direction=-1)
    t = prediction_table(load_tables("s"), "score", draws=20)
    assert t[t.counts].right.eq(0).all() and t[t.counts].regret.gt(0).all()


def test_missing_values_are_left_out_and_named(runs_root):
    tables = small(broken=True)
    t, by = prediction_table(tables, draws=20), answers(tables, draws=20)
    row = t[t.counts & (t.predictor == "logme")].iloc[0]
    assert row.pairs == 3 and row.missing == 3 and row.backbones == 2
    assert (
        by[by.predictor == "logme"].missing.eq("a.x: one class only").all()
        and by[by.predictor == "early distance"].missing.eq("").all()
    )
    asked = judge_predictor(
        predictors(tables).query("predictor == 'logme' and layer == 'embed'"), cell_outcomes(tables, draws=5)
    )
    assert all(q.backbones == ("b.x", "c.x") and "a.x" in q.missing for q in asked)


def test_strategies_share_a_score_and_are_exchanged_together(runs_root):
    three = small(2, ("full", "probe", "lora rank=4"))
    fewer = lambda t: t[t.strategy.isin(["scratch", "full"])]
    one = replace(three, runs=fewer(three.runs), metrics=fewer(three.metrics), scores=fewer(three.scores))
    a, b = (prediction_table(t, draws=20) for t in (one, three))
    a, b = (t[t.counts & (t.predictor == "logme")].iloc[0] for t in (a, b))
    # more strategies are no more evidence about a score
    assert b.questions == 3 * a.questions and b.tasks == a.tasks and b.p == pytest.approx(a.p)


def test_records_without_scores(runs_root):
    for s in ("scratch", "full"): write("task", "a.x", s, 0, 1.0)
    tables = load_tables("s")
    tables.scores = tables.scores[:0]
    assert (
        prediction_table(tables).empty and answers(tables).empty and prediction_points(tables, gain_table(tables)).empty
    )
    assert "there is no result yet" in prediction_finding(prediction_table(tables)) and not any(
        "Known" in f for f in findings(tables)
    )
    empty = load_tables("nothing")
    assert prediction_table(empty).empty and empty.scores.empty and empty.moments.empty


def test_one_backbone_has_nothing_to_choose(runs_root):
    for s in ("scratch", "full"): write("task", "a.x", s, 0, 1.0, 0.7)
    t = prediction_table(load_tables("s"), draws=20)
    assert (
        (t.pairs == 0).all()
        and t.why.str.contains("two backbones").all()
        and "two backbones" in prediction_words(t.iloc[0])
        and "there is no result yet" in prediction_finding(t)
    )


def test_tables_of_records(runs_root):
    tables = small(1)
    assert (
        len(tables.scores) == 6 * 4
        and set(tables.moments["when"]) == {"early"}
        and tables.scores.seed.isin([0, 1]).all()
        and "permutation_seed" in tables.moments
    )
    assert scores_table([]).empty and moments_table([]).empty
