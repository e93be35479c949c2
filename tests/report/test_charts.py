"""The report's charts on a made-up study of six strategies: valid, complete, and drawn by the same library as in the
browser."""
import inspect
import json
import re

import altair as alt
import pandas as pd
import pytest
import vl_convert
from every_chart import PARTS, every_chart
from fake_runs import write_study
from vfm_notes.analysis.convergence import reached_curves, run_convergence
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.tables import load_tables
from vfm_notes.foundation.blocks import VEGALITE_MIME, chart_html, use_charts
from vfm_notes.foundation.spec import load_study
from vfm_notes.report import curves, evidence, explorer, figures, explorer as live, curves as measured

SIX = ["scratch", "full", "probe", "decoder", "lora rank=4", "top k=1"]
STUDY = """
name: six
title: Six strategies
cohort: phantom
size: [4, 24, 24]
spacing: [8.0, 4.0, 4.0]
cases: {pretrain: 2, train: 4, val: 2, test: 6}
pretrain: {mae: {backbone: profound_toy, epochs: 2}, contrast: {backbone: provicnet_toy, epochs: 2}}
backbones: [profound_toy.mae, provicnet_toy.contrast]
tasks: {segmentation: {}, translation: {}}
strategies: [scratch, full, probe, decoder, lora rank=4, top k=1]
seeds: [0, 1]
budget: {epochs: 3}
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("six")
        patch.setenv("VFM_RUNS", str(root / "runs"))
        (root / "six.yaml").write_text(STUDY)
        write_study(load_study(str(root / "six.yaml")), failed=1, absent=1)
        return load_tables("six")


@pytest.fixture(scope="module")
def charts(tables):
    "Every chart and its picture."
    return {name: (chart, drawn(chart)) for name, chart in every_chart(tables).items()}


def drawn(chart: alt.TopLevelMixin) -> str:
    "The chart as SVG; a container has no width here."
    spec = chart.to_dict()
    if spec.get("width") == "container": spec["width"] = 500
    return vl_convert.vegalite_to_svg(spec)


def test_six_strategies_are_told_apart():
    assert figures.order_strategies([*SIX[1:], "scratch"])[0] == "scratch"
    for marks, scratch in ((figures.DASHES, [5, 4]), (figures.SHAPES, "circle"), (figures.PALETTE[2:7], "#000")):
        scale = figures.strategy_marks(SIX, marks, scratch)
        assert scale.domain == SIX and len({str(m) for m in scale.range[1:]}) == 5
    assert figures.strategy_marks(["full"], figures.DASHES, [5, 4]).range == [[1, 0]]


def test_matrix_puts_many_strategies_below_each_other(tables):
    gains = gain_table(tables)
    cells = figures.gain_cells(gains)
    assert (
        cells["column"].nunique() == 2
        and cells.groupby(["row", "column"]).size().eq(1).all()
        and cells["row"].nunique() == 2 * 5
    )
    svg = drawn(figures.gain_matrix(gains))
    assert all(s in svg for s in SIX[1:]) and svg.count("missing") >= 1


def test_every_chart_is_drawn(charts):
    made = {
        n
        for module in (figures, curves, evidence, measured, explorer, live)
        for n, f in vars(module).items()
        if inspect.isfunction(f)
        and f.__module__ == module.__name__
        and inspect.isclass(kind := inspect.get_annotations(f, eval_str=True).get("return"))
        and issubclass(kind, alt.TopLevelMixin)
    }
    assert made - PARTS == set(charts), "a chart was added: draw it in every_chart"
    for name, (_, svg) in charts.items(): assert svg.count("<path") > 12 and "NaN" not in svg, name
    for name in ("curve_panels", "trajectories", "reached_panels", "moment_panels", "seed_panels", "dot_chart"):
        assert all(s in charts[name][1] for s in SIX[1:]), name


def test_the_signs_of_a_legend_can_be_seen(tables, charts):
    "None is as pale as a band, and a dash has a colour."
    two, few = run_convergence(tables), tables.curves[tables.curves.strategy.isin(SIX[:2])]
    more = {"with bands": drawn(curves.reached_panels(reached_curves(two[two.strategy.isin(SIX[:2])]), "t", "s")),
            "two ways": drawn(curves.trajectories(few, {"segmentation": "dice", "translation": "psnr"}, "t", "s"))}
    for name, svg in ({name: svg for name, (_, svg) in charts.items()} | more).items():
        signs = [part.partition("</g>")[0] for part in re.split(r"<g[^>]*role-legend-symbol", svg)[1:]]
        assert len(signs) == {"with bands": 2, "two ways": 4}.get(name, len(signs)), name  # ways; backbones and ways
        pale = [o for part in signs for o in re.findall(r'opacity="([\d.]+)"', part) if float(o) < 0.8]
        dashes = [part for part in signs if re.search(r'd="M-[\d.]+,0L[\d.]+,0"', part)]
        assert pale == [] and all(' stroke="' in part for part in dashes), name


def test_a_chart_has_a_width_of_its_own_in_a_notebook_and_all_there_is_in_the_site(charts):
    use_charts()
    for name, (chart, _) in charts.items():
        stored = chart._repr_mimebundle_()[VEGALITE_MIME]
        assert stored.get("width") != "container" and "container" not in json.dumps({
            k: v for k, v in stored.items() if k != "datasets"
        }), name
        assert vl_convert.vegalite_to_svg({k: v for k, v in stored.items() if k != "$schema"}).count("<path") > 12, name
        if chart.to_dict().get("width") == "container":
            assert stored["width"] >= 640 and '"width":"container"' in chart_html(stored, "c"), name


def test_charts_hold_what_the_tables_hold(tables):
    at = evidence.distances_at(tables.d2p, tables.moments)
    own = tables.d2p[
        (tables.d2p.layer == "embed")
        & (tables.d2p.task == "segmentation")
        & (tables.d2p.backbone == "profound_toy.mae")
        & (tables.d2p.strategy == "probe")
    ].mmd2
    row = at[(at.task == "segmentation") & (at.backbone == "profound_toy.mae") & (at.strategy == "probe")].set_index(
        "when"
    )
    assert (
        row.loc["at the end"].value == pytest.approx(own.mean())
        and row.loc["after 5 % of training"].value == pytest.approx(0.2 * own.mean())
        and row.loc["random weights"].value == pytest.approx(2 * own.mean())
    )
    old = evidence.distances_at(tables.d2p, tables.moments[:0])
    assert set(old.when) == {"at the end"} and evidence.distances_at(tables.d2p[:0], tables.moments[:0]).empty


def test_a_large_study_is_drawn_with_few_points():
    many = pd.DataFrame([
        dict(task="segmentation", backbone=b, strategy=s, seed=k, epoch=e, value=float(e + k))
        for b in ("profound_toy.mae", "provicnet_toy.contrast")
        for s in ("scratch", "full")
        for k in range(40)
        for e in range(301)
    ])
    use_charts()
    drawn = curves.curve_panels(many, "t", "s", {"segmentation": "Dice"}).to_dict()
    rows = pd.DataFrame([r for d in drawn["datasets"].values() for r in d])
    assert (
        len(many) == 48160
        and len(rows) == 2 * 2 * curves.EPOCHS
        and set(rows.seed) == {"mean"}
        and {0, 300} <= set(rows.epoch)
    )
    assert (rows.value == rows.epoch + 19.5).all() and "mean of 40 seeds; 60 of 301 epochs" in curves.seed_words(many)
    few = many[many.seed < 3]
    assert len(curves.with_means(curves.fewer_epochs(few))) == 2 * 2 * 4 * curves.EPOCHS and curves.seed_words(
        few
    ).startswith("3 seeds (thin)")
    alt.Chart(many).mark_point().encode(x="epoch:Q").to_dict()  # no limit of 5000 rows
