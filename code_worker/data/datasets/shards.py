"""WebDataset shards: as D³ is published (`<key>.real.jpg`, `<key>.gen_0.jpg`, `<key>.caption.txt`), and classic ones.

A classic record is an image and its class: `<key>.jpg` with `<key>.cls`, or with a label in `<key>.json`.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from code_worker.data.datasets.examples import (
    FAKE,
    REAL,
    Example,
    Skipped,
    check_hash,
    generator_slug,
    label_of,
    numbered_generator,
)
from code_worker.data.datasets.tars import Member, list_members
from code_worker.errors import DatasetError
from code_worker.images.listing import has_image_suffix, is_hidden, looks_like_image, why_no_image
from code_worker.system.terminal import printable

SHARD_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz")
_IMAGE: Final = re.compile(
    r"(?is)(?P<key>.+)\.(?P<slot>real|fake|(?:image_)?gen_?(?P<number>\d{1,4}))(?P<suffix>\.[a-z0-9]+)?"
)
_TEXT: Final = re.compile(r"(?is)(?P<key>.+?)\.(?P<slot>caption\.txt|url\.txt|json|cls)")
_BRACES: Final = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_TEXTS: Final = frozenset({"caption", "url", "json", "cls"})
_CLASSIC: Final = "image"
"""Slot of an image whose name does not say what it is."""
_TEXT_BYTES: Final = 1 << 20
_MOST_SHARDS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Record:
    """One key of a shard: images by slot (`real`, `fake`, `gen_0`, …) and what is said of them.

    Attributes:
        shard: The tar.
        key: What its members' names begin with.
        images: Slot to member, in the order of the shard.
        caption: The prompt, if there is one.
        url: Where the real image came from, if it is said.
        facts: The record's JSON member; empty if it has none.
    """

    shard: Path
    key: str
    images: Mapping[str, Member]
    caption: str | None = None
    url: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Returns what a person finds it by."""
        return f"{printable(str(self.shard))}:{printable(self.key)}"

    def examples(self) -> Iterator[Example]:
        """Its images; `model_gen*` fields decide what made them, else the published order."""
        for slot, member in self.images.items():
            said = _mapping(_mapping(self.facts.get("images")).get(slot))
            sha256 = _text(said.get("sha256"))
            yield Example(
                key=member.key,
                label=REAL if slot == "real" else FAKE,
                read=_Read(member, sha256),
                generator=None if slot == "real" else self._generator(slot, said),
                collection=_text(said.get("collection")) if said else _collection(self.key, self.shard),
                group=_text(self.facts["group"]) if "group" in self.facts else f"{self.shard.name}/{self.key}",
                variant=_text(self.facts.get("variant")),
                sha256=sha256,
            )

    def _generator(self, slot: str, said: Mapping[str, Any]) -> str | None:
        if "generator" in said:
            return _text(said["generator"])
        if slot == "fake":
            return None
        number = int(slot.removeprefix("gen_"))
        model = _text(self.facts.get(f"model_gen{number}") or self.facts.get(f"model_gen_{number}"))
        return (model and generator_slug(model)) or numbered_generator(number)


@dataclass(frozen=True, slots=True)
class _Read:
    member: Member
    sha256: str | None

    def __call__(self) -> bytes:
        return check_hash(self.member.read(), self.sha256, self.member.key)


@dataclass(slots=True)
class _Draft:
    """Members of one key, as they are met."""

    images: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, Member] = field(default_factory=dict)


def shard_examples(paths: Sequence[Path], *, max_bytes: int, skipped: list[Skipped]) -> Iterator[Example]:
    """Images of the shards, one shard in memory at a time as names and places, none as pixels.

    Only a compressed shard's images are held, each until its example is dropped.

    Args:
        paths: Tars, plain or gzip.
        max_bytes: Larger images are skipped.
        skipped: Takes broken records and what a shard cut short has lost.
    """
    for path in paths:
        for record in read_records(path, max_bytes=max_bytes, skipped=skipped):
            yield from record.examples()


def read_records(path: Path, *, max_bytes: int, skipped: list[Skipped]) -> Iterator[Record]:
    """Records of one shard, in the order in which their keys appear; members of a key need not be neighbours.

    In a compressed shard they must be: it is read in one pass, and a key that comes again is another record.
    """
    drafts: dict[str, _Draft] = {}
    seen: set[tuple[str, str]] = set()
    for member in list_members(path, _refusal, max_bytes=max_bytes, skipped=skipped):
        key, slot = _parse(member.name)
        if (key, slot) in seen:
            skipped.append(Skipped(member.key, f"a second {slot} of its record"))
            continue
        seen.add((key, slot))
        # Of a compressed shard every member is held in memory: the records before a new key are let go of.
        if member.held is not None and key not in drafts:
            yield from _finished(path, drafts, skipped)
            drafts.clear()
        draft = drafts.setdefault(key, _Draft())
        (draft.texts if slot in _TEXTS else draft.images)[slot] = member
    yield from _finished(path, drafts, skipped)


