"""Chromium without a window, by its own driver: the W3C's protocol, JSON over HTTP."""

import json
import re
import shutil
import subprocess
from urllib.request import ProxyHandler, Request, build_opener

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
KEYS = {"TAB": "\ue004", "ENTER": "\ue007", "ESCAPE": "\ue00c", "SPACE": " ", "END": "\ue010"}
KEYS["ARROW_RIGHT"] = "\ue014"


class Chromium:
    """One browser; elements go in and out of scripts as the protocol has them."""

    def __init__(self):
        self.process = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        said = (re.search(r"successfully on port (\d+)", line) for line in self.process.stdout)
        port = next(filter(None, said))[1]
        self.address = f"http://127.0.0.1:{port}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": BROWSER, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            found = self.ask("POST", "", capabilities={"alwaysMatch": options})
        except BaseException:
            self.end()
            raise
        self.address += f"/{found['sessionId']}"

    def ask(self, method, path, **given):
        data = json.dumps(given).encode() if method == "POST" else None
        request = Request(self.address + path, data, method=method)
        with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script, *arguments):
        """What a script returns."""
        return self.ask("POST", "/execute/sync", script=script, args=arguments)

    def tell(self, command, **given):
        """A command of the browser's own protocol."""
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=given)

    def open(self, url):
        self.ask("POST", "/url", url=url)

    def log(self, kind):
        """What has been logged since it was asked for before."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", type=kind)]

    def press(self, *names):
        for key in (KEYS[name] for name in names):
            steps = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
            self.ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def point(self, element, *, click=False):
        """Move the pointer over an element."""
        steps = [{"type": "pointerMove", "x": 0, "y": 0, "origin": element}]
        steps += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp") if click]
        mouse = {"type": "pointer", "id": "mouse", "actions": steps}
        self.ask("POST", "/actions", actions=[mouse])

    def end(self):
        if not self.address.endswith("/session"):
            self.ask("DELETE", "")
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
