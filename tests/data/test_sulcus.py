"""The sulcus phantom, its cohort, and BrainVISA folders: anatomy by measurement, no shortcut to the class, label and
split rules."""
import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.ndimage import distance_transform_edt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vfm_notes.data.layouts_trees import CENTRES, brainvisa, brainvisa_example, sequential_split, sulcus_labels
from vfm_notes.data.load import load_cohort
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.sulcus import (
    PCS_CYCLE, PCS_CLASSES, Fold, SulcusCase, fold_distance, draw_sheets, sulcus_case, unroll,
)
from vfm_notes.foundation.registry import VfmError

SIZE, SPACING, N = (32, 32, 32), (2.0, 2.0, 2.0), 300


@pytest.fixture(scope="module")
def cases() -> list[SulcusCase]:
    return [sulcus_case(0, i) for i in range(N)]


def message(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    return str(caught.value)


def places(index: int) -> tuple:
    "Unrolled coordinates of a case of cohort 0."
    return unroll(np.random.default_rng(np.random.SeedSequence((0, index, 115)).spawn(3)[0]), SIZE, SPACING)[:3]


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 15), st.floats(0, 3.1), st.floats(5, 50), st.floats(4, 15))
@settings(max_examples=200, deadline=None)
def test_distance_of_a_straight_fold(s, q, x, turn, length, depth):
    "By complex numbers: turn the plane, then measure against the faces."
    fold = Fold(3.0, -2.0, turn, length, depth, gaps=((1.0, 2.0),))
    point = complex(s - 3, q + 2) * complex(math.cos(turn), -math.sin(turn))
    floor = depth * (1 - 0.5 * min(1.0, 2 * abs(point.real) / length) ** 4)
    expected = max(abs(point.imag), abs(point.real) - length / 2, x - floor, -x, 1 - abs(point.real - 1))
    assert float(fold_distance(fold, np.float64(s), np.float64(q), np.float64(x))) == pytest.approx(expected, abs=1e-4)


def test_a_case_is_the_same_in_another_process():
    program = (
        "import hashlib; from vfm_notes.data.sulcus import sulcus_case; c = sulcus_case(5, 17); "
        "print(hashlib.sha256(c.volume.tobytes() + c.label.tobytes()).hexdigest(), c.grade)"
    )
    theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    ours = sulcus_case(5, 17)
    assert theirs == [hashlib.sha256(ours.volume.tobytes() + ours.label.tobytes()).hexdigest(), str(ours.grade)]
    assert not np.array_equal(ours.volume, sulcus_case(5, 18).volume) and not np.array_equal(
        ours.volume, sulcus_case(6, 17).volume
    )


@pytest.mark.parametrize(
    "size, spacing", [((16, 16, 16), (4.0, 4.0, 4.0)), ((20, 33, 47), (3.2, 2.0, 1.5)), ((64, 64, 64), (1.0, 1.0, 1.0))]
)
def test_any_grid(size, spacing):
    case = sulcus_case(0, 4, size, spacing)
    assert case.volume.shape == (1, *size) and case.label.shape == size
    assert case.volume.dtype == np.float32 and case.label.dtype == np.uint8 and np.isfinite(case.volume).all()


def test_the_same_brain_on_another_grid():
    "Anatomy lives in millimetres: the PCS is at the same place."
    index = next(i for i in range(10) if sulcus_case(0, i).grade == 1)
    middle = [
        (np.argwhere(sulcus_case(0, index, (n,) * 3, (m,) * 3).label == 2).mean(0) - (n - 1) / 2) * m
        for n, m in ((32, 2.0), (64, 1.0))
    ]
    np.testing.assert_allclose(*middle, atol=1.5, err_msg="mm; sheets are a voxel thick, of 2 mm and of 1 mm")


def test_grades_come_in_blocks_of_ten(cases):
    grades = [c.grade for c in cases]
    for i in range(0, N, 10): assert sorted(grades[i:i + 10]) == sorted(PCS_CYCLE)
    assert PCS_CLASSES == ("absent", "prominent", "present")


def test_readers_rules(cases):
    "Absent below 20 mm, present from 20, prominent from 40; interruptions of at most 20 mm; the label shows it or not."
    for case in cases:
        assert (case.label == 2).any() == (case.grade > 0) == (case.pcs is not None)
        if not case.pcs: continue
        holes = sum(width for _, width in case.pcs.gaps)
        assert holes <= 20 and (case.pcs.length - holes >= 40) == (case.grade == 1) and case.pcs.length - holes >= 20
    parallel = [f for c in cases if c.grade == 0 for f in c.folds[2:] if abs(f.turn) < 0.5]
    assert len(parallel) > 0.4 * sum(c.grade == 0 for c in cases) and max(f.length for f in parallel) < 20, (
        "fragments in its place, too short to count"
    )


