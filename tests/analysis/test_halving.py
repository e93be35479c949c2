"""Early curves and successive halving on made studies whose end is known."""
from itertools import product

import numpy as np
import pandas as pd
import pytest

from vfm_notes.analysis.halving import (
    EARLY, SHARES, early_table, early_values, early_words, halve, halving_table, halving_words, mean_curves, value_at,
)
from vfm_notes.analysis.risk import LADDERS, ladder_rows, ladder_table, risk_lines, shipped_risk, write_risk
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.runs.race import KEEP, RUNGS, races_of, standing
from vfm_notes.runs.record import new_record, read_records, write_record

EPOCHS = 20
BACKBONES = {"a.x": 0.1, "b.x": 0.2, "c.x": 0.3, "d.x": 0.4}  # what tuning adds in the end


def write(task, backbone, strategy, seed, level, early):
    spec = RunSpec(task=task, backbone=backbone, strategy=strategy, seed=seed, n_train=24)
    v = np.random.default_rng([len(task), 1]).normal(0.5, 0.02, 16) + level
    cases = [{"case": f"c{i:02}", "patient": f"p{i:02}", "metric": "dice", "value": x} for i, x in enumerate(v)]
    rows = [(e, float(e), name, value) for e in range(EPOCHS + 1) for name, value in (
        ("val_dice", 0.5 + (early if e < 8 else level) * e / EPOCHS), ("loss", 1 - early * e / EPOCHS),
        ("d2p_embed", early * e / EPOCHS))]
    curves = pd.DataFrame(rows, columns=["epoch", "seconds", "name", "value"])
    control = [c | {"metric": "control_dice", "value": 0.1} for c in cases]
    write_record(run_folder("s", run_id(spec)), new_record(
        spec, "s", metrics={"dice": float(v.mean())}, primary="dice", directions={"dice": 1}, scores=[],
        d2p=[dict(layer="embed", mmd2=0.1, seed=0)]), cases=cases + control, curves=curves)


def study(turned=False):
    "Where `turned`, the early curves rank the backbones the other way round."
    for t, (b, level), s in product(("task", "taskx", "taskxx"), BACKBONES.items(), range(2)):
        write(t, b, "scratch", s, 0.0, 0.0)
        write(t, b, "full", s, level, 0.5 - level if turned else level)
    return load_tables("s")


def test_a_share_before_the_first_epoch_has_no_value():
    curve = pd.Series({0: 0.1, 1: 0.2, 2: 0.3, 10: 0.9})
    assert np.isnan(value_at(curve, 10, 0.05)) and value_at(curve, 10, 0.1) == 0.2
    assert value_at(curve, 10, 0.99) == 0.3 and value_at(curve, 10, 1.0) == 0.9


def test_halving_by_hand():
    flat = lambda v: pd.Series({e: v for e in range(1, 9)}, dtype=float)
    rank, saved = halve({k: flat(v) for k, v in dict(p=4, q=3, r=2, s=1, t=0).items()}, 8, (0.25, 0.5))
    assert rank == dict(t=0, s=1, r=2, q=3, p=4) and saved == pytest.approx(1 - (2 + 2 + 4 + 8 + 8) / 40)
    assert halve({"p": flat(1)}, 8) == ({"p": 0}, 0.0)  # nobody to compare with
    rank, saved = halve({"p": flat(1), "q": flat(2)}, 4, (0.1,))  # no epoch is over by then
    assert saved == 0 and rank == dict(p=0, q=1)


def test_curves_that_know_and_curves_that_mislead(runs_root):
    table = early_table(study(), draws=20).set_index(["curve", "share"])
    assert (table.loc["validation"].loc[[0.05, 0.1, 0.2, 0.5]].right == 1).all()
    assert table.loc[("validation", 0.01)].pairs == 0 and table.loc[("validation", 0.02)].pairs == 0
    assert table.loc[("loss", 0.1)].right == 1 and table.loc[("distance", 0.1)].right == 0  # its sign is fixed
    assert set(table.index.get_level_values(0)) == set(EARLY) and len(table) == len(EARLY) * len(SHARES)
    assert early_words(table.reset_index())[0].startswith("After 5 % of the epochs the validation curve has 18 of 18")


