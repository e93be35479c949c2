"""How heavy the site's pages are and how soon the first chart stands, beside the same chart as a page of its own made
by altair. Usage: bench_site.py [folder of a built site]"""
import functools
import http.server
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import yaml
from browsing import chromium, wait
from fake_runs import write_study
from test_site import STUDY, silent

from vfm_notes.foundation.spec import load_study
from vfm_notes.report.site import build_site

LIMIT, SOON, TIMES = 3e6, 2.0, 3  # bytes without images, seconds, visits


def made_up() -> Path:
    "A site of a made-up study."
    root = Path(tempfile.mkdtemp())
    os.environ["VFM_RUNS"] = str(root / "runs")
    (root / "made_up.yaml").write_text(yaml.safe_dump(STUDY))
    write_study(load_study(root / "made_up.yaml"))
    return build_site(str(root / "made_up.yaml"), "smalldocs", silent).path.parent


def weight(page: Path) -> tuple[int, int]:
    "Bytes of a page without and with its images."
    text = page.read_text(encoding="utf-8")
    bare = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", text)
    return len(bare.encode()), len(text.encode())


def alone(page: Path, target: Path) -> None:
    "The page's first chart as altair would write it: one HTML file with everything in it."
    import altair as alt
    spec = json.loads(
        re.search(
            r'<figure class="vfm-chart".*?<script type="application/json">(.*?)</script>',
            page.read_text(encoding="utf-8"), re.S,
        )[1].replace("\\u003c", "<")
    )
    spec.pop("usermeta", None)
    target.write_text(
        alt.Chart.from_dict({"$schema": "https://vega.github.io/schema/vega-lite/v6.json"} | spec).to_html(inline=True),
        encoding="utf-8",
    )


def first_chart(browser, url: str) -> float:
    "Seconds from the start of the visit until a chart has marks; nothing is in the cache."
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.get("about:blank")
    begun = time.perf_counter()
    browser.get(url)
    wait(browser, "return document.querySelector('svg.marks, canvas.marks')", 60)
    return time.perf_counter() - begun


site = Path(sys.argv[1]) if len(sys.argv) > 1 else made_up()
pages = sorted(site.glob("*.html"), key=lambda p: -weight(p)[0])
print(
    f"{len(pages)} pages and {len(list(site.glob('reference/*.html')))} of the library in {site}; shared once: "
    + ", ".join(f"{p.name} {p.stat().st_size / 1e6:.2f} MB" for p in sorted((site / "assets").glob("*.js")))
)
print("\nheaviest pages          kB without images   kB with them")
for p in pages[:6]: print(f"{p.stem[:40]:42}{weight(p)[0] / 1e3:10.0f}{weight(p)[1] / 1e3:14.0f}")
print(
    f"over {LIMIT / 1e6:.0f} MB without images: "
    f"{[p.name for p in [*pages, *site.glob('reference/*.html')] if weight(p)[0] > LIMIT] or 'none'}"
)
with_charts = [
    p for p in pages if 'class="vfm-chart"' in p.read_text(encoding="utf-8") and not p.stem.startswith("run-")
]
for p in with_charts: alone(p, site / f"alone-{p.name}")
whole = sum(weight(p)[1] for p in with_charts) + (site / "assets" / "vega.js").stat().st_size
apart = sum(weight(site / f"alone-{p.name}")[1] for p in with_charts)
print(
    f"all {len(with_charts)} pages with charts and the shared library: {whole / 1e6:.1f} MB; one chart of each as "
    f"altair's own files: {apart / 1e6:.1f} MB, {apart / whole:.1f} x"
)

handler = functools.partial(
    type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=str(site)
)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}"
print(
    f"\nfirst chart after ... s (median of {TIMES} visits with an empty cache; load of this machine "
    f"{os.getloadavg()[0]:.1f})"
)
with chromium() as browser:
    browser.execute_cdp_cmd("Network.enable", {})
    first_chart(browser, f"{base}/{with_charts[0].name}")  # the browser itself has to start
    for p in with_charts:
        ours, theirs = (
            statistics.median(first_chart(browser, f"{base}/{name}") for _ in range(TIMES))
            for name in (p.name, f"alone-{p.name}")
        )
        print(
            f"{p.stem:20}{ours:6.2f}   altair's own file {theirs:6.2f}   ratio "
            f"{ours / theirs:.2f}{'   over ' + str(SOON) + ' s' if ours > SOON else ''}"
        )
for p in with_charts: (site / f"alone-{p.name}").unlink()
server.shutdown()
