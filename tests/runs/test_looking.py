"""What is drawn and what a notebook shows of runs, volumes and features, against tables and pictures made by hand."""

import base64
import io
import json
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from vfm_notes.report import cli, curves, doctor, evidence, explorer, feature_maps, figures, explorer as live, widgets


def drawn(chart) -> pd.DataFrame:
    "The rows that a chart was given, the longest of its tables."
    return pd.DataFrame(max(chart.to_dict()["datasets"].values(), key=len))


# --- charts of curves


def curve(task="seg", backbone="net.a", strategy="full", values=((1, 2, 3), (3, 4)), name="val_dice"):
    "Rows of a curves table: values of each seed from epoch 0."
    return pd.DataFrame(
        [
            dict(task=task, backbone=backbone, strategy=strategy, seed=s, epoch=e, value=float(v), name=name)
            for s, own in enumerate(values)
            for e, v in enumerate(own)
        ]
    )


def test_the_mean_is_taken_where_all_seeds_are():
    found = curves.with_means(pd.concat([curve(), curve(strategy="scratch", values=((5, 7),))]))
    mean = found[found.seed == "mean"]
    assert mean[["strategy", "epoch", "value"]].values.tolist() == [
        ["full", 0, 2.0],
        ["full", 1, 3.0],
        ["scratch", 0, 5.0],
        ["scratch", 1, 7.0],
    ]
    assert (
        sorted(set(found.seed)) == ["0", "1", "mean"]
        and len(found) == 7 + 4
        and found.index.tolist() == list(range(11))
    )


def test_long_trainings_are_thinned_and_seeds_are_counted():
    long = curve(values=(range(200),) * 3)
    kept = sorted(set(curves.fewer_epochs(long).epoch))
    assert len(kept) == 60 and kept[0] == 0 and kept[-1] == 199 and set(np.diff(kept)) <= {3, 4}
    assert (
        curves.seed_words(long) == "3 seeds (thin), mean (thick); 60 of 200 epochs are drawn"
        and len(curves.fewer_epochs(curve(values=(range(60),)))) == 60
    )
    three = pd.concat([curve(strategy=s) for s in ("full", "lora", "scratch")])
    assert (
        curves.seed_words(three) == "mean of 2 seeds"
        and curves.seed_words(curve(values=((1,),) * 13)) == "mean of 13 seeds"
    )
    panels = drawn(curves.curve_panels(three, "t", "s", {"seg": "Dice"}))
    assert set(panels.seed) == {"mean"} and set(
        drawn(curves.curve_panels(curve(), "t", "s", {"seg": "Dice"})).seed
    ) == {"0", "1", "mean"}


def test_a_trajectory_joins_the_two_means_of_an_epoch():
    both = [
        curve(backbone=b, values=v, name=n)
        for b in ("net.a", "net.b")
        for v, n in (
            (((1, 2), (3, 4)), "val_dice"),
            (((0.1, 0.3), (0.2, 0.5)), "d2p_embed"),
            (((9, 9), (9, 9)), "d2p_other"),
            (((8, 8), (8, 8)), "val_mae"),
        )
    ]
    chart = curves.trajectories(pd.concat(both), {"seg": "dice"}, "t", "s")
    rows = drawn(chart)
    assert (
        rows[rows.backbone == "net.a"][["epoch", "distance", "score", "seeds"]].values.tolist()
        == [[0, 0.15, 2.0, 2], [1, 0.4, 3.0, 2]]
        and len(rows) == 4
    )
    assert rows.groupby("cell").backbone.unique().explode().tolist() == ["net.a", "net.b"]
    assert chart.to_dict()["facet"]["field"] == "task"
    line, dots = chart.to_dict()["spec"]["layer"]
    assert line["encoding"]["detail"]["field"] == "cell"
    assert line["encoding"]["order"]["field"] == "epoch" and (line["mark"]["type"], dots["mark"]["type"]) == (
        "line", "point",
    )
    for layer in (line, dots):
        assert (layer["encoding"]["x"]["field"], layer["encoding"]["y"]["field"]) == ("distance", "score")


