"""One number, one text: what pages, sentences and the terminal write about one study is collected with its meaning and
compared."""
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_runs import write_study

from vfm_notes.analysis.findings import findings
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.quantity import KINDS, METRICS, number_kind, round_value, format_value
from vfm_notes.foundation.spec import load_study
from vfm_notes.report import cli
from vfm_notes.report.explorer import run_explorer
from vfm_notes.report.figures import gain_matrix
from vfm_notes.report.explorer import study_line
from vfm_notes.report.pages import execute_pages, report_pages
from vfm_notes.runs.grid import known_records, jobs_of
from vfm_notes.runs.record import read_records
from vfm_notes.runs.grid import STATES, count_states, states_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("index", "alignment", "convergence", "prediction", "strategies", "tradeoff", "runs")
STUDY = {
    "name": "one", "title": "One number", "cohort": "phantom", "size": [4, 24, 24], "spacing": [8.0, 4.0, 4.0],
    "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 6}, "pages": ["tradeoff", "strategies"],
    "pretrain": {
        "mae": {"backbone": "profound_toy", "epochs": 3}, "contrast": {"backbone": "provicnet_toy", "epochs": 3},
    },
    "backbones": ["profound_toy.mae", "provicnet_toy.contrast"],
    "tasks": {"classification": {}, "segmentation": {}, "super_resolution": {}},
    "strategies": ["scratch", "full"],
    "seeds": [0, 1, 2],
    "budget": {"epochs": 4},
    "external": {"cohort": "prostate_cases", "task": "segmentation"},
}


def text_of(nb):
    "What a reader of an executed page sees, charts' data included."
    said = []
    for data in (o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])):
        for kind, value in data.items():
            if kind == "text/html":
                said.append(
                    html.unescape(
                        re.sub(
                            r"<[^>]+>", "", re.sub(r"</t[dh]>|</li>", " | ", re.sub(r"</tr>", " |\n", "".join(value)))
                        )
                    )
                )
            elif "vega" in kind: said.append(json.dumps(value, ensure_ascii=False))
    return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), "\n".join(said))


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    "A made study, all that is written about it, and what each number of that is of."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("one")
        patch.setenv("VFM_RUNS", str(root / "runs"))
        patch.setenv("VFM_NUMBERS", str(root / "numbers.jsonl"))
        patch.delenv("VFM_DATA", raising=False)
        study = root / "one.yaml"
        study.write_text(yaml.safe_dump(STUDY))
        spec, texts = load_study(str(study)), {}
        write_study(spec, failed=1, absent=1)
        # their cohort is not here
        for job in (j for j in jobs_of(spec) if j.kind == "external"): shutil.rmtree(run_folder("one", job.runs[0]))
        pages = [p for p in report_pages(spec, read_records("one")) if p.name in PAGES]
        def done(page, nb, error):
            assert not error, (page.name, error)
            texts[page.name] = text_of(nb)
        execute_pages(pages, str(study), done)
        texts["site"] = "\n".join(findings(spec))
        texts["tour"] = json.dumps(gain_matrix(gain_table(load_tables(spec))).to_dict(), ensure_ascii=False)
        texts["status"] = "\n".join(cli.status_lines(spec)[0])
        texts["explorer"] = run_explorer(str(study)).count.value
        texts["live"] = study_line(spec, known_records("one"))
        from typer.testing import CliRunner
        for name, words in (("dry run", ["run", str(study), "--dry-run"]), ("table", ["table", str(study)])):
            made = CliRunner().invoke(cli.app, words)
            assert made.exit_code == 0, made.output
            texts[name] = made.output
        lines = [json.loads(l) for l in (root / "numbers.jsonl").read_text(encoding="utf-8").splitlines()]
        yield {"texts": texts, "lines": lines, "spec": spec, "records": known_records("one")}