def test_the_second_fold_is_thin_and_runs_beside_the_first(cases):
    for i, case in enumerate(cases[:60]):
        if case.pcs is None: continue
        main = draw_sheets([case.folds[1]], places(i), SPACING) > 0.5
        away = distance_transform_edt(~main, sampling=SPACING)[case.label == 2]
        assert 4 < np.median(away) < 13, "mm from the cingulate sulcus"
        assert distance_transform_edt(case.label == 2, sampling=SPACING).max() < 5, "mm to the nearest voxel outside it"


def auc(score, cases) -> float: return roc_auc_score([c.grade > 0 for c in cases], score)


def test_no_global_number_tells_the_classes_apart(cases):
    voxels = [np.percentile(c.volume, (1, 50, 99)) for c in cases]
    scores = [
        [c.volume.mean() for c in cases], [c.volume.std() for c in cases], [(c.label > 0).sum() for c in cases],
        *np.transpose(voxels),
    ]
    for score in scores: assert abs(auc(score, cases) - 0.5) < 0.1, "two standard errors are 0.07"
    reader = make_pipeline(StandardScaler(), LogisticRegression())
    both = cross_val_predict(
        reader, np.transpose(scores), [c.grade > 0 for c in cases], cv=5, method="decision_function"
    )
    assert auc(both, cases) < 0.62, "nor do all of them together"


def test_the_place_of_the_folds_does(cases):
    "The longest stretch of the arch, in steps of 4 mm, with skeleton in the band where a PCS lies."
    def reach(i: int, label: np.ndarray) -> int:
        s, q, x = places(i)
        near = (np.abs(q - 8.5) < 4) & (x > 0) & (x < 7) & (label > 0)
        filled = np.bincount(((s[near] + 80) // 4).astype(int), minlength=40) >= 6
        return max(map(len, "".join(".x"[int(f)] for f in filled).split(".")))
    assert auc([reach(i, c.label) for i, c in enumerate(cases)], cases) > 0.8


def test_the_folds_can_be_seen(cases):
    "Skeleton is brighter than what is around it, though noise hides parts."
    contrast = [
        (c.volume[0][c.label > 0].mean() - c.volume[0][c.label == 0].mean()) / c.volume[0][c.label == 0].std()
        for c in cases
    ]
    assert 1.5 < np.mean(contrast) < 5 and min(contrast) > 0.5


# the cohort

def test_the_cohort_loads_and_grows(runs_root):
    small, large = (load_cohort("sulcus_phantom", SIZE, SPACING, {"train": k, "test": 10}) for k in (10, 20))
    assert (
        cohort_problems(large) == []
        and large.card.sequences == ("skeleton",)
        and large.card.classes == ("background", "skeleton", "PCS")
    )
    np.testing.assert_array_equal(small.subset("test").volumes, large.subset("test").volumes)
    assert (np.bincount(large.grade) == [15, 9, 6]).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(size=(8, 32, 32)), "box of 16 x 64 x 64 mm"),
        (dict(size=(8, 8, 8), spacing=(8.0, 8.0, 8.0)), "voxels of at most 4 mm"),
        (dict(n={}), "needs a number of cases"),
    ],
)
def test_senseless_boxes_are_refused(runs_root, change, words):
    assert words in message(
        load_cohort, "sulcus_phantom", **{**dict(size=SIZE, spacing=SPACING, n={"train": 2}), **change}
    )


# BrainVISA

def test_words_and_numbers(tmp_path):
    path = tmp_path/"labels.csv"
    path.write_text(
        "subject,left,right\n908,absent,present\n909,prominent,absent\n\n910,present,prominent\nother,?,?\n"
    )
    wanted = ["908", "909", "910"]
    assert sulcus_labels(path, wanted) == (dict(zip(wanted, (0, 1, 2))), [])
    assert sulcus_labels(path, wanted, classes=2) == (dict(zip(wanted, (0, 1, 1))), [])
    assert sulcus_labels(path, wanted, column=3)[0] == dict(zip(wanted, (2, 0, 1)))
    grades, bad = sulcus_labels(path, ["908", "other", "911"])
    assert grades == {"908": 0} and len(bad) == 2 and "no line for 911" in bad[0] and "other is '?'" in bad[1]
    path.write_text("908,absent\n908,present\n")
    assert "has 2 lines for 908" in sulcus_labels(path, ["908"])[1][0]
    assert "2 or 3 classes" in message(sulcus_labels, path, [], classes=4)


