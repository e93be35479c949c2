"""No cell of a CSV for people is a formula: the same from Python and from the report's script in a browser."""
import csv
import io
import json

import pandas as pd
from browsing import chromium, wait
from toy_batch import Toy

from vfm_notes.foundation.places import report_notebooks
from vfm_notes.foundation.people import escape_formula, write_sheet
from vfm_notes.foundation.spec import load_study, run_id
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import failed_record, write_record

BAD = [
    "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1",
    "=1\r=2", "＝1", "＋1", "－1", "＠x",
    '=HYPERLINK("http://x","a")', "-", "+", "-a", "+e5", "-1,5", "-1-1", "=-1",
]
GOOD = [
    "-1", "-1.5", "+2e-3", "-.5", "1e5", "5.", "a=b", "T2w", "x-y", "", "−1.5 mm", "1 - 2", "a\rb", 'say "x"', "a,b",
    "a\nb",
]
ROWS = [{"case": v, "=head": i, "value": -1.5 * i} for i, v in enumerate([*BAD, *GOOD])]


def expected(v): return "'" + v if v in BAD else v
def lines(v): return v.replace("\r\n", "\n").replace("\r", "\n")


def rows_of(text):
    "As Python's own reader sees it, and with every line break a new row where it is not quoted."
    return list(csv.reader(io.StringIO(text, newline="")))


def test_python(tmp_path):
    write_sheet(pd.DataFrame(ROWS), tmp_path/"a.csv")
    head, *rows = rows_of((tmp_path/"a.csv").read_text(encoding="utf-8"))
    assert head == ["case", "'=head", "value"] and [r[0] for r in rows] == [lines(expected(r["case"])) for r in ROWS]
    assert [float(r[2]) for r in rows] == [r["value"] for r in ROWS] and b"\r" not in (tmp_path/"a.csv").read_bytes()
    again = pd.read_csv(tmp_path/"a.csv")
    assert again["value"].tolist() == [r["value"] for r in ROWS] and str(again["value"].dtype) == "float64"


def test_other_types_stay():
    table = pd.DataFrame({
        "a": pd.Series([-1, None], dtype="Int64"), "b": pd.Categorical(["=x", "y"]), "c": [True, False],
        "d": pd.Series(["-x", None], dtype="string"), -1: [-1e-9, float("inf")],
    })
    out = io.StringIO()
    write_sheet(table, out)
    assert out.getvalue() == "a,b,c,d,-1\n-1,'=x,True,'-x,-1e-09\n,y,False,,inf\n"
    assert escape_formula(-1) == -1 and escape_formula(None) is None


def test_table_of_a_study(tmp_path):
    "An error message that is a formula, as `vfm table -o` writes it."
    toy = Toy(tmp_path, seeds=[0], strategies=["scratch"])
    for spec in [s for j in jobs_of(load_study(toy.study)) for s in j.specs]:
        write_record(
            toy.runs / "toy" / run_id(spec),
            failed_record(spec, "toy", {"type": "=cmd|' /C calc'!A0", "message": "@x", "traceback": ""}),
        )
    assert toy.vfm("table", str(toy.study), "-o", str(tmp_path/"t.csv")).returncode == 0
    cells = [c for r in rows_of((tmp_path/"t.csv").read_text(encoding="utf-8")) for c in r]
    assert any("@x" in c for c in cells) and not [c for c in cells if c[:1] in tuple("=@+")]


def test_in_a_browser(tmp_path):
    "What a click on CSV saves, of a table and of a chart; the file is what Python would have written."
    script = next(p.parent for p in report_notebooks())/"site.js"
    table = "".join(
        f"<tr><td data-value='{json.dumps(r['case'])[1:-1].replace(chr(39), '&#39;')}'></td><td>{r['=head']}</td><td "
        f"data-value='{r['value']}'></td></tr>"
        for r in ROWS
    )
    chart = json.dumps({"data": {"values": ROWS}}).replace("<", chr(92) + "u003c")
    page = f"""<!doctype html><meta charset="utf-8"><body><div class="vfm-box" data-csv="1"><table class="vfm-table">\
<thead><tr><th>case</th><th>=head</th><th>value</th></tr></thead><tbody>{table}</tbody></table></div>
<script>document.querySelectorAll("td").forEach((c) => {{ \
if (c.dataset.value) c.dataset.value = JSON.parse('"' + c.dataset.value + '"'); }});
window.saved = []; URL.createObjectURL = (blob) => {{ blob.text().then((t) => saved.push(t)); return "blob:none"; }}; \
HTMLAnchorElement.prototype.click = () => 0;</script>
<figure class="vfm-chart" id="c"><div class="vfm-view"></div><script type="application/json">{chart}</script></figure>\
<script>{script.read_text(encoding="utf-8")}</script>"""
    (tmp_path/"page.html").write_text(page, encoding="utf-8")
    with chromium() as browser:
        browser.get((tmp_path/"page.html").as_uri())
        browser.execute_script("document.querySelectorAll('button[title*=CSV]').forEach((b) => b.click())")
        saved = wait(browser, "return window.saved.length === 2 && window.saved")
    for text in saved:
        head, *rows = rows_of(text)
        assert head == ["case", "'=head", "value"] and [r[0] for r in rows] == [expected(r["case"]) for r in ROWS]
        assert [float(r[2]) for r in rows] == [r["value"] for r in ROWS] and "'-1.5" not in text
