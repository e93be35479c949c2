"""Work that is shared out: the same answers in the same order, errors as they are, and no process left."""
import os
import time

import pytest

from vfm_notes.foundation.progress import map_items


def square(i): return i, os.getpid()
def fails_late(i): return 1 / (70 - i)
def dies(i): return os._exit(9) if i == 65 else i


def test_answers_come_in_order_from_several_processes():
    made = map_items(square, list(range(200)), "squares", processes=3)
    assert [i for i, _ in made] == list(range(200)) and len({pid for _, pid in made} - {os.getpid()}) == 3
    assert {pid for _, pid in map_items(square, list(range(20)), "few", processes=3)} == {os.getpid()}


def test_an_error_is_that_of_the_item_and_ends_the_work():
    with pytest.raises(ZeroDivisionError): map_items(fails_late, list(range(200)), "numbers", processes=2)


def test_a_process_that_is_killed_is_no_silent_gap():
    with pytest.raises(RuntimeError, match="ended before item 66 of 200"):
        map_items(dies, list(range(200)), "numbers", processes=2)


def test_children_end_when_their_parent_is_gone():
    pid = os.fork()
    if not pid:
        map_items(lambda i: (time.sleep(0.01), b"x" * 100_000)[1], list(range(100_000)), "slow", processes=2)
        os._exit(0)
    time.sleep(1)
    children = [int(c) for c in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 60
    while any(alive(c) for c in children) and time.monotonic() < deadline: time.sleep(0.05)
    assert len(children) == 2 and not any(alive(c) for c in children)


def alive(pid):
    "Whether a process runs; one that nobody waited for does not."
    try: return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False
