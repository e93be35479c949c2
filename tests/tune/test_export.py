"""Exported networks by the runtimes they are for: MONAI's bundle runner, onnxruntime, peft."""
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import vfm_notes.tune.catalog
from made_cases import message
from test_predict import STUDY, keep, place, specs_of  # noqa: F401 (a fixture)
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.foundation.spec import run_id
from vfm_notes.report.weights_commands import export_tuned, predict_cases, tuned_members
from vfm_notes.tune.export import exported_member, WindowNetwork, window_input


def test_a_folder_answers_as_its_run(place, tmp_path, monkeypatch):
    run = run_id(specs_of(place, "segmentation")[0])
    export_tuned(run, tmp_path/"out", "", None, False, False, False)
    case = [f"{s}={place}/cohorts/boxes/c1_{s}.nii.gz" for s in ("t2w", "adc")]
    a = predict_cases(run, case, tmp_path/"a", probabilities=True)
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"nothing"))
    b = predict_cases(str(tmp_path/"out"), case, tmp_path/"b", probabilities=True)
    assert a.equals(b) and "Intended use" in (tmp_path/"out"/"MODEL_CARD.md").read_text()
    for f in (tmp_path/"a").glob("*.nii.gz"): assert f.read_bytes() == (tmp_path/"b"/f.name).read_bytes()
    state = load_file(tmp_path/"out"/"model.safetensors")
    from safetensors import safe_open
    with safe_open(tmp_path/"out"/"model.safetensors", "pt") as f: meta = f.metadata()
    first = next(iter(state))
    save_file(state | {first: state[first] + 1}, tmp_path/"model.safetensors", meta)
    assert "are not those that were written" in message(exported_member, tmp_path/"model.safetensors")
    save_file(state, tmp_path/"plain.safetensors")
    assert "carries no plan of a tuned network" in message(exported_member, tmp_path/"plain.safetensors")


def run_bundle(bundle, given, out):
    import monai.bundle
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bundle)
        monai.bundle.run(
            config_file="configs/inference.json", bundle_root=".", input_dir=str(given), output_dir=str(out)
        )


def test_monai_runs_the_bundle_of_a_segmentation(place, tmp_path):
    run = run_id(specs_of(place, "segmentation")[0])
    export_tuned(run, tmp_path/"out", "", None, False, True, False)
    turn = np.array([[0.96, 0.28, 0], [-0.28, 0.96, 0], [0, 0, 1]]) @ np.diag([1.0, -1, 1])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (1, 1, 3), (5, -9, 30)
    rng = np.random.default_rng(3)
    for s in ("t2w", "adc"):
        (tmp_path/"in"/"P1").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(rng.normal(100, 20, (32, 32, 4)).astype(np.float32), affine),
                 tmp_path/"in"/"P1"/f"{s}.nii.gz")
    run_bundle(tmp_path/"out"/"bundle", tmp_path/"in", tmp_path/"theirs")
    predict_cases(run, [tmp_path/"in"/"P1"], tmp_path/"mine")
    theirs, mine = (nib.load(p) for p in (next((tmp_path/"theirs").rglob("*.nii.gz")),
                                           tmp_path/"mine"/"P1_segmentation.nii.gz"))
    assert np.allclose(theirs.affine, mine.affine, atol=1e-4) and theirs.shape == mine.shape == (32, 32, 4)
    same = np.asarray(theirs.dataobj) == np.asarray(mine.dataobj)
    assert same.mean() > 0.999 and len(np.unique(np.asarray(mine.dataobj))) > 1
    meta = json.loads((tmp_path/"out"/"bundle"/"configs"/"metadata.json").read_text())
    assert meta["network_data_format"]["outputs"]["pred"]["num_channels"] == 3


def test_monai_runs_the_bundle_of_a_classification(place, tmp_path):
    run = run_id(specs_of(place, "classification")[0])
    export_tuned(run, tmp_path/"out", "", None, False, True, False)
    rng = np.random.default_rng(3)
    for s in ("t2w", "adc"):
        (tmp_path/"in"/"P1").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(rng.normal(100, 20, (32, 32, 4)).astype(np.float32), np.diag([-1.0, -1, 3, 1])),
                 tmp_path/"in"/"P1"/f"{s}.nii.gz")
    run_bundle(tmp_path/"out"/"bundle", tmp_path/"in", tmp_path/"theirs")
    theirs = pd.read_csv(tmp_path/"theirs"/"predictions.csv", header=None).iloc[0, 1:].to_numpy(float)
    mine = predict_cases(run, [tmp_path/"in"/"P1"], tmp_path/"mine", centre="middle")
    assert np.allclose(theirs, mine[["low", "high"]].to_numpy(float)[0], atol=1e-4)


@pytest.mark.parametrize("task", ["segmentation", "classification", "super_resolution"])
def test_onnx_answers_as_the_network(place, tmp_path, task):
    pytest.importorskip("onnx", reason="the optional extra onnx is not installed")
    import onnxruntime
    run = run_id(specs_of(place, task)[0])
    export_tuned(run, tmp_path/"out", "", None, True, False, False)
    member, = tuned_members(run)[0]
    x = torch.randn(window_input(member).shape, generator=torch.Generator().manual_seed(4))
    theirs, = onnxruntime.InferenceSession(str(tmp_path/"out"/"model.onnx")).run(None, {"image": x.numpy()})
    with torch.no_grad(): mine = WindowNetwork(member)(x).numpy()
    assert np.abs(theirs - mine).max() < 1e-4


def test_updates_alone_make_the_tuned_weights_again(place, tmp_path):
    "Base weights and what peft reads give the weights that the run kept."
    from dataclasses import replace
    from peft import LoraConfig, inject_adapter_in_model
    spec = replace(specs_of(place, "segmentation")[0], backbone="profound_toy.random", strategy="lora rank=2 alpha=3",
                   seed=0)
    keep(spec, "boxes")
    run = run_id(spec)
    export_tuned(run, tmp_path/"out", "", None, False, False, True)
    config = json.loads((tmp_path/"out"/"adapters"/"adapter_config.json").read_text())
    updates = load_file(tmp_path/"out"/"adapters"/"adapter_model.safetensors")
    tuned = {k.removeprefix("backbone."): v for k, v in load_file(tmp_path/"out"/"model.safetensors").items()
             if k.startswith("backbone.")}
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    torch.manual_seed(0)
    base = build_backbone("profound_toy", 2)
    layer = config["target_modules"][0]
    a, b = (updates[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
    state = base.state_dict()
    assert torch.allclose(state[f"{layer}.weight"] + 1.5 * (b.flatten(1) @ a.flatten(1)).view_as(
        state[f"{layer}.weight"]), tuned[f"{layer}.weight"], atol=1e-5)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=config["target_modules"]), base)
    named = {k.replace(".lora_A.default", ".lora_A").replace(".lora_B.default", ".lora_B") for k in base.state_dict()}
    assert {k.removeprefix("base_model.model.") for k in updates} <= named
    assert "has no low-rank updates to export" in message(
        export_tuned, run_id(specs_of(place, "segmentation")[0]), tmp_path/"no", "", None, False, False, True)
