"""What a published site must not carry: every byte of one is looked through, unpacked, for paths, machines, users and,
if asked, names."""
import base64
import gzip
import html
import json
import re
import socket
from pathlib import Path
from urllib.parse import quote, unquote, unquote_plus

import fake_runs
import numpy as np
import pytest
import yaml
from made_cases import boxes

from vfm_notes.data.manifest import write_manifest
from vfm_notes.foundation import meter
from vfm_notes.foundation.people import mark_name, pseudonym
from vfm_notes.foundation.places import notebook_file, run_folder
from vfm_notes.foundation.show import encode_png, slices
from vfm_notes.foundation.spec import load_study, run_id
from vfm_notes.report import pages, site
from vfm_notes.report.stamp import write_json
from vfm_notes.runs.grid import jobs_of
from vfm_notes.runs.record import failed_record, check_record, read_table, write_record

PATIENTS = ["Doe_Jane_1970", "Doe_John_1968", "Müller_Jürgen", "O'Neil & Co", "MRN0047110815", "471108150", "12", "Zoë"]
CASES = [p if p in ("12", "Zoë") else f"{p}-scan1" for p in PATIENTS]
HOST, CHIP, USER = "lonely-node-17", "Quantum 9000 Prototype", "strange_doctor"
STUDY = {
    "name": "house", "title": "House", "size": [4, 12, 12], "spacing": [3.0, 1.0, 1.0],
    "cases": {"pretrain": 2, "train": 2, "val": 1, "test": 3},
    "pretrain": {"mae": {"backbone": "profound_toy", "epochs": 2}}, "backbones": ["profound_toy.mae"],
    "tasks": {"classification": {}, "segmentation": {}}, "strategies": ["scratch", "full"], "seeds": [0],
    "budget": {"epochs": 2},
}
OWN = ("index", "data", "runs", "convergence", "pretraining", "guide_reader")


def layers(data: bytes, depth: int = 0):
    "A file as it is, and what base64, gzip, HTML, JSON and addresses hide in it."
    if data.startswith(b"\x1f\x8b"): yield from layers(gzip.decompress(data), depth)
    text = data.decode("utf-8", "ignore")
    loose = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    for t in {text, loose, html.unescape(loose), unquote(text), unquote_plus(html.unescape(text))}: yield t.lower()
    for run in re.findall(rb"[A-Za-z0-9+/]{16,}={0,2}", data) if depth < 3 else ():
        try: inner = base64.b64decode(run, validate=True)
        except ValueError: continue
        yield from layers(inner, depth + 1)


def found_in(folder: Path, needles) -> set:
    "Which of some words are anywhere in a folder, file names included."
    needles = {n.lower() for n in needles} | {n.lower().replace("_", " ") for n in needles}
    hits = {(p.name, n) for p in folder.rglob("*") for n in needles if n in p.name.lower()}
    return hits | {
        (p.name, n) for p in folder.rglob("*") if p.is_file() for t in layers(p.read_bytes()) for n in needles if n in t
    }


