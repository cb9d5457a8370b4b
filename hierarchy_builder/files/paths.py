"""Paths and URLs as users give them: `~` is expanded here and nowhere else, and text without `://` is a local path."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hierarchy_builder.errors import UsageError
from hierarchy_builder.files.remote import CLIENTS, OPTIONS
from hierarchy_builder.machine.installing import install_extras

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def a_place(text: str) -> str:
    """A path with `~` expanded, or a URL as it is.

    Raises UsageError for an empty text (a variable that is not set), a name that is not UTF-8, an unknown home, and a
    URL with a password.
    """
    if not text.strip():
        raise UsageError("it is empty, expected a path; `.` is this folder")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {printable(text)} is not UTF-8, expected names that are: rename it, or give a link to it"
        ) from None
    if "://" in text:
        refuse_password(text)
        return text
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UsageError(
            f"{text}: the home folder is not known (HOME is not set, or there is no such user): give the whole path"
        )
    return expanded


def a_path(text: str) -> Path:
    """A local path with `~` expanded; raises what `a_place` raises, and UsageError for a URL."""
    if "://" in text:
        raise UsageError(f"{text} is a URL, and only a path on this machine is understood here")
    return Path(a_place(text))


def a_folder(text: str) -> Path:
    """A local path with `~` expanded, or the place at a URL, which has the methods of a path; see `remote_place`."""
    place = a_place(text)
    return remote_place(place) if "://" in place else Path(place)


def may_hold_builds(place: str) -> bool:
    """Whether a path or URL is on a file system that builds can be written to; shard sets are read from any."""
    scheme, separator, _ = place.partition("://")
    return not separator or scheme in (*CLIENTS, "file")


def remote_place(url: str) -> Path:
    """The place at a URL. Raises UsageError for an unknown scheme and where the package of a known one is missing."""
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{url} is no file of this machine, expected file:///absolute/path, or a path")
        return Path(slash + path)
    if scheme not in CLIENTS:
        raise UsageError(
            f"{url}: {scheme}:// is not understood here, expected a path or a URL that begins with "
            f"{', '.join(f'{name}://' for name in ('s3', 'gs', 'az', 'memory', 'file'))}"
        )
    if not rest.strip("/"):
        raise UsageError(f"{url} names no folder, expected for example {scheme}://bucket/folder")
    package, extra = CLIENTS[scheme]
    try:
        importlib.import_module(package)
        from hierarchy_builder.files.remote_paths import RemotePath
    except ImportError as error:
        raise UsageError(
            f"{url}: {error.name or package} is not installed: {install_extras(extra)}"
        ) from None
    return cast(Path, RemotePath(url.rstrip("/"), **OPTIONS))


def refuse_password(url: str) -> None:
    """Raise UsageError for a URL with a password, which manifests and listings would hold."""
    if ":" in url.partition("://")[2].partition("/")[0].rpartition("@")[0]:
        raise UsageError(
            f"{shown(url)} was given with a password, which files that name it would hold: give it in the environment "
            "or a profile, or for a web server in ~/.netrc"
        )


def shown(url: str) -> str:
    """A URL as it may be printed: without user, password and the query, which may be a signature."""
    scheme, _, rest = url.partition("://")
    if scheme not in CLIENTS:  # of an object store they are part of a name
        rest = re.split("[?#]", rest)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def home_folder() -> Path | None:
    """The home folder of this user, or None where there is none: HOME is not set and the user has no entry."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def filesystem_of(place: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path there. A local path may hold `::`, which fsspec takes for a chain.

    Raises ImportError and ValueError, as fsspec does, for a URL that is not understood; UsageError for a password.
    """
    from fsspec.core import url_to_fs  # imported here because --help must start at once
    from fsspec.implementations.local import LocalFileSystem

    if "://" not in place:
        return LocalFileSystem(), os.path.abspath(place)
    refuse_password(place)
    scheme = place.partition("://")[0]
    if scheme in ("http", "https"):
        return url_to_fs(place, client_kwargs={"trust_env": True})  # reads ~/.netrc
    return url_to_fs(place, **(OPTIONS if scheme in CLIENTS else {}))


def printable(text: str) -> str:
    """A file name that may not be UTF-8, as text that can be printed and stored."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
