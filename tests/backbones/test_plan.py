"""The adaptation plan: written by a real pretraining, carried in the weights file, and held against every run that
starts from it."""
import json
import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vfm_notes.backbones import weights as w
from vfm_notes.backbones.adaptation import InitialWeights, adapt_weights, input_axes, pick_channels
from vfm_notes.backbones.plan import (
    local_weights_file, local_weights_names, patient_overlap, known_fingerprints, manifest_lines, manifest_metadata,
    read_weights_manifest, read_planned, state_hash,
)
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.data.loader import normalise
from vfm_notes.foundation.people import key_id
from vfm_notes.foundation.places import run_folder
from vfm_notes.foundation.registry import VfmError, backbones
from vfm_notes.foundation.spec import PretrainSpec, RunSpec, run_id
from vfm_notes.pretrain.loop import pretrain
from vfm_notes.pretrain.loop import weights_manifest
from vfm_notes.runs.record import new_record, write_record
from vfm_notes.tune import starting_weights, study_names
from vfm_notes.tune.transfer import run_cohort, transfer

SIZE, SPACING, CASES = (4, 32, 32), (12.0, 3.0, 3.0), {"pretrain": 8, "train": 4, "val": 2, "test": 3}
SPEC = PretrainSpec(
    size=SIZE, spacing=SPACING, cases=CASES, backbone="profound_toy.mine", objective="masked_reconstruction", epochs=1
)
RUN = RunSpec(
    size=SIZE, spacing=SPACING, cases=CASES, backbone="profound_toy.mine", task="segmentation", strategy="full",
    n_train=4, epochs=1, batch_size=2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The file of a real pretraining, its plan and its result."
    seen, scale = run_cohort(SPEC).subset("pretrain"), {"how": "zscore_nonzero"}
    result = pretrain(SPEC, torch.from_numpy(normalise(seen.volumes, **scale)), None, 3)
    plan = weights_manifest(SPEC, "elsewhere", seen, scale, result)
    folder = tmp_path_factory.mktemp("runs")/run_id(SPEC)
    write_record(
        folder, new_record(SPEC, "elsewhere"), weights={k: v.numpy() for k, v in result.backbone.state_dict().items()},
        plan=manifest_metadata(plan),
    )
    return folder/"weights.safetensors", plan, result


@pytest.fixture
def places(tmp_path, monkeypatch):
    "Empty folders for weights and runs."
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path/"weights"))
    monkeypatch.setenv("VFM_RUNS", str(tmp_path/"runs"))
    (tmp_path/"weights").mkdir()
    return tmp_path


def carry(made, places, name="profound_toy.mine", **changes):
    "Put the file into the weights folder, perhaps with another plan."
    path = places/"weights"/f"{name}.safetensors"
    if changes: save_file(load_file(made[0]), path, manifest_metadata(replace(made[1], **changes)))
    else: shutil.copy(made[0], path)
    return path


# ---- what is written ------------------------------------------------------------------------------------------------

def test_round_trip(made):
    path, plan, result = made
    state, again = read_planned(path)
    assert asdict(again) == json.loads(json.dumps(asdict(plan))) | {
        k: tuple(getattr(plan, k)) for k in ("sequences", "size", "spacing", "licences")
    }
    assert all(
        torch.equal(v, result.backbone.state_dict()[k]) for k, v in state.items()
    ) and again.weights_hash == state_hash(state)


def test_the_plan_says_what_was_done(made):
    _, plan, result = made
    cohort = run_cohort(SPEC)
    seen = cohort.subset("pretrain")
    assert (plan.architecture, plan.arguments, plan.sequences, plan.size, plan.spacing) == (
        "profound_toy", {"in_channels": 3}, cohort.card.sequences, SIZE, SPACING,
    )
    assert (
        plan.data["hash"] == seen.hash()
        and plan.data["cases"] == 8
        and plan.data["licence"] == cohort.card.licence == plan.licences[0]
    )
    assert (
        plan.objective["options"]["mask_ratio"] == 0.6
        and plan.recipe["lr"] == SPEC.lr
        and not plan.objective["labels"]
        and plan.parent == ""
    )
    assert not {*plan.data["patients"][key_id()]} & {*cohort.patients} and plan.data["patients"] == known_fingerprints(
        cohort.card.name, seen.patients
    )
    torch.manual_seed(SPEC.seed)
    start = dict(build_backbone(SPEC.backbone, 3).named_parameters())
    same = {k for k, p in result.backbone.named_parameters() if torch.equal(p, start[k])}
    assert (
        set(plan.keys["untouched"]) == same
        and plan.keys["loads"] == len(result.backbone.state_dict())
        and {"decoder", "proj", "pred", "mask_token"} == set(plan.keys["left"])
    )
    assert {"weights", "build", "input channels", "licences", "keys that load", "left behind"} <= set(
        manifest_lines(plan)
    )


