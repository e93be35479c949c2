"""A study whose metric is a distance, where less is better: cells that gain, lose and do neither, through every table,
sentence, chart and page."""
import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from vfm_notes.analysis.association import associate, cell_points
from vfm_notes.analysis.contrasts import cell_scores, contrast_table, contrast_words
from vfm_notes.analysis.convergence import best_score, convergence_table, reached_table, run_convergence, target_score
from vfm_notes.analysis.crossed import crossed_association, moment_distances, outcomes
from vfm_notes.analysis.findings import convergence_finding, findings, gain_findings
from vfm_notes.analysis.gain import gain_table, rpg, run_gains
from vfm_notes.analysis.prediction import answers, cell_outcomes, prediction_table
from vfm_notes.analysis.tradeoff import CHOSEN_FOR_EACH, compare_settings, rank_table, run_scores
from vfm_notes.analysis.tables import search_candidates, load_tables, validation_scores
from vfm_notes.analysis.tradeoff import axis_contrasts, front_table, tradeoff_findings, tradeoff_table
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import SEARCHABLE, load_study, run_id, run_specs
from vfm_notes.report.figures import alignment_scatter, gain_cells, gain_finding, gain_matrix
from vfm_notes.report.pages import execute_pages, report_pages
from vfm_notes.runs.record import new_record, read_records, write_record

GAINS, LOSES, NEITHER = "profound_toy.gains", "profound_toy.loses", "provicnet_toy.neither"
TRUE = {GAINS: 0.70, LOSES: 1.40, NEITHER: 1.0}  # tuned distance over that of scratch: a gain of +30 %, −40 %, 0 %
METRIC = {"segmentation": ("hd95", "mm", 10.0), "super_resolution": ("mae", "", 0.10)}
STUDY = {
    "name": "less", "title": "Less is better", "cohort": "phantom", "size": [4, 24, 24], "spacing": [8.0, 4.0, 4.0],
    "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 6}, "pages": ["tradeoff", "strategies"],
    "pretrain": {
        "gains": {"backbone": "profound_toy", "epochs": 3}, "loses": {"backbone": "profound_toy", "epochs": 4},
        "neither": {"backbone": "provicnet_toy", "epochs": 3},
    },
    "backbones": list(TRUE),
    "tasks": {"segmentation": {}, "super_resolution": {}},
    "strategies": ["scratch", "full"],
    "seeds": [0, 1, 2],
    "budget": {"epochs": 8},
}


def record(spec, level, noise):
    "One run whose distance falls from three times `level` to it; a smaller factor falls faster."
    metric, unit, scale = METRIC[spec.task]
    factor = TRUE[spec.backbone] if spec.strategy == "full" else 1.0
    values = scale * factor * level * (1 + noise)
    rate, moved = (
        0.8 / factor**3, {GAINS: 0.3, LOSES: 0.1, NEITHER: 0.2}[spec.backbone] * (spec.strategy == "full") + 0.01,
    )
    curves = [
        {"epoch": e, "seconds": 2.0 * e, "name": f"val_{metric}", "value": scale * (factor + 2 * np.exp(-rate * e))}
        for e in range(spec.epochs + 1)
    ]
    curves += [
        {"epoch": e, "seconds": 2.0 * e, "name": "d2p_embed", "value": moved * e / spec.epochs}
        for e in range(spec.epochs + 1)
    ]
    d2p = [dict(layer="embed", mmd2=moved, mmd2_independent=moved, p_value=0.01, bandwidth=1.0, n=24, seed=0)]
    scores = (
        [
            dict(
                score=n, layer=layer, value=v * {GAINS: 3.0, NEITHER: 2.0, LOSES: 1.0}[spec.backbone], n=24, features=8,
                direction=1, reason="",
            )
            for layer in ("embed", "pyramid 0")
            for n, v in (("logme", 1), ("knn", -1))
        ]
        if spec.strategy == "full"
        else []
    )
    price = {GAINS: 20.0, LOSES: 30.0, NEITHER: 10.0}[spec.backbone]
    made = new_record(
        spec, "less", metrics={metric: float(values.mean())}, primary=metric, directions={metric: -1},
        units={metric: unit}, controls={metric: 3 * scale}, d2p=d2p, scores=scores,
        n={"train": 4, "val": 12, "test": 24},
        cost={
            "seconds": {"total": price + 2, "training": price, "per_epoch": [price / 8] * 8},
            "memory_mib": {"host": 10 * price}, "parameters": {"trainable": int(100 * price), "total": 9000},
        },
        licences=["synthetic"],
    )
    write_record(
        run_folder("less", run_id(spec)), made, curves,
        [{"case": f"c{i:02}", "patient": f"p{i:02}", "metric": metric, "value": v} for i, v in enumerate(values)],
    )


