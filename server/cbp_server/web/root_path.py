"""Serving below a path of a proxy, whether or not the proxy takes the path off what it passes on."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Tells the application that it is found below `root_path`, in the way of ASGI: a request's path begins with it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path != self._root_path and not path.startswith(f"{self._root_path}/"):
                path = self._root_path + path
            scope = {**scope, "root_path": self._root_path, "path": path}
        await self._app(scope, receive, send)
