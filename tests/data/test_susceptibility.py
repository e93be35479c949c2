"""The field of rectal gas and the echo-planar scan that it bends, against closed forms and direct sums."""
import numpy as np
import pytest

from undistorted import epi_correct
from vfm_notes.data.anatomy import IDS
from vfm_notes.data.degrade import epi_distort, taper
from vfm_notes.data.phantom import case_seeds, draw_patient, phantom_case
from vfm_notes.data.degrade import epi_case, gas_field, susceptibility_field, limit_folding

GRID, SPACING = (12, 48, 48), (4.0, 1.5, 1.5)
WITH_GAS = 13  # a case of cohort 0 with plenty of gas


def test_field_equals_a_sum_of_point_dipoles():
    "Far from the source: chi V (3 cos^2 - 1) / (4 pi r^3), summed over the voxels by hand."
    rng, spacing = np.random.default_rng(0), np.array([2.0, 1.0, 1.0])
    chi = np.zeros((20, 40, 40))
    chi[9:11, 18:22, 18:22] = rng.random((2, 4, 4))
    field, places = susceptibility_field(chi, tuple(spacing)), np.argwhere(chi)
    for at in [(2, 20, 20), (10, 4, 20), (10, 20, 34), (3, 6, 30), (17, 30, 10)]:
        r = (np.array(at) - places) * spacing
        length = np.sqrt((r**2).sum(1))
        direct = (chi[tuple(places.T)] * 2.0 * (3 * (r[:, 0] / length)**2 - 1) / (4 * np.pi * length**3)).sum()
        assert field[at] == pytest.approx(direct, abs=0.06 * np.abs(field).max() * (4 / length.mean())**3 + 2e-4), at


def test_a_long_tube_along_the_field_changes_nothing_beside_it():
    y, x = np.meshgrid(np.arange(40) - 19.5, np.arange(40) - 19.5, indexing="ij")
    tube = np.broadcast_to(9.4 * (y*y + x*x < 25), (200, 40, 40))
    middle = susceptibility_field(tube, (1, 1, 1))[100]
    assert np.abs(middle[y*y + x*x > 64]).max() < 0.1
    assert middle[19, 19] == pytest.approx(9.4 / 3, rel=0.05), "inside: chi / 3, with the sphere of Lorentz"


def test_gas_is_where_the_patient_has_it():
    "Volume and place of the gas do not depend on the grid that it is drawn on."
    patient = draw_patient(case_seeds(0, WITH_GAS)[0], 0, (35, 100, 90), (4.0, 1.5, 1.5))
    assert (patient.tissue == IDS["gas"]).sum() * 2 * 0.75**2 > 3000, "mm3"
    field = gas_field(0, WITH_GAS, GRID, SPACING)
    assert field.shape == GRID and field.dtype == np.float32 and 2 < np.abs(field).max() * 1.5 < 40, "mm"
    back, front = np.abs(field[:, 32:44]).mean(), np.abs(field[:, 4:16]).mean()
    assert back > 5 * front, "the gas lies behind the gland"
    np.testing.assert_array_equal(field, gas_field(0, WITH_GAS, GRID, SPACING))


def test_the_same_field_on_another_grid_and_the_other_direction():
    coarse, fine = gas_field(0, WITH_GAS, GRID, SPACING), gas_field(0, WITH_GAS, (12, 48, 96), (4.0, 1.5, 0.75))
    np.testing.assert_allclose(fine.reshape(12, 48, 48, 2).mean(-1), coarse, atol=0.35 * np.abs(coarse).max())
    assert np.corrcoef(fine.reshape(12, 48, 48, 2).mean(-1).ravel(), coarse.ravel())[0, 1] > 0.98
    turned = gas_field(0, WITH_GAS, GRID, SPACING, mm_per_hz=-0.06)
    front = (slice(None), slice(0, 20))
    np.testing.assert_allclose(turned[front], -coarse[front], atol=1e-5, err_msg="before any fold the sign just turns")


def test_signal_is_moved_and_not_made():
    field = gas_field(0, WITH_GAS, GRID, SPACING)
    assert np.diff(field, axis=1).min() > -0.71
    volume = np.random.default_rng(0).random((4, *GRID)).astype(np.float32)
    bent = epi_distort(volume, field)
    np.testing.assert_allclose(bent.sum(-2), volume.sum(-2), rtol=1e-5, err_msg="each line keeps its sum")
    assert np.abs(bent - volume).max() > 0.3


def test_unfolded_is_exact_up_to_the_first_fold():
    field = np.random.default_rng(1).normal(0, 0.5, (3, 40, 5))
    out = limit_folding(field)
    assert np.diff(out, axis=1).min() >= -0.7 - 1e-6 and (out[:, -1] <= 0).all()
    gentle = np.cumsum(np.random.default_rng(2).uniform(-0.3, 0.3, (3, 40, 5)), 1) * taper(40)
    assert np.diff(gentle, axis=1).min() > -0.7
    np.testing.assert_allclose(limit_folding(gentle), gentle, atol=1e-6)


def test_a_bent_case_has_its_truth():
    bent, field = epi_case(0, WITH_GAS, GRID, SPACING)
    true = phantom_case(0, WITH_GAS, GRID, SPACING)
    np.testing.assert_array_equal(bent.volume[0], true.volume[0], err_msg="a spin echo is not bent")
    np.testing.assert_array_equal(bent.label, true.label)
    moved = (np.abs(field) > 0.3) & (true.label > 0)
    assert moved.sum() > 100
    error = lambda x: np.abs(x - true.volume[1])[moved].mean()
    assert error(epi_correct(bent.volume[1], field)) < 0.6 * error(bent.volume[1])
    still, nothing = epi_case(0, WITH_GAS, GRID, SPACING, mm_per_hz=0.0)
    assert not nothing.any()
    np.testing.assert_allclose(still.volume, true.volume, rtol=1e-4, atol=1e-2)
