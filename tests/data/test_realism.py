"""Measures of real cases and of the phantom: estimators against closed forms, kept files against a new measurement."""
import json

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from vfm_notes.data import realism
from vfm_notes.data.load import load_cohort
from vfm_notes.data.realism import (
    GRIDS, PUBLISHED, measuring_hash, compare_measures, gland_quantiles, histogram_distance, measure_case,
    measure_cohort, measure_phantom, measures_file, muscle_level, noise_level, otsu, pair_distances, read_measures,
    real_measures, tissue_regions,
)
from vfm_notes.foundation.registry import VfmError


@pytest.mark.parametrize("sigma", [0.5, 3.0, 40.0])
def test_noise_level_finds_the_sd_that_was_put_in(sigma):
    "White noise on a smooth surface of much larger contrast."
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    smooth = 100 * np.sin(y / 20) * np.cos(x / 25) + 200
    volume, mask = smooth + rng.normal(0, sigma, (12, 64, 64)), np.zeros((12, 64, 64), bool)
    mask[2:10, 8:56, 8:56] = True
    assert noise_level(volume, mask) == pytest.approx(sigma, rel=0.05, abs=0.1)
    edge = volume + 500 * (x > 32)
    assert noise_level(edge, mask) == pytest.approx(sigma, rel=0.15, abs=0.1), "an edge is not noise"


def test_otsu_is_the_best_of_all_thresholds():
    v = np.r_[np.random.default_rng(1).normal(0, 1, 60), np.random.default_rng(2).normal(5, 2, 40)]
    within = lambda t: (v <= t).sum() * v[v <= t].var() + (v > t).sum() * v[v > t].var()
    assert otsu(v) == min(np.sort(v)[:-1], key=within)


def test_muscle_is_the_dark_class_beside_the_gland():
    rng = np.random.default_rng(0)
    volume = rng.normal(300, 5, (8, 60, 80))  # fat
    gland = np.zeros(volume.shape, bool)
    gland[2:6, 22:38, 30:50] = True
    for x in (slice(8, 20), slice(60, 72)): volume[:, :, x] = rng.normal(70, 5, volume[:, :, x].shape)
    assert muscle_level(volume, gland, (3.0, 1.0, 1.0)) == pytest.approx(70, abs=2)
    assert np.isnan(muscle_level(volume[:, :, 10:70], gland[:, :, 10:70], (3.0, 1.0, 1.0))), "the view ends too early"


def test_histogram_distance_is_scipys_wasserstein():
    rng = np.random.default_rng(0)
    a, b, label = rng.gamma(9, 10, (6, 30, 30)), rng.gamma(4, 30, (6, 30, 30)), np.ones((6, 30, 30))
    ours = histogram_distance(gland_quantiles(a, label), gland_quantiles(b, label))
    theirs = wasserstein_distance(a.ravel() / np.median(a), b.ravel() / np.median(b))
    assert ours == pytest.approx(theirs, rel=0.03)
    assert histogram_distance(gland_quantiles(a, label), gland_quantiles(7 * a, label)) == pytest.approx(0, abs=1e-9), (
        "units do not matter"
    )


def test_measures_of_a_case_made_by_hand():
    label, zones = np.zeros((4, 20, 20), np.uint8), np.zeros((4, 20, 20), np.uint8)
    label[:, 2:18, 2:18], zones[:, 2:18, 2:10], zones[:, 2:18, 10:18] = 1, 1, 2
    label[1:3, 3:7, 3:7] = 2
    volume = np.select([label == 2, zones == 1, zones == 2], [40.0, 100.0, 60.0])
    found = measure_case({"adc": volume}, label, zones, (3.0, 1.0, 1.0))["measures"]
    assert (
        found["adc TZ/PZ"] == 0.6
        and found["adc lesion/PZ"] == 0.4
        and found["adc PZ"] == 100
        and found["adc spread in PZ"] == 0
    )
    label[label == 2] = 1
    label[1, 3, 3:7] = 2
    assert (
        "lesion" not in tissue_regions(label, zones)
        and "adc lesion" not in measure_case({"adc": volume}, label, zones, (3.0, 1.0, 1.0))["measures"]
    ), "four voxels are too few"


