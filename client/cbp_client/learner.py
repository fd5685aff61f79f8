"""One learner on the server, asynchronously."""

# ruff: noqa: ASYNC109 - `timeout` covers a call with its retries, as users of gRPC know it

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Never, Self, Unpack

from google.protobuf.field_mask_pb2 import FieldMask
from numpy.typing import ArrayLike

from cbp_client import arguments, convert, forks
from cbp_client.errors import error_from_plain
from cbp_client.examples import features_tensor
from cbp_client.rpc import Connection, RequestT, UnaryMethod
from cbp_client.stream import AsyncTrainingStream, StreamOptions
from cbp_client.transfer import PathOrFile, download, export_format
from cbp_client.types import (
    Checkpoint,
    CheckpointList,
    Durability,
    ExportFormat,
    LearnerInfo,
    PlasticitySample,
    Prediction,
)
from cbp_proto import PlainError, from_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2, training_service_pb2

#: Seconds that an export or import may take, unless it says otherwise.
TRANSFER_TIMEOUT = 600.0
_PAGE_SIZE = 200
_UPDATABLE = ("resets", "optimizer", "monitoring", "durability")

Plain = Mapping[str, Any]


class AsyncLearner(forks.InOneProcess):
    """A learner on the server. Holds nothing but its name and what the server last said of it."""

    def __init__(self, connection: Connection, info: LearnerInfo) -> None:
        self._connection = connection
        self._info = info

    @property
    def id(self) -> str:
        """The learner's id."""
        return self._info.id

    @property
    def info(self) -> LearnerInfo:
        """What the server last said of the learner; see `refresh`."""
        return self._info

    async def refresh(self) -> LearnerInfo:
        """Ask the server for the learner's state now."""
        self._info = await learner_info(self._connection, self.id)
        return self._info

    async def update(
        self,
        *,
        resets: Plain | None = None,
        optimizer: Plain | None = None,
        monitoring: Plain | None = None,
        durability: Durability | None = None,
        if_unchanged: bool = False,
        **unchangeable: Never,
    ) -> LearnerInfo:
        """Change exactly the given entries of a live learner, between two steps; an entry that is None goes back to
        its default.

        Args:
            resets: such as `{"layers": "first"}`.
            optimizer: hyperparameters, such as `{"lr": 0.01}`.
            monitoring: such as `{"interval": 1000}`.
            durability: "fsync" or "os", for batches accepted from now on; a learner without a journal stays without.
            if_unchanged: only if nobody has changed the spec since `info` was read.

        Raises:
            EtagMismatch: somebody has.
            InvalidArgument: an entry does not exist, can't be changed, or has a wrong value.
        """
        for part in unchangeable:
            raise arguments.invalid(
                part,
                f"can't be changed on a live learner, as can {', '.join(_UPDATABLE)}; create another one"
                if part in spec_pb2.LearnerSpec.DESCRIPTOR.fields_by_name
                else f"is no part of a learner; there are {', '.join(_UPDATABLE)}",
            )
        parts = {"resets": resets, "optimizer": optimizer, "monitoring": monitoring}
        given = {part: arguments.entries(part, entries) for part, entries in parts.items() if entries is not None}
        learner = learner_pb2.Learner(
            name=self._name,
            spec=spec_message(given),
            etag=self._etag(if_unchanged),
            durability=convert.durability(durability),
        )
        paths = [f"spec.{part}.{entry}" for part, entries in given.items() for entry in entries]
        paths += ["durability"] if durability is not None else []
        if not paths:
            return await self.refresh()
        request = learner_service_pb2.UpdateLearnerRequest(learner=learner, update_mask=FieldMask(paths=paths))
        # With an etag a second attempt could fail for the first one's success.
        answer = await self._connection.call(self._connection.learners.UpdateLearner, request, retry=not learner.etag)
        self._info = convert.learner_info(answer)
        return self._info

    async def delete(self, *, if_unchanged: bool = False) -> LearnerInfo:
        """Delete the learner: its id is free. Until the `purge_time` of the answer, `undelete_learner` brings it back.

        Args:
            if_unchanged: only if its spec is still that of `info`.
        """
        request = learner_service_pb2.DeleteLearnerRequest(name=self._name, etag=self._etag(if_unchanged))
        return await self._changed_by(self._connection.learners.DeleteLearner, request)

    async def fork(self, learner_id: str, *, durability: Durability | None = None) -> Self:
        """Copy the learner between two of its steps: all of its state under a new id, with no producers.

        Args:
            learner_id: of the copy.
            durability: of the copy; None for that of this learner.

        Raises:
            AlreadyExists: the id is taken.
        """
        request = learner_service_pb2.ForkLearnerRequest(
            name=self._name,
            learner_id=arguments.text("learner_id", learner_id),
            request_id=str(uuid.uuid4()),
            durability=convert.durability(durability),
        )
        answer = await self._connection.call(self._connection.learners.ForkLearner, request, retry=True)
        return type(self)(self._connection, convert.learner_info(answer))

    async def checkpoint(self) -> Checkpoint:
        """Save the learner's whole state, and keep it until `delete_checkpoint`."""
        request = learner_service_pb2.CreateCheckpointRequest(parent=self._name)
        answer = await self._connection.call(self._connection.learners.CreateCheckpoint, request, retry=False)
        return convert.checkpoint(answer)

    async def checkpoints(self) -> CheckpointList:
        """The learner's checkpoints, newest first, and the journal positions that `restore` can reach."""
        request = learner_service_pb2.ListCheckpointsRequest(parent=self._name, page_size=_PAGE_SIZE)
        found: list[Checkpoint] = []
        while True:
            answer = await self._connection.call(self._connection.learners.ListCheckpoints, request, retry=True)
            found += [convert.checkpoint(checkpoint) for checkpoint in answer.checkpoints]
            if not answer.next_page_token:
                return CheckpointList(tuple(found), answer.first_restorable_position, answer.last_restorable_position)
            request.page_token = answer.next_page_token

    async def delete_checkpoint(self, number: int) -> None:
        """Delete a checkpoint.

        Raises:
            NotFound: there is none of that number.
            FailedPrecondition: recovery may need it.
        """
        number = arguments.whole("number", number, least=1)
        request = learner_service_pb2.DeleteCheckpointRequest(name=convert.checkpoint_name(self.id, number))
        await self._connection.call(self._connection.learners.DeleteCheckpoint, request, retry=False)

    async def forget_producer(self, producer: str) -> None:
        """Give a producer's name free, once all that it has sent is learnt. Its open stream ends with `Fenced`; the
        next one begins at sequence 1.

        Raises:
            NotFound: the learner has no producer of that name.
        """
        producer = arguments.text("producer", producer)
        request = learner_service_pb2.DeleteProducerRequest(name=convert.producer_name(self.id, producer))
        await self._connection.call(self._connection.learners.DeleteProducer, request, retry=False)

    async def restore(
        self, *, checkpoint: int | None = None, position: int | None = None, if_unchanged: bool = False
    ) -> LearnerInfo:
        """Take the learner back to an earlier state. Producers stay where they are: what they sent since is not learnt
        again. Streams reconnect by themselves; a quarantine ends.

        Args:
            checkpoint: the number of the checkpoint to go back to; or else
            position: the position of the learner's journal to go back to.
            if_unchanged: only if nobody has changed the spec since `info` was read.

        Raises:
            NotFound: there is no such checkpoint.
            FailedPrecondition: the position is not held any more; `checkpoints()` says which are.
            EtagMismatch: somebody has changed the spec.
        """
        request = learner_service_pb2.RestoreLearnerRequest(name=self._name, etag=self._etag(if_unchanged))
        if (checkpoint is None) == (position is None):
            raise arguments.invalid("checkpoint", "give either the number of a checkpoint or a position")
        if checkpoint is not None:
            number = arguments.whole("checkpoint", checkpoint, least=1)
            request.checkpoint = convert.checkpoint_name(self.id, number)
        elif position is not None:
            request.journal_position = arguments.whole("position", position)
        return await self._changed_by(self._connection.learners.RestoreLearner, request)

    async def resume(self, *, lr: float | None = None, skip_batch: bool = False) -> LearnerInfo:
        """Let a quarantined learner go on with the batch that it was quarantined for, and those behind it.

        Args:
            lr: the learning rate from that batch on; None leaves it as it is.
            skip_batch: leave that batch out rather than learn it again.

        Raises:
            FailedPrecondition: the learner is not quarantined.
        """
        request = learner_service_pb2.ResumeLearnerRequest(
            name=self._name,
            lr=None if lr is None else arguments.number("lr", lr),
            skip_batch=arguments.flag("skip_batch", skip_batch),
        )
        return await self._changed_by(self._connection.learners.ResumeLearner, request)

    async def reset_units(self, layers: str | int | Sequence[str | int], fraction: float) -> dict[str, int]:
        """Reset units of least utility by hand, between two steps; returns how many, by layer.

        Args:
            layers: "all", "first", or hidden layers by index or name.
            fraction: share of each layer's units, more than 0 and at most 1. Only mature units are reset.
        """
        request = learner_service_pb2.ResetUnitsRequest(
            name=self._name,
            layers=arguments.layers("layers", layers),
            fraction=arguments.number("fraction", fraction),
        )
        answer = await self._connection.call(self._connection.learners.ResetUnits, request, retry=False)
        return convert.by_layer(answer.replacements)

    async def export(
        self, target: PathOrFile, *, format: ExportFormat | None = None, timeout: float | None = TRANSFER_TIMEOUT
    ) -> int:
        """Write the learner to a file; returns its size in bytes.

        Args:
            target: a path, which is replaced once the file is whole, or a file opened in binary mode.
            format: "safetensors" is the whole state, which `import_learner` takes; "onnx" and "torch_export" are the
                network alone, for use elsewhere. None for what the path's end says: .safetensors, .onnx or .pt2; for a
                file without a path it is "safetensors".
            timeout: seconds for all of it; None for the client's.

        Raises:
            InvalidArgument: there is no such format, or neither it nor the path's end says which.
        """
        arguments.path_or_file("target", target, "write")
        timeout = arguments.seconds("timeout", timeout, none="for the client's")
        chosen = convert.export_format(export_format(target, format))
        request = learner_service_pb2.ExportLearnerRequest(name=self._name, format=chosen)
        return await download(self._connection, request, target, timeout=timeout)

    async def predict(self, features: ArrayLike, *, timeout: float | None = None) -> Prediction:
        """Predict for features [N, …] with the learner's state between two steps; changes nothing.

        Args:
            features: any number of examples, as far as they fit in one message; all are predicted at one step.
            timeout: seconds; None for the client's.

        Raises:
            MessageTooLarge: there are too many examples for one message, or for one answer.
        """
        timeout = arguments.seconds("timeout", timeout, none="for the client's")
        request = training_service_pb2.PredictRequest(learner=self._name, features=features_tensor(features))
        answer = await self._connection.call(self._connection.training.Predict, request, retry=True, timeout=timeout)
        return convert.prediction(answer)

    async def plasticity(self, *, history: int = 1, fresh: bool = False) -> list[PlasticitySample]:
        """The newest `history` plasticity samples, oldest first; fewer if the server has fewer.

        Args:
            history: how many; the server keeps a bounded number.
            fresh: measure now rather than take the last periodic sample.
        """
        request = learner_service_pb2.GetPlasticityRequest(
            name=self._name,
            max_samples=arguments.whole("history", history, least=1, most=arguments.MOST_INT32),
            fresh=arguments.flag("fresh", fresh),
        )
        answer = await self._connection.call(self._connection.learners.GetPlasticity, request, retry=True)
        return [convert.plasticity_sample(sample) for sample in answer.samples]

    def stream(self, producer: str, **options: Unpack[StreamOptions]) -> AsyncTrainingStream:
        """A stream of training batches, to be used in `async with`.

        Args:
            producer: names the source of the batches. One stream at a time: a second one ends the first.
            **options: see `StreamOptions`.
        """
        return AsyncTrainingStream(self._connection, self.id, producer, **options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @property
    def _name(self) -> str:
        return convert.learner_name(self.id)

    def _etag(self, if_unchanged: bool) -> str:
        return self._info.etag if arguments.flag("if_unchanged", if_unchanged) else ""

    async def _changed_by(self, method: UnaryMethod[RequestT, Any], request: RequestT) -> LearnerInfo:
        self._info = convert.learner_info(await self._connection.call(method, request, retry=False))
        return self._info


async def learner_info(connection: Connection, learner_id: str) -> LearnerInfo:
    """What the server says of a learner now."""
    request = learner_service_pb2.GetLearnerRequest(name=convert.learner_name(learner_id))
    return convert.learner_info(await connection.call(connection.learners.GetLearner, request, retry=True))


def spec_message(plain: Plain) -> spec_pb2.LearnerSpec:
    """The message of a spec as users write it.

    Raises:
        InvalidArgument: something is not part of a spec, or of the wrong type.
    """
    try:
        return from_plain(plain, spec_pb2.LearnerSpec)
    except PlainError as error:
        raise error_from_plain(error) from None
