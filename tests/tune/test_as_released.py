"""The sulcus study's flaws: each form against something worked out otherwise, and the measured file with its page."""
import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler

from vfm_notes.data.load import load_cohort
from vfm_notes.data.loader import Loader
from vfm_notes.foundation.places import report_notebooks
from vfm_notes.pretrain.trainer import TrainConfig, Trainer
from vfm_notes.report import curves
from vfm_notes.tune import as_released as ar
from vfm_notes.tune.image_task import SegmentationAndPresence

TINY = ar.Setup(cases={"pretrain": 8, "train": 20, "test": 8}, pretraining=1, epochs=1)


@pytest.fixture(scope="module")
def trained():
    "A function that tunes a tiny network; with the state that it begins from."
    cohort = TINY.cohort(0)
    task = SegmentationAndPresence(cohort.card, width=TINY.width)
    data, state = task.prepare(cohort.subset("train")), ar.pretrain_once(TINY, cohort, 0)
    return (lambda tuning, flaws=(): ar.fine_tune(TINY, task, data, state, 0, tuning, flaws)[0]), state, task


def test_freezing_as_released_is_full_bit_for_bit(trained):
    tune, state, _ = trained
    full = tune("full").state_dict()
    for name in ("decoder", "top"):
        released, stated = tune(name, ("freezing",)).state_dict(), tune(name)
        assert all(torch.equal(full[k], v) for k, v in released.items())
        tensors = list(dict(stated.backbone.named_parameters()))
        frozen = {"decoder": int(0.5*len(tensors)), "top": len(tensors) - round(0.1*len(tensors))}[name]
        still = [k for k in tensors if torch.equal(stated.backbone.state_dict()[k], state[k])]
        assert set(tensors[:frozen]) <= set(still) and len(still) < len(tensors)


def test_share_of_a_leaking_split_by_counting_all_second_orders():
    n, train, _ = 10, *ar.one_order(10, 3)[:2]
    assert sorted(torch.cat(ar.one_order(n, 3)).tolist()) == list(range(n)) and [
        len(p) for p in ar.one_order(n, 3)
    ] == [6, 2, 2]
    exact = np.mean([ar.shared_cases(train, torch.tensor(test)) for test in combinations(range(n), 2)])
    drawn = [ar.shared_cases(train, ar.two_orders(n, 3, again)[2]) for again in range(3000)]
    assert math.isclose(exact, 0.6, abs_tol=1e-6) and abs(np.mean(drawn) - exact) < 4*np.std(drawn)/3000**0.5
    assert torch.equal(ar.two_orders(n, 3)[0], train)


def test_the_draw_of_the_study_as_its_loaders_would_make_it():
    "596 folders less one, the generator seeded with their number, two samplers one after the other."
    n, dice = 595, torch.Generator().manual_seed(595)
    first, second = (list(RandomSampler(range(n), num_samples=n, generator=dice)) for _ in range(2))
    seen = {
        int(i) for batch in DataLoader(range(n), batch_size=2, sampler=SubsetRandomSampler(first[:357])) for i in batch
    }
    tested = {
        int(i) for batch in DataLoader(range(n), batch_size=1, sampler=SubsetRandomSampler(second[476:])) for i in batch
    }
    assert len(seen) == 357 and len(tested) == 119 and len(seen & tested) == 72


def test_a_maximum_of_masks_is_never_two():
    from monai.transforms import AsDiscrete
    cohort = load_cohort("sulcus_phantom", (12, 12, 12), (4., 4., 4.), {"train": 30})
    target = torch.from_numpy(cohort.labels).long()
    stated, released = (
        cls(cohort.card, width=8).present(target) for cls in (SegmentationAndPresence, ar.PresenceAsReleased)
    )
    masks = torch.stack([AsDiscrete(to_onehot=3)(t[None]) for t in target])
    assert masks.max() == 1 and not released.any() and 5 < stated.sum() < 25
    assert stated.tolist() == [2 in np.unique(m) for m in cohort.labels]


