"""What cannot work is reported before anything is computed, by one function, with the smallest change that helps; and
what `vfm init` writes runs."""
import copy
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from vfm_notes.backbones.keys import build_tiny
from vfm_notes.foundation.registry import VfmError, backbones, objectives
from vfm_notes.report.cli import main
from vfm_notes.data.manifest import write_manifest
from vfm_notes.foundation.spec import PretrainSpec, RunSpec, StudySpec, pretrain_specs, run_id, run_specs
from vfm_notes.runs.notebook import known_conflicts as of_jobs
from vfm_notes.runs.notebook import preflight
from vfm_notes.runs.grid import jobs_of
from vfm_notes.tune import conflicts as module
from vfm_notes.tune.conflicts import (
    cohort_facts, conflicts, empty_network, estimate_lines, next_size, read_without_weights, size_conflicts,
    step_memory, strategy_conflicts, training_flops,
)
from vfm_notes.tune.strategy import apply_strategy
from vfm_notes.tune.task import build_task
from vfm_notes.tune.transfer import build_model, transfer

VFM = [sys.executable, "-c", "from vfm_notes.report.cli import main; main()"]
CASES = {"pretrain": 8, "train": 8, "val": 4, "test": 8}


def study(**changes) -> StudySpec:
    base = dict(
        name="toy", title="t", cohort="phantom", size=[8, 32, 32], spacing=[6.0, 2.25, 2.25], cases=CASES,
        backbones=["profound_toy.mae"], pretrain={"mae": {"backbone": "profound_toy"}}, tasks={"segmentation": {}},
        strategies=["scratch", "full"], seeds=[0],
    )
    return StudySpec(**base | changes)


def said(**changes) -> list[str]:
    s = study(**changes)
    found = conflicts(s, [*pretrain_specs(s), *run_specs(s)])
    assert all("\n" not in f for f in found)
    return found


def facts() -> tuple: return cohort_facts("phantom", (8, 32, 32), (6.0, 2.25, 2.25), tuple(CASES.items()))


def test_a_study_that_fits_has_no_conflict(): assert said() == []