@pytest.mark.parametrize("strategies", [("scratch", "full"), ("scratch", "full", "lora")])
def test_a_share_that_arrived_has_its_band_where_there_is_room(strategies):
    rows = pd.DataFrame(
        [
            dict(task=t, strategy=s, at=1.0, share=0.5, low=0.2, high=0.8, waiting=2, n_runs=4)
            for t in ("seg", "all tasks")
            for s in strategies
        ]
    )
    chart = curves.reached_panels(rows, "t", "s").to_dict()
    assert len(chart["spec"]["layer"]) == (3 if len(strategies) == 2 else 2) and chart["facet"]["sort"] == [
        "seg",
        "all tasks",
    ]


def test_distances_at_moments_are_means_over_seeds():
    d2p = pd.DataFrame(
        [
            dict(task="seg", backbone="net.a", strategy="full", layer=layer, mmd2=v)
            for layer, vs in (("embed", (0.1, 0.3)), ("deep", (9, 9)))
            for v in vs
        ]
    )
    early = d2p.assign(when="early", mmd2=d2p.mmd2 / 10)
    found = evidence.distances_at(d2p, early).set_index("when")
    assert found.value.to_dict() == pytest.approx(
        {"at the end": 0.2, "after 5 % of training": 0.02}
    ) and found.n_seeds.tolist() == [2, 2]
    assert (found.low < found.value).all() and (found.value < found.high).all()
    assert evidence.distances_at(d2p, early[:0]).value.tolist() == pytest.approx([0.2])
    chart = evidence.moment_panels(found.reset_index(), "t", "s").to_dict()
    assert chart["concat"][0]["layer"][0]["encoding"]["color"]["scale"]["domain"] == [
        "after 5 % of training",
        "at the end",
    ]  # in the order of training


def test_hits_are_shares_of_pairs_best_first_and_a_control_is_marked():
    each = (("knn", 8, 0.25, False), ("logme", 8, 0.75, False), ("none", 0, 1.0, False), ("size", 8, 0.5, True))
    table = pd.DataFrame([
        dict(predictor=n, pairs=k, right=r, right_low=r / 2, right_high=1.0, tasks=2, backbones=3, control=c)
        for n, k, r, c in each
    ])
    rows = drawn(evidence.hits_chart(table, "t", "s"))
    ends = [[75, 37.5, 100], [50, 25, 100], [25, 12.5, 100]]
    assert rows[["right", "right_low", "right_high"]].values.tolist() == ends
    assert rows.words.tolist() == ["6 of 8", "4 of 8", "2 of 8"] and rows.kind.tolist() == ["score", "control", "score"]


def test_seeds_without_distance_or_gain_are_not_drawn():
    runs = pd.DataFrame(
        [
            dict(task="seg", backbone="net.a", strategy="full", seed=s, d2p=d, rpg=g)
            for s, (d, g) in enumerate(((0.1, 5.0), (np.nan, 6.0), (0.2, np.nan)))
        ]
    )
    assert drawn(evidence.seed_panels(runs, "t", "s"))[["d2p", "rpg"]].values.tolist() == [[0.1, 5.0]]


def test_marks_and_lines_of_strategies():
    marks = figures.strategy_marks(["full", "scratch", "lora", "full"], "abc", "S").to_dict()
    assert marks == {"domain": ["scratch", "full", "lora"], "range": ["S", "a", "b"]}
    legend = lambda names, asked=True: figures.strategy_shape(names, asked).to_dict()["legend"] is not None
    assert (
        legend(["scratch", "full", "lora"])
        and not legend(["scratch", "full"])
        and not legend(["scratch", "full", "lora"], False)
    )
    lines = lambda *names: curves.with_lines(pd.DataFrame({"backbone": "net.a", "strategy": names})).line.tolist()
    assert lines("scratch", "full") == ["net.a"] * 2 and lines("scratch", "full", "lora") == [
        "net.a scratch",
        "net.a full",
        "net.a lora",
    ]


