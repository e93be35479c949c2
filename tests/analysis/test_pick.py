"""The regret of a ranking's pick, on made studies whose end is known."""
import numpy as np
import pytest
from test_prediction import small

from vfm_notes.analysis.pick import (
    BLIND, RANK, SIZE, Pick, against_words, pick_questions, pick_rows, pick_words, picks, truly_best,
)
from vfm_notes.analysis.prediction import cell_outcomes
from vfm_notes.analysis.public_matrix import REFERENCE
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.blocks import plain_text
from vfm_notes.report.before import after_fine_tuning


def ranked(task, values, direction=1):
    "A ranking as far as picks read it; the largest value comes first."
    rows = [dict(name=b, kind="weights", value=v) for b, v in values.items()]
    rows.append(dict(name="hand_made", kind="control", value=99.0))
    return {"task": task, "by": "probe", "directions": {"probe": direction}, "rows": rows}


@pytest.fixture
def tables(runs_root): return small()


@pytest.fixture
def task(tables): return next(iter(cell_outcomes(tables, "score", draws=2)))[0]


def ends(tables, task):
    "Backbone → test score after fine-tuning, read straight from the runs."
    own = tables.runs[(tables.runs.task == task) & (tables.runs.strategy == "full")]
    return own.groupby("backbone").value.mean().to_dict()


def test_the_regret_is_what_the_best_has_more(tables, task):
    end = ends(tables, task)
    order = sorted(end, key=end.get)
    for pick in order:
        found = picks(ranked(task, {b: float(b == pick) for b in end}), tables, draws=40)
        assert [p.method for p in found][0] == RANK and found[-1].method == BLIND
        assert found[0].picked == pick and found[0].lost[0] == pytest.approx(end[order[-1]] - end[pick], abs=1e-9)
        assert found[-1].lost[0] == pytest.approx(end[order[-1]] - np.mean(list(end.values())), abs=1e-9)
        assert len(found[0].lost) == 41 and (found[0].lost >= -1e-12).all()


def test_a_score_for_which_less_is_better(tables, task):
    end = ends(tables, task)
    best = max(end, key=end.get)
    assert picks(ranked(task, {b: float(b != best) for b in end}, -1), tables, draws=5)[0].picked == best


def test_size_and_other_tasks_are_asked_on_the_same_backbones(tables, task):
    tables.runs["parameters_trainable"] = tables.runs.backbone.map({"a.x": 30, "b.x": 20, "c.x": 10})
    two = ranked(task, {"b.x": 2.0, "c.x": 1.0})  # a.x was not ranked
    asked = pick_questions(two, tables, draws=5)
    assert all(q.backbones == ("b.x", "c.x") for own in asked.values() for q in own)
    assert set(asked) == {RANK, SIZE, REFERENCE}
    found = {p.method: p for p in picks(two, tables, draws=5)}
    assert found[SIZE].picked == "b.x" and truly_best(two, tables)[0].endswith("of 2 backbones")


def test_a_task_that_nobody_fine_tuned(tables, runs_root):
    other = ranked("another", {"a.x": 1.0, "b.x": 2.0})
    assert picks(other, tables, draws=5) == [] and "is not known yet" in pick_words(other, tables, [])
    assert picks(ranked("segmentation", {"a.x": 1.0, "b.x": 2.0}), load_tables("nobody"), draws=5) == []


def test_the_words(tables, task):
    end = ends(tables, task)
    best = max(end, key=end.get)
    good = ranked(task, {b: float(b == best) for b in end})
    found = picks(good, tables, draws=200)
    said = pick_words(good, tables, found)
    assert f"the first of this ranking ({best}) is 0.000 of " in said and "better than a blind choice (+" in said
    assert "what the mean rank elsewhere would give, too" in said  # in this study it finds the same one
    rows = pick_rows(good, tables, found)
    assert rows[0]["pick"] == best and rows[-1]["pick"] == "any" and len(rows) == len(found)


def test_the_page_shows_it(tables, task):
    end = ends(tables, task)
    worst, best = min(end, key=end.get), max(end, key=end.get)
    bad = ranked(task, {b: float(b == worst) for b in end})
    words = " ".join(plain_text(b) for b in after_fine_tuning(bad, tables))
    assert "What fine-tuning gave" in words and f"the first of this ranking ({worst}) is" in words
    assert "worse than the mean rank elsewhere" in words and "worse than a blind choice" in words
    assert f"Best after fine-tuning, by the test score: full, 24 training cases: {best} of 3 backbones" in words
    nothing = after_fine_tuning(ranked("another", end), tables)
    assert len(nothing) == 2 and "is not known yet" in plain_text(nothing[1])


def test_paired_draws_decide():
    "Two picks that vary together are told apart although their own intervals overlap."
    wobble = np.random.default_rng(0).normal(0.5, 0.1, 1000)
    one, other = Pick(RANK, "a", wobble, 1), Pick(BLIND, "any", wobble + 0.01, 1)
    assert one.ends[1] > other.ends[0] and against_words(one, other, "dice").startswith("better than a blind choice")
    assert against_words(one, Pick(SIZE, "b", wobble - 0.01, 1), "dice").startswith("worse than parameter count")
    assert np.isnan(Pick(RANK, "a", np.zeros(1), 1).ends[0])
