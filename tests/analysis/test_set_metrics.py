"""Metrics of a set under re-drawn and exchanged cases: every task's own summary of the same cases is the judge, and
scikit-learn where a task keeps parts."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import recall_score
from test_tasks import SPEC

from vfm_notes.analysis import set_metrics
from vfm_notes.analysis.gain import Pair, _scores, permutation_test, gain_interval, pair_cases
from vfm_notes.analysis.set_metrics import SET_METRICS, columns_of, exchanged_difference, set_metric, weighted_auc
from vfm_notes.foundation.registry import tasks
from vfm_notes.tune import catalog  # fills the registries
from vfm_notes.tune.transfer import build_model, run_data

NAMES = list(tasks)


@pytest.fixture(scope="module", params=NAMES)
def judged(request):
    "A task, and the rows of three runs with random answers."
    task, data = run_data(replace(SPEC, task=request.param, backbone="profound_toy.x"))
    shape = (
        build_model(replace(SPEC, task=request.param, backbone="profound_toy.x"), task, 3)
        .eval()(data["test"].inputs)
        .shape
    )
    g = torch.Generator().manual_seed(0)
    return task, [task.evaluate(2 * torch.randn(shape, generator=g), data["test"]) for _ in range(3)]


def drawn(cases, often):
    "The rows with every case as often as it was drawn."
    names = sorted(cases["case"].unique())
    return pd.concat([
        cases[cases["case"] == n].assign(case=f"{n}#{k}") for n, times in zip(names, often) for k in range(int(times))
    ])


def scores(frames, metric, task):
    names = sorted(frames[0]["case"].unique())
    return _scores(dict(enumerate(frames)), list(range(len(frames))), metric, getattr(task, "positive", np.nan), names)


def judge(task, cases):
    "What the task itself says of these rows, by metric."
    told = task.summary(cases)
    if "macro_recall" not in task.metrics: return told
    label, score = task.table(cases)
    return told | {"macro_recall": recall_score(label, score.argmax(1), average="macro", labels=np.unique(label))}


def test_every_metric_of_every_task_can_be_drawn_again(judged):
    task, frames = judged
    w = np.random.default_rng(1).multinomial(8, np.full(8, 1 / 8), size=12).astype(float)
    told = [[judge(task, drawn(f, often)) for often in w] for f in frames]
    for metric in task.metrics:
        found, expected = scores(frames, metric, task).weighted(w), [[t[metric] for t in own] for own in told]
        np.testing.assert_allclose(
            found, expected, atol=1e-9,
            err_msg=f"{metric}: register it in analysis.set_metrics, if it is no mean over cases",
        )


def test_every_metric_of_every_task_can_be_exchanged(judged):
    task, frames = judged
    names = sorted(frames[0]["case"].unique())
    flip = np.random.default_rng(2).integers(0, 2, (6, len(names))).astype(bool)
    known, told = [m for m in task.metrics if m in SET_METRICS], []
    for row in flip if known else ():
        moved = {n for n, f in zip(names, row) if f}
        swap = lambda a, b: pd.concat([a[~a["case"].isin(moved)], b[b["case"].isin(moved)]])
        told.append([(judge(task, swap(a, b)), judge(task, swap(b, a))) for a, b in zip(frames[:2], frames[1:])])
    for metric in known:
        one, other = scores(frames[:2], metric, task), scores(frames[1:], metric, task)
        expected = [np.mean([a[metric] - b[metric] for a, b in pairs]) for pairs in told]
        np.testing.assert_allclose(exchanged_difference(one, other, flip), expected, atol=1e-9, err_msg=metric)


@pytest.mark.parametrize("metric", SET_METRICS)
def test_a_registered_metric_has_gain_interval_and_test(metric):
    rng = np.random.default_rng(3)
    def run(good):
        label = np.arange(40) % 2
        score = np.clip(0.5 + good * (label - 0.5) + rng.normal(0, 0.3, 40), 0.01, 0.99)
        truth = rng.normal(0, 5, 40)
        rows = {
            "label": label, "score_0": 1 - score, "score_1": score, "label_a": label, "score_a": score,
            "label_b": 1 - label, "score_b": 1 - score, "lesions": label, "hit_0": label, "confidence_0": score,
            "truth": truth, "predicted": truth + rng.normal(0, 2 - 1.5 * good, 40),
            "mae": np.abs(rng.normal(0, 2 - 1.5 * good, 40)),
        }
        if metric == "mean_auc": rows = {k: v for k, v in rows.items() if k not in ("label", "score_0", "score_1")}
        return pd.concat([
            pd.DataFrame({
                "case": [f"c{i:02d}" for i in range(40)], "patient": [f"p{i // 2}" for i in range(40)], "metric": k,
                "value": v,
            })
            for k, v in rows.items()
        ])
    cases = {"t0": run(1), "t1": run(1), "r0": run(0), "r1": run(0)}
    table = lambda side: pd.DataFrame({"id": [f"{side}0", f"{side}1"], "seed": [0, 1], "positive": np.nan})
    pair = pair_cases(cases, table("t"), table("r"), metric, -1 if metric == "rmse" else 1)
    assert isinstance(pair, Pair) and pair.n_cases == 40
    found = gain_interval(pair, metric)
    assert found.low < found.value < found.high and found.value > 0 and found.undefined == 0 and found.smallest > 0
    assert (
        permutation_test(pair, 300) < 0.05
        and permutation_test(Pair(pair.tuned, pair.tuned, pair.seeds, pair.patients), 300) == 1
    )


def test_registering_is_enough(monkeypatch):
    monkeypatch.setattr(set_metrics, "SET_METRICS", SET_METRICS)
    monkeypatch.setitem(SET_METRICS, "made_up", None)
    set_metric("made_up", "truth")(lambda c, w: (w * c["truth"]).max(1))
    rows = pd.DataFrame({"case": ["a", "b"], "metric": "truth", "value": [2.0, 5.0]})
    assert SET_METRICS["made_up"].value(columns_of(rows, "made_up"), np.array([[1.0, 0.0], [1.0, 2.0]])).tolist() == [
        2.0, 10.0,
    ]


def test_draws_without_one_kind_are_undefined_and_ties_count_half():
    label, score = np.array([[0, 1, 1, 0]]), np.array([[0.5, 0.5, 0.9, 0.1]])
    assert (
        np.isnan(weighted_auc(label, score, np.array([[0.0, 1, 1, 0]]))).all()
        and weighted_auc(label, score, np.ones((1, 4)))[0] == (0.5 + 3) / 4
    )