@pytest.mark.parametrize("keep", [False, True])
def test_stored_gradient_by_other_means(keep):
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 1).double(), torch.randn(8, 3, dtype=torch.float64)
    loss, past, other = lambda m, b: (m(b["x"]).square().mean(), {}), [], torch.nn.Linear(3, 1).double()
    trainer = Trainer(net, loss, Loader({"x": x}, 4), TrainConfig(epochs=2, lr=0.1, clip=math.inf))
    if keep: ar.keep_gradients(trainer)
    for batch in [b for epoch in (1, 2) for b in trainer.loader.epoch(epoch)]:
        other.load_state_dict(net.state_dict())
        past.append(torch.autograd.grad(other(batch["x"]).square().mean(), other.weight)[0])
        trainer.train_step(batch)
        assert torch.allclose(net.weight.grad, sum(past) if keep else past[-1])


def test_only_pairs_move_with_lora_as_released(trained):
    tune, state, task = trained
    stated, released = tune("lora"), tune("lora", ("head",))
    torch.manual_seed(0)
    start = task.head(TINY.encoder(), 1)
    torch.manual_seed(0)
    backbone = TINY.encoder()
    start = task.head(backbone, 1).state_dict()  # as `tuned` draws it
    plain = {k.replace(".base_layer", ""): v for k, v in released.head.state_dict().items() if ".lora_" not in k}
    assert plain.keys() == start.keys() and all(torch.equal(v, start[k]) for k, v in plain.items())
    assert any(v.abs().max() > 0 for k, v in released.head.state_dict().items() if ".lora_B" in k)
    moved = [k for k, p in stated.head.named_parameters() if not torch.equal(p, start[k])]
    assert len(moved) == len(list(stated.head.named_parameters()))


def test_test_sets_and_own_labels(trained):
    tune, _, task = trained
    cohort = TINY.cohort(0)
    pool, fresh = (task.prepare(cohort.subset(s)) for s in ("train", "test"))
    rows = {r["set"]: r for r in ar.score_test_sets(TINY, task, tune("full"), pool, fresh, 0, ("class",), orders=5)}
    assert set(rows) == {"fresh", "stated", "released", "own labels"}
    own = rows["own labels"]
    assert own["auc"] is None and own["f1"] is None and own["sensitivity"] is None and own["specificity"] is not None
    assert own["dice"] == rows["fresh"]["dice"]
    shares = [ar.shared_cases(ar.one_order(20, 0)[0], ar.two_orders(20, 0, i)[2]) for i in range(5)]
    assert math.isclose(rows["released"]["shared"], np.mean(shares), abs_tol=1e-4)


def test_interrupted_and_continued(tmp_path, monkeypatch):
    cells, plain = (
        [("full", ()), ("top", ("class",))],
        lambda p: [{k: v for k, v in r.items() if k != "seconds"} for r in json.loads(p.read_text())["rows"]],
    )
    whole, broken = tmp_path/"whole.json", tmp_path/"broken.json"
    ar.write_as_released([0], whole, TINY, cells)
    real = ar.seed_rows
    def dies(*args):
        yield next(iter(real(*args)))
        raise KeyboardInterrupt
    monkeypatch.setattr(ar, "seed_rows", dies)
    with pytest.raises(KeyboardInterrupt): ar.write_as_released([0], broken, TINY, cells)
    assert len(plain(broken)) == 3
    monkeypatch.setattr(ar, "seed_rows", real)
    ar.write_as_released([0], broken, TINY, cells)
    assert plain(broken) == plain(whole)
    monkeypatch.setattr(ar, "seed_rows", None)  # nothing is left to compute
    ar.write_as_released([0], broken, TINY, cells)
    assert plain(broken) == plain(whole)


# --- the file beside the pages, and the page ---

