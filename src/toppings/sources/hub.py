"""Repositories of a hub that speaks Hugging Face's protocol; HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE count."""

import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import quote

from toppings.sources.checkpoint_files import CONFIG, TEXTS, weights_of
from toppings.sources.fetch import (
    DENIALS,
    FetchDenied,
    FetchError,
    FetchNotFound,
    Opened,
    Room,
    copy,
    explained,
    one_line,
)
from toppings.sources.web import open_url

if TYPE_CHECKING:
    from toppings.sources.hub_info import RepositoryInfo

HUB_ID = re.compile(
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?P<file>(?:/[\w.-]+)+\.gguf)?(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
MAX_API_BYTES = 16 << 20
API_TIMEOUT_S = 30.0
"""The longest that asking the hub what a repository has may take."""


def split_id(reference: str) -> tuple[str, str, str] | None:
    """Repository, file in it ("": none) and revision ("": its default) of `org/name[/file.gguf][@revision]`;
    None for what is no such id."""
    match = HUB_ID.fullmatch(reference)
    if match is None or match["repo"].endswith(".gguf"):
        return None
    if ".." in reference or any(p.startswith((".", "-")) for p in reference.split("/")):
        return None
    if "--" in match["repo"] or any(p.endswith((".", "-", ".git")) for p in match["repo"].split("/")):
        return None  # the hub has none of these
    return match["repo"], (match["file"] or "").lstrip("/"), match["revision"] or ""


class HubFiles:
    """A repository in one revision: those of its files whose names are `wanted`."""

    def __init__(self, reference: str, wanted: frozenset[str], token: str | None = None) -> None:
        """Raises FetchError, FetchNotFound; also where `token` may not read the files, of which a gated
        repository tells everybody."""
        parts = split_id(reference)
        if parts is None or parts[1]:
            raise FetchError(f"{reference!r} is no id of a hub's repository: org/name or org/name@revision")
        self._repo, _, revision = parts
        self._token = token
        room = Room(MAX_API_BYTES, API_TIMEOUT_S)
        info = self._look(revision, room)
        self.version = info.sha or ""
        if not re.fullmatch(r"[0-9a-f]{7,64}", self.version):
            raise FetchError(f"the hub names no revision of {self._repo}")
        self.is_restricted = bool(info.private or info.gated)
        self.where = f"hub:{self._repo}@{self.version}"
        self._sizes = {each.rfilename: each.size for each in info.siblings or [] if each.rfilename in wanted}
        if self.is_restricted and self._sizes:
            self.open(min(self._sizes), room).body.close()

    def sizes(self) -> Mapping[str, int | None]:
        return self._sizes

    def open(self, name: str, room: Room, start: int = 0) -> Opened:
        from huggingface_hub import hf_hub_url

        return Opened(self._ask(hf_hub_url(self._repo, name, revision=self.version), room))

    def _look(self, revision: str, room: Room) -> "RepositoryInfo":
        """What the hub says of the repository, all of it within `room`."""
        from huggingface_hub import constants

        from toppings.sources.hub_info import read_info

        url = f"{constants.ENDPOINT}/api/models/{self._repo}"
        if revision:
            url += f"/revision/{quote(revision, safe='')}"
        told = io.BytesIO()
        with closing(self._ask(f"{url}?blobs=true", room)) as answer:
            copy(Opened(answer), told, room, url)
        try:
            return read_info(told.getvalue())
        except (ValueError, RecursionError) as error:
            raise FetchError(f"what the hub says of {self._repo} is not understood: {error}") from error

    def _ask(self, url: str, room: Room) -> HTTPResponse:
        from huggingface_hub import constants, errors

        with advised(self._repo):
            if constants.HF_HUB_OFFLINE:
                raise errors.OfflineModeIsEnabled(f"cannot reach {url}")
            return open_url(url, room, _headers(self._token), to_other_hosts=True)


def _headers(token: str | None) -> dict[str, str]:
    """None of the library's: to make them it asks the hub for more, without a bound."""
    from huggingface_hub import constants, get_token

    if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        token = get_token()
    return {"User-Agent": "toppings"} | ({"Authorization": f"Bearer {token}"} if token else {})


def fetch_model(reference: str) -> Path | None:
    """A base model's files in the hub's own cache, whose snapshot they are: its directory, or a `.gguf` file.

    None where `reference` is no hub id. Resumes what was interrupted. Raises FetchError.
    """
    parts = split_id(reference)
    if parts is None:
        return None
    from huggingface_hub.utils.tqdm import disable_progress_bars

    repo, file, revision = parts
    if not (sys.stderr and sys.stderr.isatty()):
        disable_progress_bars()
    if file:
        return _download(repo, file, revision)
    path = _snapshot(repo, revision, TEXTS)
    if not (path / CONFIG).is_file():
        return _download(repo, _only_gguf(repo, revision), revision)
    wanted = weights_of(path, repo)
    path = _snapshot(repo, path.name, wanted)  # of the same commit
    if missing := [name for name in wanted if not (path / name).is_file()]:
        raise FetchError(
            f"{repo} has no {missing[0]}, or it is not in the hub's cache and the hub is not reached; of a "
            "base model only safetensors are read, never pickles"
        )
    return path


def _download(repo: str, file: str, revision: str) -> Path:
    import huggingface_hub

    with advised(repo):
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision or None))


