"""A small cohort of made cases, written as files: for tests of manifests, of the cache and of whole runs."""
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from vfm_notes.data.cohort import CohortCard
from vfm_notes.data.manifest import Manifest, text_table
from vfm_notes.foundation.registry import VfmError

GRID = dict(size=(4, 12, 12), spacing=(3.0, 1.0, 1.0))
CARD = CohortCard(
    "boxes", "Boxes", "Apache-2.0", "made here", "none", ("t2w", "adc"), ("background", "gland", "lesion"),
    ("low", "high"), (3.0, 1.0, 1.0),
)


def message(function, *args, **kwargs) -> str:
    with pytest.raises(VfmError) as caught: function(*args, **kwargs)
    return str(caught.value)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1, 3, 1]) if affine is None else affine), path)
    return path.name


def picture_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, (16, 16, 6)).astype(np.float32)


GLAND, LESION = np.zeros((16, 16, 6), np.uint8), np.zeros((16, 16, 6), np.uint8)
GLAND[4:12, 4:12, 1:5], LESION[5:7, 6:9, 2:4] = 1, 1


def boxes(folder: Path, n: int = 6, **columns) -> Manifest:
    "A cohort of n cases as files; columns replace those of the table."
    for i in range(n):
        for j, s in enumerate(CARD.sequences): nifti(folder/f"c{i}_{s}.nii.gz", picture_of(10*i + j))
        nifti(folder/f"c{i}_gland.nii.gz", GLAND)
        if i % 2: nifti(folder/f"c{i}_lesion.nii.gz", LESION)
    names = [f"c{i}" for i in range(n)]
    table = dict(
        case=names, patient=[f"p{i}" for i in range(n)], t2w=[f"{c}_t2w.nii.gz" for c in names],
        adc=[f"{c}_adc.nii.gz" for c in names], mask_gland=[f"{c}_gland.nii.gz" for c in names],
        mask_lesion=[f"{c}_lesion.nii.gz" if i % 2 else "none" for i, c in enumerate(names)],
        grade=["low", "high"] * (n // 2) + ["low"] * (n % 2),
    )
    return Manifest(
        text_table(pd.DataFrame({k: v for k, v in (table | columns).items() if v is not None})), CARD, folder,
        crop="mask_gland",
    )
