"""What a user is told: the plan before a batch, a few failures out of many, records of another version or of an
earlier study file."""
import json
import math
import re
import statistics
from dataclasses import replace

import pytest
from toy_batch import Toy

from vfm_notes.analysis.findings import findings
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import load_study, run_id, run_specs
from vfm_notes.report.cli import failures, print_summary
from vfm_notes.runs.batch import Summary
from vfm_notes.runs.grid import study_records
from vfm_notes.runs.record import new_record, read_records, write_record


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Toy:
    toy = Toy(tmp_path)
    monkeypatch.setenv("VFM_RUNS", str(toy.runs))
    return toy


def kept(toy, specs, **values):
    "Made-up records."
    for s in specs:
        write_record(
            run_folder("toy", run_id(s)),
            new_record(
                s, "toy", metrics={"dice": values.get("dice", 0.5)}, primary="dice", directions={"dice": 1},
                cost={"seconds": {"total": values.get("seconds", 1.0)}},
            ),
        )


def test_a_dry_run_says_everything_that_is_missing_at_once(toy):
    toy.write(
        cohort="prostate_cases", pretrain={},
        backbones=["dinov3_base.lvd1689m", "vit_base.mae_in1k", "profound_tiny.alpha", "profund_toy.x"],
        size=[8, 64, 64],
    )
    done = toy.run("--dry-run", VFM_DATA="", VFM_WEIGHTS=str(toy.root/"none"))
    said = [line for line in done.stdout.splitlines() if line.startswith(("missing: ", "cannot work: "))]
    assert (
        done.returncode == 0
        and "very roughly" in done.stdout
        and "of work (an estimate from costs measured on one processor core of another machine, as no run is "
        "recorded here yet)."
        in done.stdout
        and not toy.runs.exists()
    ), done.stdout + done.stderr
    for words in (
        ["VFM_DATA is not set"], ["gated licence", "DINOv3-License", "licences: [DINOv3-License]"],
        ["non-commercial licence", "CC-BY-NC-4.0"], ["profound_tiny.alpha"], ["profund_toy", "Did you mean"],
    ):
        assert any(all(w in line for w in words) for line in said), (words, said)


def test_a_dry_run_estimates_the_hours_from_earlier_records(toy):
    specs = run_specs(load_study(toy.study))
    # an hour each; four are left, and the pretraining about as long
    kept(toy, [s for s in specs if s.seed == 0], seconds=3600.0)
    done = toy.run("--dry-run", "--only", "kind=transfer")
    told = re.search(r"about (\d) h (\d\d) min of work \(judged by 2 runs like these\)", done.stdout)
    assert told and abs(60 * int(told[1]) + int(told[2]) - 300) < 5, done.stdout


def test_the_time_is_estimated_in_one_way(toy):
    from vfm_notes.report.builder import plan_rows
    from vfm_notes.report.explorer import study_line
    spec, time = load_study(toy.study), r"(very roughly|about) (\d+ h \d\d min|\d+ min \d\d s|\d+ s)"
    for records in ([], run_specs(spec)[:2]):
        kept(toy, records, seconds=3600.0)
        said = [toy.run("--dry-run").stdout, study_line(spec, {r["id"]: r for r in read_records("toy")})]
        if not records: said.append(plan_rows(spec, [])[1])
        assert len({re.search(time, text)[0] for text in said}) == 1, said
    assert plan_rows(spec, read_records("toy"))[1].endswith("one after the other, judged by 2 runs like these.")


def test_an_estimate_follows_the_costs_that_were_measured():
    from vfm_notes.foundation.places import project_root
    from vfm_notes.foundation.spec import PretrainSpec
    from vfm_notes.runs.watch import OVERHEAD_SECONDS, core_seconds, run_time, measure_speeds
    rows = {
        r["name"]: r
        for r in json.loads((project_root() / "nbs" / "report" / "backbone_costs.json").read_text())[0]["rows"]
    }
    spec = PretrainSpec(
        backbone="profound_toy.mine", size=(24, 64, 64), epochs=3, cases=dict(pretrain=50, train=1, val=1, test=1)
    )
    # twice the 12 slices that were measured
    assert core_seconds("pretrain", vars(spec)) == pytest.approx(
        OVERHEAD_SECONDS + 3 * 50 * 2 * rows["profound_toy"]["step_cpu_s"]
    )
    record = {"kind": "pretrain", "spec": vars(spec), "cost": {"seconds": {"total": 77.0}}}
    assert (
        run_time("pretrain", vars(spec), measure_speeds([record])).seconds == pytest.approx(77)
        and run_time("pretrain", vars(spec), {}).runs == 0
    )
    volumes = [
        r["step_cpu_s"] / math.prod(r["size"]) for r in rows.values() if r.get("step_cpu_s") and r["size"][0] > 1
    ]
    own = core_seconds("pretrain", vars(replace(spec, backbone="nobody_measured_me.x")))
    assert own == pytest.approx(OVERHEAD_SECONDS + 150 * 24 * 64 * 64 * statistics.median(volumes)), (
        "as the median of those for volumes"
    )


