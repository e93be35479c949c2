"""Probes during a pretraining: they change nothing, survive a real kill, read what is there and nothing else."""
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import vfm_notes.backbones.profound
import vfm_notes.pretrain.reconstruction
from vfm_notes.backbones.profound import profound_toy
from vfm_notes.data.cohort import phantom_cohort
from vfm_notes.data.loader import normalise
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import PretrainSpec, run_id
from vfm_notes.pretrain.loop import pretrain
from vfm_notes.pretrain.evidence import class_weights, make_probe, nearest_cases
from vfm_notes.pretrain.trainer import Checkpointer

SIZE, SPACING = (4, 32, 32), (12.0, 3.0, 3.0)
SPEC = PretrainSpec(
    size=SIZE, spacing=SPACING, backbone="profound_toy.test", objective="masked_reconstruction", epochs=5, batch_size=4,
    lr=2e-3, probe_every=2,
)


@pytest.fixture(scope="module")
def cohort(): return phantom_cohort(SIZE, SPACING, {"pretrain": 8, "train": 12, "val": 10}, 0)


@pytest.fixture(scope="module")
def volumes(cohort): return torch.from_numpy(normalise(cohort.subset("pretrain").volumes))


@pytest.fixture(scope="module")
def probe(cohort): return make_probe(cohort, {"how": "zscore_nonzero"})[0]


def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_look_changes_nothing(volumes, probe):
    "Bit for bit, although masks are drawn at random in every step."
    seen, blind = pretrain(SPEC, volumes, None, 3, probe=probe), pretrain(SPEC, volumes, None, 3)
    assert same(seen.backbone, blind.backbone)
    rows = seen.curves[~seen.curves.name.str.startswith("probe: ")].drop(columns="seconds").reset_index(drop=True)
    assert rows.equals(blind.curves.drop(columns="seconds").reset_index(drop=True))
    looks = seen.curves[seen.curves.name.str.startswith("probe: ")]
    assert sorted(set(looks.epoch)) == [0, 2, 4, 5] and set(looks.name) == {
        "probe: AUC of clinically significant (ISUP 2-5)", "probe: Dice of gland", "probe: Dice of lesion",
    }
    first = probe(profound_toy_at(SPEC.seed))
    assert {n.removeprefix("probe: "): v for n, v in looks[looks.epoch == 0][["name", "value"]].values} == first
    assert {n.removeprefix("probe: "): v for n, v in looks[looks.epoch == 5][["name", "value"]].values} == probe(
        seen.backbone
    )


def profound_toy_at(seed):
    torch.manual_seed(seed)
    return profound_toy(3)


def test_how_often_is_no_part_of_the_name():
    assert run_id(SPEC) == run_id(replace(SPEC, probe_every=0)) != run_id(replace(SPEC, seed=1))


def test_never_when_nobody_asks(volumes, probe):
    assert (
        not pretrain(replace(SPEC, epochs=1, probe_every=0), volumes, None, 3, probe=probe)
        .curves.name.str.startswith("probe")
        .any()
    )


def test_with_an_average_the_average_is_looked_at(volumes, probe):
    result = pretrain(replace(SPEC, epochs=2, ema=0.9), volumes, None, 3, probe=probe)
    last = result.curves[(result.curves.epoch == 2) & (result.curves.name == "probe: Dice of gland")].value.item()
    assert last == probe(result.backbone)["Dice of gland"]  # what is kept is the average


def probed(kept, progress=lambda *said: None):
    "A pretraining with probes, from its checkpoint on: its network, and its curves without the clock."
    cohort = phantom_cohort(SIZE, SPACING, {"pretrain": 8, "train": 6, "val": 4}, 0)
    volumes, look = (
        torch.from_numpy(normalise(cohort.subset("pretrain").volumes)),
        make_probe(cohort, {"how": "zscore_nonzero"}, 6)[0],
    )
    result = pretrain(SPEC, volumes, None, 3, progress, Checkpointer(kept, run_id(SPEC), minutes=0), look)
    return result.backbone.state_dict(), result.curves.drop(columns="seconds").values.tolist()


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_probing import probed
seen = []
def progress(*said):
    seen.append(said)
    if len(seen) == 3: print("now", flush=True)
    if len(seen) == 4: time.sleep(600)