@pytest.fixture(scope="module")
def less(tmp_path_factory):
    "The study and its tables."
    with pytest.MonkeyPatch.context() as patch:
        root, r = tmp_path_factory.mktemp("less"), np.random.default_rng(3)
        patch.setenv("VFM_RUNS", str(root / "runs"))
        (root / "less.yaml").write_text(yaml.safe_dump(STUDY))
        spec = load_study(str(root / "less.yaml"))
        level = {t: (v := r.normal(1, 0.1, 24).clip(0.7, 1.3)) / v.mean() for t in METRIC}
        for s in run_specs(spec):
            shift = (0.005 if s.seed else -0.008) * (s.strategy == "full") * (s.backbone == NEITHER)
            record(s, level[s.task], r.normal(0, 0.002, 24) - shift)
        tables = load_tables(spec)
        yield SimpleNamespace(spec=spec, file=str(root / "less.yaml"), tables=tables, gains=gain_table(tables))


@pytest.fixture(scope="module")
def texts(less):
    "Its pages as a reader sees them: name → text."
    found, pages = {}, ("index", "convergence", "strategies", "tradeoff")
    def done(page, nb, error):
        assert not error, (page.name, error)
        outputs = [v for c in nb["cells"] for o in c.get("outputs", []) for v in o.get("data", {}).values()]
        said = "\n".join(
            "".join(v) if isinstance(v, (str, list)) else json.dumps(v, ensure_ascii=False) for v in outputs
        )
        said = re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), said)
        for what, instead in ((r"</tr>", " |\n"), (r"</t[dh]>", " | "), (r"<[^>]+>", "")):
            said = re.sub(what, instead, said)
        found[page.name] = html.unescape(said)
    execute_pages([p for p in report_pages(less.spec, read_records("less")) if p.name in pages], less.file, done)
    return found


def of(table, backbone):
    return (
        table[(table.backbone == backbone) & (table.strategy == "full")]
        if "strategy" in table
        else table[table.backbone == backbone]
    )


# --- tables

def test_gains_have_the_sign_of_the_truth(less):
    for backbone, true in ((GAINS, 30), (LOSES, -40), (NEITHER, 0)):
        own = of(less.gains, backbone)
        assert len(own) == 2 and np.allclose(own.rpg, true, atol=2) and (own.direction == -1).all()
        assert (
            (own.low > 0).all() == (true > 0)
            and (own.high < 0).all() == (true < 0)
            and ((own.low < 0) & (own.high > 0)).all() == (true == 0)
        )
        each = of(run_gains(less.tables), backbone)
        assert len(each) == 6 and np.allclose(each.rpg, true, atol=3)
    assert (
        rpg(7.0, 10.0, -1) == pytest.approx(30)
        and rpg(14.0, 10.0, -1) == pytest.approx(-40)
        and rpg(0.8, 0.5, 1) == pytest.approx(60)
    )


