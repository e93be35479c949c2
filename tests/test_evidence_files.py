"""Files beside the pages: each has an entry, is the one that was recorded, and a small part comes out again."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from published import published_keys

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "evidence"))
import make as ev

HAND = {"published_gains.json", "public_matrix.json", "openmind_results.json"}


def test_every_file_has_an_entry_and_a_record():
    there = {p.name for p in ev.KEPT.glob("*.json")} - {ev.RECORD.name} | {p.name for p in ev.KEPT.glob("*.png")}
    assert there == {e.file for e in ev.ENTRIES} == set(ev.read_record())
    assert {e.file for e in ev.ENTRIES if not e.make} == HAND


@pytest.mark.parametrize("entry", ev.ENTRIES, ids=lambda e: e.file)
def test_the_file_is_the_one_that_was_recorded(entry):
    line = ev.read_record()[entry.file]
    assert set(line) == {"commit", "date", "seconds", "code", "data", "sha256"}
    assert line["sha256"] == ev.file_hash(ev.KEPT / entry.file), f"make evidence NAME={Path(entry.file).stem}"
    assert line["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", line["commit"])
    made = entry.make and line["code"] != "unknown"  # by this command, so all is known
    assert not made or re.fullmatch(r"[0-9a-f]{40}", line["commit"]) and line["seconds"] > 0
    assert set(entry.needs) <= set(ev.NEEDS) and all(map(ev.module_file, entry.code))


@pytest.mark.parametrize("entry", ev.ENTRIES, ids=lambda e: e.file)
def test_a_part_of_it_is_made_again_by_a_test_that_exists(entry):
    file, name = entry.again.split("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("entry", [e for e in ev.ENTRIES if e.file.endswith(".json") and e.make], ids=lambda e: e.file)
def test_its_page_says_from_which_commit(entry):
    needs = re.compile(rf"needs: \[.*\b{Path(entry.file).stem}\b.*\]")
    pages = [t for p in ev.KEPT.glob("*.ipynb") if needs.search(t := p.read_text(encoding="utf-8"))]
    assert pages
    for text in pages:
        source = "".join("".join(c["source"]) for c in json.loads(text)["cells"])
        assert re.search(rf"(commit_words|shipped)\([^)]*{re.escape(entry.file)}", source)
        assert re.search(r"needs: \[.*\bevidence\b", source)


def test_the_hash_of_code_follows_imports_and_ignores_comments(tmp_path, monkeypatch):
    assert {"vfm_notes.pretrain.evidence", "vfm_notes.pretrain.trainer", "vfm_notes.foundation.registry"} <= set(
        ev.modules_of(("vfm_notes.pretrain.evidence",)))
    (tmp_path / "vfm_notes").mkdir()
    one, two = tmp_path / "vfm_notes" / "one.py", tmp_path / "vfm_notes" / "two.py"
    one.write_text("def f():\n    from .two import x\n    return x\n")
    two.write_text("x = 1\n")
    monkeypatch.setattr(ev, "ROOT", tmp_path)
    before = ev.code_hash(("vfm_notes.one",))
    two.write_text("# why\n\nx = 1\n")
    assert ev.code_hash(("vfm_notes.one",)) == before
    two.write_text("x = 2\n")
    assert ev.code_hash(("vfm_notes.one",)) != before


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A small project under git with one file that is made."
    def run(*words): subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    (tmp_path / "maker.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("build/\n")
    kept = tmp_path / "nbs" / "report"
    kept.mkdir(parents=True)
    (kept / "a.json").write_text("old")
    run("init")
    commit = lambda: (run("add", "."), run("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-m", "x"))
    commit()
    write = lambda path: path.write_text("new")
    entry = ev.Entry("a.json", "a", 1, "maker", write, ("maker.py",), "", lambda: "d", ("it",))
    new = dict(ROOT=tmp_path, KEPT=kept, RECORD=kept / "evidence.json", ENTRIES=[entry], NEEDS={"it": lambda: ""})
    for k, v in new.items(): monkeypatch.setattr(ev, k, v)
    return tmp_path, kept, commit


def test_one_is_made_from_a_commit(project, capsys):
    root, kept, commit = project
    ev.make("a")
    line = ev.read_record()["a.json"]
    assert (kept / "a.json").read_text() == "new" and line["sha256"] == ev.file_hash(kept / "a.json")
    assert line["commit"] == ev.git("rev-parse", "HEAD") and line["data"] == "d"
    ev.show()
    assert "code unchanged since" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="The tree has changes"): ev.make("a")
    commit()
    (root / "maker.py").write_text("x = 2\n")
    assert "code changed since" in ev.state(ev.ENTRIES[0], line)
    (kept / "a.json").write_text("by hand")
    assert "not the one that was recorded" in ev.state(ev.ENTRIES[0], line)


def test_none_is_made_where_something_is_absent_or_changes(project, monkeypatch):
    root, kept, _ = project
    with pytest.raises(SystemExit, match="Unknown evidence 'b'; known: a"): ev.make("b")
    monkeypatch.setitem(ev.NEEDS, "it", lambda: "get it")
    with pytest.raises(SystemExit, match=r"a.json needs it \(get it\)"): ev.make("a")
    monkeypatch.setitem(ev.NEEDS, "it", lambda: "")
    both = lambda path: (path.write_text("new"), (root / "maker.py").write_text("x = 3\n"))
    monkeypatch.setattr(ev, "ENTRIES", [replace(ev.ENTRIES[0], make=both)])
    with pytest.raises(SystemExit, match="changed meanwhile"): ev.make("a")
    assert (kept / "a.json").read_text() == "old" and not ev.RECORD.exists()


# ---- small parts that no other test makes again


def test_costs_are_of_these_networks():
    "Parameters and channels are those of the cards; one toy's memory is measured again, in a process of its own."
    cards = {c["name"]: c for c in json.loads((ev.KEPT / "backbones.json").read_text(encoding="utf-8"))}
    [run] = [r for r in json.loads((ev.KEPT / "backbone_costs.json").read_text(encoding="utf-8")) if r["kind"] == "cpu"]
    rows = {r["name"]: r for r in run["rows"]}
    for name, row in rows.items():
        assert (row["channels"], row["parameters"]) == (cards[name]["in_channels"], cards[name]["parameters"]), name
    toy = rows["profound_toy"]
    words = ["--one", "profound_toy", "--size", *map(str, toy["size"]), "--threads", "1"]
    script = ROOT / "tests" / "bench" / "bench_backbones.py"
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=ROOT, timeout=600)
    found = {k: v for line in done.stdout.splitlines() if line.startswith("{") for k, v in json.loads(line).items()}
    assert found["weights_mib"] == toy["weights_mib"] and found["step_mib"] == pytest.approx(toy["step_mib"], rel=0.5)


def test_key_reports_are_of_the_published_lists():
    rows = json.loads((ev.KEPT / "real_weights.json").read_text(encoding="utf-8"))
    of = "test_layouts.py::test_keys_and_shapes"
    lists = {r["name"]: r for r in rows if r["kind"] == "keys" and r["test"].endswith(of)}
    assert len(lists) == 12
    for name, row in lists.items():
        assert row["matched"] == len(published_keys(name)) and not row["missing"] + row["unexpected"] + row["reshaped"]


def test_a_page_is_photographed_alike(tmp_path):
    if not ev.browser(): pytest.skip("no chromium on PATH")
    import numpy as np
    from PIL import Image

    page = tmp_path / "page.html"
    page.write_text("<body style='margin:0;background:#f00'><div style='height:750px;background:#00f'></div>")
    ev.picture(tmp_path / "page.png", page)
    made, kept = (Image.open(p).convert("RGB") for p in (tmp_path / "page.png", ev.KEPT / "overview.png"))
    assert made.size == kept.size
    seen = np.asarray(made)
    assert (seen[:740] == (0, 0, 255)).all() and (seen[760:] == (255, 0, 0)).all()


def test_what_was_copied_by_hand_says_from_where():
    paper = json.loads((ev.KEPT / "published_gains.json").read_text(encoding="utf-8"))
    assert re.search(r"arXiv \d{4}\.\d{5}", paper["source"]) and "measured in the figure" in paper["how"]
    fields = {"model", "head", "gain", "data", "ours"}
    assert all(set(r) == fields and r["model"] and abs(r["gain"]) < 100 for r in paper["rows"])


def test_the_published_means_are_those_of_their_columns():
    "Of every row of the two tables: the mean columns, which were transcribed apart from the others."
    paper = json.loads((ev.KEPT / "openmind_results.json").read_text(encoding="utf-8"))
    assert re.search(r"arXiv \d{4}\.\d{5}", paper["source"]) and "Transcribed by" in paper["how"]
    lines = {}
    for r in paper["rows"]:
        lines.setdefault((r["architecture"], r["metric"], r["objective"]), {})[r["column"]] = r["value"]
    outside = {"ACD", "AMO", "KIT"}
    assert len(lines) == 20 + 2 * 16
    for key, line in lines.items():
        single = {c: v for c, v in line.items() if c not in ("ID", "OOD", "All", "Mean")}
        of = {"ID": set(single) - outside, "OOD": outside, "All": set(single), "Mean": set(single)}
        for name in line.keys() & of.keys():
            assert abs(sum(single[c] for c in of[name]) / len(of[name]) - line[name]) < 0.011, (key, name)
