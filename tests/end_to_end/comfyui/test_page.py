"""ComfyUI's real page in a headless browser: search, help, the template browser, and a run of each example.

Needs Chromium with its driver, and selenium and comfyui-frontend-package in this Python. ``XDITD_SCREENSHOTS`` names a
folder for screenshots, such as those of docs/comfyui.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("comfyui_frontend_package", reason="comfyui-frontend-package is not installed")

from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

NODES = {
    "XDiTUNetLoader": "XDiT UNet Loader",
    "XDiTAccelerate": "XDiT Accelerate",
    "XDiTVAELoader": "Load VAE (xDiT)",
    "XDiTCLIPLoader": "Load CLIP (xDiT)",
    "XDiTCLIPVisionLoader": "Load CLIP Vision (xDiT)",
    "XDiTDualCLIPLoader": "Load Dual CLIP (xDiT)",
    "XDiTKSampler": "XDiT KSampler",
    "XDiTStatus": "XDiT Status",
}
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,900"
)
SMALL = {"width": 256, "height": 256, "steps": 6}


class Page:
    """The page, by what a user does on it."""

    def __init__(self, driver: Any, url: str, wait_until: Callable[..., Any]) -> None:
        self._driver = driver
        self._wait_until = wait_until
        driver.get(url)
        self.wait("return !!(window.app && window.app.graph && window.app.extensionManager)", "the page to load")
        self.wait("return window.LiteGraph.registered_node_types.KSampler !== undefined", "its nodes")
        self._wait_until(self._close_minimap, "the minimap to close")

    def run(self, script: str, *arguments: Any) -> Any:
        return self._driver.execute_script(script, *arguments)

    def wait(self, script: str, what: str, *arguments: Any) -> Any:
        return self._wait_until(lambda: self.run(script, *arguments), what)

    def command(self, name: str) -> None:
        self.run("window.app.extensionManager.command.execute(arguments[0])", name)

    def shown(self, selector: str) -> list[Any]:
        return [each for each in self._driver.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]

    def element(self, selector: str) -> Any:
        return self._wait_until(lambda: next(iter(self.shown(selector)), None), f"{selector} on the page")

    def press(self, key: str) -> None:
        ActionChains(self._driver).send_keys(key).perform()

    def close_dialogs(self) -> None:
        def is_clear() -> bool:
            if not self.shown("[role=dialog], [data-testid='dialog-overlay']"):
                return True
            self.press(Keys.ESCAPE)
            return False

        # The template browser opens itself on the first visit, some moments after the page is there.
        self.wait("return window.app.extensionManager.setting.get('Comfy.TutorialCompleted')", "the first visit's end")
        self._wait_until(is_clear, "dialogs to close")

    def _close_minimap(self) -> bool:
        self.close_dialogs()
        buttons = self.shown("[data-testid='close-minimap-button']")
        if buttons:
            with contextlib.suppress(ElementClickInterceptedException):  # a dialog opened just now
                buttons[0].click()
        return not buttons

    def search(self, text: str) -> list[str]:
        """Double-click on an empty place, type, and read what is found."""
        canvas = self.element("#graph-canvas")
        ActionChains(self._driver).move_to_element_with_offset(canvas, 0, 330).double_click().perform()
        box = self.element("input[role=combobox]")
        box.send_keys(text)
        self._wait_until(lambda: self.shown("[data-testid='result-item']"), "search results")
        return [each.text for each in self.shown("[data-testid='result-item']")]

    def open_example(self, name: str) -> None:
        """Choose an example of the pack in the template browser."""
        self.command("Comfy.BrowseTemplates")
        find = "return [...document.querySelectorAll('nav *')].filter(e => e.textContent.trim() == 'xditd').length"
        self.wait(find, "the pack in the template browser")
        entry = self._driver.find_elements(By.XPATH, "//nav//*[normalize-space(.)='xditd']")[-1]
        self.run("arguments[0].scrollIntoView()", entry)
        entry.click()
        card = self.element(f"[data-testid='template-workflow-{name}']")
        self.screenshot("templates")
        card.click()
        self.wait("return window.app.graph._nodes.some(node => node.type.startsWith('XDiT'))", "the workflow")
        self.command("Comfy.Canvas.FitView")

    def select(self, kind: str) -> None:
        self.run(
            "const canvas = window.app.canvas; const node = window.app.graph._nodes.find(n => n.type == arguments[0]);"
            "canvas.deselectAll(); canvas.selectNode(node); canvas.centerOnNode(node)",
            kind,
        )

    def set_widgets(self, values: dict[str, Any]) -> None:
        self.run(
            "for (const node of window.app.graph._nodes) for (const widget of node.widgets || [])"
            "  if (widget.name in arguments[0]) { widget.value = arguments[0][widget.name]; }",
            values,
        )

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("XDITD_SCREENSHOTS")
        if folder:
            self._driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def driver(server, tmp_path_factory) -> Iterator[Any]:
    binary, service = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or service is None:
        pytest.skip("chromium or chromedriver is not on the PATH")
    options = Options()
    options.binary_location = binary
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    started = webdriver.Chrome(options=options, service=Service(service))
    yield started
    started.quit()


@pytest.fixture
def page(driver, server, wait_until) -> Page:
    return Page(driver, server.url, wait_until)


def test_nodes_are_found_by_search(page):
    found = page.search("xdit")
    page.screenshot("search")
    for title in NODES.values():
        assert any(title in text for text in found), (title, found)


def test_every_node_shows_its_help(page):
    for kind, title in NODES.items():
        page.run(
            "window.app.graph.clear(); const node = window.LiteGraph.createNode(arguments[0]);"
            "window.app.graph.add(node)",
            kind,
        )
        page.select(kind)
        page.element("[data-testid='info-button']").click()
        page.wait(
            "return [...document.querySelectorAll('h1')].some(e => e.textContent.trim() == arguments[0])", title, title
        )
        if kind == "XDiTAccelerate":
            page.screenshot("help")


@pytest.mark.parametrize("name", ["flux1_xdit", "flux1_accelerate"])
def test_an_example_loads_and_runs(name, page, server, wait_until):
    page.open_example(name)
    assert not page.shown("[role=dialog]")  # which would list what is missing
    types = page.run("return window.app.graph._nodes.map(node => node.type)")
    assert page.run("return window.app.graph._nodes.filter(n => !n.constructor.nodeData).map(n => n.type)") == []
    assert any(kind in NODES for kind in types)
    page.screenshot(f"{name}_loaded")
    page.set_widgets(SMALL)
    if "DualCLIPLoader" in types:  # it takes text encoders of the real sizes only
        page.run(
            "const graph = window.app.graph; const old = graph._nodes.find(n => n.type == 'DualCLIPLoader');"
            "const node = window.LiteGraph.createNode('XDiTDualCLIPLoader'); node.pos = old.pos; graph.add(node);"
            "for (const widget of node.widgets) widget.value = old.widgets.find(w => w.name == widget.name).value;"
            "const target = graph._nodes.find(n => n.type == 'CLIPTextEncode'); node.connect(0, target, 0);"
            "graph.remove(old)"
        )
    before = set(server.ask("/history"))
    page.element("[data-testid='queue-button']").click()
    done = wait_until(lambda: set(server.ask("/history")) - before or None, "the prompt to end", server.log)
    outcome = server.outcome(done.pop())
    assert outcome["status"]["status_str"] == "success"
    page.wait(
        "return window.app.graph._nodes.some(n => n.type == 'SaveImage' && n.imgs && n.imgs.length == 1)",
        "the picture on the page",
    )
    if name == "flux1_xdit":
        text = page.wait(
            "const node = window.app.graph._nodes.find(n => n.type == 'XDiTKSampler');"
            "return (node.widgets || []).map(w => w.value).find(v => String(v).startsWith('fused'))",
            "what the node says",
        )
        assert text == "fused: 6 steps in the workers"
    page.command("Comfy.Canvas.FitView")
    page.screenshot(name)
