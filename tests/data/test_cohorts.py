"""The contract of every registered cohort."""
import numpy as np
import pytest

from vfm_notes.data.cohort import cohort_problems
from vfm_notes.data.load import load_cohort
from vfm_notes.foundation.spec import SPLITS
from vfm_notes.data.load import cohort_maker, load_entries
from vfm_notes.foundation.registry import VfmError, cohorts

load_entries()
SIZE, SPACING, N = (16, 32, 32), (4.0, 4.0, 4.0), {"train": 6, "val": 2, "test": 4}


@pytest.fixture(scope="module", params=[n for n in cohorts if n != "everything"])
def cohort(request, tmp_path_factory):
    "A cohort on a small grid; one that is read from files needs them."
    name = request.param
    disk = cohorts.card(name).get("plan", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("runs")))
        if disk: patch.setenv("VFM_DATA", str(request.getfixturevalue("real_data")))
        n = {} if disk else N
        yield load_cohort(name, SIZE, SPACING, n), lambda seed=0: load_cohort(name, SIZE, SPACING, n, seed), disk


def test_nothing_is_wrong_with_it(cohort):
    made, _, disk = cohort
    assert cohort_problems(made) == [] and made.card.title and made.card.licence and made.card.source
    assert made.volumes.shape == (len(made), len(made.card.sequences), *SIZE) and made.labels.shape == (
        len(made), *SIZE,
    )
    if not disk: assert [made.split.count(s) for s in N] == list(N.values())


def test_it_is_the_same_every_time(cohort):
    made, again, _ = cohort
    assert again().hash() == made.hash() and again().names == made.names


def test_another_seed_is_another_cohort(cohort):
    made, again, disk = cohort
    other = again(1)
    if disk: assert set(other.names) == set(made.names)  # the same cases, perhaps dealt to other splits
    else: assert other.hash() != made.hash()


def test_subsets_are_nested_and_patients_stay_together(cohort):
    made, _, _ = cohort
    for split in sorted(set(made.split)):
        whole = made.subset(split)
        few, more = made.subset(split, 1), made.subset(split, min(3, len(whole)))
        assert set(few.names) <= set(more.names) <= set(whole.names)
    homes = {(p, s) for p, s in zip(made.patients, made.split)}
    assert len(homes) == len({p for p, _ in homes}) and set(made.split) <= set(SPLITS)


def test_a_made_cohort_takes_the_size_and_cases_asked_for(cohort):
    made, _, disk = cohort
    if disk: pytest.skip("its cases are on disk")
    maker, _ = cohort_maker(made.card.name)
    other = maker((24, 32, 32), SPACING, {"train": 2}, 0)
    assert other.volumes.shape == (2, len(made.card.sequences), 24, 32, 32) and np.isfinite(other.volumes).all()


def test_a_cohort_without_its_files_says_where_they_are_expected(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(tmp_path))
    monkeypatch.setenv("VFM_RUNS", str(tmp_path / "runs"))
    for name in [n for n in cohorts if cohorts.card(n).get("plan")]:
        with pytest.raises(VfmError, match=str(tmp_path)): load_cohort(name, SIZE, SPACING, {})
