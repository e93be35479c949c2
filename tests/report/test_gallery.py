"""One case as every network answers it: what a record keeps, what is drawn, and what the slider shows."""
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from browsing import chromium, wait

from vfm_notes.analysis.tables import load_tables
from vfm_notes.analysis.verdict import metric_means
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.spec import StudySpec, run_id
from vfm_notes.report.gallery import MOST_PIXELS, gallery, picture_tag
from vfm_notes.report.site import write_assets
from vfm_notes.runs.grid import jobs_of, study_records
from vfm_notes.runs.record import new_record, write_record

CLASSES = ["background", "gland", "lesion"]
STUDY = StudySpec(
    name="shown", title="A made study", cohort="phantom", size=(4, 8, 8), spacing=(4.0, 1.0, 2.0),
    cases={"pretrain": 0, "train": 4, "val": 2, "test": 2}, n_train=(4,), backbones=("a.random", "b.random"),
    tasks={"segmentation": {}, "classification": {}}, strategies=("full",), seeds=(0, 1),
)


def square(k, size):
    labels = np.zeros((8, 8), np.float32)
    labels[2:2 + size, 2:2 + size] = k
    return labels


@pytest.fixture
def made(tmp_path, monkeypatch):
    "Records of two networks; the one of `a` kept three epochs, that of `b` none."
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    for spec in (s for job in jobs_of(STUDY) for s in job.specs):
        case = "<case> 1"
        dense = spec.task == "segmentation"
        metric = "dice" if dense else "auc"
        rows = [{"case": case, "patient": "p", "metric": m, "value": v} for m, v in
                (("dice", 0.25), ("dice_lesion", 0.1), ("dice_gland", 0.4), ("control_dice_lesion", 0.05),
                 ("control_dice_gland", 0.3), ("control_dice", 0.2))] if dense else []
        pictures = {"input": np.arange(64, dtype=np.float32).reshape(8, 8)}
        if dense: pictures |= {"target": square(2, 4), "prediction": square(1, 3)}
        if dense and spec.backbone == "a.random":
            pictures |= {f"epoch {e}": square(1, e).astype(np.float16) for e in (0, 2, 10)}
        write_record(
            run_folder("shown", run_id(spec)),
            new_record(
                spec, "shown", primary=metric, metrics={metric: 0.25} | ({"hd95": 7.5} if dense else {}),
                controls={metric: 0.2} | ({"hd95": 9.0} if dense else {}), units={"hd95": "mm"},
                directions={metric: 1, "hd95": -1},
                shown={"case": case, "slice": 1, "spacing": [4.0, 1.0, 2.0], "classes": CLASSES if dense else []},
            ),
            [], rows, pictures=pictures,
        )
    return load_tables(STUDY)


def drawn(tables):
    return gallery(tables, list(STUDY.tasks), {r["id"]: r for r in study_records(STUDY)}, {})


def test_every_network_stands_once_and_its_last_frame_is_the_tested_answer(made):
    text = drawn(made).html
    root = ElementTree.fromstring(f"<div>{text}</div>".replace("<wbr>", ""))
    assert [h.get("id") for h in root.iter("h2")] == ["segmentation"], "a classification answers with no picture"
    assert "case &lt;case&gt; 1, slice 2" in text
    tiles = root.findall(".//figure")
    frames = [[(g.get("data-epoch"), bool(g.get("style"))) for g in t.iter("g") if "data-epoch" in g.keys()]
              for t in tiles]
    assert frames == [[("", False)], [("", False)], [("0", True), ("2", True), ("10", False)], [("0", False)]]
    assert [len(t.findall(".//image")) for t in tiles] == [1, 0, 0, 0], "one picture, which all the others lie on"
    last = [t.findall(".//g")[-1].find("path").get("d") for t in tiles[2:]]
    assert last[0] == last[1], "the tested answer, not that of the last epoch"
    assert max(map(float, re.findall(r"M[\d.]+ ([\d.]+)", last[0]))) == pytest.approx(5 / 8 * 84), "3 of 8 rows of 1 mm"
    assert "Dice 0.250" in text


