"""Ranking frozen backbones: what it looks at, what it keeps, what it leaves out, and that it finds what is planted."""
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vfm_notes.data.cohort import Cohort, CohortCard
from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.registry import VfmError, scores
from vfm_notes.foundation.spec import RunSpec
from vfm_notes.shift.scores import rows_by_case
from vfm_notes.tune import catalog, rank as ranking_module  # fills the registries
from vfm_notes.tune.frozen_features import (
    MappedRows, collect_frozen, features_file, features_key, fitting_window, frozen_cases, cached_features,
    middle_of, training_cases, with_scale,
)
from vfm_notes.tune.hand_made import CONTROLS, HandMade, co_occurrence, grey_levels, smooth, texture
from vfm_notes.tune.rank import (
    RankCandidate, Clock, BackboneRanking, control_candidate, find_candidates, kept_scores, known_overlap, rank,
    rank_candidates, ranking_facts, ranking_spec, ranking_table, ranking_values, random_candidate, scores_for,
)

SPEC = RunSpec(size=(4, 32, 32), spacing=(8.0, 3.0, 3.0), cases={"pretrain": 0, "train": 20, "val": 4, "test": 4},
               n_train=0, task="classification", options={})


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("cohort")))
        return load_cohort(SPEC.cohort, SPEC.size, SPEC.spacing, SPEC.cases)


class Knows(nn.Module):
    "Features that hold what is asked for, in noise: of a case its bright share, of a voxel its value."
    strides, ragged = [(1, 2, 2)], True
    def __init__(self, channels, noise):
        super().__init__()
        self.in_channels, self.noise, self.w = channels, noise, nn.Parameter(torch.ones(1))

    def pyramid(self, x):
        r = torch.Generator().manual_seed(0)
        m = nn.functional.avg_pool3d(x, (1, 2, 2))
        return [torch.cat([m, self.noise * torch.randn(len(x), 4, *m.shape[2:], generator=r)], 1) * self.w]

    def layers(self, x): return {"embed": torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], 1)}


# ---- what it looks at

def test_only_training_cases_are_shown(cohort, monkeypatch):
    seen = set()
    data = frozen_cases(SPEC, cohort)
    real = type(data.task).prepare
    monkeypatch.setattr(type(data.task), "prepare", lambda self, c: seen.update(zip(c.names, c.split)) or real(self, c))
    collect_frozen(HandMade(3), with_scale(data, {}))
    assert {s for _, s in seen} == {"train"} and len(seen) == 20


def test_training_cases_are_those_of_a_run(cohort):
    for n in (0, 7, 20):
        own = [cohort.names[i] for i in training_cases(cohort, n)]
        assert own == cohort.subset("train", n or None, seed=0).names
    with pytest.raises(VfmError, match="21 training cases .* it has 20"): training_cases(cohort, 21)