def test_one_meaning_has_one_text(heard):
    said = {}
    for line in heard["lines"]: said.setdefault((line["of"], line["kind"]), []).append(line["text"])
    different = {k: set(v) for k, v in said.items() if len(set(v)) > 1}
    assert not different, different
    often = [k for k, v in said.items() if len(v) > 1]
    kinds = {kind for _, kind in often}
    assert (
        len(said) > 150 and len(often) > 60 and {"gain", "score", "rho", "p", "saved", "sooner", "percent"} <= kinds
    ), (len(said), len(often), kinds)


def test_no_number_is_outside_of_what_is_possible(heard):
    outside = [
        l for l in heard["lines"] if l["value"] is not None and not l["low"] - 1e-9 <= l["value"] <= l["high"] + 1e-9
    ]
    assert not outside, outside[:5]
    bounded = [l for l in heard["lines"] if np.isfinite(l["high"])]
    assert len(bounded) > 200 and {l["kind"] for l in bounded} >= {"score", "rho", "p", "percent"}


def found(heard, pattern, *pages):
    "What a pattern catches in each of these places; in none of them nothing."
    there = {p: set(re.findall(pattern, heard["texts"][p])) for p in pages}
    assert all(there.values()), (pattern, {p: len(v) for p, v in there.items()})
    return set.union(*there.values())


def test_what_a_reader_sees_twice_is_the_same(heard):
    "The same by its words alone: whoever writes a number by another way is found here."
    rho = found(
        heard, r"gain over \d+ cells of .*?rank correlation (\S+) \(95 % interval (\S+) to (\S+) when", "index",
        "alignment", "site",
    )
    rho |= (
        found(heard, r"Spearman ρ = (\S+) \[(\S+), (\S+)\] over", "alignment")
        | found(heard, r"at the end \| gain \| (\S+) \[(\S+), (\S+)\]", "alignment")
        | found(heard, r"embed \| cells \| (\S+) \[(\S+), (\S+)\]", "alignment")
    )
    assert len(rho) == 1, rho
    p = (
        found(heard, r"gain over \d+ cells of .*?; p = (\S+) from", "index", "alignment", "site")
        | found(heard, r"over tasks and backbones, p = (\S+) from", "alignment")
        | found(heard, r"embed \| cells \| \S+ \[\S+, \S+\] \| (\S+) \|", "alignment")
    )
    assert len(p) == 1, p
    name, _, saved, low, high = min(
        found(heard, r"([^.|\n]*?) put (\S+ of \d+) pairs.*?saved (\S+), 95 % interval (\S+) to (\S+)\)", "prediction")
    )
    row = re.search(rf"(?i){re.escape(name.strip())} \| counts \|[^\n]*", heard["texts"]["prediction"])[0]
    assert f"{saved} [{low}, {high}]" in row and re.search(
        rf"{re.escape(saved)}\W+percentage\W+points\W+of\W+gain", heard["texts"]["prediction"]
    ), (saved, low, high, row)
    sooner = found(
        heard, r"([Tt]uned runs reached 95 % of scratch's rise.*?) on average \((95 % interval [^;]+);", "index",
        "convergence", "site",
    )
    assert len({(a[1:], b) for a, b in sooner}) == 1, sooner
    # the title of the rise's figure
    assert found(heard, r"rise in validation score (.*?) on average", "index") <= found(
        heard, r"Fine-tuned runs reach the target (.*?) on average", "convergence"
    )
    gains = [
        set(re.findall(r'"value": "([+−][\d.]+)".*?"interval": "(\[\S+, \S+\])"', heard["texts"][place]))
        for place in ("index", "tour")
    ]
    assert gains[0] == gains[1] and len(gains[0]) > 4, gains
    counts = found(heard, r"Of (\d+) cells, (\d+) gains? and (\d+) loses?", "index", "site").pop()
    title = found(heard, r"Pretraining clearly helps in (\d+) of (\d+) cells", "index", "tour")
    assert title == {counts[1::-1]}
    assert len(found(heard, r"The best mean \S+ is (\S+): ", "tradeoff")) == 1


