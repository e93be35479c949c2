"""What is asked of Quarto and what is made of its answers, with a program that stands in for it; and Quarto itself
where it is."""
import json
import os
import shutil
import stat
import sys

import nbformat
import pytest
import yaml

from vfm_notes.foundation.registry import VfmError
from vfm_notes.report.convert import to_html_output, raw_cell, write_notebook
from vfm_notes.report.doctor import check_renderer
from vfm_notes.report.doctor import init_folder
from vfm_notes.report.pages import footer_mark
from vfm_notes.report.site import choose_renderer, publish_site, render, report_warnings

PROGRAM = """#!{python}
import json, os, pathlib, shutil, sys
if sys.argv[1] == "--version": print(os.environ["TOLD_VERSION"]); sys.exit()
with open("{log}", "a") as log: log.write(json.dumps(sys.argv[1:]) + "\\n")
here = pathlib.Path(".")
names = [a for a in sys.argv[2:] if a.endswith(".ipynb")] or [p.name for p in here.glob("*.ipynb")]
(here / "_site" / "libs").mkdir(parents=True, exist_ok=True)
for folder in ("assets", "records"): shutil.copytree(folder, here / "_site" / folder, dirs_exist_ok=True)
(here / "_site" / "libs" / "q.js").write_text("import * as t from './t.js';\\nwindow.q = t.two;\\n")
(here / "_site" / "libs" / "t.js").write_text("export const two = 2;\\n")
foot = next(l for l in (here / "_quarto.yml").read_text().splitlines() if "vfm-made" in l).strip()
print("\\x1b[1m[1/1] " + names[0] + "\\x1b[0m", file=sys.stderr)
if os.environ.get("FAIL"):
    told = "ERROR: YAMLException: bad (4:1)\\n\\n 1 | a\\n\\nStack trace:\\n    at f (quarto.js:1:1)"
    print("\\x1b[91m" + told + "\\x1b[39m", file=sys.stderr); sys.exit(1)
for w in ("WARN: no target a", "[WARNING] Div unclosed"): print("\\x1b[33m" + w + "\\x1b[39m", file=sys.stderr)
for n in names:
    footer = "<footer>" + foot.split("left: ")[1] + "</footer>"
    text = '<script src="libs/q.js" type="module"></script>' + n + footer
    (here / "_site" / n).with_suffix(".html").write_text(text)
(here / "_site" / "search.json").write_text("[]")
"""


@pytest.fixture
def quarto(tmp_path, monkeypatch):
    "A program on PATH that answers as Quarto does; gives the pages of each call."
    log = tmp_path/"asked.jsonl"
    program = tmp_path/"bin"/"quarto"
    program.parent.mkdir()
    program.write_text(PROGRAM.replace("{python}", sys.executable).replace("{log}", str(log)))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TOLD_VERSION", "1.4.557")
    def asked():
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        assert all(c[0] == "render" and "--no-execute" in c for c in calls)
        return [[a for a in c[1:] if a.endswith(".ipynb") or a == "."] for c in calls]
    return asked


@pytest.fixture
def folder(tmp_path):
    "A generated folder of six pages."
    made = tmp_path/"pages"
    for d in ("assets", "records"): (made/d).mkdir(parents=True)
    (made/"records"/"a.json").write_text("{}")
    (made/"assets"/"style.css").write_text("a {}")
    for i in range(6): write(made, i, "one")
    settings(made, "first")
    return made