def test_a_frozen_encoder_is_counted_once():
    """A head on features costs one look at each case, however many epochs; with windows a look at each piece in every
    epoch."""
    from vfm_notes.foundation.places import project_root
    from vfm_notes.runs.watch import OVERHEAD_SECONDS, core_seconds
    row = next(
        r
        for r in json.loads((project_root() / "nbs" / "report" / "backbone_costs.json").read_text())[0]["rows"]
        if r["name"] == "profound_toy"
    )
    forward, step = row["forward_cpu_s"], row["step_cpu_s"]  # of 12 x 64 x 64 voxels
    spec = dict(
        backbone="profound_toy.mine", size=(12, 64, 64), epochs=30, n_train=40,
        cases=dict(pretrain=1, train=50, val=10, test=20),
    )
    costs = {
        s: core_seconds("transfer", spec | {"strategy": s}) - OVERHEAD_SECONDS
        for s in (
            "full", "top k=1", "lora rank=4", "decoder fraction=0.5", "decoder", "decoder drop=1", "random", "probe",
            "knn k=3",
        )
    }
    trained, once = 30 * 40 * step + (30 * 10 + 2 * 30) * forward, 70 * forward
    assert list(costs.values()) == pytest.approx(4 * [trained] + 5 * [once])
    cut = core_seconds("transfer", spec | {"strategy": "decoder", "window": (12, 32, 64)}) - OVERHEAD_SECONDS
    assert cut == pytest.approx(30 * 40 * forward / 2 + (30 * 10 + 2 * 30) * forward)


# registered after the costs were last measured, which takes half an hour; see the log
NOT_YET = {
    "curia",
    "dino_vit_3d",
    "dinov3_large",
    "dinov3_small",
    "genesis_unet",
    "medsiglip",
    "primus_m",
    "resenc_l",
    "resenc_toy",
    "segresnet_16",
    "stunet_base",
    "stunet_huge",
    "stunet_large",
    "stunet_small",
    "vit_large",
}


def test_every_backbone_of_the_package_was_measured():
    "One that is not counts as the median of others, which may be a hundred times what it costs."
    from vfm_notes.foundation.places import project_root
    from vfm_notes.runs.watch import voxel_seconds
    # of all, see test_backbones.py
    cards = json.loads((project_root()/"nbs"/"report"/"backbones.json").read_text(encoding="utf-8"))
    late = {c["name"] for c in cards if c["name"] in NOT_YET}
    absent = [c["name"] for c in cards if c["name"] not in voxel_seconds() and c["name"] not in late]
    assert absent == [], "measure them: make evidence NAME=backbone_costs"


@pytest.mark.parametrize(
    ("kind", "more", "steps", "looks"),
    [
        ("pretrain", {}, 3 * 50, 0), ("external", {"parents": ("a", "b")}, 0, 2),
        ("transfer", {}, 3 * 10, 3 * 4 + 2 * (4 + 6)),
        ("transfer", {"strategy": "lora rank=8", "n_train": 0}, 3 * 12, 3 * 4 + 2 * (4 + 6)),
        ("transfer", {"strategy": "knn"}, 0, 10 + 4 + 6),
        ("transfer", {"window": (6, 64, 64)}, 3 * 10 / 2, 3 * 4 + 2 * (4 + 6)),
    ],
)
def test_steps_and_looks_are_counted(kind, more, steps, looks):
    "A step costs what one of a piece costs, a look what a forward pass of the whole volume costs."
    from vfm_notes.runs.watch import OVERHEAD_SECONDS, core_seconds, voxel_seconds
    voxels, (forward, step) = 12 * 64 * 64, voxel_seconds()["profound_toy"]
    spec = dict(
        backbone="profound_toy.x", size=(12, 64, 64), window=(), epochs=3, strategy="full", n_train=10,
        cases=dict(pretrain=50, train=12, val=4, test=6),
    )
    assert forward < step and core_seconds(kind, spec | more) == pytest.approx(
        OVERHEAD_SECONDS + steps * step * voxels + looks * forward * voxels
    )


