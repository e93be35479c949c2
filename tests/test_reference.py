"""The library's pages: every public name is told, and told as others read it."""
import importlib
import inspect
import re

import pytest

from vfm_notes.foundation.places import library_notebooks
from vfm_notes.report.convert import joined
from vfm_notes.report.reference import addresses, index_page, read_library, reference_page, search_entries

BOOKS = read_library()
OWN = {d.name for b in BOOKS for d in b.names}


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.path.stem)
def test_every_public_name_is_told(book):
    assert book.title and book.subtitle and book.module
    for d in book.names: assert d.doc, f"{book.path.name}: {d.name} has no docstring (a one-line function: no comment behind it)"


def test_nearly_every_argument_is_told():
    "By its own comment, by what its name always means, or by a type of the package, which has a page of its own."
    every = [(f"{b.path.stem}.{d.name}", a) for b in BOOKS for d in b.names for a in d.arguments]
    untold = [(where, a.name) for where, a in every if not a.told and not set(re.findall(r"\w+", a.kind)) & OWN]
    assert len(every) > 2000 and len(untold) < 0.1 * len(every), f"{len(untold)} of {len(every)}: {untold[:10]}"


@pytest.mark.parametrize("name", ["shift.mmd", "analysis.gain", "foundation.show", "foundation.blocks", "runs.grid", "analysis.mixed"])
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
    index = "".join(joined(c["source"]) for c in index_page(BOOKS)["cells"])
    for b in BOOKS:
        cells = reference_page(b, known)["cells"]
        headings = [m for c in cells if c["cell_type"] == "markdown" for m in re.findall(r"^### .+ \{#(\w+)\}$", joined(c["source"]), re.M)]
        assert headings == [d.name for d in b.names], b.path.name
        assert not [c for c in cells if re.search(r"^#\|\s*(?!\s|code-)", joined(c["source"]), re.M)], b.path.name
        assert len({c["id"] for c in cells}) == len(cells)
        for d in b.names: assert f'href="{b.path.stem}.html#{d.name}"' in index


def test_links_lead_to_what_exists():
    files = {p.name for p in library_notebooks()}
    for name, to in addresses(BOOKS).items():
        page, _, anchor = to.partition("#")
        assert page in files and anchor == name
    for e in search_entries(BOOKS): assert re.fullmatch(r"reference/\w+\.html(#\w+)?", e["href"])
