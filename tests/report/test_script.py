"""The script and the style of the site on a small page: search, filters, cards, links to notebooks, tooltips, citing,
printing. No renderer and no study."""

import base64
import json
import re
from urllib.parse import parse_qs, urlparse

import pytest
from browsing import AXE, chromium, wait

from vfm_notes.foundation.blocks import Block, coloured_name, findings_list, table
from vfm_notes.report.evidence import MEANINGS, defined
from vfm_notes.report.site import write_assets

CELLS = {
    "notebooks": {
        "segmentation|net.a": {"8": "run-seg-a-n8.html"},
        "super resolution|net.a": {"8": "x8.html", "16": "x16.html"},
        "|net.a": {"": "run-pretrain-a.html"},
    },
    "tasks": ["segmentation", "super resolution"],
    "backbones": ["net.a"],
}
BIB = "@misc{vfm_notes_made_up,\n  title = {Which toy?},\n}\n"
HITS = [
    {
        "href": "reference/nets_device.html#Device",
        "title": "Library: device",
        "section": "Device",
        "text": "where it runs: Dice",
    },
    {"href": "run-seg-a-n8.html#scores", "title": "Segmentation: net.a", "section": "Scores", "text": "Dice 0.64"},
    {"href": "index.html#answers", "title": "Overview", "section": "What was found", "text": "the mean Dice is 0.64"},
    {"href": "methods.html#dice", "title": "Methods", "section": "Dice", "text": "twice the overlap"},
    {"href": "cost.html", "title": "Cost", "section": "", "text": "device, voxelwise"},
]


