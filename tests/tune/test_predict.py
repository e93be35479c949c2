"""From a study's records to answers on scans: against the run's own numbers, and against networks applied by hand."""
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import vfm_notes.tune.catalog
from made_cases import boxes, message
from vfm_notes.analysis.chosen import choose_runs, model_card
from vfm_notes.data.load import load_cohort
from vfm_notes.data.loader import moments, normalise
from vfm_notes.data.manifest import write_manifest
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import load_study, run_id, run_specs
from vfm_notes.report.weights_commands import predict_cases, read_centre, tuned_members
from vfm_notes.runs.record import new_record, read_record, write_record
from vfm_notes.tune.predict import apply_networks, plan_of_record
from vfm_notes.tune.transfer import run_data, transfer, tuned_model

STUDY = dict(
    name="boxes", title="made", cohort="cohorts/boxes", size=[4, 32, 32], spacing=[3.0, 1.0, 1.0],
    cases={"pretrain": 0, "train": 6, "val": 2, "test": 4}, backbones=["profound_toy.random"],
    tasks={"segmentation": {}, "classification": {}, "super_resolution": {}, "translation": {"target": "adc"}},
    strategies=["scratch"], seeds=[0, 1], budget={"epochs": 1, "batch_size": 2},
)


def keep(spec, study):
    out = transfer(spec)
    write_record(run_folder(study, run_id(spec)), new_record(spec, study, **out.summary), out.curves, out.cases,
                 out.features, out.weights, adapters=out.adapters)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A cohort of files, a study of it, and its records; the cohort is gone before anything is predicted."
    root = tmp_path_factory.mktemp("predict")
    folder = root/"cohorts"/"boxes"
    write_manifest(boxes(folder, 12), folder)
    (root/"boxes.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(root/"runs"))
        study = load_study(root/"boxes.yaml")
        for spec in run_specs(study):
            if spec.task == "segmentation" or spec.seed == 0: keep(spec, study.name)
        yield root


def specs_of(root: Path, task: str) -> list:
    return [s for s in run_specs(load_study(root/"boxes.yaml")) if s.task == task]


def by_hand(spec, inputs):
    "What the stored weights give for the test cases of a run."
    task, data = run_data(spec)
    state = load_file(run_folder("boxes", run_id(spec))/"weights.safetensors")
    network = tuned_model(spec, task, 2, state).eval()
    with torch.no_grad(): return task, data[inputs], network(data[inputs].inputs)


def native(values: np.ndarray) -> np.ndarray:
    """The part of a grid of 4 x 32 x 32 that the files of 6 x 16 x 16 voxels cover, slices 1 to 4 of theirs; their x
    and y run right and front, those of a grid left and back."""
    return values[:, 8:24, 8:24][:, ::-1, ::-1]


def test_an_ensemble_answers_as_its_networks_by_hand(place, tmp_path):
    specs = specs_of(place, "segmentation")
    names = load_cohort(specs[0].cohort, specs[0].size, specs[0].spacing, specs[0].cases).subset("test").names
    folder = place/"cohorts"/"boxes"
    words = [w for n in names for w in (f"t2w={folder}/{n}_t2w.nii.gz", f"adc={folder}/{n}_adc.nii.gz")]
    table = predict_cases(str(place/"boxes.yaml"), words, tmp_path/"out", task="segmentation", whole=False,
                          probabilities=True)
    found = [by_hand(s, "test")[2].softmax(1) for s in specs]
    mean, sd = torch.stack(found).mean(0).numpy(), torch.stack(found).std(0).numpy()
    assert table["case"].tolist() == [f"{n}_t2w" for n in names]
    for i, n in enumerate(names):
        read = lambda what: nib.load(tmp_path/"out"/f"{n}_t2w_{what}.nii.gz")
        label = read("segmentation")
        assert label.shape == (16, 16, 6) and np.allclose(label.affine, np.diag([1.0, 1, 3, 1]))
        inside = np.asarray(label.dataobj).transpose(2, 1, 0)[1:5]
        wanted = native(mean[i].argmax(0))
        assert np.array_equal(inside, wanted)
        gland = read("probability_gland").get_fdata().transpose(2, 1, 0)[1:5]
        assert np.allclose(gland, native(mean[i, 1]), atol=1e-5)
        spread = read("uncertainty").get_fdata().transpose(2, 1, 0)[1:5]
        assert np.allclose(spread, native(np.take_along_axis(sd[i], mean[i].argmax(0)[None], 0)[0]), atol=1e-5)
        ml = (np.asarray(label.dataobj) == 1).sum() * 3 / 1000
        assert table["gland, ml"][i] == pytest.approx(ml)
        assert (tmp_path/"out"/f"{n}_t2w.png").read_bytes()[:4] == b"\x89PNG"


def test_all_of_a_scan_is_seen_and_its_middle_as_before(place, tmp_path):
    "A scan larger than the grid: windows go over all of it; its intensities are scaled by the middle."
    rng = np.random.default_rng(5)
    for s in ("t2w", "adc"):
        (tmp_path/"big").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(rng.normal(100, 20, (70, 60, 12)).astype(np.float32), np.diag([-1.0, -1, 3, 1])),
                 tmp_path/"big"/f"{s}.nii.gz")
    run = run_id(specs_of(place, "segmentation")[0])
    whole = predict_cases(run, [tmp_path/"big"], tmp_path/"whole", probabilities=True)
    part = predict_cases(run, [tmp_path/"big"], tmp_path/"part", whole=False, probabilities=True)
    read = lambda f: nib.load(tmp_path/f/"big_probability_gland.nii.gz").get_fdata()
    assert read("whole").shape == (70, 60, 12) and (read("whole").max((0, 1)) > 0).all()
    outside = read("part").copy()
    outside[19:51, 14:46, 4:8] = 0
    assert read("part")[19:51, 14:46, 4:8].min() > 0 and outside.max() == 0
    member, = tuned_members(run)[0]
    raw = np.stack([nib.load(tmp_path/"big"/f"{s}.nii.gz").get_fdata(dtype=np.float32).transpose(2, 1, 0)
                    for s in ("t2w", "adc")])[None]
    inner = raw[:, :, 4:8, 14:46, 19:51]
    with torch.no_grad(): alone = member.network(torch.from_numpy(normalise(inner))).softmax(1)[0, 1].numpy()
    assert np.allclose(read("part")[19:51, 14:46, 4:8].transpose(2, 1, 0), alone, atol=1e-5)
    from monai.inferers import sliding_window_inference
    mean, sd = moments(inner)
    with torch.no_grad():
        slid = sliding_window_inference(
            torch.from_numpy((raw - mean) / sd), (4, 32, 32), 2, member.network, overlap=0.5, mode="gaussian"
        ).softmax(1)[0, 1].numpy()
    assert np.allclose(read("whole").transpose(2, 1, 0), slid, atol=1e-4) and len(whole) == len(part) == 1