def test_layers_and_costs_are_means_over_seeds():
    d2p = pd.DataFrame(
        [
            dict(task="seg", backbone=b, layer=layer, mmd2=v)
            for b, k in (("net.a", 1), ("net.b", 10))
            for layer, own in (("l1", (0.01, 0.03)), ("l0", (0.02, 0.04)))
            for v in (k * w for w in own)
        ]
    )
    chart = figures.distance_layers(d2p, "t", "s").to_dict()
    rows = pd.concat(map(pd.DataFrame, chart["datasets"].values())).set_index(["backbone", "layer"])
    assert rows.mmd2.to_dict() == pytest.approx(
        {("net.a", "l1"): 0.02, ("net.a", "l0"): 0.03, ("net.b", "l1"): 0.2, ("net.b", "l0"): 0.3}
    ) and set(rows.runs) == {2}
    tiles = [p["layer"][0]["encoding"] for p in chart["concat"]]
    assert all(
        t["x"]["sort"] == ["l1", "l0"] and t["opacity"]["scale"]["domain"] == pytest.approx([0, 0.3]) for t in tiles
    )  # one scale for all panels
    runs = pd.DataFrame(
        [
            dict(
                task="seg",
                backbone="net.a",
                strategy=s,
                seconds_training=t,
                peak_memory_mib=2 * t,
                parameters_trainable=3e6,
            )
            for s in ("scratch", "full")
            for t in (10.0, 30.0)
        ]
    )
    chart = curves.cost_chart(runs, "t", "s").to_dict()
    values = (
        {p["layer"][0]["encoding"]["x"]["field"] for p in chart["concat"]},
        sorted({r["value"] for rows in chart["datasets"].values() for r in rows}),
    )
    assert values[1] == [3.0, 20.0, 40.0]  # millions, seconds, MiB
    hollow, full = chart["concat"][0]["layer"][1:]
    assert (
        hollow["mark"]["filled"] is False
        and hollow["transform"] == [{"filter": "datum.strategy == 'scratch'"}]
        and full["mark"]["filled"]
        and full["transform"] == [{"filter": "datum.strategy != 'scratch'"}]
    )
    bars = curves.dot_chart(
        pd.DataFrame([dict(task="seg", backbone="net.a", strategy="full", value=2.0, low=1.0, high=4.0)]), "x"
    ).to_dict()["layer"][0]["encoding"]
    assert (bars["x"]["field"], bars["x2"]["field"]) == ("low", "high")


# --- runs in a notebook

ROWS = pd.DataFrame(
    [
        dict(
            id=f"r{i}",
            job="j",
            status=status,
            kind="transfer",
            task="super_resolution",
            backbone="net.a",
            strategy=s,
            n_train=8,
            seed=i,
            metric="psnr",
            value=v,
            seconds_total=60.4,
            error=e,
        )
        for i, (status, s, v, e) in enumerate(
            (("done", "full", 27.126, ""), ("failed", "lora", np.nan, "Out of memory"), ("done", "lora", 3.14159, ""))
        )
    ]
)


def test_rows_are_found_by_words_and_menus():
    found = lambda text="", **menus: explorer.filter_rows(ROWS, text, **menus).id.tolist()
    assert (
        found() == ["r0", "r1", "r2"]
        and found("super resolution LORA") == ["r1", "r2"] == found(strategy="lora")
        and found("memory") == ["r1"]
    )
    assert (
        found("lora", status="done", seed="2") == ["r2"]
        and found(status="any", seed="any", strategy="full") == ["r0"]
        and found("nan") == []
    )
    assert [
        explorer.shown_value(c, v)
        for c, v in (
            ("seconds_total", 60.4),
            ("metric", "psnr"),
            ("value", 27.126),
            ("value", 3.14159),
            ("value", np.nan),
            ("task", "a_b"),
            ("error", "<x>"),
        )
    ] == ["60 s", "PSNR", "27.13", "3.142", "", "a b", "&lt;x&gt;"]
    table = explorer.run_rows("s", ROWS, most=2)
    assert (
        table.count("<tr>") == 3
        and "and 1 more: narrow the choice" in table
        and "Out of memory" in table
        and "more" not in explorer.run_rows("s", ROWS, most=3)
    )
    assert ">error<" not in explorer.run_rows("s", ROWS[:1]) and ">took<" in table and ">cases<" in table


