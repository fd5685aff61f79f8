"""Pages of a listing. A token names the last item of its page, so it outlives changes."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from cbp import FieldViolation
from cbp_server.errors import InvalidRequest
from cbp_server.records.learners import LearnerRecord
from cbp_server.store.catalog import StoredCheckpoint

ItemT = TypeVar("ItemT")

_DEFAULT_SIZE, _LARGEST_SIZE = 50, 1000
_LARGEST_NUMBER = 10**18
#: Tells a token of ours, in this form, from other text that happens to be base64.
_MARK = "after:"


def page_of(learners: Sequence[LearnerRecord], page_size: int, page_token: str) -> tuple[list[LearnerRecord], str]:
    """One page of `learners`, which are ordered by id and then uid, and the token of the next page, empty on the last.

    A size of 0 means 50; more than 1000 is treated as 1000.

    Raises:
        InvalidRequest: a negative size, or a token that no page came with.
    """
    return _page(learners, lambda record: f"{record.learner_id} {record.uid}", page_size, page_token)


def checkpoints_page_of(
    checkpoints: Sequence[StoredCheckpoint], page_size: int, page_token: str
) -> tuple[list[StoredCheckpoint], str]:
    """The same for a learner's checkpoints, newest first."""
    return _page(checkpoints, lambda checkpoint: f"{_LARGEST_NUMBER - checkpoint.number:019d}", page_size, page_token)


def _page(
    items: Sequence[ItemT], key: Callable[[ItemT], str], page_size: int, page_token: str
) -> tuple[list[ItemT], str]:
    """A page of items in the order of their keys."""
    if page_size < 0:
        raise InvalidRequest(FieldViolation("page_size", f"must not be negative, is {page_size}"))
    after = _decode(page_token)
    following = [item for item in items if key(item) > after]
    size = min(page_size or _DEFAULT_SIZE, _LARGEST_SIZE)
    page = following[:size]
    return page, _encode(key(page[-1])) if len(following) > size else ""


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(f"{_MARK}{key}".encode()).decode().rstrip("=")


def _decode(token: str) -> str:
    if not token:
        return ""
    try:
        decoded = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        decoded = ""
    if not decoded.startswith(_MARK):
        raise InvalidRequest(FieldViolation("page_token", "must be the next_page_token of the page before"))
    return decoded.removeprefix(_MARK)