def test_grades_are_the_probabilities_of_the_run(place, tmp_path):
    spec, = [s for s in specs_of(place, "classification") if s.seed == 0]
    task, data, output = by_hand(spec, "test")
    folder = place/"cohorts"/"boxes"
    table = predict_cases(run_id(spec), [folder], tmp_path/"out", centre="middle").set_index("case")
    wanted = output.softmax(1).numpy()
    for i, n in enumerate(data.names):
        assert table.loc[n, ["low", "high"]].to_numpy(float) == pytest.approx(wanted[i], abs=1e-5)
        assert table.loc[n, "answer"] == ("low", "high")[int(wanted[i].argmax())]
    kept = pd.read_parquet(run_folder("boxes", run_id(spec))/"cases.parquet")
    score = kept[kept.metric == "score_1"].set_index("case")["value"]
    assert np.allclose(table.loc[score.index, "high"], score, atol=1e-5)
    assert "--centre middle" in message(predict_cases, run_id(spec), [folder], tmp_path/"no")


def test_an_image_comes_back_in_the_units_of_its_sequence(place, tmp_path):
    spec, = [s for s in specs_of(place, "super_resolution") if s.seed == 0]
    case = place/"cohorts"/"boxes"/"c3_t2w.nii.gz"
    predict_cases(run_id(spec), [f"t2w={case}", f"adc={case.with_name('c3_adc.nii.gz')}"], tmp_path/"out", whole=False)
    found = nib.load(tmp_path/"out"/"c3_t2w_super_resolution.nii.gz").get_fdata().transpose(2, 1, 0)[1:5]
    member, = tuned_members(run_id(spec))[0]
    raw = np.zeros((1, 2, 4, 32, 32), np.float32)
    for c, s in enumerate(("t2w", "adc")):
        values = nib.load(case.with_name(f"c3_{s}.nii.gz")).get_fdata().transpose(2, 1, 0)
        raw[0, c, :, 8:24, 8:24] = values[1:5, ::-1, ::-1]
    first = raw[0, 0][raw[0, 0] != 0]
    x = np.concatenate([normalise(raw), normalise(raw[:, :1])], 1)
    with torch.no_grad(): out = member.network(torch.from_numpy(x))[0, 0].numpy() * first.std() + first.mean()
    assert np.allclose(found, native(out), rtol=1e-4, atol=1e-2) and 80 < found.mean() < 120


