"""Planted truth: pretraining on a task, shuffled labels, drawn weights, seeds that draw their cases, heads that see
the encoder, distances under their ceiling."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import vfm_notes.tune.catalog
from vfm_notes.analysis.planted import control_verdict, planted_table, planted_words
from vfm_notes.analysis.tables import Tables
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.registry import VfmError, tasks
from vfm_notes.foundation.spec import PretrainSpec, RunSpec, load_study, pretrain_specs, run_specs
from vfm_notes.nets.decoder import ClassificationHead, DenseDecoder, LinearDecoder
from vfm_notes.pretrain.loop import pretrain
from vfm_notes.shift.features import collect_features, layer_distances
from vfm_notes.tune import transfer as module
from vfm_notes.tune.task import DENSE_HEADS, IMAGE_HEADS
from vfm_notes.tune.strategy import call_order, run_without_weights
from vfm_notes.tune.supervised import dealt_anew, pretraining_cases
from vfm_notes.tune.monitor import LOOKED_AT, under_ceiling
from vfm_notes.tune.transfer import run_cohort, run_data, transfer

CASES = {"pretrain": 8, "train": 16, "val": 4, "test": 6}
SPEC = RunSpec(
    size=(4, 32, 32), spacing=(8.0, 3.0, 3.0), cases=CASES, n_train=6, epochs=1, batch_size=2, strategy="scratch"
)
SCALE = {"how": "zscore_nonzero"}


@pytest.fixture(scope="module")
def cohort(): return load_cohort("phantom", SPEC.size, SPEC.spacing, CASES)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(7)
    return build_backbone("profound_toy", 3).state_dict()


# --- seeds ---

def test_every_seed_draws_its_own_training_cases_and_is_judged_on_the_same():
    found = {s: run_data(replace(SPEC, seed=s))[1] for s in range(4)}
    train = {s: set(d["train"].names) for s, d in found.items()}
    assert len({frozenset(t) for t in train.values()}) == 4 and all(len(t) == 6 for t in train.values())
    for s in found:
        assert found[s]["test"].names == found[0]["test"].names and found[s]["val"].names == found[0]["val"].names
        more = run_data(replace(SPEC, seed=s, n_train=9))[1]["train"].names
        assert train[s] < set(more)  # nested
        for other in ("full", "random"):
            assert set(run_data(replace(SPEC, seed=s, strategy=other))[1]["train"].names) == train[s]
    assert set(run_data(replace(SPEC, seed=1, n_train=16))[1]["train"].names) == set(
        run_data(replace(SPEC, seed=0, n_train=16))[1]["train"].names
    )


def test_a_record_names_its_training_cases_and_its_head():
    summary = transfer(replace(SPEC, seed=3)).summary
    assert summary["train_cases"] == run_data(replace(SPEC, seed=3))[1]["train"].names
    assert summary["head"]["name"] == "DenseDecoder" and summary["head"]["reads_voxels"]
    assert not transfer(replace(SPEC, options={"skip": False})).summary["head"]["reads_voxels"]


@pytest.mark.parametrize("name", ["segmentation", "distortion_correction", "classification"])
def test_what_is_kept_between_runs_is_what_would_be_computed(name):
    specs = [replace(SPEC, task=name, seed=1, strategy=s) for s in ("scratch", "random")] + [
        replace(SPEC, task=name, seed=2, strategy="random")
    ]
    warm = [transfer(s).summary for s in specs]
    for spec, before in zip(specs, warm):
        for kept in (module._prepared, module._controls, module._known, *module._rows.values()): kept.clear()
        again = transfer(spec).summary
        for part in ("metrics", "controls", "d2p"): assert repr(again[part]) == repr(before[part])


def test_prepared_cases_follow_the_cohort_and_the_options():
    a = run_data(replace(SPEC, task="distortion_correction"))[1]["test"]
    b = run_data(replace(SPEC, task="distortion_correction", options={"amplitude": 1.0}))[1]["test"]
    c = run_data(replace(SPEC, task="distortion_correction", spacing=(6.0, 3.0, 3.0)))[1]["test"]
    assert not torch.equal(a.inputs, b.inputs) and not torch.equal(a.inputs, c.inputs)
    assert torch.equal(a.inputs, run_data(replace(SPEC, task="distortion_correction"))[1]["test"].inputs)


# --- heads ---

def test_the_case_head_reads_the_mean_and_the_maximum_of_every_map(state):
    net = build_backbone("profound_toy", 3, state)
    maps = net.pyramid(torch.randn(2, 3, 4, 32, 32))
    expected = [f(m.flatten(2).detach().numpy(), -1) for f in (np.mean, np.max) for m in maps]
    np.testing.assert_allclose(
        ClassificationHead(net, 2).pool(maps).detach().numpy(), np.concatenate(expected, 1), atol=1e-6
    )


def test_the_linear_head_is_linear_in_the_maps(state):
    net = build_backbone("profound_toy", 3, state)
    x = torch.randn(2, 4, 4, 32, 32)
    one, two = ([torch.randn_like(m) for m in net.pyramid(x[:, :3])] for _ in range(2))
    for head in (LinearDecoder(net, 3), LinearDecoder(net, 1, residual_channel=3, cells=True)):
        for p in head.parameters(): torch.nn.init.normal_(p)
        zero = head([torch.zeros_like(m) for m in one], x)
        mixed = head([2 * a - b for a, b in zip(one, two)], x)
        torch.testing.assert_close(
            mixed - zero, 2 * (head(one, x) - zero) - (head(two, x) - zero), atol=1e-3, rtol=1e-3
        )


def test_without_the_skip_the_decoder_sees_the_maps_alone(state):
    net = build_backbone("profound_toy", 3, state)
    x = torch.randn(2, 3, 4, 32, 32)
    maps = net.pyramid(x)
    alone, both = DenseDecoder(net, 3, 2, skip=False), DenseDecoder(net, 3, 2)
    assert torch.equal(alone(maps, x), alone(maps, x * 3)) and not torch.equal(both(maps, x), both(maps, x * 3))


@pytest.mark.parametrize(
    ("task", "head"),
    [("segmentation", h) for h in DENSE_HEADS]
    + [("super_resolution", h) for h in IMAGE_HEADS]
    + [("translation", "linear")],
)
def test_a_frozen_random_encoder_works_under_every_dense_head(task, head):
    small = {"width": 8} if head in ("upernet", "unetr") else {}
    outcome = transfer(replace(SPEC, task=task, options={"head": head} | small, strategy="random"))
    assert (
        np.isfinite(outcome.summary["metrics"][outcome.summary["primary"]])
        and outcome.summary["cost"]["parameters"]["trainable"] == outcome.summary["head"]["parameters"]
    )


def test_heads_that_cannot_be(cohort):
    for options, said in (
        ({"head": "upernet"}, "no head 'upernet'"),
        ({"head": "linear", "skip": False}, "only the head 'decoder' has a skip"),
    ):
        with pytest.raises(VfmError, match=said): run_data(replace(SPEC, task="super_resolution", options=options))


# --- pretraining on a task ---

@pytest.mark.parametrize("name", list(tasks))
def test_every_task_can_be_pretrained_on(name, cohort):
    if name in ("multi_label", "everything"): pytest.skip("the phantom has no such labels")
    spec = PretrainSpec(
        size=SPEC.size, spacing=SPEC.spacing, cases=CASES, objective="task",
        options={"task": name} | ({"settings": {"of": "grade"}} if name == "regression" else {}), epochs=1, seed=9,
    )
    x, y = pretraining_cases(spec, cohort.subset("pretrain"), SCALE)
    made = pretrain(spec, x, y, 3, card=cohort.card)
    assert (
        made.curves[made.curves.name == "loss"].value.notna().all()
        and len(made.untouched) < len(list(made.backbone.parameters()))
        and set(made.left) == {"head"}
    )
    assert all(v.ndim == 3 for v in made.pictures.values())


def test_shuffled_labels_are_those_of_another_case(cohort):
    for n in (2, 3, 50):
        given = dealt_anew(n, seed=n)
        assert sorted(given) == list(range(n)) and (given != np.arange(n)).all()
    spec = PretrainSpec(
        size=SPEC.size, spacing=SPEC.spacing, cases=CASES, objective="task",
        options={"task": "segmentation", "shuffled": True},
    )
    seen = cohort.subset("pretrain")
    x, y = pretraining_cases(spec, seen, SCALE)
    true = torch.from_numpy(seen.labels).long()
    source = [[j for j in range(len(seen)) if torch.equal(y[i], true[j])] for i in range(len(seen))]
    assert all(len(s) == 1 and s[0] != i for i, s in enumerate(source)) and len({s[0] for s in source}) == len(seen)
    assert torch.equal(x, pretraining_cases(replace(spec, options={"task": "segmentation"}), seen, SCALE)[0])


def test_a_pretraining_of_no_epochs_leaves_a_draw(cohort):
    spec = PretrainSpec(size=SPEC.size, spacing=SPEC.spacing, cases=CASES, epochs=0, seed=101)
    x, y = pretraining_cases(spec, cohort.subset("pretrain"), SCALE)
    made = pretrain(spec, x, y, 3)
    torch.manual_seed(101)
    for k, v in build_backbone("profound_toy", 3).state_dict().items():
        assert torch.equal(v, made.backbone.state_dict()[k])
    assert set(made.curves.epoch) == {0}


def test_pretraining_sees_no_case_of_the_other_splits(cohort):
    spec = PretrainSpec(size=SPEC.size, spacing=SPEC.spacing, cases=CASES)
    whole = run_cohort(spec)
    seen = set(whole.subset("pretrain").patients)
    assert not seen & {p for p, s in zip(whole.patients, whole.split) if s != "pretrain"}


# --- distances ---

def test_distances_stand_under_their_ceiling(state):
    spec = replace(SPEC, strategy="full", seed=5)
    outcome = transfer(spec, state)
    x = run_data(spec)[1]["test"].inputs[:LOOKED_AT]
    torch.manual_seed(5)
    random = build_backbone("profound_toy", 3)
    top = layer_distances(collect_features(build_backbone("profound_toy", 3, state), x), collect_features(random, x))
    for row in outcome.summary["d2p"] + outcome.summary["d2p_moments"]:
        assert row["ceiling"] == pytest.approx(top[row["layer"]], abs=1e-9) and row["relative"] == pytest.approx(
            row["mmd2"] / row["ceiling"]
        )
        assert row["saturated"] == (row["mmd2"] >= 0.9 * row["ceiling"])
    assert all(r["saturated"] for r in outcome.summary["d2p_moments"] if r["when"] == "random weights")
    alone = transfer(replace(spec, strategy="scratch")).summary
    assert all(r["ceiling"] > 0 for r in alone["d2p"])


def test_a_few_test_cases_are_looked_at(monkeypatch, state):
    monkeypatch.setattr(module, "LOOKED_AT", 4)
    outcome = transfer(replace(SPEC, strategy="full"), state)
    assert (
        {r["n"] for r in outcome.summary["d2p"]} == {4}
        and outcome.summary["n"]["test"] == 6
        and outcome.features["before.embed"].shape[0] == 4
    )


def test_the_order_of_calls_is_asked_once(monkeypatch, state):
    net = build_backbone("profound_toy", 3, state)
    called = []
    run_without_weights(net, enter=called.append)
    assert call_order(net) == called == call_order(build_backbone("profound_toy", 3))


# --- the study and what is said of it ---

def test_the_default_study_plants_truth():
    study = load_study("phantom")
    runs, made = run_specs(study), pretrain_specs(study)
    grid = {(r.task, r.backbone) for r in runs if r.backbone.startswith("profound_toy") and r.strategy == "full"}
    per_task = {task: len({b for t, b in grid if t == task}) for task in study.tasks}
    assert len(per_task) == 5 and per_task.pop("translation") >= 2  # learned by nothing, and kept to show that
    assert min(per_task.values()) >= 6
    assert {r.expected for r in runs if r.backbone.endswith(".drawn")} == {"none"} and all(
        r.expected == "" for r in runs if r.strategy in ("scratch", "random")
    )
    seeds = {r.seed for r in runs}
    assert not seeds & {s.seed for s in made}  # a draw that a run begins with would be no other draw
    dose = sorted(
        s.epochs
        for s in made
        if s.options.get("task") == "distortion_correction" and s.backbone.startswith("profound_toy")
    )
    assert [round(100 * e / dose[-1]) for e in dose] == [10, 30, 100]
    assert study.n_train == [40] and study.cases["train"] > 40  # or all seeds would train on the same cases


def cell(task, backbone, strategy, expected, values, seed=0):
    rng = np.random.default_rng([seed, len(task), len(backbone)])
    runs = [
        dict(
            id=f"{task}{backbone}{strategy}{s}", task=task, backbone=backbone, strategy=strategy, n_train=8, seed=s,
            kind="transfer", status="done", metric="psnr", value=v, control=0.0, direction=1, unit="dB",
            expected=expected, positive=None,
        )
        for s, v in enumerate(values)
    ]
    cases = [
        dict(id=r["id"], case=f"c{i}", patient=f"c{i}", metric="psnr", value=r["value"] + 0.01 * rng.normal())
        for r in runs
        for i in range(20)
    ]
    return runs, cases


def tables_of(*cells) -> Tables:
    runs, cases = (pd.DataFrame([r for c in cells for r in c[k]]) for k in (0, 1))
    metrics = runs[
        ["id", "task", "backbone", "strategy", "n_train", "seed", "metric", "value", "control", "direction", "unit"]
    ].assign(primary=True)
    return Tables(
        "s", runs.astype({"n_train": "Int64", "seed": "Int64"}), metrics, cases, pd.DataFrame(), pd.DataFrame()
    )


def test_planted_cells_are_compared_with_their_control():
    level = [20.0, 20.1, 19.9, 20.05, 19.95]
    more = [v + 2 for v in level]
    t = tables_of(
        cell("a", "n.random", "scratch", "", level), cell("a", "n.random", "random", "", [10.0] * 5),
        cell("a", "n.matched", "full", "gain", more), cell("a", "n.drawn", "full", "none", level[::-1]),
        cell("a", "n.matched", "decoder", "gain", [15.0, 15.1, 14.9, 15.0, 15.05]),
        cell("a", "n.other", "full", "", more),
    )
    found = planted_table(t).set_index(["backbone", "strategy"])
    assert set(found.index) == {("n.matched", "full"), ("n.matched", "decoder"), ("n.drawn", "full")}
    assert found.versus[("n.matched", "decoder")] == "random" and found.rpg[("n.matched", "decoder")] == pytest.approx(
        50, abs=1
    )
    assert (
        found.found.to_dict()
        == {("n.matched", "full"): "gain", ("n.matched", "decoder"): "gain", ("n.drawn", "full"): "not clear"}
        and found.agrees.all()
    )
    said = planted_words(found.reset_index())
    assert said[0].startswith("Negative control as expected") and "2 of 2 cells (gain expected: yes)" in said[1]


def test_a_control_that_misbehaves_is_the_headline():
    level = [20.0, 20.1, 19.9, 20.05, 19.95]
    t = tables_of(
        cell("a", "n.random", "scratch", "", level), cell("a", "n.drawn", "full", "none", [v + 3 for v in level]),
        cell("a", "n.matched", "full", "gain", [v + 2 for v in level]), cell("b", "n.random", "scratch", "", level),
        cell("b", "n.matched", "full", "gain", [v + 2 for v in level]),
    )
    said = planted_words(planted_table(t))
    assert (
        said[0].startswith("Negative control failed")
        and "a with n.drawn (full)" in said[0]
        and said[1].startswith("Positive control as expected")
    )
    assert (
        planted_words(
            planted_table(
                tables_of(cell("a", "n.random", "scratch", "", level), cell("a", "n.other", "full", "", level))
            )
        )
        == []
    )


def test_a_ceiling_of_nothing_has_no_share():
    [row] = under_ceiling([{"layer": "embed", "mmd2": 0.0}], {"embed": 0.0})
    assert np.isnan(row["relative"]) and row["saturated"] is False


@pytest.mark.parametrize(
    ("expected", "found", "verdict"),
    [
        ("gain", ["gain", "gain"], "as expected"), ("gain", ["gain", "not clear"], "found in part"),
        ("gain", ["gain", "not clear", "not clear"], "failed"), ("gain", ["gain", "gain", "loss"], "failed"),
        ("none", ["not clear", "not clear"], "as expected"), ("none", ["not clear", "gain", "gain"], "failed"),
        ("none", ["not clear", "not clear", "gain"], "within chance"),
    ],
)
def test_a_control_is_found_in_part_where_nothing_speaks_against_it(expected, found, verdict):
    right = {"gain": "gain", "none": "not clear"}[expected]
    own = pd.DataFrame({"expected": expected, "found": found, "agrees": [f == right for f in found]})
    assert control_verdict(own) == verdict
