"""A Chromium without a screen that opens pages as people see them: any width, in the light or in the dark.

It is driven over its DevTools protocol, JSON messages on a WebSocket of this machine
(https://chromedevtools.github.io/devtools-protocol). Nothing is loaded from elsewhere: pages are files.
"""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["NAMES", "Seen", "find_browser", "look_at", "running_browser"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
START_S = 60.0
ANSWER_S = 60.0
# What reaches beyond the right edge of the page and is in nothing that scrolls by itself.
CUT_OFF = """(() => {
  const scrolls = node =>
    node && (["auto", "scroll"].includes(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
  return [...document.querySelectorAll("body *")]
    .filter(node => node.getBoundingClientRect().right > innerWidth + 1 && !scrolls(node))
    .map(node => node.tagName + " " + node.textContent.trim().slice(0, 40));
})()"""
# Words wider than the box that they are in.
OVERFLOWING = """[...document.querySelectorAll("h1, h2, p, dd, li, .tile, th, td, figure, summary")]
  .filter(node => node.clientWidth && node.scrollWidth > node.clientWidth + 1)
  .map(node => node.textContent.trim().slice(0, 40))"""
# Text whose contrast with what is behind it is below that of WCAG 2 for normal text, 4.5.
FAINT = """(() => {
  const rgb = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => {
    const [r, g, b] = rgb(color).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    const color = getComputedStyle(node).backgroundColor;
    return rgb(color)[3] === 0 && node.parentElement ? behind(node.parentElement) : color;
  };
  const contrast = node => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  };
  const speaks = node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  return [...document.querySelectorAll("body *")]
    .filter(node => node.tagName !== "SCRIPT" && speaks(node) && contrast(node) < 4.5)
    .map(node => node.textContent.trim().slice(0, 40) + " " + contrast(node).toFixed(1));
})()"""
UNFOLD = "document.querySelectorAll('details').forEach(folded => folded.open = true)"


@dataclass(frozen=True)
class Seen:
    """A page as it was shown.

    Attributes:
        complaints: Errors of its scripts, what the console was told, and images that cannot be decoded.
        cut_off: What reaches beyond the right edge of the page or out of its box, with the text in it.
        faint: Text that cannot be told from what is behind it.
        brightness: Of the background, in [0, 255].
        answers: What the expressions gave.
        png: The whole page.
    """

    complaints: list[str]
    cut_off: list[str]
    faint: list[str]
    brightness: float
    answers: list[Any]
    png: bytes


def find_browser() -> str | None:
    """The program, if one is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def running_browser(program: str, profile: Path) -> Iterator[str]:
    """A browser with an empty profile, and the address that it listens at."""
    process = subprocess.Popen(
        [program, *OPTIONS, f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port, end = profile / "DevToolsActivePort", time.monotonic() + START_S
        while not (port.exists() and len(lines := port.read_text().splitlines()) == 2):
            assert process.poll() is None and time.monotonic() < end, f"{program} did not begin"
            time.sleep(0.05)
        yield f"ws://127.0.0.1:{lines[0]}{lines[1]}"
    finally:
        process.terminate()
        process.wait(START_S)


def look_at(browser: str, page: Path, *, width: int, is_dark: bool = False, expressions: Sequence[str] = ()) -> Seen:
    """Open a page with all that is folded up, run JavaScript expressions in it, and take a picture.

    Args:
        browser: The address of a running one.
        width: Of the window, CSS pixels; below 640 it is that of a phone.
    """
    return asyncio.run(_look(browser, page, width, is_dark, expressions))


async def _look(browser: str, page: Path, width: int, is_dark: bool, expressions: Sequence[str]) -> Seen:
    async with aiohttp.ClientSession() as session, session.ws_connect(browser, max_msg_size=0) as socket:
        tab = _Tab(socket)
        target = (await tab.call("Target.createTarget", url="about:blank"))["targetId"]
        tab.session = (await tab.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        is_phone = width < 640
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": is_phone}
        await tab.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await tab.call("Emulation.setEmulatedMedia", features=[scheme])
        await tab.call("Page.navigate", url=page.resolve().as_uri())
        await tab.event("Page.loadEventFired")
        await tab.evaluate(UNFOLD)
        # Images that are shown late are waited for.
        shown = "(i.loading = 'eager', i.decode().catch(() => i.alt))"
        broken = await tab.evaluate(f"Promise.all([...document.images].map(i => {shown}))")
        tab.complaints += [f"an image cannot be decoded: {alt}" for alt in filter(None, broken)]
        answers = [await tab.evaluate(expression) for expression in expressions]
        cut_off = await tab.evaluate(CUT_OFF) + await tab.evaluate(OVERFLOWING)
        faint = await tab.evaluate(FAINT)
        background = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(float, re.findall(r"[\d.]+", background)[:3])) / 3
        taken = await tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        await tab.call("Target.closeTarget", targetId=target, of_browser=True)
        return Seen(tab.complaints, cut_off, faint, brightness, answers, base64.b64decode(taken["data"]))


class _Tab:
    """Calls to one tab, and what it tells meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.session: str | None = None
        self.complaints: list[str] = []
        self._socket, self._number, self._events = socket, 0, set[str]()

    async def call(self, method: str, *, of_browser: bool = False, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session is not None and not of_browser:
            message["sessionId"] = self.session
        await self._socket.send_json(message)
        while (answer := await self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    async def event(self, name: str) -> None:
        while name not in self._events:
            await self._next()

    async def evaluate(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json(timeout=ANSWER_S)
        self._events.add(message.get("method", ""))
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str([argument.get("value") for argument in told["args"]]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(str(told["entry"]["text"]))
        return message