def kept():
    file = curves.read_measurements("as_released.json")
    return file, pd.DataFrame(file["rows"])


def test_kept_file_is_whole():
    file, rows = kept()
    assert file["setup"] == json.loads(json.dumps(vars(ar.Setup()))) and file["origin"]["versions"]["torch"]
    seeds = sorted(rows.seed.unique())
    assert len(seeds) >= 5
    there = {(r.seed, r.tuning, tuple(r.flaws)) for r in rows.itertuples()}
    assert {(s, t, f) for s in seeds for t, f in ar.CELLS} <= there
    assert rows[["dice", "dice_PCS"]].stack().between(0, 1).all() and abs(rows.shared.dropna().mean() - 0.6) < 0.01


def test_one_kept_cell_made_again():
    file, rows = kept()
    setup = replace(ar.Setup(), **{k: tuple(v) if isinstance(v, list) else v for k, v in file["setup"].items()})
    [again] = ar.seed_rows(setup, 1, [("lora", ("head",))])
    before = rows[(rows.seed == 1) & (rows.tuning == "lora") & (rows.flaws.map(" ".join) == "head")].set_index("set")
    for row in again:
        assert (
            abs(row["dice"] - before.dice[row["set"]]) < 0.03
            and abs(row["dice_PCS"] - before.dice_PCS[row["set"]]) < 0.05
        )


def page(rows=None, monkeypatch=None):
    "Run the page's cells; what it has found out."
    source, shown = next(p for p in report_notebooks() if p.stem == "as_released"), []
    names = {"display": shown.append}
    if rows is not None:
        file = dict(curves.read_measurements("as_released.json"), rows=rows)
        monkeypatch.setattr(curves, "read_measurements", lambda name: file)
    for cell in json.loads(Path(source).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        code = "".join(cell["source"]).replace("from IPython.display import display", "")
        exec(compile(code, str(source), "exec"), names)
    return names, shown


def made(effect):
    "Rows in which every flaw has the effect that is asked for; what differs besides has a mean of zero over the seeds."
    rows = []
    for seed in range(5):
        for i, (tuning, flaws) in enumerate(ar.CELLS):
            for on in ("fresh", "stated", "released", *(["own labels"] if "class" in flaws else [])):
                value = (
                    0.6
                    + 0.02 * seed
                    + effect * (on == "released")
                    - effect * bool(flaws)
                    + 1e-3 * math.cos(2 * math.pi * (seed + i) / 5)
                )
                score = {"dice": value, "dice_PCS": value, "auc": None if on == "own labels" else value}
                rows.append(
                    dict(
                        seed=seed, tuning=tuning, flaws=list(flaws), trainable=10, seconds=1.0, set=on, f1=None,
                        sensitivity=None, specificity=1.0, shared=0.6 if on == "released" else None, **score,
                    )
                )
    return rows


def test_page_tells_what_the_rows_say(monkeypatch):
    names, shown = page()
    assert len(names["claims"]) == 11 and len(shown) >= 6
    _, rows = kept()
    one = rows[(rows["set"] == "fresh") & (rows.tuning == "full")]
    differ = [
        float(
            one[(one.seed == s) & (one.flaws.map(" ".join) == "gradients")].dice.iloc[0]
            - one[(one.seed == s) & (one.flaws.map(len) == 0)].dice.iloc[0]
        )
        for s in sorted(rows.seed.unique())
    ]
    assert math.isclose(names["swings"]["dice"]["mean"], np.mean(differ), abs_tol=1e-9) and names["swings"]["dice"][
        "n"
    ] == len(differ)


@pytest.mark.parametrize("effect, turned", [(0.2, ["split", "class", "gradients", "head"]), (0.0, [])])
def test_page_finds_an_effect_and_finds_none(effect, turned, monkeypatch):
    names, _ = page(made(effect), monkeypatch)
    assert names["turned"] == turned
