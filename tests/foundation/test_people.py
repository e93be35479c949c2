"""The site key and what is made with it, against hashlib and hmac by hand."""
import base64
import hashlib
import hmac
import multiprocessing
import os

import pytest

from vfm_notes.foundation import people
from vfm_notes.foundation.registry import VfmError

KEY = "0b" * 32


@pytest.fixture
def key(tmp_path, monkeypatch):
    path = tmp_path/"group.key"
    path.touch(mode=0o600)
    path.write_text(KEY)
    monkeypatch.setenv("VFM_SITE_KEY", str(path))
    return path


def by_hand(purpose: bytes, values: bytes) -> bytes:
    "RFC 2104 with SHA-256, written out."
    def mac(key, message):
        key = key.ljust(64, b"\0")
        inner = hashlib.sha256(bytes(k ^ 0x36 for k in key) + message).digest()
        return hashlib.sha256(bytes(k ^ 0x5C for k in key) + inner).digest()
    return mac(mac(bytes.fromhex(KEY), purpose), values)


def test_values_by_hand(key):
    assert people.patient_fingerprints("msd", ["p1"]) == [by_hand(b"patients", b'["msd", "p1"]').hex()[:32]]
    assert people.key_id() == by_hand(b"key id", b"[]").hex()[:16]
    assert (
        people.pseudonym("study", "p1")
        == "anon-" + base64.b32encode(by_hand(b"pseudonyms", b'["study", "p1"]')).decode().lower()[:10]
    )
    assert (
        by_hand(b"a", b"b") == hmac.new(hmac.new(bytes.fromhex(KEY), b"a", "sha256").digest(), b"b", "sha256").digest()
    )


def test_a_list_of_ids_does_not_reverse_a_fingerprint(key):
    """What reversed the old ones: hashing every id there may be. With another key nothing is found, with the key all
    are."""
    ids = [f"patient_{i:04d}" for i in range(2000)]
    told = people.patient_fingerprints("msd", ids[100:110])
    plain = {
        h(f"msd/{i}".encode()).hexdigest()[:n] for i in ids for h in (hashlib.sha256, hashlib.md5) for n in (12, 32)
    }
    assert (
        not plain & {t[:n] for t in told for n in (12, 32)}
        and len(told) == 10
        and {*told} <= {*people.patient_fingerprints("msd", ids)}
    )
    key.write_text("0c" * 32)
    assert not {*told} & {*people.patient_fingerprints("msd", ids)}


def test_pairs_are_not_mixed_up(key):
    assert people.patient_fingerprints("a/b", ["c"]) != people.patient_fingerprints("a", ["b/c"])
    assert (
        people.pseudonym("a", "x") != people.pseudonym("b", "x")
        and people.pseudonym("a", "x").removeprefix("anon-") not in people.patient_fingerprints("a", ["x"])[0]
    )
    assert people.pseudonym("a", "Zoe\u0308") == people.pseudonym("a", "Zoë")


def test_pseudonyms_say_nothing_of_order(key):
    names = [f"case_{i:03d}" for i in range(200)]
    order = sorted(range(200), key=lambda i: people.pseudonym("s", names[i]))
    assert (
        abs(sum((k - 99.5) * (i - 99.5) for k, i in enumerate(order))) / sum((k - 99.5) ** 2 for k in range(200)) < 0.25
        and len({people.pseudonym("s", n) for n in names}) == 200
    )


@pytest.mark.parametrize(
    "settings, home, where",
    [
        ("{}/settings", "{}/home", "settings/vfm_notes/site.key"), ("", "{}/home", "home/.config/vfm_notes/site.key"),
        ("relative", "{}/home", "home/.config/vfm_notes/site.key"),
    ],
)
def test_it_is_made_once_where_settings_lie(tmp_path, monkeypatch, settings, home, where):
    monkeypatch.delenv("VFM_SITE_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", settings.format(tmp_path))
    monkeypatch.setenv("HOME", home.format(tmp_path))
    first = people.site_key()
    assert (
        people.site_key() == first
        and people.key_file() == tmp_path / where
        and [p.name for p in (tmp_path / where).parent.iterdir()] == ["site.key"]
    )
    assert (
        (tmp_path / where).stat().st_mode & 0o777 == 0o600
        and bytes.fromhex((tmp_path / where).read_text().strip()) == first
        and len(first) == 32
    )


def begin(folder, gate, answers):
    os.environ.pop("VFM_SITE_KEY", None)
    os.environ["XDG_CONFIG_HOME"] = folder
    gate.wait()
    answers.put(people.site_key())


def test_many_who_come_first_find_one_key(tmp_path):
    fork = multiprocessing.get_context("fork")
    gate, answers = fork.Barrier(8), fork.Queue()
    workers = [fork.Process(target=begin, args=(str(tmp_path), gate, answers)) for _ in range(8)]
    for w in workers: w.start()
    found = {answers.get(timeout=300) for _ in workers}
    for w in workers: w.join()
    assert len(found) == 1 and [p.name for p in (tmp_path/"vfm_notes").iterdir()] == ["site.key"]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda p: p.unlink(), "which does not exist: copy your group's key there"),
        (lambda p: p.write_text("0b" * 31), "is damaged, expected 64 hexadecimal digits"),
        (lambda p: p.write_text("x" * 64), "is damaged"),
        (lambda p: p.chmod(0o644), "can be read by everybody on this machine: chmod o-rwx"),
        (lambda p: (p.unlink(), p.mkdir()), "cannot be read or made"),
    ],
)
def test_a_key_that_cannot_be_trusted_is_refused(key, change, told):
    change(key)
    with pytest.raises(VfmError, match=told): people.key_id()


def test_no_new_key_beside_a_wrong_path(key, tmp_path):
    key.unlink()
    with pytest.raises(VfmError): people.site_key()
    assert not key.exists()


def test_tests_do_not_see_the_user(scratch_home):
    "Home, weights, data, runs and key are scratch ones, here and in what tests start."
    from vfm_notes.foundation.places import runs_root, weights_root
    assert (
        people.key_file().parent == scratch_home
        and runs_root().parent == scratch_home
        and weights_root().is_relative_to(scratch_home)
        and "VFM_DATA" not in os.environ
    )