UNET = {"backbones": ["unet_toy.mae"], "pretrain": {"mae": {"backbone": "unet_toy"}}}
KNOWN = {
    "size": (
        {"size": [6, 32, 32]},
        ["size [6, 32, 32] does not suit the pretraining of backbone 'profound_toy'", "4 x 16 x 16",
         "write size: [8, 32, 32]"],
    ),
    "size for all": (
        {
            "size": [4, 32, 36], "backbones": ["profound_toy.mae", "unet_toy.mae"],
            "pretrain": {"mae": {"backbone": ["profound_toy", "unet_toy"]}},
        },
        ["'unet_toy'", "write size: [8, 32, 48]"],
    ),
    "large window": ({"window": [16, 32, 32]}, ["larger than size", "write window: [8, 32, 32]"]),
    "window of a case": (
        {"window": [4, 16, 16], "tasks": {"classification": {}}}, ["'classification' answers once for a whole case"],
    ),
    "sequence": ({"tasks": {"translation": {"target": "ct"}}}, ["needs the sequence 'ct'", "t2w, dwi, adc"]),
    "task option": (
        {"tasks": {"super_resolution": {"factr": [1, 2, 2]}}}, ["no option 'factr'", "Did you mean 'factor'"],
    ),
    "task value": (
        {"tasks": {"super_resolution": {"factor": [1, 2, "two"]}}}, ["option 'factor' of task 'super_resolution'"],
    ),
    "class weights": (
        {"tasks": {"segmentation": {"class_weights": [1, 2]}}}, ["class_weights has 2 values", "3 classes"],
    ),
    "lora": (UNET | {"strategies": ["lora targets=linear"]}, ["targets=linear matches no layer", "write targets=conv"]),
    "top": ({"strategies": ["top k=9"]}, ["k=9 does not fit", "5 blocks"]),
    "knn": ({"strategies": ["knn"]}, ["'knn' needs one class per case", "use probe or decoder"]),
    "strategy option": ({"strategies": ["lora rank=four"]}, ["option 'rank'", "a whole number"]),
    "patch": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "options": {"patch": 6}}}},
        ["pretraining 'profound_toy.mae'", "patch 6 is not a multiple", "(4, 16, 16)"],
    ),
    "large patch": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "options": {"patch": 64}}}}, ["does not divide the volume"],
    ),
    "objective option": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "options": {"mask": 0.5}}}},
        ["Objective 'masked_reconstruction' has no option 'mask'", "'mask_ratio'"],
    ),
    "objective value": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "options": {"mask_ratio": "half"}}}},
        ["option 'mask_ratio' of objective", "a number"],
    ),
    "tokens": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "objective": "masked_tokens"}}},
        ["no plain transformer", "use masked_reconstruction"],
    ),
    "labels": (
        {
            "pretrain": {
                "mae": {"backbone": "profound_toy", "objective": "patch_contrast", "options": {"class_weights": [1, 1]}}
            }
        },
        ["anchor_class is 2, but class_weights has 2"],
    ),
    "few weights": (
        {
            "pretrain": {
                "mae": {
                    "backbone": "profound_toy", "objective": "patch_contrast",
                    "options": {"class_weights": [1, 1], "anchor_class": 1},
                }
            }
        },
        ["3 classes", "class_weights has 2 entries"],
    ),
    "cut batches": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "objective": "nt_xent", "accumulate": 2}}},
        ["compares the cases of a batch", "accumulate: 1"],
    ),
    "batch of one": (
        {"pretrain": {"mae": {"backbone": "profound_toy", "objective": "nt_xent", "batch_size": 1}}},
        ["batch_size to 2"],
    ),
    "few cases": ({"cases": CASES | {"pretrain": 2}}, ["batches of 4", "2 cases", "cases.pretrain to 4"]),
    "no validation": ({"cases": CASES | {"val": 0}}, ["split 'val'", "set cases.val to 1"]),
    "specialist": ({"specialists": {"segmentation": "unet_3"}}, ["Unknown backbone 'unet_3'", "'unet_3d'"]),
    "memory": (
        {"device_memory": 0.01, "budget": {"batch_size": 8}},
        ["'profound_toy' needs at least", "device_memory is 0.01", "write budget.accumulate: "],
    ),
    "memory that nothing helps": (
        {"device_memory": 0.001}, ["device_memory is 0.001", "choose a smaller size, or leave the backbone out"],
    ),
    "augmentation": ({"budget": {"augment": {"flip": {"axes": [3]}}}}, ["option 'axes' of augmentation 'flip'"]),
    "task name": ({"tasks": {"segmantation": {}}}, ["Did you mean 'segmentation'"]),
    "cohort": ({"cohort": "fantom"}, ["Did you mean 'phantom'"]),
    "weights": ({"pretrain": {}}, ["profound_toy.mae", "'pretrain' section does not make"]),
}


@pytest.mark.parametrize("case", KNOWN)
def test_a_conflict_is_told_with_what_helps(case):
    changes, words = KNOWN[case]
    found = said(**changes)
    assert any(all(w in f for w in words) for f in found), found


def test_all_conflicts_are_told_at_once_and_only_of_what_is_to_be_done(runs_root):
    wrong = study(
        size=[6, 32, 32], backbones=["profound_toy.mae", "provicnet_toy.mae"],
        pretrain={"mae": {"backbone": ["profound_toy", "provicnet_toy"]}}, strategies=["scratch", "knn"],
        slurm={"time": 0}, tasks={"segmentation": {}, "translation": {"target": "ct"}},
    )
    found = of_jobs(wrong, jobs_of(wrong))
    assert len(found) == 4 and {w for w in ("slurm", "size [6", "'knn'", "'ct'") if any(w in f for f in found)} == {
        "slurm", "size [6", "'knn'", "'ct'",
    }, found
    with pytest.raises(VfmError, match=r"4 things of study 'toy' cannot work: \(1\) .*; \(4\) ") as e:
        preflight(wrong, jobs_of(wrong))
    assert "\n" not in str(e.value)
    part = jobs_of(replace(wrong, slurm={}), "task=segmentation,backbone=provicnet_toy.mae,strategy=scratch")
    assert of_jobs(replace(wrong, slurm={}), part) == []  # the other network's size is no matter here