def test_curves_of_the_rows():
    assert [explorer.curve_words(n) for n in ("val_psnr", "d2p_layer_1", "loss")] == [
        "validation PSNR",
        "distance of layer 1",
        "loss",
    ]
    some = pd.concat(
        [curve().assign(id="x"), curve(task="sr", name="loss").assign(id="y"), curve(name="loss").assign(id="x")]
    )
    one, two = explorer.curve_chart(some, "val_dice").to_dict(), explorer.curve_chart(some, "loss").to_dict()
    assert (
        one["title"]["text"] == "Validation Dice of 1 run"
        and "facet" not in one
        and two["title"]["text"] == "Loss of 2 runs"
        and two["facet"]["field"] == "task"
    )


def test_an_explorer_counts_what_it_shows(tmp_path, monkeypatch):
    from toy_batch import Toy
    from vfm_notes.foundation.places import run_folder
    from vfm_notes.foundation.spec import load_study, run_id, run_specs
    from vfm_notes.runs.record import failed_record, new_record, write_record

    toy = Toy(tmp_path)
    monkeypatch.setenv("VFM_RUNS", str(toy.runs))
    specs = run_specs(load_study(toy.study))
    for k, s in enumerate(specs[:2]):
        write_record(
            run_folder("toy", run_id(s)),
            new_record(s, "toy", metrics={"dice": 0.5}, primary="dice", directions={"dice": 1}),
            [
                dict(epoch=e, seconds=1.0, name=n, value=float(k))
                for n in ("loss", "val_dice", "d2p_embed")
                for e in (0, 1)
            ],
        )
    write_record(run_folder("toy", run_id(specs[2])), failed_record(specs[2], "toy", ValueError("no")))
    whole, look = explorer.explored(str(toy.study)), explorer.run_explorer(str(toy.study), most=1)
    ids = [run_id(s) for s in specs]
    assert (
        whole.id.tolist()[-len(ids) :] == ids
        and whole.status.tolist()[:1] == ["missing"]
        and whole.kind[0] == "pretrain"
    )  # in the order of the plan
    assert whole.status.tolist()[1:] == [
        "done",
        "done",
        "failed",
        "missing",
        "missing",
        "missing",
    ] and whole.seed.tolist()[1:] == [s.seed for s in specs]
    assert (
        look.count.value == "7 of 7 runs: 2 done, 1 failed, 4 missing; curves of the first 1"
        and [v for _, v in look.curve.options] == ["val_dice", "loss", "d2p_embed"]
    )
    assert (
        set(look.curves().value) == {0.0}
        and set(look.curves().id) == {ids[0]}
        and set(look.curves().seed) == {specs[0].seed}
    )
    from vfm_notes.report.builder import plan_rows
    from vfm_notes.runs.grid import jobs_of

    first = jobs_of(load_study(toy.study))[0].specs[0]
    rows = [{"epoch": 1, "seconds": 1.0, "name": "loss", "value": 9.0}]
    write_record(run_folder("toy", run_id(first)), new_record(first, "toy"), rows)
    look.again.click()
    assert look.curves()[["task", "strategy", "value"]].values.tolist() == [["pretrain", "pretrain", 9.0]]
    kinds, total = plan_rows(load_study(toy.study), [])
    assert [k[:3] for k in kinds] == [("pretrain", 1, 1), ("transfer", 1, 6)] and total.startswith(
        "2 notebooks, 7 runs; "
    )
    assert all("very roughly" in k[3] for k in kinds)
    look.menus["status"].value = "failed"
    assert (
        look.count.value == "1 of 7 runs: 1 failed"
        and look.curve.value is None
        and "No curves" in look.chart.outputs[0]["data"]["text/html"]
    )


