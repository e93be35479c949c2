"""Other divergences beside D2P: named in a study, measured in its runs, set side by side on the page of alignment."""
from dataclasses import replace

import numpy as np
import pytest
import yaml
from fake_runs import write_study
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from test_one_number import STUDY, text_of

from vfm_notes.analysis.association import cell_points
from vfm_notes.analysis.crossed import divergence_table, divergence_words
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.tables import d2p_table, load_tables
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.registry import VfmError, divergences
from vfm_notes.foundation.spec import RunSpec, StudySpec, load_study, run_id, run_specs
from vfm_notes.report.pages import execute_pages, report_pages
from vfm_notes.runs.grid import job_specs
from vfm_notes.runs.record import new_record, read_arrays, read_record, read_records, write_record
from vfm_notes.shift.mmd import kernels
from vfm_notes.tune.study_names import check_names
from vfm_notes.tune.transfer import transfer

SPEC = RunSpec(
    size=(4, 32, 32), spacing=(12.0, 3.0, 3.0), cases={"pretrain": 0, "train": 4, "val": 2, "test": 6},
    backbone="profound_toy.mine", strategy="full", n_train=4, epochs=1, batch_size=2,
)
LAPLACE = "mmd2_paired kernel=laplace"
NAMES = ("cka_linear", "energy", "mean_shift", LAPLACE)


# --- the study file

def test_off_by_default_and_part_of_the_name():
    assert RunSpec().divergences == () and run_id(RunSpec()) == run_id(replace(RunSpec(), divergences=()))
    assert run_id(RunSpec()) != run_id(replace(RunSpec(), divergences=("energy",)))


def test_a_study_hands_them_to_its_runs():
    study = StudySpec(**STUDY | {"divergences": ["energy", "cka_linear"]})
    assert {r.divergences for r in run_specs(study)} == {("energy", "cka_linear")}
    assert job_specs("transfer", strategies=["full"], seeds=[0], divergences=["energy"])[0].divergences == ("energy",)


@pytest.mark.parametrize(
    "value,words",
    [
        (["energy", "energy"], "twice"), ("energy", "expected a list"), ([3], "divergences"),
        (["Energy distance"], "divergences"),
    ],
)
def test_what_is_no_list_of_names_is_refused_when_the_study_is_read(value, words):
    with pytest.raises(VfmError, match=words): StudySpec(**STUDY | {"divergences": value})


def test_names_are_checked_with_the_other_names_of_a_study():
    study = StudySpec(**STUDY | {"divergences": list(divergences)})
    check_names(study)
    with pytest.raises(
        VfmError,
        match="Unknown divergence 'cka'. Did you mean 'cka_rbf'|Unknown divergence 'cka'. Did you mean 'cka_linear'",
    ):
        check_names(replace(study, divergences=["cka"]))


def test_options_are_read_as_those_of_a_strategy():
    study = StudySpec(**STUDY | {"divergences": ["mmd2  kernel=laplace bandwidth=2.0", "mmd2"]})
    assert study.divergences == ["mmd2 bandwidth=2 kernel=laplace", "mmd2"]
    assert {r.divergences for r in run_specs(study)} == {tuple(study.divergences)}
    assert run_id(RunSpec(divergences=("mmd2",))) != run_id(RunSpec(divergences=("mmd2 kernel=laplace",)))
    for kernel in kernels: check_names(replace(study, divergences=[f"mmd2_paired kernel={kernel}"]))