MIXED = dict(
    name="mixed", title="Six networks that cannot share a study", size=[10, 36, 36], window=[16, 32, 32],
    pretrain={"mae": {"backbone": ["profound_toy", "unet_toy"]},
              "tokens": {"backbone": "provicnet_toy", "objective": "masked_tokens", "options": {"patch": 14}}},
    backbones=["profound_toy.mae", "unet_toy.mae", "provicnet_toy.t3", "dinov2_small.random", "cnn_3d.random",
               "swin_unetr_24.random"],
    tasks={"segmentation": {}, "classification": {}}, specialists={"segmentation": "unet_3"},
    strategies=["scratch", "full", "lora targets=linear", "top k=9", "knn"], device_memory=1.0,
    budget={"batch_size": 8},
)  # cells of 4 x 16 x 16, 8 x 8 x 8, patches of 8 and of 14 (slice by slice), stride 32; weights that nobody made
SENTENCES = [
    "Study 'mixed': backbone 'provicnet_toy.t3' needs weights that its 'pretrain' section does not make and that no "
    "card of published weights names. Did you mean 'provicnet_toy.tokens'? Add them to 'pretrain', or choose from: "
    "vfm weights list.",
    "Unknown backbone 'unet_3'. Did you mean 'unet_3d'?",
    "size [10, 36, 36] does not suit the pretraining of backbone 'profound_toy', whose coarsest cell has 4 x 16 x 16 "
    "voxels (d, h, w): write size: [16, 48, 48].",
    "size [10, 36, 36] does not suit the pretraining of backbone 'unet_toy', whose coarsest cell has 8 x 8 x 8 voxels "
    "(d, h, w): write size: [16, 48, 48].",
    "size [10, 36, 36] does not suit the pretraining of backbone 'provicnet_toy', whose coarsest cell has 1 x 8 x 8 "
    "voxels (d, h, w): write size: [16, 48, 48].",
    "window [16, 32, 32] is larger than size [10, 36, 36]: write window: [10, 32, 32].",
    "task 'classification' answers once for a whole case, so it cannot be trained on windows [16, 32, 32]: leave out "
    "the task, or window.",
    "pretraining 'provicnet_toy.tokens': Masking: patch 14 is not a multiple of the backbone's coarsest cell (1, 8, "
    "8); name such a multiple or leave it out.",
    "Strategy 'knn' needs one class per case, and this task answers with voxels; use probe or decoder.",
    "Strategy 'top': k=9 does not fit backbone 'swin_unetr_24', which has 8 blocks; give a number from 1 to 8.",
    "Strategy 'top': k=9 does not fit backbone 'cnn_3d', which has 4 blocks; give a number from 1 to 4.",
    "Strategy 'lora': targets=linear matches no layer of backbone 'cnn_3d'; leave targets out, which suits every "
    "network, or write targets=conv (conv: 8, all: 8 layers).",
    "Strategy 'top': k=9 does not fit backbone 'provicnet_toy', which has 3 blocks; give a number from 1 to 3.",
    "Strategy 'top': k=9 does not fit backbone 'unet_toy', which has 3 blocks; give a number from 1 to 3.",
    "Strategy 'lora': targets=linear matches no layer of backbone 'unet_toy'; leave targets out, which suits every "
    "network, or write targets=conv (conv: 6, all: 6 layers).",
    "Strategy 'top': k=9 does not fit backbone 'profound_toy', which has 5 blocks; give a number from 1 to 5.",
    "backbone 'swin_unetr_24' needs at least 1.2 GiB for a step of task 'classification' with strategy 'scratch', and "
    "device_memory is 1: write budget.accumulate: 2.",
]


