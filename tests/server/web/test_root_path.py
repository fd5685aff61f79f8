"""Behind a proxy that has the server at a path of its own, whether or not it takes the path off."""

import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from browsing import watched_page
from playwright.sync_api import Browser, expect

from cbp_server.records.learners import LearnerRecord

ROOT = "/tools/cbp"


def _proxy(upstream: str, *, strips: bool) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix(ROOT) if strips else self.path
            # What is not below the path is another application's.
            known = self.path.startswith(f"{ROOT}/")
            answer = httpx.get(upstream + path, headers={"Accept": self.headers["Accept"]}) if known else None
            self.send_response(answer.status_code if answer else 404)
            for name in ("Content-Type", "Content-Security-Policy", "Location"):
                if answer and name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.content if answer else b"")

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture(params=["stripped", "passed on"])
def prefixed(request: pytest.FixtureRequest, serve: Any) -> Iterator[str]:
    """The URL below which a proxy serves the application."""
    proxy = _proxy(serve(ROOT).url, strips=request.param == "stripped")
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}{ROOT}"
    proxy.shutdown()
    thread.join()
    proxy.server_close()


def test_everything_is_found_below_the_path(
    prefixed: str, host: Any, make_learner: Callable[..., LearnerRecord]
) -> None:
    host.add(make_learner("clicks"))
    for path in ("/livez", "/readyz", "/metrics", "/v1/learners/clicks", "/docs", "/static/status.js", "/"):
        assert httpx.get(prefixed + path).status_code == 200, path
    policy = httpx.get(f"{prefixed}/docs").headers["content-security-policy"]
    assert "style-src 'self' 'unsafe-inline'" in policy
    assert httpx.get(f"{prefixed}/openapi.json").json()["servers"] == [{"url": ROOT}]


def test_the_page_and_its_links_work_below_the_path(
    prefixed: str, host: Any, make_learner: Callable[..., LearnerRecord], browser: Browser
) -> None:
    host.add(make_learner("clicks"))
    with watched_page(browser, prefixed) as page:
        page.goto(f"{prefixed}/")
        page.get_by_role("link", name="clicks").click()
        expect(page.get_by_role("heading", name="clicks")).to_be_visible()
        expect(page.get_by_role("img", name=re.compile("Effective rank"))).to_be_visible()
        page.get_by_role("link", name="API").click()
        page.get_by_text("/v1/server", exact=True).click()
        page.get_by_role("button", name="Execute").click()
        expect(page.get_by_text('"torch_version"').first).to_be_visible()
        page.goto(f"{prefixed}/")
        page.get_by_role("link", name="Metrics").click()
        expect(page.get_by_text("cbp_learner_steps").first).to_be_visible()