def test_label_guided_weights_say_so():
    spec = replace(SPEC, objective="patch_contrast", backbone="provicnet_toy.seen")
    seen = run_cohort(spec).subset("pretrain")
    result = pretrain(spec, torch.from_numpy(normalise(seen.volumes)), torch.from_numpy(seen.labels).long(), 3)
    assert weights_manifest(spec, "s", seen, {"how": "zscore_nonzero"}, result).objective["labels"]


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda m: {k: v[:200] for k, v in m.items()}, "cannot be read.*cut or damaged"),
        (lambda m: m | {"plan": m["plan"].replace("t2w", "t1w")}, "changed after it was written"),
        (lambda m: {"plan": m["plan"]}, "changed after it was written"),
        (lambda m: m | {"plan": "[1]"}, "version None"),
        (lambda m: m | {"plan": json.dumps(json.loads(m["plan"]) | {"version": 3})}, "version 3, expected 2"),
    ],
)
def test_a_damaged_plan_is_refused(made, tmp_path, change, said):
    save_file(load_file(made[0]), tmp_path/"a.safetensors", change(manifest_metadata(made[1])))
    with pytest.raises(VfmError, match=said): read_weights_manifest(tmp_path/"a.safetensors")


def test_a_plan_with_a_field_missing(made, tmp_path):
    import hashlib
    text = json.dumps({k: v for k, v in asdict(made[1]).items() if k != "spacing"})
    save_file(
        load_file(made[0]), tmp_path / "a.safetensors",
        {"plan": text, "plan_sha256": hashlib.sha256(text.encode()).hexdigest()},
    )
    with pytest.raises(VfmError, match="lacks spacing"): read_weights_manifest(tmp_path/"a.safetensors")


def test_other_tensors_under_the_plan(made, tmp_path):
    state = load_file(made[0])
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, tmp_path/"a.safetensors", manifest_metadata(made[1]))
    with pytest.raises(VfmError, match="not those of its adaptation plan"): read_planned(tmp_path/"a.safetensors")


def test_a_file_that_was_cut(made, tmp_path):
    (tmp_path/"a.safetensors").write_bytes(made[0].read_bytes()[:3000])
    with pytest.raises(VfmError, match="cannot be read"): read_weights_manifest(tmp_path/"a.safetensors")


# ---- held against a run ----------------------------------------------------------------------------------------------

def fits(made, **changes):
    plan, state = made[1], load_file(made[0])
    run = dict(
        name="profound_toy.mine", sequences=plan.sequences, size=plan.size, spacing=plan.spacing,
        normalisation="zscore_nonzero", judged=("phantom", ["nobody"]),
    )
    return adapt_weights(replace(plan, **changes.pop("plan", {})), state, **run | changes)


def test_a_run_that_keeps_to_the_plan(made):
    start = fits(made)
    assert (
        start.notes == []
        and start.licences == list(made[1].licences)
        and all(torch.equal(v, load_file(made[0])[k]) for k, v in start.state.items())
    )


@pytest.mark.parametrize(
    "change,said",
    [
        ({"name": "provicnet_toy.mine"}, "are of 'profound_toy', and the run builds 'provicnet_toy'"),
        ({"plan": {"arguments": {"in_channels": 3, "tiny": True}}}, "built with {'tiny': True}"),
        ({"sequences": ("t2w", "dwi", "adc", "dce")}, "nothing was learned about dce"),
        ({"sequences": ("flair",)}, "nothing was learned about flair"),
        ({"normalisation": "cohort"}, "normalised by 'zscore_nonzero', and the run normalises by 'cohort'"),
    ],
)
def test_contradictions_are_refused(made, change, said):
    with pytest.raises(VfmError, match=said): fits(made, **change)


