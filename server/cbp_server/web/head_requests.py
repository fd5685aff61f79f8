"""HEAD wherever there is GET, as RFC 9110 asks: monitors and `wget --spider` look at the head alone."""

from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadRequests:
    """Answers HEAD as GET, without the body; and says so where a method is refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        only_head = scope["method"] == "HEAD"

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.METHOD_NOT_ALLOWED:
                headers = MutableHeaders(scope=message)
                headers["Allow"] = _with_head(headers.get("Allow", "GET"))
            if only_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"} if only_head else scope, receive, send_on)


def _with_head(allowed: str) -> str:
    methods = [method.strip() for method in allowed.split(",")]
    return ", ".join([*methods, "HEAD"] if "GET" in methods and "HEAD" not in methods else methods)
