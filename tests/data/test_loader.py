"""Batches and augmentation: laws of an epoch, and every change of a batch beside another library's change of one
sample."""
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from vfm_notes.data.augment import (
    AUGMENTATIONS, affine, affine_matrices, augment, draw_parameter, flip, gamma, intensity, noise,
    quarter_turns, to_tensors, warp,
)
from vfm_notes.data.loader import LAST, Loader, batches, cohort_moments, normalise
from vfm_notes.foundation.registry import VfmError


def message(f, *a, **k) -> str:
    with pytest.raises(VfmError) as e: f(*a, **k)
    return str(e.value)


def pair(n=6, size=(4, 8, 8), channels=2, seed=0):
    "Images whose first channel is the mask, so that whatever moves one must move the other."
    mask = np.random.default_rng(seed).integers(0, 5, (n, *size))
    inputs = np.stack(
        [
            mask.astype("float32"),
            *np.random.default_rng(seed + 1).normal(size=(channels - 1, n, *size)).astype("float32"),
        ],
        1,
    )
    return to_tensors({"inputs": inputs, "target": mask, "grade": np.arange(n)})


# --- epochs ---

@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_every_case_once(n, size, seed, epoch):
    parts = {last: batches(n, size, seed, epoch, last) for last in LAST}
    assert sorted(np.concatenate(parts["short"])) == list(range(n))
    order = np.concatenate(parts["short"])
    assert (np.concatenate(parts["fill"])[:n] == order).all() and all(
        len(b) == size for b in parts["fill"] + parts["drop"]
    )
    assert len(parts["fill"]) == -(-n // size) and len(parts["drop"]) == n // size
    assert {last: len(Loader({"x": np.zeros(n)}, size, seed, last)) for last in LAST} == {
        last: len(p) for last, p in parts.items()
    }


@given(st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_order_depends_on_seed_and_epoch_alone(seed, epoch):
    order = lambda s, e: np.concatenate(batches(50, 7, s, e)).tolist()
    assert order(seed, epoch) == order(seed, epoch)
    assert order(seed, epoch) != order(seed, epoch + 1) and order(seed, epoch) != order(seed + 1, epoch)


def test_a_training_that_is_taken_up_again_sees_the_same():
    change = augment({"flip": {}, "affine": {}, "noise": {}})
    def make(): return Loader({"inputs": pair()["inputs"], "target": pair()["target"]}, 4, seed=3, change=change)
    through, later = make(), make()
    for epoch in (1, 2): whole = list(through.epoch(epoch))
    again = list(later.epoch(2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole, again, strict=True) for k in a)
    assert not torch.equal(whole[0]["inputs"], next(make().epoch(1))["inputs"])


def test_mapped_arrays_are_read_by_the_batch_and_never_changed(tmp_path):
    stored = np.random.default_rng(0).normal(size=(10, 1, 2, 6, 6)).astype("float32")
    np.save(tmp_path/"v.npy", stored)
    mapped = np.load(tmp_path/"v.npy", mmap_mode="r")
    for batch in Loader({"inputs": mapped}, 4, change=augment(("flip", "intensity", "gamma"))).epoch(0):
        assert isinstance(batch["inputs"], torch.Tensor)
    assert (np.load(tmp_path/"v.npy") == stored).all()
    direct = pair()
    before = {k: v.clone() for k, v in direct.items()}
    for _ in Loader(direct, 4, change=augment(list(AUGMENTATIONS))).epoch(0): pass
    assert all(torch.equal(direct[k], before[k]) for k in before)


class Slow:
    "A source that takes its time, by a clock that goes when it is told to."
    def __init__(self, n, seconds, clock): self.n, self.seconds, self.clock = n, seconds, clock
    def __len__(self): return self.n
    def __getitem__(self, index):
        self.clock[0] += self.seconds
        return np.zeros(len(index))


def test_the_meter_counts_waiting_and_nothing_else(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    loader = Loader({"x": Slow(8, 0.02, clock)}, 2)
    for _ in loader.epoch(0): clock[0] += 0.05  # the step
    assert loader.waited == pytest.approx(0.08)
    for _ in loader.epoch(1): pass
    assert loader.waited == pytest.approx(0.16)


def test_loaders_refuse():
    assert "a with 3, b with 2" in message(Loader, {"a": np.zeros(3), "b": np.zeros(2)}, 2)
    assert "none" in message(Loader, {}, 2)
    assert "Did you mean 'drop'" in message(Loader, {"a": np.zeros(3)}, 2, last="drp")
    assert "batch size of 0" in message(Loader, {"a": np.zeros(3)}, 0) and "0 cases" in message(
        Loader, {"a": np.zeros(0)}, 2
    )
    assert "Did you mean 'flip'" in message(augment, ["flp"]) and "no option 'angle'" in message(
        augment, {"affine": {"angle": 3}}
    )


# --- changes of a batch, beside those of single samples ---

def split(batch, changed, of):
    "What a single-sample function does to each sample must be among the results."
    for i in range(len(batch["inputs"])):
        hits = [
            o
            for o in of
            if np.array_equal(o(batch["inputs"][i].numpy()), changed["inputs"][i].numpy())
            and np.array_equal(o(batch["target"][i].numpy()), changed["target"][i].numpy())
        ]
        assert len(hits) == 1, f"sample {i}: {len(hits)} explanations"
        yield of.index(hits[0])


def test_flips_are_numpys_and_masks_follow():
    batch = pair(64)
    seen = list(split(batch, flip(batch, np.random.default_rng(0)), [lambda v: v, lambda v: np.flip(v, -1)]))
    assert 20 <= sum(seen) <= 44, "about half of them"
    axes = [lambda v, a=a: np.flip(v, a) for a in ((), -1, -2, -3, (-1, -2), (-1, -3), (-2, -3), (-1, -2, -3))]
    assert len(set(split(batch, flip(batch, np.random.default_rng(0), axes=(-1, -2, -3)), axes))) == 8
    assert torch.equal(flip(batch, np.random.default_rng(0), p=1)["inputs"], batch["inputs"].flip(-1))


def test_quarter_turns_are_numpys_and_masks_follow():
    batch = pair(40)
    turns = [lambda v, k=k: np.rot90(v, k, (-2, -1)) for k in range(4)]
    assert set(split(batch, quarter_turns(batch, np.random.default_rng(0)), turns)) == {0, 1, 2, 3}
    assert "4 x 8" in message(quarter_turns, pair(size=(2, 4, 8)), np.random.default_rng(0))


@given(st.integers(0, 999), st.floats(0, 45), st.floats(0, 0.3), st.floats(0, 3))
@settings(max_examples=15, deadline=None)
def test_warp_is_scipys_affine_transform(seed, degrees, scale, shift):
    rng = np.random.default_rng(seed)
    image, size = rng.normal(size=(2, 1, 3, 13, 10)).astype("float32"), np.array((3, 13, 10))
    matrices = affine_matrices(rng, 2, degrees, scale, shift)
    got = warp(torch.from_numpy(image), matrices).numpy()
    mask = rng.integers(0, 4, image.shape)
    moved = warp(torch.from_numpy(mask), matrices).numpy()
    for i, m in enumerate(matrices):
        a, middle = m[:, :3], (size - 1) / 2
        offset = middle - a @ middle + m[:, 3]
        np.testing.assert_allclose(
            got[i, 0], affine_transform(image[i, 0], a, offset, order=1, mode="grid-constant"), atol=2e-4
        )
        nearest = affine_transform(mask[i, 0], a, offset, order=0, mode="grid-constant")
        assert (moved[i, 0] == nearest).mean() > 0.985, "all but voxels half-way between two"


def test_affine_moves_masks_with_their_images():
    batch = pair(8, (2, 40, 40))
    batch["target"] = torch.zeros_like(batch["target"])
    batch["target"][:, :, 12:28, 8:30] = 3
    batch["inputs"] = batch["target"][:, None].float()
    moved = affine(batch, np.random.default_rng(0), degrees=20, scale=0.2, shift=4)
    assert set(moved["target"].unique().tolist()) == {0, 3} and moved["target"].dtype == torch.int64
    inside = moved["inputs"][:, 0] > 1.5
    assert (inside == (moved["target"] == 3)).float().mean() > 0.99 and not torch.equal(
        moved["target"], batch["target"]
    )
    areas = (moved["target"] == 3).flatten(1).float().sum(1) / (2 * 16 * 22)
    assert 0.55 < areas.min() and areas.max() < 1.5 and areas.std() > 0.02, "scaled by up to 20 % along two axes"


def test_intensities_are_monais():
    from monai.transforms import AdjustContrast, ScaleIntensity, ShiftIntensity
    batch, x = pair(4, channels=2), pair(4, channels=2)["inputs"]
    again = lambda *ranges: (lambda r: [r.uniform(*a, (4, 2)) for a in ranges])(np.random.default_rng(7))
    a, b = again((0.8, 1.2), (-0.3, 0.3))
    changed = intensity(batch, np.random.default_rng(7), scale=0.2, shift=0.3)
    power, = again((0.7, 1.5))
    curved = gamma(batch, np.random.default_rng(7))
    for i in range(4):
        for c in range(2):
            one = x[i, c:c + 1]
            expected = ShiftIntensity(float(b[i, c]))(
                ScaleIntensity(minv=None, maxv=None, factor=float(a[i, c] - 1))(one)
            )
            torch.testing.assert_close(changed["inputs"][i, c:c + 1], torch.as_tensor(expected), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                curved["inputs"][i, c : c + 1], torch.as_tensor(AdjustContrast(float(power[i, c]))(one)), atol=1e-4,
                rtol=1e-4,
            )
    assert torch.equal(changed["target"], batch["target"]) and torch.equal(curved["grade"], batch["grade"])


def test_noise_has_the_size_it_says():
    batch = to_tensors({"volumes": np.zeros((3, 2, 8, 64, 64), "float32")})
    sd = noise(batch, np.random.default_rng(5), sd=0.4)["volumes"].std((2, 3, 4))
    np.testing.assert_allclose(sd, np.random.default_rng(5).uniform(0, 0.4, (3, 2)), rtol=0.03)


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
@given(seed=st.integers(0, 99), n=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_every_augmentation_keeps_shapes_types_and_data(name, seed, n):
    batch = pair(n, seed=seed)
    before = {k: v.clone() for k, v in batch.items()}
    one, two = (AUGMENTATIONS[name](batch, np.random.default_rng(seed)) for _ in range(2))
    for k, v in batch.items():
        assert (
            one[k].shape == v.shape
            and one[k].dtype == v.dtype
            and torch.equal(one[k], two[k])
            and torch.equal(v, before[k])
        )
    assert torch.equal(one["grade"], batch["grade"]) and set(one["target"].unique().tolist()) <= {
        0, *batch["target"].unique().tolist(),
    }
    assert torch.isfinite(one["inputs"]).all()


def test_a_parameter_broadcasts_over_its_sample():
    assert draw_parameter(np.array([1.0, 2.0]), torch.zeros(2, 3, 4, 5, 6)).shape == (2, 1, 1, 1, 1)
    assert draw_parameter(np.ones((2, 3)), torch.zeros(2, 3, 4, 5, 6)).shape == (2, 3, 1, 1, 1)


# --- normalisation by the statistics of a cohort ---

def test_cohort_moments_are_those_of_all_voxels():
    raw = np.random.default_rng(0).normal(3, 2, (7, 2, 3, 5, 5)).astype("float32")
    mean, sd = cohort_moments(raw)
    np.testing.assert_allclose(mean, raw.astype("float64").mean((0, 2, 3, 4)))
    np.testing.assert_allclose(sd, raw.astype("float64").std((0, 2, 3, 4)))
    assert cohort_moments(np.ones((2, 1, 2, 2, 2)))[1] == [1], "a constant is not divided by zero"
    shifted = normalise(raw + 5, "cohort", (mean, sd)) - normalise(raw, "cohort", (mean, sd))
    np.testing.assert_allclose(
        shifted, np.broadcast_to((5 / np.array(sd)).reshape(1, 2, 1, 1, 1), raw.shape), rtol=1e-4,
        err_msg="differences between cases survive",
    )
    assert (
        "training cases" in message(normalise, raw, "cohort")
        and "2 channels" in message(normalise, raw[:, :1], "cohort", (mean, sd))
        and "none" in message(cohort_moments, raw[:0])
    )
