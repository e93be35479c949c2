"""Guards on the notebooks and the package: the rules of the house, checked on every file."""
import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    p.name: p.name[2:] for p in sorted((ROOT/"nbs").iterdir()) if re.match(r"\d_", p.name)
}  # folder → sub-package
REACHES = {
    "foundation": set(), "data": {"foundation"}, "nets": {"foundation"}, "backbones": {"foundation", "data", "nets"},
    "pretrain": {"foundation", "data", "nets", "backbones"}, "shift": {"foundation", "data", "nets", "backbones"},
    "tune": {"foundation", "data", "nets", "backbones", "pretrain", "shift"}, "runs": {"foundation"},
    "analysis": {"foundation", "runs"}, "report": {"foundation", "runs", "analysis"},
}
# the command line and the batch join the sides, inside functions only
LAZY = {"report": {"data", "tune", "backbones"}, "runs": {"data", "tune"}}
PLAIN = []  # dense mechanisms that are plain .py files, at most three

NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIBRARY = [p for p in NOTEBOOKS if p.parent.name in LAYERS]
MODULES = sorted(p for p in (ROOT/"vfm_notes").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


# 12 < 125 < 13: a third digit puts a notebook between two
def place(path): return path.parent.name + path.name[:2]  # folder and number
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def code(path): return ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "code"]
def exported(path): return [s for s in code(path) if re.search(r"^#\|\s*export\b", s, re.M)]
def patched(f): return any(isinstance(d, ast.Name) and d.id == "patch" for d in getattr(f, "decorator_list", []))  # a method
def names(paths): return [str(p.relative_to(ROOT)) for p in paths]


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    agreed = {
        "nbs", "vfm_notes", "settings.ini", "setup.py", "tests", "_quarto.yml", "README.md", "Makefile", "LICENSE",
        "CONTRIBUTING.md",
    }
    assert {p.split("/")[0] for p in tracked} - agreed == {
        p for p in {t.split("/")[0] for t in tracked} if p.startswith(".")
    }
    # nbdev's index grows with every name
    assert not [
        p
        for p in tracked
        if (ROOT / p).is_file() and (ROOT / p).stat().st_size > 400_000 and p != "vfm_notes/_modidx.py"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_clean(path):
    for c in cells(path):
        assert not c.get("outputs") and c.get("execution_count") is None, "commit notebooks without outputs"
        assert set(c["metadata"]) <= {"tags"}
    if path.parent.name == "report":
        assert cells(path)[0]["cell_type"] == "raw", "a page begins with its front matter in a raw cell"
    for source in code(path):
        if not re.search(r"^\s*[%!]", source, re.M): ast.parse(source)
    if path not in LIBRARY:
        assert not exported(path), "templates, pages and the tour export nothing"


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_library_notebook_form(path):
    first, sources = cells(path)[0], exported(path)
    assert first["cell_type"] == "markdown" and re.search(r"^> .+", "".join(first["source"]), re.M), (
        "title and one-line subtitle first"
    )
    module = re.search(r"default_exp (\S+)", "\n".join(code(path)))[1]
    assert re.match(r"\d\d_", path.name), "two digits and the topic"
    assert module == f"{LAYERS[path.parent.name]}.{path.stem[3:]}", "the folder is the sub-package, the name the module"
    lengths = [len([l for l in s.splitlines() if l.strip()]) for s in sources]
    assert max(lengths) <= 41 and statistics.median(lengths) <= 20, (
        f"long cells: {sorted(lengths)[-3:]}, median {statistics.median(lengths)}"
    )
    plain = [s for s in code(path) if not s.lstrip().startswith("#|")]
    assert plain, "at least one example"
    for s in sources:
        body = [n for n in ast.parse(s).body]
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        assert all(imports) or not any(imports), f"imports alone in their cell:\n{s[:200]}"


def test_every_module_has_one_notebook_and_every_notebook_its_module():
    modules = [re.search(r"default_exp (\S+)", "\n".join(code(p)))[1] for p in LIBRARY]
    assert len(modules) == len(set(modules))
    on_disk = {".".join(p.relative_to(ROOT/"vfm_notes").with_suffix("").parts) for p in MODULES}
    assert on_disk - set(PLAIN) == set(modules)
    assert len(PLAIN) <= 3


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_module_size_and_direction(path):
    text, package = path.read_text(encoding="utf-8"), path.parent.name
    assert len(text.splitlines()) <= 480
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        assert not any(a.name == "*" for a in node.names), "no star imports"
        parts = (node.module or "").split(".")
        target = parts[0] if node.level == 2 else parts[1] if parts[0] == "vfm_notes" and len(parts) > 1 else None
        if target in REACHES and target != package:
            allowed = REACHES[package] | (LAZY.get(package, set()) if node not in tree.body else set())
            assert target in allowed, f"{package} must not import {target}"


def imported(path):
    "The modules of the package that a module imports, at its top or inside a function, in full or relative."
    here = path.relative_to(ROOT).with_suffix("").parts
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([
                *(here[: len(here) - node.level] if node.level else ()), *([node.module] if node.module else []),
            ])
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    return found & known


def test_imports_only_lower_numbers():
    "Then there is no circle, and none is hidden in a function."
    number = {"vfm_notes." + re.search(r"default_exp (\S+)", "\n".join(code(p)))[1]: place(p) for p in LIBRARY}
    for p in MODULES:
        own = ".".join(p.relative_to(ROOT).with_suffix("").parts)
        # itself: by a name that a child process can import
        higher = [m for m in imported(p) - {own} if number[m] >= number[own]]
        assert not higher, f"{own} imports {higher} of a higher number"


@pytest.mark.parametrize(
    "line",
    [
        "from vfm_notes.data.load import load_cohort", "import vfm_notes.data.load", "from vfm_notes.data import load",
        "from .load import load_cohort", "from . import load", "from ..data.load import load_cohort",
        "from ..data import load",
    ],
)
@pytest.mark.parametrize("form", ["{}", "def f():\n    {}", "class C:\n    def f(self):\n        if True: {}"])
def test_the_guard_reads_every_form_of_import(line, form, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    folder = tmp_path/"vfm_notes"/"data"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys.modules[__name__], "MODULES", [folder/"cohort.py", folder/"load.py"])
    (folder/"cohort.py").write_text(form.format(line))
    assert imported(folder/"cohort.py") == {"vfm_notes.data.load"}


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_public_functions_are_typed_and_told(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not patched(n)]
    for node in public:
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            continue
        told = ast.get_docstring(node) or (len(node.body) == 1 and isinstance(node.body[0], ast.Return))
        assert told, f"{node.name} has no docstring"
        untyped = [
            a.arg
            for a in [*node.args.args, *node.args.kwonlyargs]
            if a.annotation is None and a.arg not in ("self", "cls")
        ]
        assert len(untyped) <= 2, f"{node.name}: arguments without type: {untyped}"


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_methods_are_no_functions_of_their_module(path):
    "What takes `self` is patched into its class, so that no module offers it by its bare name."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef) or not node.args.args or node.args.args[0].arg != "self": continue
        assert [ast.unparse(d) for d in node.decorator_list] == ["patch"], (
            f"{node.name} is a method: decorate it with @patch"
        )


