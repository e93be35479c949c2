"Radiomic features against closed forms: balls, boxes, constant and striped images."
import numpy as np
import pytest

from vfm_notes.data import radiomics as own
from vfm_notes.data.cohort import phantom_cohort
from vfm_notes.data.radiomics import RADIOMIC_FAMILIES, radiomics_absent, radiomics_table, region_features
from vfm_notes.foundation.registry import VfmError

installed = pytest.mark.skipif(bool(radiomics_absent()), reason="pyradiomics is not installed: vfm_notes[radiomics]")


def ball(radius: float, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    grid = np.indices([int(2 * radius / s) + 6 for s in spacing])
    middle = [(n - 1) / 2 for n in grid.shape[1:]]
    return sum(((g - m) * s)**2 for g, m, s in zip(grid, middle, spacing)) <= radius**2


@installed
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_a_ball_has_its_volume_and_diameter_in_mm(spacing):
    region = ball(12.0, spacing)
    found = region_features(np.zeros(region.shape), region, spacing, "shape")
    assert found["shape_VoxelVolume"] == pytest.approx(region.sum() * np.prod(spacing))
    assert found["shape_MeshVolume"] == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.05)
    assert found["shape_Maximum3DDiameter"] == pytest.approx(24, abs=2 * max(spacing))
    # of a solid ball the principal axis is 4 · sqrt(r² / 5)
    assert found["shape_MajorAxisLength"] == pytest.approx(4 * 12 / np.sqrt(5), rel=0.05)
    assert found["shape_Elongation"] > 0.95 and found["shape_Flatness"] > 0.95


@installed
def test_a_box_has_the_axes_of_its_edges():
    region = np.zeros((20, 20, 30), bool)
    region[4:12, 4:16, 4:24] = True  # 8, 12 and 20 voxels
    found = region_features(np.zeros(region.shape), region, (1.0, 1.0, 1.0), "shape")
    axes = sorted(4 * np.sqrt((k**2 - 1) / 12) for k in (8, 12, 20))  # variance of 1 … k
    names = ("shape_LeastAxisLength", "shape_MinorAxisLength", "shape_MajorAxisLength")
    assert [found[n] for n in names] == pytest.approx(axes)


@installed
def test_first_order_is_numpys_inside_the_region():
    draw = np.random.default_rng(0)
    volume, region = draw.gamma(2.0, 50.0, (10, 20, 20)), draw.random((10, 20, 20)) < 0.3
    found, inside = region_features(volume, region, (3.0, 0.5, 0.5), "first order"), volume[region]
    told = {"Mean": inside.mean(), "Median": np.median(inside), "Variance": inside.var(), "Energy": (inside**2).sum(),
            "10Percentile": np.percentile(inside, 10), "Maximum": inside.max(),
            "Skewness": ((inside - inside.mean())**3).mean() / inside.std()**3}
    assert {k: found[f"firstorder_{k}"] for k in told} == pytest.approx(told)


@installed
def test_a_constant_image_has_no_texture_and_stripes_have():
    region = np.ones((6, 12, 12), bool)
    flat = region_features(np.full(region.shape, 7.0), region, (1.0, 1.0, 1.0), "texture")
    assert flat["glcm_Contrast"] == 0 and flat["glcm_JointEnergy"] == 1 and flat["gldm_GrayLevelVariance"] == 0
    stripes = np.broadcast_to(np.arange(12) % 2, region.shape).astype(float)
    found = region_features(stripes, region, (1.0, 1.0, 1.0), "texture")
    # neighbours of 13 directions: nine change the column and so the level, by 31 bins of 32
    assert found["glcm_Contrast"] == pytest.approx(9 / 13 * (own.BINS - 1)**2)


@installed
def test_small_and_empty_regions_have_no_values():
    region = np.zeros((4, 8, 8), bool)
    for family in RADIOMIC_FAMILIES: assert region_features(np.zeros(region.shape), region, (1, 1, 1), family) == {}
    region[1, 2, 3] = True
    for family in RADIOMIC_FAMILIES: assert region_features(np.zeros(region.shape), region, (1, 1, 1), family) == {}


@installed
def test_a_split_is_computed_once_and_anew_for_other_cases(runs_root, monkeypatch):
    cases = {"pretrain": 0, "train": 1, "val": 1, "test": 3}
    cohort = phantom_cohort((8, 32, 32), (6.0, 2.25, 2.25), cases, 0)
    first, test = radiomics_table(cohort, "test"), cohort.subset("test")
    assert set(first.case) == set(test.names)
    assert first[first.region == "lesion"].case.nunique() == sum((l == 2).sum() > 1 for l in test.labels)
    monkeypatch.setattr(own, "case_radiomics", None)  # is not asked again
    assert radiomics_table(cohort, "test").equals(first)
    with pytest.raises(TypeError): radiomics_table(phantom_cohort((8, 32, 32), (6.0, 2.25, 2.25), cases, 1), "test")


def test_without_pyradiomics_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "radiomics", None)
    cohort = phantom_cohort((8, 32, 32), (6.0, 2.25, 2.25), {"pretrain": 0, "train": 0, "val": 0, "test": 1}, 0)
    with pytest.raises(VfmError, match=r"pip install 'vfm_notes\[radiomics\]'"): radiomics_table(cohort, "test")
