"""The wheel and the sdist, used as somebody without a clone would: from an empty folder."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from own_way import lay_out, write_way
from safetensors.torch import load_file

import vfm_notes
from vfm_notes.data.layouts_mri import write_image, toy_case
from vfm_notes.foundation.places import library_notebooks, package_root
from vfm_notes.report.convert import join_lines, read_notebook

ROOT = package_root().parent
GUIDE = ROOT/"nbs"/"report"/"guide_cohort.ipynb"


def tree(target: Path) -> Path:
    "A copy of the project as a clone would have it, without what git ignores."
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode: pytest.skip("not in a clone")
    for name in found.stdout.splitlines():
        if not (ROOT/name).is_file(): continue
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, target/name)
    return target


def build(kind: str, source: Path, dist: Path) -> Path:
    "A wheel or an sdist, as pip and build ask setuptools for it; no network."
    code = f"import sys; from setuptools import build_meta; print(build_meta.__legacy__.build_{kind}(sys.argv[1]))"
    dist.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code, str(dist)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dist/done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Wheel and sdist of the tree, and the wheel of the sdist."
    root = tmp_path_factory.mktemp("build")
    source = tree(root/"tree")
    out = {"sdist": build("sdist", source, root/"dist"), "wheel": build("wheel", source, root/"dist")}
    with tarfile.open(out["sdist"]) as packed: packed.extractall(root/"unpacked", filter="data")
    unpacked = next((root/"unpacked").iterdir())
    (unpacked/"commit").write_text("0123456789abcdef")  # of the clone that the sdist was made from
    return out | {"unpacked": unpacked, "wheel of the sdist": build("wheel", unpacked, root/"again")}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "An environment with the wheel, which borrows the other packages of this one."
    env = tmp_path_factory.mktemp("installed")/"env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    site = next(env.glob("lib/python*/site-packages"))
    (site/"borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", str(env / "bin" / "python"), "install", "-q", "--no-deps",
            "--no-index", "--disable-pip-version-check", str(built["wheel"]),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return env


def shell(env: Path, script: str, folder: Path) -> str:
    "Run a script as a user of the environment would; its output."
    own = {k: v for k, v in os.environ.items() if not k.startswith(("VFM_", "PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder,
        env=own | {"PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def names(wheel: Path) -> set[str]:
    return {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith(("RECORD", "/"))}


def test_wheel_has_all_that_is_needed_and_no_more(built):
    inside = names(built["wheel"])
    share = {
        str(p.relative_to(ROOT))
        for d, kinds in (
            ("nbs", [".ipynb"]), *((f"nbs/{p.name}", [".ipynb"]) for p in (ROOT/"nbs").glob("[0-9]_*")),
            ("nbs/runs", [".ipynb"]), ("nbs/studies", [".yaml"]),
            ("nbs/report", [".ipynb", ".json", ".css", ".js", ".scss", ".html"]),
        )
        for p in (ROOT / d).iterdir()
        if p.suffix in kinds
    } | {"_quarto.yml"}
    assert not {n for n in share if f"vfm_notes/share/{n}" not in inside} and len(share) > 100
    assert not [
        n for n in inside if ".ipynb_checkpoints" in n or n.startswith(("tests/", "nbs/")) or "__pycache__" in n
    ]
    assert not (ROOT/"vfm_notes"/"share").exists(), "no copies in the working tree"
    assert built["wheel"].stat().st_size < 10e6
    text = zipfile.ZipFile(built["wheel"]).read(next(n for n in inside if n.endswith("entry_points.txt"))).decode()
    assert "vfm = vfm_notes.report.cli:main" in text and "forked = vfm_notes.runs.engine:ForkedEngine" in text


def test_sdist_has_the_project_and_builds_the_same_wheel(built):
    for name in (
        "nbs/5_shift/01_mmd.ipynb", "nbs/runs/transfer.ipynb", "nbs/report/site.js", "nbs/studies/phantom.yaml",
        "tests/test_packaging.py", "settings.ini", "_quarto.yml", "Makefile", "CONTRIBUTING.md", "LICENSE", ".ci/run",
    ):
        assert (built["unpacked"]/name).is_file(), name
    assert names(built["wheel"]) == names(built["wheel of the sdist"])
    assert zipfile.ZipFile(built["wheel of the sdist"]).read("vfm_notes/share/commit") == b"0123456789abcdef"


def test_one_version_everywhere(built, installed):
    version = re.search(r"^version = (\S+)", (ROOT/"settings.ini").read_text(encoding="utf-8"), re.M)[1]
    assert (
        vfm_notes.__version__ == version
        and f"-{version}-" in built["wheel"].name
        and f"-{version}.tar" in built["sdist"].name
    )
    assert shell(installed, "vfm --version", installed).strip() == version
    headings = re.findall(
        r"^### (\d\S+)$",
        "\n".join(join_lines(c["source"]) for c in read_notebook(ROOT / "nbs" / "report" / "log.ipynb")["cells"]),
        re.M,
    )
    assert headings[0] == version, "the versions in the log begin with the current version"


def test_installed_places(installed, tmp_path):
    code = (
        "import json; from vfm_notes.foundation import places as p; from vfm_notes.foundation.meter import "
        "git_commit; from vfm_notes.runs.forkserver import python_path; print(json.dumps([str(p.working_tree()), "
        "str(p.project_root()), p.shipped_studies(), str(p.runs_root()), str(p.site_root()), python_path(), "
        "git_commit(), len(p.library_notebooks())]))"
    )
    checkout, root, studies, runs, site, path, commit, count = json.loads(
        shell(installed, f'python -c "{code}"'.replace("$", r"\$"), tmp_path)
    )
    assert (
        checkout == "None" and Path(root).parts[-2:] == ("vfm_notes", "share") and Path(root).is_relative_to(installed)
    )
    assert (
        "phantom" in studies
        and runs == str(tmp_path / "runs")
        and site == str(tmp_path / "_site")
        and path == ""
        and commit is None
        and count == len(library_notebooks())
    )


def test_a_folder_of_ones_own(installed, tmp_path):
    said = shell(
        installed,
        "vfm init 'My first'; cd 'My first'; vfm run study.yaml --dry-run; mkdir studies; mv study.yaml "
        "studies/second.yaml; vfm status second; ls -A",
        tmp_path,
    )
    assert "cd My first" in said or "cd 'My first'" in said
    assert (
        "Study My_first: 2 of 2 notebooks to run" in said
        and "5 missing" in said
        and not (tmp_path / "My first" / "runs").exists()
    )
    assert {"README.md", ".gitignore", "cohorts", "look.ipynb"} <= set(said.split())
    before = (tmp_path/"My first"/"README.md").read_text(encoding="utf-8")
    done = subprocess.run([installed/"bin"/"vfm", "init", "My first"], cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "already has README.md" in done.stderr
        and not (tmp_path / "My first" / "study.yaml").exists()
    )
    assert (tmp_path/"My first"/"README.md").read_text(encoding="utf-8") == before


def walk_through() -> str:
    "The commands of the guide, as one script."
    script = []
    for cell in read_notebook(GUIDE)["cells"]:
        for language, body in re.findall(r"^```(\w+)\n(.*?)^```", join_lines(cell["source"]), re.S | re.M):
            if language == "sh": script.append(body)
            if language == "yaml": script.append(f"cat > study.yaml <<'END'\n{body}END\n")
    return "\n".join(script)


def test_walk_through_from_nifti_files_to_a_report(installed, tmp_path, lend_library):
    for i in range(1, 15):
        case = toy_case(i, False)
        for name in ("t2w", "adc", "gland"): write_image(case[name], tmp_path/"scans"/f"P{i:02d}"/f"{name}.nii.gz")
    script = walk_through()
    assert all(
        w in script for w in ("vfm init", "vfm data import", "vfm data check", "vfm run", "vfm table", "vfm site")
    )
    lend_library(tmp_path/"my-study")
    said = shell(installed, script, tmp_path)
    study = tmp_path/"my-study"
    assert (
        "14 cases, no problems" in said
        and "2 of 2 notebooks to run" in said
        and "3 of 3 runs done" in said
        and "3 done" in said
        and "Nothing is missing." in said
    )
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (study/"runs"/"mine").glob("*/record.json")]
    assert len(records) == 3 and {r["status"] for r in records} == {"done"}
    tuned = next(r for r in records if r["spec"].get("strategy") == "full")
    assert (
        0 < tuned["metrics"]["dice"] <= 1
        and tuned["licences"][0] == "in house, not to be passed on"
        and tuned["n"]["test"] == 4
    )
    assert f"{tuned['metrics']['dice']:.3f}"[:5] in (study / "_site" / "index.html").read_text(
        encoding="utf-8"
    ).replace("−", "-")
    assert (study/"results.csv").read_text(encoding="utf-8").count("\n") == 4
    assert {"index.html", "runs.html", "data.html", "guide_cohort.html", "reference", "records", "notebooks"} <= {
        p.name for p in (study / "_site").iterdir()
    }
    assert "in house, not to be passed on" in (study/"_site"/"data.html").read_text(encoding="utf-8")
    assert not [
        p
        for p in installed.rglob("*")
        if p.name in ("runs", "_site", "pages")
        and p.is_dir()
        and "share" not in str(p)
        and "vfm_notes/runs" not in str(p)
    ], "nothing is written into the installation"


def scan_of(seed: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    "An oblique, anisotropic scan with a bright body of two parts, and its labels; written by nibabel."
    rng, shape = np.random.default_rng(seed), (36, 40, 12)
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    inside = ((x - 17 - seed % 3)/8)**2 + ((y - 20)/9)**2 + ((z - 6)/4)**2 < 1
    labels = (inside * np.where(y < 20, 1, 2)).astype(np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = [[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]] * np.array([-1.0, 1.25, 3])
    affine[:3, 3] = 12 + seed, -30, 40
    values = rng.normal(100, 10, shape) + 60*(labels == 1) + 100*(labels == 2)
    return nib.Nifti1Image(values.astype(np.float32), affine), nib.Nifti1Image(labels, affine)


@pytest.fixture(scope="module")
def walked(installed, tmp_path_factory, lend_library):
    "A folder in which own scans, an own network and own weights went all the way to answers on scans never seen."
    root = tmp_path_factory.mktemp("own")
    for kind in ("images", "labels"): (root/"given"/kind).mkdir(parents=True)
    for i in range(9):
        for kind, image in zip(("images", "labels"), scan_of(i)): nib.save(image, root/"given"/kind/f"c{i}.nii.gz")
    assert lay_out(root/"given", root, 9) == "c8.nii.gz"
    turned = scan_of(8)[0].as_reoriented([[1, -1], [0, 1], [2, -1]])  # the same voxels in another order
    nib.save(turned, root/"unseen"/"turned.nii.gz")
    script = write_way(root, [4, 32, 32], [3.0, 1.25, 1.25], {"pretrain": 0, "train": 4, "val": 2, "test": 2}, 4,
                       ["front", "back"])
    lend_library(root/"mine")
    return root, shell(installed, script, root)


def test_an_own_network_and_own_weights_from_the_wheel_to_a_report(walked):
    root, said = walked
    assert "This study runs code from" in said and "backbone lab_cnn" in said and "2 of 2 runs done" in said, said
    assert "100.0% of the backbone is filled" in said and "Site:" in said
    kept = load_file(root/"weights"/"lab_cnn.lab.safetensors")
    given = torch.load(root/"lab.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{k}" for k in kept} == set(given)
    assert all(torch.equal(v, given[f"model.{k}"]) for k, v in kept.items())
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (root/"mine"/"runs"/"own").glob("*/record.json")]
    tuned = next(r for r in records if r["spec"]["strategy"] == "full")
    made = hashlib.sha256((root/"weights"/"lab_cnn.lab.safetensors").read_bytes()).hexdigest()
    assert [f["source_sha256"] for f in tuned["weights_files"]] == [made]
    assert list(tuned["spec"]["plugins"]) == ["my_code.py"] and len(records) == 2
    assert "lab_cnn.lab" in (root/"mine"/"_site"/"runs.html").read_text(encoding="utf-8")


def test_answers_on_scans_never_seen_lie_where_other_libraries_look(walked):
    "By nibabel and by SimpleITK: the scan's geometry, and the same answer for the same voxels stored in another order."
    root, answers = walked[0], walked[0]/"mine"/"answers"
    for case in ("c8", "turned"):
        for read, geometry in (
            (nib.load, lambda i: (i.shape, i.affine)),
            (sitk.ReadImage, lambda i: (i.GetSize(), i.GetOrigin(), i.GetSpacing(), i.GetDirection())),
        ):
            found, scan = read(answers/f"{case}_segmentation.nii.gz"), read(root/"unseen"/f"{case}.nii.gz")
            for a, b in zip(geometry(found), geometry(scan)): np.testing.assert_allclose(a, b, atol=1e-5)
    one, other = (nib.load(answers/f"{c}_probability_back.nii.gz") for c in ("c8", "turned"))
    back = other.as_reoriented([[1, 1], [0, -1], [2, -1]])
    np.testing.assert_allclose(back.affine, one.affine, atol=1e-5)
    np.testing.assert_allclose(back.get_fdata(), one.get_fdata(), atol=1e-3)
    assert one.get_fdata().std() > 1e-3
    inside = np.asarray(scan_of(8)[1].dataobj) > 0
    p = 1 - nib.load(answers/"c8_probability_background.nii.gz").get_fdata()
    assert p[inside].mean() > p[~inside].mean() + 0.1  # it is told where it lies


def test_what_was_exported_runs_without_the_own_code(walked, tmp_path):
    "The bundle by MONAI; the folder by vfm predict, once its code is named."
    import monai.bundle
    root, out = walked[0], walked[0]/"mine"/"exported"
    assert (out/"code"/"my_code.py").read_bytes() == (root/"my_code.py").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out/"bundle")
        monai.bundle.run(config_file="configs/inference.json", bundle_root=".", input_dir=str(root/"unseen"),
                         output_dir=str(tmp_path))
    theirs = nib.load(tmp_path/"c8_segmentation.nii.gz")
    np.testing.assert_allclose(theirs.affine, scan_of(8)[0].affine, atol=1e-4)
    assert theirs.shape == (36, 40, 12)