@pytest.mark.parametrize("text,words", [
    ("mmd2 kernel=laplac", "Divergence 'mmd2 kernel=laplac': Unknown kernel 'laplac'. Did you mean 'laplace'"),
    ("mmd2 kernl=laplace", "Divergence 'mmd2' has no option 'kernl'. Did you mean 'kernel'"),
    ("energy kernel=laplace", "Divergence 'energy' has no option 'kernel'"),
    ("mmd2 kernel=linear bandwidth=2", "linear kernel has none: leave it out"),
    ("mmd2 bandwidth=-1", "give a positive number"), ("sliced_wasserstein directions=0", "at least 1"),
    ("sliced_wasserstein directions=many", "option 'directions' of divergence 'sliced_wasserstein'"),
])
def test_options_that_cannot_be_measured_are_refused_with_the_study(text, words):
    "Not in a run, where a value that is not defined is missing."
    study = StudySpec(**STUDY | {"divergences": [" ".join(sorted(text.split(), key=lambda w: ("=" in w, w)))]})
    with pytest.raises(VfmError) as error: check_names(study)
    assert words in str(error.value)


@pytest.mark.parametrize("value,words", [
    (["mmd2 kernel"], r"divergences\[0\]: Divergence 'mmd2 kernel': 'kernel' is not of the form option=value.*laplace"),
    (["mmd2 kernel=laplace", "mmd2  kernel=laplace"], "twice"), (["mmd2 " + "x" * 90], "a divergence of at most 80"),
])
def test_options_that_cannot_be_read(value, words):
    with pytest.raises(VfmError, match=words): StudySpec(**STUDY | {"divergences": value})


# --- the record

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "One real run with the key and one without, from the same weights, written as records."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("runs")))
        state, found = build_backbone(SPEC.backbone, 3).state_dict(), {}
        for names in (NAMES, ()):
            spec = replace(SPEC, divergences=names)
            made = transfer(spec, {k: v.clone() for k, v in state.items()})
            write_record(
                run_folder("by_hand", run_id(spec)), new_record(spec, "by_hand", **made.summary), made.curves,
                made.cases, made.features, made.weights,
            )
            found[names] = (
                read_record(run_folder("by_hand", run_id(spec))), read_arrays("by_hand", run_id(spec), "features"),
            )
        yield found


def laplace_of_pairs(x, y):
    "MMD² of pairs with exp(-distance / sigma), sigma² half the median squared distance of all pairs of points."
    points, n = np.concatenate([x, y]), len(x)
    distance = cdist(points, points)
    k = np.exp(-distance / np.sqrt(np.median(distance[np.triu_indices(2 * n, 1)] ** 2) / 2))
    apart = ~np.eye(n, dtype=bool)
    return (k[:n, :n][apart].sum() + k[n:, n:][apart].sum() - 2 * k[:n, n:][apart].sum()) / (n * (n - 1))


def test_values_are_those_of_the_saved_features(run):
    "Standardised by hand; energy, mean shift and Laplace's kernel by their formulas, CKA as it is registered."
    record, features = run[NAMES]
    for row in record["d2p"]:
        x, y = (features[f"{when}.{row['layer']}"].astype(float) for when in ("before", "after"))
        keep = x.std(0) > 1e-6 * np.abs(x).max(0)
        x, y = ((t[:, keep] - x[:, keep].mean(0)) / x[:, keep].std(0) for t in (x, y))
        energy = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
        wanted = {
            "cka_linear": divergences["cka_linear"](x, y), "energy": energy,
            "mean_shift": np.linalg.norm(x.mean(0) - y.mean(0)), LAPLACE: laplace_of_pairs(x, y),
        }
        assert row["divergences"] == pytest.approx(wanted, rel=1e-6, abs=1e-8), row["layer"]
    assert record["d2p"][-1]["divergences"]["energy"] > 0


def test_without_the_key_nothing_is_added_and_nothing_else_changes(run):
    (with_, _), (without, _) = run[NAMES], run[()]
    assert [{k: v for k, v in row.items() if k != "divergences"} for row in with_["d2p"]] == without["d2p"]
    assert with_["metrics"] == without["metrics"] and not [row for row in without["d2p"] if "divergences" in row]


def test_what_is_not_defined_is_missing(run):
    "CKA needs four cases."
    few = replace(SPEC, cases=SPEC.cases | {"test": 3}, divergences=("cka_linear", "energy"), strategy="scratch")
    d2p = transfer(few).summary["d2p"]
    assert all(np.isnan(row["divergences"]["cka_linear"]) and row["divergences"]["energy"] >= 0 for row in d2p)