def test_a_network_that_cannot_be_taken_apart_is_refused(made):
    plan = replace(made[1], name="provicnet_toy.mine")
    state = build_backbone("provicnet_toy", 3).state_dict()
    with pytest.raises(VfmError, match="cannot be taken apart by channels"):
        adapt_weights(plan, state, "provicnet_toy.mine", ("dwi",), SIZE, SPACING, "zscore_nonzero")


def test_patients_of_the_pretraining_do_not_judge(made):
    cohort = run_cohort(SPEC)
    mine = [p for p, s in zip(cohort.patients, cohort.split) if s == "pretrain"][:2]
    with pytest.raises(VfmError, match="2 of the 3 patients that this run is judged on were in the pretraining"):
        fits(made, judged=(cohort.card.name, [*mine, "someone"]))
    assert fits(made, judged=("another cohort", mine)).notes == []


def test_another_site_is_told_that_overlap_cannot_be_checked(made, tmp_path, monkeypatch):
    "Not that there is none: its own key finds nothing in what another key has made."
    cohort = run_cohort(SPEC)
    mine = [p for p, s in zip(cohort.patients, cohort.split) if s == "pretrain"][:2]
    here = key_id()
    (tmp_path/"other.key").write_text("07" * 32)
    (tmp_path/"other.key").chmod(0o600)
    monkeypatch.setenv("VFM_SITE_KEY", str(tmp_path/"other.key"))
    assert patient_overlap(made[1], cohort.card.name, mine) == ("unknown", 0)
    start = fits(made, judged=(cohort.card.name, mine))
    assert (
        len(start.notes) == 1
        and "overlap of patients unknown" in start.notes[0]
        and "made with another site key" in start.notes[0]
    )
    both = known_fingerprints("later", ["p9"], start.patients)
    assert set(both) == {here, key_id()} and both[here] == made[1].data["patients"][here]
    told = replace(made[1], data=made[1].data | {"patients": both})
    assert patient_overlap(told, "later", ["p9"]) == ("seen", 1) and patient_overlap(told, "later", ["p8"]) == (
        "unknown", 0,
    ), "its own part is found, the rest cannot be"
    assert f"8 under another site's key {here}" in manifest_lines(told)["patients"]


@pytest.mark.parametrize(
    "change,said",
    [
        (
            {"spacing": (12.0, 1.5, 1.5)},
            "made at 12 x 3 x 3 mm and are used at 12 x 1.5 x 1.5 mm, so the network sees structures 1 x 2 x 2 times "
            "as large",
        ),
        ({"size": (4, 64, 64)}, "made on 4 x 32 x 32 voxels and are used on 4 x 64 x 64"),
        (
            {"sequences": ("adc", "t2w", "dwi")},
            "made from t2w, dwi, adc, in this order, and this cohort has adc, t2w, dwi",
        ),
        ({"sequences": ("t2w", "adc")}, "input channels picked by name"),
    ],
)
def test_adaptations_are_told(made, change, said):
    notes = fits(made, **change).notes
    assert len(notes) == 1 and said in notes[0]


@pytest.mark.parametrize("name", ["profound_toy", "provicnet_toy", "efficientnet_toy", "segresnet_tiny"])
@pytest.mark.parametrize("chosen", [[2, 0, 1], [2, 0], [1]])
def test_picked_channels_answer_as_the_whole_network_with_zeros(name, chosen, monkeypatch):
    "In float64, on a volume of another size than the one that the search tries."
    monkeypatch.setitem(backbones._entries, "segresnet_tiny", partial(backbones["segresnet"], tiny=True))
    torch.manual_seed(3)
    net = build_backbone(name, 3)
    fewer = pick_channels(name, net.state_dict(), 3, chosen)
    # built in another way for three channels, or for one
    if name == "efficientnet_toy" or (name != "profound_toy" and len(chosen) == 1):
        assert fewer is None
        return
    small = build_backbone(name, len(chosen), fewer).double().eval()
    x = torch.randn(2, len(chosen), *(3 * s for s in net.strides[-1]), dtype=torch.float64)
    whole = torch.zeros(2, 3, *x.shape[2:], dtype=torch.float64)
    whole[:, chosen] = x
    for a, b in zip(net.double().eval().pyramid(whole), small.pyramid(x)): assert torch.allclose(a, b, atol=1e-9)


