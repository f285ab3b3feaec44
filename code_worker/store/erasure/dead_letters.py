"""Unreadable messages that name something erased: read as what they are, and not searched as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from code_worker.store.erasure import receipts
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import as_uuid
from code_worker.store.models import DeadLetterRow
from code_worker.store.retention import rowcount
from code_worker.store.sql import table_of

_LETTERS = table_of(DeadLetterRow)
_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-fA-F]{4}|[\"\\/bfnrt])")
_WORDS: Final = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{64}|\"(?:[^\"\\]|\\.)*\"?|'[^']*'?|[^\s\"'(),;]+"
)
_LONGEST: Final = 6 * 4096
"""Characters of the longest address, each escaped."""
_NESTED: Final = 4
_KINDS: Final = (receipts.JOB, receipts.IMAGE, receipts.URI)
_ANY: Final = ""
Erased = Callable[[str, str], bool]
"""Whether a value of a kind was erased; `_ANY` tenant: whether it is one that is erased."""


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of a text, without the rest of a word that the cut goes through.

    A part of an address is in no list of what was erased. A word that is longer than any address stays.
    """
    if len(text) <= limit:
        return text
    kept = text[:limit]
    if (len(kept) - len(kept.rstrip("\\"))) % 2:
        # Half an escape, of JSON.
        kept = kept[:-1]
    last = max(_WORDS.finditer(kept), key=re.Match[str].end, default=None)
    if last is None or last.end() < len(kept) or _is_closed(last[0]):
        return kept
    start = last.start()
    if len(last[0]) > _LONGEST:
        # A text of many words between quotes.
        start += max(last[0].rfind(space) for space in " \n\t") + 1
    return kept if len(kept) - start > _LONGEST else kept[:start]


def _is_closed(word: str) -> bool:
    return len(word) > 1 and word[0] in "\"'" and word[-1] == word[0]


@dataclass(frozen=True, slots=True)
class Naming:
    """A message that names something erased, as it was read, and what may stay of it; None: nothing."""

    id: str
    body: str
    error: str
    at: datetime
    body_left: str | None
    error_left: str


def naming(
    session: Session, erasure_id: str, *, scope: Scope, after: str, limit: int
) -> tuple[list[Naming], str | None]:
    """Reads a page of unreadable messages for what was erased. That may take seconds, so it needs no lock.

    Returns:
        Messages that name something, and the id after which the next page begins; None after the last page.
    """
    columns = (_LETTERS.c[name] for name in ("id", "body", "error", "at"))
    page = select(*columns).order_by(_LETTERS.c.id).limit(limit)
    # An empty text is no UUID: PostgreSQL would refuse the comparison.
    rows = session.execute(page.where(_LETTERS.c.id > after) if after else page).all()
    texts = [text for row in rows for text in (row.body, row.error)]
    erased = _asker(session, erasure_id, texts, of_a_tenant=scope.tenant is not None)
    read = (
        Naming(row.id, row.body, row.error, row.at, _without(row.body, erased), _without_words(row.error, erased))
        for row in rows
    )
    found = [one for one in read if (one.body, one.error) != (one.body_left, one.error_left)]
    return found, rows[-1].id if len(rows) == limit else None


def is_named(session: Session, kind: str, value: str, *, after: str, limit: int) -> tuple[bool, str | None]:
    """Returns whether an unreadable message of a page names a job, an image or a tenant, as an erasure would find it.

    Returns:
        The answer, and the id after which the next page begins; None after the last page.
    """
    page = select(_LETTERS.c.id, _LETTERS.c.body, _LETTERS.c.error).order_by(_LETTERS.c.id).limit(limit)
    rows = session.execute(page.where(_LETTERS.c.id > after) if after else page).all()

    def erased(of: str, said: str) -> bool:
        if (of, said) == (receipts.TENANT, _ANY):
            return kind == receipts.TENANT
        return of == kind and (of, value) in _spelt(said)

    found = any(
        (row.body, row.error) != (_without(row.body, erased), _without_words(row.error, erased)) for row in rows
    )
    return found, rows[-1].id if len(rows) == limit else None


def rewrite(session: Session, found: Sequence[Naming]) -> int:
    """Leaves of these messages what may stay; of one that is not as it was read nothing changes. Returns how many."""
    count = 0
    for one in found:
        same = (_LETTERS.c.id == one.id, _LETTERS.c.body == one.body, _LETTERS.c.error == one.error)
        left = update(_LETTERS).where(*same).values(body=one.body_left, error=one.error_left)
        count += rowcount(session.execute(delete(_LETTERS).where(*same) if one.body_left is None else left))
    return count


