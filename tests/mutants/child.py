"""A process with the heavy libraries in memory that forks for each task.

It runs a test file to see which test runs which line, or runs tests until one fails.
"""

import json
import os
import sys

import coverage
import pytest

QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line"]


def spent() -> float:
    "Seconds that the processor has worked for this process, whatever else the machine does."
    return sum(os.times()[:4])


class Seen:
    "A pytest plugin that tells coverage which test runs, and takes its seconds."

    def __init__(self, measured, limit: float):
        self.measured, self.end, self.begun = measured, spent() + limit, 0.0
        self.tests: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_logstart(self, nodeid, location):
        self.measured.switch_context("setup")
        self.begun = spent()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        self.measured.switch_context(item.nodeid)

    def pytest_runtest_teardown(self, item):
        self.measured.switch_context("setup")

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.tests[nodeid] = spent() - self.begun
        if spent() > self.end:
            raise KeyboardInterrupt


def look(file: str, limit: float, to: str) -> int:
    "Run a test file and write which test runs which lines: {tests: {id: seconds}, lines: {module: {line: [ids]}}}."
    ours = os.path.abspath("vfm_notes")
    measured = coverage.Coverage(data_file=None, config_file=False, include=[f"{ours}/*"], messages=False)
    plugin, begun = Seen(measured, limit), spent()
    measured.start()
    code = pytest.main([*QUIET, file], plugins=[plugin])
    measured.stop()
    data, lines = measured.get_data(), {}
    for path in data.measured_files():
        found = {line: ids for line, ids in data.contexts_by_lineno(path).items() if line > 0}
        lines[os.path.relpath(path, ours)] = {n: [i for i in ids if i not in plugin.failed] for n, ids in found.items()}
    good, seconds = {t: s for t, s in plugin.tests.items() if t not in plugin.failed}, spent() - begun
    with open(to, "w", encoding="utf-8") as out:
        json.dump({"seconds": seconds, "tests": good, "lines": lines, "failed": sorted(plugin.failed)}, out)
    return int(code)


def judge(groups: list) -> int:
    "Run groups of tests [[ids], seconds allowed] until one fails."
    for ids, allowed in groups:
        os.write(REPORT, f"group {allowed}\n".encode())
        code = int(pytest.main(["-x", *QUIET, *ids]))
        sys.stdout.flush()
        if code:
            return code
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    REPORT = os.dup(1)
    import altair, hypothesis, monai.losses, monai.metrics, nibabel, numpy, pandas, pyarrow.parquet  # noqa: F401
    import nbclient, scipy.stats, SimpleITK, sklearn.linear_model, sklearn.metrics, torch, yaml  # noqa: F401
    import peft, transformers  # noqa: F401

    early = [m for m in sys.modules if m.startswith("vfm_notes")]
    assert not early, f"{early[0]} is imported before it can be changed"  # papermill, say, would do so
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.write(REPORT, f"pid {os.getpid()}\n".encode())  # first, and when the group can be ended
            out, none = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
            os.dup2(none, 0), os.dup2(out, 1), os.dup2(out, 2)
            os.environ["HOME"] = task["home"]
            code = look(**task["look"]) if "look" in task else judge(task["judge"])
            sys.stdout.flush()
            os._exit(code)
        os.write(REPORT, f"end {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
