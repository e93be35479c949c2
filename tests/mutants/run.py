"""Does a test fail when a number is wrong? Small wrong changes, one at a time, against the tests of what they change.

    make mutants                                all that are named, and 60 made ones in each of analysis, tune, runs and report
    make mutants MUTANTS="--only analysis --made 200"
    make mutants MUTANTS="--named"              only those that once passed every test

Every mutant is written into a copy of the working tree, so nothing here is touched. A process that has the heavy
libraries in memory forks for each one and runs the test files that name the changed module, the fast ones first,
until a test fails. It prints killed and survived for each sub-package and keeps the list in `mutants.json` of the
folder that it names.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from named import NAMED  # noqa: E402
from operators import Mutant, mutants  # noqa: E402

PACKAGES = ("analysis", "tune", "runs", "report")  # where mutants are made if nothing else is asked for
SLOW = re.compile(
    r"test_(packaging|slurm.*|site|bad_sites|lab|faults.*|contributing|guard|sulcus_study|natural_study|evidence)\.py"
)


def copy_tree(to: Path) -> Path:
    "Copy the working tree and make an environment in it whose `vfm_notes` is the copy."
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "pages", "_site", "__pycache__", "*.egg-info")
    tree = to / "tree"
    shutil.copytree(
        ROOT,
        tree,
        ignore=lambda folder, names: (
            ignored(folder, names) if Path(folder) == ROOT else {n for n in names if n == "__pycache__"}
        ),
    )
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
    own, env = Path(sys.prefix), tree / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    inside = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (env / inside / "tree.pth").write_text(f"{tree}\n{own / inside}\n", encoding="utf-8")
    for script in (own / "bin").iterdir():
        if (env / "bin" / script.name).exists() or not script.is_file():
            continue
        text = script.read_bytes()
        (env / "bin" / script.name).write_bytes(text.replace(str(own).encode(), str(env).encode()))
        (env / "bin" / script.name).chmod(0o755)
    for name in ("share", "etc"):
        if (own / name).is_dir() and not (env / name).exists():
            (env / name).symlink_to(own / name)
    return tree


def tests_of(module: str) -> list[str]:
    "The test files that name a module, or one of its sub-package where none does; the short ones first."
    dotted = "vfm_notes." + module.removesuffix(".py").replace("/", ".")
    package, _, leaf = dotted.rpartition(".")
    named = re.compile(rf"{re.escape(dotted)}\b|from {re.escape(package)} import [^\n]*\b{leaf}\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda f: f.stat().st_size)
    files = [f for f in files if "mutants" not in f.parts and not SLOW.fullmatch(f.name)]
    texts = {f: f.read_text(encoding="utf-8") for f in files}
    found = [f for f in files if named.search(texts[f])] or [f for f in files if package + "." in texts[f]]
    return [str(f.relative_to(ROOT)) for f in found]


SERVER = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "1"
import numpy, pandas, scipy.stats, sklearn.linear_model, torch, monai.losses, monai.metrics, pytest, altair, hypothesis
torch.set_num_threads(1)
for line in sys.stdin:
    tests, log, home = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2); os.setsid()
        os.environ["HOME"] = home
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *tests])
        sys.stdout.flush()
        os._exit(int(code))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Worker:
    "A copy of the tree with a warm process beside it."

    def __init__(self, folder: Path):
        self.folder, self.tree = folder, copy_tree(folder)
        (folder / "home").mkdir()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [str(self.tree / ".venv" / "bin" / "python"), "-c", SERVER],
            cwd=self.tree,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )

    def run(self, tests: list[str], limit: float) -> str:
        "Run tests: passed, failed or timeout."
        import select

        self.process.stdin.write(json.dumps([tests, str(self.folder / "log"), str(self.folder / "home")]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if not select.select([self.process.stdout], [], [], limit)[0]:
            os.killpg(pid, signal.SIGKILL)
            self.process.stdout.readline()
            return "timeout"
        return {0: "passed", 1: "failed"}.get(int(self.process.stdout.readline()), "broken")

    def judge(self, mutant: Mutant, tests: list[str], limit: float) -> tuple[str, str]:
        "Is a mutant killed, and by which test?"
        file = self.tree / "vfm_notes" / mutant.module
        whole = file.read_bytes()
        file.write_bytes(whole[: mutant.start] + mutant.text.encode() + whole[mutant.end :])
        try:
            end = self.run(tests, limit)
        finally:
            file.write_bytes(whole)
        log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        by = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.M)
        return ("survived" if end == "passed" else "killed"), by[1] if by else end


def named_mutants() -> list[tuple[Mutant, list[str]]]:
    "Those that are written down; each must still be found in the code, once."
    found = []
    for module, old, new, what in NAMED:
        code = (ROOT / "vfm_notes" / module).read_text(encoding="utf-8")
        if code.count(old) != 1:
            raise SystemExit(
                f"named mutant '{what}': {module} holds {old!r} {code.count(old)} times, expected once; correct named.py."
            )
        start = len(code[: code.index(old)].encode())
        line = code[: code.index(old)].count("\n") + 1
        found.append(Mutant(module, start, start + len(old.encode()), new, what, line, code.splitlines()[line - 1]))
    return found


def made_mutants(packages: tuple[str, ...], n: int, seed: int) -> list[Mutant]:
    "A drawn part of all that the operators can make, as many of each sub-package."
    drawn, draw = [], random.Random(seed)
    for package in packages:
        files = sorted(p.name for p in (ROOT / "vfm_notes" / package).glob("*.py") if p.name != "__init__.py")
        every = [m for f in files for m in mutants(ROOT / "vfm_notes", f"{package}/{f}")]
        drawn += draw.sample(every, min(n, len(every)))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="sub-packages, e.g. analysis report")
    parser.add_argument("--made", type=int, default=60, help="made mutants for each sub-package")
    parser.add_argument("--named", action="store_true", help="the named ones only")
    parser.add_argument("--match", default="", help="only mutants whose name holds this text")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=300, help="seconds that the tests of one mutant may take")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    todo = named_mutants() + ([] if args.named else made_mutants(tuple(args.only) or PACKAGES, args.made, args.seed))
    todo = [m for m in todo if (not args.only or m.module.split("/")[0] in args.only) and args.match in m.name]
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    print(f"{len(todo)} mutants; logs and copies in {folder}", flush=True)
    from concurrent.futures import ThreadPoolExecutor
    from queue import Queue

    idle = Queue()
    for i in range(args.workers):
        idle.put(Worker(folder / str(i)))
    files = sorted({t for m in todo for t in tests_of(m.module)})
    begun = time.monotonic()

    def unchanged(test: str) -> tuple[str, str, float]:
        worker, start = idle.get(), time.monotonic()
        try:
            return test, worker.run([test], args.limit), time.monotonic() - start
        finally:
            idle.put(worker)

    def judged(m: Mutant) -> dict:
        worker = idle.get()
        tests = sorted((t for t in tests_of(m.module) if usable.get(t) is not None), key=usable.get)
        try:
            end, by = worker.judge(m, tests, args.limit)
        finally:
            idle.put(worker)
        return {"name": m.name, "package": m.module.split("/")[0], "end": end, "by": by}

    with ThreadPoolExecutor(args.workers) as pool:
        looked = list(pool.map(unchanged, files))
        usable = {t: seconds for t, end, seconds in looked if end == "passed"}
        for t, end, _ in looked:
            if end != "passed":
                print(f"left out: {t} ({end} without any change)", flush=True)
        rows = []
        for row in pool.map(judged, todo):
            rows.append(row)
            left = (time.monotonic() - begun) / len(rows) * (len(todo) - len(rows))
            print(
                f"{len(rows)}/{len(todo)} {row['end']:8} {row['name']}  [{row['by']}]  {left / 60:.0f} min left",
                flush=True,
            )
            (folder / "mutants.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print("\nsub-package   killed  survived")
    counts = Counter((r["package"], r["end"]) for r in rows)
    for package in sorted({r["package"] for r in rows}):
        print(f"{package:12} {counts[package, 'killed']:7} {counts[package, 'survived']:9}")
    for r in rows:
        if r["end"] == "survived":
            print(f"survived: {r['name']}")
    print(
        f"{sum(r['end'] == 'killed' for r in rows) / max(len(rows), 1):.1%} of {len(rows)} killed in {(time.monotonic() - begun) / 60:.0f} min"
    )


if __name__ == "__main__":
    main()