@pytest.mark.parametrize("task", ["classification", "segmentation", "regression", "super_resolution"])
def test_chunks_give_what_a_run_would_see(task, cohort):
    data = with_scale(frozen_cases(replace(SPEC, task=task), cohort), {})
    parts, train = list(data.chunks(8)), cohort.subset("train")
    data.task.learn(train)
    whole = data.task.prepare(train)
    assert [len(p) for p in parts] == [8, 8, 4]
    for name in ("inputs", "target"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    assert sum((p.names for p in parts), []) == whole.names


def test_volumes_stay_on_disk(cohort):
    "Walking through mapped rows never holds more than one case."
    class Watched:
        def __init__(self, rows): self.rows, self.asked = rows, []
        def __getitem__(self, i): self.asked.append(i); return self.rows[i]
    watched = Watched(cohort.volumes)
    rows = MappedRows(watched, np.array([3, 1]))
    assert len(rows) == 2 and [r.shape for r in rows] == [cohort.volumes.shape[1:]] * 2 and watched.asked == [3, 1]


def test_groups_are_patients_among_all(cohort):
    "Two cases of one patient in different chunks have one number."
    two = replace(cohort, patients=[f"p{i % 9}" for i in range(len(cohort))])
    data = with_scale(frozen_cases(replace(SPEC, task="segmentation"), two), {})
    table = collect_frozen(HandMade(3), data, rows=200).tables["pyramid 0"]
    names = np.unique(data.patients)
    assert set(table.groups) <= set(range(len(names))) and len(names) == 9
    whole = next(data.chunks(50))
    case = collect_frozen(HandMade(3), with_scale(frozen_cases(SPEC, two), {})).tables["embed"]
    assert [names[g] for g in case.groups] == whole.patients


def test_a_network_with_a_stride_is_shown_the_middle(cohort):
    net = HandMade(3)
    net.strides = [(1, 5, 14)]
    assert fitting_window(net, (4, 32, 32)) == (4, 30, 28) and fitting_window(HandMade(3), (4, 32, 32)) == (4, 32, 32)
    net.strides = [(1, 64, 64)]
    assert fitting_window(net, (4, 32, 32)) == (4, 32, 32)  # too small: left to the network's own message
    data = with_scale(frozen_cases(replace(SPEC, task="segmentation"), cohort), {})
    part = next(data.chunks(2))
    cut = middle_of(part, (4, 30, 28))
    for name in ("inputs", "target"): assert torch.equal(getattr(cut, name), getattr(part, name)[..., 1:31, 2:30])
    case = middle_of(next(with_scale(frozen_cases(SPEC, cohort), {}).chunks(2)), (4, 30, 28))
    assert case.inputs.shape[2:] == (4, 30, 28) and case.target.shape == (2,)


# ---- what it keeps

def test_features_are_kept_by_content(cohort, monkeypatch):
    data, calls = frozen_cases(SPEC, cohort), []
    def make(): calls.append(1); return HandMade(3)
    first = cached_features("a 1", make, data, {})
    again = cached_features("a 1", make, frozen_cases(SPEC, cohort), {})
    assert len(calls) == 1 and again.known and not first.known
    assert np.array_equal(first.tables["embed"].features, again.tables["embed"].features)
    assert again.parameters == first.parameters and again.size == first.size == (4, 32, 32)
    assert all(np.array_equal(a, b) for a, b in zip(first.maps.values(), again.maps.values()))
    changed = cohort.labels.copy(); changed[0] = 0
    keys = {
        "weights": features_key("a 2", data, {}, 600), "scale": features_key("a 1", data, {"how": "minmax"}, 600),
        "rows": features_key("a 1", data, {}, 60), "": features_key("a 1", data, {}, 600),
        "task": features_key("a 1", frozen_cases(replace(SPEC, task="regression"), cohort), {}, 600),
        "options": features_key("a 1", frozen_cases(replace(SPEC, options={"positive": 1}), cohort), {}, 600),
        "cases": features_key("a 1", frozen_cases(replace(SPEC, n_train=12), cohort), {}, 600),
        "voxels": features_key("a 1", frozen_cases(SPEC, replace(cohort, labels=changed, known_hash="")), {}, 600),
    }
    assert len(set(keys.values())) == len(keys)


def test_a_damaged_file_is_made_again(cohort):
    data, calls = frozen_cases(SPEC, cohort), []
    def make(): calls.append(1); return HandMade(3)
    cached_features("a 1", make, data, {})
    path = features_file(features_key("a 1", data, {}, 600))
    path.write_bytes(path.read_bytes()[:500])
    assert not cached_features("a 1", make, data, {}).known and len(calls) == 2
    assert cached_features("a 1", make, data, {}).known


def test_scores_are_kept_with_their_draws(cohort, monkeypatch):
    found = collect_frozen(HandMade(3), with_scale(frozen_cases(SPEC, cohort), {}))
    first = kept_scores("k", found, ["probe", "logme"])
    monkeypatch.setattr(ranking_module, "score_candidate", lambda *a: pytest.fail("computed twice"))
    again = kept_scores("k", found, ["probe", "logme"])
    assert again["probe"].value == first["probe"].value and np.array_equal(again["probe"].draws, first["probe"].draws)
    assert len(first["logme"].draws) == 0 and len(first["probe"].draws) == 2000


# ---- the ranking

def made_ranking(data, candidates, names=("probe", "logme"), budget=None, progress=lambda *_: None):
    clock = Clock(len(candidates), len(data), budget, progress)
    scored, features, left = rank_candidates(data, candidates, list(names), 300, clock)
    facts = ranking_facts(data, next(data.chunks(3)), "classes", names[0]) | {"scores": list(names)}
    return BackboneRanking(facts, scored, {c.name: c for c in candidates}, features, left, 1.0)


def planted(noise, name): return RankCandidate(name, "weights", lambda data: Knows(3, noise), f"noise {noise}")


def test_what_is_planted_comes_first_and_is_told_apart(cohort, monkeypatch):
    monkeypatch.setattr(ranking_module, "backbone_scale", lambda data, name: {})
    data = frozen_cases(replace(SPEC, task="segmentation"), cohort)
    blind = RankCandidate("blind.x", "weights", lambda d: Blind(), "blind")
    made = made_ranking(data, [planted(0.1, "knows.x"), blind, *map(control_candidate, CONTROLS)])
    table = ranking_table(made).set_index("name")
    assert made.reference == "knows.x" and table.behind["knows.x"] == 0 == table.behind_low["knows.x"]
    assert table.behind_low["blind.x"] > 0 and abs(table.value["blind.x"] - 1 / 3) < 0.12  # three classes by chance
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    gap = table.value["knows.x"] - table.value["hand_made"]
    assert table.behind["hand_made"] == pytest.approx(gap)


class Blind(Knows):
    "Nothing but noise."
    def __init__(self): super().__init__(3, 1.0)
    def pyramid(self, x):
        r = torch.Generator().manual_seed(int(1e6 * x.abs().mean()))
        return [torch.randn(len(x), 4, x.shape[2], x.shape[3] // 2, x.shape[4] // 2, generator=r) * self.w]


def test_a_score_where_less_is_better_turns_the_order(cohort, monkeypatch):
    monkeypatch.setattr(ranking_module, "backbone_scale", lambda data, name: {})
    data = frozen_cases(replace(SPEC, task="segmentation"), cohort)
    candidates = [planted(0.1, "knows.x"), RankCandidate("blind.x", "weights", lambda d: Blind(), "blind")]
    assert made_ranking(data, candidates).order == ["knows.x", "blind.x"]
    monkeypatch.setitem(scores._cards, "probe", scores.card("probe") | {"direction": -1})
    made = made_ranking(data, candidates)
    assert made.order == ["blind.x", "knows.x"] and ranking_table(made).behind.iloc[1] > 0


def test_the_budget_stops_and_the_next_call_goes_on(cohort):
    data, said = frozen_cases(SPEC, cohort), []
    candidates = [*map(control_candidate, CONTROLS), random_candidate("profound_toy")]
    none = made_ranking(data, candidates, budget=0.0)
    assert not none.scored and set(none.left_out) == {c.name for c in candidates}
    assert all("budget" in why for why in none.left_out.values())
    made_ranking(data, candidates[:2])
    part = made_ranking(data, candidates, budget=0.0)
    assert set(part.scored) == set(CONTROLS)  # what is known costs nothing
    assert part.features["hand_made"].known
    full = made_ranking(data, candidates, progress=lambda *a: said.append(a))
    assert set(full.scored) == {c.name for c in candidates} and not full.left_out
    assert [a[2] for a in said if a[0] == "profound_toy.random"] == [0, 8, 16, 20]


def anonymous() -> float:
    "MiB of memory that no file stands behind: pages of a cohort on disk do not count."
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def thousand(folder):
    "A thousand cases of 72 kB on disk; the first half is brighter and has more of its structure."
    shape = (1000, 1, 8, 48, 48)
    volumes, rng = np.memmap(folder / "volumes.npy", np.float32, "w+", shape=shape), np.random.default_rng(0)
    noise, labels = rng.normal(size=shape[1:]).astype(np.float32), np.zeros((1000, *shape[2:]), np.uint8)
    for i in range(1000):
        volumes[i] = np.roll(noise, i, -1) * (1 + 2 * (i < 500))
        labels[i, :, :, : 10 + 8 * (i < 500) + i % 7] = 1
    volumes.flush()
    card = CohortCard("many", "Many", "CC0", "x", "none", ("t2w",), ("background", "block"), (), (3.0, 1.0, 1.0))
    names = [f"c{i:04}" for i in range(1000)]
    on_disk = np.memmap(folder / "volumes.npy", np.float32, "r", shape=shape)
    return Cohort(card, on_disk, labels, np.full(1000, -1), names, names, ["train"] * 1000, known_hash="many")


@pytest.mark.parametrize("task", ["volume_class", "segmentation"])
def test_a_thousand_cases_stream(tmp_path, task, monkeypatch):
    "Volumes of 72 MiB pass by; what stays in memory is a few cases and the rows of features."
    monkeypatch.setattr(ranking_module, "backbone_scale", lambda data, name: {})
    data = frozen_cases(replace(SPEC, cohort="many", size=(8, 48, 48), task=task), thousand(tmp_path))
    seen, held = [], []
    def watch(name, place, done, left):
        seen.append((name, done))
        held.append(anonymous())
    made = made_ranking(data, [planted(0.1, "knows.x")], names=("hscore",), progress=watch)
    assert seen[-1] == ("knows.x", 1000) and not made.left_out and made.features["knows.x"].patients == 1000
    assert max(held[2:]) - held[1] < 20  # of 72
    rows = next(iter(made.features["knows.x"].tables.values()))
    assert len(rows.target) == 1000 if task == "volume_class" else 600 <= len(rows.target) <= 1100


def test_a_budget_ends_a_thousand_cases_in_the_middle(tmp_path, monkeypatch):
    "The second candidate is slow: it is left out and named, and what was ranked stays."
    monkeypatch.setattr(ranking_module, "backbone_scale", lambda data, name: {})
    data = frozen_cases(replace(SPEC, cohort="many", size=(8, 48, 48), task="volume_class"), thousand(tmp_path))
    class Slow(Knows):
        def layers(self, x):
            time.sleep(0.05)
            return super().layers(x)
    quick, slow = planted(0.1, "knows.x"), RankCandidate("slow.x", "weights", lambda d: Slow(1, 0.1), "slow")
    made_ranking(data, [quick], names=("hscore",))  # its features are known
    begun = time.monotonic()
    made = made_ranking(data, [quick, slow], names=("hscore",), budget=1.0)
    assert set(made.scored) == {"knows.x"} and made.left_out == {"slow.x": "the budget of 1 s was spent"}
    assert time.monotonic() - begun < 5  # 125 chunks would have taken more than 6 s


def test_reading_the_cases_is_part_of_the_budget(monkeypatch):
    "A clock that was started before the cases were read is over as soon as they are."
    assert Clock(1, 1, 5.0, print, time.monotonic() - 6).over and not Clock(1, 1, 5.0, print).over


def test_what_fails_is_named_and_the_others_go_on(cohort):
    def fails(data): raise RuntimeError("a layer has the wrong width")
    made = made_ranking(frozen_cases(SPEC, cohort), [
        RankCandidate("broken.x", "control", fails, "broken"), control_candidate("hand_made")])
    assert set(made.scored) == {"hand_made"} and "wrong width" in made.left_out["broken.x"]


def test_random_weights_are_the_same_every_time(cohort):
    data = with_scale(frozen_cases(SPEC, cohort), {})
    torch.manual_seed(123)
    one = random_candidate("profound_toy").make(data)
    torch.manual_seed(7)
    two = random_candidate("profound_toy").make(data)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    x = next(data.chunks(3))
    whole = next(rows_by_case(one, x.inputs, x.target, x.patients))
    assert whole.features.shape[0] == 3


def test_candidates_without_any_weights_are_controls(cohort):
    found, left = find_candidates(frozen_cases(SPEC, cohort), [], None, [])
    assert [c.name for c in found] == list(CONTROLS) and not left
    with pytest.raises(VfmError, match="non-commercial"):
        find_candidates(frozen_cases(SPEC, cohort), ["vit_base.mae_in1k"], None, [])


def test_overlap_is_that_of_the_table_of_pretraining_data(cohort):
    data = frozen_cases(SPEC, cohort)
    assert known_overlap("profound_tiny.alpha", data) == "not seen"  # the phantom is made by a program
    seen = replace(cohort, card=replace(cohort.card, datasets=("PI-CAI",)))
    assert known_overlap("profound_tiny.alpha", frozen_cases(SPEC, seen)) == "seen"
    unnamed = replace(cohort, card=replace(cohort.card, datasets=()))
    assert known_overlap("profound_tiny.alpha", frozen_cases(SPEC, unnamed)) == "unknown"


def test_grid_options_and_cases_are_those_of_the_study():
    from vfm_notes.foundation.spec import load_study
    study = load_study("phantom")
    spec = ranking_spec("", "segmentation", study)
    assert (spec.size, spec.spacing, spec.cohort) == (study.size, study.spacing, "phantom")
    assert dict(spec.options)["class_weights"] == [0.1, 0.3, 3.0] and spec.n_train == 40
    assert ranking_spec("phantom", "segmentation").size == study.size  # a shipped study has this cohort
    with pytest.raises(VfmError, match="no grid of its own"): ranking_spec("prostate_cases", "segmentation")
    with pytest.raises(VfmError, match="Unknown cohort 'fantom'.*phantom"): ranking_spec("fantom", "segmentation")
    with pytest.raises(VfmError, match="Unknown task 'segmentatio'.*segmentation"):
        ranking_spec("phantom", "segmentatio")


def test_a_score_that_does_not_take_the_target_cannot_rank():
    assert scores_for("classes")[0] == "probe" == scores_for("values")[0] and "gbc" not in scores_for("values")
    with pytest.raises(VfmError, match="Score 'gbc' cannot rank task 'regression'.*probe"):
        rank("phantom", "regression", by="gbc", n_train=8)


def test_values_are_plain(cohort):
    import json
    made = made_ranking(frozen_cases(SPEC, cohort), [*map(control_candidate, CONTROLS)])
    kept = json.loads(json.dumps(ranking_values(made)))
    assert kept["version"] == 1 and kept["reference"] in CONTROLS and kept["cases"] == 20
    assert {"probe", "logme"} == set(kept["directions"]) and "score_logme" in kept["rows"][0]


# ---- hand-made features

def test_smoothing_is_that_of_scipy():
    from scipy.ndimage import gaussian_filter
    x = torch.randn(1, 1, 9, 20, 24)
    found = smooth(x, 1.0)[0, 0].numpy()
    assert np.allclose(found, gaussian_filter(x[0, 0].numpy(), 1.0, mode="mirror", truncate=3.0), atol=1e-5)
    flat = torch.randn(1, 1, 1, 20, 24)
    both = gaussian_filter(flat[0, 0, 0].numpy(), 2.0, mode="mirror", truncate=3.0)
    assert np.allclose(smooth(flat, 2.0)[0, 0, 0].numpy(), both, atol=1e-5)  # one slice has no depth


def test_co_occurrence_by_loops():
    x = torch.randn(1, 1, 3, 5, 6)
    levels = grey_levels(x)[0, 0]
    table = np.zeros((16, 16))
    for at in np.ndindex(*levels.shape):
        for dim in range(3):
            to = list(at); to[dim] += 2
            if to[dim] < levels.shape[dim]:
                table[levels[at], levels[tuple(to)]] += 1
                table[levels[tuple(to)], levels[at]] += 1
    found = co_occurrence(levels, 2)
    assert np.allclose(found, table / table.sum())
    i, j = np.indices((16, 16))
    p = table / table.sum()
    mean, sd = (i * p).sum(), np.sqrt((((i - (i * p).sum()) ** 2) * p).sum())
    correlation = ((i - mean) * (j - mean) * p).sum() / sd**2
    wanted = [((i - j) ** 2 * p).sum(), (p / (1 + (i - j) ** 2)).sum(), (p**2).sum(), correlation,
              -(p[p > 0] * np.log(p[p > 0])).sum()]
    assert texture(found).numpy() == pytest.approx(wanted, abs=1e-4)