def _snapshot(repo: str, revision: str, names: Iterable[str]) -> Path:
    """The directory that holds those of the files that there are."""
    import huggingface_hub

    with advised(repo):
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=list(names))
        )


def _only_gguf(repo: str, revision: str) -> str:
    import huggingface_hub

    with advised(repo):
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision or None)
    files = sorted(name for name in names if name.endswith(".gguf"))
    if not files:
        raise FetchError(f"{repo} is no base model: it has no {CONFIG} and no GGUF file")
    if len(files) > 1:
        raise FetchError(f"{repo} holds {len(files)} GGUF files; name one, e.g. {repo}/{files[0]}")
    return files[0]


@contextmanager
def advised(repo: str) -> Iterator[None]:
    """What the hub answers, or its client raises, in one line with what to do."""
    from huggingface_hub import errors

    with explained(repo):
        try:
            yield
        except FetchError as error:
            raise _refused(repo, _code(error.__cause__)) or error from error.__cause__
        except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
            raise FetchError(
                f"{repo} is not in the hub's cache on this machine, and the hub is not reached: "
                f"{_cause(error)}"
            ) from error
        except errors.GatedRepoError as error:
            raise _refused(repo, "GatedRepo") or error from error
        except errors.RepositoryNotFoundError as error:
            raise _refused(repo, "RepoNotFound") or error from error
        except errors.RevisionNotFoundError as error:
            raise _refused(repo, "RevisionNotFound") or error from error
        except errors.EntryNotFoundError as error:
            raise _refused(repo, "EntryNotFound") or error from error
        except errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in DENIALS:
                raise
            raise FetchDenied(f"{repo} is not given for this token: {_cause(error)}") from error


def _refused(repo: str, code: str) -> FetchError | None:
    """What a hub's X-Error-Code means; None for another one."""
    match code:
        case "GatedRepo":
            return FetchDenied(
                f"{repo} is gated: ask for access on its page, and set HF_TOKEN to a token that has it"
            )
        case "RepoNotFound":
            return FetchNotFound(
                f"the hub has no repository {repo}, or none that this token sees: check the name, or set "
                "HF_TOKEN"
            )
        case "RevisionNotFound":
            return FetchNotFound(f"{repo} has no such revision: name a branch, a tag or a commit after '@'")
        case "EntryNotFound":
            return FetchNotFound(f"{repo} has no such file")
    return None


def _code(answer: BaseException | None) -> str:
    """Its X-Error-Code. A hub says 401 alone of a repository that is not there, or not for this account."""
    if not isinstance(answer, HTTPError):
        return ""
    is_bad_token = "Invalid credentials" in str(answer.headers.get("X-Error-Message"))
    return answer.headers.get("X-Error-Code") or (
        "RepoNotFound" if answer.code == 401 and not is_bad_token else ""
    )


def _cause(error: Exception) -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(error.__cause__ or error)