def test_contrasts_have_the_sign_of_the_truth(less):
    found = contrast_table(less.tables, {"tuned": ({"strategy": "full"}, {"strategy": "scratch"})})
    for backbone, true, sign in ((GAINS, 30, 1), (LOSES, -40, -1)):
        own = found[found.backbone == backbone].set_index("task")
        assert own.difference["segmentation"] == pytest.approx(sign * abs(true) / 10, abs=0.2) and np.allclose(
            own.rpg, true, atol=2
        )
        assert (np.sign(own[["low", "high", "rpg_low", "rpg_high"]]) == sign).all(axis=None) and (
            own["first"] < own["second"]
        ).all() == (sign > 0)
    said = contrast_words(found[found.task == "segmentation"], "tuning", "none")
    assert "1 is better and 1 worse" in said and re.search(
        r"\(positive: less, which is better\) on average over 3 cells \(−(3\.9|4\.0)\d to \+(2\.9|3\.0)\d\)", said
    )


def test_the_best_epoch_and_the_target_are_the_low_ones(less):
    assert (
        best_score(np.array([3.0, 1.0, 2.0]), -1) == 1.0
        and target_score(3.8, None, -1)[0] == pytest.approx(4.0)
        and target_score(1.0, 3.0, -1)[0] == pytest.approx(1.1)
    )
    assert target_score(3.0, 1.0, -1)[1] != ""  # it rose: that is no rise to a target
    runs = run_convergence(less.tables)
    rise = runs[(runs.rule == "rise") & (runs.strategy == "full")].groupby("backbone")
    assert (
        rise.epochs.mean()[GAINS] < rise.epochs.mean()[NEITHER]
        and rise.censored.all()[LOSES]
        and not rise.censored.any()[GAINS]
    )
    assert np.allclose(
        runs[runs.backbone == GAINS].groupby(["task", "strategy"]).best.first()["segmentation"]["full"], 7.0, atol=0.1
    )
    table = convergence_table(less.tables)
    own = {b: of(table[table.rule == "rise"], b) for b in TRUE}
    assert (
        (own[GAINS].sooner > 1).all()
        and (own[LOSES].sooner < 0).all()
        and (own[GAINS].area_more_low > 0).all()
        and (own[LOSES].area_more_high < 0).all()
    )
    assert (
        (own[GAINS].epochs_high <= 8).all()
        and (own[LOSES].epochs_high == np.inf).all()
        and (own[LOSES].sooner_low == -np.inf).all()
    )
    z = {
        b: reached_table(runs[runs.backbone == b])
        .query("rule == 'rise' and strategy == 'full' and task == 'all tasks'")
        .z.iloc[0]
        for b in (GAINS, LOSES)
    }
    assert z[GAINS] > 1 and z[LOSES] < -1


def test_the_front_is_low_and_cheap(less):
    for cost in ("seconds_training", "parameters_trainable"):
        front = front_table(less.tables, "hd95", cost, "segmentation")
        on = {(r.network, r.pretraining) for r in front[front.front].itertuples()}
        assert ("profound_toy", "gains") in on and ("profound_toy", "loses") not in on and len(on) == 2
        assert (
            front[(front.pretraining == "loses")].share.eq(0).all()
            and front[front.pretraining == "gains"].share.eq(1).all()
        )
    best, *rest = tradeoff_findings(less.tables, {}, {"pretraining": axis_contrasts(less.tables, "pretraining")})
    assert (
        re.match(r"The best mean 95 % Hausdorff distance is (6\.99|7\.0[01]): ", best)
        and "profound_toy, gains pretraining" in best
        and "score higher" in best
    )
    assert "1 is better and 1 worse" in rest[0] or "of 3 comparisons of 95 % Hausdorff distance" in rest[0]
    assert re.search(r"gains \+[23]\.\d+ ", rest[1]) and re.search(r"loses −[34]\.\d+ ", rest[1])
    grid = tradeoff_table(less.tables)
    assert (grid[grid.what == "hd95"].direction == -1).all() and (grid.low.dropna() >= 0).all()


def test_scores_before_fine_tuning_are_judged_by_gains(less):
    for outcome in ("gain", "score"):
        found = prediction_table(less.tables, outcome).query("counts").set_index("predictor")
        assert (
            found.right["logme"] == 1
            and found.right["knn"] == 0
            and found.regret["logme"] == 0
            and found.saved["knn"] < 0 < found.saved["logme"]
        )
        each = answers(less.tables, outcome)
        assert (
            (each.best == GAINS).all()
            and set(each[each.predictor == "logme"].picked) == {GAINS}
            and set(each[each.predictor == "knn"].picked) == {LOSES}
        )
        end = cell_outcomes(less.tables, outcome)[("segmentation", "full", 4)]
        assert end[GAINS][0] > end[NEITHER][0] > end[LOSES][0]


