"""Cohorts, volumes, real data sets and normalisation: laws of splitting, and bad input made as real files."""
import gzip
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import given, settings, strategies as st

from vfm_notes.data import cohort as cohort_module
from vfm_notes.data.cache import read_cohort
from vfm_notes.data.cohort import (
    Cohort, CohortCard, check_arguments, cohort_problems, split_by_patient, stratified_order, validate_cohort,
)
from vfm_notes.data.load import load_cohort
from vfm_notes.data.datasets import HIPPOCAMPUS, PROSTATES
from vfm_notes.data.load import cohort_key, cohort_maker
from vfm_notes.data.loader import NORMALISATIONS, batches, cohort_moments, moments, normalise, standardise
from vfm_notes.data.volume import centre_of, crop_or_pad, grid_around, read_image, read_mask, resample, to_array
from vfm_notes.foundation.registry import VfmError, cohorts

TINY = dict(size=(4, 16, 16), spacing=(4.0, 3.0, 3.0))
RAMP = np.arange(6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)


def toy(n: int = 8) -> Cohort:
    rng = np.random.default_rng(0)
    labels = np.zeros((n, 4, 8, 8), np.uint8)
    labels[:, 1:3, 2:6, 2:6] = 1
    card = CohortCard(
        "toy", "toy", "Apache-2.0", "here", "none", ("t2w", "adc"), ("background", "box"), ("low", "high"),
        (1.0, 1.0, 1.0),
    )
    return Cohort(
        card, rng.random((n, 2, 4, 8, 8), dtype=np.float32), labels, np.arange(n) % 2, [f"c{i}" for i in range(n)],
        [f"p{i}" for i in range(n)], (["pretrain", "train", "val", "test"] * n)[:n],
    )


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine)
    nib.save(image, path)
    return path


