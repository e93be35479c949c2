"""Study files: whatever stands in them gives a study or one sentence; values mean what YAML 1.2 says; plans are
counted before they are built."""
import copy
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import calls
from vfm_notes.data.cohort import CohortCard
from vfm_notes.data.manifest import read_card
from vfm_notes.foundation.places import shipped_studies
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.schema import field_types, from_values
from vfm_notes.foundation.spec import (
    Budget, ExternalSpec, PretrainSpec, RunSpec, StudySpec, count_runs, load_study, run_specs, study_from_values,
)
from vfm_notes.foundation.schema import decode_yaml, dump_yaml, parse_yaml, read_yaml
from vfm_notes.runs.executors import LocalSettings, local_settings
from vfm_notes.runs.slurm import SlurmSettings, slurm_settings

STUDY = {
    "name": "small", "title": "A small study", "cohort": "phantom", "size": [8, 32, 32], "spacing": [6.0, 2.25, 2.25],
    "cases": {"pretrain": 8, "train": 8, "val": 4, "test": 8},
    "pretrain": {"mae": {"backbone": "profound_toy", "epochs": 2}}, "backbones": ["profound_toy.mae"],
    "tasks": {"segmentation": {}, "translation": {"source": "t2w"}}, "strategies": ["scratch", "full"], "seeds": [0, 1],
    "budget": {"epochs": 2, "lr": 0.002}, "search": {"lr": [0.001, 0.002]},
    "leave_out": [{"task": "translation", "seed": 1}], "specialists": {"segmentation": "unet_3d"},
    "slurm": {"time": 10}, "local": {"gpus": "none"}, "window": [4, 32, 32], "n_train": [4, 8],
}


def sentence(function, *arguments) -> str:
    "The one sentence of a refusal."
    with pytest.raises(VfmError) as e: function(*arguments)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700, str(e.value)
    return str(e.value)


def changed(path: str, value) -> dict:
    "The study with another value in one place."
    study = copy.deepcopy(STUDY)
    *way, last = path.split(".")
    place = study
    for key in way: place = place.setdefault(key, {})
    place[last] = value
    return study


