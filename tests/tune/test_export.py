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


def given_scans(folder, sequences=("t2w", "adc")):
    "A case on an oblique, flipped, anisotropic grid that has the training's size and spacing."
    turn = np.array([[0.96, 0.28, 0], [-0.28, 0.96, 0], [0, 0, 1]]) @ np.diag([1.0, -1, 1])
    affine, rng = np.eye(4), np.random.default_rng(3)
    affine[:3, :3], affine[:3, 3] = turn * (1, 1, 3), (5, -9, 30)
    folder.mkdir(parents=True)
    for s in sequences:
        values = rng.normal(100, 20, (32, 32, 4)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, affine), folder/f"{s}.nii.gz")
    return folder


@pytest.mark.parametrize("task, read", [("super_resolution", ("t2w", "adc")), ("translation", ("t2w",))])
def test_monai_runs_the_bundle_of_an_image_in_the_units_of_the_sequence(place, tmp_path, task, read):
    run = run_id(specs_of(place, task)[0])
    export_tuned(run, tmp_path/"out", "", None, False, True, False)
    case = given_scans(tmp_path/"in"/"P1", read)
    given = tmp_path/"in" if len(read) > 1 else case  # one sequence: files; several: folders
    run_bundle(tmp_path/"out"/"bundle", given, tmp_path/"theirs")
    predict_cases(run, [case], tmp_path/"mine")
    theirs, mine = (nib.load(p) for p in (next((tmp_path/"theirs").rglob("*.nii.gz")),
                                           tmp_path/"mine"/f"P1_{task}.nii.gz"))
    assert np.allclose(theirs.affine, mine.affine, atol=1e-4) and theirs.shape == mine.shape == (32, 32, 4)
    found, wanted = theirs.get_fdata(), mine.get_fdata()
    assert np.abs(found - wanted).max() < 0.01 * wanted.std() + 1e-3 * abs(wanted.mean()) and wanted.std() > 0


PICTURES = dict(size=(1, 32, 32), spacing=(1.0, 1.0, 1.0), cases={"train": 6, "val": 2, "test": 2}, n_train=6, epochs=1,
                batch_size=2, backbone="profound_toy.random", strategy="scratch")


def coloured(folder, n=10):
    "A cohort of coloured pictures of 48 x 40 pixels, with masks and grades."
    from PIL import Image
    from vfm_notes.data.cohort import CohortCard
    from vfm_notes.data.manifest import Manifest, text_table, write_manifest
    folder.mkdir(parents=True)
    rows, rng = [], np.random.default_rng(1)
    for i in range(n):
        mask = np.zeros((48, 40), np.uint8)
        mask[10 + i:30, 5:20] = 1
        values = rng.integers(0, 200, (48, 40, 3)) + 50*mask[..., None]
        Image.fromarray(values.astype(np.uint8)).save(folder/f"p{i}.png")
        Image.fromarray(mask).save(folder/f"p{i}_spot.png")
        about = {"case": f"p{i}", "patient": f"p{i}", "mask_spot": f"p{i}_spot.png", "grade": ("low", "high")[i % 2]}
        rows.append(about | {c: f"p{i}.png#{c}" for c in ("red", "green", "blue")})
    card = CohortCard("spots", "Spots", "Apache-2.0", "made here", "none", ("red", "green", "blue"),
                      ("background", "spot"), ("low", "high"), (1.0, 1.0, 1.0))
    write_manifest(Manifest(text_table(pd.DataFrame(rows)), card, folder, crop="volume"), folder)
    return folder


@pytest.mark.parametrize("task", ["segmentation", "classification", "super_resolution"])
def test_monai_runs_the_bundle_of_pictures(tmp_path, runs_root, task):
    from PIL import Image
    from vfm_notes.foundation.spec import RunSpec
    spec = RunSpec(**PICTURES, cohort=str(coloured(tmp_path/"spots")), task=task)
    keep(spec, "spots")
    run, rng = run_id(spec), np.random.default_rng(7)
    (tmp_path/"in").mkdir()
    Image.fromarray(rng.integers(0, 255, (50, 70, 3)).astype(np.uint8)).save(tmp_path/"in"/"new.png")
    export_tuned(run, tmp_path/"out", "", None, False, True, False)
    run_bundle(tmp_path/"out"/"bundle", tmp_path/"in", tmp_path/"theirs")
    mine = predict_cases(run, [tmp_path/"in"/"new.png"], tmp_path/"mine", probabilities=True)
    if task == "classification":
        theirs = pd.read_csv(tmp_path/"theirs"/"predictions.csv", header=None).iloc[0, 1:].to_numpy(float)
        return np.testing.assert_allclose(theirs, mine[["low", "high"]].to_numpy(float)[0], atol=1e-5)
    if task == "super_resolution":
        theirs, wanted = (nib.load(p).get_fdata() for p in (
            next((tmp_path/"theirs").iterdir()), tmp_path/"mine"/"new_super_resolution.nii.gz"))
        return np.testing.assert_allclose(theirs.reshape(70, 50), wanted.reshape(70, 50), atol=1e-4)
    theirs, wanted = (np.asarray(Image.open(p)) for p in (
        next((tmp_path/"theirs").iterdir()), tmp_path/"mine"/"new_segmentation.png"))
    assert theirs.shape == wanted.shape == (50, 70) and (theirs == wanted).mean() > 0.999
    assert 0 < wanted.mean() < 1
