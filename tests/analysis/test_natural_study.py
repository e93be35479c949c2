"""The natural-domain study: its files, its cohort, its controls, its contrasts, and the whole of it on made-up
pictures."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm, t as student
from sklearn.metrics import roc_auc_score

from vfm_notes.analysis.contrasts import cell_scores, contrast_table, contrast_words
from vfm_notes.analysis.gain import Pair, Ranking, difference_interval, permutation_test, score_interval
from vfm_notes.analysis.tables import load_tables
from vfm_notes.backbones.keys import build_tiny
from vfm_notes.backbones.weights import converted_file, weights
from vfm_notes.data.load import load_cohort
from vfm_notes.data.layouts_pictures import medmnist_example
from vfm_notes.foundation.places import run_folder, shipped_studies
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.foundation.spec import load_study, run_id, run_specs
from vfm_notes.runs.notebook import known_conflicts
from vfm_notes.report.pages import report_pages
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import new_record, write_record
from vfm_notes.tune import starting_weights, study_names
from vfm_notes.tune.transfer import recalibrate_batchnorm, transfer

FULL = [s for s in shipped_studies() if s.startswith("natural_full")]


# --- study files
# -------------------------------------------------------------------------------------------------------

def test_the_small_study_is_the_grid_less_what_it_leaves_out():
    study = load_study("natural")
    runs = run_specs(study)
    assert len(runs) == 3 * 2 * 4 * 3 - 2 * 2 * 3 and not [
        r for r in runs if r.backbone.startswith("lite") and r.strategy in ("scratch", "full")
    ]
    assert len({run_id(r) for r in runs}) == len(runs) and all(not r.parent for r in runs)
    assert (
        len(jobs_of(study)) == 6
        and study.pages == ["natural"]
        and "natural" in {p.name for p in report_pages(study, [])}
    )
    assert "natural" not in {p.name for p in report_pages(load_study("phantom"), [])}


@pytest.mark.parametrize("name", FULL)
def test_full_studies_plan_and_say_what_is_missing(name, monkeypatch, tmp_path):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))
    study = load_study(name)
    assert len(jobs_of(study)) == 16 and sum(len(j.specs) for j in jobs_of(study)) == 8 * 2 * 4 * 3
    said = [*known_conflicts(study, jobs_of(study)), *study_names.weights_problems(study)]
    assert "vfm data import" in said[0] and str(tmp_path) in said[0]
    for weight in study.backbones: assert any(f"'{weight}'" in s for s in said[1:]), weight
    assert len(FULL) == 4 and "nall" in jobs_of(study)[0].name


def test_licences_that_nobody_accepted_are_listed_one_by_one(monkeypatch, tmp_path):
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))
    study = replace(load_study(FULL[0]), backbones=["vit_base.mae_in1k", "dinov3_base.lvd1689m", "resnet152.in1k"])
    said = study_names.weights_problems(study)
    for licence in ("CC-BY-NC-4.0", "DINOv3-License"): assert any(f"licences: [{licence}]" in s for s in said)
    accepted = study_names.weights_problems(replace(study, licences=["CC-BY-NC-4.0", "DINOv3-License"]))
    assert not any("licences: [" in s for s in accepted) and len(accepted) == 4  # three backbones and the head


@pytest.mark.parametrize("rule", [[{"backbone": "nobody"}], [{"colour": "red"}], {"backbone": "x"}, [{}], [3]])
def test_a_wrong_rule_is_told(rule):
    with pytest.raises(VfmError, match="leave_out"): replace(load_study("natural"), leave_out=rule)


def test_a_task_may_have_a_name_of_its_own():
    study = load_study("natural")
    study_names.check_names(replace(study, cohort="phantom"))
    with pytest.raises(VfmError, match="Did you mean 'classification'"):
        study_names.check_names(replace(study, cohort="phantom", tasks={"linear_head": {"task": "clasification"}}))
    with pytest.raises(VfmError, match="no card"):
        study_names.check_names(
            replace(
                study, cohort="phantom",
                tasks={"deit_head": {"task": "classification", "head": "deit", "deit": "deit_base.imagenet"}},
            )
        )


# --- cohort
# ------------------------------------------------------------------------------------------------------------

def test_layout_and_folder_name_a_cohort(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    (tmp_path/"pictures").mkdir()
    medmnist_example(tmp_path/"pictures")
    cohort = load_cohort("medmnist:pictures", (1, 32, 32), (1.0, 1.0, 1.0), {})
    assert len(cohort) == 12 and cohort.card.name == "breastmnist" and not list((tmp_path/"pictures").glob("*.yaml"))
    with pytest.raises(VfmError, match="vfm data import medmnist"):
        load_cohort("medmnist:elsewhere", (1, 32, 32), (1.0, 1.0, 1.0), {})
    with pytest.raises(VfmError, match="Did you mean 'medmnist'"):
        load_cohort("medmnits:pictures", (1, 32, 32), (1.0, 1.0, 1.0), {})


def test_real_pictures_without_hand_work(real_data, monkeypatch, tmp_path):
    if not (real_data/"breastmnist_28").is_dir(): pytest.skip(f"no {real_data/'breastmnist_28'}")
    monkeypatch.setenv("VFM_DATA", str(real_data))
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    study = load_study("natural")
    assert not [s for s in known_conflicts(study, jobs_of(study)) if "VFM_DATA" in s]
    cohort = load_cohort(study.cohort, study.size, study.spacing, study.cases, bad_cases=study.bad_cases)
    assert [e["case"] for e in cohort.excluded] == ["breastmnist-test-0076"] and "train-0115" in cohort.excluded[0][
        "reason"
    ]
    assert cohort.split.count("train") == 256 and cohort.split.count("test") == 155
    with pytest.raises(VfmError, match="breastmnist-test-0076"):
        load_cohort(study.cohort, study.size, study.spacing, study.cases)


# --- encoders of any size, random encoders
# --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["efficientnet_lite0", "lite_medsam"])
@pytest.mark.parametrize("side", [40, 56, 64])
def test_pictures_of_any_size(name, side):
    model = build_tiny(name, 1).eval()
    with torch.no_grad(): maps = model.pyramid(torch.randn(2, 1, 1, side, side))
    assert [tuple(m.shape[3:]) for m in maps] == [(-(-side // s), -(-side // s)) for _, _, s in model.strides]
    with pytest.raises(VfmError, match="divisible"): build_tiny("dinov2_small", 1)(torch.randn(1, 1, 1, 21, 21))


def test_settled_statistics_are_those_of_the_cases():
    torch.manual_seed(0)
    model, x = build_tiny("efficientnet_lite0", 1), torch.randn(24, 1, 1, 32, 32) * 3 + 1
    seen = []
    model.encoder._bn0.register_forward_hook(lambda m, given, out: seen.append(given[0].detach()))
    before = [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert recalibrate_batchnorm(model, x, batch_size=24) == len(before) and not model.training
    assert before == [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    values = seen[0].transpose(0, 1).flatten(1).double()
    assert torch.allclose(model.encoder._bn0.running_mean.double(), values.mean(1), atol=1e-5) and torch.allclose(
        model.encoder._bn0.running_var.double(), values.var(1), rtol=1e-4
    )
    with torch.no_grad(): assert model.embed(x).std(0).mean() > 0.01  # features do not fade


# --- the whole study on made-up pictures
# ----------------------------------------------------------------------------------

TINY = ("dinov2_small", "efficientnet_lite0", "lite_medsam")


@pytest.fixture
def small(tmp_path, monkeypatch):
    "Bright and dark pictures, tiny encoders, and one set of published weights."
    rng = np.random.default_rng(0)
    parts = {}
    for split, n in (("train", 24), ("val", 8), ("test", 16)):
        label = np.arange(n) % 2
        parts |= {
            f"{split}_images": (rng.integers(0, 90, (n, 28, 28)) + 120 * label[:, None, None]).astype(np.uint8),
            f"{split}_labels": label[:, None].astype(np.uint8),
        }
    (tmp_path/"pictures").mkdir()
    np.savez_compressed(tmp_path/"pictures"/"breastmnist.npz", **parts)
    for name, value in (
        ("VFM_DATA", tmp_path), ("VFM_RUNS", tmp_path / "runs"), ("VFM_WEIGHTS", tmp_path / "weights"),
        ("VFM_JOB", "x"),
    ):
        monkeypatch.setenv(name, str(value))
    for name in TINY:
        monkeypatch.setitem(
            backbones._entries, name,
            lambda in_channels=3, make=backbones[name]: make(in_channels=in_channels, tiny=True),
        )
    yaml = (
        "name: tiny\ntitle: t\ncohort: medmnist:pictures\nsize: [1, 32, 32]\nspacing: [1.0, 1.0, 1.0]\ncases: "
        f"{{pretrain: 0, train: 0, val: 0, test: 0}}\nbackbones: [{', '.join(f'{n}.made' for n in TINY)}]\n"
        "tasks: {linear_head: {task: classification, head: linear}, deit_head: {task: classification, head: "
        "deit}}\nstrategies: [random, decoder, scratch, full]\nseeds: [0]\n"
        "budget: {epochs: 1, batch_size: 8, lr: 0.001, keep: best, checkpointing: true, augment: {flip: {axes: "
        "[-2, -1]}}}\n"
    )
    (tmp_path/"tiny.yaml").write_text(yaml)
    return load_study(tmp_path/"tiny.yaml")


@pytest.mark.parametrize("name", TINY)
def test_every_cell_trains_on_made_up_pictures(small, name):
    torch.manual_seed(5)
    state = backbones[name](1).state_dict()
    chosen = [
        r
        for r in run_specs(small)
        if r.backbone == f"{name}.made"
        and (name == TINY[0] or (r.task, r.strategy) in (("linear_head", "random"), ("deit_head", "full")))
    ]
    for spec in chosen:
        out = transfer(spec, None if spec.strategy in ("random", "scratch") else state)
        assert out.summary["n"] == {"train": 24, "val": 8, "test": 16} and 0 <= out.summary["metrics"]["auc"] <= 1
        moved = {d["layer"]: d["mmd2"] for d in out.summary["d2p"]}["embed"]
        assert (abs(moved) < 1e-12) == (spec.strategy in ("random", "decoder")), spec.strategy
        write_record(
            run_folder("tiny", run_id(spec)), new_record(spec, "tiny", **out.summary), out.curves, out.cases,
            out.features, out.weights,
        )
    if name != TINY[0]: return
    tables = load_tables("tiny")
    found = contrast_table(
        tables,
        {
            "tuned or frozen": ({"strategy": "full"}, {"strategy": "decoder"}),
            "head": ({"task": "deit_head"}, {"task": "linear_head"}),
        },
    )
    assert len(found) == 2 + 4 and found.difference.notna().all() and len(cell_scores(tables)) == 8


def test_a_random_encoder_differs_from_seed_to_seed(small):
    spec = next(
        r
        for r in run_specs(small)
        if r.strategy == "random" and r.backbone.startswith("dino") and r.task == "linear_head"
    )
    one, two, again = (transfer(replace(spec, seed=k)).features["before.embed"] for k in (0, 1, 0))
    assert np.array_equal(one, again) and not np.allclose(one, two)


def test_recomputed_blocks_train_to_the_same_weights(small):
    spec = next(
        r
        for r in run_specs(small)
        if r.strategy == "scratch" and r.backbone.startswith("dino") and r.task == "linear_head"
    )
    one, two = (transfer(replace(spec, checkpointing=on)).weights for on in (True, False))
    assert one.keys() == two.keys() and max(np.abs(one[k] - two[k]).max() for k in one) < 1e-5


def test_published_files_stand_in_the_record(small, tmp_path):
    from safetensors.torch import save_file
    names = "dinov2_small.made_up", "deit_base.made_up"
    for k, name in enumerate(names):
        weights(name, title="made up", licence=f"Licence-{k}", source="here", file=f"{name}.pth", sha256=str(k) * 64)(
            lambda state: state
        )
        converted_file(name).parent.mkdir(exist_ok=True)
        net = backbones["dinov2_small"](1) if k == 0 else build_tiny("deit_base", 3)
        save_file(
            {p: v.contiguous().clone() for p, v in net.state_dict().items()}, converted_file(name),
            metadata={
                "weights": name, "licence": f"Licence-{k}", "source_sha256": str(k) * 64,
                "checksum": "that of the card", "file": f"{name}.pth",
            },
        )
    make = backbones._entries["deit_base"]
    try:
        backbones._entries["deit_base"] = lambda in_channels=3, **_: make(in_channels=in_channels, tiny=True)
        spec = next(
            r
            for r in run_specs(small)
            if r.strategy == "decoder" and r.task == "deit_head" and r.backbone.startswith("dino")
        )
        spec = replace(spec, backbone=names[0], options=dict(spec.options) | {"deit": names[1]})
        done = transfer(spec, starting_weights.published_state(names[0], 1, "tiny")).summary
    finally:
        backbones._entries["deit_base"] = make
        for name in names: weights._entries.pop(name), weights._cards.pop(name)
    assert [(f["part"], f["weights"], f["licence"], f["source_sha256"][:1]) for f in done["weights_files"]] == [
        ("backbone", names[0], "Licence-0", "0"), ("head", names[1], "Licence-1", "1"),
    ]
    assert done["licences"] == ["CC BY 4.0", "Licence-0", "Licence-1"]


# --- contrasts against closed forms
# ----------------------------------------------------------------------------------------

def delong(label, one, two):
    "Difference of two AUCs and its standard error (DeLong 1988), by counting pairs, in float64."
    order = lambda s: ((s[label][:, None] > s[~label][None]) + 0.5 * (s[label][:, None] == s[~label][None])).astype(
        float
    )
    d = order(one) - order(two)
    up, down = d.mean(1), d.mean(0)
    return d.mean(), np.sqrt(up.var(ddof=1) / len(up) + down.var(ddof=1) / len(down))


@pytest.fixture(scope="module")
def two_cells():
    rng = np.random.default_rng(3)
    label = np.arange(240) % 3 == 0
    shared = rng.standard_normal(240)
    cell = lambda strength: np.stack([strength * label + shared + rng.standard_normal(240) for _ in range(3)])
    return label, cell(1.6), cell(1.1)


def test_difference_and_interval_agree_with_delong(two_cells):
    label, one, two = two_cells
    pair = Pair(Ranking(one[:1], label), Ranking(two[:1], label), [0], np.arange(240))
    found = difference_interval(pair, "auc")
    wanted, error = delong(label, one[0], two[0])
    assert (
        abs(score_interval(pair, "auc").value - roc_auc_score(label, one[0])) < 1e-12
        and abs(found.value - wanted) < 1e-12
    )
    assert abs((found.high - found.low) / (2 * student.ppf(0.975, 239) * error) - 1) < 0.02
    p = 2 * norm.sf(abs(wanted) / error)
    assert (
        abs(np.log10(max(permutation_test(pair, 4000), 1e-3)) - np.log10(max(p, 1e-3))) < 0.5
        and abs(np.log10(found.p) - np.log10(p)) < 0.2
    ), p


def test_seeds_widen_the_interval(two_cells):
    label, one, two = two_cells
    def width(scores):
        found = score_interval(Pair(Ranking(scores, label), Ranking(two, label), [0, 1, 2], np.arange(240)), "auc")
        return found.high - found.low
    assert width(np.stack([one[0], one[1] - 2.0 * label, one[2]])) > 1.5 * width(one)


def test_words_count_what_the_table_has():
    table = pd.DataFrame({
        "difference": [0.1, -0.05, np.nan], "low": [0.02, -0.1, np.nan], "high": [0.2, 0.01, np.nan],
        "p_holm": [0.01, 0.3, np.nan], "n_seeds": [3, 3, 0], "n_cases": [155, 155, 0], "contrast": "c", "metric": "auc",
        "direction": 1, "smallest": [0.12, 0.08, np.nan],
    })
    said = contrast_words(table, "tuned", "frozen")
    assert (
        "+0.025 AUC on average over 2 cells (−0.050 to +0.100)" in said
        and "1 is better and 0 worse" in said
        and ", 1 with p ≤ 0.05" in said
        and "1 of 3 pairs are missing" in said
        and "in the others differences from +0.080 on would have been seen in 80 of 100" in said
    )
    assert "there is no result yet" in contrast_words(table[2:], "tuned", "frozen")


def test_what_a_study_lacks_is_not_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    study = load_study("natural")
    assert not [l for l in known_conflicts(study, jobs_of(study)) if "leave_out" in l]