def test_the_time_left_is_what_the_closest_runs_took():
    from types import SimpleNamespace

    from vfm_notes.foundation.spec import RunSpec
    from vfm_notes.runs.watch import core_seconds, run_time, measure_speeds, time_left
    full, lora = RunSpec(strategy="full"), RunSpec(strategy="lora")
    known = measure_speeds([
        {"kind": "transfer", "spec": vars(s), "cost": {"seconds": {"total": t}}}
        for s, t in ((full, 10.0), (full, 30.0), (lora, 200.0))
    ])
    assert (
        run_time("transfer", vars(full), known).seconds, run_time("transfer", vars(lora), known).seconds,
    ) == pytest.approx((20, 200))
    assert (
        run_time("transfer", vars(replace(full, task="classification")), known).runs == 3
        and core_seconds("transfer", vars(full)) > 0
    )
    def look(specs, states, **more):
        return SimpleNamespace(
            job=SimpleNamespace(kind="transfer", runs=[str(i) for i in range(len(specs))], specs=specs),
            states={str(i): s for i, s in enumerate(states)}, **dict(whole=None, elapsed=0.0, parts={}) | more,
        )
    two, one, late = (
        look([full] * 3, ["done", "missing", "queued"]), look([full], ["running"], whole=100.0, elapsed=30.0),
        look([full], ["running"], elapsed=50.0),
    )
    left = lambda looks, n=1: time_left(looks, known, n).seconds
    assert left([look([full] * 2, ["missing"] * 2, parts={"0": 0.25})]) == pytest.approx(25)  # a quarter of a run
    # never less than the longest
    assert (
        left([two]) == pytest.approx(40)
        and left([two, one]) == pytest.approx(110)
        and left([two, one], 2) == pytest.approx(70)
    )
    assert (
        left([two, two], 2) == pytest.approx(40)
        and left([late]) == 0
        and left([]) == 0
        and time_left([two], known).runs == 3
    )
    at_work = look([full, full], ["done", "running"], whole=80.0)
    assert run_time("transfer", vars(full), measure_speeds([], [at_work])).seconds == pytest.approx(
        40
    ) and not measure_speeds([], [two])


def test_of_two_hundred_failures_a_few_are_shown_and_the_rest_counted(capsys):
    many = Summary(
        "big", done=3, failed={f"run-{i}": "ValueError: no" for i in range(200)},
        problems={f"job-{i}": "cell 4: ValueError: no" for i in range(30)}, missing=[f"m{i}" for i in range(50)],
    )
    lines = failures(many)
    assert (
        len(lines) == 22
        and lines[10] == "failed  190 more; for all with their errors: vfm table big -o failed.csv"
        and lines[-1] == "failed  20 more notebooks; see their logs"
    )
    print_summary(many)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 24 and "missing 50 runs" in out and "200 of 253 runs of study big failed" in out
    assert failures(Summary("small", failed={"a": "E: x"})) == ["failed  a: E: x"]


@pytest.mark.parametrize("command", ["status", "table", "run"])
def test_records_of_another_version_are_refused_in_one_sentence(toy, command):
    specs = run_specs(load_study(toy.study))
    kept(toy, specs[:2])
    path = run_folder("toy", run_id(specs[0]))/"record.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"schema": 7}))
    done = toy.run() if command == "run" else toy.vfm(command, str(toy.study))
    said = done.stderr.splitlines()
    assert (
        done.returncode == 2
        and len(said) == 1
        and "record schema 7, this version reads schema 1" in said[0]
        and "another VFM_RUNS" in said[0]
    ), done.stderr
    assert path.exists() and len(list((toy.runs/"toy").glob("*/record.json"))) == 2


def test_report_and_findings_leave_out_what_an_earlier_study_file_has_left(toy):
    study = load_study(toy.study)
    kept(toy, run_specs(study), dice=0.5)
    before = load_tables(study)
    kept(toy, run_specs(replace(study, size=(4, 8, 16))), dice=0.9)
    now = load_tables(study)
    assert len(read_records("toy")) == 12 and len(study_records(study)) == 6 and len(load_tables("toy").runs) == 12
    assert now.runs.equals(before.runs) and set(now.metrics.value) == {0.5} and findings(study) == findings(before)
    status = toy.vfm("status", str(toy.study)).stdout
    assert "6 records belong to no run of the study file as it is now" in status and "6 done" in status