def test_a_cohort_is_measured_case_by_case(runs_root):
    size, spacing, _ = GRIDS["study"][0]
    cohort = load_cohort("phantom", size, spacing, {"test": 3})
    rows = measure_cohort(cohort)
    assert [r["case"] for r in rows] == cohort.names and [r["grade"] for r in rows] == cohort.grade.tolist()
    peripheral = (cohort.zones[1] == 1) & (cohort.labels[1] == 1)
    assert rows[1]["measures"]["adc PZ"] == pytest.approx(np.median(cohort.volumes[1, 2][peripheral]), rel=1e-4)


def test_compare_counts_what_lies_outside():
    drawn = [
        {"case": str(i), "grade": 2 * (i % 2), "measures": {"m": float(i), "lesion m": float(i)}} for i in range(21)
    ]
    real = [{"case": "in", "measures": {"m": 10.0}}, {"case": "out", "measures": {"m": 20.0, "lesion m": 3.0}}]
    m, lesion = compare_measures(real, drawn)
    assert (m["n"], m["low"], m["high"], m["outside"]) == (21, 1.0, 19.0, ["out"])
    assert lesion["n"] == 10 and lesion["real"] == {"out": 3.0}, "lesions of significant cancers only"


def test_pairs():
    rows = [{"quantiles": {"t2w": [float(i)] * 32}} for i in (0, 1, 3)]
    assert sorted(pair_distances(rows, rows, "t2w")) == [1, 2, 3] and pair_distances(rows[:1], rows[1:], "t2w") == [
        1, 3,
    ]


def test_the_kept_phantom_measures_are_of_this_code():
    kept = read_measures("phantom")
    assert kept["code"] == measuring_hash(), (
        "the phantom or the measures have changed: run vfm_notes.data.realism.write_phantom_measures() and commit "
        "nbs/report/phantom_measures.json"
    )
    assert len(kept["rows"]) == 2 * kept["cases"] and kept["cases"] >= 40
    by = {(r["case"], r["grid"]): r for r in kept["rows"]}
    for i, grid in ((0, "study"), (7, "study"), (3, "own")):
        now, then = measure_phantom(i, grid), by[f"phantom {i}", grid]
        assert now["grade"] == then["grade"] and now["measures"].keys() == then["measures"].keys()
        for k, v in now["measures"].items(): assert v == pytest.approx(then["measures"][k], rel=1e-3), (i, grid, k)


def test_the_kept_real_measures_are_of_these_files(real_data, runs_root, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(real_data))
    head, rows = real_measures()
    kept = read_measures("real")
    assert head == {k: kept[k] for k in head}, "cohort, licence, source and checksums"
    assert len(rows) == len(kept["rows"])
    for now, then in zip(rows, kept["rows"]):
        assert [now[k] for k in ("case", "grid", "zones", "grade")] == [
            then[k] for k in ("case", "grid", "zones", "grade")
        ]
        assert now["measures"] == pytest.approx(then["measures"], rel=1e-3), (now["case"], now["grid"])
        for s, q in now["quantiles"].items(): assert q == pytest.approx(then["quantiles"][s], rel=1e-3, abs=1e-3)


def test_real_contrasts_lie_within_the_phantoms_range():
    "Ratios, level and noise on the own grids: at most a tenth of the real values outside 5-95 %, widened by a tenth."
    real, drawn = (
        [r for r in read_measures(who)["rows"] if r["grid"] == "own" and r.get("zones") != realism.SECOND_ZONES]
        for who in ("real", "phantom")
    )
    found = [
        (c["measure"], v, c["low"], c["high"])
        for c in compare_measures(real, drawn)
        if "spread" not in c["measure"]
        for v in c["real"].values()
    ]
    outside = [f for f in found if not 0.9 * f[2] <= f[1] <= 1.1 * f[3]]
    assert len(found) >= 25 and len(outside) <= len(found) / 10, outside


def test_no_pixels_are_kept():
    for who in ("real", "phantom"):
        text = measures_file(who).read_text(encoding="utf-8")
        assert len(text) < 200_000
        for r in json.loads(text)["rows"]:
            assert all(len(q) == 32 for q in r["quantiles"].values()) and len(r["measures"]) < 40
    assert all(len(h) == 64 for h in read_measures("real")["sha256"].values())


def test_a_missing_file_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(realism, "measures_file", lambda who: tmp_path/f"{who}.json")
    with pytest.raises(VfmError, match="write_real_measures"): read_measures("real")


def test_published_values_name_their_source():
    assert all(any(y in source for y in ("2004", "2005", "2008", "2011", "2013", "2020")) for *_, source in PUBLISHED)
