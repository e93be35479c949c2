"""Changes that once passed every test, as text: module, what stands there, what stands there instead, in words."""

NAMED = [
    # --- direction ---
    (
        "foundation/quantity.py",
        '"95 % Hausdorff distance", -1',
        '"95 % Hausdorff distance", 1',
        "HD95: higher is better",
    ),
    (
        "foundation/quantity.py",
        '"mean absolute error", -1',
        '"mean absolute error", 1',
        "mean absolute error: higher is better",
    ),
    (
        "tune/transfer.py",
        "(good := score * METRICS[self.task.primary].direction)",
        "(good := score)",
        "best epoch without its sign",
    ),
    ("tune/fit.py", "math.nan) * self.direction", "math.nan)", "weights of the best epoch without its sign"),
    # --- strategies ---
    ("tune/lora.py", 'p.requires_grad_(".lora_" in name)', "p.requires_grad_(True)", "LoRA trains everything"),
    (
        "tune/lora.py",
        "lora_alpha=rank if alpha is None else alpha",
        "lora_alpha=1 if alpha is None else alpha",
        "LoRA's scaling",
    ),
    ("tune/lora.py", 'layer.scaling["default"] * torch', "1.0 * torch", "merged without the scaling"),
    (
        "tune/probe.py",
        "near = nn.functional.normalize(vector, dim=1) @ nn.functional.normalize(self.bank, dim=1).T",
        "near = vector @ self.bank.T",
        "kNN without normalisation",
    ),
    ("tune/strategy.py", "before and before + 1", "before", "what lies between blocks counts as the earlier one"),
    (
        "tune/strategy.py",
        "last = max(last, block.get(name, 0))",
        "last = 0",
        "all that is no block lies before the blocks",
    ),
    # --- wiring of a run ---
    (
        "tune/transfer.py",
        "weights_hash or spec.seed,",
        "weights_hash,",
        "features of a random encoder shared by all seeds",
    ),
    (
        "tune/transfer.py",
        'if not weights_hash: settle(model.backbone, data["train"]',
        'if False: settle(model.backbone, data["train"]',
        "batch norms never settled",
    ),
    (
        "tune/transfer.py",
        'for k in ("train", "val"))).to_dict',
        'for k in ("train", "test"))).to_dict',
        "scores look at test cases",
    ),
    (
        "tune/transfer.py",
        'self.answer("val"), self.data["val"]',
        'self.answer("test"), self.data["test"]',
        "validated on test cases",
    ),
    (
        "tune/transfer.py",
        'task.evaluate(watch.answer("test"), data["test"])',
        'task.evaluate(watch.answer("val"), data["val"])',
        "tested on validation cases",
    ),
    (
        "tune/transfer.py",
        'task.control(data["train"], data["test"])',
        'task.control(data["test"], data["test"])',
        "the control is fitted to the test cases",
    ),
    (
        "tune/transfer.py",
        "torch.manual_seed(spec.seed)\n    backbone",
        "torch.manual_seed(0)\n    backbone",
        "one network for all seeds",
    ),
    (
        "tune/transfer.py",
        "distance_to_pretraining(watch.before, watch.after",
        "distance_to_pretraining(watch.after, watch.before",
        "distance standardised by the tuned features",
    ),
    ("tune/fit.py", "spec.batch_size, spec.seed, last", "spec.batch_size, 0, last", "order of batches not seeded"),
    (
        "data/loader.py",
        "default_rng((seed, epoch)).permutation",
        "default_rng((seed, 0)).permutation",
        "the same order in every epoch",
    ),
    (
        "tune/task.py",
        "usual = class_masks(train.target, len(self.classes))",
        "usual = class_masks(test.target, len(self.classes))",
        "the trivial mask is made from test labels",
    ),
    (
        "tune/case_task.py",
        "statistics_reader(train, train.target.numpy()), test",
        "statistics_reader(test, test.target.numpy()), test",
        "the trivial control reads test labels",
    ),
    (
        "tune/image_task.py",
        "guess = train.target.mean(0, keepdim=True)",
        "guess = test.target.mean(0, keepdim=True)",
        "the average image is that of the test cases",
    ),
    (
        "tune/image_task.py",
        "x, y = self.scale(inputs), standardise(target[:, None], *moments(like[:, None]))",
        "wide = np.repeat(target[:, None], inputs.shape[1], 1)\n        x, y = standardise(inputs, "
        "*moments(wide)), standardise(target[:, None], *moments(like[:, None]))",
        "the target's scale leaks into the inputs",
    ),
    (
        "tune/image_task.py",
        "*moments(like[:, None]))",
        "*moments(target[:, None]))",
        "the target is standardised by itself",
    ),
    (
        "tune/metric.py",
        "scale = rearrange(intensity_range(reference)",
        "scale = rearrange(intensity_range(predicted)",
        "SSIM scaled by the prediction's range",
    ),
    (
        "tune/metric.py",
        "include_background=False).numpy()",
        "include_background=False, ignore_empty=False).numpy()",
        "Dice of a class that is not there counts",
    ),
    (
        "tune/task.py",
        "np.where(seen, values, 0).sum(1)/np.maximum(seen.sum(1), 1)",
        "np.where(seen, values, 0).mean(1)",
        "an absent class counts as 0",
    ),
    (
        "pretrain/contrast.py",
        "(1 - self.a) * segmentation + self.a * contrast",
        "self.a * segmentation + (1 - self.a) * contrast",
        "the two terms of ProViCNet's objective swapped",
    ),
    (
        "backbones/provicnet.py",
        "torch.cat([self.axis_pos(j), self.axis_max(n)], 1)",
        "torch.cat([self.axis_pos(n), self.axis_max(j)], 1)",
        "number of a slice and number of slices swapped",
    ),
    (
        "nets/vit.py",
        '"b (h w) e -> b e h w", h=side',
        '"b (w h) e -> b e h w", h=side',
        "position table read by columns",
    ),
    (
        "tune/task.py",
        "return card.sequences.index(sequence)",
        "return sorted(card.sequences).index(sequence)",
        "channels sorted instead of named",
    ),
    # --- names and keys ---
    (
        "foundation/spec.py",
        'LOOKS = {"probe_every"}',
        'LOOKS = {"probe_every", "precision"}',
        "run id without the precision",
    ),
    (
        "foundation/spec.py",
        'LOOKS = {"probe_every"}',
        'LOOKS = {"probe_every", "options"}',
        "run id without the options",
    ),
    ("data/cache.py", "plan.size, plan.card.spacing, plan", "plan.size, plan", "cache key without the spacing"),
    (
        "data/cache.py",
        "p.stat().st_size, p.stat().st_mtime_ns]",
        "p.stat().st_size]",
        "cache key without the time of a file",
    ),
    # --- distances ---
    (
        "shift/features.py",
        "mean, sd = before.mean(0), before.std(0, correction=0)",
        "mean, sd = after.mean(0), after.std(0, correction=0)",
        "standardised by the tuned features",
    ),
    (
        "shift/features.py",
        "two_sample_test(a, b, paired=True",
        "two_sample_test(a, b, paired=False",
        "a pooled test of pairs",
    ),
    # --- direction, in analysis and report ---
    ("analysis/contrasts.py", "interval(direction * (a - b)", "interval((a - b)", "contrasts without their direction"),
    (
        "analysis/contrasts.py",
        "interval(rpg(a, b, direction)",
        "interval(rpg(b, a, direction)",
        "a contrast's gain: sides swapped",
    ),
    (
        "analysis/contrasts.py",
        '" (positive: less, which is better)" if known.direction.iloc[0] < 0',
        '" (positive: less, which is better)" if known.direction.iloc[0] > 0',
        "contrast's hint at less is better turned round",
    ),
    (
        "analysis/tradeoff.py",
        "front=pareto_front(mean(c), sign * mean(s))",
        "front=pareto_front(mean(c), mean(s))",
        "front without the direction",
    ),
    (
        "analysis/tradeoff.py",
        "on += pareto_front(mean(c[:, again]), sign * mean(s[:, again]))",
        "on += pareto_front(mean(c[:, again]), mean(s[:, again]))",
        "share of draws on the front without the direction",
    ),
    (
        "analysis/tradeoff.py",
        'leaders((own["value"] * sign).to_dict())',
        'leaders(own["value"].to_dict())',
        "best cell of the grid without the direction",
    ),
    (
        "analysis/tradeoff.py",
        "{'lower' if sign > 0 else 'higher'}",
        "{'higher' if sign > 0 else 'lower'}",
        "a new run may score better instead of worse",
    ),
    (
        "analysis/search.py",
        'order = table["mean"] * -table.direction',
        'order = -table["mean"]',
        "ranks of a search without the direction",
    ),
    (
        "analysis/search.py",
        'value=g["value"] * g.direction)',
        'value=g["value"])',
        "first of a search without the direction",
    ),
    (
        "analysis/search.py",
        "low, high = np.nanpercentile(taus[1:], [2.5, 97.5])",
        "low, high = np.nanpercentile(taus[1:], [5, 95])",
        "the search's interval is one of 90 %",
    ),
    (
        "analysis/convergence.py",
        "float(direction * np.max(direction * value))",
        "float(np.max(value))",
        "best epoch of a curve without the direction",
    ),
    (
        "analysis/convergence.py",
        "area_more=(runs.area - runs.area_ref) * runs.direction",
        "area_more=runs.area - runs.area_ref",
        "area without the direction",
    ),
    (
        "analysis/convergence.py",
        "sooner=runs.epochs_ref - runs.epochs",
        "sooner=runs.epochs - runs.epochs_ref",
        "sooner is later",
    ),
    (
        "analysis/convergence.py",
        "SHARE * top if direction > 0 else top / SHARE",
        "SHARE * top",
        "95 % of a best distance is less than it",
    ),
    (
        "analysis/gain.py",
        "zip(c.pair.seeds, t, r, rpg(t, r, c.direction))",
        "zip(c.pair.seeds, t, r, rpg(r, t, c.direction))",
        "gain of a seed: sides swapped",
    ),
    ("analysis/gain.py", "rpg(t, r, c.direction)", "rpg(t, r)", "gain of a seed without the direction"),
    (
        "analysis/gain.py",
        "return rpg(t, r, pair.direction)",
        "return rpg(t, r)",
        "gain of a cell without the direction",
    ),
    ("analysis/gain.py", "p[i] * (len(order) - k)", "p[i] * (len(order) - 1)", "Holm's steps are all the same"),
    (
        "analysis/association.py",
        "r = rankdata(x[blocks == b])",
        "r = rankdata(x)[blocks == b]",
        "ranks not within blocks",
    ),
    (
        "analysis/association.py",
        ".random((draws, len(blocks))) + blocks, axis=1)",
        ".random((draws, len(blocks))), axis=1)",
        "orders not within blocks",
    ),
    (
        "analysis/crossed.py",
        "index = np.stack([at[a][:, b][r, c, l]",
        "index = np.stack([at[a][r, c, l]",
        "only rows are exchanged",
    ),
    # --- words and colours ---
    (
        "analysis/findings.py",
        '(-1, "Largest loss", known[known.high < 0])',
        '(-1, "Largest loss", known[known.low < 0])',
        "an undecided cell is named as the largest loss",
    ),
    ("analysis/findings.py", "told_p(row.p_holm, of)", "told_p(row.p, of)", "an uncorrected p called corrected"),
    (
        "analysis/findings.py",
        "up, down, n = int((known.low > 0).sum()), int((known.high < 0).sum()), len(known)",
        "up, down, n = int((known.rpg > 0).sum()), int((known.rpg < 0).sum()), len(known)",
        "every gain is counted as clear",
    ),
    (
        "analysis/findings.py",
        'leaders((way * clear.rpg).to_dict())',
        'leaders((-way * clear.rpg).to_dict())',
        "the smallest clear gain is named as the largest",
    ),
    (
        "analysis/findings.py",
        "'later' if text[0] == '−' else 'sooner'",
        "'sooner' if text[0] == '−' else 'later'",
        "sooner and later swapped",
    ),
    (
        "analysis/findings.py",
        "sooner in {int((t.sooner > 0).sum())} cells",
        "sooner in {int((t.sooner < 0).sum())} cells",
        "cells that are sooner counted by those later",
    ),
    (
        "analysis/association.py",
        "'more' if a.rho > 0 else 'less'",
        "'less' if a.rho > 0 else 'more'",
        "more and less swapped in words",
    ),
    (
        "analysis/crossed.py",
        "bool(self.p <= 0.05 and (self.low > 0 or self.high < 0))",
        "bool(self.low > 0 or self.high < 0)",
        "an association is shown by the interval alone",
    ),
    ("analysis/crossed.py", "(self.low > 0 or self.high < 0))", "True)", "an association is shown by the test alone"),
    (
        "analysis/tradeoff.py",
        "clear = known[(known.p_holm <= 0.05)",
        "clear = known[(known.p <= 0.05)",
        "steps along an axis are clear by the uncorrected p",
    ),
    (
        "analysis/tradeoff.py",
        "(clear.difference > 0).sum()), int((clear.difference < 0).sum())",
        "(clear.difference < 0).sum()), int((clear.difference > 0).sum())",
        "better and worse along an axis swapped",
    ),
    (
        "analysis/contrasts.py",
        "int((known.p_holm <= 0.05).sum())",
        "int((known.p <= 0.05).sum())",
        "contrasts kept by the uncorrected p",
    ),
    (
        "analysis/contrasts.py",
        "up, down, n, kept = int((known.low > 0).sum())",
        "up, down, n, kept = int((known.difference > 0).sum())",
        "every contrast above 0 is clear",
    ),
    ("report/figures.py", "bool(a > 0 or b < 0) for a, b", "bool(a > 0) for a, b", "a clear loss is not bold"),
    (
        "report/figures.py",
        '["gain", "loss"], "none")',
        '["loss", "gain"], "none")',
        "colours of gain and loss swapped in the cells",
    ),
    (
        "report/figures.py",
        'domain=["gain", "loss", "none"]',
        'domain=["loss", "gain", "none"]',
        "colours of gain and loss swapped in the chart",
    ),
    (
        "report/figures.py",
        'transform_filter("!datum.clear")',
        'transform_filter("datum.clear")',
        "cells that are not clear are left out",
    ),
    (
        "report/figures.py",
        'transform_filter("datum.clear")',
        'transform_filter("!datum.clear")',
        "bold where nothing is clear",
    ),
    ("report/figures.py", "zip(out.p_holm, of)", "zip(out.p, of)", "the matrix tells the uncorrected p"),
    (
        "report/figures.py",
        "clear = int((known.low > 0).sum())",
        "clear = int((known.rpg > 0).sum())",
        "every gain of the title is clear",
    ),
    (
        "report/figures.py",
        "if not c.shown: return",
        "if not (c.low > 0 or c.high < 0): return",
        "the title shows an association by the interval alone",
    ),
    (
        "report/figures.py",
        "gained {'more' if a.rho > 0 else 'less'}",
        "gained {'less' if a.rho > 0 else 'more'}",
        "more and less swapped in the title",
    ),
    # --- files ---
    (
        "foundation/disk.py",
        "if new: os.rename(new, folder)",
        "if new: shutil.copytree(new, folder)",
        "a record is copied to its place, not renamed",
    ),
    (
        "runs/record.py",
        "        fsync(path)\n        found = path.stat()",
        "        found = path.stat()",
        "companions not synced",
    ),
    ("foundation/disk.py", "if synced: fsync(part)", "pass", "a file not synced"),
    ("foundation/disk.py", "if synced: fsync(path.parent)", "pass", "a file's name not synced"),
    ("foundation/disk.py", "    if new: fsync(new)\n", "", "a folder not synced"),
    (
        "foundation/disk.py",
        "os.rename(new, folder)\n    fsync(folder.parent)",
        "os.rename(new, folder)",
        "the renaming not synced",
    ),
    (
        "foundation/disk.py",
        "for p, m in found if not lives(int(m[2]))]",
        "for p, m in found]",
        "parts of living writers are swept",
    ),
    (
        "foundation/disk.py",
        "{re.escape(socket.gethostname())}",
        ".+",
        "parts of other machines are swept",
    ),
]

