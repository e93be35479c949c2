"""What a run keeps besides its last distance: early, best, random weights, and the scores known before."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import vfm_notes.tune.catalog  # fills the registries
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.foundation.registry import scores
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.shift.features import collect_features, layer_distances
from vfm_notes.shift.scores import transferability
from vfm_notes.tune import transfer as module
from vfm_notes.tune.fit import fit, training_batches
from vfm_notes.tune.transfer import build_model, run_data, transfer

SPEC = RunSpec(
    size=(4, 32, 32), spacing=(8, 3, 3), cases={"pretrain": 0, "train": 12, "val": 4, "test": 10}, n_train=12, epochs=3,
    batch_size=2, task="classification", lr=3e-3,
)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(7)
    return build_backbone("profound_toy", 3).state_dict()


@pytest.fixture(scope="module")
def outcome(state): return transfer(SPEC, state)


def test_rows_of_every_moment(outcome, state):
    rows = {(r["when"], r["layer"]): r for r in outcome.summary["d2p_moments"]}
    layers = [r["layer"] for r in outcome.summary["d2p"]]
    assert set(rows) == {(when, layer) for when in ("early", "best", "random weights") for layer in layers}
    assert all(
        r["n"] == 10 and 0 < r["p_value"] <= 1 and r["estimator"] and r["bandwidth_rule"] and r["standardised"]
        for r in rows.values()
    )
    curves = outcome.curves.set_index(["name", "epoch"]).value
    val = [curves["val_auc", e] for e in (1, 2, 3)]
    for layer in layers:
        assert rows["early", layer]["step"] == 1  # a twentieth of 3 × 6 steps, rounded up
        assert rows["best", layer]["epoch"] == 1 + int(np.argmax(val)) and rows["best", layer]["mmd2"] == pytest.approx(
            curves[f"d2p_{layer}", rows["best", layer]["epoch"]], abs=1e-9
        )
    _, data = run_data(SPEC)
    torch.manual_seed(SPEC.seed)
    random, tuned = build_backbone("profound_toy", 3), build_backbone("profound_toy", 3)
    tuned.load_state_dict(state)
    before = collect_features(tuned, data["test"].inputs)
    np.testing.assert_allclose(before["embed"], outcome.features["before.embed"], rtol=1e-4, atol=1e-5)
    for layer, value in layer_distances(before, collect_features(random, data["test"].inputs)).items():
        assert rows["random weights", layer]["mmd2"] == pytest.approx(value, abs=1e-6)


def test_the_last_distance_is_standardised_by_the_features_of_the_start(outcome):
    "The unbiased estimate by its definition, with the bandwidth that is told."
    for row in outcome.summary["d2p"]:
        before, after = (np.float64(outcome.features[f"{when}.{row['layer']}"]) for when in ("before", "after"))
        x, y = ((f - before.mean(0)) / np.where(before.std(0) > 0, before.std(0), 1) for f in (before, after))
        k = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * row["bandwidth"] ** 2))
        off = ~np.eye(len(x), dtype=bool)
        inside, across = k(x, x)[off].mean() + k(y, y)[off].mean(), k(x, y)
        assert row["mmd2"] == pytest.approx(inside - 2 * across[off].mean(), abs=1e-5)
        assert row["mmd2_independent"] == pytest.approx(inside - 2 * across.mean(), abs=1e-5)


def test_early_is_the_state_after_so_many_steps(state):
    "A run that is stopped after the early step has the features that the whole run saw then."
    task, data = run_data(SPEC)
    seen = {}
    def train(stop):
        model = build_model(SPEC, task, 3, state)
        class Stop(Exception): pass
        def early(step):
            seen[stop] = collect_features(model.backbone, data["test"].inputs), step, model.training
            if stop: raise Stop
        try: curves, _ = fit(model, task, training_batches(data["train"], SPEC), SPEC, lambda epoch: {}, (4, early))
        except Stop: return None
        return curves
    torch.manual_seed(0); train(True)
    torch.manual_seed(0); curves = train(False)
    assert seen[True][1] == seen[False][1] == 4 and seen[False][2]
    for layer in seen[True][0]: assert torch.equal(seen[True][0][layer], seen[False][0][layer])
    plain, _ = fit(
        build_model(SPEC, task, 3, state), task, training_batches(data["train"], SPEC), SPEC, lambda epoch: {}
    )
    # looking changes nothing
    assert np.array_equal(plain[plain.name == "loss"].value, curves[curves.name == "loss"].value)


def test_scores_come_from_training_and_validation_cases(outcome, state):
    _, data = run_data(SPEC)
    backbone = build_backbone("profound_toy", 3, state)
    expected = transferability(backbone, data["train"], data["val"]).set_index(["score", "layer"]).value
    found = {(r["score"], r["layer"]): r for r in outcome.summary["scores"]}
    quick = {s for s in scores if not scores.card(s).get("slow")}
    assert {s for s, _ in found} == quick and {r["n"] for r in found.values()} == {16}
    for k, r in found.items():
        assert r["value"] == pytest.approx(expected[k], rel=1e-4, abs=1e-5, nan_ok=True) and (
            np.isfinite(r["value"]) or r["reason"]
        )
    assert outcome.summary["cost"]["seconds"]["scores"] > 0


def test_scores_are_computed_once_for_a_cell(state, monkeypatch):
    calls = []
    counted = lambda *a, **more: calls.append(1) or transferability(*a, names=["logme"])
    monkeypatch.setattr(module, "transferability", counted)
    monkeypatch.setattr(module, "_known", module.Memo())
    short = replace(SPEC, epochs=1)
    first, second = transfer(short, state), transfer(replace(short, seed=1, strategy="full", lr=1e-3), state)
    assert len(calls) == 1 and first.summary["scores"] == second.summary["scores"]
    other = {k: v * 1.1 for k, v in state.items()}
    transfer(short, other)
    assert len(calls) == 2  # other weights are another cell
    scratch = transfer(replace(short, strategy="scratch"))
    assert (
        scratch.summary["scores"] == []
        and {r["when"] for r in scratch.summary["d2p_moments"]} == {"early", "best"}
        and len(calls) == 2
    )
