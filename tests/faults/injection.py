"""Installs the plan's faults into a process of the server, from outside: by patches of what it imports."""

import importlib.abc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from faults.broken import break_off
from faults.disk import DurableDisk, watch_syncs
from faults.plan import Kill, plan_of_this_process
from faults.points import METHODS, SQLITE_POINTS, Method, Role
from faults.processes import children, command
from faults.sqlite_vfs import SQLITE_OK, SqliteWatcher, install_vfs
from faults.storage import FailingStorage

_ROLES: dict[str, Role] = {"cbp_server": "front", "cbp_server.engine": "engine"}


def install() -> None:
    """Installs the faults that the environment asks for; nothing in processes that are neither front nor engine."""
    plan, role = plan_of_this_process(), _role()
    if plan is None or role is None:
        return
    watchers: list[SqliteWatcher] = []
    if plan.kill is not None:
        switch = KillSwitch(plan.kill, role)
        _patch_methods(role, plan.kill.point, switch.reach)
        if plan.kill.point in SQLITE_POINTS:
            watchers.append(_SqlitePoints(switch.reach))
    failing = FailingStorage(plan.failures) if plan.failures is not None else None
    if failing is not None:
        watchers.append(failing)
        watch_opens(failing.check_open)
    disk = DurableDisk(plan.disk) if plan.disk is not None else None
    if disk is not None:
        watchers.append(disk)
        watch_opens(disk.file_opened)
    if disk is not None or failing is not None:
        watch_syncs(disk, failing)
    if role == "front" and watchers:
        install_vfs(watchers)


class KillSwitch:
    """Kills when the process has come to the planned point often enough."""

    def __init__(self, kill: Kill, role: Role) -> None:
        self._kill = kill
        self._role = role
        self._reached = 0
        self._counting = threading.Lock()

    def reach(self, point: str) -> None:
        """The process is at `point` now; this may be its end."""
        if point != self._kill.point:
            return
        with self._counting:
            self._reached += 1
            if self._reached != self._kill.nth:
                return
        try:
            self._kill.marker.touch(exist_ok=False)
        except FileExistsError:
            return  # it has happened in an earlier process
        victims = self._victims()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        while os.getpid() in victims:
            time.sleep(1)  # until the signal has arrived

    def _victims(self) -> list[int]:
        """Process ids, this process's last."""
        if self._kill.victims == "engine":
            return [os.getpid()] if self._role == "engine" else children(os.getpid())
        if self._role == "front":
            return [*children(os.getpid()), os.getpid()]
        front = os.getppid()  # or whoever has adopted this process
        return [front, os.getpid()] if "cbp_server" in command(front) else [os.getpid()]


class _SqlitePoints(SqliteWatcher):
    """The points within SQLite."""

    def __init__(self, reach: Callable[[str], None]) -> None:
        self._reach = reach

    def writing(self, _path: str) -> int:
        self._reach("sqlite.write")
        return SQLITE_OK

    def syncing(self, _path: str) -> int:
        self._reach("sqlite.sync")
        return SQLITE_OK

    def synced(self, _path: str, _content: bytes) -> None:
        self._reach("sqlite.synced")


def _role() -> Role | None:
    arguments = sys.orig_argv
    if "-m" not in arguments:
        return None
    return _ROLES.get(arguments[arguments.index("-m") + 1])


# -- patches --


def watch_opens(told: Callable[[str, int], None]) -> None:
    """From now on `told` is called with path and flags before Python opens a file; what it raises, opening raises."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
            told(os.fsdecode(arguments[0]), arguments[2])

    sys.addaudithook(hook)


def _patch_methods(role: Role, point: str, reach: Callable[[str], None]) -> None:
    """Looks every method of the role up as soon as its module is there, and patches the one that the point is of."""
    patches: dict[str, list[Callable[[ModuleType], None]]] = {}
    for call, method in METHODS.items():
        if method.role == role:
            chosen = point.rpartition("/")[0] == call
            patches.setdefault(method.module, []).append(partial(_patch, call, method, reach if chosen else None))
    sys.meta_path.insert(0, _AfterImport(patches))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Patches modules at the moment at which they have been imported."""

    def __init__(self, patches: dict[str, list[Callable[[ModuleType], None]]]) -> None:
        self._patches = patches

    def find_spec(self, fullname: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        patches = self._patches.pop(fullname, None)
        if patches is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            break_off(f"there is no module {fullname}")
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for patch in patches:
                patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(call: str, method: Method, reach: Callable[[str], None] | None, module: ModuleType) -> None:
    owner = getattr(module, method.owner, None) if method.owner else module
    if owner is None or method.name not in vars(owner):
        break_off(f"{method.module} has no {method.owner}.{method.name}; correct faults/points.py")
    if reach is not None:
        wrap = {"commit": _transaction, "rename": _file_write, "entry": _reading, "step": _training}
        make = next(wrap[moment] for moment in method.moments if moment in wrap)
        setattr(owner, method.name, make(call, vars(owner)[method.name], reach))


def _transaction(call: str, original: Callable[..., Any], reach: Callable[[str], None]) -> Callable[..., Any]:
    from sqlalchemy import Engine, event

    within = threading.local()

    @event.listens_for(Engine, "commit")
    def before_commit(_: object) -> None:
        if getattr(within, "call", False):
            reach(f"{call}/commit")

    @wraps(original)
    def method(*arguments: Any, **named: Any) -> Any:
        reach(f"{call}/begin")
        within.call = True
        try:
            result = original(*arguments, **named)
        finally:
            within.call = False
        reach(f"{call}/done")
        return result

    return method


def _file_write(call: str, original: Callable[..., Any], reach: Callable[[str], None]) -> Callable[..., Any]:
    within = threading.local()

    def renaming(rename: Callable[..., None]) -> Callable[..., None]:
        def rename_within(*arguments: Any, **named: Any) -> None:
            if getattr(within, "call", False):
                within.renamed = True
                reach(f"{call}/rename")
            rename(*arguments, **named)

        return rename_within

    make = os.mkdir

    def mkdir(*arguments: Any, **named: Any) -> None:
        make(*arguments, **named)
        if getattr(within, "call", False):
            reach(f"{call}/mkdir")

    patches = {"replace": renaming(os.replace), "rename": renaming(os.rename), "mkdir": mkdir}
    for name, patch in patches.items():
        setattr(os, name, patch)

    @wraps(original)
    def method(*arguments: Any, **named: Any) -> Any:
        reach(f"{call}/begin")
        within.call, within.renamed = True, False
        try:
            result = original(*arguments, **named)
        finally:
            within.call = False
        if not within.renamed:
            break_off(f"{original.__qualname__} has renamed nothing")
        reach(f"{call}/done")
        return result

    return method


def _reading(call: str, original: Callable[..., Iterator[Any]], reach: Callable[[str], None]) -> Callable[..., Any]:
    @wraps(original)
    def method(*arguments: Any, **named: Any) -> Iterator[Any]:
        for entry in original(*arguments, **named):
            reach(f"{call}/entry")
            yield entry

    return method


def _training(call: str, original: Callable[..., Any], reach: Callable[[str], None]) -> Callable[..., Any]:
    @wraps(original)
    def method(*arguments: Any, between_steps: Callable[[], None] | None = None, **named: Any) -> Any:
        def at_step() -> None:
            reach(f"{call}/step")
            if between_steps is not None:
                between_steps()

        result = original(*arguments, between_steps=at_step, **named)
        reach(f"{call}/done")
        return result

    return method
