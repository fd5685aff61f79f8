"""The distribution's Chromium, as tests look at pages with it."""

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright
from system_tools import system_tool

_CHROMIUM_FLAGS = (
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=system_tool("chromium"), args=list(_CHROMIUM_FLAGS))
        yield browser
        browser.close()


@contextmanager
def watched_page(browser: Browser, url: str) -> Iterator[Page]:
    """A page that must not log an error or ask for anything that does not lie below the URL."""
    page = browser.new_page(base_url=url)
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else complaints.append(request.url))
    yield page
    page.close()
    # That is the browser's own note of an answer that is not a success, as some tests want it.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