# --- the tables

def test_tables_have_a_column_for_each(run):
    table = d2p_table([record for record, _ in run.values()])
    assert {f"divergence {n}" for n in NAMES} <= set(table) and "divergences" not in table
    for record, _ in run.values():
        own = table[table.id == record["id"]].set_index("layer")
        for row in record["d2p"]:
            for name in NAMES:
                assert own.loc[row["layer"], f"divergence {name}"] == pytest.approx(
                    row.get("divergences", {}).get(name, np.nan), nan_ok=True
                )


# --- the page

@pytest.fixture(scope="module", params=[["energy", "frechet", LAPLACE], []], ids=["asked for", "not asked for"])
def page(request, tmp_path_factory):
    "The page of alignment of an invented study: the study and what a reader sees."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("divergences")
        patch.setenv("VFM_RUNS", str(root/"runs"))
        patch.delenv("VFM_DATA", raising=False)
        values = {k: v for k, v in STUDY.items() if k not in ("external", "pages")} | {"divergences": request.param}
        (root/"one.yaml").write_text(yaml.safe_dump(values))
        study, seen = load_study(str(root/"one.yaml")), {}
        write_study(study, failed=0, absent=0)
        def done(page, nb, error):
            assert not error, error
            seen[page.name] = text_of(nb)
        execute_pages(
            [p for p in report_pages(study, read_records("one")) if p.name == "alignment"], str(root / "one.yaml"), done
        )
        yield study, seen["alignment"]


def test_the_page_sets_them_side_by_side(page):
    "Spearman's rho by scipy; the invented energy distance says what MMD² says, Fréchet the opposite."
    study, text = page
    if not study.divergences:
        assert "Only MMD² was measured" in text and "frechet |" not in text
        return
    tables = load_tables(study)
    gains = gain_table(tables)
    found = divergence_table(tables, gains).set_index("divergence")
    points = cell_points(tables, gains).dropna(subset=["rpg", "d2p"])
    rho = spearmanr(points.d2p, points.rpg)[0]
    assert list(found.index) == ["MMD² (D2P)", "energy", "frechet", LAPLACE] and (found.n == len(points)).all()
    assert found.rho.tolist() == pytest.approx([rho, rho, -rho, -rho])
    assert found.of.tolist() == [
        "rho, d2p and rpg, layer embed, when end",
        *(f"rho, {name} and rpg, layer embed" for name in ("energy", "frechet", LAPLACE)),
    ]
    assert found.loc["frechet", ["low", "high"]].tolist() == pytest.approx(
        [-found.loc["energy", "high"], -found.loc["energy", "low"]], abs=0.05
    )
    assert divergence_words(found.reset_index()) in text and all(f"{name} |" in text for name in found.index)
    assert "Only MMD² was measured" not in text


@pytest.mark.parametrize(
    "rho,shown,words",
    [
        ([0.9, 0.8], [True, True], "does not depend on the divergence: more distance goes with more gain by a, b"),
        ([-0.9, -0.8], [True, True], "does not depend on the divergence: more distance goes with less gain by a, b"),
        (
            [0.9, -0.8], [True, True],
            "depends on the divergence: more distance goes with more gain by a; more distance goes with less gain by b",
        ),
        (
            [0.9, 0.2], [True, False],
            "depends on the divergence: more distance goes with more gain by a; no association is shown by b",
        ),
        ([0.1, -0.2], [False, False], "does not depend on the divergence: no association is shown by a, b"),
    ],
)
def test_the_sentence_says_which_way(rho, shown, words):
    import pandas as pd
    found = pd.DataFrame({"divergence": ["a", "b"], "rho": rho, "n": [12, 12], "shown": shown, "tested": True})
    assert words in divergence_words(found) and "n = 12 cells" in divergence_words(found)
    assert "cannot be said: b has too few cells" in divergence_words(found.assign(tested=[True, False]))
