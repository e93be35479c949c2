"""The sulcus study: its files, the names of its cells, a tiny version from pretraining to page, a cohort in
BrainVISA's layout, and the trade-off against brute force."""
import ast
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import f1_score, roc_auc_score

from vfm_notes.tune import study_names
from vfm_notes.analysis.tables import Tables, load_tables, reference_runs
from vfm_notes.analysis.tradeoff import (
    COST_TITLES, axis_contrasts, axis_pairs, front_table, grid_runs, pareto_front, grid_place, tradeoff_findings,
    tradeoff_table,
)
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.layouts_trees import brainvisa, brainvisa_example
from vfm_notes.data.loader import normalise
from vfm_notes.data.manifest import write_manifest
from vfm_notes.foundation.places import project_root, run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import PretrainSpec, RunSpec, load_study, pretrain_specs, run_id, run_specs
from vfm_notes.pretrain.loop import pretrain
from vfm_notes.runs.grid import job_specs, parse_only, jobs_of
from vfm_notes.runs.record import new_record, write_record
from vfm_notes.tune.transfer import input_scale, run_cohort, transfer

PRETRAININGS, TUNINGS = (
    ["none", "adversarial", "contrastive", "reconstruction", "diffusion"], ["full", "decoder", "top k=1"],
)


KNOWN = ["supervised", "drawn"]  # truth that was planted


@pytest.mark.parametrize("name, networks, seeds, planted", [("sulcus", 3, 3, KNOWN), ("sulcus_full", 4, 5, [])])
def test_the_study_files_give_the_whole_grid_once(name, networks, seeds, planted):
    study = load_study(name)
    study_names.check_names(study)
    runs = run_specs(study)
    lora = next(s for s in study.strategies if s.startswith("lora"))
    cells = {tuple(grid_place(r.backbone, r.strategy).values()) + (r.seed,) for r in runs}
    nets = {b.partition(".")[0] for b in study.backbones}
    assert (
        len(runs) == len(cells)
        and len(nets) == networks
        and cells == set(product(nets, [*PRETRAININGS, *planted], [*TUNINGS, lora], range(seeds)))
    )
    made = 4 + len(planted)
    assert len(pretrain_specs(study)) == made * networks and len(jobs_of(study)) == (2 * made + 1) * networks
    assert {r.parent == "" for r in runs if grid_place(r.backbone, r.strategy)["pretraining"] == "none"} == {
        True
    } and study.pages == ["tradeoff", "as_released"]
    for job in jobs_of(study):  # what a template makes of its parameters are the planned runs
        assert [run_id(s) for s in job_specs(job.kind, **job.parameters)] == list(job.runs)


def test_random_weights_have_one_name_for_every_strategy():
    assert (
        RunSpec(backbone="unet_toy.random", strategy="full").strategy == "scratch"
        and RunSpec(backbone="unet_toy.random", strategy="decoder").strategy == "random"
    )
    assert (
        RunSpec(backbone="unet_toy.random", strategy="top k=1").strategy == "top k=1"
        and RunSpec(backbone="unet_toy.mae", strategy="full").strategy == "full"
    )
    assert (
        run_id(RunSpec()) == "segmentation-profound_toy.mae_phantom-full-n24-s0-5ec46327"
        and run_id(PretrainSpec()) == "pretrain-profound_toy.mae_phantom-s0-4f1c51b1"
    )
    study = load_study("sulcus")
    both = replace(study, strategies=["scratch", "full", "random", "decoder"], backbones=["unet_toy.random"])
    assert [r.strategy for r in run_specs(both) if r.seed == 0] == ["scratch", "random"]
    assert parse_only("strategy=scratch", study) == {"strategy": {"scratch"}}
    with pytest.raises(VfmError, match="reserved for untrained weights"):
        pretrain_specs(replace(study, pretrain={"random": {"backbone": "unet_toy"}}, backbones=["unet_toy.random"]))
    with pytest.raises(VfmError, match="'swin_mt.diffusion' does not use the weights of its own architecture"):
        replace(study, backbones=["swin_mt.diffusion"])


