"""Sites from what studies leave behind when things went wrong: the report is built, and states it."""
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from fake_runs import write_study
from test_site import STUDY, browser, silent, use, visit  # noqa: F401 (browser is a fixture)

from vfm_notes.foundation.places import notebook_file, run_folder
from vfm_notes.foundation.spec import load_study, run_id
from vfm_notes.report.site import build_site
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import failed_record, new_record, write_record

LONG = "mae_" + "of_a_very_long_name_" * 2 + "end"  # 47 of 48 characters
EVIL = "<img src=x onerror=alert(1)>&amp;\"quoted\" 'case'"


def build(root, patch, lend_library, failed=0, renderer="smalldocs", **changes):
    "A study with made-up records, and its site."
    lend_library(root, renderer)
    patch.setenv("VFM_RUNS", str(root/"runs"))
    patch.delenv("VFM_DATA", raising=False)
    path = root/"bad.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"name": "bad", "external": {}} | changes))
    study = load_study(path)
    total = sum(len(j.specs) for j in jobs_of(study) if j.kind == "transfer")
    write_study(study, failed=round(failed * total), absent=0)
    return path, study


def pages(root): return {p.stem: p.read_text(encoding="utf-8") for p in (root/"_site").glob("*.html")}


@pytest.fixture(scope="module", params=["smalldocs", "quarto"])
def ruins(request, tmp_path_factory, lend_library):
    "Half of the runs failed, half of the rest has no metric; long names, names that are HTML, an output of megabytes."
    with pytest.MonkeyPatch.context() as patch:
        use(request.param, patch)
        root = tmp_path_factory.mktemp("bad")
        path, study = build(
            root, patch, lend_library, failed=0.5, renderer=request.param,
            pretrain={
                LONG: {"backbone": "profound_toy", "epochs": 3}, "contrast": {"backbone": "provicnet_toy", "epochs": 3},
            },
            backbones=[f"profound_toy.{LONG}", "provicnet_toy.contrast"],
            title="A title of many words " * 12 + "<script>alert(2)</script>",
        )
        done = [
            s
            for j in jobs_of(study)
            for s in j.specs
            if s.kind == "transfer"
            and json.loads((run_folder("bad", run_id(s)) / "record.json").read_text(encoding="utf-8"))["status"]
            == "done"
        ]
        for i, spec in enumerate(done[::2]):
            metrics = {"dice": math.nan if i % 2 else None, "psnr": None, "auc": None}
            rows = [{"case": EVIL, "patient": "p0", "metric": "dice", "value": math.nan}]
            write_record(
                run_folder("bad", run_id(spec)),
                new_record(
                    spec, "bad", metrics=metrics, primary="dice", directions={"dice": 1},
                    excluded=[{"case": EVIL, "reason": "<b>empty</b> file"}],
                ),
                cases=rows,
            )
        job = next(j for j in jobs_of(study) if j.kind == "transfer")
        nb = json.loads(notebook_file("bad", job.name).read_text(encoding="utf-8"))
        nb["cells"][-1]["outputs"].append({
            "output_type": "display_data", "metadata": {}, "data": {"text/html": "<p>" + "y" * 3_000_000 + "</p>"},
        })
        notebook_file("bad", job.name).write_text(json.dumps(nb))
        made = build_site(str(path), request.param, silent)
        yield {
            "root": root, "study": study, "made": made, "pages": pages(root), "job": job,
            "undefined": {run_id(s) for s in done[::2]},
        }


def test_ruins_make_a_whole_site(ruins):
    assert ruins["made"].problems == () and ruins["made"].findings
    states = re.findall(r'vfm-status (\w+)"', ruins["pages"]["runs"])
    assert states.count("failed") == 12 and states.count("done") == 14
    assert "14 done, 12 failed of 26 runs" in ruins["pages"]["runs"]


def test_no_page_says_nan_or_none_where_a_number_should_be(ruins):
    for name, text in ruins["pages"].items():
        shown = re.sub(r"<script.*?</script>|<style.*?</style>|<pre.*?</pre>|<code.*?</code>", "", text, flags=re.S)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", shown, re.S)
        assert not [c for c in cells if re.fullmatch(r"\s*(nan|NaN|None|inf|-inf)\s*", re.sub(r"<[^>]+>", "", c))], name


def test_html_in_names_stays_text(ruins):
    assert "&lt;img src=x onerror" in ruins["pages"]["data"], "the excluded case is named"
    for name, text in ruins["pages"].items():
        assert "<img src=x" not in text and "<script>alert(2)" not in text and "<b>empty</b>" not in text, name


def test_a_huge_output_is_left_out_with_a_link(ruins):
    text = ruins["pages"][f"run-{ruins['job'].name}"]
    assert (
        len(text) < 300_000
        and "an output of 3,000,007 characters is left out" in text
        and f'href="notebooks/{ruins["job"].name}.ipynb"' in text
    )
    assert (ruins["root"]/"_site"/"notebooks"/f"{ruins['job'].name}.ipynb").stat().st_size > 3_000_000


