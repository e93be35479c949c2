"""The report site, built from made-up records and looked at in a real browser whose network is blocked."""
import base64
import functools
import http.server
import json
import re
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from browsing import AXE, asked, chromium, luminance, wait
from fake_runs import write_study

from vfm_notes.foundation.places import library_notebooks, notebook_file, run_folder
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import load_study, run_id
from vfm_notes.report import reference, site as site_module
from vfm_notes.report.convert import join_lines
from vfm_notes.report.site import build_site
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import new_record, write_record

STUDY = {
    "name": "made_up", "title": "Which <b>toy</b> backbone?", "cohort": "phantom", "size": [4, 24, 24],
    "spacing": [8.0, 4.0, 4.0], "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 6},
    "pretrain": {
        "mae_of_a_long_name": {"backbone": "profound_toy", "epochs": 3},
        "contrast": {"backbone": "provicnet_toy", "epochs": 3},
    },
    "backbones": ["profound_toy.mae_of_a_long_name", "provicnet_toy.contrast"],
    "tasks": {"classification": {}, "segmentation": {}, "super_resolution": {}},
    "strategies": ["scratch", "full"],
    "seeds": [0, 1],
    "budget": {"epochs": 4},
    "external": {"cohort": "prostate_cases", "task": "segmentation"},
}
STILL = [  # no numbers, no charts
    "guide_reader", "guide_researcher", "guide_cohort", "guide_predict", "guide_batch", "guide_prostate",
]
OWN = [
    "index", "claim", "alignment", "which", "convergence", "prediction", "power", "pretraining", "backbones", "data",
    "gallery", "runs",
    "phantom", "methods", "log", *STILL,
]
# drawn charts of each page
CHARTS = {
    "index": 1, "alignment": 6, "convergence": 5, "prediction": 1, "pretraining": 2,
    "phantom": 1,
}
silent = lambda line: None


# what Quarto renders of the library in these tests; smalldocs renders all
LIBRARY = ("places", "show", "mmd", "convert")
SEARCH = {
    "smalldocs": (".smalldocs-search input", ".search-result"),
    "quarto": ("#quarto-search input", ".aa-Panel a.search-result-link"),
}


def use(renderer, patch):
    "Skip where a renderer is not on this machine; let Quarto render a part of the library only."
    if renderer == "smalldocs": return
    if not shutil.which("quarto"): pytest.skip("quarto is not on PATH")
    some = [p for p in library_notebooks() if p.stem[3:] in LIBRARY]
    for module in (reference, site_module): patch.setattr(module, "library_notebooks", lambda: some)


@pytest.fixture(scope="module", params=["smalldocs", "quarto"])
def project(request, tmp_path_factory, lend_library):
    "A folder with a study, its records and its site, by each renderer that is on this machine."
    with pytest.MonkeyPatch.context() as patch:
        use(request.param, patch)
        root = tmp_path_factory.mktemp("site")
        lend_library(root, request.param)
        patch.setenv("VFM_RUNS", str(root / "runs"))
        patch.delenv("VFM_DATA", raising=False)
        study = root / "made_up.yaml"
        study.write_text(yaml.safe_dump(STUDY))
        write_study(load_study(study), failed=1, absent=1)
        yield {
            "root": root, "study": str(study), "made": build_site(str(study), request.param, silent),
            "renderer": request.param,
        }


# --- without a browser

def test_site_is_complete(project):
    made, site = project["made"], project["root"] / "_site"
    jobs = jobs_of(load_study(project["study"]))
    assert made.problems == () and not made.up_to_date and made.path == site / "index.html" and len(made.findings) >= 3
    assert {p.stem for p in site.glob("*.html")} == {*OWN, *(f"run-{j.name}" for j in jobs)} and made.pages == len(
        OWN
    ) + len(jobs)
    assert {p.stem for p in (site / "notebooks").glob("*.ipynb")} == {j.name for j in jobs}
    pages = {p.stem: p.read_text(encoding="utf-8") for p in site.glob("*.html")}
    assert max(len(t) for t in pages.values()) < 3e6
    assert all("study made_up" in t and "site made from commit" in t for t in pages.values())