def message(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    return str(caught.value)


# splits

@given(
    st.lists(st.tuples(st.integers(0, 14), st.integers(-1, 2)), min_size=8, max_size=60), st.integers(0, 99), st.data()
)
@settings(max_examples=60, deadline=None)
def test_a_patient_is_in_one_split(pairs, seed, data):
    patients, grade = [f"p{a}" for a, _ in pairs], [g for _, g in pairs]
    n = dict(zip(("train", "val", "test"), data.draw(st.tuples(*[st.integers(0, len(pairs) // 4)] * 3))))
    try: split = split_by_patient(patients, grade, n, seed)
    except VfmError as e:
        assert "fits into no split" in str(e)
        return
    assert split == split_by_patient(patients, grade, n, seed), "reproducible"
    for p in set(patients): assert len({s for s, q in zip(split, patients) if q == p}) == 1
    assert all(split.count(s) <= k for s, k in n.items())


@given(st.lists(st.integers(0, 2), min_size=12, max_size=80), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_single_case_patients_give_exact_and_stratified_splits(grade, seed):
    k = len(grade)
    n = dict(pretrain=k // 4, train=k // 3, test=k // 5)
    split = np.array(split_by_patient([f"p{i}" for i in range(k)], grade, n, seed))
    assert {s: int((split == s).sum()) for s in n} == n
    for s, m in n.items():
        for g in set(grade): assert abs(np.sum((split == s) & (np.array(grade) == g)) - m * grade.count(g) / k) <= 2


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60), st.integers(0, 9))
@settings(deadline=None)
def test_every_prefix_of_the_order_is_stratified(grade, seed):
    order, grade = stratified_order(grade, seed), np.array(grade)
    assert sorted(order) == list(range(len(grade)))
    for g in set(grade.tolist()):
        seen, share = np.cumsum(grade[order] == g), (grade == g).mean()
        assert np.abs(seen - share * np.arange(1, len(grade) + 1)).max() <= len(set(grade.tolist()))


def test_too_many_cases_are_refused():
    assert "30 cases are requested" in message(split_by_patient, ["a"] * 5, [0] * 5, dict(train=30), 0)
    assert "has 2" in message(toy().subset, "train", 9)
    assert "Did you mean 'train'" in message(toy().subset, "trian")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_subsets_are_nested_in_n_and_the_same_for_all_callers(a, b, seed):
    whole = replace(toy(40), split=["train"] * 40)
    small, large = sorted((a, b))
    first, second = whole.subset("train", small, seed), whole.subset("train", large, seed)
    assert set(first.names) <= set(second.names)
    assert first.hash() == whole.subset("train", small, seed).hash()


# checks

def test_a_sound_cohort_has_no_problems():
    assert cohort_problems(toy()) == [] and validate_cohort(toy()).hash() == toy().hash()


def spoil(name: str) -> Cohort:
    c = toy()
    c.volumes, c.labels, c.grade = c.volumes.copy(), c.labels.copy(), c.grade.copy()
    if name == "nan": c.volumes[3, 1, 0, 0, 0] = np.nan
    if name == "infinite": c.volumes[3, 0] = np.inf
    if name == "constant": c.volumes[2, 1] = 4
    if name == "label": c.labels[1, 0, 0, 0] = 7
    if name == "no label": c.labels[1] = 0
    if name == "grade": c.grade[0] = 2
    if name == "split": c.split[0] = "tran"
    if name == "name": c.names[1] = "c0"
    if name == "patient": c.patients[1] = "p0"
    if name == "content": c.volumes[5] = c.volumes[0]
    if name == "one sequence": c.volumes[6, 0] = c.volumes[1, 0]
    if name == "length": c.patients = c.patients[:5]
    if name == "grid": c.labels = c.labels[:, :3]
    if name == "channels": c.volumes = c.volumes[:, :1]
    if name == "type": c.volumes = c.volumes.astype(np.float64)
    if name == "empty": c = c.pick([])
    return c


@pytest.mark.parametrize(
    "name, words",
    {
        "nan": "c3: adc has 1 voxels that are not finite", "infinite": "c3: t2w has 256 voxels that are not finite",
        "constant": "c2: adc is constant (4)", "label": "c1: label 7 is out of range",
        "no label": "c1: the label is background everywhere", "grade": "c0: grade 2 is out of range",
        "split": "c0: unknown split 'tran'. Did you mean 'train'?", "name": "c0: 2 cases have this name",
        "patient": "patient p0 is in the splits pretrain and train",
        "content": "c5 (train) and c0 (pretrain) have the same t2w",
        "one sequence": "c6 (val) and c1 (train) have the same t2w", "length": "patients: 5 entries, expected 8",
        "grid": "labels of shape (8, 3, 8, 8)", "channels": "expected (n, 2, d, h, w)", "type": "volumes are float64",
        "empty": "no cases",
    }.items(),
)
def test_each_problem_is_told(name, words):
    assert words in message(validate_cohort, spoil(name))


def test_all_problems_are_told_at_once():
    c = spoil("nan")
    c.labels[1, 0, 0, 0], c.patients[1], c.volumes[2, 1] = 7, "p0", 4
    text = message(validate_cohort, c)
    assert "4 problems" in text and all(w in text for w in ("c3: adc", "label 7", "patient p0", "c2: adc is constant"))


@pytest.mark.parametrize(
    "change",
    [
        dict(volumes=lambda v: v + 1e-3), dict(labels=lambda v: 1 - v), dict(grade=lambda g: 1 - g),
        dict(names=lambda n: n[::-1]), dict(split=lambda s: s[::-1]),
    ],
)
def test_the_hash_is_of_the_content(change):
    (key, function), = change.items()
    assert replace(toy(), **{key: function(getattr(toy(), key))}).hash() != toy().hash()


def test_describe_counts(tmp_path):
    table = toy().describe().set_index("split")
    assert table["cases"].tolist() == [2, 2, 2, 2] and table["low"].sum() == table["high"].sum() == 4
    assert table["box, ml"].tolist() == pytest.approx([0.03] * 4, abs=0.005)


# loading and the cache

def test_load_twice_is_the_same_and_makes_once(runs_root, monkeypatch):
    first = load_cohort("phantom", **TINY, n={"train": 4, "test": 3}, seed=2)
    assert len(list((runs_root/"cache").iterdir())) == 1
    monkeypatch.setattr(cohort_module, "phantom_case", None)  # making would fail
    again = load_cohort("phantom", **TINY, n={"test": 3, "train": 4}, seed=2)
    assert again.hash() == first.hash() and again.card == first.card and np.array_equal(again.zones, first.zones)


@pytest.mark.parametrize("how", ["cut", "one bit", "no text", "one array missing", "other shape"])
def test_a_damaged_cache_is_made_again(runs_root, how):
    first = load_cohort("phantom", **TINY, n={"train": 3})
    content, (folder,) = first.hash(), (runs_root/"cache").iterdir()
    raw = (folder/"volumes.npy").read_bytes()
    del first
    match how:
        case "cut": (folder/"volumes.npy").write_bytes(raw[:5000])
        case "one bit": (folder/"volumes.npy").write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
        case "no text": (folder/"cohort.json").write_text((folder/"cohort.json").read_text(encoding="utf-8")[:-9])
        case "one array missing": (folder/"labels.npy").unlink()
        case "other shape": np.save(folder/"zones.npy", np.zeros((2, 4, 16, 16), np.uint8))
    assert read_cohort(folder) is None
    assert load_cohort("phantom", **TINY, n={"train": 3}).hash() == content
    assert read_cohort(folder).hash() == content, "and repaired"


def test_a_failed_write_leaves_nothing(runs_root, monkeypatch):
    monkeypatch.setattr(
        np, "save", lambda path, values: (Path(path).write_bytes(b"half"), (_ for _ in ()).throw(OSError("disk full")))
    )
    with pytest.raises(OSError): load_cohort("phantom", **TINY, n={"train": 3})
    assert list((runs_root/"cache").iterdir()) == []


def test_the_cache_key_knows_arguments_and_code(runs_root, monkeypatch, tmp_path):
    base = {**check_arguments(**TINY, n={"train": 3}), "seed": 0}
    key = lambda a: cohort_key("phantom", cohort_maker("phantom"), a, False)
    keys = {
        key(a)
        for a in (
            base, {**base, "seed": 1}, {**base, "n": {"train": 4}}, {**base, "size": (4, 16, 17)},
            {**base, "spacing": (4.0, 3.0, 3.1)},
        )
    }
    assert len(keys) == 5
    changed, find = tmp_path/"phantom.py", importlib.util.find_spec
    changed.write_text(
        Path(find("vfm_notes.data.phantom").origin).read_text(encoding="utf-8") + "\n# another version\n"
    )
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda m: SimpleNamespace(origin=str(changed)) if m == "vfm_notes.data.phantom" else find(m),
    )
    assert key(base) not in keys


def test_growing_one_split_keeps_the_others(runs_root):
    small, large = (load_cohort("phantom", **TINY, n={"train": k, "test": 3}) for k in (3, 5))
    assert small.subset("test").hash() == large.subset("test").hash()
    assert cohort_problems(large) == [] and large.names[0] == "phantom-train-000"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(size=(4, 16)), "three positive whole numbers"), (dict(size=(4, 0, 16)), "three positive whole numbers"),
        (dict(size=(4, 16.5, 16)), "three positive whole numbers"), (dict(spacing=(4, 1.5)), "three numbers of mm"),
        (dict(spacing=(4, 0, 1)), "between 0.05 and 50"), (dict(spacing=(4, float("nan"), 1)), "between 0.05 and 50"),
        (dict(n={"trian": 3}), "Did you mean 'train'?"), (dict(n={"train": -1}), "expected a whole number"),
        (dict(n={"train": 1.5}), "expected a whole number"), (dict(n={}), "needs a number of cases"),
    ],
)
def test_senseless_arguments_are_refused(runs_root, change, words):
    assert words in message(load_cohort, "phantom", **{**TINY, "n": {"train": 2}, **change})
    assert not runs_root.exists() or not list(runs_root.rglob("*.npy"))


def test_an_unknown_cohort_names_the_nearest(runs_root):
    assert "Did you mean 'phantom'?" in message(load_cohort, "fantom", **TINY, n={"train": 2})


def test_registered_cohorts_have_full_cards():
    load = subprocess.run(
        [
            sys.executable, "-c",
            "import sys, vfm_notes.data.datasets, vfm_notes.data.loader, vfm_notes.data.degrade; print('torch' in "
            "sys.modules, 'monai' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert load.stdout.split() == ["False", "False"]
    assert {"phantom", "hippocampus", "prostate_cases"} <= set(cohorts)


# files

def damage(kind: str, folder: Path) -> Path:
    good, path = nifti(folder/"good.nii.gz", RAMP), folder/f"{kind.replace(' ', '_')}.nii.gz"
    flat, raw = np.diag([1.0, 1, 0, 1]), gzip.decompress(good.read_bytes())
    match kind:
        case "folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(good.read_bytes()[:-40])
        case "cut to the header":
            path.write_bytes(good.read_bytes()[:15])
        case "not gzip":
            path.write_bytes(b"this is no volume, it is a letter")
        case "not nifti":
            path.write_bytes(gzip.compress(b"this is no volume, it is a letter" * 30))
        case "cut, plain":
            (path := folder / "cut.nii").write_bytes(raw[:-100])
        case "text mha":
            (path := folder / "letter.mha").write_text("Dear colleague,\n")
        case "text nrrd":
            (path := folder / "letter.nrrd").write_text("NRRD0004\nnot a header\n")
        case "cut nrrd":
            sitk.WriteImage(sitk.GetImageFromArray(RAMP), str(folder / "good.nrrd"), useCompression=False)
            (path := folder / "cut.nrrd").write_bytes((folder / "good.nrrd").read_bytes()[:-200])
        case "ending":
            shutil.copy(good, path := folder / "good.png")
        case "4d":
            nifti(path, np.stack([RAMP, RAMP + 1], -1))
        case "2d":
            sitk.WriteImage(sitk.GetImageFromArray(RAMP[0]), str(path := folder / "flat.mha"))
        case "colour":
            sitk.WriteImage(
                sitk.GetImageFromArray(np.stack([RAMP] * 3, -1), isVector=True), str(path := folder / "colour.mha")
            )
        case "nan":
            nifti(path, np.where(RAMP == 5, np.nan, RAMP).astype(np.float32))
        case "infinite":
            nifti(path, np.where(RAMP > 330, np.inf, RAMP).astype(np.float32))
        case "constant":
            nifti(path, RAMP * 0 + 3)
        case "spacing":
            nifti(path, RAMP, np.diag([500.0, 1, 1, 1]))
        case "tiny spacing":
            nifti(path, RAMP, np.diag([1e-4, 1, 1, 1]))
        case "singular":
            image = nib.Nifti1Image(RAMP, None)
            image.header.set_sform(flat, code=1)
            image.header.set_qform(np.eye(4), code=0)
            nib.save(image, path)
    return path


@pytest.mark.parametrize(
    "kind, words",
    {
        "absent": "does not exist", "folder": "is a folder", "empty": "is empty (0 bytes)", "cut": "cut off or damaged",
        "cut to the header": "cut off or damaged", "not gzip": "not a gzip file", "not nifti": "not a NIfTI image",
        "cut, plain": "cut off", "text mha": "cannot be read as an image", "text nrrd": "cannot be read as an image",
        "cut nrrd": "cannot be read as an image", "ending": "unknown ending", "4d": "has 4 dimensions",
        "2d": "has 2 dimensions", "colour": "3 values per voxel", "nan": "1 voxels that are not finite",
        "infinite": "5 voxels that are not finite", "constant": "is constant (3 everywhere)",
        "spacing": "has a spacing of 500", "tiny spacing": "has a spacing of 0.0001", "singular": "singular affine",
    }.items(),
)
def test_bad_files_are_told_in_one_sentence(tmp_path, kind, words):
    path = damage(kind, tmp_path)
    text = message(read_image, path)
    assert words in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_good_files_of_each_format(tmp_path, suffix):
    image = sitk.GetImageFromArray(RAMP)
    image.SetSpacing((0.5, 0.6, 3.0))
    sitk.WriteImage(image, str(tmp_path/f"x{suffix}"))
    np.testing.assert_array_equal(to_array(read_image(tmp_path/f"x{suffix}")), RAMP)


def test_masks_have_only_the_values_they_may(tmp_path):
    labels = (RAMP % 3).astype(np.uint8)
    path = nifti(tmp_path/"m.nii.gz", labels)
    assert set(np.unique(to_array(read_mask(path, range(3))))) == {0, 1, 2}
    assert "has the values 2, expected only 0, 1" in message(read_mask, path, (0, 1))
    assert to_array(read_mask(nifti(tmp_path/"none.nii.gz", labels * 0), (0, 1))).max() == 0, "an empty mask is fine"


@pytest.mark.parametrize("letters", ["LPS", "RAS", "LAS", "PIR", "SLA"])
def test_orientation_is_by_anatomy(tmp_path, letters):
    "The same head stored in another order of axes reads as the same array."
    lps = sitk.GetImageFromArray(RAMP)
    lps.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(sitk.DICOMOrient(lps, letters), str(tmp_path/"x.nii.gz"))
    image = read_image(tmp_path/"x.nii.gz")
    np.testing.assert_array_equal(to_array(image), RAMP)
    assert image.GetSpacing() == pytest.approx((1, 2, 3)) and image.GetOrigin() == pytest.approx((0, 0, 0), abs=1e-5)


def test_resampling_a_linear_ramp_is_exact():
    "Linear interpolation of a linear function has no error, at any spacing that is not coarser."
    z, y, x = np.meshgrid(*[np.arange(n) for n in (10, 20, 30)], indexing="ij")
    image = sitk.GetImageFromArray((2*x + 3*y - z).astype(np.float32))
    image.SetSpacing((1.0, 1.5, 2.0))
    grid = grid_around(image, centre_of(image), (9, 12, 14), (1.1, 0.7, 0.9))
    place = [[grid.TransformIndexToPhysicalPoint((i, j, k)) for k in (0, 8)] for i, j in ((0, 0), (13, 11))]
    values = resample(image, grid)
    for (a, b), (i, j) in zip(place, ((0, 0), (13, 11))):
        for point, k in ((a, 0), (b, 8)):
            x_, y_, z_ = np.array(point) / (1.0, 1.5, 2.0)
            assert values[k, j, i] == pytest.approx(2*x_ + 3*y_ - z_, abs=1e-3)


def test_masks_stay_whole_numbers_and_coarse_grids_average():
    labels = sitk.GetImageFromArray((np.random.default_rng(0).random((8, 32, 32)) > 0.5).astype(np.float32) * 2)
    grid = grid_around(labels, centre_of(labels), (4, 8, 8), (2.0, 4.0, 4.0))
    assert set(np.unique(resample(labels, grid, mask=True))) <= {0, 2}
    assert resample(labels, grid).std() < 0.35 * to_array(labels).std(), (
        "no aliasing: what the grid cannot hold is averaged"
    )
    assert resample(labels, grid)[1:3, 1:7, 1:7].mean() == pytest.approx(to_array(labels).mean(), abs=0.1)


def test_images_that_do_not_overlap_are_refused():
    here, there = sitk.GetImageFromArray(RAMP), sitk.GetImageFromArray(RAMP)
    there.SetOrigin((500, 0, 0))
    assert "does not overlap" in message(
        resample, there, grid_around(here, centre_of(here), (6, 7, 8), (1, 1, 1)), what="adc.nii.gz"
    )
    assert "mask is empty" in message(centre_of, sitk.GetImageFromArray(RAMP * 0), mask=True)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 12)] * 3))
@settings(max_examples=50, deadline=None)
def test_cropping_and_padding(shape, size):
    array = np.random.default_rng(0).random(shape) + 1
    out = crop_or_pad(array, size)
    assert out.shape == size
    if all(s >= n for n, s in zip(shape, size)):
        np.testing.assert_array_equal(crop_or_pad(out, shape), array, err_msg="padding loses nothing")
    assert (out > 0).sum() == np.prod(np.minimum(shape, size))


# real data

def test_real_data_needs_its_folder(runs_root, tmp_path, monkeypatch):
    monkeypatch.delenv("VFM_DATA", raising=False)
    for name in ("hippocampus", "prostate_cases"):
        assert "VFM_DATA is not set" in message(load_cohort, name, (32, 48, 32), (1, 1, 1), {"test": 2})
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    assert HIPPOCAMPUS in message(load_cohort, "hippocampus", (32, 48, 32), (1, 1, 1), {"test": 2})
    assert not list(runs_root.rglob("*.npy"))


def fake_hippocampus(root: Path, n: int = 6) -> Path:
    folder = root/HIPPOCAMPUS
    for part in ("images", "labels"): (folder/part).mkdir(parents=True)
    for i in range(n):
        rng, labels = np.random.default_rng(i), np.zeros((35, 50, 36), np.uint8)
        labels[12:20, 10:20, 10:20], labels[12:20, 20:35, 10:20] = 1, 2
        nifti(folder/"images"/f"h{i}.nii.gz", rng.random(labels.shape).astype(np.float32))
        nifti(folder/"labels"/f"h{i}.nii.gz", labels)
    pd.DataFrame({"case": [f"h{i}" for i in range(n)]}).to_csv(folder/"cases.csv", index=False)
    return folder


def test_hippocampus_from_made_files(runs_root, tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    folder = fake_hippocampus(tmp_path)
    arguments = ("hippocampus", (32, 48, 32), (1.0, 1.0, 1.0), {"train": 3, "test": 2})
    cohort = load_cohort(*arguments)
    assert cohort.volumes.shape == (5, 1, 32, 48, 32) and sorted(cohort.split) == ["test"] * 2 + ["train"] * 3
    assert (cohort.labels == 1).sum() == 5 * 800 and (cohort.labels == 2).sum() == 5 * 1200
    nifti(folder/"images"/"h0.nii.gz", np.random.default_rng(99).random((35, 50, 36)).astype(np.float32))
    nifti(folder/"images"/"h1.nii.gz", np.random.default_rng(98).random((35, 50, 36)).astype(np.float32))
    assert load_cohort(*arguments).hash() != cohort.hash(), "another file, another cohort: the cache is not asked"


def test_all_bad_cases_of_a_folder_are_told_at_once(runs_root, tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    folder = fake_hippocampus(tmp_path)
    (folder/"images"/"h1.nii.gz").unlink()
    nifti(folder/"labels"/"h3.nii.gz", np.full((35, 50, 36), 9, np.uint8))
    nifti(folder/"labels"/"h4.nii.gz", np.ones((35, 50, 30), np.uint8))
    text = message(load_cohort, "hippocampus", (32, 48, 32), (1, 1, 1), {"train": 6})
    assert "3 bad cases" in text and all(
        w in text
        for w in (
            "h1.nii.gz does not exist", "h3.nii.gz has the values 9",
            "h4.nii.gz has 35x50x30 voxels, expected as many as an image of the case",
        )
    )
    assert not list(runs_root.rglob("*.npy")), "nothing half written"


def test_a_copied_case_is_a_leak(runs_root, tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    folder = fake_hippocampus(tmp_path)
    shutil.copy(folder/"images"/"h0.nii.gz", folder/"images"/"h5.nii.gz")
    assert "has the same t1w as" in message(
        load_cohort, "hippocampus", (32, 48, 32), (1, 1, 1), {"train": 3, "test": 3}
    )


@pytest.mark.parametrize(
    "text, words", [("name\nh1\n", "has no column 'case'"), ("case\nh1\nh1\n", "lists h1 more than once")]
)
def test_a_bad_manifest(runs_root, tmp_path, monkeypatch, text, words):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    (fake_hippocampus(tmp_path, 2)/"cases.csv").write_text(text)
    assert words in message(load_cohort, "hippocampus", (32, 48, 32), (1, 1, 1), {"train": 1})


def test_real_hippocampi(runs_root, real_data, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(real_data))
    cohort = load_cohort("hippocampus", (32, 48, 32), (1, 1, 1), {"pretrain": 20, "train": 15, "val": 5, "test": 10})
    assert cohort_problems(cohort) == [] and len(cohort) == 50 and (cohort.grade == -1).all()
    table = pd.read_csv(real_data/HIPPOCAMPUS/"cases.csv").set_index("case").loc[cohort.names]
    kept = np.stack([(cohort.labels == k).sum((1, 2, 3)) for k in (1, 2)], 1)
    whole = table[["anterior_mm3", "posterior_mm3"]].to_numpy()
    assert kept.sum() / whole.sum() > 0.995 and (kept <= whole).all(), "less than 0.5 % of the label is cut off"
    places = [np.argwhere(cohort.labels == k)[:, 2].mean() for k in (1, 2)]
    assert places[0] < places[1], "h goes to the back"


def test_real_prostates(runs_root, real_data, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(real_data))
    cohort = load_cohort("prostate_cases", (12, 64, 64), (4, 1.5, 1.5), {})
    assert cohort.names == list(PROSTATES) and cohort.split == ["test"] * 3 and cohort.grade.tolist() == [2, 1, 2]
    assert cohort.card.non_commercial and "BY-NC" in cohort.card.licence
    masks = [(files[3], files[5]) for files in PROSTATES.values()]
    for i, (name, (gland, lesion)) in enumerate(zip(cohort.names, masks)):
        ml = lambda f: (to_array(read_image(real_data/name/f"{f}.nii.gz", constant=True)) > 0).sum() * 0.75e-3
        assert (cohort.labels[i] > 0).sum() * 9e-3 == pytest.approx(ml(gland), rel=0.06), "the gland keeps its volume"
        assert (cohort.labels[i] == 2).sum() * 9e-3 == pytest.approx(ml(lesion), rel=0.1, abs=0.2), (
            "a lesion of two 3 mm slices may fill only one of 4 mm"
        )
        box = np.argwhere(cohort.labels[i] > 0)
        assert (np.abs((box.min(0) + box.max(0)) / 2 - [5.5, 31.5, 31.5]) < 1.6).all(), "centred on the gland"
        gland = cohort.volumes[i, 2][cohort.labels[i] == 1]
        assert 900 < gland.mean() < 1900, "ADC in 1e-6 mm2/s"


# normalisation and batches

@given(st.integers(0, 999), st.floats(0.5, 200), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_zscore_does_not_see_gain_and_keeps_zeros(seed, gain, shift):
    raw = np.random.default_rng(seed).random((2, 2, 3, 8, 8), dtype=np.float32) + 1
    raw[:, :, :, :2] = 0
    z = normalise(raw)
    np.testing.assert_allclose(normalise(raw * np.float32(gain)), z, atol=1e-3)
    assert (z[raw == 0] == 0).all()
    inside = z[:, :, :, 2:].reshape(4, -1)
    np.testing.assert_allclose(inside.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(inside.std(1), 1, atol=1e-4)


def test_moments_bring_back_raw_intensities():
    raw = np.random.default_rng(0).random((2, 1, 3, 4, 4), dtype=np.float32) + 1
    mean, sd = moments(raw)
    np.testing.assert_allclose(standardise(raw, mean, sd) * sd + mean, raw, rtol=1e-5)
    assert moments(np.ones((1, 1, 2, 2, 2)))[1].item() == 1, "a constant is not divided by zero"


def test_rules_are_named_and_others_refused():
    raw = np.random.default_rng(0).random((2, 2, 3, 8, 8)) * 900
    for how in NORMALISATIONS:
        out = normalise(raw, how, cohort_moments(raw))
        assert out.dtype == np.float32 and np.isfinite(out).all()
    assert "Did you mean 'zscore" in message(normalise, raw, "z_score")
    assert "shape" in message(normalise, raw[0], "none")


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 3))
@settings(deadline=None)
def test_batches_see_every_case_once(n, size, epoch):
    parts = batches(n, size, 0, epoch)
    assert sorted(np.concatenate(parts)) == list(range(n)) and all(len(p) == size for p in parts[:-1])
    assert [p.tolist() for p in parts] == [p.tolist() for p in batches(n, size, 0, epoch)]
    assert all(len(p) == size for last in ("drop", "fill") for p in batches(n, size, 0, epoch, last))
