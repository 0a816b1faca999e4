"""Addresses of files and folders: paths, and URLs of object stores and web servers."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pipelines.errors import ConfigError

SCHEMES = ("s3", "gs", "az", "https", "http")
"""Schemes of URLs that are read by requests; `file` stands for a path."""

_QUERY = re.compile("[?#]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Url:
    """The address of an object, or of a folder, the objects whose keys begin with it.

    It has the part of the interface of `Path` that reading needs.

    Attributes:
        scheme: One of SCHEMES.
        host: Name of the bucket or container, or host and port of a web server.
        key: Key of the object, without a slash at its ends; empty for the whole bucket.
    """

    scheme: str
    host: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.key}"

    def __fspath__(self) -> str:
        # Errors name files by their path.
        return str(self)

    def __truediv__(self, name: str) -> Url:
        parts = [part for part in f"{self.key}/{name}".split("/") if part not in ("", ".")]
        return Url(self.scheme, self.host, "/".join(parts))

    @property
    def name(self) -> str:
        """The part of the key after the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that holds it."""
        return Url(self.scheme, self.host, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        """Return the address of `name` in the same folder."""
        return self.parent / name


Location: TypeAlias = Path | Url
"""Address of a file or folder."""


def is_url(text: str) -> bool:
    """Return whether `text` is a URL, and not a path."""
    return _SCHEME.fullmatch(text) is not None


def parse_location(text: str, key: str) -> Location:
    """Return the address that a user wrote: a path, or a URL.

    Args:
        text: The path or URL.
        key: Name of the setting, for errors.

    Raises:
        ConfigError: The URL has an unknown scheme, no bucket or host, a password or a query.
    """
    found = _SCHEME.fullmatch(text)
    if not found:
        return Path(text)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        # file://HOST/PATH is a file on another machine.
        if not rest.startswith("/"):
            raise ConfigError(key, text, "expected file:///PATH, or the path alone")
        return Path(urllib.parse.unquote(rest))
    host, slash, path = rest.partition("/")
    # Without what may be secret.
    shown = f"{scheme}://{_QUERY.split(host.rpartition('@')[2])[0]}{slash}{_QUERY.split(path)[0]}"
    if scheme not in SCHEMES:
        raise ConfigError(
            key, shown, f"expected a path, or a URL that begins with {':// or '.join(SCHEMES)}://"
        )
    if "@" in host:
        fault = "a URL must not hold a password: keep it where the store's own tools look for it"
        raise ConfigError(key, shown, f"{fault}; see docs/clouds.md")
    if _QUERY.search(rest):
        # A signature in a query would be written to config.yaml and to reports.
        fault = "a URL must have no query, and a signed one opens a single object: give the folder's address"
        raise ConfigError(key, shown, f"{fault}; see docs/clouds.md")
    if not host:
        raise ConfigError(key, text, f"names no bucket or host; expected {scheme}://NAME/FOLDER")
    if not text.isprintable():
        raise ConfigError(key, text, "holds characters that cannot be printed; remove them")
    return Url(scheme, host) / path
