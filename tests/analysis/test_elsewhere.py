"""Picks by size and by a study's other tasks, on studies whose truth is known."""
import numpy as np
import pytest
from test_prediction import small

from vfm_notes.analysis.elsewhere import control_table, elsewhere_known, outcome_matrix, size_known
from vfm_notes.analysis.prediction import cell_outcomes, prediction_words
from vfm_notes.analysis.public_matrix import REFERENCE


def test_a_backbone_that_is_best_everywhere_is_picked_without_a_score(runs_root):
    tables = small()
    table = control_table(tables, draws=50).set_index("predictor")
    row = table.loc[REFERENCE]
    assert (row.right, row.regret, row.pairs, row.tasks) == (1, 0, 9, 3) and row.random == pytest.approx(10, abs=0.5)
    assert table.loc["parameter count"].pairs == 0  # nobody counted parameters in these records


def test_the_task_itself_is_never_looked_at(runs_root):
    tables = small()
    end = cell_outcomes(tables, draws=3)
    before = elsewhere_known(end).set_index(["task", "backbone"]).value
    key = next(iter(end))
    turned = end | {key: {b: -v for b, v in end[key].items()}}
    after = elsewhere_known(turned).set_index(["task", "backbone"]).value
    assert before[key[0]].equals(after[key[0]]) and not before.equals(after)


def test_one_task_gives_no_pick(runs_root):
    tables = small(tasks=1)
    end = cell_outcomes(tables, draws=3)
    known = elsewhere_known(end)
    assert known.value.isna().all() and set(known.reason) == {"no other task"}
    assert not control_table(tables, draws=3).pairs.any()
    tables.runs["parameters_trainable"] = tables.runs.backbone.map({"a.x": 30, "b.x": 20, "c.x": 10})
    size = control_table(tables, draws=3).set_index("predictor", drop=False).loc["parameter count"]
    assert size.pairs == 3 and np.isnan(size.right_low), "one task: no interval over tasks"
    assert "3 pairs of backbones" in prediction_words(size)


def test_larger_networks_are_picked_by_size(runs_root):
    tables = small()
    sizes = {"a.x": 30, "b.x": 20, "c.x": 10}  # the worst has most
    tables.runs["parameters_trainable"] = tables.runs.backbone.map(sizes)
    end = cell_outcomes(tables, draws=3)
    assert size_known(tables, end).groupby("backbone").value.first().to_dict() == sizes
    row = control_table(tables, draws=3).set_index("predictor").loc["parameter count"]
    assert row.right == 0 and row.regret == pytest.approx(2 * row.random, abs=1e-6)
    assert outcome_matrix(end, "full", next(iter(end))[2]).shape == (3, 3) and np.isfinite(row.regret)
