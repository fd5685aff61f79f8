"""A program that forks around its use of clients, and prints as JSON how calls end in the forked processes.

python forking.py TARGET LEARNER_ID
"""

import asyncio
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from cbp_client import AsyncClient, Client, ClientUnusable

FEATURES, TARGETS = np.zeros((1, 4)), [0]


def outcome(call: Callable[[], Any]) -> Any:
    """The reason for which a call is refused, or else what it gives."""
    try:
        return call()
    except ClientUnusable as error:
        return error.reason


def in_fork(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The outcomes of the calls, one after the other, in a forked process that then ends."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)  # a call that hangs past its timeout ends the process
        os.write(writing, json.dumps({name: outcome(call) for name, call in calls.items()}).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(told) if status == 0 else {"ended by signal": os.WTERMSIG(status)}


def status_of_a_fork_that_ends() -> int:
    """Of a forked process that touches nothing and runs to its end, where Python lets go of all that it inherited."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        sys.exit()
    return os.waitpid(child, 0)[1]


def count(client: Client) -> int:
    return min(1, len(list(client.list_learners())))


async def count_async(client: AsyncClient) -> int:
    return min(1, len([learner async for learner in client.list_learners()]))


def main(target: str, learner_id: str) -> None:
    warnings.simplefilter("ignore")  # Python has its own to say of forks beside threads
    found: dict[str, Any] = {}
    Client(target).close()
    unused, unused_async = Client(target, timeout=5), AsyncClient(target, timeout=5)
    found["made before the fork, used behind it"] = in_fork(
        {"Client": lambda: count(unused), "AsyncClient": lambda: asyncio.run(count_async(unused_async))}
    )

    client, closed, on_a_loop = Client(target, timeout=5), Client(target, timeout=5), AsyncClient(target, timeout=5)
    closed.wait_until_ready()
    closed.close()
    asyncio.run(count_async(on_a_loop))
    asyncio.run(on_a_loop.close())
    found["a client was closed, new ones behind the fork"] = in_fork(
        {"Client": lambda: count(Client(target)), "AsyncClient": lambda: asyncio.run(count_async(AsyncClient(target)))}
    )

    learner = client.get_learner(learner_id)
    stream = learner.stream("before")
    stream.open()
    applied, updates = stream.send(FEATURES, TARGETS), client.watch([learner_id])
    applied.result(5)
    next(updates)
    waiting = learner.stream("other")
    waiting.open()
    on_a_loop = AsyncClient(target, timeout=5)
    asyncio.run(count_async(on_a_loop))

    async def inherited_stream() -> Any:
        return await (await on_a_loop.get_learner(learner_id)).stream("x").open()

    calls: dict[str, Callable[[], Any]] = {
        "a new Client": lambda: count(Client(target)),
        "a call": lambda: count(client),
        "predict": lambda: learner.predict(FEATURES).step,
        "a watch": lambda: str(next(updates)),
        "AsyncClient": lambda: asyncio.run(count_async(on_a_loop)),
        "AsyncClient's stream": lambda: asyncio.run(inherited_stream()),
        "a result that is there": lambda: applied.result(5).steps,
        "send": lambda: str(stream.send(FEATURES, TARGETS)),
        "flush": stream.flush,
        "close the stream": waiting.close,
        "abort the stream": waiting.abort,
        "a new stream": lambda: learner.stream("y").open(),
        "close": client.close,
        "close AsyncClient": lambda: asyncio.run(on_a_loop.close()),
    }
    found["a client is open"] = in_fork(calls)
    found["once more"] = in_fork(calls)
    found["ends by itself"] = [status_of_a_fork_that_ends() for _ in range(8)]
    found["in a fork of a fork"] = in_fork({"child": lambda: in_fork({"a call": lambda: count(client)})})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found["spawned"] = pool.apply(used_in_a_process_of_its_own, (target,))

    stream.send(FEATURES, TARGETS).result(5)  # what the forks did harms nothing here
    stream.close()
    found["the process before goes on"] = [count(client), asyncio.run(count_async(on_a_loop))]
    client.close()
    print(json.dumps(found))


def used_in_a_process_of_its_own(target: str) -> int:
    with Client(target, timeout=5) as client:
        return count(client)


if __name__ == "__main__":
    main(*sys.argv[1:])
