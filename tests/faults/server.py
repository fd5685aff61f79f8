"""A server with faults: started with a plan, killed with all its processes, its power cut."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from server_process import ServerProcess

from faults.broken import BROKEN_HARNESS
from faults.disk import begin_shadow, lose_power
from faults.plan import FaultPlan, Kill, Lie, SyncedDisk, Victims
from faults.processes import children, is_running
from faults.sqlite_vfs import library_path

_SITE = Path(__file__).parent / "site"
_END_SECONDS = 60.0


class FaultyServer(ServerProcess):
    """A `cbp-server` below `directory`, with a disk of its own in `directory`/disk.

    Args:
        power_can_fail: whether to note what is durable, which `lose_power` needs.
        lies: syncs that the disk pretends to have made.

    Attributes:
        failures: the trigger of `storage.Failures`.
    """

    def __init__(self, directory: Path, *flags: str, power_can_fail: bool = False, lies: tuple[Lie, ...] = ()) -> None:
        disk = directory / "disk"
        disk.mkdir(parents=True)
        super().__init__(disk / "data", *flags, log_path=directory / "server.log")
        self.failures = directory / "failures.json"
        self._markers = directory / "kills"
        self._markers.mkdir()
        self._disk = SyncedDisk(root=disk, shadow=directory / "shadow", lies=lies) if power_can_fail else None
        self._kill: Kill | None = None  # of the next start
        self._current_kill: Kill | None = None
        self._kills = 0
        if self._disk is not None:
            begin_shadow(self._disk)

    def plan_kill(self, point: str, nth: int = 1, victims: Victims = "all") -> Kill:
        """For the next start."""
        self._kills += 1
        marker = self._markers / f"{self._kills}-{point.replace('/', '-')}"
        self._kill = Kill(point=point, nth=nth, victims=victims, marker=marker)
        return self._kill

    def launch(self, *flags: str) -> None:
        super().launch(*flags)
        self._current_kill, self._kill = self._kill, None

    def environment(self) -> dict[str, str]:
        environment = super().environment()
        path = os.pathsep.join(filter(None, (str(_SITE), environment.get("PYTHONPATH"))))
        plan = FaultPlan(
            kill=self._kill, disk=self._disk, failures=self.failures if library_path() is not None else None
        )
        return environment | plan.environment() | {"PYTHONPATH": path}

    def wait_until_ready_or_ended(self) -> bool:
        """Whether it is ready; False if its faults have ended it before."""
        try:
            self.wait_until_ready()
        except AssertionError:
            if self.running or not self._ended_by_faults():
                raise
            return False
        return True

    def _ended_by_faults(self) -> bool:
        kill, failed = self._current_kill, self.failures.exists()
        engine_killed = kill is not None and kill.victims == "engine" and kill.fired  # it may not start again at once
        match self.wait():
            case status if status == -signal.SIGKILL:
                return True
            case os.EX_IOERR:
                return failed
            case 1:
                return failed or engine_killed
        return False

    @property
    def engine_pids(self) -> list[int]:
        return children(self.pid) if self.running else []

    def kill_engine(self) -> None:
        """kill -9 of the engine only; the front starts another one."""
        for pid in self.engine_pids:
            os.kill(pid, signal.SIGKILL)

    def kill_everything(self) -> None:
        """kill -9 of front and engine; returns when nothing of them runs."""
        engines = self.engine_pids
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        if self.running:
            self.kill()
        self.wait_for_end(*engines)

    def wait_for_end_of_front(self, seconds: float) -> None:
        """Returns when the front has been killed, and after `seconds` at the latest."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))

    def trust_disk(self) -> None:
        """All that is on the disk now is durable. The server must not run."""
        assert self._disk is not None
        begin_shadow(self._disk)

    def wait_for_end(self, *engines: int) -> None:
        """Until the front, and engines that it had, have ended."""
        status = self.wait()
        assert status != BROKEN_HARNESS, f"the faults were not those planned:\n{self.log[-2000:]}"
        deadline = time.monotonic() + _END_SECONDS
        while any(is_running(pid) for pid in engines):
            assert time.monotonic() < deadline, "the engine lives on without its front"
            time.sleep(0.01)

    def lose_power(self, chance: random.Random | None = None) -> None:
        """Kills everything and leaves on the disk what is durable; see `disk.lose_power`."""
        assert self._disk is not None
        self.kill_everything()
        lose_power(self._disk, chance)
