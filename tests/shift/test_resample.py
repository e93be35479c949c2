"""Intervals of scores over resampled patients, against rows that are really copied and against theory."""
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, r2_score

from vfm_notes.foundation.registry import scores
from vfm_notes.shift.resample import (
    HALVES, Resampled, interval_of_draws, patient_counts, patient_halves, resampled_answers, resampled_score,
)


def answers(kind, n=90, patients=18, seed=0):
    r = np.random.default_rng(seed)
    groups = np.sort(r.integers(0, patients, n))
    if kind == "classes":
        y = r.integers(0, 3, n)
        return y, np.where(r.random(n) < 0.7, y, (y + 1) % 3), groups
    y = r.normal(size=(n, 2))
    return y, 0.6 * y + r.normal(size=(n, 2)) / 2, groups


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_a_draw_is_the_score_of_copied_rows(kind):
    y, guess, groups = answers(kind)
    counts = patient_counts(18, 40)
    assert counts.shape == (40, 18) and (counts.sum(1) == 18).all()
    found = resampled_answers(y, guess, groups, counts)
    for draw, value in zip(counts, found):
        rows = np.repeat(np.arange(len(y)), draw[groups])
        by_hand = balanced_accuracy_score if kind == "classes" else r2_score
        assert value == pytest.approx(by_hand(y[rows], guess[rows]), abs=1e-10)


def test_the_same_patients_are_drawn_for_every_backbone():
    assert np.array_equal(patient_counts(12, 9), patient_counts(12, 9))
    assert not np.array_equal(patient_counts(12, 9), patient_counts(12, 9, seed=1))
    halves = patient_halves(13)
    assert (halves.sum(1) == 7).all() and len({h.tobytes() for h in halves}) == HALVES
    y, guess, groups = answers("classes")
    a, b = (Resampled(float((g == y).mean()), resampled_answers(y, g, groups, patient_counts(18))) for g in (guess, y))
    low, high = a.minus(a).interval()
    assert low == high == 0  # paired: the same answers never differ
    low, high = a.minus(b).interval()
    assert high < 0 and high - low <= a.interval()[1] - a.interval()[0] + 1e-9


def test_halves_give_the_standard_error_of_a_mean(monkeypatch):
    "Of a mean of independent patients it is known: deviation over the root of their number."
    r = np.random.default_rng(0)
    x, y, groups = r.normal(size=(400, 3)), np.arange(400) % 2, np.arange(400)
    monkeypatch.setitem(scores._entries, "mean of rows", lambda f, t, g=None: float(f[:, 0].mean()))
    monkeypatch.setitem(scores._cards, "mean of rows", {})
    monkeypatch.setattr("vfm_notes.shift.resample.HALVES", 400)
    monkeypatch.setattr("vfm_notes.shift.resample.patient_halves", lambda n, seed: patient_halves(n, 400, seed))
    found = resampled_score("mean of rows", x, y, groups, 400)
    assert found.draws.std() == pytest.approx(x[:, 0].std(ddof=1) / 20, rel=0.12)
    assert found.draws.mean() == pytest.approx(found.value) == pytest.approx(x[:, 0].mean())


def test_rows_of_a_patient_stay_together():
    "Copies of a patient's rows say nothing new, so the interval is that of the patients."
    y, guess, _ = answers("classes", 60)
    each, many = np.arange(60), np.repeat(np.arange(60), 5)
    one = resampled_answers(y, guess, each, patient_counts(60))
    copied = resampled_answers(np.repeat(y, 5), np.repeat(guess, 5), many, patient_counts(60))
    assert np.allclose(one, copied)


def test_intervals_without_enough_draws_are_missing():
    assert all(np.isnan(interval_of_draws(0.5, np.array([np.nan, 0.5]))))
    low, high = interval_of_draws(0.5, np.full(HALVES, 0.5))
    assert low == high == 0.5