def test_a_picture_is_no_larger_than_a_screen_shows_it():
    import base64
    import io

    from PIL import Image
    tag = picture_tag(np.random.default_rng(0).normal(size=(600, 300)).astype(np.float32), (-2, 2), 100)
    image = Image.open(io.BytesIO(base64.b64decode(re.search("base64,([^\"]+)", tag)[1])))
    assert image.size == (100, 200) and max(image.size) <= MOST_PIXELS


def test_classes_and_other_metrics_stand_beside_the_control(made):
    runs = made.done()
    table = metric_means(made, runs[(runs.task == "segmentation") & (runs.backbone == "a.random")].id)
    assert list(table.index) == ["dice", "dice_gland", "dice_lesion", "hd95"]
    assert table.value.tolist() == pytest.approx([0.25, 0.4, 0.1, 7.5])
    assert table.control.tolist() == pytest.approx([0.2, 0.3, 0.05, 9.0]) and list(table.unit)[-1] == "mm"
    assert metric_means(made, []).empty


def test_the_slider_shows_an_epoch_and_stays_in_the_address(made, tmp_path):
    write_assets(tmp_path / "assets", charts=False)
    (tmp_path / "a.html").write_text(
        f'<html><body><main class="content">{drawn(made).html}</main><footer><div class="nav-footer"></div></footer>'
        '<script src="assets/site.js"></script></body></html>'
    )
    shown = (
        "return [...document.querySelectorAll('figure svg')].map(s => [...s.querySelectorAll('g[data-epoch]')].filter("
        "g => g.style.display !== 'none').map(g => g.dataset.epoch).join())"
    )
    with chromium() as browser:
        page = (tmp_path / "a.html").as_uri()
        browser.get(page)
        slider = wait(browser, "return document.querySelector('.vfm-epochs input')")
        assert browser.execute_script(shown) == ["", "", "10", "0"] and slider.get_attribute("type") == "range"
        slider.send_keys("\ue012")  # arrow left
        assert browser.execute_script(shown) == ["", "", "2", "0"]
        assert browser.current_url.endswith("?segmentation.epoch=2")
        assert slider.get_attribute("aria-valuetext") == "epoch 2 of 10"
        browser.get(page + "?segmentation.epoch=0")
        assert wait(browser, shown) == ["", "", "0", "0"]
        browser.get(page + "?segmentation.epoch=7")
        assert wait(browser, shown) == ["", "", "10", "0"], "an epoch that was not kept"


def test_a_run_keeps_what_its_network_answers_at_these_epochs(monkeypatch):
    "Epoch 0 is the network before its first step; pictures change nothing of the run."
    from vfm_notes.foundation.spec import RunSpec
    import vfm_notes.tune.catalog
    from vfm_notes.tune.transfer import prepare, shown_prediction, transfer
    spec = RunSpec(
        task="segmentation", backbone="profound_toy.random", strategy="scratch", size=(4, 32, 32), n_train=4, epochs=3,
        spacing=(12.0, 3.0, 3.0), cases={"pretrain": 0, "train": 4, "val": 2, "test": 2}, shown_epochs=3,
    )
    one = transfer(spec)
    kept = {k: v for k, v in one.pictures.items() if k.startswith("epoch")}
    assert list(kept) == ["epoch 0", "epoch 2", "epoch 3"] and {v.dtype for v in kept.values()} == {np.dtype("float16")}
    assert (kept["epoch 3"] == one.pictures["prediction"]).all()
    assert (shown_prediction(prepare(spec)).numpy() == kept["epoch 0"]).all()
    from dataclasses import replace
    none = transfer(replace(spec, shown_epochs=0))
    assert not [k for k in none.pictures if k.startswith("epoch")]
    assert all(torch.equal(torch.from_numpy(none.weights[k]), torch.from_numpy(v)) for k, v in one.weights.items())
    assert run_id(spec) == run_id(replace(spec, shown_epochs=0))