def test_trainings_at_work_are_read_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_RUNS", str(tmp_path))
    folder = tmp_path / "s" / "checkpoints"
    folder.mkdir(parents=True)
    rows = [
        [1, 10.0, "loss", 0.9],
        [1, 10.0, "val_dice", 0.4],
        [2, 20.0, "loss", 0.7],
        [2, 20.0, "val_dice", 0.5],
        [2, 20.0, "d2p_embed", 0.1],
    ]
    for name, said in (("old", 100.0), ("new", 200.0), ("over", 300.0), ("failed", 50.0)):
        (folder / f"{name}.curves.json").write_text(json.dumps(dict(epochs=5, rows=rows)))
        os.utime(folder / f"{name}.curves.json", (said, said))
    (folder / "broken.curves.json").write_text("{")
    found = live.trainings("s", {"over": {"status": "done"}, "failed": {"status": "failed"}})
    assert [t.name for t in found] == ["new", "old", "failed"]  # the one that spoke last comes first
    one = found[0]
    assert (
        one.epoch == 2
        and one.left == pytest.approx(30.0)
        and one.last("val_") == ("val_dice", 0.5)
        and one.last("none") is None
    )
    assert one.curves.name.tolist() == ["loss", "val_dice"] * 2 and live.RunningTraining("n", 5, [], 0.0).left is None
    told = live.training_rows(found[:2], 260.0)
    assert (
        "2 of 5" in told
        and "0.7" in told
        and "dice 0.5" in told
        and "about 30 s" in told
        and "1 min 00 s ago" in told
        and told.index("new") < told.index("old")
    )
    assert ">done<" in live.training_rows(
        [live.RunningTraining("n", 2, rows, 0.0)], 0.0
    ) and "No training" in live.training_rows([], 0.0)
    assert (
        live.training_chart(found).to_dict()["title"]
        == {"text": "Epoch 2 of 5, 3 trainings", "subtitle": "the newest first"}
        and live.training_chart([one]).to_dict()["title"]["subtitle"] == "new"
    )


def test_a_training_of_this_notebook_is_looked_on():
    look = live.live_training()
    assert "No training is at work" in look.table.value
    for epoch, loss in ((1, 0.9), (2, 0.8)):
        look(epoch, 4, {"seconds": 5.0 * epoch, "loss": loss, "left": 1.0})
    assert (
        look.found[0].rows == [(1, 5.0, "loss", 0.9), (2, 10.0, "loss", 0.8)]
        and look.found[0].left == pytest.approx(10.0)
        and "2 of 4" in look.table.value
    )
    look(1, 4, {"seconds": 5.0, "loss": 0.5})  # a new training
    assert look.found[0].rows == [(1, 5.0, "loss", 0.5)] and time.time() - look.found[0].told < 60


# --- volumes and features in a notebook


def test_slices_of_a_volume():
    volume = np.arange(24).reshape(2, 3, 4)
    assert widgets.slice_plane(volume, "axial", 1).tolist() == volume[1].tolist() and widgets.slice_plane(
        volume, "coronal", 2
    ).tolist() == [volume[1, 2].tolist(), volume[0, 2].tolist()]
    assert widgets.slice_plane(volume, "sagittal", 0).tolist() == [
        volume[1, :, 0].tolist(),
        volume[0, :, 0].tolist(),
    ]  # the last slice on top
    assert [widgets.slice_extent((2, 3, 4), (5.0, 2.0, 1.0), p) for p in widgets.PLANES] == [(6, 4), (10, 4), (10, 6)]
    grey, mask = np.full((1, 2), 100, np.uint8), np.array([[True, False]])
    assert widgets.blend_masks(grey, [(mask, widgets.parse_colour("#ff0a00"))], 0.25).tolist() == [
        [[139, 78, 75], [100, 100, 100]]
    ]


