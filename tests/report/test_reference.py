"""The library's pages: every public name is told, and told as others read it."""
import importlib
import inspect
import re

import pytest

from vfm_notes.report.convert import join_lines
from vfm_notes.report.reference import addresses, index_page, read_library, reference_page, search_entries

BOOKS = read_library()
OWN = {d.name for b in BOOKS for d in b.names}


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.path.stem)
def test_every_public_name_is_told(book):
    assert book.title and book.subtitle and book.module
    for d in book.names:
        if "." in d.name: continue  # a method that is patched in; the guard asks for what methods need
        assert d.doc, f"{book.path.name}: {d.name} has no docstring (a one-line function: no comment behind it)"


def test_every_argument_has_its_comment():
    every = [(f"{b.path.stem}.{d.name}", a) for b in BOOKS for d in b.names if "." not in d.name for a in d.arguments]
    untold = [(where, a.name) for where, a in every if not a.told]
    assert len(every) > 2000 and not untold, f"{len(untold)} of {len(every)}: {untold[:10]}"


@pytest.mark.parametrize(
    "name", ["shift.mmd", "analysis.gain", "foundation.show", "foundation.blocks", "runs.grid", "analysis.mixed"]
)
def test_arguments_as_fastcore_reads_them(name):
    "An independent reader of such comments finds the same names, defaults and comments."
    docments = pytest.importorskip("fastcore.docments").docments
    module = importlib.import_module(f"vfm_notes.{name}")
    book = next(b for b in BOOKS if b.module == name)
    compared = 0
    for d in book.names:
        function = getattr(module, d.name)
        if not inspect.isfunction(function) or len(inspect.getsource(function).splitlines()) < 3: continue
        theirs, parameters = docments(function, full=True), inspect.signature(function).parameters
        assert [a.name.lstrip("*") for a in d.arguments] == list(parameters)
        for a in d.arguments:
            told = theirs[a.name.lstrip("*")].docment
            assert not told or told == a.told, f"{d.name}.{a.name}: {a.told!r}, fastcore reads {told!r}"
            assert bool(a.default) == (parameters[a.name.lstrip("*")].default is not inspect.Parameter.empty)
            compared += bool(told)
    assert compared > 3


def test_pages_have_every_name_once_and_no_directive():
    known = addresses(BOOKS)
    index = "".join(join_lines(c["source"]) for c in index_page(BOOKS)["cells"])
    for b in BOOKS:
        cells = reference_page(b, known)["cells"]
        headings = [
            m
            for c in cells
            if c["cell_type"] == "markdown"
            for m in re.findall(r"^### .+ \{#([\w.]+)\}$", join_lines(c["source"]), re.M)
        ]
        assert headings == [d.name for d in b.names], b.path.name
        assert not [c for c in cells if re.search(r"^#\|\s*(?!\s|code-)", join_lines(c["source"]), re.M)], b.path.name
        assert len({c["id"] for c in cells}) == len(cells)
        for d in b.names: assert f'href="{b.page}.html#{d.name}"' in index


def test_links_lead_to_what_exists():
    files = {f"{b.page}.ipynb" for b in BOOKS}
    for name, to in addresses(BOOKS).items():
        page, _, anchor = to.partition("#")
        assert page in files and anchor == name
    for e in search_entries(BOOKS): assert re.fullmatch(r"reference/\w+\.html(#[\w.]+)?", e["href"])


def test_a_heading_that_reads_like_a_name_has_another_anchor():
    from vfm_notes.report.reference import own_anchors
    text = "# Search\n## Two words\n```\n# search\n```\n### `search`"
    assert (
        own_anchors(text, {"search"})
        == "# Search {#about-search}\n## Two words\n```\n# search\n```\n### `search` {#about-search}"
    )
    assert (
        own_anchors(text, {"two-words"}) == text.replace("Two words", "Two words {#about-two-words}")
        and own_anchors(text, set()) == text
    )


