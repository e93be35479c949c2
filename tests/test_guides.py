"""What the guides say is true: commands parse, files and names exist, YAML is read by what would read it."""
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from vfm_notes.foundation.places import package_root
from vfm_notes.foundation.schema import from_values
from vfm_notes.foundation.spec import StudySpec
from vfm_notes.report.cli import app
from vfm_notes.report.convert import join_lines, read_notebook
from vfm_notes.report.doctor import init_folder
from vfm_notes.runs.slurm import SlurmSettings

ROOT = package_root().parent
PAGES = sorted((ROOT/"nbs"/"report").glob("guide_*.ipynb"))
TEXTS = {p.stem: "\n\n".join(join_lines(c["source"]) for c in read_notebook(p)["cells"]) for p in PAGES}
TEXTS |= {name: (ROOT/name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
COMMAND = typer.main.get_command(app)


def is_name(command: str) -> bool:
    "Only the words of a command that exists, without anything behind."
    group, words = COMMAND, command.split()[1:]
    while words and words[0] in getattr(group, "commands", ()): group, words = group.commands[words[0]], words[1:]
    return not words


def commands(text: str) -> list[str]:
    "Every vfm command of a text: lines of shell blocks, and code between backticks."
    blocks = "\n".join(b for language, b in re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M) if language == "sh")
    lines = [re.split(r"\s#|\s*&&\s*|\s*;\s*|\s\|\s", l.strip()) for l in blocks.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"(?<!`)`(vfm [^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    inline = [c for c in inline if not is_name(c)]  # speaking of a command is not using it
    return [c.strip() for l in [*lines, inline] for c in l if c.strip().startswith("vfm ")]


def parse(command: str) -> None:
    "Let the command line read a command without doing anything."
    words, group = shlex.split(command)[1:], COMMAND
    while hasattr(group, "commands") and words and not words[0].startswith("-"):
        assert words[0] in group.commands, f"{command}: no command {words[0]}"
        group, words = group.commands[words[0]], words[1:]
    if words and words != ["--version"]: group.make_context(command, list(words), resilient_parsing=False)
    elif not hasattr(group, "commands"):
        assert not [p for p in group.params if p.required], f"{command}: an argument is missing"


@pytest.mark.parametrize("name", TEXTS)
def test_commands_parse(name):
    found = commands(TEXTS[name])
    for c in found:
        try: parse(c)
        except Exception as error: pytest.fail(f"{name}: `{c}`: {error}")
    assert found or name in ("CONTRIBUTING.md", "guide_reader")


def test_a_wrong_command_would_be_noticed():
    for wrong in ("vfm rum study.yaml", "vfm run study.yaml --shards 1/3", "vfm data import table", "vfm status"):
        with pytest.raises(Exception): parse(wrong)  # noqa: B017 (click's or our own)


def test_commands_of_a_new_folder_parse(tmp_path):
    for path in init_folder(tmp_path/"new"):
        if path.name == "README.md":
            for c in commands(path.read_text(encoding="utf-8")): parse(c)
    study = (tmp_path/"new"/"study.yaml").read_text(encoding="utf-8")
    parse(re.search(r"Run it:\s+(vfm .+)", study)[1])
    offered = yaml.safe_load(
        "\n".join(l.removeprefix("# ") for l in study.splitlines() if re.match(r"# \w+:", l) and "Run it" not in l)
    )
    assert offered.pop("plugins") == ["my_code.py"]  # a file that is not there: see test_plugins
    # what is offered in comments is accepted
    from_values(StudySpec, yaml.safe_load(study) | offered | {"bad_cases": "exclude"}, "study.yaml")
    cells = json.loads((tmp_path/"new"/"look.ipynb").read_text(encoding="utf-8"))["cells"]
    for line in "\n".join("".join(c["source"]) for c in cells).splitlines(): check_import(line)


def check_import(line: str) -> None:
    "An import line names what exists."
    if m := re.match(r"from (vfm_notes[\w.]*) import (.+)", line):
        for name in m[2].split(", "): assert hasattr(importlib.import_module(m[1]), name.strip()), line


@pytest.mark.parametrize("name", TEXTS)
def test_names_and_files_exist(name):
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", TEXTS[name], re.S | re.M):
        if language == "python":
            for line in body.splitlines(): check_import(line)
        if language == "yaml":
            values = yaml.safe_load(body)
            from_values(StudySpec if "backbones" in values else SlurmSettings, values, name)
    for path in re.findall(r"`((?:nbs|tests|vfm_notes)/[\w./-]+\w)`", TEXTS[name]):
        assert (ROOT / path).exists() or list((ROOT / path).parent.glob(Path(path).name + "*")), (
            f"{name}: {path} does not exist"
        )


def test_every_command_has_its_guide():
    said = " ".join(TEXTS.values())
    for name, command in COMMAND.commands.items():
        for full in (
            [f"vfm {name} {sub}" for sub in command.commands] if hasattr(command, "commands") else [f"vfm {name}"]
        ):
            assert full in said, f"no guide mentions {full}"