def test_scores_are_the_same_on_all_pages(heard):
    for cell in (
        "classification | profound_toy.mae", "segmentation | provicnet_toy.contrast",
        "super resolution | profound_toy.mae",
    ):
        index = re.search(
            re.escape(cell) + r" \| [^|]+ \| (\S+) ± \S+ \| (\S+) ± \S+ \| (\S+) \|", heard["texts"]["index"]
        )
        for strategy, score in zip(("scratch", "full"), index.groups()):
            own = re.search(
                re.escape(cell) + rf" \| {strategy} \| [^|]+\| [^|]+\| [^|]+\| (\S+) \[(\S+), (\S+)\]",
                heard["texts"]["strategies"],
            )
            assert own[1] == score, (cell, strategy)
            if cell.startswith("classification"): assert f"{own[1]} [{own[2]}, {own[3]}]" in heard["texts"]["tradeoff"]
        control = re.search(
            cell.partition(" | ")[0] + r" \|\s+\| trivial control \| 0 \| missing \| [^|]+\| (\S+) \|",
            heard["texts"]["strategies"],
        )
        assert control[1] == index[3]


def test_a_state_has_one_word_and_one_count_everywhere(heard):
    jobs = jobs_of(heard["spec"])
    truth = [s for j in jobs for s in states_of(j, heard["records"]).values()]
    assert [(s, truth.count(s)) for s in STATES if s in truth] == [
        ("done", len(truth) - 4), ("failed", 1), ("missing", 1), ("skipped", 2),
    ]
    whole = f"{count_states(truth)} of {len(truth)} runs"
    for place in ("status", "live", "dry run", "table", "runs"): assert whole in heard["texts"][place], (place, whole)
    assert heard["texts"]["explorer"].startswith(f"{len(truth)} of {len(truth)} runs: {count_states(truth)}")
    assert f"{truth.count('done')}runs done | 1failed | 1missing | 2skipped" in heard["texts"]["index"]
    for place in heard["texts"]: assert "cannot run here" not in heard["texts"][place]
    for place in ("status", "dry run"):
        assert (
            len(re.findall(r"^skipped external-\S+ +1 skipped  VFM_DATA is not set", heard["texts"][place], re.M)) == 2
        )
    assert len(re.findall(r"^\s*skipped \| segmentation on prostate_cases", heard["texts"]["runs"], re.M)) == 2


# --- the rules that keep it so

# sizes of drawings, seconds of this process
OWN = {
    "widgets.py", "feature_maps.py", "convert.py", "reference.py", "site.py", "explorer.py", "builder.py", "doctor.py",
    "live.py", "curves.py",
}


def test_nobody_rounds_by_himself():
    "Numbers of a study are written by foundation.quantity alone."
    own = re.compile(r"\{[^{}\n]*:[+,]?\.\d[fge%]\}|\.round\(|\bround\(")
    files = [
        p for folder in ("analysis", "report") for p in (ROOT / "vfm_notes" / folder).glob("*.py") if p.name not in OWN
    ]
    said = {p.name: p.read_text(encoding="utf-8") for p in files}
    for p in sorted((ROOT / "nbs" / "report").glob("*.ipynb")):
        if p.stem not in ("backbones", "phantom"):
            said[p.name] = "\n".join(
                "".join(c["source"])
                for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
                if c["cell_type"] == "code"
            )
    bad = [f"{n}: {m}" for n, text in said.items() for m in own.findall(text)]
    assert set(bad) <= ALLOWED, set(bad) - ALLOWED


