"""Kills a real server over and over while real clients stream to it, then compares every learner, bit for bit, with one
that never met a server.

    python tests/torture.py --kills 200 --seed 1

The seed decides what is sent and when is killed; it is printed, so that a failure can be run again.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import ServerProcess

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec
from cbp_client import Client

_SPECS = {
    "sgd": {"optimizer": {"kind": "sgd", "lr": 0.002, "momentum": 0.9}, "batch_size": 1},
    "adam": {"optimizer": {"kind": "adam", "lr": 0.01}, "batch_size": 3},
    "whole": {"optimizer": {"kind": "adamw", "lr": 0.01}, "batch_size": 0},
}
_COMMON = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8, 6], "out_features": 3},
    "loss": "cross_entropy",
    "resets": {"replacement_rate": 0.02, "maturity_threshold": 5},
}


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    kills: int
    batches: int
    seconds: float


def make_batch(learner: str, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([seed, number, *learner.encode()])
    features = generator.normal(size=(int(generator.integers(1, 40)), 4)).astype(np.float32)
    return features, features[:, :3].argmax(axis=1)


def torture(kills: int, seed: int, directory: Path) -> Outcome:
    """Runs the whole thing in `directory`.

    Raises:
        AssertionError: a batch was lost, applied twice or out of order, or a learner is not the undisturbed one.
    """
    chance = random.Random(seed)
    server = ServerProcess(directory / "data", "--checkpoint-interval", "0.2")
    server.start()
    started = time.monotonic()
    done = threading.Event()
    sent: dict[str, int] = {}
    failures: list[BaseException] = []

    def feed(learner: str) -> None:
        try:
            with Client(server.grpc_target) as client:
                handle = client.create_learner(learner, **_COMMON, **_SPECS[learner])
                ready.wait()
                with handle.stream("torture") as stream:
                    number = 0
                    while not done.is_set():
                        number += 1
                        stream.send(*make_batch(learner, number, seed), task=f"t{number // 50}")
                        if number % 20 == 0:
                            stream.flush(durable=number % 40 == 0)
                    stream.flush(durable=True)
                sent[learner] = number
        except BaseException as error:
            failures.append(error)
            raise

    ready = threading.Barrier(len(_SPECS) + 1)
    feeders = [threading.Thread(target=feed, args=(learner,), name=learner) for learner in _SPECS]
    for feeder in feeders:
        feeder.start()
    ready.wait()
    for _ in range(kills):
        time.sleep(chance.uniform(0.0, 0.8))
        server.kill()
        server.start()
    done.set()
    for feeder in feeders:
        feeder.join(120)
    assert not failures, failures
    assert server.stop() == 0
    for learner in _SPECS:
        compare(server.data_dir, learner, sent[learner], seed)
    return Outcome(kills, sum(sent.values()), time.monotonic() - started)


def compare(data_dir: Path, learner: str, batches: int, seed: int) -> None:
    """The learner's last checkpoint against one that learnt the same batches without interruption."""
    newest = sorted((data_dir / "learners" / learner).iterdir())[-1]
    snapshot = LearnerSnapshot.from_bytes(newest.read_bytes())
    position = json.loads(snapshot.extra["cbp_server"])["positions"]["torture"]
    assert position["sequence"] == batches, (learner, position["sequence"], batches)
    undisturbed = Learner(LearnerSpec.parse(_COMMON | _SPECS[learner]))
    for number in range(1, batches + 1):
        batch = make_batch(learner, number, seed)
        undisturbed.train(Batch.validate(undisturbed.spec, *batch, task=f"t{number // 50}"))
    expected = undisturbed.snapshot()
    assert np.isfinite(undisturbed.progress.loss or 0.0), f"{learner} diverged, so its comparison would say nothing"
    different = {
        key: (snapshot.metadata.get(key), expected.metadata.get(key))
        for key in snapshot.metadata.keys() | expected.metadata.keys()
        if snapshot.metadata.get(key) != expected.metadata.get(key)
    }
    assert not different, (learner, different)
    assert snapshot.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(snapshot.tensors[name].numpy(), tensor.numpy(), err_msg=f"{learner} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        outcome = torture(arguments.kills, arguments.seed, Path(directory))
    print(f"{outcome.kills} kills, {outcome.batches} batches, {outcome.seconds:.0f} s: every learner as if undisturbed")


if __name__ == "__main__":
    main()
