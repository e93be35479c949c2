"""Changes that once passed every test, as text: module, what stands there, what stands there instead, in words."""

NAMED = [
    # --- direction ---
    ("tune/metric.py", '"95 % Hausdorff distance", -1', '"95 % Hausdorff distance", 1', "HD95: higher is better"),
    (
        "tune/metric.py",
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
    (
        "tune/lora.py",
        'p.requires_grad_(".lora_" in name)',
        "p.requires_grad_(True)",
        "LoRA trains everything",
    ),
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
        "usual = one_hot(train.target, len(self.classes))",
        "usual = one_hot(test.target, len(self.classes))",
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
        "wide = np.repeat(target[:, None], inputs.shape[1], 1)\n"
        "        x, y = standardise(inputs, *moments(wide)), standardise(target[:, None], *moments(like[:, None]))",
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
        "scale = rearrange(extent(reference)",
        "scale = rearrange(extent(predicted)",
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
]
