"""Manifests: a table and a card become a cohort, every layout the same way; damage is named, and nothing leaves silently."""
import importlib
import json
import pkgutil
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import yaml
from hypothesis import given, settings, strategies as st

import vfm_notes.data
from vfm_notes.data import cache
from vfm_notes.data.cache import cohort_maker, read_cohort
from vfm_notes.data.cohort import Cohort, CohortCard, load_cohort, problems
from vfm_notes.data.decode import check_manifest, is_picture, manifest_cohort
from vfm_notes.data.manifest import Manifest, as_text, layouts, located, mask_columns, manifest_problems, read_manifest, write_manifest
from vfm_notes.data.volume import read_image, split_address, to_array
from vfm_notes.foundation.registry import VfmError

for module in pkgutil.iter_modules(vfm_notes.data.__path__): importlib.import_module(f"vfm_notes.data.{module.name}")  # all layouts register

GRID = dict(size=(4, 12, 12), spacing=(3.0, 1.0, 1.0))
CARD = CohortCard("boxes", "Boxes", "Apache-2.0", "made here", "none", ("t2w", "adc"), ("background", "gland", "lesion"), ("low", "high"), (3.0, 1.0, 1.0))


def message(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    return str(caught.value)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1, 3, 1]) if affine is None else affine), path)
    return path.name


def picture_of(seed: int) -> np.ndarray: return np.random.default_rng(seed).normal(100, 20, (16, 16, 6)).astype(np.float32)


GLAND, LESION = np.zeros((16, 16, 6), np.uint8), np.zeros((16, 16, 6), np.uint8)
GLAND[4:12, 4:12, 1:5], LESION[5:7, 6:9, 2:4] = 1, 1


