"""The front door: what a researcher needs, by name and by tab, and nothing heavy before it is used."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vfm_notes

NAMES = [
    "distance_to_pretraining", "gain", "load_backbone", "load_cohort", "load_study", "mmd2", "run_study",
    "two_sample_test",
]
INIT = Path(vfm_notes.__file__)


def fresh(program: str, *options: str) -> subprocess.CompletedProcess:
    "A process that has imported nothing."
    return subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, cwd=INIT.parents[1]
    )


def test_the_door_itself_imports_nothing():
    seen = [
        set(re.findall(r"\| +([\w.]+)$", fresh(p, "-X", "importtime").stderr, re.M))
        for p in ("pass", "import vfm_notes; dir(vfm_notes)")
    ]
    assert seen[1] - seen[0] == {"vfm_notes"}


def test_tab_completion_lists_every_name():
    done = fresh("import vfm_notes, rlcompleter; c = rlcompleter.Completer({'vfm_notes': vfm_notes}).complete\n"
                 "for i in range(99):\n    if (found := c('vfm_notes.', i)) is None: break\n    print(found)")
    listed = {line.removeprefix("vfm_notes.").split("(")[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and set(NAMES) <= listed, done.stderr


@pytest.mark.parametrize("name,heavy", [("load_study", False), ("gain", False), ("run_study", False), ("mmd2", True)])
def test_a_name_imports_torch_only_where_it_computes_with_it(name, heavy):
    done = fresh(
        f"import sys, vfm_notes; assert callable(vfm_notes.{name}); print('torch' in sys.modules, 'monai' in "
        "sys.modules)"
    )
    assert done.stdout.split() == [str(heavy), "False"], done.stderr


def test_a_backbone_needs_no_catalog_first():
    done = fresh(
        "import vfm_notes, torch; net = vfm_notes.load_backbone('profound_toy'); print(net.in_channels, "
        "net.embed(torch.zeros(1, 3, 8, 32, 32)).shape[1] == net.embed_dim)"
    )
    assert done.stdout.split() == ["3", "True"], done.stderr


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_backbon'"): getattr(vfm_notes, "load_" + "backbon")
    with pytest.raises(ImportError): exec("from vfm_notes import nothing_of_this_name")


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_argument_with_its_comment(name):
    "As the source has them: the comment of each line of the signature stands in what `?` shows."
    function = getattr(vfm_notes, name)
    source = Path(sys.modules[function.__module__].__file__).read_text(encoding="utf-8")
    node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    for a in [*node.args.args, *node.args.kwonlyargs]:
        comment = source.splitlines()[a.lineno - 1].partition("#")[2].strip()
        assert comment and re.search(rf"\b{a.arg}:.*# {re.escape(comment)}$", function.__doc__, re.M), a.arg
    assert function.__doc__.count(f"def {name}(") == 1


def test_editors_see_what_is_imported_lazily():
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and n.test.id == "TYPE_CHECKING")
    shown = {a.name: n.module for n in block.body for a in n.names}
    assert shown == vfm_notes._MODULES and sorted(shown) == NAMES == vfm_notes.__all__


def test_distance_between_backbones_is_that_of_their_features():
    "Against the statistic written out: standardised by the pretrained features, median bandwidth, no case with itself."
    torch.manual_seed(0)
    before, after = vfm_notes.load_backbone("profound_toy", 1), vfm_notes.load_backbone("profound_toy", 1)
    volumes = torch.randn(6, 1, 8, 32, 32)
    table = vfm_notes.distance_to_pretraining(before, after, volumes, permutations=9)
    with torch.no_grad(): x, y = (net.eval().embed(volumes).double().numpy() for net in (before, after))
    x, y = (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)
    pooled, n = np.concatenate([x, y]), len(x)
    squared = ((pooled[:, None] - pooled) ** 2).sum(2)
    kernel = np.exp(-squared / np.median(squared[np.triu_indices(2 * n, 1)]))
    off = ~np.eye(n, dtype=bool)
    wanted = (kernel[:n, :n][off] + kernel[n:, n:][off] - 2 * kernel[:n, n:][off]).mean()
    assert table.layer.iloc[-1] == "embed" and table.mmd2.iloc[-1] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(vfm_notes.foundation.registry.VfmError, match="needs volumes"):
        vfm_notes.distance_to_pretraining(before, after)


@pytest.mark.parametrize(
    "score,reference,metric,percent",
    [(0.9, 0.8, "dice", 12.5), (4.0, 5.0, "hd95", 20.0), (0.5, 0.4, "mae", -25.0), (0.4, 0.5, "auc", -20.0)],
)
def test_gain_is_positive_where_the_metric_got_better(score, reference, metric, percent):
    assert vfm_notes.gain(score, reference, metric) == pytest.approx(percent)
    with pytest.raises(vfm_notes.foundation.registry.VfmError, match=f"Did you mean '{metric}'"):
        vfm_notes.gain(score, reference, f"{metric}x")