def telling_notebook(path: Path, root: Path) -> None:
    "Names, paths and machines in all places that an executed notebook has for them."
    who, picture = CASES[0], encode_png(np.zeros((4, 4), np.uint8))
    chunk = b"tEXt" + b"Source\0" + f"{root}/{who}".encode()
    drawn = base64.b64encode(
        picture[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + b"\0\0\0\0" + picture[33:]
    ).decode()
    packed = json.dumps({"cases": CASES, "at": str(root)})
    text = (
        f"left out: {mark_name('12')}, too small\nepoch 12 of 20\n{who}_t2w.nii.gz and x{who}y from "
        f"{root}/secret_hospital/ward 7/{who}.nii.gz on {HOST} by {USER}\n" + repr(CASES)
    )
    markup = "".join([
        f"<p>{html.escape(c)}</p><a href='x.html?case={quote(c)}'>{quote(c, safe='')}</a>"
        for c in CASES
        if c not in ("12", "Zoë")
    ])
    markup += (
        f"<script type='application/json'>{json.dumps(CASES[:6])}</script><div "
        f"data-x=\"{html.escape(json.dumps(CASES[:6]))}\">{mark_name('Zoë')}: 12 epochs</div>"
    )
    markup += (
        f"<a href='data:application/json;base64,{base64.b64encode(packed.encode()).decode()}'>a</a><i "
        f"data-z='{base64.b64encode(gzip.compress(packed.encode())).decode()}'></i><img "
        f"src='data:image/png;base64,{drawn}'>"
    )
    chart = {
        "title": f"Case {who}", "data": {"values": [{"case": "12", "patient": "Zoë", "epoch": 12, "label": who}]},
        "mark": "point", "encoding": {"x": {"field": "epoch", "type": "quantitative"}},
    }
    show = lambda data: {"output_type": "display_data", "metadata": {"where": str(root)}, "data": data}
    figure = slices(
        {"input": np.random.default_rng(0).random((4, 8, 8))}, title=f"input of {mark_name(who)} and {mark_name('Zoë')}"
    )
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["metadata"]["papermill"] = {
        "input_path": str(root / "in.ipynb"), "output_path": str(path), "duration": 1.0,
        "parameters": {"cohort": str(root)},
    }
    nb["metadata"]["widgets"] = {"state": CASES}
    nb["cells"][1]["source"] = f'cohort = "{root}/secret_hospital/pelvis"\nbuffer = "{root}/elsewhere"'
    nb["cells"][1]["metadata"]["papermill"] = {"status": str(root)}
    nb["cells"][-1]["outputs"] += [
        {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)},
        {"output_type": "stream", "name": "stderr", "text": f"Traceback (most recent call last):\n {root}/x.py {who}"},
        show({"text/html": markup}), show({"text/html": figure._repr_html_()}),
        show({"image/png": drawn, "text/plain": "<Figure>"}), show({"application/vnd.vegalite.v5+json": chart}),
        show({"application/vnd.jupyter.widget-view+json": {"model_id": who}}),
        {
            "output_type": "error", "ename": "ValueError", "evalue": f"{who} in {root}",
            "traceback": [f"{root}/x.py", who],
        },
    ]
    path.write_text(json.dumps(nb))


def fake_cases(task, metrics, n, rng):
    "Test cases with telling names."
    rows = []
    for k, (case, patient) in enumerate(zip(CASES[2:], PATIENTS[2:])):
        who = {"case": case, "patient": patient}
        if task == "classification":
            score = rng.dirichlet(np.ones(3))
            rows += [who | {"metric": "label", "value": float(k % 3)}]
            rows += [who | {"metric": f"score_{c}", "value": float(s)} for c, s in enumerate(score)]
        else: rows += [who | {"metric": m, "value": float(v * (1 + rng.normal(0, 0.05)))} for m, v in metrics.items()]
    return rows


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "A study whose every corner tells something, and its site without and with pseudonyms."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("house")/"Dr_Strangelove"
        library = root/"library"
        (library/"_site").mkdir(parents=True)
        (library/"search_entries.json").write_text("[]")
        write_json(
            library / "stamp.json", {"by": "vfm site", "making": False, "made": "library", "files": {}, "theirs": []}
        )
        write_manifest(
            boxes(root / "secret_hospital" / "pelvis", 8, case=CASES, patient=PATIENTS),
            root / "secret_hospital" / "pelvis",
        )
        write_manifest(boxes(root/"St_Elsewhere", 2, case=CASES[:2], patient=PATIENTS[:2]), root/"St_Elsewhere")
        for name, value in {"VFM_RUNS": root/"runs", "LOGNAME": USER}.items(): patch.setenv(name, str(value))
        for name, value in {"gethostname": lambda: HOST}.items(): patch.setattr(socket, name, value)
        patch.setattr(fake_runs, "cases", fake_cases)
        patch.setattr(site, "build_reference", lambda *_: library)
        patch.setattr(pages, "report_notebooks", lambda own=pages.report_notebooks(): [p for p in own if p.stem in OWN])
        for where in ("device_name",): patch.setattr(meter, where, lambda: f"cpu ({CHIP})")
        study = root/"house.yaml"
        study.write_text(
            yaml.safe_dump(
                STUDY
                | {
                    "cohort": str(root / "secret_hospital" / "pelvis"),
                    "external": {"cohort": str(root / "St_Elsewhere"), "task": "segmentation"},
                }
            )
        )
        spec = load_study(study)
        fake_runs.write_study(spec, failed=0, absent=0)
        jobs = jobs_of(spec)
        for job in jobs: telling_notebook(notebook_file("house", job.name), root)
        transfers = [s for j in jobs for s in j.specs if s.kind == "transfer"]
        error = {
            "type": "OSError", "message": f"cannot open Smith_Bob of ward 7\n{root}/{CASES[0]}.nii.gz",
            "traceback": f"File {root}/x.py",
        }
        write_record(run_folder("house", run_id(transfers[0])), failed_record(transfers[0], "house", error))
        good = check_record(run_folder("house", run_id(transfers[1])))[0]
        left = [
            {"case": CASES[1], "reason": f"{root}/secret_hospital/{CASES[1]}_t2w.nii.gz cannot be read"},
            {"case": "12", "reason": "12 has 3 slices"},
        ]
        write_record(
            run_folder("house", good["id"]), good | {"excluded": left, "notes": [f"cache at {root}/runs/cache"]},
            cases=read_table("house", good["id"], "cases"),
        )
        made = {}
        for kind in ("names", "pseudonyms", "names again"):
            result = site.build_site(str(study), "smalldocs", lambda line: None, pseudonyms=kind == "pseudonyms")
            assert result.problems == () and not result.up_to_date
            (root/"_site").rename(root/f"_{kind}")
            made[kind] = root/f"_{kind}", result
            if kind == "pseudonyms": break
        yield {
            "root": root, "study": str(study), "spec": spec, "made": made, "good": good["id"],
            "failed": run_id(transfers[0]), "who": lambda name: pseudonym("house", name),
        }


