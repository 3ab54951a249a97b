"""Offers of a client to speak another protocol, which a server may ignore (RFC 9110, section 7.8), and does.

The HTTP parser would take what follows the head, a request's body, for that other protocol.
"""

_OFFER = b"upgrade:"
_ENDS = (b"", b"\r")


class UpgradeFilter:
    """Takes the `Upgrade` lines out of one head, in whatever parts it comes."""

    def __init__(self) -> None:
        self.is_done = False  # the head has ended; what comes then is passed on as it is
        self._has_begun = False  # empty lines before the first one do not end a head
        self._is_dropping = False
        self._is_at_start = True  # of a line
        self._kept = b""  # of a line that may become an offer, or the head's end

    def pass_on(self, data: bytes) -> bytes:
        """What of `data`, and of what was kept back before, is for the parser."""
        if self.is_done or self._is_plain(data):
            self.is_done = True
            return data
        passed = []
        data, self._kept = self._kept + data, b""
        while data and not self.is_done:
            line, end, rest = data.partition(b"\n")
            if self._is_at_start and not end and self._may_matter(line):
                self._kept = line
                break
            if self._is_at_start:
                self._begin_line(line, is_whole=bool(end))
            if not self._is_dropping:
                passed.append(line + end)
            self._is_at_start = bool(end)
            data = rest
        return b"".join(passed) + (data if self.is_done else b"")

    def _is_plain(self, data: bytes) -> bool:
        """A whole head without an offer, as nearly all are."""
        end = data.find(b"\r\n\r\n") if not self._has_begun and not self._kept else -1
        return end > 0 and data[:1] not in (b"\r", b"\n") and b"\n" + _OFFER not in data[:end].lower()

    def _may_matter(self, start: bytes) -> bool:
        return start == b"\r" or (self._has_begun and _OFFER.startswith(start.lower()))

    def _begin_line(self, line: bytes, *, is_whole: bool) -> None:
        goes_on = line[:1] in (b" ", b"\t")  # an old way to part a line's value
        is_offer = self._has_begun and line[: len(_OFFER)].lower() == _OFFER
        self._is_dropping = is_offer or (self._is_dropping and goes_on)
        if line in _ENDS and is_whole:
            self.is_done = self._has_begun
        else:
            self._has_begun = True
