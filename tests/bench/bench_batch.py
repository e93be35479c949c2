"""Overhead of a notebook in the forked engine beside plain papermill.

The same small notebook that imports torch and MONAI, executed by both engines in turn; what is counted is the time
around the cells' own work (a sleep of known length). Its cells and outputs must be the same. Aim: at most 0.5 s.
"""
import os
import statistics
import tempfile
import time
from pathlib import Path

WORK, TIMES = 0.5, 3


def notebook(path):
    "Imports as a run has them, then a known amount of work."
    import nbformat
    cells = [
        "x = 1", "import torch, monai, transformers, pandas", f"import time; time.sleep({WORK})",
        "print(torch.ones(3).sum().item() * x)",
    ]
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    )
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)


def engines(folder):
    "Seconds of overhead of both engines, and the proof that they give the same."
    import papermill
    import vfm_notes.runs.engine  # registers the engine
    from vfm_notes.runs.forkserver import ForkServer
    notebook(folder/"in.ipynb")
    took, cells = {"forked": [], "papermill": []}, {}
    start = time.monotonic()
    with ForkServer() as server:
        os.environ["VFM_FORKSERVER"] = server.address
        def execute(name):
            begun = time.monotonic()
            done = papermill.execute_notebook(
                folder / "in.ipynb", folder / "out.ipynb", {"x": 2}, engine_name="forked" if name == "forked" else None,
                progress_bar=False,
            )
            took[name].append(time.monotonic() - begun - WORK)
            cells[name] = [(c.cell_type, c.source, c.get("execution_count"), c.get("outputs")) for c in done.cells]
        execute("forked")  # the first waits for the server's imports
        print(f"fork server ready and first notebook done after {time.monotonic() - start:.1f} s, once for a study")
        took["forked"].clear()
        for _ in range(TIMES):
            for name in took: execute(name)
    assert cells["forked"] == cells["papermill"], "the engines give different notebooks"
    forked, plain = (statistics.median(took[k]) for k in ("forked", "papermill"))
    print(
        f"{'overhead per notebook, median of ' + str(TIMES):40}{'seconds':>10}\n{'forked':40}{forked:10.2f}   "
        f"(aim: 0.5)\n{'plain papermill':40}{plain:10.2f}   {plain / forked:.1f} times as much; same cells, same "
        "outputs",
        flush=True,
    )


def main():
    print(f"load on the machine {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder: engines(Path(folder))


if __name__ == "__main__": main()
