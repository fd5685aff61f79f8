"""Metrics as the text that Prometheus reads, made in short turns of the event loop.

What is small comes from a registry and is written by prometheus_client. Series of learners are too many for that:
whoever knows them hands over their lines, ready to be joined.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, compress, islice
from typing import Literal, Protocol

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cbp_server.loop.turns import Turns

_OPENMETRICS = "application/openmetrics-text"
_OPENMETRICS_END = b"# EOF\n"
_NUMBERS = {int, float}
#: Longer than others take: beside a stream, each turn lets it do some milliseconds of work.
_TURN_SECONDS = 0.0015
#: Schemes that double underscores, for readers of names that Prometheus once could not read. Ours need none.
_OTHER_ESCAPING = re.compile(r";\s*escaping=(?:dots|values)\b")


@dataclass(frozen=True)
class TextFormat:
    """The Prometheus text format or OpenMetrics.

    Attributes:
        content_type: the header that announces it.
        encode: writes all that a collector has.
    """

    content_type: str
    encode: Callable[[Collector], bytes]

    @classmethod
    def accepted(cls, accept: str) -> "TextFormat":
        """The one that an Accept header asks for, by default the Prometheus text format."""
        encode, content_type = choose_encoder(_OTHER_ESCAPING.sub("", accept))
        return cls(content_type, encode)

    @property
    def is_openmetrics(self) -> bool:
        return self.content_type.startswith(_OPENMETRICS)


@dataclass(frozen=True)
class Family:
    """What all series of a name have in common; as everywhere in prometheus_client, a counter's name lacks `_total`."""

    name: str
    type: Literal["counter", "gauge", "summary"]
    help: str

    @property
    def sample_name(self) -> str:
        return f"{self.name}_total" if self.type == "counter" else self.name

    def header(self, text_format: TextFormat) -> bytes:
        name = self.name if text_format.is_openmetrics else self.sample_name
        text = _quotable(self.help) if text_format.is_openmetrics else _escaped(self.help)
        return f"# HELP {name} {text}\n# TYPE {name} {self.type}\n".encode()


class LineCollector(Protocol):
    """Knows series by their lines."""

    async def collect_lines(self, turns: Turns) -> Sequence[tuple[Family, Sequence[bytes]]]:
        """Each family and its text in pieces, of any number of lines each: see `label_set` and `lines`."""
        ...


def label_set(**labels: str) -> str:
    """The labels of a sample, as they stand between its name and its value."""
    return "{" + ",".join(f'{name}="{_quotable(value)}"' for name, value in sorted(labels.items())) + "}"


def lines(name: str, label_sets: Iterable[str], values: Sequence[float | None]) -> bytes:
    """The samples of a series for each set of labels whose value is known."""
    return b"".join(SeriesText([[name + of_one for of_one in label_sets]]).of(values))


class SeriesText:
    """The lines of series whose names and labels stay while their values change.

    Args:
        families: for each the series in it, names with their labels.
    """

    def __init__(self, families: Iterable[Iterable[str]]) -> None:
        # Tuples of nothing but text are no work for the garbage collector; lists it would go through.
        self._families = tuple([tuple([f"{series} ".encode() for series in family]) for family in families])
        self._known: list[bool] | None = None
        self._shown: tuple[bytes, ...] = ()
        self._places: list[slice] = []  # of each family, among what is shown and its values in turns

    def of(self, values: Sequence[float | None]) -> tuple[bytes, ...]:
        """The text of each family; where a value is None, there is no line.

        Args:
            values: of all series, in their order.
        """
        known = [value is not None for value in values]
        if known != self._known:
            self._lay_out(known)
        parts = [b""] * (2 * len(self._shown))
        parts[::2] = self._shown
        parts[1::2] = _written(list(compress(values, known)))
        return tuple([b"".join(parts[place]) for place in self._places])

    def _lay_out(self, known: list[bool]) -> None:
        self._known, self._places = known, []
        self._shown = tuple(compress(chain.from_iterable(self._families), known))
        end, is_known = 0, iter(known)
        for family in self._families:
            start, end = end, end + 2 * sum(islice(is_known, len(family)))
            self._places.append(slice(start, end))


def _written(values: Sequence[float | None]) -> list[bytes]:
    """Each number as it ends a line; none is None."""
    if not values:
        return []
    if strangers := set(map(type, values)) - _NUMBERS:  # they would make a text that Prometheus refuses as a whole
        raise TypeError(f"a series has no value of type {', '.join(kind.__name__ for kind in strangers)}")
    text = orjson.dumps(values)
    written = (text[1:-1].replace(b",", b"\n,") + b"\n").split(b",")
    if b"null" in text:  # JSON knows neither infinity nor NaN
        written = [
            f"{floatToGoString(value)}\n".encode() if line_end == b"null\n" else line_end  # type: ignore[no-untyped-call]
            for line_end, value in zip(written, values, strict=True)
        ]
    return written


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quotable(text: str) -> str:
    return _escaped(text).replace('"', r"\"")


class Exposition:
    """Everything that GET /metrics shows."""

    def __init__(self, registry: CollectorRegistry, learners: LineCollector) -> None:
        self._registry = registry
        self._learners = learners

    async def text(self, text_format: TextFormat) -> bytes:
        """All metrics as they are now."""
        turns = Turns(_TURN_SECONDS)
        pieces = []
        for metric in self._registry.collect():
            pieces.append(text_format.encode(_Collected([metric])).removesuffix(_OPENMETRICS_END))
            if turns.over:
                await turns.give_way()
        for family, lines in await self._learners.collect_lines(turns):
            pieces += [family.header(text_format), *lines]
        if text_format.is_openmetrics:
            pieces.append(_OPENMETRICS_END)
        return b"".join(pieces)


class _Collected(Collector):
    """Metrics read before."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