WHERE = (
    "secret_hospital", "Dr_Strangelove", "St_Elsewhere", HOST, CHIP, USER, "input_path", "output_path", "/tmp/",
    "Traceback (most recent",
)


@pytest.mark.parametrize("kind", ["names", "pseudonyms"])
def test_no_byte_tells_where_and_on_what(house, kind):
    folder, _ = house["made"][kind]
    assert len(list(folder.rglob("*.html"))) >= len(OWN) + 3 and (folder/"search.json").is_file()
    assert found_in(folder, [*WHERE, str(house["root"]), str(Path.home())]) == set()


def test_no_byte_names_anybody(house):
    folder, _ = house["made"]["pseudonyms"]
    needles = [*PATIENTS[:6], *CASES[:6], "Zoë", "Zoe\u0308", "Smith_Bob", "Jürgen", "0047110815", "Doe_J"]
    assert found_in(folder, needles) == set()


def test_the_grep_would_find_them(house):
    "The same search finds every name in the site with names, and in the working notebooks everything."
    found = {n for _, n in found_in(house["made"]["names"][0], [*PATIENTS[:6], *CASES[:6], "Zoë", "Smith_Bob"])}
    assert {*map(str.lower, [*PATIENTS[:6], *CASES[:6], "Zoë", "Smith_Bob"])} <= found
    assert {n for _, n in found_in(house["root"] / "runs" / "house" / "notebooks", WHERE)} >= {
        n.lower() for n in WHERE if n != CHIP
    }


def test_the_same_stand_in_wherever_a_name_stood(house):
    folder, who = house["made"]["pseudonyms"][0], house["who"]
    job = next(j for j in jobs_of(house["spec"]) if house["good"] in j.runs)
    nb = (folder/"notebooks"/f"{job.name}.ipynb").read_text(encoding="utf-8")
    page = (folder/f"run-{job.name}.html").read_text(encoding="utf-8")
    record = json.loads((folder/"records"/f"{job.name}.json").read_text(encoding="utf-8"))[house["good"]]
    assert record["excluded"] == [
        {"case": who(CASES[1]), "reason": "….nii.gz cannot be read"},
        {"case": who("12"), "reason": f"{who('12')} has 3 slices"},
    ]
    for text in (nb, page):
        assert (
            f"input of {who(CASES[0])} and {who('Zoë')}" in text
            and f"{who(CASES[0])}_t2w.nii.gz" in text
            and f"x{who(CASES[0])}y" in text
            and f"left out: {who('12')}" in text
        )
    assert who("12") in (folder/"data.html").read_text(encoding="utf-8"), "the case that was left out"
    assert len([c for c in CASES if who(c) in (folder/"data.html").read_text(encoding="utf-8")]) >= 3
    chart = next(
        o["data"][k]
        for c in json.loads(nb)["cells"]
        for o in c.get("outputs", [])
        for k in o.get("data", {})
        if "vegalite" in k and "Case" in str(o["data"][k]["title"])
    )
    assert (
        chart["data"]["values"] == [{"case": who("12"), "patient": who("Zoë"), "epoch": 12, "label": who(CASES[0])}]
        and chart["title"] == f"Case {who(CASES[0])}"
    )
    ranks = [sorted(CASES).index(c) for c in sorted(CASES, key=who)]
    assert ranks != sorted(ranks) and len(set(map(who, CASES))) == len(CASES)