probed(Path(sys.argv[2]), progress)
"""


def test_killed_and_resumed_with_probes_it_ends_the_same(tmp_path):
    "The process is killed after its third epoch, past the first probes, in whatever step of the fourth it is."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want, want_rows = probed(tmp_path/"a.pt")
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, os.path.dirname(__file__), tmp_path / "b.pt"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        )
        assert process.stdout.readline() == "now\n", "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (tmp_path/"b.pt").exists()
        found, rows = probed(tmp_path/"b.pt")
    finally: torch.set_num_threads(threads)
    assert rows == want_rows and all(torch.equal(found[k], v) for k, v in want.items())


def test_a_checkpoint_of_another_spec_is_refused(volumes, tmp_path):
    "What a pretraining meets when its file is not its own."
    stop = Checkpointer(tmp_path/"c.pt", run_id(SPEC), minutes=0)
    pretrain(replace(SPEC, epochs=1), volumes, None, 3, keeper=stop)
    other = replace(SPEC, objective="autoencoding")
    with pytest.raises(VfmError, match=f"belongs to run {run_id(SPEC)}, not to {run_id(other)}"):
        pretrain(other, volumes, None, 3, keeper=Checkpointer(tmp_path/"c.pt", run_id(other)))


# ---- what readers read
# -------------------------------------------------------------------------------------------------

class Planted(nn.Module):
    "An encoder whose maps are what is planted."
    def __init__(self, maps):
        super().__init__()
        self.maps, self.widths, self.strides, self.p = maps, [maps.shape[1]], [(1, 1, 1)], nn.Parameter(torch.zeros(1))
    def pyramid(self, x): return [torch.stack([self.maps[int(v)] for v in x[:, 0, 0, 0, 0]])]


def planted(probe, maps):
    "The probe on cases that are numbered in their first voxel."
    numbers = torch.arange(len(maps)).float()
    volumes = numbers[:, None, None, None, None].expand(-1, 3, *maps.shape[2:]).contiguous()
    n = len(probe.train)
    return replace(probe, volumes=(volumes[:n], volumes[n:]))(Planted(maps))


def test_what_is_there_is_read_and_noise_is_not(probe):
    torch.manual_seed(0)
    labels = torch.from_numpy(np.concatenate([probe.train.labels, probe.val.labels])).long()
    grade = torch.from_numpy(np.concatenate([probe.train.grade, probe.val.grade]) == 2).float()
    clear = torch.cat(
        [
            nn.functional.one_hot(labels, 3).movedim(-1, 1).float(),
            grade[:, None, None, None, None].expand(-1, 1, *labels.shape[1:]),
        ],
        1,
    )
    found, noise = planted(probe, clear), planted(probe, torch.randn_like(clear))
    assert (
        found["AUC of clinically significant (ISUP 2-5)"] == 1
        and found["Dice of gland"] > 0.9
        and found["Dice of lesion"] > 0.9
    )
    assert noise["Dice of lesion"] < 0.2 and 0.1 < noise["AUC of clinically significant (ISUP 2-5)"] < 0.9


def test_readers_learn_from_the_train_cases_and_are_scored_on_the_val_cases(probe):
    "With gland and lesion exchanged in the train cases alone, the val cases are read the wrong way round."
    labels = torch.from_numpy(np.concatenate([probe.train.labels, probe.val.labels])).long()
    maps = nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    turned = replace(probe, train=replace(probe.train, labels=np.array([0, 2, 1], dtype=np.uint8)[probe.train.labels]))
    assert planted(turned, maps)["Dice of lesion"] < 0.1 < 0.9 < planted(probe, maps)["Dice of lesion"]


def test_large_maps_are_read_on_a_coarser_level(probe):
    backbone = profound_toy(3)
    assert (
        probe.level(backbone) == 0
        and replace(probe, room=2**20).level(backbone) > 0
        and replace(probe, room=0).level(backbone) == len(backbone.strides) - 1
    )
    assert set(replace(probe, room=2**18)(backbone)) == set(probe(backbone))


def test_cohorts_with_nothing_to_read(cohort):
    probe, why = make_probe(
        cohort.pick([i for i, s in enumerate(cohort.split) if s != "val"]), {"how": "zscore_nonzero"}
    )
    assert probe is None and "12 train and 0 val cases" in why
    bare = replace(
        cohort, labels=np.zeros_like(cohort.labels), grade=np.full_like(cohort.grade, -1),
        card=replace(cohort.card, grades=()),
    )
    assert make_probe(bare, {"how": "zscore_nonzero"}) == (
        None, "no probe: the cases have neither labels nor two grades that a probe could learn",
    )
    graded, _ = make_probe(replace(cohort, labels=np.zeros_like(cohort.labels)), {"how": "zscore_nonzero"})
    assert list(graded(profound_toy(3))) == ["AUC of clinically significant (ISUP 2-5)"]


def test_rare_classes_weigh_more():
    weights = class_weights(torch.tensor([0] * 900 + [1] * 90 + [2] * 10), 4)
    assert (
        torch.allclose(weights[:3] * torch.tensor([900.0, 90.0, 10.0]).sqrt(), (weights[0] * 30).expand(3), atol=1e-6)
        and weights[3] == 0
        and abs(weights.sum() - 1) < 1e-6
    )


def test_neighbours_by_double_loop(volumes):
    backbone = profound_toy_at(1).train()
    near, cosine = nearest_cases(backbone, volumes, queries=3, k=2)
    with torch.no_grad(): z = backbone.eval().embed(volumes).double().numpy()
    z = z - z.mean(0)
    for i in range(3):
        of = sorted(
            ((float(z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j])), j) for j in range(len(z)) if j != i),
            reverse=True,
        )[:2]
        assert near[i].tolist() == [j for _, j in of] and np.allclose(cosine[i], [c for c, _ in of], atol=1e-5)
    assert nearest_cases(backbone, volumes[:2], queries=3, k=3)[0].shape == (2, 1)


# ---- the template
# --------------------------------------------------------------------------------------------------------

def test_the_template_shows_what_the_objective_declares(tmp_path, monkeypatch):
    import json
    import papermill
    from vfm_notes.foundation.places import template_file
    source = template_file("pretrain").read_text(encoding="utf-8")
    assert "if objective" not in source and "objective ==" not in source
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    values = dict(
        size=list(SIZE), spacing=list(SPACING), cases={"pretrain": 6, "train": 6, "val": 4, "test": 0},
        objective="nt_xent", epochs=2, batch_size=2,
    )
    papermill.execute_notebook(
        template_file("pretrain"), tmp_path / "out.ipynb", values, progress_bar=False, cwd=tmp_path
    )
    said = [
        json.dumps(o)
        for c in json.loads((tmp_path / "out.ipynb").read_text(encoding="utf-8"))["cells"]
        for o in c.get("outputs", [])
    ]
    text = "\n".join(said)
    text = text.replace("\u2068", "").replace("\\u2068", "")  # names are marked by an invisible sign
    assert (
        text.count("Nearest to phantom") >= 3
        and "Linear probes of the frozen encoder" in text
        and "0 s left" in text
        and "left behind" in text
        and "fitted on 6 train cases and scored on 4 val cases" in text
    )
    record = json.loads(next((tmp_path/"runs").rglob("record.json")).read_text(encoding="utf-8"))
    assert (
        record["directions"]["probe: Dice of gland"] == 1
        and record["directions"]["loss"] == -1
        and record["primary"] == "loss"
    )