def generated(root):
    "Notebooks that we wrote for a renderer to read, and the program that looks at results."
    found = [*(root / "pages" / "made_up").glob("*.ipynb"), *(root / "pages" / "_reference").glob("*.ipynb")]
    return {p: json.loads(p.read_text(encoding="utf-8")) for p in found}


def headings(markdown):
    "Level and id of each heading, as Pandoc names it."
    bare = re.sub(r"^(`{3,}|~{3,}).*?^\1`*\s*$", "", markdown, flags=re.S | re.M)
    for marks, text in re.findall(r"^(#+) +(.+)$", bare, re.M):
        own = re.search(r"\{#(\S+)\}", text)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[`*]|\{.*\}", "", text))
        yield (
            len(marks),
            own[1]
            if own
            else re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain.lower()).strip())),
        )


def test_pages_are_written_as_quarto_needs_them(project):
    "Texts are lists of lines, no output is text/html, a title and an id stand once, nothing is asked of the network."
    found = generated(project["root"])
    assert len(found) > 30
    for path, nb in found.items():
        ids, levels = [], []
        for c in nb["cells"]:
            texts = [c["source"]] + [
                v for o in c.get("outputs", []) for v in [o.get("text", []), *o.get("data", {}).values()]
            ]
            assert all(isinstance(v, list) and all(line.endswith("\n") for line in v[:-1]) for v in texts), path.name
            assert not [o for o in c.get("outputs", []) if "text/html" in o.get("data", {})], path.name
            if c["cell_type"] == "markdown":
                made = list(headings(join_lines(c["source"])))
                ids += [i for _, i in made]
                levels += [level for level, _ in made]
            shown = [join_lines(v) for v in texts] if c["cell_type"] != "code" else [join_lines(v) for v in texts[1:]]
            ids += [i for text in shown for i in re.findall(r"<[a-z]+\b[^<>]*?\sid=\"([^\"]+)\"", text)]
        assert (
            nb["cells"][0]["cell_type"] == "raw"
            and "title:" in join_lines(nb["cells"][0]["source"])
            and 1 not in levels
        ), path.name
        # both renderers name the list of headings toc-title
        twice = {i for i in ids if ids.count(i) > 1 or i == "title"}
        assert not twice, f"{path.name}: {twice}"


def test_the_generated_folder_is_a_whole_project(project):
    "What pages link to lies beside them, so that `quarto preview` there shows the same site."
    folder = project["root"] / "pages" / "made_up"
    config = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    assert set(config["project"]["render"]) == {p.name for p in folder.glob("*.ipynb")}
    assert all((folder / r).is_dir() for r in config["project"]["resources"]) and not config["execute"]["enabled"]
    for page in (folder / "_site").glob("*.html"):
        for to in re.findall(
            r'href="((?:records|notebooks|reference|assets)/[^"#]+)', page.read_text(encoding="utf-8")
        ):
            assert (folder / to).exists() and (folder / "_site" / to).exists(), f"{page.name}: {to}"


def test_wide_pages_are_wide_by_each_renderer(project):
    "What is written for smalldocs is said to Quarto, too."
    seen = 0
    for path, nb in generated(project["root"]).items():
        front = yaml.safe_load(join_lines(nb["cells"][0]["source"]).strip().strip("-"))
        assert front.get("grid", {}).get("body-width") == front.get("max-width"), path.name
        seen += "max-width" in front
    assert seen > 5


def test_nothing_in_the_site_asks_the_network(project):
    for path in (project["root"] / "_site").rglob("*"):
        if path.suffix not in (".html", ".css"): continue
        text = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.S)  # code may speak of addresses
        found = re.findall(
            r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^\"'>]+"
            r"|@import[^;]+//[^;]+|url\([\"']?https?:[^)]+",
            text,
        )
        assert not found, f"{path.name}: {found[:2]}"


def test_names_and_messages_are_escaped(project):
    site = project["root"] / "_site"
    runs, index = (site / "runs.html").read_text(encoding="utf-8"), (site / "index.html").read_text(encoding="utf-8")
    assert "<b>out of memory</b>" not in runs and "&lt;b&gt;out of memory&lt;/b&gt;" in runs
    assert "Which <b>toy</b>" not in index and "Which &lt;b&gt;toy&lt;/b&gt; backbone?" in index


def test_definitions_are_one_click_away(project):
    site = project["root"] / "_site"
    methods = (site / "methods.html").read_text(encoding="utf-8")
    for name in ("index", "alignment", "convergence", "prediction"):
        to = re.findall(r'href="methods\.html#([^"]+)"', (site / f"{name}.html").read_text(encoding="utf-8"))
        assert to and all(f'id="{t}"' in methods for t in to), name


def test_huge_and_remote_outputs_are_cut_with_a_link(project):
    text = (project["root"] / "_site" / "run-pretrain-profound_toy.mae_of_a_long_name.html").read_text(encoding="utf-8")
    assert (
        "characters left out here" in text
        and "loads from the network is left out" in text
        and "cdn.example.org" not in text
    )
    assert 'href="notebooks/pretrain-profound_toy.mae_of_a_long_name.ipynb"' in text and len(text) < 200_000


def test_second_build_does_nothing(project, monkeypatch):
    "No page, no sentence and no library is made, nothing is rendered, no file is written."
    def files(): return {p: p.stat().st_mtime_ns for p in project["root"].rglob("*") if p.is_file()}
    before = files()
    for name in ("make_pages", "study_findings", "build_reference", "render", "write_config"):
        monkeypatch.setattr(site_module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    again = build_site(project["study"], project["renderer"], silent)
    assert again.up_to_date and again.findings == project["made"].findings and files() == before


def test_a_change_touches_only_what_depends_on_it(project):
    study = load_study(project["study"])
    job = next(j for j in jobs_of(study) if j.kind == "transfer")
    path = notebook_file(study.name, job.name)
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["cells"][0]["source"] += "\n\nA word more."
    path.write_text(json.dumps(nb))
    assert build_site(project["study"], project["renderer"], silent).made == (f"run-{job.name}",)
    spec = next(s for j in jobs_of(study) for s in j.specs if not run_folder(study.name, run_id(s)).exists())
    owner = next(j.name for j in jobs_of(study) if spec in j.specs)
    write_record(
        run_folder(study.name, run_id(spec)),
        new_record(
            spec, study.name, metrics={"psnr": 27.0}, primary="psnr", directions={"psnr": 1}, units={"psnr": "dB"},
            cost={"seconds": {"training": 1.0}},
        ),
    )
    made = build_site(project["study"], project["renderer"], silent)
    assert set(made.made) == {*OWN, f"run-{owner}"} - {"phantom", "methods", "log", *STILL} and made.problems == ()


def test_study_without_records_says_so(project, tmp_path, monkeypatch, lend_library):
    lend_library(tmp_path, project["renderer"])
    monkeypatch.setenv("VFM_RUNS", str(tmp_path / "runs"))
    made = build_site(project["study"], project["renderer"], silent)
    assert made.problems == () and made.pages == len(OWN) and made.findings
    assert "No finished run of study" in (tmp_path / "_site" / "index.html").read_text(encoding="utf-8")
    assert "missing" in (tmp_path / "_site" / "runs.html").read_text(encoding="utf-8")


def test_wrong_words_are_answered(project):
    with pytest.raises(VfmError, match="smalldocs"): build_site(project["study"], "smaldocs", silent)
    with pytest.raises(VfmError, match="phantom"): build_site("phantm", "smalldocs", silent)
    if not shutil.which("quarto"):
        with pytest.raises(VfmError, match="not on PATH"): build_site(project["study"], "quarto", silent)


# --- in a browser

@pytest.fixture(scope="module")
def browser():
    "Chromium without a network."
    with chromium() as made: yield made


@pytest.fixture(scope="module")
def server(project):
    "The site behind http on this machine."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    made = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(project["root"] / "_site"))
    )
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def visit(browser, base, name):
    "Open a page, wait for its charts, and give what went wrong and what was asked for."
    browser.get_log("performance")
    browser.get(f"{base}/{name}.html")
    wait(
        browser,
        "return document.readyState === 'complete' && [...document.querySelectorAll('.vfm-chart')].every(c => "
        "c.dataset.drawn)",
    )
    return asked(browser, base)


def searched(browser, renderer, words):
    "Type into the search and give the addresses that it finds."
    box, found = SEARCH[renderer]
    wait(browser, f"return document.querySelector('{box}')")
    browser.find_element("css selector", box).send_keys(words)
    return wait(browser, f"return [...document.querySelectorAll('{found}')].map(a => a.getAttribute('href')).join(' ')")


def test_every_page_opens_clean_over_http(project, browser, server):
    for path in sorted((project["root"] / "_site").glob("*.html")):
        errors, elsewhere = visit(browser, server, path.stem)
        assert errors == [] and elsewhere == [], path.name
        marks = browser.execute_script(
            "return [...document.querySelectorAll('.vfm-chart')].map(c => c.querySelectorAll('.vfm-view svg "
            "[class*=mark-] path, .vfm-view svg .mark-text text').length)"
        )
        assert all(m > 3 for m in marks) and len(marks) >= CHARTS.get(path.stem, 0), f"{path.name}: {marks}"
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
            f"{path.name} is wider than the window"
        )


def test_the_bar_above_marks_the_page_that_is_open(browser, server):
    for name, marked in (("index", ["Overview"]), ("alignment", ["Alignment"]), ("runs", ["Runs"]), ("data", [])):
        visit(browser, server, name)
        assert (
            browser.execute_script(
                "return [...document.querySelectorAll('#quarto-header a.nav-link.active')].map(a => a.innerText.trim())"
            )
            == marked
        ), name


@pytest.mark.parametrize(
    "name",
    ["index", "alignment", "prediction", "runs", "methods", "run-segmentation-profound_toy.mae_of_a_long_name-n4"],
)
def test_pages_open_from_files(project, browser, name):
    errors, elsewhere = visit(browser, (project["root"] / "_site").as_uri(), name)
    assert errors == [] and elsewhere == []


def test_what_is_in_view_is_drawn_first(browser, server):
    """A chart in view does not wait for those further down, and for nothing but the scripts of the site. (How soon it
    stands: bench_site.py.)"""
    noting = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument",
        {
            "source": "window.order = []; new MutationObserver(es => es.forEach(e => "
            "window.order.push(e.target.id))).observe(document, {subtree: true, attributes: true, attributeFilter: "
            "['data-drawn']})"
        },
    )
    try: visit(browser, server, "alignment")
    finally: browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", noting)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.vfm-chart')].map(c => [c.id, c.getBoundingClientRect().top < "
        "innerHeight + 300])"
    )
    order = browser.execute_script("return window.order")
    assert set(order) == {i for i, _ in boxes} and len(order) == len(boxes) >= CHARTS["alignment"], (
        "each is drawn, once"
    )
    assert dict(boxes)[order[0]] and not all(near for _, near in boxes)
    scripts = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => n.endsWith('.js'))"
    )
    assert sum("vega" in s for s in scripts) <= 1, scripts


def test_runs_table_filters_sorts_and_shows_holes(browser, server):
    visit(browser, server, "runs")
    shown = "return [...document.querySelectorAll('.vfm-table tbody tr')].filter(r => !r.hidden).map(r => r.innerText)"
    rows = browser.execute_script(shown)
    assert len(rows) == 2 + 24 + 2 and sum(r.startswith("failed") for r in rows) == 1
    failed = next(r for r in rows if r.startswith("failed"))
    assert "RuntimeError: <b>out of memory</b> & luck" in failed
    box = browser.find_element("css selector", ".vfm-filters input")
    box.send_keys("provicnet scratch")
    found = browser.execute_script(shown)
    assert len(found) == 6 and all("provicnet" in r and "scratch" in r for r in found)
    assert browser.find_element("css selector", ".vfm-count").text == "6 of 28"
    box.clear(); box.send_keys("x\b")
    browser.execute_script(
        "const s = document.querySelector('.vfm-filters select'); s.value = 'failed'; s.dispatchEvent(new "
        "Event('input', {bubbles: true}))"
    )
    assert len(browser.execute_script(shown)) == 1
    browser.execute_script(
        "const s = document.querySelector('.vfm-filters select'); s.value = ''; s.dispatchEvent(new Event('input', "
        "{bubbles: true}))"
    )
    heads = browser.find_elements("css selector", ".vfm-table thead button")
    next(h for h in heads if h.text.startswith("task")).click()
    tasks = browser.execute_script(
        "return [...document.querySelectorAll('.vfm-table tbody tr')].map(r => r.cells[1].innerText)"
    )
    assert tasks == sorted(tasks)


def test_every_run_leads_to_its_notebook(project, browser, server):
    visit(browser, server, "runs")
    to = browser.execute_script("return [...document.querySelectorAll('.vfm-table a')].map(a => a.href)")
    to = [t.removeprefix(f"{server}/") for t in to]
    jobs = jobs_of(load_study(project["study"]))
    pages = {f"run-{j.name}.html" for j in jobs} | {f"records/{j.name}.json" for j in jobs}
    assert set(to) == pages and len(to) >= 2 * 28 and all((project["root"] / "_site" / t).exists() for t in to)


def test_equations_are_drawn_without_a_script(browser, server):
    visit(browser, server, "methods")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.vfm-equation math')].map(m => { const r = "
        "m.getBoundingClientRect(); return [r.width, r.height]; })"
    )
    assert len(boxes) >= 5 and all(w > 80 and h > 15 for w, h in boxes)
    assert browser.execute_script("return document.querySelectorAll('p math').length") > 10


def test_the_search_knows_the_rows_of_tables(project):
    "Each leads to the heading above its table; pages of runs are found as a whole."
    site = project["root"] / "_site"
    rows = [e for e in json.loads((site / "search.json").read_text(encoding="utf-8")) if " row " in e["objectID"]]
    said = "task segmentation; backbone provicnet_toy.contrast"
    assert any(e["href"] == "runs.html" and said in e["text"] for e in rows)
    assert len({e["objectID"] for e in rows}) == len(rows) > 60 and not any(e["href"].startswith("run-") for e in rows)
    for page, _, anchor in {e["href"].partition("#") for e in rows}:
        assert not anchor or f'id="{anchor}"' in (site / page).read_text(encoding="utf-8"), (page, anchor)


@pytest.mark.parametrize("kind", ["http", "file"])
def test_search_finds_a_run(project, browser, server, kind):
    visit(browser, server if kind == "http" else (project["root"] / "_site").as_uri(), "index")
    assert "run-super_resolution-provicnet_toy.contrast-n4.html" in searched(
        browser, project["renderer"], "super resolution provicnet"
    )


def test_the_library_is_in_the_site(project, browser, server):
    "Pages of the library open from http and from files, fit a phone, and are found by the report's search."
    pages = sorted((project["root"] / "_site" / "reference").glob("*.html"))
    assert (
        len(pages) > (100 if project["renderer"] == "smalldocs" else len(LIBRARY))
        and max(p.stat().st_size for p in pages) < 3e6
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for base in (server, (project["root"] / "_site").as_uri()):
            for name in ("index", "shift_mmd", "foundation_places"):
                errors, elsewhere = visit(browser, base, f"reference/{name}")
                assert (
                    errors == []
                    and elsewhere == []
                    and browser.execute_script("return document.documentElement.scrollWidth") <= 390
                ), name
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    visit(browser, server, "index")
    assert browser.execute_script(
        "return [...document.querySelectorAll('nav a')].some(a => "
        "/reference\\/(index\\.html)?$/.test(a.getAttribute('href')))"
    )
    assert "reference/shift_mmd.html#two_sample_test" in searched(browser, project["renderer"], "two_sample_test")


def test_what_a_reader_chose_holds_on_pages_from_files(project, browser):
    "Opened from files: dark stays dark on the next page, and the contents follow the reading."
    base = (project["root"] / "_site").as_uri()
    with screen(browser):
        visit(browser, base, "index")
        assert ground(browser) > 0.9
        browser.execute_script("document.querySelector('.quarto-color-scheme-toggle').click()")
        visit(browser, base, "methods")
        assert wait(browser, "return document.readyState === 'complete'") and ground(browser) < 0.1
        browser.execute_script("document.querySelector('.quarto-color-scheme-toggle').click()")
        browser.execute_script("window.scrollTo(0, document.body.scrollHeight / 2)")
        active = (
            "return [...document.querySelectorAll('nav[role=doc-toc] a.active, #TOC a.active')].map(a => "
            "a.innerText).join()"
        )
        first = wait(browser, active)
        browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        assert wait(browser, active + f" !== {json.dumps(first)}")


def test_library_examples_are_open(project, browser, server):
    visit(browser, server, "reference/shift_mmd")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('main pre.python')].map(p => [p.checkVisibility(), "
        "!!p.closest('details')])"
    )
    assert (
        sum(v for v, _ in shown) > 5
        and sum(folded for _, folded in shown) > 5
        and all(v != folded for v, folded in shown)
    )


def test_downloads(browser, server):
    visit(browser, server, "index")
    browser.execute_script("""window.saved = [];
        HTMLAnchorElement.prototype.click = function () { saved.push([this.download, this.href.slice(0, 22)]); };
        const made = URL.createObjectURL;
        URL.createObjectURL = b => { b.text().then(t => window.lastText = t); return made(b); };
        document.querySelectorAll('.vfm-chart .vfm-tools button').forEach(b => b.click());""")
    names = wait(browser, "return window.saved.length === 3 && saved.map(s => s[0])")
    assert sorted(n.split(".")[-1] for n in names) == ["csv", "png", "svg"]
    browser.execute_script(
        "[...document.querySelectorAll('.vfm-chart .vfm-tools button')].find(b => b.textContent === 'CSV').click()"
    )
    head, *rows = wait(browser, "return (window.lastText || '').includes('backbone') && lastText").strip().split("\n")
    assert "rpg" in head and len(rows) == 6


# one of each kind of page
KINDS = [
    "index", "alignment", "convergence", "data", "runs", "methods", "guide_reader",
    "run-segmentation-profound_toy.mae_of_a_long_name-n4", "run-pretrain-provicnet_toy.contrast",
    "reference/foundation_show",
]
READING = (Path(__file__).parents[1] / "reading.js").read_text(encoding="utf-8")


@contextmanager
def screen(browser, width=1300, scheme="light", media=""):
    "A reader's screen, or the printer."
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try: yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def ground(browser): return luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("width, scheme", [(1300, "light"), (1300, "dark"), (390, "light"), (390, "dark")])
def test_every_kind_of_page_can_be_read(browser, server, width, scheme):
    "Words of at least 12 px with a contrast of 4.5:1, none upon another, nothing beyond the screen."
    with screen(browser, width, scheme):
        for name in KINDS if (width, scheme) in ((1300, "light"), (390, "dark")) else KINDS[:3]:
            visit(browser, server, name)
            assert (ground(browser) < 0.1) == (scheme == "dark")
            assert browser.execute_script(READING) == {"small": [], "faint": [], "wide": [], "over": []}, (
                f"{name} at {width} px, {scheme}"
            )


def test_the_measure_of_reading_can_fail(browser, server):
    visit(browser, server, "methods")
    browser.execute_script("""document.querySelector('main').insertAdjacentHTML('beforeend', `
        <p style="font-size:9px">tiny</p><p style="color:#bbb">pale</p>
        <p style="position:absolute;left:5000px;white-space:nowrap">far</p>
        <p style="margin-bottom:-1.2em">under</p><p>above</p>`)""")
    found = browser.execute_script(READING)
    assert (
        [len(found[k]) for k in ("small", "faint", "wide", "over")] == [1, 1, 1, 1]
        and "tiny" in found["small"][0]
        and "far" in found["wide"][0]
        and "under" in found["over"][0]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(browser, server, scheme):
    if not AXE.exists(): pytest.skip("axe-core is not there; `make programs` fetches it (tests/axe.txt)")
    browser.set_script_timeout(300)
    # what a scheme changes
    only = ", runOnly: {type: 'rule', values: ['color-contrast', 'link-in-text-block']}" if scheme == "dark" else ""
    with screen(browser, 1300, scheme):
        for name in KINDS:
            visit(browser, server, name)
            browser.execute_script(AXE.read_text(encoding="utf-8"))
            found = browser.execute_async_script(
                f"const done = arguments[0]; axe.run(document, {{resultTypes: ['violations']{only}}}).then(r => "
                "done(r.violations.map(v => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 150)])))"
            )
            assert [f for f in found if f[0] in ("serious", "critical")] == [], f"{name}, {scheme}"


def test_the_printer_gets_dark_words_on_white(browser, server):
    with screen(browser, 800, "dark", "print"):
        for name in ("index", "run-segmentation-profound_toy.mae_of_a_long_name-n4"):
            visit(browser, server, name)
            assert ground(browser) > 0.95 and browser.execute_script(READING)["faint"] == []
            assert browser.execute_script(
                "return [...document.querySelectorAll('#quarto-header, #quarto-sidebar, .vfm-tools')].every(e => "
                "!e.checkVisibility())"
            )
        pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
        assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


@pytest.mark.parametrize("name", ["index", "alignment", "convergence", "prediction"])
def test_charts_answer_the_pointer(browser, server, name):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ActionChains
    visit(browser, server, name)
    for chart in browser.find_elements("css selector", ".vfm-chart"):
        marks = chart.find_elements(
            "css selector", ".vfm-view svg .role-mark.mark-symbol path, .vfm-view svg .role-mark.mark-rect path"
        )
        for mark in marks[::max(1, len(marks) // 12)]:  # some of them, e.g. ends of intervals, have nothing to say
            try: ActionChains(browser, duration=50).move_to_element(mark).move_by_offset(1, 0).perform()
            except WebDriverException: continue
            for _ in range(20):
                if browser.execute_script(
                    "const t = document.querySelector('#vg-tooltip-element.visible'); return t && t.innerText.length "
                    "> 5"
                ):
                    return
                time.sleep(0.02)
    raise AssertionError(f"no chart of {name} shows a tooltip")


def test_pages_fit_a_phone(browser, server):
    with screen(browser, 390):
        for name in [*OWN, "run-segmentation-profound_toy.mae_of_a_long_name-n4"]:
            visit(browser, server, name)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, name
            wide = browser.execute_script(
                "return [...document.querySelectorAll('main p, main h1, main h2, main li')].filter(e => "
                "!e.closest('.vfm-scroll, .vfm-chart, .vfm-slices') && (e.getBoundingClientRect().right > 391 || "
                "e.scrollWidth > e.clientWidth + 1)).map(e => e.innerText)"
            )
            assert wide == [], f"{name}: {wide[:2]}"
            assert browser.execute_script(
                "return [...document.querySelectorAll('.vfm-chart .vfm-view')].every(v => v.scrollWidth <= "
                "v.clientWidth + 2)"
            ), f"{name}: a chart is wider than the phone"