WRONG = [("budget.lr", v, "above 0, at most 10") for v in ("1e-3", 0, -1, math.inf, math.nan, None, True, [0.1], 11)]
WRONG += [
    (f"{b}.epochs", v, f"a whole number from {least} to 100000")
    for b, least in (("budget", 1), ("pretrain.mae", 0))
    for v in (-3, least - 1, 1.5, True, "8", None)
]
WRONG += [
    ("budget.epochs", 10**30, "from 1 to 100000"), ("budget.epochs", -(10**30), "from 1 to 100000"),
    ("pretrain.mae.epochs", 10**30, "at most 19 digits"),
]
WRONG += [
    ("budget.patience", -1, "from 0"), ("budget.warmup", 5, "from 0 to 1"), ("budget.warmup", -0.1, "from 0 to 1"),
    ("budget.weight_decay", -1, "from 0"), ("budget.batch_size", True, "whole number"),
    ("budget.batch_size", 0, "from 1"), ("budget.accumulate", 0, "from 1"),
    ("budget.schedule", "linear", "constant or cosine"), ("budget.precision", False, "no"),
    ("budget.keep", "bets", "Did you mean 'best'"), ("budget.deterministic", "yes", "true or false"),
    ("budget.augment", ["flip"], "a mapping"), ("budget.augment.flip", None, "a mapping"),
    ("budget", None, "a mapping"), ("budget", [1], "a mapping"),
]
WRONG += [
    ("pretrain.mae.ema", 1.0, "from 0 to below 1"), ("pretrain.mae.seed", True, "whole number"),
    ("pretrain.mae.options", 3, "a mapping"), ("pretrain.mae.backbone", [], "at least one"),
    ("pretrain.mae", None, "a mapping"), ("pretrain.mae.lr", "fast", "a number"),
    ("pretrain.mae.objective", ["x"], "text"), ("pretrain.mae.probe_every", -1, "from 0"),
    ("pretrain.mae.epoch", 3, "unknown key 'epoch'"),
]
WRONG += [
    ("size", v, "three whole numbers")
    for v in ([8, 32], [8, 32, 32.5], [8, 0, 32], [8, True, 32], "8", None, [8, 32, 10**9], {"d": 8})
]
WRONG += [
    ("spacing", v, "three numbers of mm")
    for v in ([0, 1, 1], [1, 1, math.inf], [math.nan] * 3, ["1", 1, 1], [100, 1, 1])
]
WRONG += [
    ("seeds", [True], "seeds[0] is true"), ("seeds", [0, -1], "seeds[1] is -1"), ("seeds", [1.0], "whole number"),
    ("seeds", [], "at least one"), ("seeds", 3, "a list"), ("seeds", [0, 0], "twice"), ("seeds", [2**40], "4294967295"),
]
WRONG += [
    (k, None, k)
    for k in (
        "specialists", "pretrain", "external", "slurm", "local", "search", "licences", "pages", "leave_out", "window",
        "n_train", "tasks", "title", "cohort", "bad_cases", "time_limit", "cases", "strategies",
    )
]
WRONG += [
    ("cases.val", -1, "cases.val is -1"), ("cases.train", 2.5, "whole number"),
    ("cases.trian", 3, "Did you mean 'train'"), ("cases", {"train": 3}, "cases.pretrain is missing"),
    ("time_limit", -1, "from 0"), ("title", "a\0b", "holds the character"), ("title", ["a"], "text"),
    ("title", "a\nb", "one line"), ("window", [4, 32], "[d, h, w]"), ("window", [4, 32, 0], "from 1"),
    ("n_train", [9], "n_train[0] is 9"), ("n_train", [0], "from 1"), ("strategies", [["full"]], "strategies[0]"),
    ("strategies", ["top  k=2", "top k=2"], "twice"), ("strategies", ["full decay=inf"], "finite"),
    ("strategies", ["top k=" + "9" * 5000], "at most 80"), ("strategies", [""], "does not begin with a name"),
    ("tasks", {}, "at least one"), ("tasks", {"segmentation": 3}, "a mapping"), ("tasks", {"a": {}, "A": {}}, "twice"),
    ("tasks.segmentation", {"x": float("inf")}, "tasks.segmentation.x is inf"),
    ("tasks.segmentation", {"x": {1: 2}}, "the key 1"), ("specialists", {"clasification": "x"}, "specialists"),
    ("leave_out", [{}], "leave_out[0] is empty"), ("leave_out", [{"seed": 9}], "does not have"),
    ("leave_out", [{"sed": 1}], "Did you mean 'seed'"), ("leave_out", [{"seed": [[1]]}], "leave_out[0].seed"),
    ("bad_cases", "ignore", "exclude or refuse"), ("external", {"task": "translation"}, "external cohort"),
    ("backbones", ["provicnet_toy.mae"], "its own architecture"), ("search.lr", [0.1, "x"], "search.lr[1]"),
    ("search.epochs", [1], "key of search"), ("nonsense", 1, "unknown key 'nonsense'"),
]


@pytest.mark.parametrize("path, value, words", WRONG, ids=lambda v: str(v)[:30])
def test_a_value_that_makes_no_sense_is_one_sentence_with_file_and_field(tmp_path, path, value, words):
    said = sentence(study_from_values, changed(path, value), tmp_path/"small.yaml")
    assert said.startswith(f"{tmp_path}/small.yaml: ") and words in said, said
    field = path.split(".")[0]
    assert field in said, said


