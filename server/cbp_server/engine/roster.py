"""Which learners the engine holds, and how they come and go."""

from typing import Any

from cbp import EngineName, Learner, LearnerSnapshot, SnapshotError
from cbp_server.engine import messages
from cbp_server.engine.checkpoint_content import Content
from cbp_server.engine.hosted_learner import HostedLearner
from cbp_server.engine.preparation import Preparation
from cbp_server.errors import CheckpointsUnreachable, NotInEngine
from cbp_server.store.checkpoints import CheckpointFiles


class Roster:
    """The learners of one device, by uid.

    Args:
        files: where checkpoints are read.
    """

    def __init__(self, device: str, preparation: Preparation, files: CheckpointFiles) -> None:
        self._device = device
        self._preparation = preparation
        self._files = files
        self._hosted: dict[str, HostedLearner] = {}

    def find(self, uid: str) -> HostedLearner | None:
        return self._hosted.get(uid)

    def get(self, uid: str) -> HostedLearner:
        """Raises `NotInEngine`."""
        hosted = self._hosted.get(uid)
        if hosted is None:
            raise NotInEngine
        return hosted

    def drop(self, uid: str) -> None:
        """Forgets the learner, if there is one."""
        self._hosted.pop(uid, None)

    def administer(self, request: messages.Request[Any]) -> object:
        """What is answered to requests that make, bring, name or drop learners."""
        match request:
            case messages.Create():
                return self._take_up(
                    request.learner,
                    Learner(request.spec, device=self._device, engine=self.engine_at_hand(request.engine)),
                )
            case messages.Import():
                return self._take_up(
                    request.learner, self._restored(LearnerSnapshot.from_bytes(request.data), request.engine)
                )
            case messages.Copy():
                source = self.get(request.learner)
                report = self._take_up(request.to, self._restored(source.learner.snapshot(), source.learner.engine))
                self._hosted[request.to].update_time = source.update_time
                return report
            case messages.Load():
                return self._load(request)
            case messages.Describe():
                return self.get(request.learner).report
            case messages.Drop():
                self.drop(request.learner)
                return None
            case messages.Rename():
                self._hosted[request.place_of] = self._hosted.pop(request.learner)
                return None
            case messages.Place():
                return self._place(request)
            case messages.Revise():
                self.get(request.learner).revise(request.spec, request.update_time)
                return None
            case _:
                raise TypeError(f"the engine knows no request {type(request).__name__}")

    def _take_up(self, uid: str, learner: Learner) -> messages.LearnerReport:
        hosted = self._hosted[uid] = HostedLearner(learner)
        return hosted.report

    def _restored(self, snapshot: LearnerSnapshot, engine: EngineName) -> Learner:
        return Learner.restore(snapshot, device=self._device, engine=self.engine_at_hand(engine))

    def engine_at_hand(self, name: EngineName) -> EngineName:
        """The engine of this name, once it can take steps; another one where the device has none of the kind."""
        if name != "compiled":
            return name
        if self._device != "cpu":
            return "stacked"
        self._preparation.require()
        return name

    def _load(self, request: messages.Load) -> messages.LoadReport:
        try:
            content = Content(self._read(request), request.stored_as)
            hosted = content.hosted(self._restored(content.snapshot, content.engine))
        except (SnapshotError, OSError) as error:
            raise SnapshotError(f"checkpoint {request.number} is unreadable: {error}") from error
        self._hosted[request.learner] = hosted
        return messages.LoadReport(hosted.report, hosted.samples.packed)

    def _read(self, request: messages.Load) -> bytes:
        try:
            return self._files.read(request.stored_as, request.number)
        except OSError as error:
            if self._files.remote and not isinstance(error, FileNotFoundError):
                raise CheckpointsUnreachable(str(error)) from error
            raise

    def _place(self, request: messages.Place) -> messages.LearnerReport:
        hosted = self.get(request.learner)
        hosted.place(request.positions, request.epoch_floor)
        hosted.journal_position = request.journal_position
        hosted.update_time = request.update_time
        return hosted.report