ALLOWED = {
    "association.py: .round(", "figures.py: round(", "cli.py: {look.part:.0%}",
    "weights_commands.py: {share:.0%}", "weights_commands.py: {report.share:.1%}",
    # none of them a number of a study
    *(f"weights_commands.py: {{{p}.stat().st_size / 2**20:.1f}}" for p in ("path", "target", "made.path")),
    "weights_commands.py: {v:.1g}", "halving.py: {100 * s:.0f}", "halving.py: {100 * r.share:.0f}",
    "chosen.py: {score:.3f}", "risk.py: {100 * s:.0f}", "risk.py: {100 * r['keep']:.0f}",
    "prediction.ipynb: {100 / spec.budget.epochs:.0f}", "power.py: {h:,.0f}", "power.py: round(",
    "public_matrix.py: .round(", "tables.py: round(", "gallery.py: {high:.1f}",
    # places in a picture
    *(f"before.py: {{{p}}}" for p in (
        'at(r["high"]):.1f', 'at(r["low"]):.1f', 'at(r["value"]):.1f', "high:.1f", "left + i * (width + 4):.1f",
        "left + width + 30:.0f", "total:.0f", "v:.2f", "width:.1f", "y:.0f", "y:.1f",
    )), "before.py: round(",
}


def test_nobody_draws_by_himself():
    "Every bootstrap and permutation test of the analysis has the draws and the seed of foundation.quantity."
    for folder in ("analysis", "report"):
        for p in (ROOT / "vfm_notes" / folder).glob("*.py"):
            text = p.read_text(encoding="utf-8")
            assert not re.findall(r"\bdraws(?:: int)? ?= ?[1-9]\d*", text), p.name  # 0: the estimate alone
            assert not re.findall(r"\bseed: int = \d", text), p.name
    for p in [*(ROOT / "nbs" / "report").glob("*.ipynb"), ROOT / "nbs" / "00_tour.ipynb"]:
        assert not re.search(r"\bdraws ?= ?\d", p.read_text(encoding="utf-8")), p.name


def test_how_numbers_are_written():
    # a sum has no say in its last digit
    assert [round_value(v, 3) for v in (0.7775, 0.77749999999999, 0.1 + 0.6775, 0.7784)] == [
        "0.777", "0.777", "0.777", "0.778",
    ]
    assert (
        round_value(-0.0001, 2) == "0.00"
        and round_value(-0.0001, 2, sign=True) == "+0.00"
        and round_value(999.7, digits=2) == "1,000"
        and round_value(1e-17) == "0"
        and round_value(0.00012345) == "0.000123"
    )
    assert (
        [format_value(v, "p") for v in (0.0004998, 0.05, 1.0, 0.00001)] == ["0.0005", "0.05", "1", "< 0.0001"]
        and format_value(3.0, "gain", unit=True) == "+3.0 %"
        and format_value(float("nan"), "gain", unit=True) == "missing"
    )
    assert (
        format_value(9.876, "score", metric="hd95") == "9.88"
        and format_value(0.9876, "score", metric="dice") == "0.988"
        and format_value(-0.01, "difference", metric="dice") == "−0.010"
    )
    assert (
        number_kind("score", "auc").low, number_kind("score", "auc").high, number_kind("difference", "auc").low,
        number_kind("spread", "auc").low,
    ) == (0, 1, -1, 0) and KINDS["rho"].low == -1


def test_directions_bounds_and_units_of_metrics():
    "A literal table: a metric that is turned round, or loses a bound, is seen here first."
    assert {m.name: (m.direction, m.unit, m.low, m.high) for m in METRICS.values()} == {
        "auc": (1, "", 0, 1), "kappa": (1, "", -1, 1), "dice": (1, "", 0, 1), "hd95": (-1, "mm", 0, np.inf),
        "hausdorff": (-1, "mm", 0, np.inf), "psnr": (1, "dB", -np.inf, np.inf), "ssim": (1, "", -1, 1),
        "macro_recall": (1, "", 0, 1), "accuracy": (1, "", 0, 1), "mean_auc": (1, "", 0, 1), "f1": (1, "", 0, 1),
        "sensitivity": (1, "", 0, 1), "specificity": (1, "", 0, 1), "ap": (1, "", 0, 1), "picai": (1, "", 0, 1),
        "mae": (-1, "", 0, np.inf), "rmse": (-1, "", 0, np.inf), "r2": (1, "", -np.inf, 1),
    }