def test_a_translation_reads_its_source_alone(place, tmp_path):
    spec, = [s for s in specs_of(place, "translation") if s.seed == 0]
    folder = place/"cohorts"/"boxes"
    predict_cases(run_id(spec), [folder/"c3_t2w.nii.gz"], tmp_path/"out", whole=False)
    found = nib.load(tmp_path/"out"/"c3_t2w_translation.nii.gz").get_fdata()
    record = read_record(run_folder("boxes", run_id(spec)))
    mean, sd = record["input"]["learned"]["target_moments"]
    train = [nib.load(folder/f"{n}_adc.nii.gz").get_fdata()[..., 1:5] for n in record["train_cases"]]
    assert mean == pytest.approx(np.mean([t.mean() for t in train]), rel=1e-4)
    assert sd == pytest.approx(np.mean([t.std() for t in train]), rel=1e-3) and np.isfinite(found).all()
    assert "no sequence 'adc'" in message(predict_cases, run_id(spec), [f"adc={folder}/c3_adc.nii.gz"], tmp_path/"no")


def test_no_training_case_is_needed(place, tmp_path, monkeypatch):
    run, moved = run_id(specs_of(place, "segmentation")[0]), tmp_path/"elsewhere"
    (tmp_path/"scan").mkdir()
    for s in ("t2w", "adc"): (tmp_path/"scan"/f"{s}.nii.gz").write_bytes(
        (place/"cohorts"/"boxes"/f"c1_{s}.nii.gz").read_bytes())
    folder = run_folder("boxes", run)
    moved.mkdir()
    for f in folder.iterdir(): (moved/f.name).write_bytes(f.read_bytes())
    named = moved.rename(tmp_path/run)
    for f in folder.iterdir(): __import__("shutil").copystat(f, named/f.name)
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"nothing"))
    monkeypatch.setattr("vfm_notes.data.load.load_cohort", None)
    monkeypatch.setattr("vfm_notes.tune.transfer.load_cohort", None)
    assert len(predict_cases(str(named), [tmp_path/"scan"], tmp_path/"out")) == 1


def test_what_was_done_is_not_done_again_and_folders_are_not_mixed(place, tmp_path, monkeypatch):
    runs = [run_id(s) for s in specs_of(place, "segmentation")]
    case = [f"{s}={place}/cohorts/boxes/c1_{s}.nii.gz" for s in ("t2w", "adc")]
    first = predict_cases(runs[0], case, tmp_path/"out")
    import vfm_notes.tune.predict as module
    monkeypatch.setattr(module, "ensemble_answer", None)  # would be called for a new case
    assert predict_cases(runs[0], case, tmp_path/"out").equals(first)
    assert "holds predictions of other networks" in message(predict_cases, runs[1], case, tmp_path/"out")
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"x").write_text("mine")
    assert "holds files that are no predictions" in message(predict_cases, runs[0], case, tmp_path/"full")


def test_which_runs_a_name_stands_for(place):
    chosen = choose_runs(str(place/"boxes.yaml"), "segmentation")
    assert [r["spec"]["seed"] for r in chosen.records] == [0, 1] and "an ensemble of its 2 runs" in chosen.reason
    score = []
    for f in chosen.folders:
        curves = pd.read_parquet(f/"curves.parquet")
        score.append(curves[curves.name == "val_dice"].sort_values("epoch")["value"].iloc[-1])
    assert f"{np.mean(score):.3f}" in chosen.reason
    assert "has 4 tasks; choose one: --task classification" in message(choose_runs, str(place/"boxes.yaml"))
    assert "no cell whose runs are all done" in message(choose_runs, str(place/"boxes.yaml"), "translation")
    assert "neither a run" in message(choose_runs, "segmentaton-x-12345678")


def test_records_that_cannot_answer_say_what_to_do(place):
    record = read_record(run_folder("boxes", run_id(specs_of(place, "segmentation")[0])))
    assert "kept no tuned weights (weights.safetensors), which every run of 'vfm run' keeps" in message(
        plan_of_record, record | {"files": {}})
    assert "an earlier version wrote it" in message(plan_of_record, record | {"input": {}})
    assert "expected a finished fine-tuning" in message(plan_of_record, record | {"status": "failed"})
    two = tuned_members(run_id(specs_of(place, "segmentation")[0]))[0] + tuned_members(
        run_id(specs_of(place, "classification")[0]))[0]
    assert "are no ensemble: their task is" in message(apply_networks, two, ["x"], "out")
    assert read_centre("1,-2.5,3") == (1, -2.5, 3) and "expected x,y,z" in message(read_centre, "1,2")


def test_the_card_states_scores_with_their_intervals(place):
    chosen = choose_runs(str(place/"boxes.yaml"), "segmentation")
    text = model_card(chosen.records, chosen.folders, ["a limit"])
    dice = np.mean([r["metrics"]["dice"] for r in chosen.records])
    line = next(l for l in text.splitlines() if l.startswith("| Dice |"))
    value, low, high = float(line.split("|")[2]), *map(float, re.findall(r"[\d.]+", line.split("|")[3]))
    assert value == pytest.approx(dice, abs=6e-4) and low <= value <= high
    for word in ("Intended use", "Leakage", "Apache-2.0", "6 cases to train", "a limit", "zscore_nonzero"):
        assert word in text