def _refusal(name: str, first: Callable[[], bytes]) -> str | None:
    """Returns why a member is none of a record; images are told as in directories."""
    if any(map(is_hidden, PurePosixPath(name).parts)):
        return "hidden"
    is_text = _IMAGE.fullmatch(name) is None and _TEXT.fullmatch(name) is not None
    if is_text or has_image_suffix(name) or looks_like_image(prefix := first()):
        return None
    return why_no_image(prefix)


def _parse(name: str) -> tuple[str, str]:
    if match := _IMAGE.fullmatch(name):
        return match["key"], match["slot"].lower() if match["number"] is None else f"gen_{int(match['number'])}"
    if text := _TEXT.fullmatch(name):
        return text["key"], text["slot"].lower().removesuffix(".txt")
    directory, slash, base = name.rpartition("/")
    return f"{directory}{slash}{base.rpartition('.')[0] or base}", _CLASSIC


def _finished(path: Path, drafts: Mapping[str, _Draft], skipped: list[Skipped]) -> Iterator[Record]:
    for key, draft in drafts.items():
        name = f"{printable(str(path))}:{printable(key)}"
        try:
            texts = {slot: _decoded(member) for slot, member in draft.texts.items()}
            facts = _facts(texts.get("json"))
        except (DatasetError, ValueError, RecursionError) as error:
            skipped.append(Skipped(name, f"its texts cannot be read: {error}"))
            continue
        if _CLASSIC in draft.images and len(draft.images) > 1:
            odd = draft.images.pop(_CLASSIC)
            skipped.append(Skipped(odd.key, "its name says neither real nor fake, as others of its record do"))
        try:
            images = _labelled(draft.images, texts.get("cls"), facts)
        except ValueError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        yield Record(path, key, images, texts.get("caption"), texts.get("url"), facts)


def _labelled(images: Mapping[str, Member], label: str | None, facts: Mapping[str, Any]) -> Mapping[str, Member]:
    """Images by slots that say what they are; an only one that does not is labelled by the record's class."""
    if not images:
        raise ValueError("a record without an image")
    if _CLASSIC not in images:
        return images
    said = facts.get("label") if label is None else label
    if said is None:
        raise ValueError(
            "nothing says what it is: no real, fake or gen_N in its name, no .cls, no label in its .json"
        )
    return {"fake" if label_of(said) == FAKE else "real": images[_CLASSIC]}


def _decoded(member: Member) -> str:
    if member.size > _TEXT_BYTES:
        raise DatasetError(f"{member.key} is over {_TEXT_BYTES} bytes")
    return member.read().decode("utf-8", "replace").strip()


def _facts(text: str | None) -> Mapping[str, Any]:
    facts = {} if text is None else json.loads(text)
    if not isinstance(facts, dict):
        raise DatasetError("its JSON is no object")
    return facts


def _collection(key: str, shard: Path) -> str:
    """`elsa_v2` of `elsa_v2__train__1275001022128`, else the shard's name without its number."""
    prefix, mark, _ = PurePosixPath(key).name.partition("__")
    stem = shard.name.partition(".")[0]
    return printable(prefix) if mark and prefix else printable(stem.rstrip("0123456789").rstrip("-_") or stem)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def expand(pattern: str) -> list[Path]:
    """Shards that a name stands for: `shard-{0000..0011}.tar`, `{train,val}.tar`, `*.tar`, or one file.

    What a brace names must not exist to be listed; what a `*` stands for is sorted.

    Raises:
        DatasetError: more names than any data set has shards.
    """
    names = [""]
    end = 0
    for match in _BRACES.finditer(pattern):
        names = _times(names, [pattern[end : match.start()] + choice for choice in _choices(match)], pattern)
        end = match.end()
    names = [name + pattern[end:] for name in names]
    found = [[Path(name)] if Path(name).exists() else _globbed(name) for name in names]
    return list(itertools.chain.from_iterable(found))


def _choices(match: re.Match[str]) -> Sequence[str]:
    if match[3] is not None:
        return match[3].split(",")
    # Counted before they are made, unlike in braceexpand, which has no limit: a typo must not fill the memory.
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= _MOST_SHARDS:
        raise DatasetError(f"{match[0]} names over {_MOST_SHARDS} shards")
    step = 1 if first <= last else -1
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + step, step)]


def _times(names: Sequence[str], parts: Sequence[str], pattern: str) -> list[str]:
    if len(names) * len(parts) > _MOST_SHARDS:
        raise DatasetError(f"{pattern} names over {_MOST_SHARDS} shards")
    return [name + part for name in names for part in parts]


def _globbed(name: str) -> list[Path]:
    if not glob.has_magic(name):
        return [Path(name)]
    return sorted(Path(found) for found in glob.glob(name))  # noqa: PTH207 - the pattern may be absolute
