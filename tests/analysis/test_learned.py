"""A cell that is no better than the trivial control says nothing: what is left out, and where."""
import numpy as np
import pytest
from scipy.stats import permutation_test

from vfm_notes.analysis.association import cell_points, run_points
from vfm_notes.analysis.convergence import convergence_table
from vfm_notes.analysis.crossed import outcomes
from vfm_notes.analysis.findings import convergence_finding, gain_findings
from vfm_notes.analysis.gain import gain_table, learned_table, of_learned
from vfm_notes.analysis.prediction import cell_outcomes
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import RunSpec, run_id
from vfm_notes.report.figures import gain_cells, gain_finding
from vfm_notes.runs.record import new_record, write_record

# task → how far scratch and the tuned network are from the control, in Dice
ABOVE = {
    "both": (0.2, 0.3), "tuned_only": (0.0, 0.2), "scratch_only": (0.2, 0.0), "neither": (0.0, 0.01),
    "below": (-0.2, -0.1),
}
EPOCHS = np.arange(5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Five tasks, two seeds, eighteen cases; control and networks are asked for the same cases."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(tmp_path_factory.mktemp("runs")))
        r = np.random.default_rng(0)
        control = r.normal(0.4, 0.1, 18)
        for task, above in ABOVE.items():
            for strategy, more in zip(("scratch", "full"), above):
                for seed in (0, 1):
                    spec, value = (
                        RunSpec(task=task, backbone="a.x", strategy=strategy, seed=seed),
                        control + more + r.normal(0, 0.02, 18),
                    )
                    rows = [
                        {"case": f"c{i}", "patient": f"p{i}", "metric": name, "value": v}
                        for name, values in (("dice", value), ("control_dice", control))
                        for i, v in enumerate(values)
                    ]
                    curve = [
                        {
                            "epoch": int(e), "seconds": float(e), "name": "val_dice",
                            "value": 0.1 * e * (1.5 if strategy == "full" else 1),
                        }
                        for e in EPOCHS
                    ]
                    d2p = [
                        {
                            "layer": "embed", "mmd2": 0.1, "mmd2_independent": 0.1, "p_value": 0.1, "n": 18,
                            "bandwidth": 1.0, "seed": 0,
                        }
                    ]
                    write_record(
                        run_folder("s", run_id(spec)),
                        new_record(
                            spec, "s", metrics={"dice": float(value.mean())}, primary="dice", directions={"dice": 1},
                            units={"dice": ""}, controls={"dice": float(control.mean())}, d2p=d2p,
                        ),
                        curve,
                        rows,
                    )
        yield load_tables("s")


def test_control_rows_are_kept_apart(made):
    assert set(made.cases.metric) == {"dice"} == set(made.controls.metric) and len(made.controls) == len(made.cases)


def test_beating_the_control_is_a_paired_permutation(made):
    found = learned_table(made).set_index(["task", "strategy"])
    assert {k: (found.beats[k, "scratch"], found.beats[k, "full"]) for k in ABOVE} == {
        k: tuple(v > 0.05 for v in above) for k, above in ABOVE.items()
    }
    wide = made.cases[made.cases.task == "neither"].pivot_table(index="case", columns="strategy", values="value")[
        "full"
    ]
    trivial = made.controls[made.controls.task == "neither"].groupby("case")["value"].mean()
    judge = permutation_test(
        (wide, trivial.reindex(wide.index)), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples",
        vectorized=True, n_resamples=20_000, rng=0,
    )
    assert found.p["neither", "full"] == pytest.approx(judge.pvalue, abs=0.02)


def test_what_has_not_learned_enters_nothing(made):
    gains, kept = gain_table(made), {"both", "tuned_only", "scratch_only"}
    assert set(of_learned(gains).task) == kept and gains.note[gains.task == "below"].iloc[0].startswith("not learned")
    assert (
        set(cell_points(made, gains).task)
        == set(run_points(made).task)
        == set(outcomes(made, gains).task)
        == {k[0] for k in cell_outcomes(made, draws=20)}
        == kept
    )
    said = " ".join(gain_findings(gains))
    assert (
        "Of 3 cells" in said
        and "2 of 5 cells are left out as not learned" in said
        and "below" not in said.replace("_", " ").partition("left out")[0]
    )
    assert (
        "2 of 5 cells are left out as not learned" in (told := convergence_finding(convergence_table(made)))
        and "3 cells" in told
    )
    assert "of 3 cells" in gain_finding(gains)
    shown = gain_cells(gains).set_index("task")
    assert (
        shown.value["neither"] == "not learned"
        and not shown.clear["below"]
        and shown.sign["below"] == "none"
        and shown.interval["both"].startswith("[")
    )


def test_nothing_left_claims_nothing(made):
    gains = gain_table(made)
    gains = gains[~gains.learned]
    assert (
        gain_findings(gains)[0].startswith("Gain: no cell is left to judge. 2 of 2 cells")
        and gain_finding(gains) == "No cell beats the trivial control"
    )


def test_without_recorded_controls_nothing_is_left_out(made):
    from dataclasses import replace
    assert gain_table(replace(made, controls=made.controls.iloc[:0])).learned.all()
