"""Bad files of a cohort on disk: each kind is refused with one sentence, listed by a check, and left out where that is
asked for."""
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from made_cases import GLAND, GRID, LESION, boxes, message, nifti, picture_of
from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import check_manifest
from vfm_notes.data.load import manifest_cohort
from vfm_notes.data.manifest import manifest_problems

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
    "cut off": (
        lambda f: (f / "c1_t2w.nii.gz").write_bytes((f / "c1_t2w.nii.gz").read_bytes()[:-40]),
        "c1_t2w.nii.gz is cut off or damaged",
    ),
    "not an image": (
        lambda f: (f / "c1_t2w.nii.gz").write_text("no volume"), "c1_t2w.nii.gz ends in .gz but is not a gzip file",
    ),
    "empty": (lambda f: (f / "c1_t2w.nii.gz").write_bytes(b""), "c1_t2w.nii.gz is empty (0 bytes)"),
    "4D": (
        lambda f: nifti(f / "c1_t2w.nii.gz", np.stack([picture_of(0), picture_of(1)], -1)),
        "c1_t2w.nii.gz has 4 dimensions",
    ),
    "NaN": (
        lambda f: nifti(f / "c1_t2w.nii.gz", np.where(picture_of(0) > 150, np.nan, picture_of(0)).astype(np.float32)),
        "voxels that are not finite",
    ),
    "constant": (
        lambda f: nifti(f / "c1_adc.nii.gz", picture_of(0) * 0 + 3), "c1_adc.nii.gz is constant (3 everywhere)",
    ),
    "absurd spacing": (
        lambda f: nifti(f / "c1_adc.nii.gz", picture_of(0), np.diag([500.0, 1, 1, 1])),
        "c1_adc.nii.gz has a spacing of 500",
    ),
    "singular affine": (lambda f: flat(f / "c1_adc.nii.gz"), "c1_adc.nii.gz has a singular affine"),
    "no overlap": (
        lambda f: nifti(
            f / "c1_adc.nii.gz", picture_of(0), np.array([[1.0, 0, 0, 900], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
        ),
        "c1_adc.nii.gz does not overlap with the grid of the case",
    ),
    "other plane": (
        lambda f: turned(picture_of(0), f), "c1_adc.nii.gz has sagittal slices (3x1x1 mm), expected axial ones",
    ),
    "mask of other shape": (
        lambda f: nifti(f / "c1_gland.nii.gz", GLAND[:, :, :4]),
        "c1_gland.nii.gz has 16x16x4 voxels, expected as many as an image of the case (t2w 16x16x6",
    ),
    "mask without the organ": (lambda f: nifti(f / "c1_gland.nii.gz", GLAND * 0), "c1_gland.nii.gz: The mask is empty"),
    "copied": (lambda f: shutil.copy(f / "c0_adc.nii.gz", f / "c1_adc.nii.gz"), "c1: has the same adc as c0"),
    "unsigned overflow": (
        lambda f: nifti(f / "c1_t2w.nii.gz", (picture_of(0) - 110).astype(np.int16).astype(np.uint16)),
        "c1_t2w.nii.gz has",
    ),
    "mask elsewhere": (
        lambda f: nifti(
            f / "c1_gland.nii.gz", GLAND, np.array([[1.0, 0, 0, 400], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
        ),
        "c1_gland.nii.gz does not lie on its image (t2w)",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_wrong_with_the_files_of_a_case(tmp_path, runs_root, kind):
    manifest, (damage, words) = boxes(tmp_path, 4), FILES[kind]
    damage(tmp_path)
    assert manifest_problems(manifest) == [], "seen only when it is opened"
    said = message(manifest_cohort, manifest, **GRID, n={})
    assert words in said and "c1:" in said and "1 bad case" in said and "\n" not in said
    found = check_manifest(manifest)
    assert len(found) == 1 and words in found[0]
    left = manifest_cohort(manifest, **GRID, n={}, exclude_bad=True)
    assert (
        left.names == ["c0", "c2", "c3"]
        and [e["case"] for e in left.excluded] == ["c1"]
        and words.removeprefix("c1: ") in left.excluded[0]["reason"]
    )
    assert cohort_problems(left) == []


@pytest.mark.parametrize(
    "values, words",
    [(np.where(GLAND > 0, 7, 0), "has the values 7, expected only 0, 1, 2"), (GLAND * 0, "background everywhere")],
)
def test_one_label_file_for_all_classes(tmp_path, runs_root, values, words):
    manifest = boxes(tmp_path, 4, mask_gland=None, mask_lesion=None, label=[f"c{i}_label.nii.gz" for i in range(4)])
    manifest.crop = "label"
    for i in range(4): nifti(tmp_path/f"c{i}_label.nii.gz", (GLAND + LESION).astype(np.uint8))
    masks = manifest_cohort(
        boxes(
            tmp_path, 4, mask_lesion=[f"c{i}_l.nii.gz" for i in range(4) if nifti(tmp_path / f"c{i}_l.nii.gz", LESION)]
        ),
        **GRID,
        n={},
    )
    assert np.array_equal(manifest_cohort(manifest, **GRID, n={}).labels, masks.labels), (
        "the same as one mask for each class"
    )
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