def write(folder, i, text):
    cell = {
        "cell_type": "code", "id": "c", "metadata": {}, "execution_count": 1, "source": "x",
        "outputs": [to_html_output(text)],
    }
    write_notebook(
        folder / f"p{i}.ipynb",
        {"cells": [raw_cell({"title": f"P{i}"}), cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5},
    )


def settings(folder, footer, **more):
    (folder / "_quarto.yml").write_text(
        yaml.safe_dump({"website": {"title": "T", "page-footer": {"left": footer_mark(footer)}}, **more})
    )


def test_only_what_changed_is_rendered(quarto, folder):
    chosen = choose_renderer("auto")
    assert chosen == ("quarto", "1.4.557")
    render(folder, chosen)
    assert quarto() == [["."]]
    settings(folder, "second")
    render(folder, chosen)
    texts = [p.read_text() for p in (folder/"_site").glob("*.html")]
    assert quarto() == [] and len(texts) == 6 and all("second" in t and "first" not in t for t in texts), (
        "the footer is renewed without Quarto"
    )
    write(folder, 3, "two")
    render(folder, chosen)
    assert quarto() == [["p3.ipynb"]]
    (folder/"_site"/"p1.html").unlink()
    render(folder, chosen)
    assert quarto() == [["p1.ipynb"]]
    for i in range(3): write(folder, i, "three")
    render(folder, chosen)
    assert quarto() == [["."]], "of many pages the project is rendered at once"
    for change in (
        lambda: (folder / "assets" / "style.css").write_text("b {}"), lambda: settings(folder, "third", format="html"),
    ):
        change()
        render(folder, chosen)
        assert quarto() == [["."]]
    render(folder, ("quarto", "1.9.1"))
    assert quarto() == [["."]]


def test_a_new_script_reaches_readers_though_no_page_changed(quarto, folder):
    settings(folder, "first", project={"resources": ["assets", "records", "notebooks"]})
    chosen = choose_renderer("quarto")
    (folder/"assets"/"site.js").write_text("old")
    render(folder, chosen)
    quarto()
    (folder/"assets"/"site.js").write_text("new")
    (folder/"records"/"b.json").write_text("{}")
    render(folder, chosen)
    assert (
        quarto() == []
        and (folder / "_site" / "assets" / "site.js").read_text() == "new"
        and (folder / "_site" / "records" / "b.json").exists()
    )


def test_what_broke_off_is_rendered_again(quarto, folder, monkeypatch):
    chosen = choose_renderer("quarto")
    render(folder, chosen)
    write(folder, 2, "two")
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(VfmError) as e: render(folder, chosen)
    assert str(e.value) == f"Quarto could not render {folder}: ERROR: YAMLException: bad (4:1) (at p2.ipynb)"
    monkeypatch.delenv("FAIL")
    quarto()
    render(folder, chosen)
    assert quarto() == [["."]]


def test_warnings_are_counted_and_the_first_is_named(quarto, folder):
    said = []
    chosen = choose_renderer("quarto")
    report_warnings(chosen, render(folder, chosen), said.append)
    assert said == ["  quarto warned 2 times; the first: WARN: no target a"]
    report_warnings(chosen, render(folder, chosen), said.append)
    assert len(said) == 1


def test_a_site_with_records_in_it_is_published(quarto, folder, tmp_path):
    render(folder, choose_renderer("quarto"))
    target = tmp_path/"_site"
    for _ in range(2): publish_site(folder, target)
    assert (target / "records" / "a.json").exists() and sorted(
        p.name for p in tmp_path.iterdir() if "_site" in p.name
    ) == ["_site"]


def test_pages_load_no_module(quarto, folder):
    render(folder, choose_renderer("quarto"))
    text, script = (folder/"_site"/"p0.html").read_text(), (folder/"_site"/"libs"/"q.plain.js").read_text()
    assert '<script src="libs/q.plain.js" defer></script>' in text and "module" not in text
    if node := shutil.which("node"):
        import subprocess
        done = subprocess.run(
            [node, "-e", "globalThis.window = {};" + script + ";console.log(window.q)"], capture_output=True, text=True
        )
        assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize(
    "version, words",
    [
        (
            "1.3.450",
            "Quarto 1.3.450 on PATH is too old for the report, which needs 1.4 or newer; update it (quarto.org), or "
            "use --renderer smalldocs.",
        ),
        ("what?", "'quarto --version' answers 'what?', expected a version"),
    ],
)
def test_an_unfit_quarto_is_named_with_what_to_do(quarto, monkeypatch, version, words):
    monkeypatch.setenv("TOLD_VERSION", version)
    for renderer in ("auto", "quarto"):
        with pytest.raises(VfmError) as e: choose_renderer(renderer)
        assert words in str(e.value)
    assert choose_renderer("smalldocs")[0] == "smalldocs"
    found = check_renderer()
    assert found.state == "missing" and "--renderer smalldocs" in found.do


def test_the_notebook_of_a_new_folder_is_stored_as_nbformat_stores_it(tmp_path):
    init_folder(tmp_path/"mine")
    text = (tmp_path/"mine"/"look.ipynb").read_text(encoding="utf-8")
    assert (
        json.loads(text) == json.loads(nbformat.writes(nbformat.reads(text, as_version=4)))
        and len(json.loads(text)["cells"][1]["source"]) > 3
    )


# --- Quarto itself

@pytest.fixture
def real(tmp_path):
    "A small project for the Quarto of this machine."
    if not shutil.which("quarto"): pytest.skip("quarto is not on PATH")
    for i in range(4): write(tmp_path, i, f'<p id="a">page {i}</p>')
    (tmp_path/"assets").mkdir()
    config = {
        "project": {"type": "website", "output-dir": "_site", "render": [f"p{i}.ipynb" for i in range(4)]},
        "format": {"html": {"theme": "default"}},
    }
    settings(tmp_path, "first", **config)
    return tmp_path


def test_quarto_renders_again_what_changed(real):
    chosen = choose_renderer("quarto")
    assert render(real, chosen) == []
    before = {p.name: p.stat().st_mtime_ns for p in (real/"_site").glob("*.html")}
    write(real, 2, "<p>another</p>")
    render(real, chosen)
    after = {p.name: p.stat().st_mtime_ns for p in (real/"_site").glob("*.html")}
    assert [n for n in before if after[n] != before[n]] == ["p2.html"] and "<p>another</p>" in (
        real / "_site" / "p2.html"
    ).read_text()
    assert {e["href"].split("#")[0] for e in json.loads((real / "_site" / "search.json").read_text())} == set(
        before
    ) - {"index.html"}


def test_quarto_says_what_is_wrong_with_a_page(real):
    path = real/"p1.ipynb"
    path.write_text(path.read_text().replace("title: P1", "title: \\\"P1"))
    with pytest.raises(VfmError, match=r"Quarto could not render .*: ERROR: YAMLException"):
        render(real, choose_renderer("quarto"))
