"""Which pages a study's report has."""
import json
from dataclasses import replace

import pytest

from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import load_study
from vfm_notes.report import pages


def made_page(folder, name, front):
    cell = {"cell_type": "raw", "id": "front", "metadata": {}, "source": f"---\ntitle: {name}\n{front}---"}
    (folder / f"{name}.ipynb").write_text(
        json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8"
    )


@pytest.fixture
def made(tmp_path, monkeypatch):
    made_page(tmp_path, "always", "")
    made_page(tmp_path, "rare", "optional: true\nneeds: [numbers]\n")
    (tmp_path / "numbers.json").write_text("1", encoding="utf-8")
    monkeypatch.setattr(pages, "report_notebooks", lambda: sorted(tmp_path.glob("*.ipynb")))
    return tmp_path


def test_an_optional_page_is_shown_by_the_studies_that_list_it(made):
    study = load_study("phantom")
    assert [p.name for p in pages.report_pages(study, [])] == ["always"]
    asked = pages.report_pages(replace(study, pages=["rare"]), [])
    assert [p.name for p in asked] == ["always", "rare"] and not {"optional", "needs"} & set(asked[1].options)


def test_a_page_is_made_again_when_its_measured_numbers_change(made):
    study = replace(load_study("phantom"), pages=["rare"])
    before = {p.name: p.print for p in pages.report_pages(study, [])}
    (made / "numbers.json").write_text("2", encoding="utf-8")
    after = {p.name: p.print for p in pages.report_pages(study, [])}
    assert before["always"] == after["always"] and before["rare"] != after["rare"]


def test_a_page_that_does_not_exist_is_refused_with_the_nearest(made):
    with pytest.raises(VfmError, match="unknown page 'rar'.*rare"):
        pages.report_pages(replace(load_study("phantom"), pages=["rar"]), [])
    with pytest.raises(VfmError, match="pages is 'rare', expected a list"):
        replace(load_study("phantom"), pages="rare")