TINY = dict(
    name="tiny", title="tiny", cohort="sulcus_phantom", size=[16, 16, 16], spacing=[3.0, 3.0, 3.0],
    cases={"pretrain": 4, "train": 10, "val": 4, "test": 10},
    pretrain={"reconstruction": {"backbone": ["unet_toy"], "objective": "autoencoding", "epochs": 1}},
    backbones=["unet_toy.random", "unet_toy.reconstruction"], tasks={"segmentation_and_presence": {"width": 4}},
    strategies=["full", "decoder", "top k=1", "lora rank=2 targets=all"], seeds=[0, 1],
    budget={"epochs": 1, "batch_size": 5}, pages=["tradeoff"],
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Records of a tiny version, without one of its sixteen runs."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("tiny")
        patch.setenv("VFM_RUNS", str(root/"runs"))
        (root/"tiny.yaml").write_text(yaml.safe_dump(TINY))
        study = load_study(root/"tiny.yaml")
        study_names.check_names(study)
        made, = pretrain_specs(study)
        seen = run_cohort(made).subset("pretrain")
        state = pretrain(
            made, torch.from_numpy(normalise(seen.volumes, **input_scale(made.backbone, seen))), None, 1
        ).backbone.state_dict()
        write_record(run_folder("tiny", run_id(made)), new_record(made, "tiny", primary="loss", metrics={"loss": 1.0}))
        for spec in run_specs(study)[:-1]:
            outcome = transfer(spec, state if spec.parent else None)
            write_record(
                run_folder("tiny", run_id(spec)), new_record(spec, "tiny", **outcome.summary), outcome.curves,
                outcome.cases, outcome.features, outcome.weights,
            )
        yield root, study, load_tables("tiny")


def test_a_tiny_study_fills_its_grid_and_tells_what_is_missing(tiny):
    _, study, tables = tiny
    whole = tradeoff_table(tables)
    assert {"dice", "hd95", "hausdorff", "auc", "f1", "sensitivity", "specificity", *COST_TITLES} == set(whole.what)
    assert len(whole) == 8 * 11 and (whole[whole.pretraining == "none"].n[whole.what == "dice"] == 2).all()
    gone = whole[(whole.pretraining == "reconstruction") & whole.tuning.str.startswith("lora")]
    costs = gone[gone.what.isin(COST_TITLES)]
    assert set(costs.n) == {1} and costs.low.isna().all()  # one seed of two; scores are drawn over cases, too
    runs = grid_runs(tables)
    for r in whole[(whole.what == "dice") & (whole.n == 2)].itertuples():
        own = runs[(runs.pretraining == r.pretraining) & (runs.tuning == r.tuning)].value
        assert r.value == pytest.approx(own.mean()) and 0 <= r.low <= r.value <= r.high <= 1
    trained = whole[whole.what == "parameters_trainable"].set_index(["pretraining", "tuning"]).value
    assert (trained["none"] == trained["reconstruction"]).all() and trained["none", "full"] > trained[
        "none", "top k=1"
    ] > trained["none", "decoder"]


def test_metrics_of_the_record_are_those_of_scikit_learn(tiny):
    _, _, tables = tiny
    for id, cases in tables.cases.groupby("id"):
        wide = cases.pivot(index="case", columns="metric", values="value")
        said = wide.score_1 >= 0.5
        kept = tables.metrics[tables.metrics.id == id].set_index("metric").value
        assert kept["auc"] == pytest.approx(roc_auc_score(wide.label, wide.score_1)) and kept["f1"] == pytest.approx(
            f1_score(wide.label, said, zero_division=0.0)
        )
        assert kept["sensitivity"] == pytest.approx(said[wide.label == 1].mean()) and kept[
            "specificity"
        ] == pytest.approx(1 - said[wide.label == 0].mean())
        assert (wide.hausdorff.dropna() >= wide.hd95.dropna() - 1e-9).all() and kept["hausdorff"] == pytest.approx(
            wide.hausdorff.mean()
        )


def test_scratch_of_random_weights_is_the_reference_of_pretrained_ones(tiny):
    from vfm_notes.analysis.convergence import convergence_table
    from vfm_notes.analysis.gain import gain_table
    _, _, tables = tiny
    gains = gain_table(tables)
    own = tables.done().set_index(["backbone", "strategy", "seed"]).value
    row = gains[(gains.backbone == "unet_toy.reconstruction") & (gains.strategy == "full")].iloc[0]
    assert (
        row.reason == ""
        and row.reference == pytest.approx(own["unet_toy.random", "scratch"].mean())
        and row.tuned == pytest.approx(own["unet_toy.reconstruction", "full"].mean())
    )
    sooner = convergence_table(tables).set_index(["backbone", "strategy", "rule"]).sooner
    assert np.isfinite(sooner["unet_toy.reconstruction", "full", "own"])
    assert reference_runs(tables.done(), "top k=1").backbone.nunique() == 2  # other strategies stand in for nobody


def test_frozen_random_encoders_differ_from_seed_to_seed(tiny):
    root, study, tables = tiny
    from vfm_notes.runs.record import read_arrays
    first, second = (read_arrays("tiny", run_id(s), "weights") for s in run_specs(study) if s.strategy == "random")
    name = next(k for k in first if k.startswith("backbone.") and first[k].ndim == 5)
    torch.manual_seed(0)
    assert np.array_equal(
        first[name], dict(build_backbone("unet_toy", 1).state_dict())[name.removeprefix("backbone.")].numpy()
    ) and not np.array_equal(first[name], second[name])


def test_pairs_of_the_grid(tiny):
    _, _, tables = tiny
    runs = grid_runs(tables)
    brought, less = axis_pairs(runs, "pretraining"), axis_pairs(runs, "tuning")
    assert len(brought) == 4 and len(less) == 6
    assert brought["unet_toy/reconstruction/full"] == (
        {"backbone": "unet_toy.reconstruction", "strategy": "full"},
        {"backbone": "unet_toy.random", "strategy": "scratch"},
    )
    table = axis_contrasts(tables, "pretraining", "auc")
    scores = tables.metrics[tables.metrics.metric == "auc"].set_index(["backbone", "strategy", "seed"]).value
    row = table[table.tuning == "full"].iloc[0]
    assert row.metric == "auc" and row.difference == pytest.approx(
        scores["unet_toy.reconstruction", "full"].mean() - scores["unet_toy.random", "scratch"].mean()
    )
    assert axis_contrasts(tables, "tuning", "kappa").reason.str.contains("no metric 'kappa'").all()


def run_page(study_file, root):
    "The values of a page's cells, executed here."
    values, place = [], {}
    for cell in json.loads((project_root()/"nbs"/"report"/"tradeoff.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        if "parameters" in cell["metadata"].get("tags", []): place["study"] = str(study_file); continue
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "page", "exec"), place)
        if last: values.append(eval(compile(ast.Expression(last.value), "page", "eval"), place))
    return values


def test_the_page_shows_every_cell_and_says_what_is_missing(tiny):
    root, _, tables = tiny
    values = run_page(root/"tiny.yaml", root)
    text, charts = "".join(getattr(v, "html", "") for v in values), [v for v in values if hasattr(v, "to_dict")]
    assert (
        text.count("<tr>") == 1 + 8 + 1 + 10 + 1 + 1
        and len(charts) == 3
        and "trainable parameters" in text
        and "Hausdorff" in text
    )
    for chart in charts: assert chart.to_dict()["title"]["text"]
    for sentence in tradeoff_findings(
        tables, {"seconds_training": front_table(tables, "dice", "seconds_training")},
        {a: axis_contrasts(tables, a) for a in ("pretraining", "tuning")},
    )[1:]:
        assert sentence.split(":")[0] in text


def test_the_page_of_nothing(tmp_path, runs_root):
    (tmp_path/"none.yaml").write_text(yaml.safe_dump(TINY | {"name": "none"}))
    values = run_page(tmp_path/"none.yaml", tmp_path)
    assert "No finished run of study" in "".join(v.html for v in values) and not any(
        hasattr(v, "to_dict") for v in values
    )
    empty = load_tables("none")
    assert (
        tradeoff_findings(empty, {}, {}) == ["No run of the grid is finished, so there is no result yet."]
        and front_table(empty, "dice", "seconds_training").empty
    )


def test_the_study_on_a_cohort_in_the_layout_of_brainvisa(tmp_path, runs_root):
    brainvisa_example(tmp_path/"scans")
    write_manifest(brainvisa(tmp_path/"scans"), tmp_path/"cohort")
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            TINY
            | {
                "name": "mine", "cohort": "cohort", "spacing": [4.0, 4.0, 4.0],
                "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 2}, "budget": {"epochs": 1, "batch_size": 2},
            }
        )
    )
    study = load_study(tmp_path/"mine.yaml")
    study_names.check_names(study)
    spec = run_specs(study)[0]
    assert {"absent", "prominent", "present"} == set(run_cohort(spec).card.grades) and run_cohort(
        spec
    ).card.classes == ("background", "skeleton", "PCS")
    outcome = transfer(spec)
    assert set(outcome.summary["metrics"]) >= {"dice", "hausdorff", "f1"} and outcome.cases.case.nunique() == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_brute_force_finds(seed):
    rng = np.random.default_rng(seed)
    cost, score = rng.integers(0, 6, 30).astype(float), rng.integers(0, 6, 30).astype(float)  # many ties
    cost[rng.random(30) < 0.1] = np.nan
    expected = [
        np.isfinite(c)
        and not any(np.isfinite(d) and d <= c and t >= s and (d < c or t > s) for d, t in zip(cost, score))
        for c, s in zip(cost, score)
    ]
    assert pareto_front(cost, score).tolist() == expected