def test_the_association_goes_with_gains_and_not_with_distances(less):
    points = cell_points(less.tables, less.gains)
    assert crossed_association(points).simple.rho > 0.8 and associate(
        points.d2p, points.rpg, points.task
    ).rho == pytest.approx(1)
    cells = outcomes(less.tables, less.gains).merge(
        moment_distances(less.tables).astype({"n_train": "Int64"}), on=["task", "backbone", "strategy", "n_train"]
    )
    assert crossed_association(cells, "d2p", "sooner").simple.rho > 0.8
    drawn = alignment_scatter(points, crossed_association(points)).to_dict()
    rows = pd.DataFrame(next(iter(drawn["datasets"].values())))
    assert (
        (rows[rows.backbone == GAINS].rpg > 25).all()
        and (rows[rows.backbone == LOSES].rpg < -35).all()
        and (rows.low <= rows.rpg).all()
    )


def test_ranks_are_taken_within_blocks():
    "Inside each block more goes with more; between blocks it is the other way round."
    x = np.array([1, 2, 3, 11, 12, 13, 21, 22, 23.0])
    y = np.array([21, 22, 23, 11, 12, 13, 1, 2, 3.0])
    block = np.repeat(["a", "b", "c"], 3)
    inside, over = associate(x, y, block), associate(x, y)
    assert inside.rho == pytest.approx(1) and over.rho < -0.5 and inside.low == inside.high == pytest.approx(1)
    assert inside.p == pytest.approx(2 / 6**3)  # all orders inside the blocks: one and its mirror


# --- a search

def test_a_search_ranks_low_first():
    rows = [
        {
            "id": f"{b}{lr}{s}", "kind": "transfer", "status": "done", "task": "t", "backbone": b, "strategy": "full",
            "n_train": 8, "seed": s, "metric": "hd95", "unit": "mm", "direction": -1, "lr": lr, "chosen": kept,
            "value": v + 0.1 * s,
        }
        for b, lr, v, kept in (
            ("a", 0.001, 2.0, True), ("a", 0.01, 8.0, False), ("b", 0.001, 7.0, False), ("b", 0.01, 3.0, True),
        )
        for s in (0, 1, 2)
    ]
    tables = SimpleNamespace(runs=pd.DataFrame(rows), search=pd.DataFrame({"lr": [0.001]}))
    ranked = rank_table(run_scores(tables)).set_index(["setting", "backbone"])
    assert ranked["rank"].to_dict() == {
        ("lr 0.001", "a"): 1, ("lr 0.01", "a"): 2, ("lr 0.001", "b"): 2, ("lr 0.01", "b"): 1, (CHOSEN_FOR_EACH, "a"): 1,
        (CHOSEN_FOR_EACH, "b"): 2,
    }
    assert ranked.loc[(CHOSEN_FOR_EACH, "a"), ["mean", "least", "most"]].tolist() == pytest.approx([2.1, 2.0, 2.2])
    agreed = compare_settings(run_scores(tables)).set_index("setting")
    assert (
        agreed.tau.to_dict() == {"lr 0.001": 1.0, "lr 0.01": -1.0}
        and agreed.same_best.to_dict() == {"lr 0.001": True, "lr 0.01": False}
        and agreed.stays.to_dict() == {"lr 0.001": 1.0, "lr 0.01": 0.0}
    )


