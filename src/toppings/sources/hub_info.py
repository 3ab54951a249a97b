"""What a hub tells of a repository: apart, since an engine in a bare process has no msgspec."""

from typing import Annotated

import msgspec


class RepositoryFile(msgspec.Struct):
    rfilename: str
    size: Annotated[int, msgspec.Meta(ge=0)] | None = None


class RepositoryInfo(msgspec.Struct):
    """Its current commit, who may read it, and its files."""

    sha: str | None = None
    private: bool | None = None
    gated: bool | str | None = None
    siblings: list[RepositoryFile] | None = None


def read_info(text: bytes) -> RepositoryInfo:
    """Raises ValueError or RecursionError for what is none."""
    try:
        return msgspec.json.decode(text, type=RepositoryInfo)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
