"""Does a test fail when a number is wrong? Small wrong changes, one at a time, against the tests that can see them.

    make mutants                                all that are named, and 60 made ones in each of the four sub-packages
    make mutants MUTANTS="--only analysis --made 200"
    make mutants MUTANTS="--named"              only those that once passed every test

Every mutant is written into a copy of the working tree, so nothing here is touched. First each test file that is not
slow runs once, to see which test runs which line; then a process that has the heavy libraries in memory forks for each
mutant and runs the tests that can see it, the quick files first, until one fails. What was seen is kept in `.mutants/`
(ignored by git), what was judged in `tests/mutants/judged.json`, which is committed: a call runs only what a change of
the code or of the tests has made stale. It prints killed, survived and equivalent for each sub-package, and the
survivors with the line before and after.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = Path(os.environ.get("VFM_MUTANTS", ROOT / ".mutants"))  # what was seen
JUDGED = HERE / "judged.json"  # function before and after → how it ended
sys.path.insert(0, str(HERE))
from named import EQUIVALENT, NAMED
from operators import Mutant, mutants, places, statement_lines, words

PACKAGES = ("analysis", "tune", "runs", "report")  # where mutants are made if nothing else is asked for
SLOW = re.compile(
    r"test_(packaging|pretrain_together|probing|quarto|people|team|slurm.*|site|bad_sites|lab|faults.*|contributing"
    r"|guard|sulcus_study|natural_study|evidence)\.py"
)


def digest(path: Path) -> str:
    "The hash of a file."
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def copy_tree(to: Path) -> Path:
    "Copy the working tree and make an environment in it whose `vfm_notes` is the copy."
    ignored = shutil.ignore_patterns(".git", ".venv", ".mutants", "runs", "pages", "_site", "__pycache__", "*.egg-info")
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
    # twice and under two names, since a kernel takes its working folder out of the path
    again = f"import sys; sys.path.append('{tree}/tests/..')"
    (env / inside / "tree.pth").write_text(f"{tree}\n{again}\n{own / inside}\n", encoding="utf-8")
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


class Worker:
    "A copy of the tree with a warm process beside it."

    def __init__(self, folder: Path):
        self.folder, self.tree = folder, copy_tree(folder)
        (folder / "home").mkdir()
        self.process = subprocess.Popen(
            [str(self.tree / ".venv" / "bin" / "python"), str(self.tree / "tests" / "mutants" / "child.py")],
            cwd=self.tree,
            bufsize=0,  # a line that waits in a buffer is not seen by select
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.read = b""

    def answer(self, timeout: float | None) -> tuple[str, str] | None:
        "The next word and value of the warm process; None where it takes longer than it may."
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self.read:
            if not select.select([self.process.stdout], [], [], end and max(end - time.monotonic(), 0))[0]:
                return None
            if not (more := os.read(self.process.stdout.fileno(), 4096)):
                raise SystemExit("The process that judges has ended; call it again, what is judged is kept.")
            self.read += more
        line, _, self.read = self.read.partition(b"\n")
        word, value = line.decode().split()
        return word, value

    def run(self, allowed: float, **task) -> int | None:
        "Let a fork do a task: its exit status, or None where it took longer than it may."
        task |= {"log": str(self.folder / "log"), "home": str(self.folder / "home")}
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        _, pid = self.answer(None)  # it may still import its libraries; the time counts from the fork
        late, end = False, time.monotonic() + allowed
        while True:
            found = self.answer(None if late else max(end - time.monotonic(), 0))
            if found is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(int(pid), signal.SIGKILL)
                late = True
            elif found[0] == "group":
                end = time.monotonic() + float(found[1])
            else:
                return None if late else int(found[1])

    def log(self) -> str:
        "What the last task printed."
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")


class Sight:
    "Which tests run which line, kept for each test file until it or what it runs is changed."

    def __init__(self, worker: Worker, limit: float, only: list[str]):
        self.worker, self.limit, self.files = worker, limit, {}
        (KEPT / "seen").mkdir(parents=True, exist_ok=True)
        files = sorted((worker.tree / "tests").rglob("test_*.py"), key=lambda f: f.stat().st_size)
        files = [f for f in files if (f.stem in only if only else not SLOW.fullmatch(f.name))]
        self.texts = {f: f.read_text(encoding="utf-8") for f in files}

    def naming(self, module: str) -> list[Path]:
        "The test files that name a module."
        package, _, leaf = module.removesuffix(".py").partition("/")
        named = rf"vfm_notes\.{package}\.{leaf}\b|from vfm_notes\.{package} import [^\n]*\b{leaf}\b"
        return [f for f, text in self.texts.items() if re.search(named, text)]

    def learn(self, files: list[Path]) -> None:
        "Look at test files."
        for f in files:
            if (path := str(f.relative_to(self.worker.tree))) not in self.files:
                self.files[path] = self.of(f)

    def of(self, file: Path) -> dict:
        "The record of one test file, made anew where it is stale."
        kept = KEPT / "seen" / f"{file.stem}.json"
        record = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {"own": ""}
        fresh = record["own"] == digest(file)
        if fresh and all(digest(self.worker.tree / "vfm_notes" / m) == h for m, h in record["modules"].items()):
            return record
        made = self.worker.folder / "look.json"
        made.unlink(missing_ok=True)
        self.worker.run(
            600 + 30 * self.limit,
            look={"file": str(file.relative_to(self.worker.tree)), "limit": self.limit, "to": str(made)},
        )
        record = {"seconds": 0.0, "tests": {}, "lines": {}, "failed": ["it ended without a word"]}
        if made.is_file():
            record = json.loads(made.read_text(encoding="utf-8"))
        failed = f", left out: {', '.join(record['failed'])}" if record["failed"] else ""
        print(f"{record['seconds']:6.1f} s  {len(record['tests']):4} tests of {file.name}{failed}", flush=True)
        record |= {
            "own": digest(file),
            "modules": {m: digest(self.worker.tree / "vfm_notes" / m) for m in record["lines"]},
        }
        kept.write_text(json.dumps(record), encoding="utf-8")
        return record

    def tests(self, m: Mutant, limit: float) -> list[tuple[list[str], float]]:
        "Tests that run a mutant's line, file by file, with their seconds: first those that call it, the quick ones."
        self.learn(self.naming(m.module))
        if not any(str(line) in r["lines"].get(m.module, {}) for r in self.files.values() for line in m.lines):
            package = m.module.split("/")[0]
            self.learn([f for f, text in self.texts.items() if f"vfm_notes.{package}" in text])
        near, every = {str(f.relative_to(self.worker.tree)) for f in self.naming(m.module)}, []
        for file, record in self.files.items():
            lines = record["lines"].get(m.module, {})
            ids = {i for line in m.lines for i in lines.get(str(line), [])}
            whole = 2 if "setup" in ids else 4 if "" in ids else None
            for t, seconds in record["tests"].items():
                if (rank := 0 if t in ids else whole) is not None:
                    every.append((rank + (file not in near), seconds, file, t))
        if not every:  # it runs in another process, if at all
            every = [(6, s, f, t) for f in self.files if f in near for t, s in self.files[f]["tests"].items()]
        groups, spent = {}, 0.0
        for rank, seconds, file, t in sorted(every):
            spent += seconds
            if groups and spent > limit:
                break
            groups.setdefault((rank // 2, file), []).append((t, seconds))
        return [([t for t, _ in own], sum(s for _, s in own)) for own in groups.values()]

    def state(self, groups: list[tuple[list[str], float]]) -> str:
        "The state of the test files that a mutant's tests lie in: a survivor is tried again when it changes."
        files = sorted({t.split("::")[0] for ids, _ in groups for t in ids})
        known = json.dumps([(f, self.files[f]["own"]) for f in files])
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def spoil(code: bytes, m: Mutant) -> bytes:
    "A module's text with the change in it."
    return code[: m.start] + m.text.encode() + code[m.end :]


def key(m: Mutant) -> str:
    "What a judgement belongs to: the function or class before and after, whatever its lines and its module are."
    code = (ROOT / "vfm_notes" / m.module).read_bytes()
    before, then = ast.parse(code).body, ast.parse(spoil(code, m)).body
    first = [min(n.lineno, *(d.lineno for d in getattr(n, "decorator_list", [])), n.lineno) for n in before]
    at = bisect_right(first, m.line) - 1
    return hashlib.sha256(f"{ast.dump(before[at])} {ast.dump(then[at])}".encode()).hexdigest()[:16]


def after(m: Mutant) -> str:
    "The changed line as it stands then."
    code = spoil((ROOT / "vfm_notes" / m.module).read_bytes(), m)
    return code.decode().splitlines()[m.line - 1].strip()


def put(file: Path, code: bytes) -> None:
    "Write a module and drop what was compiled of it, which is told apart by size and second only."
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_bytes(code)


def judged(m: Mutant, worker: Worker, sight: Sight, limit: float) -> dict:
    "Is a mutant killed, and by which test?"
    groups = sight.tests(m, limit)
    file = worker.tree / "vfm_notes" / m.module
    whole = file.read_bytes()
    put(file, spoil(whole, m))
    try:
        end = worker.run(60, judge=[(ids, 60 + 30 * seconds) for ids, seconds in groups])
    finally:
        put(file, whole)
    by = re.search(r"^(?:FAILED|ERROR) (\S+)", worker.log(), re.M)
    killer = by[1] if by else "too slow" if end is None else f"exit {end}"
    return {"end": "killed" if end != 0 else "survived", "by": killer if end != 0 else "", "tests": sight.state(groups)}


def stale(old: dict, state: Callable[[], str]) -> bool:
    "Is a judgement of older tests: is the test that killed gone, or are a survivor's tests other ones?"
    if old["end"] == "survived":
        return old["tests"] != state()
    file, _, test = old["by"].partition("::")  # empty for a mutant that was too slow
    name = test.partition("[")[0].split("::")[-1]
    return bool(name) and not ((ROOT / file).is_file() and f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"))


@cache
def named_mutants() -> list[Mutant]:
    "Those that are written down; each must still be found in its sub-package, once."
    found, modules = [], {}
    for package, old, new, what in NAMED:
        if package not in modules:
            files = [p for p in sorted((ROOT / "vfm_notes" / package).glob("*.py")) if p.name != "__init__.py"]
            modules[package] = [
                (f"{package}/{p.name}", code := p.read_text(encoding="utf-8"), words(code)) for p in files
            ]
        at = [(module, code, *place) for module, code, own in modules[package] for place in places(old, own)]
        if len(at) != 1:
            where = ", ".join(module for module, *_ in at) or "nowhere"
            raise SystemExit(
                f"named mutant '{what}': {old!r} is in {where}, expected once in {package}; correct named.py."
            )
        [(module, code, start, end)] = at
        first, last = (code.encode()[:k].count(b"\n") + 1 for k in (start, end))
        whole, source = statement_lines(ast.parse(code)), code.splitlines()[first - 1]
        lines = {n for k in range(first, last + 1) for n in whole.get(k, (k,))}
        m = Mutant(module, start, end, new, what, first, source, tuple(sorted(lines)))
        try:
            ast.parse(spoil(code.encode(), m))
        except SyntaxError as e:
            raise SystemExit(f"named mutant '{what}': {module} is no code then ({e}); correct named.py.") from None
        found.append(m)
    return found


def made_mutants(packages: tuple[str, ...], n: int, seed: int) -> list[Mutant]:
    "A drawn part of all that the operators can make, as many of each sub-package, one of each in turn."
    drawn, named = [], {(m.module, m.start, m.end, m.text) for m in named_mutants()}
    for package in packages:
        files = sorted(p.name for p in (ROOT / "vfm_notes" / package).glob("*.py") if p.name != "__init__.py")
        every = [m for f in files for m in mutants(ROOT / "vfm_notes", f"{package}/{f}")]
        every = [m for m in every if (m.module, m.start, m.end, m.text) not in named]
        drawn.append(spread(every, n, Random(seed)))
    return [ms[i] for i in range(n) for ms in drawn if i < len(ms)]


def spread(every: list[Mutant], n: int, draw: Random) -> list[Mutant]:
    "Draw n of them, one of each kind of slip in turn."
    draw.shuffle(every)
    kinds = {k: [m for m in every if m.kind == k] for k in sorted({m.kind for m in every})}
    turns = [kinds[k][i] for i in range(len(every)) for k in kinds if i < len(kinds[k])]
    return turns[:n]


def excuse(m: Mutant) -> tuple[str, str] | None:
    "The entry of EQUIVALENT whose code stands where the change was made, if any."
    code = (ROOT / "vfm_notes" / m.module).read_bytes()
    package, lines = m.module.split("/")[0], code.splitlines(keepends=True)
    first = sum(map(len, lines[: m.lines[0] - 1]))
    last = sum(map(len, lines[: m.lines[-1]])) + len(m.text.encode()) - (m.end - m.start)
    statement = spoil(code, m)[first:last].decode()
    changed = range(m.start - first, m.start - first + len(m.text.encode()) + 1)
    for where, then in EQUIVALENT:
        at = places(then, words(statement, False)) if where == package else []
        if any(a <= changed[0] and changed[-1] <= b for a, b in at):
            return where, then
    return None


def check_equivalent() -> None:
    "Each entry must still belong to a change that can be made."
    seen = {excuse(m) for m in named_mutants()}
    for package in {package for package, _ in EQUIVALENT}:
        for file in sorted((ROOT / "vfm_notes" / package).glob("*.py")):
            seen |= {excuse(m) for m in mutants(ROOT / "vfm_notes", f"{package}/{file.name}")}
    for package, then in EQUIVALENT:
        if (package, then) not in seen:
            raise SystemExit(f"EQUIVALENT of named.py: no change of {package} gives {then!r}; correct it.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="sub-packages, e.g. analysis report")
    parser.add_argument("--made", type=int, default=60, help="made mutants for each sub-package")
    parser.add_argument("--named", action="store_true", help="the named ones only")
    parser.add_argument("--match", default="", help="only mutants whose name holds this text")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=60, help="seconds of the processor that a mutant is worth")
    parser.add_argument("--tests", nargs="*", default=[], help="only these test files, e.g. test_words test_grid")
    parser.add_argument("--again", action="store_true", help="also those whose result is kept")
    return parser.parse_args()


def main() -> None:
    args, begun = arguments(), time.monotonic()
    check_equivalent()
    todo = [("named", m) for m in named_mutants()]
    made = [] if args.named else made_mutants(tuple(args.only) or PACKAGES, args.made, args.seed)
    todo += [("made", m) for m in made]
    order = {p: i for i, p in enumerate(args.only or PACKAGES)}
    todo = [(k, m) for k, m in todo if (not args.only or m.module.split("/")[0] in args.only) and args.match in m.name]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        worker = Worker(Path(folder))
        sight = Sight(worker, args.limit, args.tests)
        todo.sort(key=lambda t: (order.get(t[1].module.split("/")[0], len(order)), not sight.naming(t[1].module)))
        kept = json.loads(JUDGED.read_text(encoding="utf-8")) if JUDGED.is_file() and not args.again else {}
        rows = []
        for i, (kind, m) in enumerate(todo, 1):
            row = {"kind": kind, "package": m.module.split("/")[0], "name": m.name}
            row |= {"before": m.source.strip(), "after": after(m)}
            if found := excuse(m):
                rows.append(row | {"end": "equivalent", "reason": EQUIVALENT[found]})
                continue
            old = kept.get(own := key(m))
            if not old or stale(old, lambda m=m: sight.state(sight.tests(m, args.limit))):
                kept[own] = old = {"name": m.name} | judged(m, worker, sight, args.limit)
                JUDGED.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n", encoding="utf-8")
                minutes = (time.monotonic() - begun) / 60
                print(f"{i}/{len(todo)} {old['end']:8} {m.name}  [{old['by']}]  {minutes:.0f} min", flush=True)
            rows.append(row | old)
    told(rows)


def told(rows: list[dict]) -> None:
    "Print the equivalent ones with their reasons, the survivors, and the table."
    for r in rows:
        if r["end"] == "equivalent":
            print(f"equivalent: {r['name']}\n    after: {r['after']}\n    {r['reason']}")
    for r in rows:
        if r["end"] == "survived":
            print(f"survived: {r['name'].split(': ')[0]}\n    before: {r['before']}\n    after:  {r['after']}")
    counts = Counter((r["package"], r["kind"], r["end"]) for r in rows)
    ends = ("killed", "survived", "equivalent")
    print(f"\n{'sub-package':12} named: {' '.join(ends)}   made: {' '.join(ends)}   killed of those that can be")
    for package in sorted({r["package"] for r in rows}):
        cells = ["".join(f"{counts[package, kind, e]:11}" for e in ends) for kind in ("named", "made")]
        dead, alive = (sum(counts[package, k, e] for k in ("named", "made")) for e in ends[:2])
        print(f"{package:12}{'  '.join(cells)}   {dead / max(dead + alive, 1):.1%}")


if __name__ == "__main__":
    main()