def test_what_makes_sense_is_accepted(tmp_path):
    study = study_from_values(STUDY, tmp_path/"small.yaml")
    assert (
        study.budget == Budget(epochs=2, lr=0.002) and study.size == (8, 32, 32) and isinstance(study.spacing[0], float)
    )
    for path, value in (
        ("budget.epochs", 100_000), ("budget.lr", 1), ("budget.weight_decay", 0), ("budget.warmup", 1),
        ("size", [1, 512, 512]), ("seeds", [1, 2**32 - 1]), ("cases.train", 500_000), ("time_limit", 2.5),
        ("window", []),
    ):
        study_from_values(changed(path, value), tmp_path/"small.yaml")
    for name in shipped_studies(): load_study(name)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=3)
    | st.sampled_from(["full", "phantom", "../x", "a.b", "\0", "1e-3", "\ud800"]),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), c, max_size=3),
    max_leaves=6,
)
places_of = (
    [f for f in StudySpec.__dataclass_fields__]
    + [f"budget.{f}" for f in Budget.__dataclass_fields__]
    + [f"pretrain.mae.{f}" for f in PretrainSpec.__dataclass_fields__]
    + [
        "tasks.segmentation", "tasks.translation.source", "cases.train", "external.task", "external.window",
        "search.lr", "specialists.segmentation", "new",
    ]
)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(places_of), anything)
def test_any_value_in_any_field_gives_a_study_or_a_sentence(path, value):
    from pathlib import Path
    try: study = study_from_values(changed(path, value), Path("/nowhere/small.yaml"))
    except VfmError as e: assert "\n" not in str(e) and str(e).encode("utf-8")
    else: assert isinstance(study, StudySpec) and run_specs(study) is not None


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([RunSpec, PretrainSpec, ExternalSpec, Budget, LocalSettings, SlurmSettings, CohortCard]), st.data()
)
def test_any_value_in_any_schema_gives_an_object_or_a_sentence(cls, data):
    values = data.draw(st.dictionaries(st.sampled_from(list(field_types(cls))), anything, max_size=3)) | data.draw(
        st.just({}) | st.just({"x": 1})
    )
    try: assert isinstance(from_values(cls, values, "here"), cls)
    except VfmError as e: assert "\n" not in str(e)


# ---- YAML

TEXTS = {
    "duplicate": (b"name: a\ntitle: b\nname: c\n", ["line 3", "'name' occurs a second time"]),
    "nested duplicate": (b"budget:\n  lr: 1\n  lr: 2\n", ["line 3", "'lr'"]),
    "deep": (b"a: " + b"[" * 100_000, ["line 1", "nest"]), "NUL": (b"name: a\ntitle: \0\n", ["line 2", "'\\x00'"]),
    "not utf-8": (b"name: a\ntitle: caf\xe9\n", ["line 2", "0xe9", "UTF-8"]),
    "utf-16": ("name: a".encode("utf-16"), ["UTF-16"]), "empty": (b"", ["is empty"]),
    "comment": (b"# nothing\n", ["is empty"]),
    "list": (b"- a\n", ["expected a mapping"]),
    "tag": (b"a: !!python/object/apply:os.system [ls]\n", ["line 1", "tag"]),
    "own tag": (b"x: 1\na: !mine b\n", ["line 2", "!mine"]),
    "two documents": (b"a: 1\n---\nb: 2\n", ["line 2", "second document"]),
    "open": (b"a: 1\nb: [1, 2\n", ["not valid YAML", "line"]), "tab": (b"a:\n\tb: 1\n", ["line 2"]),
    "number as key": (b"a: 1\n3: b\n", ["line 2", "the key 3"]),
    "list as key": (b"a: 1\n? [x]\n: b\n", ["line", "key"]), "unknown alias": (b"a: *b\n", ["b"]),
    "itself": (b"a: &a [*a]\n", ["line 1", "inside"]),
    "long number": (b"a: " + b"9" * 5000, ["line 1", "5000 characters"]),
    "large": (b"a: " + b"x" * 1_000_001, ["bytes"]),
}
BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n".encode() for i in range(1, 12)
)


@pytest.mark.parametrize("case", [*TEXTS, "bomb"])
def test_a_file_that_is_no_study_is_one_sentence_with_its_line(tmp_path, case):
    content, words = TEXTS.get(case, (BOMB, ["50,000 values"]))
    (tmp_path/"s.yaml").write_bytes(content)
    said = sentence(load_study, tmp_path/"s.yaml")
    assert all(w in said for w in ["s.yaml", *words]), said
    assert calls(sentence, load_study, tmp_path/"s.yaml") < 5000, "nothing is unfolded before it is refused"


def test_words_without_quotes_mean_what_yaml_1_2_says():
    text = (
        "a: 1e-3\nb: no\nc: 0x1F\nd: 1_000\ne: 12:30\nf: .5\ng: 010\nh: 2026-03-01\ni: ~\nj: True\nk: 'true'\nl: "
        "5.\nm: +1.5E+3\nn: y"
    )
    assert parse_yaml(text, "t") == {
        "a": 0.001, "b": "no", "c": 31, "d": "1_000", "e": "12:30", "f": 0.5, "g": 10, "h": "2026-03-01", "i": None,
        "j": True, "k": "true", "l": 5.0, "m": 1500.0, "n": "y",
    }
    assert parse_yaml(decode_yaml(b"\xef\xbb\xbfa: 1", "t"), "t") == {"a": 1}
    assert parse_yaml("x: &a {lr: 1e-4}\ny: *a", "t") == {"x": {"lr": 1e-4}, "y": {"lr": 1e-4}}


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_read_as_pyyaml_reads_them(name):
    from vfm_notes.foundation.places import study_file
    assert read_yaml(study_file(name)) == yaml.safe_load(study_file(name).read_text(encoding="utf-8"))