def test_six_networks_that_cannot_share_a_study_and_what_makes_it_run():
    """Every sentence, and that doing what they say leaves nothing but the memory of the larger size; then that is
    solved by its own sentence."""
    assert [f.partition(" Known:")[0] for f in said(**MIXED)] == SENTENCES
    done = MIXED | dict(
        size=[16, 48, 48], window=[], backbones=[b.replace(".t3", ".tokens") for b in MIXED["backbones"]],
        specialists={"segmentation": "unet_3d"}, strategies=["scratch", "full", "lora", "top k=3", "probe"],
        pretrain=MIXED["pretrain"] | {"tokens": {"backbone": "provicnet_toy", "objective": "masked_tokens"}},
        budget={"batch_size": 8, "accumulate": 2},
    )
    assert said(**done) == [
        f"backbone 'swin_unetr_24' needs at least 1.6 GiB for a step of task '{task}' with strategy 'scratch', and "
        "device_memory is 1: write budget.accumulate: 4." for task in ("classification", "segmentation")
    ]
    assert said(**done | {"budget": {"batch_size": 8, "accumulate": 4}}) == []


def test_what_radiomic_features_need_is_told(monkeypatch):
    "Test cases, masks and the extra; each once."
    monkeypatch.setattr(module, "radiomics_absent", lambda: "no pyradiomics")
    assert said(radiomics=True) == [
        "no pyradiomics.",
        "`radiomics: true` needs 15 test cases, and split 'test' of cohort 'phantom' has 8: set cases.test to 15 or "
        "more, or leave radiomics out.",
    ]
    monkeypatch.setattr(module, "radiomics_absent", lambda: "")
    assert said(radiomics=True, cases=CASES | {"test": 15}) == []
    assert said() == []


def test_the_size_that_is_proposed_suits_every_network():
    nets = [empty_network(n, 3) for n in ("profound_toy", "unet_toy", "cnn_3d", "provicnet_toy", "efficientnet_toy")]
    size = next_size((5, 33, 47), nets)
    assert size == (8, 48, 48) and next_size(size, nets) == size
    for net in nets: net.check_input(torch.empty(1, 3, *size))


TOYS = [n for n in backbones if backbones.card(n).get("toy")]


@pytest.mark.parametrize(
    "name",
    sorted({*TOYS, "dinov2_small", "segresnet_ds", "swin_unetr_24", "densenet121_3d", "lite_medsam", "profound_vit"}),
)
def test_networks_without_numbers_agree_with_the_protocol(name):
    "What fits is read, on the meta device, and one voxel more is refused."
    net = build_tiny(name, 3)
    fits = next_size((32, 64, 64) if net.strides[-1][0] > 1 else (1, 64, 64), [net])
    read_without_weights(net.to("meta").eval(), fits)
    if not net.ragged:
        with pytest.raises(VfmError): net.check_input(torch.empty(1, 3, *(s + 1 for s in fits), device="meta"))


@pytest.mark.parametrize("name", TOYS)
def test_strategies_on_shapes_alone_are_judged_as_on_numbers(name):
    card = facts()[0]
    whole = build_model(
        RunSpec(
            size=(8, 32, 32), spacing=(6, 2.25, 2.25), cases=CASES, task="classification", backbone=f"{name}.random",
            strategy="scratch",
        ),
        build_task("classification", card, {}),
        3,
    )
    for line in ("probe", "knn", "top", "lora", "top k=40", "full drop=1", "lora targets=conv"):
        spec = RunSpec(
            size=(8, 32, 32), spacing=(6, 2.25, 2.25), cases=CASES, task="classification", backbone=f"{name}.random",
            strategy=line,
        )
        told = list(strategy_conflicts([spec], card))
        try: apply_strategy(spec.strategy, copy.deepcopy(whole))
        except VfmError as e: assert told == [str(e)]
        else: assert told == [], (name, line, told)


