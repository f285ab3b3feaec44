"""URLs of broker, database and object store: read once, when the settings load, into a form that all clients share.

Celery, redbeat, redis-py, SQLAlchemy and botocore each read URLs in their own way. What comes out here means the same
to all of them, and what could not is refused. No error quotes any part of a URL: it may be a piece of a password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._,%\-]*)(?::([0-9]*))?")
_NEXT_URL: Final = re.compile(r";(?=[A-Za-z][A-Za-z0-9+.\-]*://)")
_REDIS: Final = frozenset({"redis", "rediss"})
_VERIFY: Final = {"cert_required": "required", "cert_optional": "optional", "cert_none": "none"}
_BOOLEANS: Final = {"1": "true", "0": "false", "yes": "true", "no": "false", "true": "true", "false": "false"}
_TLS: Final = frozenset({"ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile"})
_ESCAPES: Final = "in its parts write %23 for #, %2F for /, %3F for ? and %40 for @"


@dataclass(frozen=True, slots=True)
class _Parts:
    """A URL taken apart; `user_info` is None where there is none, `rest` begins with the path."""

    scheme: str
    user_info: str | None
    location: str
    path: str
    query: str

    def joined(self) -> str:
        """The URL again, with user and password escaped in the one way that every client undoes."""
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{_escaped(self.user_info)}{self.location}{self.path}{query}"


def broker_address(url: str) -> str:
    """A broker's URL in the form that kombu, redbeat and redis-py read alike.

    Raises:
        ValueError: it cannot be read in one way only, or has a database or parameter that one of them ignores.
    """
    if len(several := _NEXT_URL.split(url.strip())) > 1:
        return ";".join(broker_address(one) for one in several)
    parts = _split(url)
    if parts.scheme not in _REDIS:
        return parts.joined()
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = f"/{given.pop('db')}" if "db" in given else parts.path
    if not re.fullmatch(r"/?[0-9]*", path):
        raise ValueError("the database of a Redis URL is a number, as in redis://host:6379/0")
    query = urlencode({name: _tls_value(parts.scheme, name, value) for name, value in given.items()}, quote_via=quote)
    return _Parts(parts.scheme, parts.user_info, parts.location, path, query).joined()


def database_address(url: str) -> str:
    """A database's URL with user and password escaped; a path of SQLite's is left as it is.

    Raises:
        ValueError: it cannot be read, or in two ways.
    """
    return url.strip() if url.strip().startswith("sqlite") else _split(url).joined()


def endpoint_address(url: str) -> str:
    """The URL of an object store: scheme, host, port and perhaps a path.

    Raises:
        ValueError: it has something else, or lacks scheme or host.
    """
    if "://" not in url:
        raise ValueError("an endpoint is http://host:port or https://host: it begins with neither")
    parts = _split(url)
    if parts.user_info is not None or parts.query:
        raise ValueError("an endpoint has no user, password or parameters: keys have settings of their own")
    if parts.scheme not in {"http", "https"} or not parts.location.partition(":")[0]:
        raise ValueError("an endpoint is http://host:port or https://host")
    return parts.joined()


def _split(url: str) -> _Parts:
    """Takes a URL apart, one with a raw `#`, `/`, `?` or `@` in its password as well where that leaves no doubt."""
    if (found := _SCHEME.fullmatch(url.strip())) is None:
        raise ValueError("not a URL: it begins with no scheme such as redis:// or postgresql+psycopg://")
    scheme, after = found[1].lower(), found[2]
    # Where RFC 3986 ends user, host and port; a raw `#` or `/` in a password would end it too early.
    end = next((index for index, letter in enumerate(after) if letter in "/?#"), len(after))
    strict, last = after.rfind("@", 0, end), after.rfind("@")
    # The standard's reading first; the other one only where this is none at all.
    if _reads(after[strict + 1 :], parameters=strict >= 0 and scheme not in _REDIS):
        return _parts(scheme, after, strict)
    host = _location(after[strict + 1 : end])
    # A path of Redis's is a number, so that an @ in it can only be the end of a password; elsewhere it may be a name.
    doubtful = host is not None and "#" not in after[:last] and (strict >= 0 or (scheme not in _REDIS and host != ""))
    if strict < last < len(after) - 1 and not doubtful and _reads(after[last + 1 :], parameters=False):
        return _parts(scheme, after, last)
    raise ValueError(f"not a URL that can be read in one way only: {_ESCAPES}")


def _reads(tail: str, *, parameters: bool) -> bool:
    """Returns whether this is host, port, path and parameters of a URL, and not the rest of a password.

    With `parameters`, their values may hold an @.
    """
    before, _, query = tail.partition("?")
    location, _, path = before.partition("/")
    if "#" in tail or "@" in path or _location(location) is None:
        return False
    return "@" not in query or (parameters and all("=" in pair for pair in query.split("&")))


def _location(text: str) -> str | None:
    found = _HOST.fullmatch(text)
    return text if found is not None and int(found[2] or 0) < 2**16 else None


def _parts(scheme: str, after: str, at: int) -> _Parts:
    before, _, query = after[at + 1 :].partition("?")
    location, slash, path = before.partition("/")
    return _Parts(scheme, after[:at] if at >= 0 else None, location, f"{slash}{path}", query)


def _escaped(user_info: str | None) -> str:
    if user_info is None:
        return ""
    user, colon, password = user_info.partition(":")
    return f"{_quoted(user)}{colon}{_quoted(password)}@"


def _quoted(text: str) -> str:
    # Undone first, so that what was escaped already is not escaped twice.
    return quote(unquote(text, errors="surrogateescape"), safe="", errors="surrogateescape")


def _tls_value(scheme: str, name: str, value: str) -> str:
    """A parameter's value as each client understands it.

    Raises:
        ValueError: not one of TLS's, or none of the values that they know.
    """
    if name not in _TLS:
        raise ValueError(
            "the only parameters of a Redis URL are db and those of TLS: ssl_ca_certs, ssl_cert_reqs, ssl_certfile, "
            "ssl_check_hostname, ssl_keyfile; timeouts have settings, CODE_WORKER_BROKER__…"
        )
    # redis-py would take them without TLS and say nothing.
    if scheme != "rediss":
        raise ValueError("ssl_… parameters need a URL that begins with rediss://")
    if name == "ssl_cert_reqs" and (value := _VERIFY.get(value.lower(), value.lower())) not in _VERIFY.values():
        raise ValueError("ssl_cert_reqs is required, optional or none")
    if name == "ssl_check_hostname" and (value := _BOOLEANS.get(value.lower(), "")) == "":
        raise ValueError("ssl_check_hostname is true or false")
    return value