clean = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
written = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | clean
    | st.sampled_from("1e3 no 0o7 0x1 ~ null 1_0 12:30 .5 5. - << ! *a".split()),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(clean, c, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(written)
def test_what_is_written_is_read_back(value): assert parse_yaml(dump_yaml(value), "t") == value


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text("[]{}:,&*!|>-? \n\t'\"#ab1%@`", max_size=40) | st.binary(max_size=40))
def test_any_text_is_read_or_refused_in_a_sentence(content):
    try: parse_yaml(decode_yaml(content, "t") if isinstance(content, bytes) else content, "t")
    except VfmError as e: assert "\n" not in str(e)


def test_a_card_and_a_profile_are_read_by_the_same_rules(tmp_path):
    card = (
        "name: mine\ntitle: t\nlicence: l\nsource: s\ncitation: c\nsequences: [t2w]\nclasses: [background]\n"
        "grades: [no, yes]\nspacing: [3, 1e-1, 0.5]\n"
    )
    (tmp_path/"card.yaml").write_text(card)
    found, more = read_card(tmp_path/"card.yaml")
    assert (
        found.grades == ("no", "yes")
        and found.spacing == (3.0, 0.1, 0.5)
        and more == {"root": ".", "crop": "volume", "targets": (), "threshold": None}
    )
    for wrong, words in (
        ("name: ../x\n", "name"), ("grades: [a, a]\n", "twice"), ("classes: []\n", "background"),
        ("mean: [x]\n", "mean[0]"), ("name: again\nname: b\n", "second time"),
    ):
        (tmp_path / "card.yaml").write_text(
            "\n".join(l for l in card.splitlines() if not l.startswith(wrong[:4])) + "\n" + wrong
        )
        assert words in sentence(read_card, tmp_path/"card.yaml")
    (tmp_path/"p.yaml").write_text("gpu_memory: 1e1\nprocesses: 2\n")
    assert local_settings({"processes": 1}, tmp_path/"p.yaml") == LocalSettings(gpu_memory=10.0, processes=2)
    (tmp_path/"p.yaml").write_text("time: 1.5\n")
    assert (
        "p.yaml" in (said := sentence(slurm_settings, {}, tmp_path / "p.yaml"))
        and "time is 1.5, expected a whole number from 1" in said
    )
    for wrong in (
        {"partition": "a\nrm"}, {"extra": {"x": "a\nb"}}, {"setup": ["a\nb"]},
        {"memory": "16GB\n#SBATCH"},
        {"gpus": -1}, {"time": True},
    ):
        assert next(iter(wrong)) in sentence(slurm_settings, wrong)


# ---- plans are counted

def test_runs_are_counted_before_they_are_made(tmp_path):
    study = study_from_values(STUDY, tmp_path/"s.yaml")
    # and one pretraining
    assert (
        count_runs(study)["runs"]
        == len(run_specs(study_from_values(STUDY | {"leave_out": []}, tmp_path / "s.yaml"))) + 1
    )
    many = STUDY | {
        "seeds": list(range(100)), "tasks": {f"t{i}": {"task": "segmentation"} for i in range(50)},
        "strategies": [f"top k={i}" for i in range(1, 11)], "search": {"lr": [i / 100 for i in range(1, 9)]},
        "n_train": [], "leave_out": [], "specialists": {},
    }
    said = sentence(study_from_values, many, tmp_path/"s.yaml")
    assert calls(sentence, study_from_values, many, tmp_path/"s.yaml") < 100_000, "counted, not built"
    assert "400,001 runs" in said and "50 tasks" in said and "100 seeds" in said and "20,000" in said
    text = "seeds: [" + ", ".join(map(str, range(60_000))) + "]\n"
    assert "50,000 values" in sentence(parse_yaml, text, "t")
