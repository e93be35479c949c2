"""A pretraining that goes on from weights that exist already."""
import json
from dataclasses import replace

import pytest
import torch

from test_plan import CASES, SIZE, SPACING, SPEC, carry, made, places  # noqa: F401 (fixtures)
from vfm_notes.backbones.plan import known_fingerprints, state_hash
from vfm_notes.data.loader import normalise
from vfm_notes.foundation.registry import VfmError
from vfm_notes.foundation.spec import StudySpec, canonical_text, run_id
from vfm_notes.pretrain.loop import pretrain
from vfm_notes.pretrain.loop import weights_manifest
from vfm_notes.tune import starting_weights, study_names
from vfm_notes.tune.transfer import run_cohort

ON = replace(SPEC, backbone="profound_toy.further", start="profound_toy.mine", objective="autoencoding", epochs=1)


def study(**changes):
    weights = {"further": {"backbone": "profound_toy", "objective": "autoencoding", "epochs": 1} | changes}
    return StudySpec(
        name="s", title="S", cohort="phantom", size=SIZE, spacing=SPACING, cases=CASES,
        backbones=["profound_toy.further"], tasks={"segmentation": {}}, strategies=["full"], seeds=[0],
        pretrain=weights,
    )


def test_a_start_has_a_name_of_its_own():
    assert json.loads(canonical_text(SPEC))["start"] == "" != json.loads(canonical_text(ON))["start"]
    assert run_id(replace(SPEC, start="profound_toy.other")) != run_id(SPEC)


def test_it_begins_where_the_weights_are(made, places):
    carry(made, places)
    begin, seen = starting_weights.initial_weights(ON, "s"), run_cohort(ON).subset("pretrain")
    assert state_hash(begin.state) == made[1].weights_hash
    volumes = torch.from_numpy(normalise(seen.volumes))
    still = pretrain(replace(ON, lr=1e-12, weight_decay=0.0), volumes, None, 3, state=begin.state).backbone.state_dict()
    assert all(torch.allclose(v, begin.state[k], atol=1e-6) for k, v in still.items())
    moved = pretrain(ON, volumes, None, 3, state=begin.state)
    assert any(not torch.allclose(v, begin.state[k], atol=1e-6) for k, v in moved.backbone.state_dict().items())


def test_its_plan_names_the_parent_and_carries_licences_and_patients(made, places):
    carry(made, places, licences=("CC BY-NC 4.0",))
    begin = starting_weights.initial_weights(ON, "s")
    begin.patients["another key"] = ["somebody-else"]
    seen = run_cohort(ON).subset("pretrain")
    result = pretrain(ON, torch.from_numpy(normalise(seen.volumes)), None, 3, state=begin.state)
    plan = weights_manifest(ON, "s", seen, {"how": "zscore_nonzero"}, result, begin)
    assert plan.parent == "profound_toy.mine" and plan.licences == ("CC BY-NC 4.0", seen.card.licence)
    assert plan.data["patients"] == {"another key": ["somebody-else"]} | known_fingerprints(
        seen.card.name, seen.patients
    )


def test_weights_that_have_seen_the_judges_are_refused(made, places):
    judged = run_cohort(ON).subset("test")
    carry(made, places, data=made[1].data | {"patients": known_fingerprints(judged.card.name, judged.patients[:1])})
    with pytest.raises(VfmError, match="patients that this run is judged on were in the pretraining"):
        starting_weights.initial_weights(ON, "s")


def test_a_start_that_was_not_given_is_an_error():
    volumes = torch.randn(8, 3, *SIZE)
    with pytest.raises(VfmError, match="begins with the weights 'profound_toy.mine', which were not given"):
        pretrain(ON, volumes, None, 3)


@pytest.mark.parametrize(
    "start, told",
    [
        ("provicnet_toy.mine", "which is another architecture"),
        ("profound_toy.further", "which this study makes itself"),
        ("profound_toy.nowhere", "needs weights that its 'pretrain' section does not make"),
    ],
)
def test_a_study_is_refused_before_it_runs(start, told, places):
    with pytest.raises(VfmError, match=told): study_names.check_names(study(start=start))


def test_a_study_may_go_on_from_carried_weights(made, places):
    carry(made, places)
    study_names.check_names(study(start="profound_toy.mine"))
    study_names.check_names(study())
