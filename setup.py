"""Installation, read from settings.ini (the one place where versions and requirements are written)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    license="Apache-2.0", python_requires=f">={cfg['min_python']}", packages=find_packages(include=["vfm_notes*"]),
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "papermill.engine": ["forked=vfm_notes.runs.engine:ForkedEngine"], "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8") if Path(__file__).with_name("README.md").exists() else "",
    long_description_content_type="text/markdown", zip_safe=False,
)