def boxes(folder: Path, n: int = 6, **columns) -> Manifest:
    "A cohort of n cases as files; columns replace those of the table."
    for i in range(n):
        for j, s in enumerate(CARD.sequences): nifti(folder/f"c{i}_{s}.nii.gz", picture_of(10*i + j))
        nifti(folder/f"c{i}_gland.nii.gz", GLAND)
        if i % 2: nifti(folder/f"c{i}_lesion.nii.gz", LESION)
    names = [f"c{i}" for i in range(n)]
    table = dict(case=names, patient=[f"p{i}" for i in range(n)], t2w=[f"{c}_t2w.nii.gz" for c in names], adc=[f"{c}_adc.nii.gz" for c in names],
                 mask_gland=[f"{c}_gland.nii.gz" for c in names], mask_lesion=[f"{c}_lesion.nii.gz" if i % 2 else "none" for i, c in enumerate(names)], grade=["low", "high"] * (n // 2) + ["low"] * (n % 2))
    return Manifest(as_text(pd.DataFrame({k: v for k, v in (table | columns).items() if v is not None})), CARD, folder, crop="mask_gland")


# the contract of a layout: registering it is being tested

@pytest.fixture(params=list(layouts))
def imported(request, tmp_path, runs_root) -> tuple[str, Path, Manifest]:
    src = tmp_path/"src"
    src.mkdir()
    layouts.card(request.param)["example"](src)
    return request.param, src, layouts[request.param](src)


def tiny_grid(manifest: Manifest) -> dict:
    flat = is_picture(located(manifest.root, manifest.table[manifest.card.sequences[0]][0]))
    return dict(size=(1, 8, 8), spacing=manifest.card.spacing) if flat else dict(size=(4, 16, 16), spacing=manifest.card.spacing)


def test_layout_contract(imported, tmp_path):
    name, src, manifest = imported
    assert layouts.card(name)["title"] and layouts[name].__doc__
    assert manifest_problems(manifest) == [] and len(manifest)
    dest = write_manifest(manifest, tmp_path/"dest")
    again = read_manifest(dest)
    assert again.table.equals(manifest.table) and (again.card, again.crop, again.targets, again.root) == (manifest.card, manifest.crop, manifest.targets, manifest.root.resolve())
    assert check_manifest(again) == []
    cohort = load_cohort(str(dest), **tiny_grid(manifest), n={})
    assert problems(cohort) == [] and len(cohort) == len(manifest) and not cohort.excluded
    assert set(cohort.names) == set(manifest.table.case) and cohort.volumes.std() > 0
    assert len(set(zip(cohort.patients, cohort.split))) == len(set(cohort.patients)), "a patient is in one split"


def test_layout_names_a_broken_file(imported, tmp_path):
    name, src, manifest = imported
    row = manifest.table.iloc[0]
    path, _ = split_address(located(manifest.root, row[manifest.card.sequences[0]]))
    if path.is_dir(): path = sorted(p for p in path.rglob("*") if p.is_file())[0]
    path.write_bytes(path.read_bytes()[:-max(20, path.stat().st_size // 3)])
    said = message(manifest_cohort, manifest, **tiny_grid(manifest), n={})
    assert path.name in said and row.case in said and "\n" not in said
    assert any(path.name in p for p in check_manifest(manifest))
    left = manifest_cohort(manifest, **tiny_grid(manifest), n={}, exclude_bad=True) if path.suffix != ".npz" and len(manifest) > 1 else None
    if left: assert row.case in {e["case"] for e in left.excluded} and row.case not in left.names


def test_the_layouts_of_the_studies_are_there(): assert {"picai", "prostate158", "prostatex", "bids", "medmnist", "aptos2019", "isic2019", "cbis_ddsm", "chexpert"} <= set(layouts)


# reading and writing

@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_csv_and_parquet_are_the_same(tmp_path, runs_root, kind):
    manifest = boxes(tmp_path/"a")
    manifest.table = as_text(manifest.table.assign(grade=[0, 1] * 3))
    folder = write_manifest(manifest, tmp_path/"a")
    if kind == "parquet":
        manifest.table.assign(grade=[0, 1] * 3).to_parquet(folder/"manifest.parquet")
        (folder/"manifest.csv").unlink()
    again = read_manifest(folder)
    assert again.table.equals(manifest.table)
    cohort = load_cohort(str(folder), **GRID, n={})
    assert cohort.grade.tolist() == [0, 1] * 3 and cohort.card.licence == "Apache-2.0"


text = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(text, min_size=1, max_size=5, unique=True), text, st.lists(text, max_size=3, unique=True))
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, cells, title, grades):
    folder = tmp_path_factory.mktemp("m")
    card = replace(CARD, title=title, note=title, grades=tuple(grades))
    manifest = Manifest(as_text(pd.DataFrame({"case": cells, "patient": cells, "note_x": cells[::-1]})), card, folder, targets=tuple(grades))
    again = read_manifest(write_manifest(manifest, folder))
    assert again.table.equals(manifest.table) and again.card == manifest.card and again.targets == tuple(grades) and again.root == folder.resolve()


def test_another_cohort_is_not_overwritten(tmp_path):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    write_manifest(boxes(tmp_path, 4), tmp_path)  # the same cohort again is fine
    assert len(read_manifest(folder)) == 4
    assert "holds the cohort 'boxes', not 'other'" in message(write_manifest, replace(boxes(tmp_path), card=replace(CARD, name="other")), folder)
    (folder/"card.yaml").unlink()
    assert "was not written here" in message(write_manifest, boxes(tmp_path), folder)


def test_a_crash_leaves_no_half_manifest(tmp_path, monkeypatch):
    folder, real = write_manifest(boxes(tmp_path), tmp_path), cache.os.replace
    monkeypatch.setattr(cache.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")) if Path(b).name == "card.yaml" else real(a, b))
    with pytest.raises(OSError): write_manifest(boxes(tmp_path, 4), folder)
    assert "card.yaml does not exist" in message(read_manifest, folder), "a folder with a card is complete"


@pytest.mark.parametrize("change, words", [
    ({"licence": None}, "licence is None, expected text"), ({"sequences": "t2w"}, "sequences is 't2w', expected a list"), ({"classes": ["gland"]}, "expected 'background' and"), ({"grades": [True, False]}, "in quotes"),
    ({"spacing": [1, 1]}, "three numbers of mm"), ({"non_commercial": "no"}, "expected true or false"), ({"lisence": "x"}, "Did you mean 'licence'"), ({"name": ...}, "'name'")])
def test_a_wrong_card_is_told(tmp_path, change, words):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    values = yaml.safe_load((folder/"card.yaml").read_text()) | change
    (folder/"card.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not ...}))
    said = message(read_manifest, folder)
    assert words in said and "card.yaml" in said and "\n" not in said


@pytest.mark.parametrize("how, words", {"no folder": "no manifest.csv", "two tables": "both manifest.csv and manifest.parquet", "no card": "card.yaml does not exist", "bad yaml": "not valid YAML", "a list": "expected a mapping", "not a table": "cannot be read as a table"}.items())
def test_a_folder_that_is_no_cohort(tmp_path, how, words):
    folder = write_manifest(boxes(tmp_path), tmp_path)
    match how:
        case "no folder": folder = tmp_path/"nowhere"
        case "two tables": boxes(tmp_path).table.to_parquet(folder/"manifest.parquet")
        case "no card": (folder/"card.yaml").unlink()
        case "bad yaml": (folder/"card.yaml").write_text("name: [")
        case "a list": (folder/"card.yaml").write_text("- name")
        case "not a table": (folder/"manifest.csv").write_bytes(b"\xff\xfe\x00case\n")
    assert words in message(read_manifest, folder)


# what may be wrong with a table

def cell(column: str, value: str):
    def change(m: Manifest) -> None: m.table.loc[1, column] = value
    return change


TABLES = {
    "missing column": (lambda m: setattr(m, "table", m.table.drop(columns="adc")), "column 'adc' is missing"),
    "unknown column": (lambda m: m.table.insert(2, "pateint", "x"), "unknown column 'pateint'. Did you mean 'patient'"),
    "duplicate row": (cell("case", "c0"), "case c0 has 2 rows, expected one"),
    "no name": (cell("case", ""), "row 3: case is missing"),
    "no patient": (cell("patient", ""), "c1: patient is missing"),
    "path outside the root": (cell("t2w", "../../etc/x.nii.gz"), "lies outside the root"),
    "absolute path outside": (cell("t2w", "/etc/hostname"), "lies outside the root"),
    "missing sequence": (cell("adc", ""), "c1: adc is missing, expected a path"),
    "absent file": (cell("adc", "nowhere.nii.gz"), "nowhere.nii.gz does not exist"),
    "missing label": (cell("mask_gland", ""), "c1: mask_gland is missing, expected a path (or 'none'"),
    "missing grade": (cell("grade", ""), "c1: grade is missing"),
    "grade out of range": (cell("grade", "2"), "c1: grade is '2', expected 0 to 1, low, high or unknown"),
    "unknown split": (lambda m: m.table.insert(2, "split", ["train", "tset"] + ["test"] * 4), "c1: split is 'tset', expected one of pretrain, train, val, test. Did you mean 'test'?"),
    "missing split": (lambda m: m.table.insert(2, "split", ["train", ""] + ["test"] * 4), "c1: split is missing"),
    "patient in two splits": (lambda m: (m.table.insert(2, "split", ["train", "test"] * 3), cell("patient", "p0")(m)), "patient p0 is in the splits test and train"),
    "target": (lambda m: (m.table.insert(2, "target_gas", ["0", "yes"] + ["1"] * 4), setattr(m, "targets", ("gas",))), "c1: target_gas is 'yes', expected 0 or 1"),
    "missing target": (lambda m: setattr(m, "targets", ("gas",)), "column 'target_gas' is missing"),
    "crop": (lambda m: setattr(m, "crop", "mask_glnd"), "crop is 'mask_glnd', expected 'volume' or a mask column"),
    "root": (lambda m: setattr(m, "root", m.root/"nowhere"), "is not a folder"),
    "no rows": (lambda m: setattr(m, "table", m.table[:0]), "the table has no rows"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_wrong_with_a_table(tmp_path, runs_root, kind):
    manifest, (change, words) = boxes(tmp_path), TABLES[kind]
    assert manifest_problems(manifest) == []
    change(manifest)
    assert any(words in p for p in manifest_problems(manifest)), manifest_problems(manifest)
    assert words in message(manifest_cohort, manifest, **GRID, n={}) and any(words in p for p in check_manifest(manifest))


def test_all_problems_of_a_table_are_listed(tmp_path):
    manifest = boxes(tmp_path)
    for i, (column, value) in enumerate([("t2w", ""), ("grade", "huge"), ("adc", "no.nii.gz"), ("mask_gland", ""), ("patient", "")]): manifest.table.loc[i, column] = value
    assert [p.split(":")[0] for p in manifest_problems(manifest)] == ["c0", "c1", "c2", "c3", "c4"]


# what may be wrong with the files of a case

def flat(path: Path) -> None:
    "An image whose header maps it onto a plane."
    image = nib.Nifti1Image(picture_of(0), None)
    image.header.set_sform(np.diag([1.0, 1, 0, 1]), code=1)
    image.header.set_qform(np.eye(4), code=0)
    nib.save(image, path)


def turned(values: np.ndarray, folder: Path) -> None:
    "An image with sagittal slices of 3 mm."
    nifti(folder/"c1_adc.nii.gz", values, np.diag([3.0, 1, 1, 1]))


FILES = {
    "cut off": (lambda f: (f/"c1_t2w.nii.gz").write_bytes((f/"c1_t2w.nii.gz").read_bytes()[:-40]), "c1_t2w.nii.gz is cut off or damaged"),
    "not an image": (lambda f: (f/"c1_t2w.nii.gz").write_text("no volume"), "c1_t2w.nii.gz ends in .gz but is not a gzip file"),
    "empty": (lambda f: (f/"c1_t2w.nii.gz").write_bytes(b""), "c1_t2w.nii.gz is empty (0 bytes)"),
    "4D": (lambda f: nifti(f/"c1_t2w.nii.gz", np.stack([picture_of(0), picture_of(1)], -1)), "c1_t2w.nii.gz has 4 dimensions"),
    "NaN": (lambda f: nifti(f/"c1_t2w.nii.gz", np.where(picture_of(0) > 150, np.nan, picture_of(0)).astype(np.float32)), "voxels that are not finite"),
    "constant": (lambda f: nifti(f/"c1_adc.nii.gz", picture_of(0) * 0 + 3), "c1_adc.nii.gz is constant (3 everywhere)"),
    "absurd spacing": (lambda f: nifti(f/"c1_adc.nii.gz", picture_of(0), np.diag([500.0, 1, 1, 1])), "c1_adc.nii.gz has a spacing of 500"),
    "singular affine": (lambda f: flat(f/"c1_adc.nii.gz"), "c1_adc.nii.gz has a singular affine"),
    "no overlap": (lambda f: nifti(f/"c1_adc.nii.gz", picture_of(0), np.array([[1.0, 0, 0, 900], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])), "c1_adc.nii.gz does not overlap with the grid of the case"),
    "other plane": (lambda f: turned(picture_of(0), f), "c1_adc.nii.gz has sagittal slices (3x1x1 mm), expected axial ones"),
    "mask of other shape": (lambda f: nifti(f/"c1_gland.nii.gz", GLAND[:, :, :4]), "c1_gland.nii.gz has 16x16x4 voxels, expected as many as an image of the case (t2w 16x16x6"),
    "mask without the organ": (lambda f: nifti(f/"c1_gland.nii.gz", GLAND * 0), "c1_gland.nii.gz: The mask is empty"),
    "copied": (lambda f: shutil.copy(f/"c0_adc.nii.gz", f/"c1_adc.nii.gz"), "c1: has the same adc as c0"),
    "unsigned overflow": (lambda f: nifti(f/"c1_t2w.nii.gz", (picture_of(0) - 110).astype(np.int16).astype(np.uint16)), "c1_t2w.nii.gz has"),
    "outside the grid": (lambda f: nifti(f/"c1_gland.nii.gz", GLAND, np.array([[1.0, 0, 0, 400], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])), "does not overlap with the grid"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_wrong_with_the_files_of_a_case(tmp_path, runs_root, kind):
    manifest, (damage, words) = boxes(tmp_path, 4), FILES[kind]
    damage(tmp_path)
    assert manifest_problems(manifest) == [], "seen only when it is opened"
    said = message(manifest_cohort, manifest, **GRID, n={})
    assert words in said and "c1:" in said and "1 bad case" in said and "\n" not in said
    assert len(check_manifest(manifest)) == 1 and words in check_manifest(manifest)[0]
    left = manifest_cohort(manifest, **GRID, n={}, exclude_bad=True)
    assert left.names == ["c0", "c2", "c3"] and [e["case"] for e in left.excluded] == ["c1"] and words.removeprefix("c1: ") in left.excluded[0]["reason"]
    assert problems(left) == []


@pytest.mark.parametrize("values, words", [(np.where(GLAND > 0, 7, 0), "has the values 7, expected only 0, 1, 2"), (GLAND * 0, "background everywhere")])
def test_one_label_file_for_all_classes(tmp_path, runs_root, values, words):
    manifest = boxes(tmp_path, 4, mask_gland=None, mask_lesion=None, label=[f"c{i}_label.nii.gz" for i in range(4)])
    manifest.crop = "label"
    for i in range(4): nifti(tmp_path/f"c{i}_label.nii.gz", (GLAND + LESION).astype(np.uint8))
    masks = manifest_cohort(boxes(tmp_path, 4, mask_lesion=[f"c{i}_l.nii.gz" for i in range(4) if nifti(tmp_path/f"c{i}_l.nii.gz", LESION)]), **GRID, n={})
    assert np.array_equal(manifest_cohort(manifest, **GRID, n={}).labels, masks.labels), "the same as one mask for each class"
    nifti(tmp_path/"c1_label.nii.gz", values.astype(np.uint8))
    manifest.crop = "volume"
    said = message(manifest_cohort, manifest, **GRID, n={})
    assert words in said and "c1:" in said


def test_absent_is_not_missing(tmp_path, runs_root):
    manifest = boxes(tmp_path, 4)
    cohort = manifest_cohort(manifest, **GRID, n={})
    assert [(cohort.labels[i] == 2).any() for i in range(4)] == [False, True, False, True]
    manifest.table.loc[1, "mask_lesion"] = ""
    assert "c1: mask_lesion is missing" in message(manifest_cohort, manifest, **GRID, n={})


# geometry

def test_a_grid_of_the_images_spacing_interpolates_nothing(tmp_path, runs_root):
    cohort = manifest_cohort(boxes(tmp_path, 2), **GRID, n={})
    stored = to_array(read_image(tmp_path/"c0_t2w.nii.gz"))
    cut = [stored[k:k + 4, j:j + 12, i:i + 12] for k in range(3) for j in range(5) for i in range(5)]
    best = min(np.abs(cohort.volumes[0, 0] - c).max() for c in cut)
    assert best < 1e-4 and cohort.labels[0].sum() >= (cohort.labels[0] > 0).sum() == GLAND.sum(), "a piece of the file, with the whole gland"


@pytest.mark.parametrize("how", ["flipped", "nrrd", "mha", "shifted grid"])
def test_the_same_anatomy_gives_the_same_arrays(tmp_path, runs_root, how):
    manifest = boxes(tmp_path, 2)
    plain = manifest_cohort(manifest, **GRID, n={})
    match how:
        case "flipped":
            for p in tmp_path.glob("c0_*"): sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(p)), "PIR"), str(p))
        case "nrrd" | "mha":
            sitk.WriteImage(sitk.ReadImage(str(tmp_path/"c0_t2w.nii.gz")), str(tmp_path/f"c0.{how}"))
            manifest.table.loc[0, "t2w"] = f"c0.{how}"
        case "shifted grid":
            image = sitk.ConstantPad(sitk.ReadImage(str(tmp_path/"c0_adc.nii.gz")), (3, 2, 1), (1, 4, 2), 0)
            sitk.WriteImage(image, str(tmp_path/"c0_adc.nii.gz"))
    other = manifest_cohort(manifest, **GRID, n={})
    np.testing.assert_allclose(other.volumes, plain.volumes, atol=1e-4)
    assert np.array_equal(other.labels, plain.labels)


# splits

@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=4, max_size=30), st.integers(0, 50), st.tuples(*[st.integers(0, 6)] * 4))
@settings(max_examples=60, deadline=None)
def test_splits_never_share_a_patient(rows, seed, counts):
    plan = cache.Plan(CARD, [cache.Source(f"c{i}", f"p{p}", tuple, grade=g) for i, (p, g) in enumerate(rows)], (1, 1, 1), {k: v for k, v in zip(cache.SPLITS, counts) if v} or {"train": 1}, seed, {})
    try: used = cache.deal(plan, {})
    except VfmError: return
    homes = {}
    for s, split in used: homes.setdefault(s.patient, set()).add(split)
    assert all(len(h) == 1 for h in homes.values())
    assert [s.name for s, _ in used] == [s.name for s, _ in cache.deal(plan, {})], "reproducible"
    assert [cache.SPLITS.index(k) for _, k in used] == sorted(cache.SPLITS.index(k) for _, k in used), "a split is one piece"
    assert all(sum(h == k for _, h in used) <= v for k, v in plan.n.items())


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_given_splits_are_kept_and_nested(a, b, seed):
    sources = [cache.Source(f"c{i}", f"p{i}", tuple, split=cache.SPLITS[i % 4], grade=i % 3) for i in range(24)]
    used = lambda k: dict((s.name, home) for s, home in cache.deal(cache.Plan(CARD, sources, (1, 1, 1), {"train": k}, seed, {}), {}))
    small, large = used(min(a, b)), used(max(a, b))
    assert set(small) <= set(large) and set(large.values()) == {"train"} and all(int(c[1:]) % 4 == 1 for c in large)


def test_too_many_cases_are_told_in_one_sentence(tmp_path, runs_root):
    manifest = boxes(tmp_path)
    manifest.table.insert(2, "split", ["train"] * 4 + ["test"] * 2)
    assert "asked for are 5 of split 'train', which has 4" in message(manifest_cohort, manifest, **GRID, n={"train": 5})
    (tmp_path/"c0_t2w.nii.gz").unlink()
    said = message(manifest_cohort, manifest, **GRID, n={"train": 4}, exclude_bad=True)
    assert "boxes without its 1 bad case has too few cases" in said and "4 of split 'train', which has 3" in said


def test_another_case_takes_the_place_of_a_bad_one(tmp_path, runs_root):
    manifest, n = boxes(tmp_path, 8), {"train": 4, "test": 2}
    whole = manifest_cohort(manifest, **GRID, n=n, exclude_bad=True)
    assert whole.excluded == []
    victim = whole.names[0]
    (tmp_path/f"{victim}_adc.nii.gz").write_bytes(b"")
    rest = manifest_cohort(manifest, **GRID, n=n, exclude_bad=True)
    assert victim not in rest.names and len(rest) == 6 and [e["case"] for e in rest.excluded] == [victim] and "is empty" in rest.excluded[0]["reason"]
    assert [c.excluded for p in (runs_root/"cache").iterdir() if (c := read_cohort(p)) and c.excluded] == [rest.excluded], "also from the cache"


# the cache

def counted(monkeypatch) -> list:
    seen, real = [], vfm_notes.data.decode.decode_row
    monkeypatch.setattr(vfm_notes.data.decode, "decode_row", lambda m, row, *rest: (seen.append(row["case"]), real(m, row, *rest))[1])
    return seen


def test_only_new_and_changed_cases_are_decoded(tmp_path, runs_root, monkeypatch):
    seen = counted(monkeypatch)
    first = manifest_cohort(boxes(tmp_path, 4), **GRID, n={})
    assert sorted(seen) == ["c0", "c1", "c2", "c3"]
    manifest_cohort(read_manifest(write_manifest(Manifest(boxes_table(tmp_path, 4), CARD, tmp_path, "mask_gland"), tmp_path)), **GRID, n={})
    assert len(seen) == 4, "nothing changed"
    nifti(tmp_path/"c1_adc.nii.gz", picture_of(77))
    for s in CARD.sequences: nifti(tmp_path/f"c4_{s}.nii.gz", picture_of(50 + len(s) + ord(s[0])))
    nifti(tmp_path/"c4_gland.nii.gz", GLAND)
    more = manifest_cohort(Manifest(boxes_table(tmp_path, 5), CARD, tmp_path, "mask_gland"), **GRID, n={})
    assert seen[4:] == ["c1", "c4"] and np.array_equal(more.volumes[0], first.volumes[0])
    manifest_cohort(Manifest(boxes_table(tmp_path, 5), CARD, tmp_path, "mask_gland"), (4, 12, 10), (3, 1, 1), {})
    assert len(seen) == 11, "another transform"


def boxes_table(folder: Path, n: int) -> pd.DataFrame:
    return as_text(pd.DataFrame([dict(case=f"c{i}", patient=f"p{i}", t2w=f"c{i}_t2w.nii.gz", adc=f"c{i}_adc.nii.gz", mask_gland=f"c{i}_gland.nii.gz", mask_lesion=f"c{i}_lesion.nii.gz" if i % 2 else "none", grade=("low", "high")[i % 2]) for i in range(n)]))


def test_a_known_case_that_is_damaged_is_decoded_again(tmp_path, runs_root, monkeypatch):
    seen, manifest = counted(monkeypatch), boxes(tmp_path, 4)
    first = manifest_cohort(manifest, **GRID, n={})
    folder, = (runs_root/"cache").iterdir()
    raw = bytearray((folder/"volumes.npy").read_bytes())
    raw[-5] ^= 1  # in the last case
    (folder/"volumes.npy").write_bytes(raw)
    seen.clear()
    again = manifest_cohort(manifest, **GRID, n={})
    assert seen == ["c3"] and problems(again) == [] and again.hash() == read_cohort(folder).hash()


def test_the_cohort_is_mapped_and_a_split_is_a_view(tmp_path, runs_root):
    cohort = manifest_cohort(boxes(tmp_path, 6), **GRID, n={"train": 3, "test": 3})
    assert isinstance(cohort.volumes, np.memmap)
    test = cohort.subset("test")
    assert np.shares_memory(test.volumes, cohort.volumes) and test.hash() == test.pick(range(3)).hash() != cohort.hash()
    before = cohort.hash()
    cohort.volumes[:] = 0  # the process's own copy
    assert manifest_cohort(boxes_manifest(tmp_path), **GRID, n={"train": 3, "test": 3}).hash() == before


def boxes_manifest(folder: Path) -> Manifest: return Manifest(boxes_table(folder, 6), CARD, folder, "mask_gland")


def test_a_stopped_decoding_leaves_nothing(tmp_path, runs_root, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(vfm_notes.data.decode, "decode_row", stop)
    with pytest.raises(KeyboardInterrupt): manifest_cohort(boxes(tmp_path, 2), **GRID, n={})
    assert list((runs_root/"cache").iterdir()) == []


# names

def test_a_cohort_is_found_by_path_and_by_name(tmp_path, runs_root, monkeypatch):
    write_manifest(boxes(tmp_path/"mine", 4), tmp_path/"mine")
    by_path = load_cohort(str(tmp_path/"mine"), **GRID, n={})
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    assert load_cohort("mine", **GRID, n={}).hash() == by_path.hash()
    assert "Unknown cohort 'mein'" in message(cohort_maker, "mein") and "manifest.csv and card.yaml" in message(cohort_maker, "mein")


# pictures

def test_pictures_are_volumes_of_one_slice(tmp_path, runs_root):
    rng = np.random.default_rng(0)
    np.savez(tmp_path/"set.npz", images=rng.integers(0, 255, (4, 9, 9), dtype=np.uint8))
    card = replace(CARD, name="pictures", sequences=("grey",), classes=("background",), grades=("no", "yes"))
    manifest = Manifest(as_text(pd.DataFrame({"case": list("abcd"), "patient": list("abcd"), "grey": [f"set.npz#images/{i}" for i in range(4)], "grade": ["no", "yes"] * 2, "target_x": [0, 1, 1, 0], "target_y": [1, 1, 0, 0]})), card, tmp_path, targets=("x", "y"))
    cohort = manifest_cohort(read_manifest(write_manifest(manifest, tmp_path)), (1, 9, 9), (1, 1, 1), {})
    assert cohort.volumes.shape == (4, 1, 1, 9, 9) and not cohort.labels.any() and problems(cohort) == []
    assert cohort.targets.tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]] and cohort.card.targets == ("x", "y")
    assert cohort.describe().loc[0, "x"] == 2
    assert "is a picture, the study's size is [2, 9, 9]" in message(manifest_cohort, manifest, (2, 9, 9), (1, 1, 1), {})
