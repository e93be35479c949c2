"""A study on a cohort of files: named by a path in the study file, run once, with and without a bad case; and the data
commands."""
import sys
from dataclasses import replace

import pytest
import yaml

import vfm_notes.tune.catalog
from made_cases import boxes, message
from vfm_notes.data.load import load_cohort
from vfm_notes.data.manifest import layouts, read_manifest, write_manifest
from vfm_notes.foundation.spec import RunSpec, canonical_text, load_study, run_id, run_specs
from vfm_notes.report import cli
from vfm_notes.runs.record import new_record, read_record, write_record
from vfm_notes.tune.study_names import check_names
from vfm_notes.tune.transfer import transfer

STUDY = dict(
    name="mine", title="made", cohort="cohorts/boxes", size=[4, 32, 32], spacing=[3.0, 1.0, 1.0],
    cases={"pretrain": 0, "train": 4, "val": 2, "test": 4}, backbones=["profound_toy.mae_phantom"],
    tasks={"segmentation": {}}, strategies=["scratch"], seeds=[0],
    pretrain={"mae_phantom": {"backbone": "profound_toy"}}, budget={"epochs": 1, "batch_size": 2},
)


@pytest.fixture
def study(tmp_path, runs_root):
    "A study file beside a cohort of 12 cases."
    folder = tmp_path/"cohorts"/"boxes"
    write_manifest(boxes(folder, 12), folder)
    def write(**changes):
        (tmp_path/"mine.yaml").write_text(yaml.safe_dump(STUDY | changes))
        return load_study(tmp_path/"mine.yaml")
    return write


def test_a_study_runs_on_a_folder_of_files(study, tmp_path):
    spec = study()
    check_names(spec)
    run, = run_specs(spec)
    outcome = transfer(run)
    assert set(outcome.summary["metrics"]) == {"dice", "hd95"} and outcome.cases.case.nunique() == 4
    assert outcome.summary["excluded"] == [] and outcome.summary["licences"] == ["Apache-2.0"]
    cohort = load_cohort(run.cohort, run.size, run.spacing, run.cases)
    assert outcome.summary["cohort_hash"] == cohort.hash() and set(outcome.cases.case) == set(
        cohort.subset("test").names
    )


def test_a_bad_case_is_refused_or_left_out_and_recorded(study, tmp_path):
    run, = run_specs(study())
    victim = load_cohort(run.cohort, run.size, run.spacing, run.cases).subset("test").names[0]
    (tmp_path/"cohorts"/"boxes"/f"{victim}_adc.nii.gz").write_bytes(b"")
    said = message(transfer, run_specs(study(cases=STUDY["cases"] | {"test": 5, "val": 3}))[0])  # all twelve cases
    assert f"{victim}:" in said and "is empty (0 bytes)" in said
    spec, = run_specs(study(bad_cases="exclude"))
    outcome = transfer(spec)
    assert (
        [e["case"] for e in outcome.summary["excluded"]] == [victim]
        and victim not in set(outcome.cases.case)
        and outcome.cases.case.nunique() == 4
    )
    write_record(tmp_path/run_id(spec), new_record(spec, "mine", **outcome.summary))
    record = read_record(tmp_path/run_id(spec))
    assert "is empty" in record["excluded"][0]["reason"] and record["spec"]["bad_cases"] == "exclude"
    assert "without its 1 bad case" in message(
        transfer, run_specs(study(bad_cases="exclude", cases=STUDY["cases"] | {"test": 6}))[0]
    )


def test_what_concerns_no_single_case_is_refused_all_the_same(study, tmp_path):
    manifest = read_manifest(tmp_path/"cohorts"/"boxes")
    manifest.table.insert(2, "split", ["train"] * 6 + ["val"] * 2 + ["test"] * 4)
    manifest.table.loc[11, "patient"] = "p0"
    write_manifest(manifest, tmp_path/"cohorts"/"boxes")
    assert "patient p0 is in the splits test and train" in message(transfer, run_specs(study(bad_cases="exclude"))[0])


def test_a_run_without_the_bad_cases_has_another_name():
    assert run_id(RunSpec()) == run_id(RunSpec(bad_cases="refuse")) != run_id(RunSpec(bad_cases="exclude"))
    assert "bad_cases" in canonical_text(RunSpec()) and "bad_cases" in canonical_text(RunSpec(bad_cases="exclude"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(cohort="cohorts/nowhere"), "is not a folder with manifest.csv and card.yaml"),
        (dict(bad_cases="drop"), "bad_cases is 'drop', expected exclude or refuse"),
        (dict(external={"cohort": "./no", "task": "segmentation"}), "./no is not a folder"),
    ],
)
def test_wrong_study_files(study, changes, words): assert words in message(study, **changes)


# vfm data

def vfm(capsys, *args: str) -> tuple[int, str, str]:  # exit status, stdout, stderr
    "Run the command line in this process."
    old, sys.argv = sys.argv, ["vfm", *args]
    try: cli.main()
    except SystemExit as e: status = e.code or 0
    finally: sys.argv = old
    out = capsys.readouterr()
    return status, out.out, out.err


