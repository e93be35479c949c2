"""A site of a few pages without code, in a second: built, rendered, published as always; no kernel, no library."""
import dataclasses
import os
from pathlib import Path

import yaml

from vfm_notes.report import site
from vfm_notes.report.stamp import close_folder, open_folder, read_stamp

PAGES = {"guide_reader": "index", "guide_batch": "guide_batch"}  # a page with the words of another


def few_pages() -> None:
    "From now on `build_site` makes these pages only, and a library of one page."
    real, assets = site.report_pages, site.write_assets
    def pages(study, records, by):
        return [dataclasses.replace(p, name=PAGES[p.name], print=p.print + study.title)
                for p in real(study, records, by) if p.name in PAGES]
    def library(renderer, say):
        folder = site.pages_root()/"_reference"
        if not read_stamp(folder/"stamp.json").get("made"):
            open_folder(folder)
            (folder/"_site").mkdir(exist_ok=True)
            (folder/"_site"/"index.html").write_text("library")
            (folder/"search_entries.json").write_text("[]")
            close_folder(folder, {"made": "once"})
        return folder
    site.report_pages, site.build_reference = pages, library
    site.write_assets = lambda folder, **more: assets(folder, charts=False, **more)  # none of them has a chart
    site.study_findings, site.made_from = lambda study: ["found"], lambda study, records: f"study {study.name}"


def write_study(folder: Path, name: str, **values) -> str:  # path of the file
    "A study without runs."
    text = {"name": name, "title": name, "cohort": "phantom", "size": [4, 8, 8], "spacing": [4.0, 1.5, 1.5],
            "cases": {"pretrain": 2, "train": 4, "val": 2, "test": 2},
            "backbones": ["profound_toy.mae_phantom"], "tasks": {"segmentation": {}}, "strategies": ["scratch"],
            "seeds": [0]} | values
    (folder/f"{name}.yaml").write_text(yaml.safe_dump(text))
    return str(folder/f"{name}.yaml")


def build(study: str):
    "The site of a study, made by smalldocs."
    return site.build_site(study, "smalldocs", lambda line: None)


def content(root: Path) -> dict[str, bytes]:
    "All files of the site but its stamp."
    found = (p for p in (root/"_site").rglob("*") if p.is_file() and p.name != "stamp.json")
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


if __name__ == "__main__":  # a process of its own: study, and "hold": it keeps the lock until it is told to go on
    import sys
    os.chdir(Path(sys.argv[1]).parent)
    few_pages()
    real = site.render
    site.render = lambda *words: (print("rendering", flush=True), sys.argv[2:] and sys.stdin.readline(), real(*words))[
        -1
    ]
    made = build(sys.argv[1])
    print("up to date" if made.up_to_date else "made", flush=True)