def test_a_viewer_shows_slice_window_and_curtain():
    before, after = np.zeros((2, 4, 10), np.float32), np.ones((2, 4, 10), np.float32)
    view = widgets.volume_viewer(
        before, {"gland": before == 0}, "A case", {"volume": after}, (0, 1), (4.0, 1.0, 1.0), width=100
    )
    row = view.scene.pixels("volume", "axial", 0, curtain=0.3)[0, :, 0]
    assert row.tolist() == [0] * 3 + [255] * 7
    assert [s.max for s in view.slice.values()] == [2, 4, 10] and [s.value for s in view.slice.values()] == [2, 3, 6]
    sizes = {p: (i.layout.width, i.layout.height) for (_, p), i in view.pictures.items()}
    assert sizes == {
        "axial": ("100px", "40px"),
        "coronal": ("100px", "80px"),
        "sagittal": ("40px", "80px"),
    }  # true proportions, one scale
    first = view.pictures["volume", "axial"].value
    view.slice["coronal"].value = 1
    assert (
        "coronal 1 of 4" in view.captions["volume", "coronal"].value
        and "axial 2 of 2" in view.captions["volume", "axial"].value
    )
    view.opacity.value = 1.0
    assert view.pictures["volume", "axial"].value != first
    view.shown["gland"].value = False
    assert view.pictures["volume", "axial"].value == first
    view.window.value = (0, 0.5)
    assert view.scene.windows["volume"] == (0, 0.5) and "window 0 to 0.5" in view.captions["volume", "axial"].value
    view.reset.click()
    assert view.scene.windows["volume"] == (0, 1)
    assert set(widgets.range_slider(np.array([-0.05, 3.0, np.inf]), (0.0, 1.0)).items()) == {
        ("min", -0.05),
        ("max", 3.0),
        ("step", 0.01),
        ("value", (0.0, 1.0)),
    }


def test_colours_of_features_are_their_principal_components():
    r = np.random.default_rng(0)
    features = (r.normal(size=(5, 2, 3, 4)) * np.array([5, 3, 2, 1, 0.1])[:, None, None, None]).astype(np.float32)
    parts, share = feature_maps.voxel_components(features)
    theirs = PCA(3).fit(features.reshape(5, -1).T)
    assert share == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-5)
    np.testing.assert_allclose(
        np.abs(parts.reshape(-1, 3)), np.abs(theirs.transform(features.reshape(5, -1).T)), atol=1e-3
    )
    flat, nothing = feature_maps.voxel_components(np.ones((2, 1, 2, 2)))
    assert nothing == 0 and not flat.any() and flat.shape == (1, 2, 2, 3)
    shades, _ = feature_maps.colour_map(features, (4, 3, 8))
    assert (
        shades.shape == (4, 3, 8, 3)
        and (shades[0] == shades[1]).all()
        and (shades[:, :, 0] == shades[:, :, 1]).all()
        and (shades[1] != shades[2]).any()
    )
    assert (
        shades.min() == 0
        and shades.max() == 255
        and np.argmax(shades[::2, :, ::2, 0]) == np.argmax(parts[..., 0].clip(*np.percentile(parts[..., 0], [2, 98])))
    )
    with pytest.raises(Exception, match="not finite"):
        feature_maps.voxel_components(np.full((2, 1, 2, 2), np.nan))