def test_check_lists_every_problem(study, tmp_path, capsys):
    folder = tmp_path/"cohorts"/"boxes"
    assert vfm(capsys, "data", "check", str(folder))[:2] == (0, f"{folder}: 12 cases, no problems\n")
    for i, damage in ((1, b""), (4, b"a letter"), (7, b"")): (folder/f"c{i}_t2w.nii.gz").write_bytes(damage)
    (folder/"c9_gland.nii.gz").unlink()
    status, out, err = vfm(capsys, "data", "check", str(folder/"card.yaml"))
    assert (
        status == 1
        and out.endswith("12 cases, 4 problems\n")
        and all(f"c{i}: " in out for i in (1, 4, 7, 9))
        and len(out.splitlines()) == 5
    )


def test_import_describe_and_check(runs_root, tmp_path, capsys, monkeypatch):
    layouts.card("prostate158")["example"](tmp_path)
    status, out, err = vfm(capsys, "data", "import", "prostate158", str(tmp_path), str(tmp_path/"data"/"p158"))
    assert status == 0 and "cases of" in out and "licence" in out, err
    monkeypatch.setenv("VFM_DATA", str(tmp_path/"data"))
    status, out, _ = vfm(capsys, "data", "describe", "p158")
    assert status == 0 and "Prostate158" in out and "split" in out
    assert vfm(capsys, "data", "check", "p158")[0] == 0
    status, out, _ = vfm(capsys, "data", "list")
    assert status == 0 and "p158" in out and "phantom" in out and "picai" in out


@pytest.mark.parametrize(
    "args, words",
    [
        (("check", "fantom"), "Unknown cohort 'fantom'. Did you mean 'phantom'?"),
        (("describe", "nowhere/at/all"), "Unknown cohort"), (("import", "picia", ".", "x"), "Did you mean 'picai'"),
        (("import", "picai", "nowhere", "x"), "nowhere does not exist"),
        (("import", "picai", ".", "x", "-o", "glnd=x"), "has no option 'glnd'"),
        (("import", "picai"), "Missing argument"),
    ],
)
def test_bad_input_is_status_2(runs_root, capsys, monkeypatch, args, words):
    monkeypatch.delenv("VFM_DATA", raising=False)
    status, out, err = vfm(capsys, "data", *args)
    assert status == 2 and words in err.replace("\n", " ")


def test_check_of_made_cohorts(runs_root, capsys):
    status, out, _ = vfm(capsys, "data", "check", "sulcus_phantom")
    assert status == 0 and "no problems" in out


def test_check_of_real_cohorts(runs_root, real_data, capsys, monkeypatch):
    monkeypatch.setenv("VFM_DATA", str(real_data))
    assert vfm(capsys, "data", "check", "hippocampus")[:2] == (0, "hippocampus: 100 cases, no problems\n")
    assert vfm(capsys, "data", "check", "prostate_cases")[:2] == (0, "prostate_cases: 3 cases, no problems\n")


# the data page

def page(study: str) -> str:
    "The data page's HTML, its cells run in this process."
    import ast
    import json
    from pathlib import Path
    shown, scope = [], {"display": lambda block: shown.append(block)}
    for cell in json.loads(
        (Path(__file__).resolve().parents[1] / "nbs" / "report" / "data.ipynb").read_text(encoding="utf-8")
    )["cells"]:
        if cell["cell_type"] != "code": continue
        source = (
            ""
            .join(cell["source"])
            .replace("from IPython.display import display", "")
            .replace('study = "phantom"', f"study = {study!r}")
        )
        tree = ast.parse(source)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "page", "exec"), scope)
        if last: shown.append(eval(compile(last, "page", "eval"), scope))
    return "".join(b._repr_html_() for b in shown if hasattr(b, "_repr_html_"))


def test_the_data_page_tells_licences_and_cases_left_out(study, tmp_path, runs_root):
    (tmp_path/"cohorts"/"boxes"/"c3_adc.nii.gz").write_bytes(b"")
    manifest = read_manifest(tmp_path/"cohorts"/"boxes")
    write_manifest(
        replace(manifest, card=replace(manifest.card, licence="CC BY-NC 4.0", non_commercial=True)),
        tmp_path / "cohorts" / "boxes",
    )
    spec, = run_specs(study(bad_cases="exclude"))
    cohort = load_cohort(spec.cohort, spec.size, spec.spacing, {"train": 4, "val": 2, "test": 5}, bad_cases="exclude")
    assert "No record yet" in page(str(tmp_path/"mine.yaml"))
    assert [e["case"] for e in cohort.excluded] == ["c3"]
    write_record(
        runs_root / "mine" / run_id(spec),
        new_record(
            spec, "mine", licences=[cohort.card.licence, "MIT"], excluded=cohort.excluded, metrics={"dice": 0.5},
            primary="dice", n={"test": 4},
        ),
    )
    html = page(str(tmp_path/"mine.yaml"))
    assert (
        "is not licensed for commercial use: cohort boxes (CC BY-NC 4.0)" in html
        and "weights profound_toy.mae_phantom" in html
    )
    assert "c3" in html and "c3_adc.nii.gz is empty (0 bytes)" in html


def test_the_data_page_of_a_free_study_has_no_notice(study, tmp_path, runs_root):
    spec, = run_specs(study())
    write_record(
        runs_root / "mine" / run_id(spec),
        new_record(spec, "mine", licences=["Apache-2.0"], metrics={"dice": 0.5}, primary="dice", n={"test": 4}),
    )
    html = page(str(tmp_path/"mine.yaml"))
    assert (
        "not licensed for commercial use" not in html
        and "every case that the runs needed could be used" in html
        and "Boxes" in html
    )
