"""The contract of an objective's card: every registered objective names its recipe in words that a pretraining
understands, and can be built with it."""
import json

import pytest
import torch

import vfm_notes.tune.catalog
from vfm_notes.backbones.profound import profound_vit
from vfm_notes.backbones.provicnet import provicnet_toy
from vfm_notes.foundation.places import report_notebooks
from vfm_notes.foundation.registry import VfmError, objectives
from vfm_notes.foundation.spec import PretrainSpec, run_id
from vfm_notes.pretrain.reconstruction import Autoencoding
from vfm_notes.pretrain.evidence import describe_objective
from vfm_notes.pretrain.loop import objective_card, published_spec, options_of


def check_card(name):
    "What a card promises, held to the class."
    card = objective_card(name)
    assert card.title and card.source and set(card.options) <= set(options_of(name))
    objective = objectives[name](provicnet_toy(), **card.options)
    assert sum(p.numel() for p in objective.parameters()) > sum(p.numel() for p in objective.backbone.parameters())
    spec = published_spec(name, backbone="provicnet_toy.published", size=(4, 32, 32))
    assert (spec.objective, spec.options) == (name, card.options) and all(
        getattr(spec, k) == v for k, v in card.recipe.items()
    )
    assert run_id(spec).startswith("pretrain-provicnet_toy.published")
    batch = {"volumes": torch.randn(2, 3, 4, 32, 32)}
    if card.labels:
        with pytest.raises(VfmError, match="labels"): objective.loss(batch)
    else: assert torch.isfinite(objective.loss(batch)[0])  # labels are not needed when the card does not name them


@pytest.mark.parametrize("name", list(objectives))
def test_contract(name): check_card(name)


@pytest.fixture
def registry():
    "What a test registers is forgotten."
    entries, cards = dict(objectives._entries), dict(objectives._cards)
    yield objectives
    objectives._entries, objectives._cards = entries, cards


def test_one_that_is_registered_here_is_held_to_it_as_well(registry):
    class Mine(Autoencoding):
        "An objective of somebody else."
        def __init__(self, backbone, strength: float = 2.0, **more): super().__init__(backbone, **more)
    registry(
        "mine", title="mine", family="reconstruction", source="here", options=dict(strength=1.0, ssim=0.5),
        recipe=dict(lr=0.1),
    )(Mine)
    check_card("mine")
    assert options_of("mine") == {"strength": 2.0, "ssim": 0.0, "width": None, "kernel": 3}
    registry("wrong", title="wrong", family="reconstruction", source="here", options=dict(strenght=1.0))(
        type("Wrong", (Mine,), {})
    )
    with pytest.raises(AssertionError): check_card("wrong")


@pytest.mark.parametrize(
    "card,said",
    [
        (dict(publised={}), "unknown field 'publised'"), (dict(family="magic"), "'magic' is none of"),
        (dict(shows="films"), "'films' is none of"),
        (dict(title=None, recipe=dict(epoch=3)), "recipe has 'epoch'.*Did you mean 'epochs'"),
        (dict(options={}), "names nothing of the published recipe"), (dict(recipe=dict(seed=1)), "recipe has 'seed'"),
    ],
)
def test_a_card_that_says_nonsense_is_refused(registry, card, said):
    registry("mine", **{"title": "t", "family": "contrast", "source": "s", "options": {"ssim": 1.0}} | card)(
        type("Mine", (Autoencoding,), {})
    )
    with pytest.raises(VfmError, match=said): objective_card("mine")


def test_incomplete(registry):
    registry("mine", title="t")(type("Mine", (Autoencoding,), {}))
    with pytest.raises(VfmError, match="incomplete"): objective_card("mine")


def test_the_words_of_the_facts():
    "Values that the papers' code has (ProFound's script, ProViCNet's loss, the sulcus study's trainers)."
    assert (
        published_spec("masked_reconstruction").epochs == 800
        and published_spec("masked_reconstruction").warmup == 40 / 800
    )
    assert (
        objective_card("patch_contrast").options["anchor_share"] == 62 / 64 and objective_card("patch_contrast").labels
    )
    assert (
        objective_card("diffusion").options["betas"] == (0.005, 0.02)
        and published_spec("diffusion").precision == "fp16"
    )
    objective = objectives["adversarial"](provicnet_toy(), **objective_card("adversarial").options)
    widths = [m.out_channels for m in objective.discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [8, 16, 32, 64, 1] and objective.alternate
    tokens = objectives["masked_tokens"](profound_vit(3, tiny=True), **objective_card("masked_tokens").options)
    assert len(tokens.blocks) == 8 and tokens.embed.out_features == 384


def test_changes_win_over_the_card():
    spec = published_spec("nt_xent", batch_size=4, options={"temperature": 1.0})
    assert spec.batch_size == 4 and spec.epochs == 800 and spec.options == {"temperature": 1.0}
    assert isinstance(spec, PretrainSpec) and spec.objective == "nt_xent"


def test_the_file_beside_the_pages_is_of_today():
    kept = json.loads((report_notebooks()[0].parent/"objectives.json").read_text(encoding="utf-8"))
    assert kept == [describe_objective(n) for n in sorted(objectives)], (
        "write it again: python -c 'import vfm_notes.tune.catalog; from vfm_notes.pretrain.evidence import "
        "write_objectives as w; w()'"
    )
