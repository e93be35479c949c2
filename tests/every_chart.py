"""Every chart that the package draws, of one made-up study: for tests that look at all of them."""
import time

import altair as alt

from vfm_notes.analysis.association import cell_points, run_points
from vfm_notes.analysis.convergence import convergence_table, reached_curves, run_convergence
from vfm_notes.analysis.crossed import crossed
from vfm_notes.analysis.gain import gain_table
from vfm_notes.analysis.prediction import points, prediction_table
from vfm_notes.analysis.tables import Tables
from vfm_notes.report import curves, evidence, explorer, figures, live, measured

PARTS = {"titled", "curve_panel"}  # of other charts


def every_chart(tables: Tables) -> dict[str, alt.TopLevelMixin]:
    "Name of the function → its chart."
    gains, done = gain_table(tables, draws=100), tables.done()
    moved = tables.curves[tables.curves.name == "d2p_embed"]
    reached = convergence_table(tables)
    reached = reached[(reached.rule == "rise")].assign(value=lambda t: t.epochs, low=lambda t: t.epochs_low, high=lambda t: t.epochs_high)
    cells, metrics = cell_points(tables, gains), done.drop_duplicates("task").set_index("task").metric.to_dict()
    costs = measured.cost_frame({r["kind"]: r for r in measured.kept("backbone_costs.json")}["cpu"], {"profound_toy": "reconstruction"})
    run = tables.curves[tables.curves.name == "loss"].assign(id=lambda t: t.backbone + t.strategy + t.seed.astype(str))
    training = live.Training("toy", 8, [(e, 3.0 * e, name, value / e) for e in (1, 2) for name, value in (("loss", 0.9), ("val_dice", 0.4))], time.time())
    return {"gain_matrix": figures.gain_matrix(gains), "alignment_scatter": figures.alignment_scatter(cells, crossed(cells, draws=100)),
            "distance_layers": figures.distance_layers(tables.d2p[tables.d2p.strategy != "scratch"], "t", "s"), "dots": figures.dots(reached, "epochs"), "cost_chart": figures.cost_chart(done, "t", "s"),
            "curve_panels": curves.curve_panels(moved, "t", "s", {t: "MMD²" for t in moved.task.unique()}), "trajectories": curves.trajectories(tables.curves, metrics, "t", "s"),
            "reached_panels": curves.reached_panels(reached_curves(run_convergence(tables)), "t", "s"), "score_panels": evidence.score_panels(points(tables, gains), "t", "s"),
            "regret_chart": evidence.regret_chart(prediction_table(tables, draws=20).query("counts"), "t", "s"), "moment_panels": evidence.moment_panels(evidence.distances_at(tables.d2p, tables.moments), "t", "s"),
            "seed_panels": evidence.seed_panels(run_points(tables), "t", "s"), "cost_of_backbones": measured.cost_of_backbones(costs, "t", "s"),
            "curve_chart": explorer.curve_chart(run, "loss"), "training_chart": live.training_chart([training])}
