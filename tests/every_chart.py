"""Every chart that the package draws, of one made-up study: for tests that look at all of them."""
import time

import altair as alt
import pandas as pd

from vfm_notes.analysis.association import cell_points, run_points
from vfm_notes.analysis.convergence import convergence_table, reached_curves, run_convergence
from vfm_notes.analysis.crossed import crossed_association
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.power import plan
from vfm_notes.analysis.prediction import prediction_table
from vfm_notes.analysis.tables import Tables
from vfm_notes.foundation.spec import load_study
from vfm_notes.report import curves, evidence, explorer, figures, explorer as live, curves as measured

STUDY_METRICS = {
    "classification": "auc", "segmentation": "dice", "super_resolution": "psnr", "distortion_correction": "psnr",
    "translation": "psnr",
}
PARTS = {"with_title", "curve_panel", "place_cells", "_plan_panel"}  # of other charts


def every_chart(tables: Tables) -> dict[str, alt.TopLevelMixin]:
    "Name of the function → its chart."
    gains, done, moved = gain_table(tables), tables.done(), tables.curves[tables.curves.name == "d2p_embed"]
    cells, metrics = cell_points(tables, gains), done.drop_duplicates("task").set_index("task").metric.to_dict()
    first = convergence_table(tables).query("rule == 'rise'")
    first = first.assign(value=first.epochs, low=first.epochs_low, high=first.epochs_high)
    costs = {r["kind"]: r for r in measured.read_measurements("backbone_costs.json")}["cpu"]
    losses = tables.curves[tables.curves.name == "loss"].assign(
        id=lambda t: t.backbone + t.strategy + t.seed.astype(str)
    )
    lens = pd.DataFrame([
        dict(task="segmentation", backbone=b, strategy="full", family=f, n_seeds=2, n_cases=20, random=0.1, before=0.4,
             after=0.3) for b in done.backbone.unique() for f in ("shape", "texture")
    ])
    told = [(e, 3.0 * e, name, value / e) for e in (1, 2) for name, value in (("loss", 0.9), ("val_dice", 0.4))]
    picks = prediction_table(tables, draws=20).query("counts")
    return {
        "gain_matrix": figures.gain_matrix(gains),
        "alignment_scatter": figures.alignment_scatter(cells, crossed_association(cells, draws=100)),
        "distance_layers": figures.distance_layers(tables.d2p[tables.d2p.strategy != "scratch"], "t", "s"),
        "dot_chart": curves.dot_chart(first, "epochs"),
        "cost_chart": curves.cost_chart(done, "t", "s"),
        "curve_panels": curves.curve_panels(moved, "t", "s", {t: "MMD²" for t in moved.task.unique()}),
        "trajectories": curves.trajectories(tables.curves, metrics, "t", "s"),
        "reached_panels": curves.reached_panels(reached_curves(run_convergence(tables)), "t", "s"),
        "hits_chart": evidence.hits_chart(picks, "t", "s"),
        "moment_panels": evidence.moment_panels(evidence.distances_at(tables.d2p, tables.moments), "t", "s"),
        "seed_panels": evidence.seed_panels(run_points(tables), "t", "s"),
        "cost_of_backbones": measured.cost_of_backbones(measured.cost_frame(costs, {"profound_toy": "x"}), "t", "s"),
        "lens_panels": evidence.lens_panels(lens, "t", "s"),
        "plan_chart": evidence.plan_chart(plan(load_study("phantom"), STUDY_METRICS)),
        "curve_chart": explorer.curve_chart(losses, "loss"),
        "training_chart": live.training_chart([live.RunningTraining("toy", 8, told, time.time())])}
