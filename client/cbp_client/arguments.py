"""What users give, checked where they give it. Each refusal names the argument, what it has to be, and what it was."""

import inspect
import io
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import grpc
import numpy as np

from cbp_client.errors import FieldViolation, InvalidArgument
from cbp_proto.plain import shown

#: Longest wait in seconds, some 30 years: what operating systems and gRPC can count.
MOST_SECONDS: Final = 1e9
#: What a signed field of 32 bits, and one of 64, holds.
MOST_INT32: Final = 2**31 - 1
MOST_INT64: Final = 2**63 - 1


def invalid(field: str, description: str, reason: str = "INVALID_REQUEST") -> InvalidArgument:
    """The error for one field of a request that is not even sent."""
    violation = FieldViolation(field, description)
    return InvalidArgument(f"{field}: {description}", reason=reason, violations=[violation])


def text(argument: str, value: object) -> str:
    """A text that the wire can hold."""
    if not isinstance(value, str):
        raise invalid(argument, f"must be a text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(argument, f"must be text that UTF-8 can hold, not {shown(value)}") from None
    return value


def optional_text(argument: str, value: object) -> str | None:
    """A text or None."""
    return None if value is None else text(argument, value)


def texts(argument: str, values: object) -> list[str]:
    """Texts; a single one stands for itself."""
    if isinstance(values, str):
        return [text(argument, values)]
    items = _items(values)
    if items is None:
        raise invalid(argument, f"must be texts, not {shown(values)}")
    return [text(f"{argument}[{place}]", value) for place, value in enumerate(items)]


def label(argument: str, value: object) -> str:
    """A text, or a whole number, which tasks often are."""
    if isinstance(value, str):
        return text(argument, value)
    number = None if isinstance(value, bool | np.bool_) else _index(value)
    if number is None:
        raise invalid(argument, f"must be a text or a whole number, not {shown(value)}")
    return str(number)


def layers(argument: str, given: object) -> list[str]:
    """Hidden layers as the wire names them: `all`, `first`, indices and names."""
    single = isinstance(given, str) or _index(given) is not None
    items = [given] if single else _items(given)
    if items is None:
        raise invalid(argument, f"must be 'all', 'first', or indices or names of hidden layers, not {shown(given)}")
    return [label(argument if single else f"{argument}[{place}]", item) for place, item in enumerate(items)]


def whole(argument: str, value: object, *, least: int = 0, most: int = MOST_INT64) -> int:
    """A whole number within bounds."""
    number = None if isinstance(value, bool | np.bool_) else _index(value)
    if number is None or not least <= number <= most:
        raise invalid(argument, f"must be a whole number from {least} to {most}, not {shown(value)}")
    return number


def number(argument: str, value: object) -> float:
    """Any number that is finite."""
    found = _float(value)
    if found is None or not math.isfinite(found):
        raise invalid(argument, f"must be a finite number, not {shown(value)}")
    return found


def period(argument: str, value: object) -> float:
    """Seconds between two things, 0 or more."""
    found = _float(value)
    if found is None or not 0 <= found <= MOST_SECONDS:
        raise invalid(argument, f"must be seconds from 0 to {MOST_SECONDS:.0e}, not {shown(value)}")
    return found


def seconds(argument: str, value: object, *, none: str) -> float | None:
    """A time to wait, 0 or more.

    Args:
        argument: its name.
        value: what was given.
        none: what None means, for the error.
    """
    if value is None:
        return None
    found = _float(value)
    if found is None or not 0 <= found <= MOST_SECONDS:
        raise invalid(argument, f"must be seconds from 0 to {MOST_SECONDS:.0e}, or None {none}, not {shown(value)}")
    return found


def flag(argument: str, value: object) -> bool:
    """True or False; nothing else, since a text such as 'no' counts as true in Python."""
    if not isinstance(value, bool | np.bool_):
        raise invalid(argument, f"must be True or False, not {shown(value)}")
    return bool(value)


def callback(argument: str, value: Any) -> Callable[[Any], object] | None:
    """A plain function, or None."""
    if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
        raise invalid(argument, f"must be a function that is not asynchronous, or None, not {shown(value)}")
    function: Callable[[Any], object] | None = value
    return function


def entries(argument: str, value: Any) -> Mapping[str, Any]:
    """A mapping from names to values."""
    if not isinstance(value, Mapping):
        raise invalid(argument, f"must be a mapping such as {{'name': value}}, not {shown(value)}")
    return value


def channel_credentials(argument: str, value: object) -> grpc.ChannelCredentials | None:
    """What gRPC takes for TLS, or None."""
    if value is not None and not isinstance(value, grpc.ChannelCredentials):
        raise invalid(argument, f"must be what grpc.ssl_channel_credentials() gives, or None, not {shown(value)}")
    return value


def path_or_file(argument: str, value: Any, method: str) -> Any:
    """A path, or a file opened in binary mode.

    Args:
        argument: its name.
        value: what was given.
        method: what the file has to have: read or write.
    """
    is_path = isinstance(value, str | os.PathLike)
    if is_path and isinstance(path := os.fspath(value), str) and path and "\0" not in path:
        return value
    if is_path or isinstance(value, io.TextIOBase) or not callable(getattr(value, method, None)):
        raise invalid(argument, f"must be a path, or a file opened in binary mode to {method}, not {shown(value)}")
    return value


def _items(values: object) -> list[object] | None:
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        return None
    try:
        return list(values)
    except TypeError:  # an array without dimensions
        return None


def _index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _float(value: Any) -> float | None:
    if isinstance(value, str | bytes | bool | np.bool_):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