def test_a_pyramid_is_drawn_level_by_level():
    r = np.random.default_rng(1)
    view = feature_maps.feature_viewer(
        r.random((2, 4, 8)),
        {"fine": r.random((3, 2, 4, 8)), "coarse": r.random((2, 1, 2, 2))},
        "Features",
        (3.0, 2.0, 1.0),
    )
    assert view.labels[1].startswith("coarse, 2 features, 1 x 2 x 2 voxels, ") and view.level.options == tuple(
        (t, i) for i, t in enumerate(view.labels)
    )
    fine = view.scene.pixels("image", "axial", 0, 1.0, (), 0.5)
    assert (fine[:, :4] == view.scene.maps[0][0][:, :4]).all() and (
        fine[:, 4:] == view.scene.pixels("image", "axial", 0, 0.0)[:, 4:]
    ).all()
    view.level.value = 1
    assert (view.scene.pixels("image", "axial", 0, 1.0) == view.scene.maps[1][0]).all()
    svg = view.figure()._repr_html_()
    pictures = re.findall(
        r'<image x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"[^>]*base64,([^"]+)"', svg
    )
    places = [tuple(map(float, p[:4])) for p in pictures]
    assert (
        len(places) == 6 and [p[0] for p in places[:2]] == [150, 270] and {p[2:] for p in places} == {(116, 116)}
    )  # 4 x 2 mm by 8 x 1 mm
    assert np.diff([p[1] for p in places[::2]]).tolist() == [120, 120] and "slice 1 of 2" in svg
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[2][4])))).shape == (4, 8, 3)


# --- the machine


def test_the_doctor_counts_in_gib(tmp_path, monkeypatch):
    import psutil
    from vfm_notes.runs import executors

    monkeypatch.setenv("VFM_RUNS", str(tmp_path / "not" / "there"))
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path))
    (tmp_path / "w.safetensors").write_bytes(bytes(3 << 20))

    def said(free, disk, gpus=()):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free * 2**30, total=16 * 2**30))
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=disk * 2**30))
        monkeypatch.setattr(executors, "found_devices", lambda: list(gpus))
        return {c.name: (c.state, c.found) for c in doctor.check_machine()}

    good, little = said(3, 6, [executors.Device("0", "0", 40.0)]), said(1.5, 4)
    assert (
        good["memory"] == ("ok", "3.0 of 16.0 GiB free")
        and good["disk"][0] == "ok"
        and good["disk"][1].startswith("6.0 GiB free")
        and good["GPUs"] == ("ok", "0 (40 GiB free)")
    )
    assert [little[k][0] for k in ("memory", "disk", "GPUs")] == ["note"] * 3 and little["memory"][
        1
    ] == "1.5 of 16.0 GiB free"
    folders = {c.name: (c.state, c.found) for c in doctor.check_folders()}
    assert folders["weights"] == ("ok", f"1 files, 3 MiB in {tmp_path}") and folders["VFM_DATA"][0] == "note"


def test_the_last_line_counts_every_run(capsys):
    from vfm_notes.runs.batch import Summary

    def told(**more):
        cli.print_summary(Summary("s", **more))
        return capsys.readouterr().out.splitlines()[-1]

    assert (
        told(done=3, ran=1, missing=["a", "b"], skipped={"j": "no"}, seconds=61.0)
        == "Study s: 3 of 6 runs done, 1 skipped, 1 min 01 s."
    )
    assert (
        told(done=3) == "Study s: everything is up to date (3 of 3 runs done)."
        and told(done=1, failed={"a": "E"}) == "1 of 2 runs of study s failed. To try again: vfm run s --retry-failed"
    )


def test_the_doctor_hears_what_a_cluster_says(tmp_path, monkeypatch):
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'gpu up 4 nodes'; echo 'cpu up 9 nodes'\n")
    slurm = lambda: next((c.state, c.found) for c in doctor.check_programs() if c.name == "slurm")
    monkeypatch.setattr(doctor, "check_renderer", lambda: doctor.Check("renderer", "ok", ""))
    assert slurm() == ("ok", "gpu up 4 nodes; cpu up 9 nodes")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho first >&2; echo no controller >&2; exit 1\n")
    assert slurm() == ("note", "sinfo does not answer: no controller")