def test_agreement_needs_the_sign_where_backbones_are_more_than_two():
    "The first place of three is another one when the metric is turned round."
    rows = [
        {
            "task": "t", "strategy": "full", "n_train": 8, "backbone": b, "setting": s, "seed": k, "value": v,
            "metric": "mae", "unit": "", "direction": -1,
        }
        for s, values in (("x", (1.0, 2.0, 9.0)), (CHOSEN_FOR_EACH, (1.0, 3.0, 2.0)))
        for b, v in zip("abc", values)
        for k in (0, 1)
    ]
    found = compare_settings(pd.DataFrame(rows)).iloc[0]
    # the worst differs: turned round, the first place would change
    assert found.same_best and found.stays == 1 and found.tau == pytest.approx(1 / 3)


def test_the_interval_of_an_agreement_is_one_of_95_percent():
    "Only three times the first of three seeds turns the order: one draw in 27, which 2.5 % reach and 5 % do not."
    levels = {"x": {"a": (0.0, 2.5, 2.5), "b": (1.0, 0.0, 0.0)}, CHOSEN_FOR_EACH: {"a": (1.0,) * 3, "b": (0.0,) * 3}}
    rows = [
        {
            "task": "t", "strategy": "full", "n_train": 8, "backbone": b, "setting": s, "seed": k, "value": v,
            "metric": "dice", "unit": "", "direction": 1,
        }
        for s, own in levels.items()
        for b, values in own.items()
        for k, v in enumerate(values)
    ]
    found = compare_settings(pd.DataFrame(rows)).iloc[0]
    assert (found.tau, found.low, found.high) == (1, -1, 1) and found.stays == pytest.approx(26 / 27, abs=0.015)


def test_validation_keeps_the_low_score():
    runs = pd.DataFrame([{"id": k, "metric": "hd95", "direction": -1, "keep": k} for k in ("best", "last")])
    curves = pd.DataFrame([
        {"id": k, "name": "val_hd95", "epoch": e, "value": v}
        for k in ("best", "last")
        for e, v in enumerate((9.0, 4.0, 6.0))
    ])
    assert validation_scores(runs, curves) == {"best": 4.0, "last": 6.0}
    grid = pd.concat([
        runs.assign(
            kind="transfer", status="done", task="t", backbone="b", strategy="full", n_train=8, seed=0, lr=lr,
            id=runs.id + str(lr),
        )
        for lr in (0.1, 0.2)
    ])
    scores = pd.DataFrame([
        {"id": f"{k}{lr}", "name": "val_hd95", "epoch": e, "value": v + 10 * lr}
        for k in ("best", "last")
        for lr in (0.1, 0.2)
        for e, v in enumerate((9.0, 4.0, 6.0))
    ])
    for keep in ("best", "last"):
        tried = search_candidates(grid[grid.keep == keep].assign(**{c: 0 for c in SEARCHABLE if c not in grid}), scores)
        assert tried.set_index("lr").chosen.to_dict() == {0.1: True, 0.2: False}


@pytest.mark.parametrize("metric", ["hd95", "mae", "dice"])
def test_training_keeps_the_best_epoch(metric):
    from vfm_notes.foundation.spec import RunSpec
    from vfm_notes.tune.fit import EarlyStopping
    net = torch.nn.Linear(1, 1, bias=False)
    trainer = SimpleNamespace(best={}, module=net)
    keep = EarlyStopping(trainer, RunSpec(keep="best", patience=2), SimpleNamespace(primary=metric))
    for epoch, score in enumerate((5.0, 3.0, 9.0, 4.0)):
        with torch.no_grad(): net.weight.fill_(epoch)
        keep(epoch, {f"val_{metric}": score})
    wanted = 2 if metric == "dice" else 1
    assert (
        trainer.best["epoch"] == wanted
        and trainer.best["state"]["weight"].item() == wanted
        and keep.should_stop(wanted + 2)
        and not keep.should_stop(wanted + 1)
    )


