"""Installation, read from settings.ini (the one place where versions and requirements are written).

A wheel carries the studies, templates, pages and notebooks of nbs/ as vfm_notes/share, an sdist all of the project.
"""
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
SHARED = (
    "_quarto.yml", "nbs/*.ipynb", "nbs/[0-9]_*/*.ipynb", "nbs/studies/*.yaml", "nbs/runs/*.ipynb", "nbs/report/*.*",
)
SOURCES = ("nbs", "tests", ".ci", "settings.ini", "_quarto.yml", "Makefile", "README.md", "LICENSE", "CONTRIBUTING.md")
JUNK = {"__pycache__", ".ipynb_checkpoints"}
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def commit():
    "The commit that is built: of the clone, or as the sdist carries it; empty where neither is known."
    if (HERE / "commit").is_file(): return (HERE / "commit").read_text(encoding="utf-8")
    if not (HERE / ".git").exists(): return ""
    git = lambda *words: subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
    try: head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError: return ""
    return "" if head.returncode else head.stdout.strip() + "-dirty" * bool(changed.stdout.strip())


class BuildWithShare(build_py):
    "Copies what the package needs of nbs/ beside its modules; an editable installation reads the working tree."
    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return
        share = Path(self.build_lib) / cfg["lib_path"] / "share"
        shutil.rmtree(share, ignore_errors=True)
        for file in (f for pattern in SHARED for f in HERE.glob(pattern)):
            to = share / file.relative_to(HERE)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
        (share / "commit").write_text(commit(), encoding="utf-8")


class SdistWithSources(sdist):
    "Packs notebooks, tests and settings too, and the commit."
    def make_release_tree(self, base_dir, files):
        more = (f for s in SOURCES for f in ((HERE / s).rglob("*") if (HERE / s).is_dir() else [HERE / s]))
        more = (str(f.relative_to(HERE)) for f in more if f.is_file() and not JUNK & set(f.parts))
        super().make_release_tree(base_dir, sorted({*files, *more}))
        (Path(base_dir) / "commit").write_text(commit(), encoding="utf-8")


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    license="Apache-2.0", python_requires=f">={cfg['min_python']}", packages=find_packages(include=["vfm_notes*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "onnx", "bundle", "radiomics")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
        "papermill.engine": ["forked=vfm_notes.runs.engine:ForkedEngine"],
    },
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown", zip_safe=False,
    cmdclass={"build_py": BuildWithShare, "sdist": SdistWithSources},
)
