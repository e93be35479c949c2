"""Which distance tells: a planted look is found, and of studies without one at most one in twenty names a look."""
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from vfm_notes.analysis.tables import Tables, d2p_table, moments_table
from vfm_notes.analysis.which import (
    LOOK_COLUMNS, answer_words, ask, ask_again, exchanges, layer_places, made_up, measured, question, tuned_runs,
)


def shares(n, **settings):
    "Share of made-up studies that name a look, and that name the first one."
    told = right = 0
    for i in range(n):
        found = ask(made_up(np.random.default_rng((7, i)), **settings), 200, i)
        told += found.tells
        right += found.tells and found.best == 0 and found.winner.confirmed < 0
    return told / n, right / n


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])  # of the variance: weights alike in all tasks
def test_without_a_look_that_tells_none_is_named(shared):
    "The share of false winners stays under six percent, also where both halves share what weights do."
    told, _ = shares(400, shared=shared)
    assert told <= 0.06, told


def test_the_halves_alone_would_be_fooled_by_what_weights_share():
    "A plain test of the chosen look on the other half names one far too often: whole weights have to be exchanged."
    fooled = 0
    for i in range(200):
        q = made_up(np.random.default_rng((8, i)), shared=0.9)
        a = ask(q, 1, i)
        second = (q.cells.half == 1).to_numpy()
        x, y = q.distance[a.best][second] * np.sign(a.winner.chosen), q.cells.outcome.to_numpy()[second]
        fooled += pearsonr(x, y, alternative="greater").pvalue <= 0.05
    assert fooled / 200 > 0.15, fooled / 200


def test_a_look_that_follows_the_outcome_is_found():
    told, right = shares(60, strength=0.95)
    assert right >= 0.8 and told - right <= 0.1, (told, right)


def test_p_is_the_share_of_exchanges_by_hand():
    "One block of four weights a half: all 24 exchanges, each with its own choice, counted one after the other."
    rng = np.random.default_rng(3)
    q = made_up(rng, tasks=2, weights=4, looks=3)
    a = ask(q, 4000, 1)
    d, y = q.distance.reshape(3, 2, 4), q.cells.outcome.to_numpy().reshape(2, 4)
    def end(order):
        first = [pearsonr(d[k, 0, list(order)], y[0]).statistic for k in range(3)]
        best = int(np.argmax(np.abs(first)))
        return best, np.sign(first[best]) * pearsonr(d[best, 1, list(order)], y[1]).statistic
    best, mine = end(range(4))
    p = np.mean([end(o)[1] >= mine - 1e-9 for o in permutations(range(4))])
    assert a.best == best and a.p == pytest.approx(p, abs=0.03)
    assert a.winner.confirmed * np.sign(a.winner.chosen) == pytest.approx(mine)


def test_weights_are_exchanged_inside_their_architecture_and_set_of_tasks():
    cells = pd.DataFrame(
        [(f"{t} {n}", f"{n}.{w}") for t in "ab" for n in ("net", "other") for w in "xyz"]
        + [("a net", "net.alone")], columns=["block", "backbone"],
    )
    for row in exchanges(cells, 100, 0):
        given = cells.iloc[row]
        assert sorted(row) == list(range(len(cells))) and (given.block.to_numpy() == cells.block.to_numpy()).all()
        to = {(b, g) for b, g in zip(cells.backbone, given.backbone)}
        assert len(to) == cells.backbone.nunique()  # the same in all tasks
    assert (exchanges(cells, 100, 0)[:, -1] == len(cells) - 1).all()


# --- from records

def record(task, weights, seed, match, rng, net="profound_toy", strategy="full"):
    "A finished run: gain follows the match, and so does one look of many, with the opposite sign."
    layers = ["stage1", "stage2", "stage3", "stage4", "embed"]
    row = lambda layer, **more: {
        "layer": layer, "mmd2": rng.uniform(0.1, 1), "ceiling": 1.4, "relative": rng.uniform(0.1, 1), "n": 8,
        "seed": seed,
        "divergences": {"energy": rng.uniform(0.1, 1), "frechet": rng.uniform(0.1, 1)},
    } | more
    d2p = [row(layer) for layer in layers]
    early = [row(layer, when="early", step=2) for layer in layers]
    early[3]["divergences"]["energy"] = 1 - 0.7 * match + 0.05 * rng.random()
    gain = 0.1 * match + rng.normal(0, 0.01)
    key = {"task": task, "backbone": f"{net}.{weights}", "strategy": strategy, "n_train": 8, "seed": seed}
    return {
        "id": f"{task}-{net}.{weights}-{strategy}-{seed}", "status": "done", "spec": key | {"kind": "transfer"},
        "d2p": d2p, "d2p_moments": early, "value": 0.5 + gain * (strategy == "full" and weights != "random"),
        "expected": "gain" if match else "none",
    }


