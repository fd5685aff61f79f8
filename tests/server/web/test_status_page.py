"""The status page and /docs, as a person with a browser meets them."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from network_kinds import NETWORKS, plain_spec
from playwright.sync_api import Locator, Page, expect

from cbp import LearnerSpec, TaskRecord
from cbp_server.records.learners import Durability, JournalStatus, LearnerRecord, LearnerState

MakeLearner = Callable[..., LearnerRecord]


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row", name=re.compile(name))


def cell(page: Page, name: str, column: str) -> Locator:
    return row(page, name).locator(f"[data-label='{column}']")


def test_the_list_shows_each_learner(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"), make_learner("prices", state=LearnerState.UNAVAILABLE))
    page.goto("/")
    expect(page).to_have_title("cbp server")
    expect(page.locator("#engine")).to_contain_text("Engine up · 1 restart · cpu · running")
    for column, text in {
        "State": "active",
        "Network": "64–2×100–10 relu",
        "Resets": "first",
        "Steps": "2,000",
        "Loss": "0.410",
        "Accuracy": "87.4 %",
        "Task": "tuesday",
        "Dormant": "6.0 %",
        "Mean |w|": "0.0530",
        "Eff. rank": "63.5 / 100",
    }.items():
        expect(cell(page, "clicks", column)).to_have_text(text)
    expect(cell(page, "prices", "State")).to_have_text("unavailable")


def test_each_state_looks_like_what_it_is(
    host: Any, page: Page, make_learner: MakeLearner, quarantined: MakeLearner
) -> None:
    host.add(make_learner("clicks"), make_learner("idle", state=LearnerState.EVICTED), quarantined("prices"))
    host.add(make_learner("gone", state=LearnerState.DELETED, delete_time=host.journal.since))
    page.goto("/")
    expect(page.locator(".states")).to_have_text(
        "1 active · 1 evicted · 1 quarantined · 1 deleted, to be seen with cbp learners list --deleted"
    )
    expect(page.locator(".figures")).to_contain_text("Learners3")
    expect(row(page, "gone")).to_have_count(0)
    for name, state, look in (
        ("clicks", "active", "state"),
        ("idle", "evicted", "state away"),
        ("prices", "quarantined", "state notable"),
    ):
        expect(cell(page, name, "State")).to_have_text(state)
        expect(cell(page, name, "State").locator("span")).to_have_class(look)
    banner = page.get_by_role("alert")
    expect(banner).to_have_text("Quarantined, and waiting to be resumed: prices.")
    banner.get_by_role("link", name="prices").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("prices")


def test_methods_beside_resets_are_shown(host: Any, page: Page, make_learner: MakeLearner) -> None:
    methods = [{"kind": "l2_init", "strength": 0.01}, {"kind": "shrink_and_perturb", "shrink": 0.9, "perturb": 0.1}]
    record = make_learner("clicks")
    plain = record.spec.to_plain()
    spec = LearnerSpec.parse(plain | {"methods": methods, "resets": plain["resets"] | {"layers": "none"}})
    host.add(replace(record, spec=spec, engine="module"))
    page.goto("/#/learners/clicks")
    facts = page.locator(".facts")
    expect(facts).to_contain_text("l2 init, strength 0.01; shrink and perturb, shrink 0.9, perturb 0.1, interval 1")
    expect(facts).to_contain_text("none")
    expect(facts).not_to_contain_text("plain backprop")


def test_networks_of_every_kind_are_shown(host: Any, page: Page, make_learner: MakeLearner) -> None:
    for name in NETWORKS:
        spec = LearnerSpec.parse(plain_spec(name))
        host.add(replace(make_learner(name.replace(" ", "-")), spec=spec, engine="module"))
    page.goto("/")
    for name, text in {
        "linear": "linear 5 to 3",
        "mlp with layer normalization": "5–8–7–3 relu",
        "convnet": "convnet 3×6×8 to 3 relu",
        "transformer of tokens": "transformer 6 to 3 gelu",
        "transformer of sequences": "transformer 6×4 to 3 gelu",
    }.items():
        expect(cell(page, f"^{name.replace(' ', '-')} ", "Network")).to_have_text(text)
    assert "undefined" not in page.locator("table").inner_text()


def test_all_active_needs_no_words(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    page.goto("/")
    expect(row(page, "clicks")).to_be_visible()
    expect(page.locator(".states")).to_be_empty()


def test_a_quarantined_learner_says_why_and_what_to_do(host: Any, page: Page, quarantined: MakeLearner) -> None:
    host.add(quarantined("prices"))
    page.goto("/#/learners/prices")
    notice = page.get_by_role("region", name="What this learner's state means")
    expect(notice).to_contain_text("Training diverged: at step 2001 the loss became infinite or not a number")
    expect(notice).to_contain_text("Batch 41 of producer web-1, at position 77 of the journal")
    for command in (
        "cbp learners resume prices --lr 0.001",
        "cbp learners resume prices --skip-batch",
        "cbp learners restore prices --checkpoint NUMBER",
    ):
        expect(notice.get_by_text(command, exact=True)).to_be_visible()
    host.add(replace(host.records["prices"], state=LearnerState.ACTIVE, quarantine=None))
    expect(notice).to_be_hidden()
    expect(page.locator("h1 .state")).to_have_text("active")


def test_a_quarantine_without_a_journal_has_no_batch_to_skip(host: Any, page: Page, quarantined: MakeLearner) -> None:
    host.add(quarantined("prices", position=0, durability=Durability.NONE))
    page.goto("/#/learners/prices")
    notice = page.get_by_role("region", name="What this learner's state means")
    expect(notice.get_by_text("cbp learners resume prices", exact=True)).to_be_visible()
    expect(notice).not_to_contain_text("--skip-batch")
    expect(notice).to_contain_text("as its newest checkpoint has it")


def test_an_evicted_learner_is_no_error(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("idle", state=LearnerState.EVICTED, samples=0))
    page.goto("/#/learners/idle")
    expect(page.locator(".notice")).to_contain_text("the first batch or prediction brings it back")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_numbers_follow_the_server(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    page.goto("/")
    expect(cell(page, "clicks", "Steps")).to_have_text("2,000")
    record = host.records["clicks"]
    host.add(replace(record, progress=replace(record.progress, step=3500, examples=3500)), make_learner("prices"))
    expect(cell(page, "clicks", "Steps")).to_have_text("3,500")
    expect(cell(page, "clicks", "Examples/s")).not_to_have_text(re.compile("^[0–]$"))
    expect(row(page, "prices")).to_be_visible()


def test_without_learners_it_says_how_to_make_one(host: Any, page: Page, make_learner: MakeLearner) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", name="No learners yet")).to_be_visible()
    expect(page.locator("pre")).to_contain_text("learner = client.create_learner(")
    expect(page.get_by_role("table")).to_be_hidden()
    host.add(make_learner("clicks"))
    expect(row(page, "clicks")).to_be_visible()
    expect(page.get_by_role("heading", name="No learners yet")).to_be_hidden()


def test_a_long_list_is_shown_in_parts(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(*(make_learner(f"learner-{number:02}") for number in range(60)))
    page.goto("/")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Show more (10 not shown)").click()
    expect(rows).to_have_count(60)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()


def test_a_learner_in_full(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    page.goto("/")
    page.get_by_role("link", name="clicks").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("clicks")
    expect(page).to_have_title("clicks · cbp server")
    facts = page.locator(".facts")
    expect(facts).to_contain_text("first layer, rate 0.0001, mature after 100 steps, by adaptable contribution")
    expect(facts).not_to_contain_text("Methods")
    expect(facts).to_contain_text("step 1,600")
    expect(facts).to_contain_text("fsync: what is acknowledged survives a power cut")
    expect(facts).to_contain_text("76, 15 behind the checkpoint")
    for title, newest in {
        "Accuracy by task": "accuracy 90.0 %",
        "Mean |w|": "hidden_0 0.0530, hidden_1 0.0530, output 0.0530",
        "Dormant units": "hidden_0 4.0 %, hidden_1 8.0 %",
        "Effective rank": "hidden_0 63.5, hidden_1 63.5",
    }.items():
        chart = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))
        expect(chart.get_by_role("img")).to_have_attribute("aria-label", re.compile(re.escape(f"Newest: {newest}.")))
        expect(chart.locator("path.line").first).to_have_attribute("d", re.compile("^M.+L"))
    expect(page.get_by_role("row", name=re.compile("hidden_1 100 ")).get_by_role("cell", name="8.0 %")).to_be_visible()
    expect(page.get_by_role("row", name="web-1 3 40 32")).to_be_visible()
    page.get_by_role("link", name="Learners").click()
    expect(row(page, "clicks")).to_be_visible()


def test_what_does_not_concern_a_learner_is_not_shown(
    host: Any, page: Page, make_learner: MakeLearner, tested: MakeLearner
) -> None:
    host.add(make_learner("clicks"), tested("prices"))
    trainability = page.locator("figure", has=page.get_by_role("heading", name="Trainability"))
    page.goto("/#/learners/clicks")
    expect(page.get_by_role("columnheader", name="Grad. rank")).to_be_visible()
    expect(page.get_by_role("columnheader", name="Saturated")).to_be_hidden()
    expect(page.get_by_role("row", name=re.compile("hidden_0")).locator("td:visible")).to_have_count(14)
    expect(trainability).to_be_hidden()
    page.goto("/#/learners/prices")
    expect(trainability.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"Newest: score 80\.0 %\."))
    expect(trainability.locator("circle.dot")).to_have_count(2)


def test_a_chart_is_read_with_mouse_and_keys(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    page.goto("/#/learners/clicks")
    chart = page.locator("figure", has=page.get_by_role("heading", name="Accuracy by task"))
    plot, reading = chart.get_by_role("img"), chart.get_by_role("status")
    plot.hover(position={"x": 60, "y": 100})
    expect(reading).to_have_text("monday: 80.0 %")
    plot.press("End")
    expect(reading).to_have_text("tuesday: 90.0 %")
    plot.press("ArrowLeft")
    expect(reading).to_have_text("monday: 80.0 %")
    plot.press("Escape")
    expect(reading).to_be_empty()


def test_charts_grow_with_new_samples(host: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks", samples=2))
    page.goto("/#/learners/clicks")
    chart = page.locator("figure", has=page.get_by_role("heading", name="Mean |w|")).get_by_role("img")
    expect(chart).to_have_attribute("aria-label", re.compile("hidden_0 0.0520"))
    host.add(make_learner("clicks", samples=6))
    expect(chart).to_have_attribute("aria-label", re.compile("hidden_0 0.0560"))


def test_regression_shows_the_loss_by_task(host: Any, page: Page, make_learner: MakeLearner) -> None:
    learner = make_learner("prices", accuracy=None)
    learner.spec = type(learner.spec).parse({**learner.spec.to_plain(), "loss": "mse"})
    tasks = (TaskRecord(task="monday", first_step=1, steps=2, examples=2, loss=0.25, accuracy=None),)
    host.add(replace(learner, progress=replace(learner.progress, tasks=tasks, task_count=1)))
    page.goto("/#/learners/prices")
    expect(page.get_by_role("heading", name="Loss by task")).to_be_visible()
    expect(page.get_by_role("heading", name="Accuracy by task")).to_have_count(0)


def test_a_name_from_a_client_never_becomes_markup(host: Any, page: Page, make_learner: MakeLearner) -> None:
    attack = "<img src=x onerror=alert(1)>"
    tasks = (TaskRecord(task=attack, first_step=1, steps=2, examples=2, loss=0.25, accuracy=0.5),)
    learner = make_learner("clicks", tasks=tasks)
    producers = {attack: replace(learner.producers["web-1"], producer=attack)}
    host.add(replace(learner, producers=producers))
    page.goto("/")
    expect(cell(page, "clicks", "Task")).to_have_text(attack)
    page.goto("/#/learners/clicks")
    expect(page.get_by_role("rowheader", name=attack)).to_be_visible()
    assert page.locator("main img").count() == 0


def test_a_learner_that_is_gone(page: Page) -> None:
    page.goto("/#/learners/nobody")
    expect(page.get_by_role("heading", name="No such learner")).to_be_visible()


def test_what_is_wrong_is_said_at_the_top(host: Any, page: Page) -> None:
    host.reasons.append("the engine process is down")
    host.broken["clicks"] = "its checkpoint is damaged"
    host.engine = replace(host.engine, up=False)
    host.journal = JournalStatus(up=False, since=host.journal.since, reason="database or disk is full")
    page.goto("/")
    banner = page.get_by_role("alert")
    expect(banner).to_contain_text("Not ready: the engine process is down.")
    expect(banner).to_contain_text("Nothing is accepted: the journal cannot be written since")
    expect(banner).to_contain_text("database or disk is full.")
    expect(banner).to_contain_text("Learner clicks could not be restored: its checkpoint is damaged.")
    expect(page.locator("#engine")).to_contain_text("Engine down")
    host.reasons.clear()
    host.broken.clear()
    host.journal = replace(host.journal, up=True, reason="")
    expect(banner).to_be_hidden()


def test_a_server_that_is_gone_is_noticed(host: Any, http: Any, page: Page, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    page.goto("/")
    expect(row(page, "clicks")).to_be_visible()
    http.stop()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer. What you see is from")
    expect(page.locator("#engine")).to_have_text("Not reachable")
    expect(row(page, "clicks")).to_be_visible()


@pytest.mark.parametrize("width", [360, 768, 1366])
def test_it_fits_the_screen(host: Any, page: Page, quarantined: MakeLearner, width: int) -> None:
    host.add(quarantined("a-learner-with-quite-a-long-name"))
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/", "/#/learners/a-learner-with-quite-a-long-name"):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(page: Page, scheme: Literal["light", "dark"]) -> None:
    """WCAG AA: 4.5 to 1 for text, against both grounds it stands on."""
    page.emulate_media(color_scheme=scheme)
    page.goto("/")
    ratios = page.evaluate(
        """() => {
          const style = getComputedStyle(document.documentElement);
          const luminance = (name) => {
            const hex = style.getPropertyValue(name).trim();
            const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const contrast = (a, b) => {
            const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
            return (high + 0.05) / (low + 0.05);
          };
          const texts = ["--ink", "--quiet", "--accent", "--notable", "--bad"];
          const pairs = texts.flatMap((text) => ["--ground", "--surface", "--hover"].map((ground) => [text, ground]));
          pairs.push(["--bad", "--bad-ground"]);
          return Object.fromEntries(pairs.map(([a, b]) => [`${a} on ${b}`, contrast(a, b)]));
        }"""
    )
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


def test_the_api_page_works_without_a_network(page: Page) -> None:
    page.goto("/docs")
    expect(page.get_by_text("Get a learner's plasticity, now and before")).to_be_visible()
    page.get_by_text("/v1/server", exact=True).click()
    page.get_by_role("button", name="Execute").click()
    expect(page.get_by_text('"torch_version"').first).to_be_visible()
