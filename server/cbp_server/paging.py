"""Pages of learners, in the order of their ids. A token names the last learner of its page, so it outlives changes."""

import base64
import binascii
from collections.abc import Sequence

from cbp import FieldViolation
from cbp_server.errors import InvalidRequest
from cbp_server.records import LearnerRecord

_DEFAULT_SIZE, _LARGEST_SIZE = 50, 1000
#: Tells a token of ours, in this form, from other text that happens to be base64.
_MARK = "after:"


def page_of(learners: Sequence[LearnerRecord], page_size: int, page_token: str) -> tuple[list[LearnerRecord], str]:
    """One page of `learners`, which are ordered by id, and the token of the next page, empty on the last.

    A size of 0 means 50; more than 1000 is treated as 1000.

    Raises:
        InvalidRequest: a negative size, or a token that no page came with.
    """
    if page_size < 0:
        raise InvalidRequest(FieldViolation("page_size", f"must not be negative, is {page_size}"))
    after = _decode(page_token)
    following = [record for record in learners if record.learner_id > after]
    size = min(page_size or _DEFAULT_SIZE, _LARGEST_SIZE)
    page = following[:size]
    return page, _encode(page[-1].learner_id) if len(following) > size else ""


def _encode(learner_id: str) -> str:
    return base64.urlsafe_b64encode(f"{_MARK}{learner_id}".encode()).decode().rstrip("=")


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