def rows(n):
    "A table with a menu: tasks and backbones in turn."
    return table(
        [
            {
                "task": "segmentation" if i % 2 else "super resolution",
                "backbone": coloured_name("net.a", "#888"),
                "score": 0.5 + i / 100,
                "interval": Block(f"{i} <small>[1, 2]</small>"),
                "nothing": None,
            }
            for i in range(n)
        ],
        filters=["task"],
        sort=True,
    ).html


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "Address of the page."
    root = tmp_path_factory.mktemp("page")
    write_assets(root / "assets", charts=False, told={"vfmCells": CELLS, "vfmCite": BIB})
    main = (
        "<h1>Alignment</h1>"
        + defined("gain", "distance").html
        + findings_list(["net.a is ahead in segmentation."]).html
        + rows(40)
        + "<details><summary>More</summary><p id=inside>inside</p></details>"
    )
    (root / "alignment.html").write_text(
        f'<!doctype html><html lang="en"><head><title>Alignment</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="stylesheet" href="assets/style.css">'
        f'<script src="assets/site.js" defer></script></head><body><div id="quarto-header">header</div>'
        f'<main class="content">{main}</main>'
        '<footer class="footer"><div class="nav-footer"></div></footer></body></html>'
    )
    return (root / "alignment.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


def visit(browser, address):
    browser.get(address)
    wait(browser, "return document.querySelector('.vfm-cite')")


def seen(browser):
    "Rows that can be seen."
    return browser.execute_script(
        "return [...document.querySelectorAll('tbody tr')].filter(r => r.offsetParent).length"
    )


def found(browser, words):
    return browser.execute_script(
        "const f = new Fuse([], {}); arguments[0].forEach(e => f.add(e)); return f.search(arguments[1], "
        "{limit: 20}).map(h => "
        "h.item.href)",
        HITS,
        words,
    )


def test_search_finds_words_pages_first_then_runs_then_the_library(browser, page):
    visit(browser, page)
    assert found(browser, "Dice") == [
        "methods.html#dice",
        "index.html#answers",
        "run-seg-a-n8.html#scores",
        "reference/nets_device.html#Device",
    ], "a heading before a text, and nothing for a word that only looks alike"
    assert found(browser, "dev") == ["cost.html", "reference/nets_device.html#Device"], (
        "beginnings of words are found"
    )
    assert found(browser, "mean dice 0.64") == ["index.html#answers"], "all words have to be there"
    assert found(browser, "oxelwis") == ["cost.html"], "inside of words only where nothing else is found"
    assert found(browser, "dcie") == [] and found(browser, " ") == []
    many = [{"href": f"data.html#{i}", "title": "Data", "section": "", "text": "psnr"} for i in range(9)]
    assert browser.execute_script("return new Fuse(arguments[0]).search('psnr').length", many) == 4, "four of a page"


def test_filters_stay_in_the_address(browser, page):
    visit(browser, page)
    browser.execute_script(
        "const s = document.querySelector('select'); s.value = 'segmentation'; s.dispatchEvent(new "
        "Event('input', {bubbles: "
        "true}))"
    )
    browser.find_element("css selector", ".vfm-filters input").send_keys("0.61")
    address = browser.current_url
    assert parse_qs(urlparse(address).query) == {"1.task": ["segmentation"], "1.q": ["0.61"]}
    visit(browser, page)
    assert browser.find_element("css selector", ".vfm-count").text == "40 of 40"
    visit(browser, address)
    assert browser.find_element("css selector", ".vfm-count").text == "1 of 40" and seen(browser) == 1
    visit(browser, page + "?1.task=nonsense")
    assert browser.find_element("css selector", ".vfm-count").text == "40 of 40"


def test_a_cell_of_several_words_and_a_limit_are_filters(browser, tmp_path):
    write_assets(tmp_path / "assets", charts=False)
    made = table(
        [
            {"name": "a", "images": ("CT", "MRI"), "MiB": 1200.0},
            {"name": "b", "images": ("MRI",), "MiB": 300.0},
            {"name": "c", "images": ("CT",), "MiB": float("nan")},
            {"name": "d", "images": ("CTA",), "MiB": 1000.0},
        ],
        filters=["images"],
        limits={"MiB": (500, 1000)},
        sort=True,
    ).html
    (tmp_path / "a.html").write_text(
        f'<html><body><main class="content">{made}</main><footer><div class="nav-footer"></div></footer>'
        '<script src="assets/site.js"></script></body></html>'
    )
    shown = (
        "return [...document.querySelectorAll('tbody tr')].filter(r => r.offsetParent).map(r => "
        "r.cells[0].textContent).join('')"
    )
    base = (tmp_path / "a.html").as_uri()
    for query, wanted in (
        ("", "abcd"), ("?1.images=CT", "ac"), ("?1.images=MRI", "ab"), ("?1.MiB=500", "b"), ("?1.MiB=1000", "bd"),
        ("?1.images=MRI&1.MiB=1000", "b"),
    ):
        browser.get(base + query)
        assert wait(browser, shown) == wanted, query
    options = "return [...document.querySelectorAll('select')].map(s => [...s.options].map(o => o.text))"
    assert browser.execute_script(options) == [
        ["images: all", "CT", "MRI", "CTA"],
        ["MiB: any", "MiB ≤ 500", "MiB ≤ 1,000"],
    ]


def test_a_long_table_is_folded_and_an_empty_column_is_not_there(browser, page):
    visit(browser, page)
    button = browser.find_element("css selector", ".vfm-all")
    assert seen(browser) == 15 and button.text == "Show all 40 rows"
    button.click()
    assert seen(browser) == 40 and button.get_attribute("aria-expanded") == "true"
    assert "nothing" not in browser.find_element("css selector", "thead").text


def test_numbers_lead_to_their_notebooks(browser, page):
    visit(browser, page)
    to = (
        "return [...document.querySelectorAll('tbody tr')].slice(0, 2).map(r => [...r.querySelectorAll('a')].map(a => "
        "a.getAttribute('href')))"
    )
    first, second = browser.execute_script(to)
    assert set(second) == {"run-seg-a-n8.html"} and len(second) == 3, "the name, the score, the interval"
    assert {urlparse(a).path for a in first} == {"runs.html"} and parse_qs(urlparse(first[0]).query) == {
        "1.task": ["super resolution"],
        "1.backbone": ["net.a"],
    }, "two notebooks: the runs of both"
    stops = browser.execute_script(
        "return [...document.querySelectorAll('tbody tr:nth-child(2) a')].map(a => a.tabIndex)"
    )
    assert stops == [0, -1, -1], "one stop for the keyboard in each row"
    assert browser.find_element("css selector", ".vfm-findings a").get_attribute("href").endswith("run-seg-a-n8.html")


def test_words_are_explained_to_mouse_and_keyboard(browser, page):
    visit(browser, page)
    word = browser.find_element("css selector", "a[data-tip]")
    browser.execute_script("arguments[0].focus()", word)
    tip = browser.find_element("css selector", "[role=tooltip]")
    assert (
        tip.is_displayed()
        and tip.text == MEANINGS["gain"]
        and word.get_attribute("aria-describedby") == tip.get_attribute("id")
    )
    browser.execute_script(
        "arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))", word
    )
    assert wait(browser, "return document.querySelector('[role=tooltip]').hidden")


def test_the_report_is_cited_from_its_footer(browser, page):
    visit(browser, page)
    box = browser.find_element("css selector", "footer .vfm-cite")
    box.find_element("css selector", "summary").click()
    assert box.find_element("css selector", "pre").text.strip() == BIB.strip()


def test_on_a_phone_a_row_is_a_card_and_filters_are_one_row(browser, page):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        visit(browser, page)
        wide = (
            "return [document.documentElement.scrollWidth, ...[...document.querySelectorAll('tbody td')].filter(c => "
            "c.offsetParent).map(c => c.getBoundingClientRect().right)]"
        )
        assert max(browser.execute_script(wide)) <= 390 and seen(browser) == 6
        head = "return getComputedStyle(document.querySelector('tbody td:nth-child(3)'), '::before').content"
        assert browser.execute_script(head) == '"score"'
        tops = (
            "return [...document.querySelectorAll('.vfm-filters > *')].map(c => "
            "Math.round(c.getBoundingClientRect().top + c.offsetHeight / 2))"
        )
        assert max(middle := browser.execute_script(tops)) - min(middle) <= 2, middle
        browser.execute_script(AXE.read_text(encoding="utf-8"))
        told = browser.execute_async_script(
            "axe.run(document.querySelector('main'), {preload: false}).then(r => "
            "arguments[0](r.violations.map(v => v.id)))"
        )
        assert told == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_is_printed_as_a_supplement(browser, page):
    "What a sheet shows: all rows, open details, numbered tables, nothing that only works on a screen, nothing cut off."
    visit(browser, page)
    made = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    boxes = {tuple(map(float, b)) for b in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", made)}
    assert made.startswith(b"%PDF") and all(abs(w - 595) < 2 and abs(h - 842) < 2 for w, h in boxes) and boxes, "A4"
    pages = len(re.findall(rb"/Type /Page\b", made))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 680, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        state = browser.execute_script(
            "const shown = s => [...document.querySelectorAll(s)].some(e => e.checkVisibility()); return {gone: "
            "['#quarto-header', '.vfm-tools', '.vfm-filters', '.vfm-all'].filter(shown), inside: "
            "shown('#inside'), width: "
            "document.documentElement.scrollWidth, title: getComputedStyle(document.querySelector('.vfm-scroll'), "
            "'::before').content}"
        )
        assert state["gone"] == [] and state["inside"] and seen(browser) == 40 and state["width"] <= 680, state
        assert "Table S" in state["title"] and pages >= 2
        browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert not browser.execute_script("return document.querySelector('main details').open")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_without_knowledge_of_a_study_works(browser, tmp_path):
    "The library's pages have the same script, and no cells and nothing to cite."
    write_assets(tmp_path / "assets", charts=False)
    browser.get_log("browser")
    (tmp_path / "a.html").write_text(
        f'<html><body><main class="content">{rows(3)}</main><footer><div class="nav-footer"></div></footer>'
        '<script src="assets/site.js"></script></body></html>'
    )
    browser.get((tmp_path / "a.html").as_uri())
    assert wait(browser, "return document.querySelector('.vfm-count').textContent") == "3 of 3"
    assert (
        not browser.find_elements("css selector", ".vfm-cite, main td a")
        and json.dumps([e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]) == "[]"
    )
