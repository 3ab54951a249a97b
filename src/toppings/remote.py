"""The few requests that the command line sends to a running server."""

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT_S = 300.0
"""Unloading waits for the adapter's requests to end."""


class RemoteError(ValueError):
    """The server could not be reached, or refused; the message says which and why."""


class RemoteServer:
    """A Toppings server at `url`; `api_key` may be empty."""

    def __init__(self, url: str, api_key: str = "", *, timeout_s: float = TIMEOUT_S) -> None:
        if not url.startswith(("http://", "https://")):
            raise RemoteError(f"url is {url!r}; it must start with http:// or https://")
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def adapters(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self._send("GET", "/adapters"))["adapters"]
        return rows

    def dashboard(self) -> dict[str, Any]:
        """What its dashboard shows, section by section."""
        text = self._send("GET", "/dashboard/data")
        try:
            told: dict[str, Any] = json.loads(text)
            told["about"]["kind"], told["now"]["open"]
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(f"{self._url} is no Toppings server or router of this version") from error
        return told

    def load(self, name: str, path: str, *, in_place: bool) -> str:
        return self._load({"lora_name": name, "lora_path": path, "load_inplace": in_place})

    def merge(self, name: str, merge: dict[str, Any], *, in_place: bool) -> str:
        return self._load({"lora_name": name, "merge": merge, "load_inplace": in_place})

    def _load(self, body: dict[str, Any]) -> str:
        return self._send("POST", "/v1/load_lora_adapter", body)

    def unload(self, name: str) -> str:
        return self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _send(self, method: str, route: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + route, data, self._headers, method=method)
        try:
            with urlopen(request, timeout=self._timeout_s) as response:
                text: str = response.read().decode()
                return text
        except HTTPError as error:
            raise RemoteError(f"{self._url} answered {error.code}: {_reason(error.read())}") from error
        except UnicodeDecodeError as error:
            raise RemoteError(f"{self._url} answered with what is no text") from error
        except (URLError, HTTPException, OSError) as error:
            raise RemoteError(f"cannot reach {self._url}: {getattr(error, 'reason', error)}") from error


def _reason(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
    return str(error["message"] if isinstance(error, dict) else error)