def test_where_channels_come_in():
    assert input_axes("profound_toy", 3) == {"encoder.downsample_layers.0.0.weight": 1}


# ---- downstream
# --------------------------------------------------------------------------------------------------------

def in_study(made, places, **spec):
    "The file as the weights of a study's own pretraining."
    shutil.copytree(made[0].parent, run_folder("mine", run_id(SPEC)))
    return replace(RUN, parent=run_id(SPEC), **spec)


def test_a_run_of_the_same_study_starts_from_it(made, places):
    spec = in_study(made, places)
    start = starting_weights.initial_weights(spec, "mine")
    assert start.notes == [] and start.state.keys() == load_file(made[0]).keys()
    assert starting_weights.initial_weights(replace(spec, strategy="scratch", parent=""), "mine") == InitialWeights()


def test_weights_without_a_plan_are_used_and_told(made, places):
    spec = in_study(made, places)
    weights = {k: v.numpy() for k, v in load_file(made[0]).items()}
    write_record(run_folder("mine", run_id(SPEC)), new_record(SPEC, "mine"), weights=weights)
    start = starting_weights.initial_weights(spec, "mine")
    assert start.state and "carry no adaptation plan" in start.notes[0] and start.licences == []


def test_weights_that_are_not_those_of_the_record_are_refused(made, places):
    "A sound file with other numbers, as a copy that went to the wrong folder."
    spec = in_study(made, places)
    path = run_folder("mine", run_id(SPEC))/"weights.safetensors"
    with safe_open(path, "pt") as file: metadata = file.metadata()
    save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata)
    with pytest.raises(VfmError, match=r"weights\.safetensors is damaged .* study file of 'mine' and --retry-failed"):
        starting_weights.initial_weights(spec, "mine")


def test_a_missing_pretraining_is_told_by_the_run(places):
    spec = replace(RUN, parent="pretrain-gone")
    with pytest.raises(VfmError, match="which are missing: run the pretraining"):
        transfer(spec, starting_weights.initial_weights(spec, "mine").state)


def test_another_spacing_is_written_into_the_record(made, places):
    spec = in_study(made, places, spacing=(12.0, 2.0, 2.0))
    start = starting_weights.initial_weights(spec, "mine")
    outcome = transfer(spec, start.state, start=start)
    assert any("are used at 12 x 2 x 2 mm" in n for n in outcome.summary["notes"])


def test_carried_weights_are_known_by_name(made, places):
    carry(made, places)
    assert (
        local_weights_names() == ["profound_toy.mine"]
        and w.normalisation("profound_toy.mine") == "zscore_nonzero"
        and w.weights_card("profound_toy.mine").licence == made[1].licences[0]
    )
    row = w.list_weights().set_index("name").loc["profound_toy.mine"]
    assert row.here and row["where"] == "with its plan"
    spec = replace(RUN, cases=CASES | {"pretrain": 0})
    start = starting_weights.initial_weights(spec, "by_hand")
    assert all(torch.equal(v, start.state[k]) for k, v in load_file(made[0]).items())


def test_carried_weights_are_loaded_by_name(made, places):
    "With the channels that the plan says, every tensor as it lies in the file."
    import vfm_notes
    state = load_file(carry(made, places))
    net = vfm_notes.load_backbone("profound_toy.mine")
    assert net.in_channels == made[1].arguments["in_channels"] and state.keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


def test_the_licence_of_the_data_reaches_the_record_of_the_run(made, places):
    carry(made, places, licences=("CC-BY-SA-4.0",))
    start = starting_weights.initial_weights(RUN, "by_hand")
    outcome = transfer(RUN, start.state, start=start)
    assert outcome.summary["licences"] == [run_cohort(RUN).card.licence, "CC-BY-SA-4.0"]
    assert outcome.summary["weights_files"][0] | {"source_sha256": ""} == {
        "part": "backbone", "weights": "profound_toy.mine", "licence": "CC-BY-SA-4.0", "source_sha256": "",
        "checksum": "that of its plan", "file": "profound_toy.mine.safetensors",
    }
    assert outcome.summary["weights_hash"] == made[1].weights_hash