# Changes that change nothing that can be seen, by module and changed line, and why.
EQUIVALENT = {
    (
        "analysis/mixed.py",
        "starts = sorted(product(*[(0.6, 1.0, 4.0, 16.0, 64.0)] * len(free)), key=goal)[:2]  # the "
        "likelihood can have several tops",
    ): "another start of the search climbs to the same top",
    (
        "analysis/mixed.py",
        "starts = sorted(product(*[(0.3, 1.0, 8.0, 16.0, 64.0)] * len(free)), key=goal)[:2]  # the "
        "likelihood can have several tops",
    ): "another start of the search climbs to the same top",
    (
        "runs/launch.py",
        "lost = helpers.lost(10.0)",
    ): "a longer wait for helpers that are lost; what is done with them is the same",
    (
        "tune/image_task.py",
        "guess = train.target.mean(0, keepdim=False).expand_as(test.target) if self.residual is Non"
        "e else test.inputs[:, -1:]",
    ): "the mean image is spread over the cases with or without the axis of length 1",
    (
        "tune/case_task.py",
        "return self.rows(predict_class_scores(statistics_reader(train, train.target.numpy()), test, len(se"
        "lf.card.grades)).softmax(1).numpy(), test)",
    ): "of two axes the last is the second",
    (
        "report/figures.py",
        'opacity=alt.Opacity("size:Q", legend=None, scale=alt.Scale(type="sqrt", domain=[0, top], r'
        "ange=[0.06, 1.24])))",
    ): "how strong the colour of a tile can be; its order and sign are tested, its looks are not",
    (
        "report/figures.py",
        'least = 12 + 6.4 * max(len(part) for row in order for part in row.split(", ")) + data.colu'
        "mn.nunique() * (8 + 12.4 * max(map(len, data.interval)))  # narrower, the words would over"
        "lap",
    ): "room for words on a narrow screen, a matter of looks",
    (
        'report/live.py',
        'def __init__(self, study: str = "", every: float = 4.0):',
    ): "live_training always says how often",
}
