"""The status page as a browser draws it of the experiment over gRPC: pictures of it, and its lines held against the
learners of this process, point by point."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

from cbp import LayerPlasticity
from experiments.service import Followed, learner_id
from experiments.tables import markdown

PIXELS = 0.01
"""More than rounding puts a line off, and less than an eye sees."""
_FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run")
_TASK_CHART = "Accuracy by task"
_OF_LAYER: Mapping[str, Callable[[LayerPlasticity], float | None]] = {
    "Mean |w|": lambda layer: layer.mean_abs_weight,
    "Dormant units": lambda layer: layer.dormant_fraction,
    "Effective rank": lambda layer: layer.effective_rank,
}
"""What the other charts have a line of for each layer."""


@dataclass(frozen=True)
class Chart:
    """One chart that the page has drawn of one learner."""

    learner: str
    title: str
    lines: int
    points: int
    off: float
    """Pixels by which any point is from where the learner's own number belongs on the chart's scale, which is the one
    that fits best; infinite if there is another number of points."""


def photograph(browser_path: str, http_url: str, followed: Sequence[Followed], directory: Path) -> list[Chart]:
    """Writes pictures of the page, the list of learners and the first one in full; all charts that it draws."""
    charts: list[Chart] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(_FLAGS))
        page = browser.new_page(viewport={"width": 1400, "height": 480})
        page.goto(http_url, wait_until="networkidle")
        page.screenshot(path=directory / "service_status.png")
        for place, learner in enumerate(followed):
            name = learner_id(learner.cell)
            page.goto(f"{http_url}/#/learners/{name}", wait_until="networkidle")
            page.get_by_role("heading", name=name).wait_for()
            page.locator("path.line").nth(2).wait_for()  # history comes after the tasks
            charts += _charts(page, learner)
            if place == 0:
                page.screenshot(path=directory / "service_learner.png", full_page=True)
        browser.close()
    return charts


def _charts(page: Page, learner: Followed) -> Iterator[Chart]:
    for figure in page.locator("figure.chart:visible").all():
        title = figure.locator("h3").inner_text()
        layers = [entry.inner_text() for entry in figure.locator("ul.legend li").all()]
        drawn = [
            [float(height) for height in re.findall(r"[ML]\S+ ([^L]+)", line.get_attribute("d") or "")]
            for line in figure.locator("path.line").all()
        ]
        own = (
            [list(learner.accuracies)] if title == _TASK_CHART else [_numbers(learner, title, name) for name in layers]
        )
        off = _pixels_off(drawn, own)
        yield Chart(learner_id(learner.cell), title, len(drawn), sum(len(heights) for heights in drawn), off)


def _numbers(learner: Followed, title: str, name: str) -> list[float]:
    """Of a layer, from all samples that have one."""
    layers = (layer for sample in learner.samples for layer in sample.layers if layer.layer == name)
    return [number for number in map(_OF_LAYER[title], layers) if number is not None]


def _pixels_off(drawn: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> float:
    if [len(line) for line in drawn] != [len(line) for line in own]:
        return float("inf")
    heights, numbers = np.concatenate(drawn), np.concatenate(own)
    columns = np.stack([numbers, np.ones_like(numbers)], axis=1)
    scale, *_ = np.linalg.lstsq(columns, heights, rcond=None)
    return float(np.abs(columns @ scale - heights).max())


def chart_table(charts: Sequence[Chart]) -> str:
    """What each chart has drawn of all learners, and how far it is off."""
    rows = []
    for title in dict.fromkeys(chart.title for chart in charts):
        drawn = [chart for chart in charts if chart.title == title]
        counts = (sum(chart.lines for chart in drawn), sum(chart.points for chart in drawn))
        rows.append([title, *map(str, counts), f"{max(chart.off for chart in drawn):.1e}"])
    return markdown(("chart", "lines", "points", "pixels off at most"), rows)