def test_non_commercial_data_must_be_accepted(made, places, monkeypatch):
    carry(made, places, licences=("CC-BY-NC-4.0",), data=made[1].data | {"non_commercial": True})
    with pytest.raises(VfmError, match="non-commercial licence 'CC-BY-NC-4.0'"):
        starting_weights.initial_weights(RUN, "by_hand")
    monkeypatch.setenv("VFM_JOB", "a batch, which asked before")
    assert starting_weights.initial_weights(RUN, "by_hand").state


def test_a_name_that_contradicts_the_plan(made, places):
    carry(made, places, "provicnet_toy.mine")
    with pytest.raises(VfmError, match="call the file profound_toy.mine.safetensors"):
        local_weights_file("provicnet_toy.mine")


def study(places, **more):
    import yaml
    values = dict(
        name="other", title="t", cohort="phantom", size=list(SIZE), spacing=list(SPACING),
        cases=CASES | {"pretrain": 0}, backbones=["profound_toy.mine"], tasks={"segmentation": {}},
        strategies=["scratch", "full"], seeds=[0],
    )
    (places/"other.yaml").write_text(yaml.safe_dump(values | more))
    from vfm_notes.foundation.spec import load_study
    return load_study(places/"other.yaml")


def test_a_study_may_name_carried_weights(made, places):
    with pytest.raises(VfmError, match="no card of published weights names"): study_names.check_names(study(places))
    path = carry(made, places)
    study_names.check_names(study(places))
    save_file(load_file(made[0]), path)
    with pytest.raises(VfmError, match="carries no adaptation plan"): study_names.check_names(study(places))
    carry(made, places, licences=("CC-BY-NC-4.0",), data=made[1].data | {"non_commercial": True})
    with pytest.raises(VfmError, match="non-commercial"): study_names.check_names(study(places))
    study_names.check_names(study(places, licences=["CC-BY-NC-4.0"]))


# ---- the command
# ------------------------------------------------------------------------------------------------------

def vfm(*words):
    from typer.testing import CliRunner
    from vfm_notes.report.cli import app
    done = CliRunner().invoke(app, [str(x) for x in words])
    return done, done.output + (str(done.exception) if done.exception else "")


def test_check_shows_the_plan(made, places):
    done, out = vfm("weights", "check", made[0])
    assert (
        done.exit_code == 0
        and "profound_toy(in_channels=3)" in out
        and "t2w, dwi, adc" in out
        and "100.0% of the backbone is filled" in out
        and "decoder" in out
    )
    path = carry(made, places)
    assert (
        "profound_toy(in_channels=3)" in vfm("weights", "check", "profound_toy.mine")[1]
        and "profound_toy.mine" in vfm("weights", "list")[1]
    )
    save_file(load_file(made[0]), path, {k: v.replace("t2w", "t1w") for k, v in manifest_metadata(made[1]).items()})
    done, out = vfm("weights", "check", path)
    assert done.exit_code and "changed after it was written" in out


def test_export_carries_weights_of_a_study(made, places):
    write_record(
        run_folder("other", run_id(SPEC)), new_record(SPEC, "other"),
        weights={k: v.numpy() for k, v in load_file(made[0]).items()}, plan=manifest_metadata(made[1]),
    )
    study(places)
    file = places/"other.yaml"
    assert vfm("weights", "export", file, "profound_toy.mine")[0].exit_code == 0 and read_planned(
        places / "weights" / "profound_toy.mine.safetensors"
    )[1] == read_weights_manifest(made[0])
    assert vfm("weights", "export", file, "profound_toy.mine", "--as", "profound_toy.second")[
        0
    ].exit_code == 0 and local_weights_names() == ["profound_toy.mine", "profound_toy.second"]
    for words, said in (
        ((file, "profound_toy.mina"), "Did you mean 'profound_toy.mine'"),
        ((file, "profound_toy.mine", "--as", "provicnet_toy.x"), "expected profound_toy.NAME"),
        ((file, "profound_toy.mine", "--as", "mine"), "expected profound_toy.NAME"),
    ):
        done, out = vfm("weights", "export", *words)
        assert done.exit_code and said in out
    carry(made, places, licences=("MIT",))
    done, out = vfm("weights", "export", file, "profound_toy.mine")
    assert done.exit_code and "from another run" in out
