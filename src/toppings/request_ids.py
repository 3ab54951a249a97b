"""Ids of HTTP requests: the client's own, or a new one."""

import re
import uuid

REQUEST_ID = "X-Request-Id"
VALID_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")


def request_id_of(given: str) -> str:
    """What the header `X-Request-Id` holds if it is 1 to 128 letters, digits or `._:/+=@~-`, else a new one.

    Such an id can be written into headers and logs as it is.
    """
    return given if VALID_ID.fullmatch(given) else uuid.uuid4().hex