def test_numbers_and_origin_stay(house):
    "Versions, commit, hashes, kind of device; a case called 12 changes no epoch."
    for folder, _ in house["made"].values():
        job = next(j for j in jobs_of(house["spec"]) if house["good"] in j.runs)
        record, kept = (
            json.loads((folder / "records" / f"{job.name}.json").read_text(encoding="utf-8")),
            check_record(run_folder("house", house["good"]))[0],
        )
        same = (
            "id", "status", "metrics", "d2p", "cost", "versions", "commit", "threads", "created", "files",
            "weights_hash", "cohort_hash",
        )
        assert (
            all(record[house["good"]][k] == kept[k] for k in same)
            and record[house["good"]]["device"] == "CPU"
            and "host" not in record[house["good"]]
        )
        assert (
            kept["host"] == HOST
            and "x.py" in check_record(run_folder("house", house["failed"]))[0]["error"]["traceback"]
        ), "the working records keep all"
        text = (folder/"notebooks"/f"{job.name}.ipynb").read_text(encoding="utf-8")
        assert "epoch 12 of 20" in text and "12 epochs" in text and "boxes" in text
        assert json.loads(text)["metadata"]["papermill"] == {"duration": 1.0}


def test_pictures_that_others_drew(house):
    "A PNG keeps its pixels and loses its texts; under pseudonyms nobody knows what its pixels say."
    job = next(j for j in jobs_of(house["spec"]) if house["good"] in j.runs)
    outputs = {
        kind: [
            o
            for c in json.loads((folder / "notebooks" / f"{job.name}.ipynb").read_text(encoding="utf-8"))["cells"]
            for o in c.get("outputs", [])
        ]
        for kind, (folder, _) in house["made"].items()
    }
    drawn = [o["data"]["image/png"] for o in outputs["names"] if "image/png" in o.get("data", {})]
    assert [base64.b64decode("".join(d)) for d in drawn] == [encode_png(np.zeros((4, 4), np.uint8))]
    assert not [
        o for o in outputs["pseudonyms"] if "image/png" in o.get("data", {}) or "<img" in str(o)
    ] and "A picture that a program drew is left out" in str(outputs["pseudonyms"])
    assert str(outputs["names"]).count("<image ") == str(outputs["pseudonyms"]).count("<image ") > 0, (
        "slices are drawn without words"
    )


def test_people_are_counted_in_one_line(house):
    plain, closed = house["made"]["names"][1].people, house["made"]["pseudonyms"][1].people
    # of the made-up external run
    others = {
        n
        for _, n in found_in(house["made"]["names"][0], ["prostatex_0000", "prostatex_0001", "provicnet_picai_sample"])
        if "_" in n
    }
    assert re.fullmatch(
        rf"People: the site shows {8 + len(others)} case ids, 0 patient ids, \d+ pictures of cases and \d+ free "
        r"texts \(notes, reasons, errors\); vfm site --pseudonyms replaces the ids\.",
        plain,
    ), plain
    assert (
        plain.split(",")[0] in closed
        and "ids are pseudonyms" in closed
        and int(re.search(r"(\d+) free", plain)[1]) >= 4
    )


def test_a_way_back_and_forth_is_made_anew(house, monkeypatch, capsys):
    "The command line says who is in it; asked for names again, all pages are made again."
    from typer.testing import CliRunner

    from vfm_notes.report.cli import app
    root = house["root"]
    (root/"_pseudonyms").rename(root/"_site")
    try:
        done = CliRunner().invoke(app, ["site", house["study"], "--renderer", "smalldocs", "--pseudonyms"])
        assert (
            done.exit_code == 0 and "up to date" in done.output and house["made"]["pseudonyms"][1].people in done.output
        )
    finally: (root/"_site").rename(root/"_pseudonyms")
    by = site.publication(house["spec"], [], [], False)
    assert all(
        p.print != q.print
        for p, q in zip(
            site.report_pages(house["spec"], [], site.publication_fingerprint(by)),
            site.report_pages(
                house["spec"], [], site.publication_fingerprint(site.publication(house["spec"], [], [], True))
            ),
        )
    )


def test_no_name_is_drawn_into_pixels():
    "The project's own figures hold pictures without metadata, whose pixels do not depend on title and names of rows."
    volume = np.random.default_rng(0).random((4, 8, 8))
    images = lambda title, row: re.findall(
        r"base64,([A-Za-z0-9+/=]+)",
        slices({row: volume}, volume > 0.8, title=title, names=["background", row])._repr_html_(),
    )
    assert images("Doe_Jane_1970", "Doe") == images("x", "y") != []
    for root in ("nbs/runs", "nbs/report"):
        for path in (Path(__file__).resolve().parents[2]/root).glob("*.ipynb"):
            assert not re.search(r"matplotlib|pyplot|\.save\(", path.read_text(encoding="utf-8")), path
