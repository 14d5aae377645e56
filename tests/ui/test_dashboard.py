"""The dashboard in a real headless Chromium.

Needs `chromium` and `chromedriver` (Debian: chromium, chromium-driver), the packages of
requirements.txt, and a built server; says loudly what is missing and skips otherwise.
STOCKADE_SCREENSHOTS=DIR keeps pictures of what was seen.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

try:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.chrome.service import Service
except ImportError:
    webdriver = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARY = pathlib.Path(os.environ.get("STOCKADE_BINARY", TARGET / "debug" / "stockade"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PATIENCE = 30.0
OPERATOR = "operator-0123456789abcdef01234567"
READER = "reader-0123456789abcdef0123456789"


def missing():
    for what, found in [
        ("the Python package selenium (pip install -r tests/ui/requirements.txt)", webdriver),
        ("chromium", CHROMIUM),
        ("chromedriver (Debian: chromium-driver)", DRIVER),
        (f"{BINARY} (cargo build)", BINARY.exists()),
    ]:
        if not found:
            return what
    return None


def wait_for(what, condition):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come within {PATIENCE} s")


class Server:
    """A server of its own ports with two plugins."""

    def __init__(self, directory, *flags):
        ticker = directory / "ticker.sh"
        ticker.write_text("i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.2; done\n")
        guest = ROOT / "tests" / "guests" / "sleep_loop.wat"
        command = [str(BINARY), "serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0"]
        command += ["--l1-size-gb", "0.0625", "--chunk-size", "16"]
        command += ["--plugin-cache-dir", str(directory / "cache")]
        command += ["--runtime-plugin-locations", str(ticker), str(guest), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        line = wait_for("the server", lambda: next((it for it in self.lines if "serving on" in it), None))
        self.url = re.search(r"HTTP on (http://\S+)", line).group(1)
        self.zmq = re.search(r"serving on (tcp://\S+)", line).group(1)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def json(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()


def browser(width, height):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 "--hide-scrollbars", f"--window-size={width},{height}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    # The window has a least width of its own; the page is told the width of a phone here.
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700})
    return driver


@unittest.skipIf(missing(), f"THE DASHBOARD IS NOT TESTED, missing: {missing()}")
class Dashboard(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)

    def serve(self, *flags):
        server = Server(self.directory, *flags)
        self.addCleanup(server.stop)
        return server

    def open(self, server, width=1280, height=1400):
        driver = browser(width, height)
        self.addCleanup(driver.quit)
        driver.get(server.url + "/ui")
        return driver

    def keep(self, driver, name):
        directory = os.environ.get("STOCKADE_SCREENSHOTS")
        if directory:
            height = driver.execute_script("return document.documentElement.scrollHeight")
            width = driver.execute_script("return innerWidth")
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                   {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700})
            time.sleep(0.3)
            driver.save_screenshot(str(pathlib.Path(directory) / f"{name}.png"))

    def row(self, driver, plugin):
        return wait_for(f"the row of {plugin}",
                        lambda: next(iter(driver.find_elements(By.CSS_SELECTOR, f"tr[data-name={plugin}]")), None))

    def cells(self, driver, plugin):
        return [cell.get_attribute("textContent") for cell in self.row(driver, plugin).find_elements(By.TAG_NAME, "td")]

    def click(self, driver, plugin, action):
        button = self.row(driver, plugin).find_element(By.CSS_SELECTOR, f"[data-action={action}]")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def test_a_plugin_is_stopped_started_and_restarted_by_clicks(self):
        server = self.serve()
        driver = self.open(server)
        wait_for("a running plugin", lambda: self.cells(driver, "ticker")[1] == "running")
        self.click(driver, "ticker", "stop")
        wait_for("its stop", lambda: self.cells(driver, "ticker")[1] == "stopped")
        self.assertEqual(server.json("/v1/plugins/ticker")["state"], "stopped")
        self.click(driver, "ticker", "start")
        wait_for("its start", lambda: self.cells(driver, "ticker")[1] == "running")
        before = server.json("/v1/plugins/ticker")["restarts"]
        self.click(driver, "ticker", "restart")
        wait_for("its restart", lambda: server.json("/v1/plugins/ticker")["restarts"] == before + 1)
        wait_for("its restart in the page", lambda: self.cells(driver, "ticker")[4] == str(before + 1))
        wait_for("it runs again", lambda: self.cells(driver, "ticker")[1] == "running")

    def test_the_log_is_followed(self):
        server = self.serve()
        driver = self.open(server)
        self.click(driver, "ticker", "log")
        log = driver.find_element(By.ID, "log")
        wait_for("lines", lambda: "tick 0" in log.text)
        seen = log.text.count("tick")
        wait_for("more lines", lambda: log.text.count("tick") > seen + 3)

    def test_it_asks_nobody_else_and_breaks_no_rule_of_its_policy(self):
        server = self.serve()
        driver = self.open(server)
        wait_for("numbers", lambda: "%" in driver.find_element(By.ID, "pool").text)
        urls = [
            message["params"]["request"]["url"]
            for message in (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
            if message["method"] == "Network.requestWillBeSent"
        ]
        self.assertTrue(urls)
        foreign = [url for url in urls if not url.startswith((server.url + "/", "data:"))]
        self.assertEqual(foreign, [])
        severe = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        self.assertEqual(severe, [])

    def test_a_token_is_asked_for_and_its_role_is_respected(self):
        tokens = self.directory / "tokens.toml"
        tokens.write_text(
            f"[[token]]\nname = 'ops'\nrole = 'operator'\ntoken = '{OPERATOR}'\n"
            f"[[token]]\nname = 'look'\nrole = 'read-only'\ntoken = '{READER}'\n")
        tokens.chmod(0o600)
        server = self.serve("--http-token-file", str(tokens))
        driver = self.open(server)
        def give(token):
            box = wait_for("the question", lambda: next(
                (it for it in driver.find_elements(By.ID, "ask-token") if it.is_displayed()), None))
            box.send_keys(token)
            driver.find_element(By.ID, "ask-ok").click()
        give(READER)
        wait_for("a running plugin", lambda: self.cells(driver, "ticker")[1] == "running")
        self.click(driver, "ticker", "restart")
        problem = driver.find_element(By.ID, "problem")
        wait_for("a refusal", lambda: "operator" in problem.text)
        driver.execute_script("scrollTo(0, 0)")
        driver.find_element(By.ID, "token").click()
        give(OPERATOR)
        self.click(driver, "ticker", "restart")
        wait_for("its restart", lambda: self.cells(driver, "ticker")[4] == "1")

    def test_it_is_readable_on_a_phone_and_in_the_dark(self):
        settings = self.directory / "stockade.toml"
        settings.write_text(
            "[tenants.acme]\nsalts = ['acme']\nfloor_gb = 0.02\ncap_gb = 0.04\n"
            "[tenants.beta]\nsalts = ['beta']\ncap_gb = 0.01\n")
        server = self.serve("--config", str(settings))
        self.addCleanup(load(server))
        for name, width, dark in [("dashboard-light", 1280, False), ("dashboard-dark", 1280, True), ("dashboard-phone", 390, False)]:
            driver = self.open(server, width, 900)
            wait_for("numbers", lambda: "%" in driver.find_element(By.ID, "pool").text)
            theme = "dark" if dark else "light"
            if driver.execute_script("return document.documentElement.dataset.theme") != theme:
                driver.find_element(By.ID, "theme").click()
            self.row(driver, "ticker")
            wide = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
            self.assertLessEqual(wide, 0, f"{name} scrolls sideways")
            contrast = driver.execute_script("""
                const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
                const light = (c) => { const [r, g, b] = rgb(c).map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
                const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
                const card = light(getComputedStyle(document.querySelector('.tile')).backgroundColor);
                return ['.tile strong', '.dim', '.badge.good', 'td.end'].map((s) => ratio(light(getComputedStyle(document.querySelector(s)).color), card));
            """)
            for ratio in contrast:
                self.assertGreaterEqual(ratio, 4.5, f"{name}: {contrast}")
            if os.environ.get("STOCKADE_SCREENSHOTS"):
                self.click(driver, "ticker", "log")
                wait_for("lines", lambda: "tick" in driver.find_element(By.ID, "log").text)
                driver.execute_script("scrollTo(0, 0)")
            self.keep(driver, name)


def load(server):
    """Something to look at, if the pictures are kept; returns what ends it."""
    if not os.environ.get("STOCKADE_SCREENSHOTS"):
        return lambda: None
    def bench(salt, seconds):
        command = [str(BINARY), "bench", "--url", server.zmq, "--workload", "chat", "--tokens", "1024",
                   "--chunk-kib", "16", "--turns", "1", "--seconds", str(seconds), "--cache-salt", salt]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for salt, seconds in [("acme", 5), ("beta", 3), ("", 4)]:
        bench(salt, seconds).wait()
    last = bench("acme", 120)
    time.sleep(12)
    def end():
        last.kill()
        last.wait()
    return end


if __name__ == "__main__":
    if missing():
        print(f"THE DASHBOARD IS NOT TESTED, missing: {missing()}", file=sys.stderr)
    unittest.main()
