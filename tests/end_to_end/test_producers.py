"""A learner has a bounded number of producers: which of them make room for others, also through crashes."""

from collections.abc import Callable

import grpc
import numpy as np
import pytest
from server_process import ServerProcess
from wire import RichError, Stream, Wire

from cbp_proto import decode_tensor

PROBE = np.random.default_rng(99).normal(size=(5, 4)).astype(np.float32)


def positions(wire: Wire) -> dict[str, int]:
    return {producer.producer: producer.applied_sequence for producer in wire.get("clicks").producers}


def outputs(wire: Wire) -> np.ndarray:
    return decode_tensor(wire.predict("clicks", PROBE).outputs)


def refusal(wire: Wire, producer: str, **opening: object) -> RichError:
    with pytest.raises(grpc.RpcError) as caught:
        wire.stream("clicks", producer, **opening)
    return RichError(caught.value)


@pytest.mark.server_flags("--max-producers", "3")
def test_producers_that_have_left_make_room(
    own_server: ServerProcess, connect: Callable[[str], Wire], examples: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> None:
    wire = connect(own_server.grpc_target)
    wire.create("clicks")

    def teach(stream: Stream, sequence: int) -> None:
        stream.send_batch(sequence, *examples(9, seed=sequence))
        assert not stream.results(1)[0].duplicate

    streams = {name: wire.stream("clicks", name) for name in "abc"}
    for name in "abc":
        teach(streams[name], 1)
    teach(streams["a"], 2)
    full = refusal(wire, "d")
    assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_PRODUCERS")
    assert "3 of them have open streams" in full.message
    assert "--max-producers" in full.message

    streams["c"].close()  # cut off: it may come back
    assert not wire.stream("clicks", "c").finish()  # and ends in order
    streams["b"].finish()
    streams["d"] = wire.stream("clicks", "d")  # in the place of c, which has been away longer
    assert positions(wire).keys() == {"a", "b", "d"}
    streams["a"].finish()
    streams["c"] = wire.stream("clicks", "c")  # in b's
    assert streams["c"].opened.next_sequence == 1
    teach(streams["c"], 1)  # another batch than the first that had this number
    assert positions(wire) == {"a": 2, "c": 1, "d": 0}
    before = outputs(wire)

    own_server.kill()
    own_server.start()
    wire = connect(own_server.grpc_target)
    assert positions(wire) == {"a": 2, "c": 1, "d": 0}
    np.testing.assert_array_equal(outputs(wire), before)
    assert "less than 300 seconds ago" in refusal(wire, "e").message  # it would come back now, if it does at all
    assert refusal(wire, "b", resumed_epoch=1).reason == "PRODUCER_FENCED"
    teach(wire.stream("clicks", "c"), 2)
    before = outputs(wire)

    assert own_server.stop() == 0  # with a checkpoint of everything
    own_server.start("--producer-retention", "0")
    wire = connect(own_server.grpc_target)
    np.testing.assert_array_equal(outputs(wire), before)
    assert refusal(wire, "b", resumed_epoch=1).reason == "PRODUCER_FENCED"
    assert wire.stream("clicks", "c").opened.next_sequence == 3
    teach(wire.stream("clicks", "e"), 1)
    assert positions(wire).keys() in ({"c", "d", "e"}, {"a", "c", "e"})