def test_a_size_that_a_network_does_not_divide_is_a_conflict_of_pretraining_alone():
    "A fine-tuning reads on the backbone's own grid, and its record states what was added."
    spec = RunSpec(
        size=(6, 30, 32), spacing=(8.0, 2.25, 2.25), cases=CASES, n_train=4, epochs=1, strategy="random",
        task="segmentation",
    )
    card, _ = facts()
    assert not list(size_conflicts([spec], card))
    assert list(size_conflicts([PretrainSpec(size=spec.size, spacing=spec.spacing, backbone=spec.backbone)], card))
    result = transfer(spec)
    assert result.summary["metrics"]
    assert any("zeros fill 6 x 30 x 32 voxels up to 8 x 32 x 32" in n for n in result.summary["notes"])
    whole = replace(spec, grid="published", spacing=(4.0, 2.25, 2.25), size=(4, 24, 24))
    assert not list(size_conflicts([whole], card)) and run_id(whole) != run_id(replace(whole, grid="pad"))
    assert any("resampled linearly" in n for n in transfer(whole).summary["notes"])


@pytest.mark.parametrize("name", ["profound_toy", "provicnet_toy", "unet_toy"])
def test_memory_of_a_step_is_what_torch_keeps(name):
    "On numbers: the bytes of what autograd saves, counted while a real step is taken, and weights times four."
    card = facts()[0]
    spec = RunSpec(size=(8, 32, 32), spacing=(6, 2.25, 2.25), cases=CASES, task="segmentation", strategy="scratch",
                   backbone=f"{name}.random", batch_size=2)
    model = build_model(spec, build_task("segmentation", card, {}), 3).train()
    own, seen = {p.data_ptr() for p in model.parameters()}, {}
    def see(t):
        if t.data_ptr() not in own: seen[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t): model(torch.randn(2, 3, 8, 32, 32))
    kept, weights = sum(n for n, _ in seen.values()), sum(p.numel() for p in model.parameters())
    assert step_memory(spec, card) * 2**30 == pytest.approx(kept + 16 * weights, rel=0.1)
    assert step_memory(replace(spec, accumulate=2), card) < step_memory(spec, card)
    assert step_memory(replace(spec, strategy="decoder"), card) < 0.5 * step_memory(spec, card)


