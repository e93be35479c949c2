"""k-space truncation and echo-planar distortion against independent implementations and their laws."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from undistorted import epi_correct
from vfm_notes.data.degrade import epi_distort, epi_field, epi_fields, kspace_downsample
from vfm_notes.foundation.registry import VfmError

GRID, SPACING = (6, 32, 16), (4.0, 1.5, 1.5)


def fourier(n):
    "The DFT matrix, written out."
    k = np.arange(n)
    return np.exp(-2j * np.pi * np.outer(k, k) / n)


def truncate(signal, keep):
    "Measure `keep` centred lines by the matrix, the edge line of an even number once and take the real part."
    n = len(signal)
    spectrum, frequency = fourier(n) @ signal, np.where(np.arange(n) <= (n - 1) // 2, np.arange(n), np.arange(n) - n)
    measured = (frequency >= -(keep // 2)) & (frequency <= (keep - 1) // 2) if keep < n else np.ones(n, bool)
    return (np.conj(fourier(n)) @ (spectrum * measured) / n).real


@pytest.mark.parametrize("n, factor", [(8, 2), (9, 3), (12, 2), (12, 4), (7, 2), (10, 3), (16, 1.6)])
def test_kspace_equals_a_written_out_dft(n, factor):
    volume = np.random.default_rng(n).random((2, n, 3)).astype(np.float32)
    ours = kspace_downsample(volume, (1, factor, 1), magnitude=False)
    theirs = np.apply_along_axis(truncate, 1, volume.astype(float), round(n / factor))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@given(st.integers(0, 2**31), st.sampled_from([(1, 2, 2), (2, 1, 1), (2, 2, 2), (1, 3, 1), (4, 1.5, 2)]))
@settings(max_examples=20, deadline=None)
def test_kspace_keeps_mean_and_constants_and_loses_energy(seed, factor):
    volume = np.random.default_rng(seed).random((3, *GRID)).astype(np.float32)
    low = kspace_downsample(volume, factor, magnitude=False)
    np.testing.assert_allclose(low.mean((1, 2, 3)), volume.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(kspace_downsample(np.full(GRID, 3.0), factor), 3.0, rtol=1e-5)
    assert (low**2).sum() < (volume**2).sum(), "Parseval: what is not measured is missing"
    assert (kspace_downsample(volume, factor) >= 0).all()


def test_kspace_acts_on_each_volume_alone_and_on_the_named_axes():
    volumes = np.random.default_rng(0).random((2, 3, *GRID)).astype(np.float32)
    together = kspace_downsample(volumes, 2)
    assert together.shape == volumes.shape and together.dtype == np.float32
    np.testing.assert_array_equal(together[1, 2], kspace_downsample(volumes[1, 2], 2))
    np.testing.assert_array_equal(
        together[:, :, 3], kspace_downsample(volumes[:, :, 3:4], 2)[:, :, 0], err_msg="d is left alone"
    )
    np.testing.assert_array_equal(kspace_downsample(volumes, 1), volumes)


@pytest.mark.parametrize("factor", [0.5, (1, 2), (1, 2, 100), 0, -2])
def test_kspace_refuses_senseless_factors(factor):
    with pytest.raises(VfmError, match="factor"): kspace_downsample(np.ones(GRID), factor)


@given(st.integers(0, 2**31), st.floats(0.5, 8))
@settings(max_examples=40, deadline=None)
def test_distortion_conserves_each_line_and_stays_positive(seed, amplitude):
    rng = np.random.default_rng(seed)
    field, volume = epi_field(GRID, SPACING, rng, amplitude), rng.random((2, *GRID)).astype(np.float32)
    bent = epi_distort(volume, field)
    np.testing.assert_allclose(bent.sum(-2), volume.sum(-2), rtol=1e-5)
    assert bent.min() > -1e-6 and bent.dtype == np.float32 and bent.shape == volume.shape


def test_no_field_is_no_distortion_and_whole_shifts_are_shifts():
    volume = np.zeros(GRID, np.float32)
    volume[:, 10:20] = np.random.default_rng(0).random((6, 10, 16))
    np.testing.assert_allclose(epi_distort(volume, np.zeros(GRID)), volume, atol=1e-6)
    np.testing.assert_allclose(epi_distort(volume, np.full(GRID, 3.0)), np.roll(volume, 3, 1), atol=1e-5)
    np.testing.assert_allclose(
        epi_distort(volume, np.full(GRID, -2.0), modulate=False), np.roll(volume, -2, 1), atol=1e-5
    )


def test_a_stretched_line_is_darker_by_the_jacobian():
    h, slope = 64, 0.25
    field = np.broadcast_to((slope * (np.arange(h) - 31.5)).reshape(1, h, 1), (1, h, 1))
    bent = epi_distort(np.ones((1, h, 1)), field)
    np.testing.assert_allclose(bent[0, 4:-4, 0], 1 / (1 + slope), rtol=1e-5)
    np.testing.assert_allclose(epi_distort(np.full((1, h, 1), 7.0), field, modulate=False)[0, 4:-4, 0], 7.0, rtol=1e-5)


def test_distortion_agrees_with_counting_particles():
    "Push 2000 particles a voxel with the field and count where they land."
    rng = np.random.default_rng(3)
    field, line = epi_field((1, 40, 1), (1, 1, 1), rng, 3.0)[0, :, 0], rng.random(40)
    start = (np.arange(40 * 2000) + 0.5) / 2000 - 0.5
    landed = start + np.interp(start, np.arange(40), field)
    counted = np.histogram(landed, np.arange(41) - 0.5, weights=np.repeat(line, 2000) / 2000)[0]
    ours = epi_distort(line.reshape(1, 40, 1), field.reshape(1, 40, 1))[0, :, 0]
    assert np.abs(ours - counted).max() < 0.05 and np.abs(ours - counted).mean() < 0.005, (
        "the shift between two voxels is interpolated differently, no more"
    )
    assert np.abs(line - counted).max() > 0.3


def test_the_true_field_undoes_most_of_it():
    y = np.linspace(0, 4 * np.pi, GRID[1]).reshape(1, -1, 1)
    volume = np.broadcast_to(2 + np.sin(y), GRID).astype(np.float32)
    field = epi_field(GRID, SPACING, np.random.default_rng(1), 2.0)
    bent = epi_distort(volume, field)
    assert np.abs(epi_correct(bent, field) - volume).mean() < 0.15 * np.abs(bent - volume).mean()


def test_other_axes_and_a_field_per_case():
    rng = np.random.default_rng(0)
    volumes, fields = rng.random((2, 3, *GRID)), epi_fields(["a", "b"], GRID, SPACING)
    bent = epi_distort(volumes, fields[:, None])
    np.testing.assert_array_equal(bent[1, 2], epi_distort(volumes[1, 2], fields[1]))
    turned = epi_distort(volumes[0, 0].swapaxes(1, 2), fields[0].swapaxes(1, 2), axis=-1)
    np.testing.assert_allclose(turned.swapaxes(1, 2), epi_distort(volumes[0, 0], fields[0]), atol=1e-6)


def test_fields_belong_to_the_name_and_are_strongest_towards_the_back():
    names = [f"case {i}" for i in range(12)]
    fields = epi_fields(names, (12, 64, 64), (4.0, 1.5, 1.5), amplitude=3.0)
    np.testing.assert_array_equal(epi_fields(names[5:7], (12, 64, 64), (4.0, 1.5, 1.5), amplitude=3.0), fields[5:7])
    assert not np.allclose(epi_fields(names[:1], (12, 64, 64), (4.0, 1.5, 1.5), seed=1)[0], fields[0])
    size = np.abs(fields)
    assert size[:, :, 40:56].mean() > 1.5 * size[:, :, 8:24].mean(), "the gas lies at the back"
    assert (size.max((1, 2, 3)) <= 3.9 + 1e-4).all() and size.max((1, 2, 3)).mean() > 2
    assert (fields[:, :, [0, -1]] == 0).all(), "nothing leaves the view"
    assert np.diff(fields, axis=2).min() > -0.71, "invertible"


def test_impossible_fields_are_refused():
    folding = np.zeros(GRID)
    folding[:, 16:] = -5
    with pytest.raises(VfmError, match="folds"): epi_distort(np.ones(GRID), folding)
    with pytest.raises(VfmError, match="grid"): epi_distort(np.ones(GRID), np.zeros((6, 30, 16)))


# --- on real volumes, and through the tasks' options as a study file gives them ---

@pytest.fixture(scope="module", params=["phantom", "prostate_cases"])
def cohort(request, tmp_path_factory):
    "Three cases, drawn or real, on the study's grid."
    from vfm_notes.data.load import load_cohort
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("runs")))
        if request.param != "phantom": patch.setenv("VFM_DATA", str(request.getfixturevalue("real_data")))
        yield load_cohort(request.param, (12, 48, 48), (4.0, 1.5, 1.5), {"test": 3})


@pytest.mark.parametrize("factor", [[1, 2, 2], [3, 1, 1], [2, 2, 1]], ids=["in-plane", "through-plane", "mixed"])
def test_truncation_of_a_cohort(cohort, factor):
    "The lines that were not measured are empty, the mean of every volume stays."
    low = kspace_downsample(cohort.volumes, tuple(factor), magnitude=False)
    spectrum, whole = (
        np.abs(np.fft.fftn(low.astype(float), axes=(2, 3, 4))),
        np.abs(np.fft.fftn(cohort.volumes.astype(float), axes=(2, 3, 4))),
    )
    for axis, f in zip((2, 3, 4), factor):
        n = low.shape[axis]
        beyond = np.abs(np.fft.fftfreq(n, 1 / n)) > n / f / 2
        assert beyond.any() == (f > 1)
        if f > 1:
            assert (
                spectrum.compress(beyond, axis).max() < 1e-4 * spectrum.max()
                and whole.compress(beyond, axis).max() > 1e-3 * whole.max()
            )
    np.testing.assert_allclose(low.mean((2, 3, 4)), cohort.volumes.mean((2, 3, 4)), rtol=1e-4)


def test_distortion_of_a_cohort_keeps_lines_and_can_be_undone(cohort):
    dwi, gland = cohort.volumes[:, 1], cohort.labels > 0
    fields = epi_fields(cohort.names, dwi.shape[1:], cohort.card.spacing, amplitude=3.0)
    bent = epi_distort(dwi, fields)
    np.testing.assert_allclose(bent.sum(2), dwi.sum(2), rtol=1e-4, atol=1e-2)
    error = lambda x: np.abs(x - dwi)[gland].mean()
    assert error(epi_correct(bent, fields)) < 0.6 * error(bent)


def test_a_studys_options_reach_the_degradation(cohort):
    "What a study file says under a task is what its input has gone through."
    from vfm_notes.data.loader import moments, standardise
    from vfm_notes.tune import catalog  # fills the registries
    from vfm_notes.tune.task import build_task
    def input_of(name, options): return build_task(name, cohort.card, options).prepare(cohort).inputs.numpy()[:, :3]
    same = lambda ours, volumes: np.testing.assert_allclose(
        ours, standardise(volumes, *moments(volumes)), rtol=1e-4, atol=1e-4
    )
    same(input_of("super_resolution", {"factor": [3, 1, 1]}), kspace_downsample(cohort.volumes, (3, 1, 1)))
    fields = epi_fields(
        cohort.names, cohort.volumes.shape[2:], cohort.card.spacing, amplitude=1.5, seed=4, roughness=0.3
    )
    bent = cohort.volumes.copy()
    bent[:, 1], bent[:, 2] = epi_distort(bent[:, 1], fields), epi_distort(bent[:, 2], fields, modulate=False)
    same(input_of("distortion_correction", {"amplitude": 1.5, "seed": 4, "roughness": 0.3}), bent)
    with pytest.raises(VfmError, match="amplitude"): build_task("distortion_correction", cohort.card, {"amplitud": 2})
