"""The widgets in a real JupyterLab, in a real browser whose network is blocked."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from browsing import asked, chromium, wait
from fake_runs import write_study
from test_site import STUDY

from vfm_notes.foundation.spec import load_study
from vfm_notes.runs.grid import jobs_of

CELLS = ["""from vfm_notes.data.phantom import phantom_case
from vfm_notes.report.widgets import volume_viewer
case = phantom_case(0, 5)
volume_viewer(
    dict(zip(("T2w", "DWI", "ADC"), case.volume)), case.label, "A case", names=("background", "gland", "lesion"),
    spacing=(4.0, 1.5, 1.5),
)""",
         "from vfm_notes.report.explorer import run_explorer\nrun_explorer('made_up.yaml')",
         "from vfm_notes.report.explorer import live_training\nlive_training('made_up.yaml')",
         "from vfm_notes.report.builder import study_builder\nstudy_builder(path='mine.yaml')"]
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


TOUR = Path(__file__).resolve().parents[2] / "nbs" / "00_tour.ipynb"


def write_notebook(path, sources):
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": s, "execution_count": None, "outputs": []}
        for i, s in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a made-up study and a notebook that shows every widget."
    root = tmp_path_factory.mktemp("lab")
    (root / "made_up.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFM_RUNS", str(root / "runs"))
        write_study(load_study(root / "made_up.yaml"), failed=1, absent=1)
        write_study(load_study("phantom"), failed=0, absent=0)
    write_notebook(root / "look.ipynb", CELLS)
    write_notebook(
        root / "charts.ipynb",
        [
            "from every_chart import every_chart\nfrom vfm_notes.analysis.tables import load_tables\nfrom "
            "vfm_notes.foundation.blocks import use_charts\nuse_charts()\nfor chart in "
            "every_chart(load_tables('made_up')).values(): display(chart)"
        ],
    )
    shutil.copy(TOUR, root)
    return root


@pytest.fixture(scope="module")
def lab(folder):
    "JupyterLab on that folder, with settings of its own."
    own = folder / ".lab"
    for name, values in SETTINGS.items():
        path = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = {
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data",
        "IPYTHONDIR": "ipython",
    }
    env = (
        os.environ
        | {k: str(own / v) for k, v in places.items()}
        | {
            "VFM_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2])),
        }
    )
    log = (folder / "lab.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
            "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser",
            f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        cwd=folder,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    base, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            try: urllib.request.urlopen(f"{base}/api", timeout=60); break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.2)
        yield base
    finally:
        process.terminate()
        process.wait(300)


VIEW, EXPLORER, LIVE, BUILDER = (f"document.querySelectorAll('.jp-Cell')[{i}]" for i in range(4))
PICTURES = "querySelectorAll('.widget-image:not(.vfm-outlines)')"
IMAGES = f"return [...{VIEW}.{PICTURES}].map(i => i.src)"


HERE = "const notebook = jupyterapp.shell.currentWidget, kernel = notebook.context.sessionContext.session?.kernel;"
RAN = (
    HERE + "const code = [...notebook.context.model.cells].filter(c => c.type === 'code'); return code.every(c => "
    "c.executionCount !== null && c.executionState !== 'running') && kernel.status === 'idle'"
)


def run_all(browser, lab, name, width, seconds=600, memory=2**60):
    "Open a notebook in a window and run all of it; the tab may not take more memory than that, in MiB."
    browser.set_window_size(width, 1400)
    browser.get(f"{lab}/lab/tree/{name}")
    wait(
        browser,
        f"if (!window.jupyterapp || !jupyterapp.shell.currentWidget?.context?.path.endsWith('{name}') || "
        f"!document.querySelector('.jp-Cell')) return false; {HERE} return kernel?.status === 'idle'",
    )
    browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
    end = time.monotonic() + seconds
    while not browser.execute_script(RAN):
        assert time.monotonic() < end and tab_memory(browser) < memory, (name, tab_memory(browser))
        time.sleep(0.3)
    assert not browser.execute_script(
        "return [...document.querySelectorAll('.jp-RenderedText[data-mime-type*=stderr], .jp-mod-error')].map(e "
        "=> e.innerText)"
    )


def tab_memory(browser) -> float:
    "MiB of the largest renderer."
    psutil = pytest.importorskip("psutil")
    sizes = [0]
    for process in psutil.Process(browser.service.process.pid).children(recursive=True):
        try: sizes.append(process.memory_info().rss if "--type=renderer" in process.cmdline() else 0)
        except psutil.Error: pass  # it has just ended
    return max(sizes) / 2**20


MOST = 1000  # MiB of a tab; 250 before there were charts, 3000 and more where one is drawn without end
DRAWN = (
    "return [...document.querySelectorAll('.jp-RenderedVegaCommon5')].map(n => { const c = "
    "n.querySelector('canvas, svg.marks'), box = n.closest('.jp-OutputArea-output') || n; return c ? [c.clientWidth, "
    "c.clientHeight, box.clientWidth, box.scrollWidth, getComputedStyle(box).overflowX] : null })"
)


def check_drawn(browser, least):
    "As many charts as expected, each of some size, and what is wider than its box can be reached by scrolling."
    found = wait(
        browser,
        DRAWN.replace("return", "const found =", 1)
        + f"; return found.length >= {least} && found.every(f => f && f[0] > 150 && f[1] > 40) && found",
    )
    assert all(box >= width or flow == "auto" for width, _, box, _, flow in found), found
    assert tab_memory(browser) < MOST
    return found

COLOURED = f"""return [...{VIEW}.{PICTURES}].map(i => {{
  const c = Object.assign(document.createElement('canvas'), {{ width: i.naturalWidth, height: i.naturalHeight }});
  const pen = c.getContext('2d');
  if (!c.width) return -1;
  pen.drawImage(i, 0, 0);
  const v = pen.getImageData(0, 0, c.width, c.height).data;
  return v.reduce((n, x, k) => n + (k % 4 === 0 && x !== v[k + 2]), 0) }})"""  # pixels that are not grey


@pytest.fixture(scope="module")
def browser(lab):
    "The notebook, opened and run."
    with chromium() as made:
        run_all(made, lab, "look.ipynb", 1300)
        wait(made, f"return {BUILDER}.querySelector('.jp-OutputArea-output .widget-inline-hbox')")
        if os.environ.get("VFM_SCREENSHOT"): made.save_screenshot(os.environ["VFM_SCREENSHOT"])
        assert not made.execute_script(
            "return [...document.querySelectorAll('.jp-RenderedText[data-mime-type*=stderr], "
            ".jp-mod-error')].map(e => e.innerText)"
        )
        yield made


def keys(browser, element, *pressed):
    from selenium.webdriver.common.action_chains import ActionChains
    ActionChains(browser).move_to_element(element).click().perform()
    for k in pressed: ActionChains(browser).send_keys(k).perform()


def test_the_volume_viewer_draws_its_sequences(browser):
    pictures = wait(
        browser,
        f"const i = [...{VIEW}.{PICTURES}]; return i.length === 3 && i.every(x => x.naturalWidth) && i.map(x => "
        "[x.naturalWidth, x.naturalHeight, x.clientWidth, x.clientHeight])",
    )
    assert pictures == [[64, 64, 260, 260]] * 3  # native pixels, enlarged by the browser
    assert "axial 7 of 12" in browser.execute_script(f"return {VIEW}.innerText") and "window" in browser.execute_script(
        f"return {VIEW}.innerText"
    )


def test_a_slider_moves_the_slice_by_hand_and_by_keyboard(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    before = browser.execute_script(IMAGES)
    handle = browser.execute_script(
        f"return [...{VIEW}.querySelectorAll('.widget-slider')].find(s => s.offsetParent && "
        "s.innerText.includes('axial')).querySelector('.noUi-handle')"
    )
    readout = (
        f"return [...{VIEW}.querySelectorAll('.widget-slider')].find(s => s.offsetParent && "
        "s.innerText.includes('axial')).querySelector('.widget-readout').innerText"
    )
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    ActionChains(browser).click_and_hold(handle).move_by_offset(40, 0).release().perform()
    moved = int(wait(browser, readout.replace("return", "const v =") + "; return v !== '7' && v"))
    assert moved > 7
    wait(browser, f"return {VIEW}.innerText.includes('axial {moved} of 12')")
    by_hand = wait(
        browser,
        IMAGES.replace("return", "const now =") + f"; return now.every((s, k) => s !== {json.dumps(before)}[k]) && now",
    )
    browser.execute_script("arguments[0].focus()", handle)
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()
    wait(browser, f"return {VIEW}.innerText.includes('axial {moved - 1} of 12')")
    wait(
        browser,
        IMAGES.replace("return", "const now =") + f"; return now.every((s, k) => s !== {json.dumps(by_hand)}[k])",
    )
    ActionChains(browser).send_keys(Keys.HOME).perform()
    wait(browser, f"return {VIEW}.innerText.includes('axial 1 of 12')")
    # no key went to JupyterLab
    assert browser.execute_script(
        "return document.querySelectorAll('.jp-Cell').length === 4 && !document.querySelector('.jp-Notebook "
        ".jp-mod-collapsed, .jp-collapsed-cell')"
    )


def test_labels_and_planes_change_the_picture(browser):
    before = browser.execute_script(IMAGES)
    browser.execute_script(
        f"[...{VIEW}.querySelectorAll('.widget-toggle-button')].find(b => b.innerText.trim() === 'all three').click()"
    )
    wait(browser, f"return {VIEW}.{PICTURES}.length === 9")
    browser.execute_script(
        f"[...{VIEW}.querySelectorAll('.widget-toggle-button')].find(b => b.innerText.trim() === 'axial').click()"
    )
    wait(browser, f"return {VIEW}.{PICTURES}.length === 3")
    handle = browser.execute_script(
        f"return [...{VIEW}.querySelectorAll('.widget-slider')].find(s => "
        "s.innerText.includes('axial')).querySelector('.noUi-handle')"
    )
    from selenium.webdriver.common.keys import Keys
    handle.send_keys(Keys.END)
    handle.send_keys(*[Keys.ARROW_LEFT] * 5)
    wait(browser, f"return {VIEW}.innerText.includes('axial 7 of 12')")
    wait(browser, IMAGES.replace("return", "const now =") + f"; return now[0] !== {json.dumps(before)}[0]")
    over = (
        f"return [...{VIEW}.querySelectorAll('.vfm-outlines')].map((o, k) => [o.src, o.offsetTop - "
        f"{VIEW}.{PICTURES}[k].offsetTop, o.clientWidth, o.naturalWidth])"
    )
    lines, plain = browser.execute_script(over), browser.execute_script(COLOURED)
    assert [row[1:] for row in lines] == [[0, 260, 260]] * 3 and plain == [0] * 3  # outlines lie on grey pictures
    tick = f"{VIEW}.querySelectorAll('.widget-checkbox input').forEach(c => c.click())"
    browser.execute_script(tick)
    wait(
        browser,
        over.replace("return", "const now =")
        + f"; return now.every((o, k) => o[0] !== {json.dumps([row[0] for row in lines])}[k])",
    )
    browser.execute_script(tick)
    filling = browser.execute_script(
        f"return [...{VIEW}.querySelectorAll('.widget-slider')].find(s => "
        "s.innerText.includes('filling')).querySelector('.noUi-handle')"
    )
    filling.send_keys(*[Keys.ARROW_RIGHT] * 4)
    wait(browser, COLOURED.replace("return", "const found =", 1) + "; return found.every(n => n > 100)")


def test_the_run_explorer_filters_and_draws(browser):
    rows = f"[...{EXPLORER}.querySelectorAll('.jp-RenderedHTMLCommon tbody tr')]"
    wait(browser, f"return {rows}.length === 28")
    box = browser.execute_script(f"return {EXPLORER}.querySelector('.widget-text input')")
    box.send_keys("segmentation provicnet scratch")
    wait(
        browser,
        f"return {rows}.length === 2 && {rows}.every(r => r.innerText.includes('provicnet') && "
        "r.innerText.includes('scratch'))",
    )
    assert "2 of 28 runs" in browser.execute_script(f"return {EXPLORER}.innerText")
    wait(browser, f"return {EXPLORER}.querySelectorAll('.vega-embed svg path, .vega-embed canvas').length > 0")
    to = browser.execute_script(
        f"return [...{EXPLORER}.querySelectorAll('tbody a')].map(a => a.innerText + ' ' + a.href)"
    )
    assert sum(t.startswith("notebook ") for t in to) == sum(t.startswith("record ") for t in to) == 2 and all(
        "/runs/made_up/" in t for t in to
    )


def test_the_study_builder_refuses_and_writes(browser, folder):
    field = (
        f"[...{BUILDER}.querySelectorAll('.widget-text')].find(t => t.querySelector('label') && "
        "t.querySelector('label').innerText === '%s').querySelector('input')"
    )
    button = f"[...{BUILDER}.querySelectorAll('button')].find(b => b.innerText.includes('write the study'))"
    enter = lambda name, text: browser.execute_script(
        f"const i = {field % name}; i.focus(); i.value = {json.dumps(text)}; i.dispatchEvent(new Event('input', "
        f"{{bubbles: true}})); i.dispatchEvent(new Event('change', {{bubbles: true}})); i.blur()"
    )
    wait(browser, f"return {BUILDER}.innerText.includes('Valid.') && !{button}.disabled")
    enter("seeds", "0, 0")
    wait(browser, f"return {BUILDER}.innerText.includes('expected a list without doubles') && {button}.disabled")
    enter("seeds", "5")
    enter("name", "mine")
    wait(
        browser,
        f"return {BUILDER}.innerText.includes('Valid.') && !{button}.disabled && {BUILDER}.innerText.includes('name: "
        "mine')",
    )
    browser.execute_script(f"{button}.click()")
    wait(browser, f"return {BUILDER}.innerText.includes('Written to mine.yaml')")
    study = load_study(folder / "mine.yaml")
    assert study.name == "mine" and study.seeds == [5]


def test_nothing_was_asked_of_the_network(browser, lab):
    errors, elsewhere = asked(browser, lab)
    assert [u for u in elsewhere if not u.startswith(lab.replace("http", "ws"))] == []
    assert [e for e in errors if "vfm" in e or "widget" in e.lower()] == []


def test_live_training_says_that_nothing_runs(browser):
    assert "nothing is at work" in browser.execute_script(f"return {LIVE}.innerText")


def test_every_chart_is_drawn_in_a_narrow_window_and_after_it_grew(browser, lab):
    run_all(browser, lab, "charts.ipynb", 620, memory=MOST)
    narrow = check_drawn(browser, 15)
    assert any(box < wide for _, _, box, wide, _ in narrow)  # some had to be scrolled
    browser.set_window_size(1400, 1400)
    wait(browser, DRAWN.replace("return", "const found =", 1) + f"; return found[0][2] > {narrow[0][2]}")
    assert [f[:2] for f in check_drawn(browser, 15)] == [f[:2] for f in narrow]


def test_the_tour_runs_to_its_end_beside_a_finished_study(browser, lab):
    run_all(browser, lab, "00_tour.ipynb", 1300, 600, MOST)
    found = check_drawn(browser, 4)  # pretraining, score and distance, gain matrix, curves of the explorer
    assert sum(f[0] >= 640 for f in found) >= 1
    said = browser.execute_script(
        "return [...jupyterapp.shell.currentWidget.content.node.querySelectorAll('.jp-OutputArea-output')].map(o "
        "=> o.innerText).join('\\n')"
    )
    runs = sum(len(j.specs) for j in jobs_of(load_study("phantom")))
    assert f"of {runs} runs" in said and "RPG" in said and "no finished runs to compare" not in said
    # a case, the pyramid, a prediction
    assert (
        browser.execute_script(
            "return "
            "jupyterapp.shell.currentWidget.content.node.querySelectorAll('.widget-image:not(.vfm-outlines)').length"
        )
        == 3 + 3 + 3
    )