def _asker(session: Session, erasure_id: str, texts: list[str], *, of_a_tenant: bool) -> Erased:
    """Asks for everything that the texts say at once."""
    salt = receipts.salt_of(session, erasure_id)
    digests = {
        (kind, value): receipts.digest(salt, kind, spelt)
        for value in {value for text in texts for value in _values(text)}
        for kind, spelt in _spelt(value)
    }
    found = receipts.digests_among(session, erasure_id, set(digests.values()))
    hits = {named for named, digest in digests.items() if digest in found}
    if of_a_tenant:
        hits.add((receipts.TENANT, _ANY))
    return lambda kind, value: (kind, value) in hits


def _spelt(value: str) -> Iterator[tuple[str, str]]:
    """Yields what a value may be, as it would be spelt."""
    if 32 <= len(value) <= 45 and (job_id := as_uuid(value)) is not None:
        yield receipts.JOB, job_id
    elif len(value) == 64:
        yield receipts.IMAGE, value.lower()
    yield receipts.URI, value
    yield receipts.TENANT, value


def _values(text: str) -> Iterator[str]:
    """Every value that a text may mean: of its JSON if it is any, and of its words."""
    parsed = _parsed(text)
    if parsed is not None:
        yield from _strings(parsed)
    for word in _WORDS.findall(text):
        yield word
        bare = word.strip("\"'")
        yield bare
        yield _unescaped(bare)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        yield from (word.strip("\"'") for word in _WORDS.findall(value))
        # A message in a message, as a broker wraps it.
        if depth < _NESTED and value[:1] in {"{", "["} and (inner := _parsed(value)) is not None:
            yield from _strings(inner, depth + 1)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each, depth)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _strings(each, depth)


def _unescaped(text: str) -> str:
    """Returns what a part of JSON says that cannot be parsed, because the message was cut."""

    def character(match: re.Match[str]) -> str:
        try:
            return str(json.loads(f'"{match[0]}"'))
        except ValueError:
            return match[0]

    joined = _ESCAPE.sub(character, text)
    # Beyond the basic plane a character is two escapes.
    return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _without(body: str, erased: Erased) -> str | None:
    """The message without what names something erased; None if nothing of it can stay."""
    parsed = _parsed(body)
    if isinstance(parsed, dict | list):
        left = _pruned(parsed, erased)
        if left == parsed:
            return body
        return json.dumps(left) if any(_entries(left)) else None
    named = any(
        any(erased(kind, value) for kind in _KINDS) or _is_tenant(value, body, erased) for value in _values(body)
    )
    return None if named else body


def _is_tenant(value: str, body: str, erased: Erased) -> bool:
    """A tenant's name may be any word: in a text it counts where the text says that it is one."""
    if not value or not erased(receipts.TENANT, value):
        return False
    return re.search(rf"tenant\W{{1,6}}{re.escape(json.dumps(value)[1:-1])}(?!\w)", body) is not None


def _entries(left: Any) -> Iterator[Any]:
    """Yields what a message that was pruned still lists."""
    if isinstance(left, dict):
        yield from (each for each in left.values() if isinstance(each, list | dict) and each)
    elif isinstance(left, list):
        yield from left


def _pruned(value: Any, erased: Erased) -> Any:
    """Lists without their entries, and an object without its fields, that name something erased."""
    if isinstance(value, list):
        return [
            _pruned(each, erased) if isinstance(each, list) else each
            for each in value
            if isinstance(each, list) or not _names(each, erased)
        ]
    return {
        name: _pruned(each, erased) if isinstance(each, list) else each
        for name, each in value.items()
        if isinstance(each, list) or not _names({name: each}, erased)
    }


def _names(value: Any, erased: Erased, kinds: Sequence[str] = _KINDS) -> bool:
    if isinstance(value, str):
        return any(erased(kind, each) for each in _strings(value) for kind in kinds)
    if isinstance(value, list):
        return any(_names(each, erased, kinds) for each in value)
    if isinstance(value, dict):
        if isinstance(tenant := value.get("tenant"), str):
            if tenant and erased(receipts.TENANT, tenant):
                return True
            if erased(receipts.TENANT, _ANY):
                # Another tenant's item: an address that both have is theirs too.
                kinds = (receipts.JOB, receipts.IMAGE)
        return any(_names(name, erased, kinds) or _names(each, erased, kinds) for name, each in value.items())
    return False


def _without_words(text: str, erased: Erased) -> str:
    """A text without the words that name something erased."""

    def blanked(match: re.Match[str]) -> str:
        forms = {match[0], match[0].strip("\"'"), _unescaped(match[0].strip("\"'"))}
        return "…" if any(erased(kind, form) for form in forms for kind in (*_KINDS, receipts.TENANT)) else match[0]

    return _WORDS.sub(blanked, text)