def test_halving_finds_the_best_and_says_what_it_risked(runs_root):
    row, spared = halving_table(study(), draws=50)
    assert row["regret"] == pytest.approx(0, abs=1e-9) and row["random"] == pytest.approx(0.15, abs=1e-6)
    assert spared == pytest.approx(1 - (5 + 5 + 10 + 20) / 80) and "regret_low" in row
    assert "would have spared 50 %" in halving_words(row, spared)


def test_halving_stops_the_winner_where_early_curves_mislead(runs_root):
    row, spared = halving_table(study(turned=True), draws=50)
    # the two best are stopped after 5 of 20 epochs; of the two others the better one is chosen, as the curves turned
    assert row["regret"] == pytest.approx(0.2, abs=1e-6) and spared == 0.5
    assert row["regret"] > row["random"]


def test_the_replay_is_the_race(runs_root):
    "The cells that the command would stop, at the same epochs, are those that the replay stops."
    tables = study(turned=True)
    specs = [RunSpec(task=t, backbone=b, strategy="full", seed=s, n_train=24, epochs=EPOCHS)
             for t in ("task", "taskx", "taskxx") for b in BACKBONES for s in range(2)]
    held, _ = races_of(specs)
    assert len(held) == 3
    kept = {tuple(r["spec"][k] for k in ("task", "backbone", "strategy", "seed")): r for r in read_records("s")}
    plain = {run_id(s): kept[s.task, s.backbone, s.strategy, s.seed] for s in specs}
    for race in held:
        now = standing("s", race, plain)
        assert list(now.stopped) == ["d.x", "c.x", "a.x"] and now.left == ["b.x"]
        curves, epochs = mean_curves(tables, race.key, list(BACKBONES))
        rank, spared = halve(curves, epochs)
        assert sorted(rank, key=rank.get) == [*now.stopped, *now.left]
        ran = {c: s["epoch"] for c, s in now.stopped.items()} | {c: EPOCHS for c in now.left}
        assert spared == pytest.approx(1 - sum(ran.values()) / (EPOCHS * len(ran)))


def test_ladders_that_stop_later_risk_less(runs_root):
    "Until a third of the epochs the curves mislead: comparing at a half finds the best, so does stopping nothing."
    tables = study(turned=True)
    rows = {(tuple(r["rungs"]), r["keep"]): r for r in ladder_rows(tables)}
    assert rows[RUNGS, KEEP]["best"] == 0 and rows[RUNGS, KEEP]["questions"] == 3
    assert rows[(0.5,), KEEP]["best"] == 3 and rows[(0.5,), KEEP]["regret"] == pytest.approx(0, abs=1e-9)
    assert rows[(), KEEP]["spared"] == 0 and rows[(), KEEP]["best"] == 3
    # of four one is stopped at 5 of 20 epochs, the best one; of three all go on
    assert rows[RUNGS, 0.75]["spared"] == pytest.approx(1 - 65 / 80) and rows[RUNGS, 0.75]["best"] == 0
    # in points of gain over the scratch model of 0.5: the pick has 0.7, the best 0.9
    assert rows[RUNGS, KEEP]["regret"] == pytest.approx(100 * 0.2 / 0.5, rel=0.02)
    assert rows[RUNGS, KEEP]["random"] == pytest.approx(100 * 0.15 / 0.5, rel=0.02)


def test_what_is_told_of_the_risk(runs_root, tmp_path):
    assert shipped_risk(tmp_path/"none.json") == []
    study()
    (line,) = risk_lines()
    assert line.startswith("Risk, replayed on finished studies here: study s, 3 questions: 50 % of the epochs spared")
    assert "best cell chosen in 3 of 3, regret 0.0 percentage points of gain (95 % interval 0.0 to 0.0)" in line
    path = write_risk(tmp_path/"halving.json")
    kept = shipped_risk(path)
    assert len(kept) == len(LADDERS) and kept[0]["study"] == "s" and len(ladder_table(kept)) == len(LADDERS)


def test_seeds_are_averaged_before_they_are_compared(runs_root):
    tables = study()
    values = early_values(tables, "validation", 0.1)
    assert len(values) == 3 * 4 * 2 * 2 and set(values.seed) == {0, 1}


def test_nothing_to_replay(runs_root):
    row, spared = halving_table(load_tables("s"), draws=5)
    assert not row["pairs"] and np.isnan(spared) and "cannot be replayed" in halving_words(row, spared)
    assert early_words(early_table(load_tables("s"), draws=5)) == []