def test_numbers_lead_to_their_records(ruins):
    "Every run in the table leads to a file that holds its record, and every number in it is what was stored."
    numbers = (
        "id", "status", "spec", "metrics", "d2p", "d2p_moments", "scores", "cost", "n", "versions", "commit", "created",
        "files",
    )
    for job in jobs_of(ruins["study"]):
        held = json.loads((ruins["root"]/"_site"/"records"/f"{job.name}.json").read_text(encoding="utf-8"))
        assert set(held) == set(job.runs)
        for i in job.runs:
            kept = json.loads((ruins["root"]/"runs"/"bad"/i/"record.json").read_text(encoding="utf-8"))
            assert {k: held[i][k] for k in numbers} == {k: kept[k] for k in numbers}
        assert (
            f'href="records/{job.name}.json"' in ruins["pages"]["runs"]
            and f'href="records/{job.name}.json"' in ruins["pages"][f"run-{job.name}"]
        )
    made = re.search(
        r"study bad · (\d+) records .*?site made from commit \w+(-dirty)?, \d{4}-\d\d-\d\d \d\d:\d\d UTC",
        ruins["pages"]["index"],
    )
    assert made and int(made[1]) == 14


def test_ruins_in_a_browser(ruins, browser):
    "Long names do not push pages out of a phone's screen, every figure can be saved, no page has an error."
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for name in ["index", "alignment", "runs", "data", f"run-{ruins['job'].name}"]:
            errors, elsewhere = visit(browser, (ruins["root"]/"_site").as_uri(), name)
            assert errors == [] and elsewhere == [], name
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, name
            kinds = browser.execute_script(
                "return [...document.querySelectorAll('.vfm-chart')].map(c => [...c.querySelectorAll('.vfm-tools "
                "button')].map(b => b.textContent).join(' '))"
            )
            assert all(k == "PNG SVG CSV" for k in kinds), (name, kinds)
            kinds = browser.execute_script(
                "return [...document.querySelectorAll('.vfm-slices')].map(c => "
                "[...c.querySelectorAll('.vfm-tools button')].map(b => b.textContent).join(' '))"
            )
            assert all(k == "PNG SVG" for k in kinds), (name, kinds)
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_one_case_only(tmp_path, monkeypatch, lend_library):
    path, study = build(
        tmp_path, monkeypatch, lend_library, cases={"pretrain": 1, "train": 1, "val": 1, "test": 1},
        backbones=["provicnet_toy.contrast"], tasks={"segmentation": {}}, strategies=["scratch", "full"], seeds=[0],
    )
    for spec in [s for j in jobs_of(study) for s in j.specs if s.kind == "transfer"]:
        metrics = {"dice": 0.5 + 0.1 * (spec.strategy == "full"), "hd95": None}
        write_record(
            run_folder("bad", run_id(spec)),
            new_record(
                spec, "bad", metrics=metrics, primary="dice", directions={"dice": 1, "hd95": -1},
                n={"train": 1, "val": 1, "test": 1},
            ),
            cases=[
                {"case": "only", "patient": "only", "metric": m, "value": v if v is not None else math.nan}
                for m, v in metrics.items()
            ],
        )
    made = build_site(str(path), "smalldocs", silent)
    assert made.problems == () and made.findings
    text = pages(tmp_path)["index"]
    assert "No page" not in text and "20 %" in text.replace("+20.0 %", "20 %")


def test_nothing_in_the_runs_folder_but_a_failed_pretraining(tmp_path, monkeypatch, lend_library):
    path, study = build(tmp_path, monkeypatch, lend_library)
    shutil.rmtree(tmp_path/"runs")
    spec = next(s for j in jobs_of(study) for s in j.specs if s.kind == "pretrain")
    write_record(run_folder("bad", run_id(spec)), failed_record(spec, "bad", ValueError("<no> data")))
    made = build_site(str(path), "smalldocs", silent)
    assert (
        made.problems == ()
        and "No finished run" in pages(tmp_path)["index"]
        and "&lt;no&gt; data" in pages(tmp_path)["runs"]
    )


def test_a_page_that_fails_or_takes_too_long_is_named_and_the_others_are_there(tmp_path, monkeypatch, lend_library):
    from typer.testing import CliRunner

    from vfm_notes.report import pages as report, site
    from vfm_notes.report.cli import app
    path, _ = build(tmp_path, monkeypatch, lend_library, tasks={"segmentation": {}}, seeds=[0])
    known = site.report_pages
    def two(spec, records, *more):
        slow = {"guide_reader": "import time; time.sleep(60)", "guide_batch": "1 / 0"}
        for page in known(spec, records, *more):
            if page.name not in {*slow, "index", "methods"}: continue
            if page.name in slow:
                nb = json.loads(page.source.read_text(encoding="utf-8"))
                nb["cells"].append({
                    "cell_type": "code", "id": "late", "metadata": {}, "source": slow[page.name], "outputs": [],
                    "execution_count": None,
                })
                own = tmp_path/page.source.name
                own.write_text(json.dumps(nb))
                page = replace(page, source=own)
            yield page
    monkeypatch.setattr(site, "report_pages", lambda *given: list(two(*given)))
    monkeypatch.setattr(site, "run_pages", lambda *_: [])
    read = report.read_notebook
    def impatient(source):  # with this page alone, so that a slow machine does not fail the others
        monkeypatch.setattr(
            report, "CELL_TIMEOUT", 5 if "time.sleep(60)" in source.read_text(encoding="utf-8") else 1800
        )
        return read(source)
    monkeypatch.setattr(report, "read_notebook", impatient)
    done = CliRunner().invoke(app, ["site", str(path), "--renderer", "smalldocs"])
    said = [line for line in done.output.splitlines() if line.startswith("problem: ")]
    assert done.exit_code == 1 and sorted(said) == [
        "problem: Page guide_batch failed: ZeroDivisionError: division by zero",
        "problem: Page guide_reader failed: A cell timed out while it was being executed, after 5 seconds.",
    ], done.output
    assert {"index", "methods"} <= set(pages(tmp_path)) and "What was found" in pages(tmp_path)["index"]