@given(st.integers(1, 900))
def test_sequential_split(n):
    split = sequential_split(n)
    assert len(split) == n and split == sorted(split, key=("train", "val", "test").index)
    assert split.count("train") == int(0.6 * n) and split.count("val") == int(0.2 * n)


def test_sequential_split_of_the_published_number():
    assert [sequential_split(595).count(s) for s in ("train", "val", "test")] == [357, 119, 119]


def test_a_brainvisa_tree(tmp_path):
    brainvisa_example(tmp_path)
    manifest = brainvisa(tmp_path)
    words = ["absent", "prominent", "present"]
    assert [words.index(g) for g in manifest.table["grade"]] == [sulcus_case(0, i).grade for i in range(10)]
    assert (
        manifest.table["case"][3] == "sub03_T1"
        and (manifest.root / manifest.table["skeleton"][3]).is_file()
        and "split" not in manifest.table
    )
    assert brainvisa(tmp_path, masks="").card.classes == ("background",)
    assert [["absent", "present"].index(g) for g in brainvisa(tmp_path, classes=2).table["grade"]] == [
        min(sulcus_case(0, i).grade, 1) for i in range(10)
    ]


def test_names_are_looked_up_less_their_ending(tmp_path):
    brainvisa_example(tmp_path)
    assert "no line for sub00_T1" in message(brainvisa, tmp_path, key_drop=0)
    (tmp_path/"labels.csv").write_text((tmp_path/"labels.csv").read_text(encoding="utf-8").replace(",", "_T1,"))
    assert len(brainvisa(tmp_path, key_drop=0)) == 10


def test_the_published_box_is_monais(tmp_path, runs_root):
    "Voxels around a voxel, by SpatialCrop on the file's own array; the file's axes point right, front, up."
    import nibabel as nib
    from monai.transforms import SpatialCrop
    brainvisa_example(tmp_path)
    big = np.random.default_rng(0).random((40, 36, 44), dtype=np.float32)
    for array, path in (
        (
            big,
            tmp_path
            / "subjects"
            / "sub00_T1"
            / "t1mri/default_acquisition/default_analysis/segmentation"
            / "Lskeleton_sub00_T1.nii.gz",
        ),
        ((big > 0.5).astype(np.uint8), tmp_path / "labels" / "Lsub00_T1.nii.gz"),
    ):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, 1, 1, 1]) @ np.diag([-1.0, 1, 1, 1])), path)
    manifest = brainvisa(tmp_path, crop="voxel 15 20 25", split="sequential")
    manifest.table = manifest.table.iloc[:1]
    ours = manifest_cohort(manifest, (16, 20, 12), (1.0, 1.0, 1.0), {})
    theirs = np.asarray(SpatialCrop(roi_center=(15, 20, 25), roi_size=(12, 20, 16))(big[None]))[0]
    np.testing.assert_allclose(
        ours.volumes[0, 0], theirs[::-1, ::-1].transpose(2, 1, 0), atol=1e-6,
        err_msg="(x, y, z) to the left, the back and up, slices first",
    )
    np.testing.assert_array_equal(ours.labels[0], theirs[::-1, ::-1].transpose(2, 1, 0) > 0.5)
    manifest.crop = "voxel 15 20 44"
    assert "centred on voxel 15x20x44" in message(manifest_cohort, manifest, (16, 20, 12), (1.0, 1.0, 1.0), {})


def test_centres_by_cohort_and_hemisphere(tmp_path):
    brainvisa_example(tmp_path)
    assert brainvisa(tmp_path, crop="benemin").crop == "voxel 60 109 85" and CENTRES["top"]["R"] == (115, 35, 171)
    assert "crop is 'topp'" in message(brainvisa, tmp_path, crop="topp")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(hemisphere="left"), "hemisphere is 'left'"), (dict(split="squential"), "Did you mean 'sequential'?"),
        (dict(subjects="none"), "has no folder none"), (dict(labels="x.csv"), "x.csv does not exist"),
        (dict(hemisphere="R"), "Rskeleton_sub09_T1.nii.gz does not exist"),
    ],
)
def test_bad_brainvisa_options(tmp_path, options, words):
    brainvisa_example(tmp_path)
    assert words in message(brainvisa, tmp_path, **options)