def test_operations_of_a_run_are_those_of_its_passes():
    "On numbers: three forward passes a training case and epoch, four with checkpointing, one for what is looked at."
    card = facts()[0]
    spec = RunSpec(size=(8, 32, 32), spacing=(6, 2.25, 2.25), cases=CASES, task="segmentation", strategy="scratch",
                   backbone="profound_toy.random", epochs=5, n_train=8)
    model = build_model(spec, build_task("segmentation", card, {}), 3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(torch.randn(1, 3, 8, 32, 32))
    once = counter.get_total_flops()
    assert training_flops(spec, card) == once * (3 * 5 * 8 + 5 * CASES["val"] + 2 * CASES["test"])
    assert training_flops(replace(spec, checkpointing=True), card) - training_flops(spec, card) == once * 5 * 8
    s = study(device_memory=80.0, n_train=[2, 8], budget={"epochs": 5})
    lines = estimate_lines(s, run_specs(s))
    hours = once * (3 * 5 * 8 + 5 * CASES["val"] + 2 * CASES["test"]) / 20e12 / 3600
    assert len(lines) == 1 and lines[0].startswith("estimate: backbone 'profound_toy', task 'segmentation', ")
    assert f"n_train 8: at least {step_memory(run_specs(s)[0], card):.1f} GiB" in lines[0]
    assert lines[0].endswith(f"{hours:.1f} h at 20 TFLOP/s")
    assert estimate_lines(study(), run_specs(study())) == []


def test_ungraded_cases_are_told_before_a_classification(tmp_path):
    "In the words of the cohort's table: which cases, in which split."
    from made_cases import boxes
    grades = ["low", "high", "unknown", "low", "high", "unknown"]
    split = ["train", "train", "train", "val", "test", "test"]
    folder = tmp_path / "boxes"
    folder.mkdir()
    write_manifest(boxes(folder, grade=grades, split=split), folder)
    few = dict(cohort=str(folder), size=[4, 12, 12], spacing=[3.0, 1.0, 1.0], pretrain={},
               backbones=["unet_toy.random"], strategies=["scratch"],
               cases={"pretrain": 0, "train": 3, "val": 1, "test": 2})
    found = said(**few, tasks={"classification": {}, "segmentation": {}})
    assert found == [f for f in found if "task 'classification' needs a grade" in f] and len(found) == 1, found
    assert "train: 1 (c2), test: 1 (c5)" in found[0] and "leave out the task" in found[0]
    assert said(**few, tasks={"segmentation": {}}) == []
    assert any("'regression' needs a grade" in f for f in said(**few, tasks={"regression": {"of": "grade"}}))



def test_objectives_without_conflict_take_a_step():
    from vfm_notes.pretrain.loop import prepare_pretraining
    for name in objectives:
        s = study(pretrain={"mae": {"backbone": "profound_toy", "objective": name}})
        if conflicts(s, pretrain_specs(s)): continue
        x, labels = torch.randn(4, 3, 8, 32, 32), torch.randint(0, 3, (4, 8, 32, 32))
        _, objective = prepare_pretraining(pretrain_specs(s)[0], x, 3)
        assert torch.isfinite(objective.loss({"volumes": x, "labels": labels})[0]), name


def test_status_and_table_need_no_torch(tmp_path):
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({
            k: list(v) if isinstance(v, tuple) else v for k, v in vars(study()).items() if k not in ("budget",)
        })
    )
    code = (
        "import sys; from vfm_notes.report import cli; sys.argv = ['vfm', sys.argv[1], 's.yaml']\ntry: "
        "cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    for command in ("status", "table"):
        done = subprocess.run(
            [sys.executable, "-c", code, command], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"VFM_RUNS": str(tmp_path / "runs")},
        )
        assert done.returncode == 0, done.stderr


def test_what_init_writes_runs_as_it_was_written(tmp_path, monkeypatch, capfd, toy_server):
    env = {k: v for k, v in os.environ.items() if not k.startswith("VFM_")} | {
        "VFM_RUNS": str(tmp_path / "first" / "runs"), "VFM_FORKSERVER": toy_server,
    }
    def vfm(*words, at=tmp_path/"first"):
        return subprocess.run([*VFM, *words], cwd=at, env=env, capture_output=True, text=True)
    assert vfm("init", "first", at=tmp_path).returncode == 0
    text = (tmp_path/"first"/"study.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path/"first")
    for name in ("VFM_RUNS", "VFM_FORKSERVER"): monkeypatch.setenv(name, env[name])

    def here(*words) -> tuple:
        "The command in this process, which has imported torch: its exit status, and what it says."
        monkeypatch.setattr(sys, "argv", ["vfm", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended: main()
        gc.unfreeze()  # this process goes on
        return ended.value.code or 0, "".join(capfd.readouterr())
    assert "cannot work" not in here("run", "study.yaml", "--dry-run")[1]
    ran = vfm("run", "study.yaml")
    assert ran.returncode == 0 and "5 of 5 runs done" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    assert (tmp_path/"first"/"study.yaml").read_text(encoding="utf-8") == text
    records = [
        json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "first" / "runs" / "first").glob("*/record.json")
    ]
    assert len(records) == 5 and {r["status"] for r in records} == {"done"}
    (tmp_path/"first"/"study.yaml").write_text(text.replace("size: [8, 32, 32]", "size: [6, 32, 32]"))
    for words in (["run", "study.yaml", "--dry-run"], ["run", "study.yaml"], ["doctor", "study.yaml"]):
        code, told = here(*words)
        assert "write size: [8, 32, 32]" in told and "Traceback" not in told, told
        assert code == {"run": 0 if "--dry-run" in words else 2, "doctor": 1}[words[0]]
    assert len(list((tmp_path/"first"/"runs"/"first").glob("*/record.json"))) == 5