def study(planted=True, seed=0) -> Tables:
    rng = np.random.default_rng(seed)
    tasks, weights = [f"t{i}" for i in range(5)], ["w0", "w1", "w2", "w3", "w4", "drawn"]
    made = [
        record(t, w, s, float(planted and w == f"w{i}"), rng)
        for i, t in enumerate(tasks) for w in weights for s in range(3)
    ]
    made += [record(t, "random", s, 0.0, rng, strategy="scratch") for t in tasks for s in range(3)]
    runs = pd.DataFrame([
        r["spec"] | {"id": r["id"], "kind": "transfer", "status": "done", "metric": "dice", "value": r["value"],
                     "direction": 1, "primary": True, "positive": None,
                     "expected": "" if r["spec"]["strategy"] == "scratch" else r["expected"]}
        for r in made
    ])
    cases = pd.DataFrame([
        r["spec"] | {"id": r["id"], "case": f"c{i}", "patient": f"c{i}", "metric": "dice",
                     "value": r["value"] + 0.02 * rng.normal()}
        for r in made for i in range(12)
    ])
    return Tables("made", runs, runs, cases, pd.DataFrame(), d2p_table(made), moments_table(made))


def test_records_become_looks():
    tables = study()
    looks = measured(tables)
    assert set(looks.measure) == {"D2P", "D2P under its ceiling", "energy", "frechet"}
    assert set(looks.place) == {"first", "middle", "last", "embed"} and set(looks.when) == {"end", "early"}
    one = tables.moments[(tables.moments.layer == "stage4")].iloc[0]
    seen = looks[(looks.id == one.id) & (looks.place == "last") & (looks.when == "early") & (looks.measure == "energy")]
    assert seen.distance.tolist() == [one["divergence energy"]]
    assert layer_places(["a", "embed"]) == {"first": "a", "middle": "a", "last": "a", "embed": "embed"}


def test_halves_share_neither_a_task_nor_a_seed():
    tables = study()
    q = question(tables)
    by = q.cells.groupby("half")
    assert set(by.get_group(0).task) == {"t0", "t2", "t4"} and set(by.get_group(1).task) == {"t1", "t3"}
    assert not q.cells.backbone.str.endswith("random").any() and len(q.looks) == 4 * 4 * 2
    runs = tuned_runs(tables)
    for row in q.cells.itertuples():
        own = runs[(runs.task == row.task) & (runs.backbone == row.backbone) & (runs.seed % 2 == row.half)]
        assert row.outcome == pytest.approx(own.rpg.mean()) and len(own) == (2 if row.half == 0 else 1)


def test_the_planted_look_is_the_winner_of_gain_and_of_match():
    tables = study()
    for outcome in ("gain", "match"):
        a = ask(question(tables, outcome))
        assert a.tells and dict(a.winner[LOOK_COLUMNS]) == {"measure": "energy", "place": "last", "when": "early"}
        assert a.winner.confirmed < 0 and a.looks.p_look.idxmin() == a.best
        assert "less distance goes with more" in answer_words(a).lower()
        again = ask_again("more", question(study(seed=5), outcome, halves=False), a.winner, -1.0)
        assert again.p <= 0.05 and again.rho < -0.5 and again.n == 30
    none = ask_again("more", question(study(planted=False, seed=6), "gain", halves=False), a.winner, -1.0)
    assert none.p > 0.05


def test_nothing_planted_and_nothing_measured():
    a = ask(question(study(planted=False, seed=4)))
    assert not a.tells and answer_words(a).startswith("No distance tells")
    empty = study()
    q = question(Tables("bare", empty.runs, empty.metrics, empty.cases, empty.curves, d2p_table([]), moments_table([])))
    assert not q.asked and "cannot be asked" in answer_words(ask(q))
    assert "cannot be asked" in answer_words(ask(question(study(planted=False), "match")))
