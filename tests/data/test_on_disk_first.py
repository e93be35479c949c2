"""What has a name is whole and on the disk: every writer syncs before it renames, and renames in one step."""
import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def steps(monkeypatch):
    "What the system was asked for, in order: syncs, renamings and links, by the names of files."
    done, real = [], {n: getattr(os, n) for n in ("fsync", "rename", "replace", "link")}
    def sync(fd):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        return real["fsync"](fd)
    def noted(name):
        def call(a, b, **options):
            real[name](a, b, **options)
            done.append((name, Path(a).name, Path(b).name))
        return call
    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace", "link"): monkeypatch.setattr(os, name, noted(name))
    return done


def test_a_text(steps, tmp_path):
    from vfm_notes.foundation.places import write_atomic
    for text in ("one", "two"): write_atomic(tmp_path/"a.txt", text)
    part = steps[0][1]
    assert part.startswith(".a.txt.") and len(steps) == 6
    for i, name in ((0, part), (3, steps[3][1])):
        assert steps[i : i + 3] == [("fsync", name), ("replace", name, "a.txt"), ("fsync", tmp_path.name)]
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path/"a.txt").read_text() == "two"


def test_a_site_key(steps, tmp_path):
    from vfm_notes.foundation.people import make_key
    make_key(tmp_path/"site.key")
    part = steps[0][1]
    assert part.startswith(".site.key.") and steps == [
        ("fsync", part), ("link", part, "site.key"), ("fsync", tmp_path.name),
    ]
    assert (tmp_path/"site.key").stat().st_mode & 0o777 == 0o600 and len((tmp_path/"site.key").read_text()) == 65


def test_a_checkpoint(steps, tmp_path):
    import torch
    from vfm_notes.data.loader import Loader
    from vfm_notes.pretrain.trainer import TrainConfig, Trainer
    x = torch.randn(4, 2)
    trainer = Trainer(
        torch.nn.Linear(2, 2), lambda module, batch: (module(batch["x"]).mean(), {}), Loader({"x": x}, 2),
        TrainConfig(epochs=1, lr=0.1),
    )
    steps.clear()
    for _ in range(2): assert trainer.save(tmp_path/"c.pt", "key")
    assert len(steps) == 6
    for i in (0, 3):
        part = steps[i][1]
        assert part.startswith(".c.pt.") and steps[i : i + 3] == [
            ("fsync", part), ("replace", part, "c.pt"), ("fsync", tmp_path.name),
        ]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_prepared_cohort(steps, tmp_path):
    from vfm_notes.data.cache import publish
    (tmp_path/"new").mkdir()
    (tmp_path/"new"/"cohort.json").write_text("{}")
    publish(tmp_path/"new", tmp_path/"name")
    assert steps == [("rename", "new", "name"), ("fsync", tmp_path.name)] and [p.name for p in tmp_path.iterdir()] == [
        "name"
    ]


def test_a_site(steps, tmp_path):
    from vfm_notes.report.stamp import replacing
    for text in ("one", "two"):
        steps.clear()
        with replacing(tmp_path/"_site", {}) as new: (new/"index.html").write_text(text)
        own = steps[[s[0] for s in steps].index("rename"):]
        old = [("rename", "_site", "._site.old")] if text == "two" else []
        assert own == [*old, ("rename", "._site.new", "_site"), ("fsync", tmp_path.name)], steps
        *_, stamp, name, whole = steps[: -len(own)]
        assert stamp[0] == "replace" and stamp[2] == "stamp.json"  # the last that is written into it
        assert name == whole == ("fsync", "._site.new")  # for the stamp's name, and before the folder gets its own
    assert [p.name for p in tmp_path.iterdir()] == ["_site"] and (tmp_path/"_site"/"index.html").read_text() == "two"
    shutil.rmtree(tmp_path/"_site")