@pytest.mark.parametrize(("metric", "begins", "best"), [("hd95", 1.0, 2), ("dice", 10.0, 3)])
def test_the_best_moment_is_that_of_the_best_epoch_after_the_start(metric, begins, best, monkeypatch):
    from vfm_notes.tune import monitor
    scores, epochs = iter((begins, 5.0, 3.0, 9.0, 4.0)), iter(range(5))
    monkeypatch.setattr(monitor, "collect_features", lambda net, seen: {"embed": next(epochs)})
    monkeypatch.setattr(monitor, "layer_distances", lambda before, after: {"embed": after["embed"] - before["embed"]})
    net = SimpleNamespace(in_channels=1, parameters=lambda: [SimpleNamespace(requires_grad=True)])
    task = SimpleNamespace(primary=metric, validate=lambda output, data: next(scores))
    data = {"val": None, "test": SimpleNamespace(inputs=torch.zeros(1, 1, 2, 2, 2))}
    watch = monitor.Monitor(SimpleNamespace(backbone=net), task, data, answer=lambda split: None)
    seen = [watch(epoch) for epoch in range(5)]
    assert watch.carried["moments"] == {"best": ({"epoch": best}, {"embed": best})} and [
        s["d2p_embed"] for s in seen
    ] == list(range(5))


# --- sentences, charts and pages

def test_sentences_call_a_shorter_distance_a_gain(less):
    counts, *said = gain_findings(less.gains)
    assert said[0].startswith("Largest gain: ") and GAINS in said[0] and re.search(r"; \+(29|30|31)\.\d %;", said[0])
    assert said[1].startswith("Largest loss: ") and LOSES in said[1] and re.search(r"; −(39|40|41)\.\d %;", said[1])
    assert counts.startswith(
        "Of 6 cells, 2 gain and 2 lose clearly (after correction); 2 are undecided. There, gains from +"
    )
    sooner = convergence_finding(convergence_table(less.tables))
    assert (
        re.search(rf"soonest in \S+( \S+)? with {re.escape(GAINS)}", sooner)
        and "sooner in 2 cells, later in 2" in sooner
        and "6 of 18 tuned runs did not get there" in sooner
    )
    assert (
        "95 % Hausdorff distance against scratch" in said[0] + said[1]
        or "mean absolute error against scratch" in said[0] + said[1]
    )


def test_the_matrix_is_green_where_the_distance_is_shorter(less):
    cells = gain_cells(less.gains).set_index(["backbone", "task"])
    assert (cells.loc[GAINS].sign == "gain").all() and (cells.loc[LOSES].sign == "loss").all()
    assert cells.loc[GAINS].clear.all() and cells.loc[LOSES].clear.all() and not cells.loc[NEITHER].clear.any()
    assert re.fullmatch(r"Pretraining clearly helps in 2 of 6 cells; 2 clearly lose", gain_finding(less.gains))
    drawn = {(r["task"], r["backbone"]): r for r in next(iter(gain_matrix(less.gains).to_dict()["datasets"].values()))}
    assert drawn["segmentation", GAINS]["value"].startswith("+") and drawn["segmentation", LOSES]["value"].startswith(
        "−"
    )


def test_pages_say_so(less, texts):
    assert "Largest gain" in texts["index"] and "Of 6 cells, 2 gain and 2 lose" in texts["index"]
    row = re.search(
        rf"segmentation \| {re.escape(GAINS)} \| 95 % Hausdorff distance, mm \| (\S+) ± \S+ \| (\S+) ±", texts["index"]
    )
    assert float(row[2]) < float(row[1])
    area = re.search(
        rf"segmentation \| {re.escape(GAINS)} \| full \| 95 % Hausdorff distance, mm \| \S+ \[\S+, \S+\] \| (\S+) "
        r"\[",
        texts["convergence"],
    )
    assert area[1].startswith("+")
    assert "“full” has the best mean in 4 of 6 combinations" in texts["strategies"]  # gains, and neither by a hair
    score = cell_scores(less.tables).set_index(["backbone", "task", "strategy"]).score.unstack()
    assert ((score.full < score.scratch).groupby("backbone").sum() == pd.Series({GAINS: 2, LOSES: 0, NEITHER: 2})).all()
    assert re.search(
        r"The best mean 95 % Hausdorff distance is (6\.99|7\.0[01]): profound_toy, gains pretraining", texts["tradeoff"]
    )
    assert findings(less.spec)[1].startswith("Largest gain")