VERBS = set("""
    Adapt Add Advise Allocate Apply Augment Average Be Begin Block Bootstrap Break Bring Build Call Carry Change
    Check Choose Close Collect Colour Combine Compare Compute Convert Convolve Copy Correct Count Cut Dash Deal
    Decode Delete Describe Distinguish Distort Divide Do Download Draw Drop Encode End Enlarge Escape Estimate
    Exchange Execute Explain Express Fill Find Fine-tune Fit Forget Freeze Gather Get Give Go Hand Hash Have
    Hide Hold Import Index Interpolate Join Keep Kill Lay Leave Let List Load Look Make Map Mark Match Measure
    Merge Mirror Mix Move Multiply Name Normalise Note Number Open Order Pack Paint Pair Pass Pick Place Plan
    Point Prepare Pretrain Print Probe Publish Put Queue Raise Read Redistribute Refresh Refuse Register Remove
    Rename Render Repeat Replace Report Request Resample Resize Return Reverse Round Run Scale Scan Score See
    Seed Send Serve Set Shape Shorten Show Signal Solve Sort Split Spread Stamp Standardise Start State Store
    Strip Submit Subtract Suggest Swap Switch Take Test Thin Tidy Train Turn Unpack Wait Wrap Write
""".split())  # the first words of docstrings; a new one is added here when it is a verb
QUESTION = {("report/cli.py", "options")}  # the help of the whole program is the question that it answers


def documented(body, within=""):
    "Public functions and methods with their docstrings."
    for node in body:
        if isinstance(node, ast.ClassDef): yield from documented(node.body, node.name + ".")
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
            yield within + node.name, ast.get_docstring(node)


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_public_docstrings_begin_with_a_verb(path):
    texts = documented(ast.parse(path.read_text(encoding="utf-8")).body)
    where = path.relative_to(ROOT/"vfm_notes").as_posix()
    other = [f"{name}: {text.splitlines()[0]}" for name, text in texts
             if text.split()[0].rstrip(",:;") not in VERBS and (where, name) not in QUESTION]
    assert not other, f"begin with a verb, and add it to VERBS: {other}"


LIGHT = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in MODULES
    if p.parent.name in ("foundation", "runs", "analysis", "report")
]


def test_records_and_pages_open_without_torch():
    """Nor with the grammars that jsonschema compiles from 4.25 on, for two seconds in each process that draws a chart
    or reads a notebook."""
    program = (
        "import sys, importlib\nfor m in sys.argv[1:]: importlib.import_module(m)\nheavy = {'torch', 'monai', "
        "'transformers', 'rfc3987_syntax'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program, *LIGHT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-600:]


def test_import_is_light():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import vfm_notes"], capture_output=True, text=True, cwd=ROOT
    )
    bare = subprocess.run([sys.executable, "-X", "importtime", "-c", "pass"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.count("\n") - bare.stderr.count("\n") < 10, done.stderr[-800:]


def test_nothing_dangerous_is_called():
    own = {"launch.py", "07_launch.ipynb"}  # hands tensors to its own processes, in a folder that nobody else can open
    for p in [*MODULES, *NOTEBOOKS]:
        text = p.read_text(encoding="utf-8")
        if p.name in own: text = text.replace("pickle.load", "")
        assert not re.search(r"\bpickle\.load|torch\.load\((?!.*weights_only=True)|allow_pickle=True", text), p


@pytest.mark.parametrize("path", sorted((ROOT/"nbs"/"runs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_template_has_imports_then_parameters(path):
    tagged = [i for i, c in enumerate(cells(path)) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    before = [c for c in cells(path)[:tagged[0]] if c["cell_type"] == "code"]
    assert len(before) == 1 and "import" in "".join(before[0]["source"])
    for line in "".join(cells(path)[tagged[0]]["source"]).splitlines(): assert re.match(r"\w+ = .+", line), line


def test_readme_is_the_front_notebook():
    prose = ["".join(c["source"]) for c in cells(ROOT/"nbs"/"index.ipynb") if c["cell_type"] == "markdown"]
    assert (ROOT/"README.md").read_text(encoding="utf-8") == "\n\n".join(prose) + "\n", "run make readme"
