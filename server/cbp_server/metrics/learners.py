"""Metrics of learners: which of them have series of their own, and the lines of all of them."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from dataclasses import dataclass
from heapq import nsmallest

from cbp import LearnerProgress
from cbp_server.loop.turns import Turns
from cbp_server.metrics.exposition import Family
from cbp_server.metrics.learner_families import SAMPLE_FAMILIES, STATE_FAMILIES
from cbp_server.metrics.learner_lines import LearnerLines
from cbp_server.metrics.other_learners import OtherLearners
from cbp_server.records.learners import LearnerRecord, LearnerState
from cbp_server.records.read_model import ReadModel, all_shown

_Rank = tuple[bool, int, bool, str]


@dataclass
class _Known:
    """What is remembered of a learner between two scrapes.

    Attributes:
        progress: where it was when it was last looked at; None before that.
        active_at: number of the scrape that last saw it step.
        reported: where it was according to the newest series that it is in.
        lines: with its own series, if it has any.
    """

    uid: str
    reported: LearnerProgress
    progress: LearnerProgress | None = None
    active_at: int = 0
    lines: LearnerLines | None = None

    def rank(self, learner: LearnerRecord) -> _Rank:
        """Its place in the order in which learners get series of their own."""
        return learner.quarantine is None, -self.active_at, self.lines is None, learner.learner_id


class LearnerMetrics:
    """Reads the learners when Prometheus asks.

    At most `max_learners` learners have series of their own: those that are quarantined, so that alerts name them, then
    those that stepped most recently, and among equals those that had them before, so that series come and go rarely.
    The rest appear as one learner `_others`. Its counters hold the increases seen while a learner was among the others:
    they never fall when a learner joins or leaves, which rate() would take for a restart.

    A learner that has yet to be brought back after the server's start has no series: its checkpoint says less than the
    server before reported, which rate() would take for a restart as well.
    """

    def __init__(self, source: ReadModel, *, max_learners: int) -> None:
        self._source = source
        self._max_learners = max_learners
        self._scrape = 0
        self._known: dict[str, _Known] = {}
        self._lines: list[LearnerLines] = []
        self._others = OtherLearners()
        self._scraping = asyncio.Lock()  # one at a time: each starts from what the one before has left

    async def collect_lines(self, turns: Turns) -> Sequence[tuple[Family, Sequence[bytes]]]:
        async with self._scraping:
            learners = {learner.learner_id: learner for learner in self._source.learners()}
            named = nsmallest(self._max_learners, await self._look_at(learners, turns))
            await self._name({learner_id for *_, learner_id in named}, turns)
            texts = [text async for text in self._report(learners, turns)]
        return list(zip(STATE_FAMILIES + SAMPLE_FAMILIES, zip(*texts, strict=True), strict=True))

    async def _look_at(self, learners: Mapping[str, LearnerRecord], turns: Turns) -> list[_Rank]:
        """The ranks of all that are to have series, after a look at who is there and has stepped."""
        self._scrape += 1
        for learner_id in [learner_id for learner_id in self._known if learner_id not in learners]:
            self._forget(learner_id)
        ranks = []
        for learner in learners.values():
            known = self._know(learner)
            if known is not None:
                if learner.progress is not known.progress:  # records are replaced, not changed
                    known.progress, known.active_at = learner.progress, self._scrape
                ranks.append(known.rank(learner))
            if turns.over:
                await turns.give_way()
        return ranks

    async def _name(self, named: Set[str], turns: Turns) -> None:
        """Gives series of their own to these learners, and to no others."""
        for learner_id, known in self._known.items():
            if known.lines is not None and learner_id not in named:
                _unname(learner_id, known)
        self._lines = [lines for lines in self._lines if lines.members]
        with_room = [lines for lines in self._lines if not lines.is_full]
        for learner_id in sorted(learner_id for learner_id in named if self._known[learner_id].lines is None):
            if not with_room:
                with_room = [LearnerLines()]
                self._lines += with_room
            with_room[-1].join(learner_id)
            self._known[learner_id].lines = with_room[-1]
            self._others.leave(learner_id)
            if with_room[-1].is_full:
                with_room.pop()
            if turns.over:
                await turns.give_way()

    async def _report(self, learners: Mapping[str, LearnerRecord], turns: Turns) -> AsyncIterator[tuple[bytes, ...]]:
        """The texts of the named learners and of the others together, for each family."""
        for lines in self._lines:
            yield self._text_of(lines, learners)
            if turns.over:
                await turns.give_way()
        for learner_id, known in list(self._known.items()):
            if known.lines is None:
                self._take_among_others(learners[learner_id], known)
                if turns.over:
                    await turns.give_way()
        yield self._others.lines()

    def _text_of(self, lines: LearnerLines, learners: Mapping[str, LearnerRecord]) -> tuple[bytes, ...]:
        """Of its members; one whose record cannot be written leaves."""
        members = [learners[learner_id] for learner_id in lines.members]
        if not members:
            return (b"",) * len(STATE_FAMILIES + SAMPLE_FAMILIES)
        for learner in members:
            self._known[learner.learner_id].reported = learner.progress
        try:
            return lines.of(members)
        except Exception:  # whatever is wrong with one of them
            all_shown(self._source, members, _written_alone)
            left = {learner.learner_id for learner in self._source.learners()}
            for learner in members:
                if learner.learner_id not in left:
                    self._forget(learner.learner_id)
            if len(lines.members) == len(members):
                raise
        return self._text_of(lines, learners)

    def _take_among_others(self, learner: LearnerRecord, known: _Known) -> None:
        try:
            self._others.take(learner, known.reported)
            known.reported = learner.progress
        except Exception as error:  # whatever is wrong with it
            self._source.cannot_show(learner, error)
            self._forget(learner.learner_id)

    def _know(self, learner: LearnerRecord) -> _Known | None:
        """What is remembered of the learner, None if it was never seen where it had come to before."""
        known = self._known.get(learner.learner_id)
        if known is None or known.uid != learner.uid:
            self._forget(learner.learner_id)
            if learner.state is LearnerState.UNAVAILABLE:
                return None
            known = self._known[learner.learner_id] = _Known(learner.uid, reported=learner.progress)
        return known

    def _forget(self, learner_id: str) -> None:
        known = self._known.pop(learner_id, None)
        if known is not None and known.lines is not None:
            _unname(learner_id, known)
        self._others.leave(learner_id)


def _written_alone(learner: LearnerRecord) -> None:
    lines = LearnerLines()
    lines.join(learner.learner_id)
    lines.of([learner])


def _unname(learner_id: str, known: _Known) -> None:
    if known.lines is not None:
        known.lines.leave(learner_id)
        known.lines = None
