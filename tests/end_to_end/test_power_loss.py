"""The power goes: what was not synced is gone, and what was acknowledged is not."""

import contextlib
import os
import random

import pytest
from faults.learners import LEARNERS
from faults.server import FaultyServer
from faults.storage import Failures
from torture import Life, Torture, random_lives

from cbp_client import Client, Unavailable

_FSYNC = [learner for learner in LEARNERS if learner.durability == "fsync"]
_LEARNER = _FSYNC[0]
_OS = [learner for learner in LEARNERS if learner.durability == "os"]


pytestmark = pytest.mark.usefixtures("watched_sqlite")


def losses(count):
    return [Life(seconds=1.0, end="power" if index % 2 == 0 else "power, torn") for index in range(count)]


def test_nothing_that_was_acknowledged_is_lost_with_the_power(tmp_path):
    outcome = Torture(tmp_path, seed=3, power_can_fail=True).run(losses(2))
    assert outcome.power_losses == 2


@pytest.mark.torture
def test_nothing_is_lost_with_the_power_after_kills_at_random(tmp_path):
    lives = random_lives(5, seed=4, power=True)
    assert Torture(tmp_path, seed=4, power_can_fail=True).run(lives).batches > 0


@pytest.mark.torture
def test_learners_that_leave_syncing_to_the_system_keep_a_beginning_of_their_log(tmp_path):
    torture = Torture(tmp_path, seed=5, learners=_OS, flags=("--checkpoint-interval", "3600"), power_can_fail=True)
    outcome = torture.run(losses(2))
    assert outcome.losses > 0


@pytest.mark.torture
@pytest.mark.parametrize("lies", [("sqlite",), ("files",), ("directories",)])
def test_a_disk_that_only_pretends_to_sync_is_found_out(tmp_path, lies):
    """Otherwise the tests above would prove nothing."""
    torture = Torture(tmp_path, seed=3, learners=_FSYNC, power_can_fail=True, lies=lies)
    with pytest.raises(AssertionError):
        torture.run(losses(2))


@pytest.fixture
def machine(tmp_path):
    """A server on a machine whose power may go."""
    server = FaultyServer(tmp_path, "--checkpoint-interval", "3600", power_can_fail=True)
    yield server
    server.kill_everything()


def feed(server, batches):
    """What the server says is durable then."""
    with Client(server.grpc_target) as client:
        handle = client.create_learner(_LEARNER.name, exist_ok=True, **_LEARNER.spec)
        with handle.stream("ada") as stream:
            for _ in range(batches):
                stream.send([[1.0, 2.0, 3.0, 4.0]], [0])
            stream.flush(durable=True)
            return stream.position.durable_sequence


def feed_until_it_dies(server, once_open=lambda: None):
    with Client(server.grpc_target) as client:
        stream = client.get_learner(_LEARNER.name).stream("ada", reconnect_timeout=0.0)
        with contextlib.suppress(Unavailable):
            stream.open()
            stream.send([[1.0, 2.0, 3.0, 4.0]], [0])
            stream.flush()
            once_open()
            while True:
                stream.send([[1.0, 2.0, 3.0, 4.0]], [0])
                stream.flush()


def durable(server):
    with Client(server.grpc_target) as client:
        producers = client.get_learner(_LEARNER.name).info.producers
    return producers[0].durable_sequence if producers else 0


def test_a_data_directory_that_the_server_has_made_outlasts_the_power(machine):
    machine.start()
    told = feed(machine, 3)
    machine.lose_power()
    machine.start()
    assert durable(machine) == told


@pytest.mark.torture
@pytest.mark.parametrize("nth", [2, 5])
def test_what_a_killed_server_had_not_synced_is_not_called_durable_by_the_next_one(machine, nth):
    """The next server reads it from the system's cache, where it is lost with the power."""
    machine.start()
    before = feed(machine, 3)
    machine.kill_everything()
    kill = machine.plan_kill("sqlite.sync", nth)
    machine.launch()
    if machine.wait_until_ready_or_ended():
        feed_until_it_dies(machine)
    machine.wait_for_end()
    assert kill.fired
    machine.start()
    told = durable(machine)
    assert told >= before
    machine.lose_power(random.Random(nth) if nth % 2 else None)
    machine.start()
    assert durable(machine) >= told


@pytest.mark.torture
@pytest.mark.parametrize("nth", [1, 2], ids=["of all learners", "of one learner"])
def test_a_checkpoint_directory_that_a_killed_server_has_made_outlasts_the_power_once_it_is_used(machine, nth):
    """The next server finds it there, which does not make its name durable."""
    machine.start()
    feed(machine, 3)
    machine.kill_everything()
    kill = machine.plan_kill("checkpoint.write/mkdir", nth)
    machine.start()
    with Client(machine.grpc_target) as client, contextlib.suppress(Unavailable):
        client.get_learner(_LEARNER.name).checkpoint()
    machine.wait_for_end()
    assert kill.fired
    machine.start()
    with Client(machine.grpc_target) as client:
        number = client.get_learner(_LEARNER.name).checkpoint().number
    machine.lose_power()
    machine.start()
    with Client(machine.grpc_target) as client:
        client.get_learner(_LEARNER.name).restore(checkpoint=number)


def test_what_a_failed_fsync_dropped_is_not_called_durable_by_the_next_server(machine):
    """It reads it from the system's cache, which takes it for written."""
    machine.start()
    before = feed(machine, 3)
    feed_until_it_dies(machine, lambda: Failures(database_sync=True).begin(machine.failures))
    assert machine.wait() == os.EX_IOERR
    machine.failures.unlink()
    machine.start()
    told = durable(machine)
    assert told >= before
    machine.lose_power()
    machine.start()
    assert durable(machine) >= told
