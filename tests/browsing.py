"""A headless Chromium whose network is blocked, and patience."""
import json
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

# fetched by `make programs`
AXE = Path(__file__).resolve().parents[1]/".venv"/"share"/"axe"/"axe_playwright_python"/"axe.min.js"


@contextmanager
def chromium():
    "Chromium that reaches nothing but this machine."
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chrome, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chrome or not driver: pytest.skip("chromium or chromedriver is not on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for a in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--window-size=1300,900", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(a)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try: yield made
    finally: made.quit()


def wait(browser, script, seconds=300):
    "Wait until a script gives something true; the limit only ends a test that hangs."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := browser.execute_script(script): return found
        time.sleep(0.05)
    raise AssertionError(f"never came true: {script}")


def asked(browser, base):
    "Addresses outside of `base` that were asked for since the last call, and errors that were told."
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return errors, [u for u in urls if not u.startswith((base, "data:", "blob:", "file:///", "chrome:"))]


def luminance(rgb):
    "Relative luminance (WCAG) of 'rgb(r, g, b)'."
    part = [int(v) / 255 for v in re.findall(r"\d+", rgb)[:3]]
    return sum(
        w * (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4)
        for w, v in zip((0.2126, 0.7152, 0.0722), part)
    )