def test_what_is_left_out_of_a_page_says_why():
    from vfm_notes.report.convert import LIMIT, convert_output
    def page(data):
        return (
            ""
            .join(
                join_lines(v)
                for o in convert_output({"output_type": "display_data", "metadata": {}, "data": data}, "k", "see there")
                for v in o["data"].values()
            )
            .removeprefix("```{=html}\n")
            .removesuffix("\n```")
        )
    long, asks = "x" * (LIMIT["html"] + 1), '<img src="https://example.org/a.png">'
    count = f"{len(long):,}"
    assert page({"text/html": long}).endswith(f"Here an output of {count} characters is left out; see there.</p>")
    assert page({"text/html": asks}).endswith("Here an output that loads from the network is left out; see there.</p>")
    assert (
        page({"text/html": "<b>kept</b>"}) == "<b>kept</b>"
        and page({"text/html": " ", "text/plain": "p"}) == ""
        and page({"text/plain": "p"}) == "p"
    )


def test_a_page_is_its_notebook_without_raw_cells():
    from vfm_notes.report.convert import set_parameters, to_page
    cell = lambda kind, source, **more: {"cell_type": kind, "id": source[:3], "metadata": {}, "source": source} | more
    out = [{"output_type": "stream", "name": "stdout", "text": "1\n"}]
    nb = {
        "cells": [
            cell("raw", "---"), cell("markdown", "words"),
            cell("code", ["x = 1\n", "print(x)"], outputs=out, execution_count=3),
            cell("code", "%%html\n<b>", outputs=[]),
        ]
    }
    page = to_page(nb, {"title": "t"}, "p")["cells"]
    assert [c["cell_type"] for c in page] == ["raw", "markdown", "code", "code"] and "title: t" in join_lines(
        page[0]["source"]
    )
    assert (
        page[1]["source"] == "words"
        and page[2]["source"] == "#| code-fold: true\nx = 1\nprint(x)"
        and page[3]["source"] == "%%html\n<b>"
    )
    assert (
        page[2]["outputs"] == out
        and page[2]["execution_count"] == 3
        and to_page(nb, {}, "p", fold=False)["cells"][2]["source"] == "x = 1\nprint(x)"
    )
    tagged = {"cells": [cell("code", "a = 0", metadata={"tags": ["parameters"]}), cell("code", "b")]}
    tagged["cells"][0]["metadata"] = {"tags": ["parameters"]}
    assert [c["source"] for c in set_parameters(tagged, {"a": 1, "s": "x"})["cells"]] == [
        "a = 0", "a = 1\ns = 'x'", "b",
    ]


def test_a_folder_is_opened_by_a_notebook_of_its_name():
    import json

    import nbformat
    from vfm_notes.report.doctor import LOOK, look_notebook
    nb = nbformat.reads(look_notebook("mine"), 4)
    nbformat.validate(nb)
    assert (
        [c.cell_type for c in nb.cells] == ["markdown", "code", "code", "code"]
        and nb.cells[0].source.startswith("# mine\n")
        and [c.source for c in nb.cells[1:]] == LOOK[1:]
    )
    assert all("outputs" in c for c in json.loads(look_notebook("mine"))["cells"][1:])


def test_names_and_messages_are_found_however_they_are_spelt():
    import unicodedata
    from vfm_notes.report.published import LEFT_OUT, Publication
    from vfm_notes.report.sweep import PathShortener
    from vfm_notes.report.sweep import NameReplacer, spellings
    # as it is, in Python, in JSON, in an address
    assert {"a\xadb", r"a\xadb", r"a\u00adb", "a%C2%ADb"} <= spellings("a\xadb")
    assert {
        "Zoë Ö", "Zoë_Ö", unicodedata.normalize("NFD", "Zoë_Ö"), "Zo\\u00eb_\\u00d6", "Zo%C3%AB+%C3%96",
    } <= spellings("Zoë_Ö") and {"&lt;a", "\\u003ca"} <= spellings("<a")
    made = Publication("s", {}, PathShortener({}), NameReplacer({}), messages=["cannot read scan 7"])
    assert made.text("It says: cannot read scan 7.") == f"It says: {LEFT_OUT}." and made.text("nothing") == "nothing"


def test_quarto_is_asked_for_its_version(tmp_path, monkeypatch):
    from vfm_notes.foundation.registry import VfmError
    from vfm_notes.report.pages import quarto_version
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path/"quarto").touch(0o755)
    for said, version in (
        ("echo 1.4.557", "1.4.557"), ("echo 99.0", "99.0"), ("echo 1.3.9", "too old"),
        ("echo broken >&2; exit 1", "broken"),
    ):
        (tmp_path/"quarto").write_text(f"#!/bin/sh\n{said}\n")
        if version[0].isdigit(): assert quarto_version() == version
        else:
            with pytest.raises(VfmError, match=version): quarto_version()