def test_the_share_on_the_front_is_that_of_all_draws_of_the_seeds():
    rng, rows, kept = np.random.default_rng(1), [], []
    values = {
        ("a", "mae"): (rng.normal(0.6, 0.05, 3), [1, 1, 1]), ("b", "mae"): (rng.normal(0.62, 0.05, 3), [2, 2, 2]),
        ("c", "mae"): (rng.normal(0.61, 0.05, 3), [2.5, 1.5, 2.2]),
    }
    for (net, weights), (score, cost) in values.items():
        for s in range(3):
            run = dict(
                id=f"{net}{s}", kind="transfer", status="done", task="t", backbone=f"{net}.{weights}", strategy="full",
                n_train=4, seed=s, metric="dice", value=score[s], direction=1, chosen=True, seconds_training=cost[s],
            )
            rows.append(run)
            kept.append(
                {
                    k: run[k]
                    for k in ("id", "task", "backbone", "strategy", "n_train", "seed", "metric", "value", "direction")
                }
                | {"unit": "", "primary": True}
            )
    tables = Tables("made", pd.DataFrame(rows), pd.DataFrame(kept), pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
    found = front_table(tables, "dice", "seconds_training", draws=4000)
    exact = np.mean(
        [
            pareto_front(
                [np.take(c, pick).mean() for _, c in values.values()],
                [np.take(s, pick).mean() for s, _ in values.values()],
            )
            for pick in product(range(3), repeat=3)
        ],
        axis=0,
    )
    assert found.share.to_numpy() == pytest.approx(exact, abs=0.03) and found.n.tolist() == [3, 3, 3]
