"""`code-worker data`: look into labelled data sets, and pack them into shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from code_worker.cli.common.arguments import json_option
from code_worker.cli.common.database import quiet_settings
from code_worker.cli.common.output import plural, print_json, print_table
from code_worker.cli.common.progress import progress
from code_worker.cli.common.release_runtime import list_skipped
from code_worker.data.datasets.examples import losses, passed_over
from code_worker.errors import DatasetError, ImageRejectedError, SourceCredentialsError, StorageError, TransientError

if TYPE_CHECKING:
    from code_worker.data.datasets.examples import Example, Skipped
    from code_worker.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
_KINDS: Final = ("label", "generator", "collection", "variant")


@click.group()
def data() -> None:
    """Look into labelled data sets, and pack them.

    \b
    SOURCE is one of
      labels:                           the labelled store
      holdout:                          its part that is never learned from
      hf:owner/name[@revision][:split]  a data set of the hub in the form of elsaEU/ELSA_D3
      DIR, s3://bucket/prefix/          directories named real and fake, 0_real and 1_fake, or gen_0 to gen_3
      shard-{0000..0011}.tar, DIR       WebDataset shards in the published form, or jpg and cls
      *.parquet, DIR                    the hub's parquet files
      FILE.jsonl, FILE.csv              a manifest: label, and one of uri, path, sha256

    Exit status: 0 done, also when records were skipped (they are listed); 1 nothing usable; 2 wrong use.
    """  # noqa: D301 - click's mark for lines that stay as they are


def _source(command: F) -> F:
    """Options of both commands."""
    options = (
        click.argument("source"),
        click.option("--limit", type=click.IntRange(1), help="At most so many images."),
        click.option(
            "--real-urls",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Fetch at most so many real images that a hub data set only names by URL.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@data.command()
@_source
@click.option("--check", is_flag=True, help="Read and decode every image as well.")
@json_option
def show(source: str, *, limit: int | None, real_urls: int, check: bool, as_json: bool) -> None:
    """Count the images of SOURCE by label, generator, collection and variant; list what is broken.

    Without --check only names are read, so broken images are not noticed.
    """
    settings = quiet_settings()
    with _skipped_listed(as_json=as_json) as skipped, progress(f"reading {source}", counted=True) as advance:
        examples = _open(source, settings, skipped, limit=limit, real_urls=real_urls)
        if check:
            examples = _checked(examples, settings, skipped)
        counts: Counter[tuple[str | None, ...]] = Counter()
        for example in examples:
            counts["fake" if example.label else "real", example.generator, example.collection, example.variant] += 1
            advance(1)
    if not counts:
        raise DatasetError(f"{source} holds no usable image ({len(losses(skipped))} skipped)")
    _say_counts(source, counts, skipped, as_json=as_json)


def _say_counts(
    source: str, counts: Counter[tuple[str | None, ...]], skipped: Iterable[Skipped], *, as_json: bool
) -> None:
    ordered = sorted(counts.items(), key=lambda item: [(name is not None, name or "") for name in item[0]])
    rows: list[dict[str, Any]] = [
        {**dict(zip(_KINDS, kind, strict=True)), "images": number} for kind, number in ordered
    ]
    if as_json:
        left_out = {"skipped": losses(skipped), "passed_over": passed_over(skipped)}
        print_json({"source": source, "images": counts.total(), "kinds": rows, **left_out})
        return
    print_table(rows, (*_KINDS, "images"), empty="")
    by_label = {label: sum(row["images"] for row in rows if row["label"] == label) for label in ("real", "fake")}
    click.echo(f"{plural(counts.total(), 'image')}: {by_label['real']} real, {by_label['fake']} fake")


@data.command()
@click.argument("source")
@json_option
def pin(source: str, *, as_json: bool) -> None:
    """Print the hash that pins SOURCE as the golden set (CODE_WORKER_GATE__GOLDEN_SHA256).

    It is of the bytes and labels of all images, wherever they lie; a set of which an image cannot be read has none.
    """
    from code_worker.training.gate.safeguards import read_golden

    with progress(f"hashing {source}"):
        golden = read_golden(source, quiet_settings())
    if as_json:
        print_json({"source": source, "images": len(golden.examples), "sha256": golden.digest})
    else:
        click.echo(golden.digest)


@data.command()
@_source
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to make; it appears whole.")
@click.option("--shard-mb", type=click.IntRange(1), default=512, show_default=True, help="Largest shard.")
@json_option
def pack(source: str, *, limit: int | None, real_urls: int, out: Path, shard_mb: int, as_json: bool) -> None:
    """Write SOURCE as WebDataset shards in the published form, which every command reads as a SOURCE.

    A real image and its generated siblings become one record. A JSON member says what each image is and its hash.
    The same data set gives the same bytes.
    """
    from code_worker.data.datasets.open import siblings_are_neighbours
    from code_worker.data.datasets.pack import bring_together
    from code_worker.data.datasets.pack import pack as write

    settings = quiet_settings()
    with _skipped_listed(as_json=as_json) as skipped, progress(f"packing {source}", counted=True) as advance:
        examples = _open(source, settings, skipped, limit=limit, real_urls=real_urls)
        packed = write(
            examples if siblings_are_neighbours(source) else bring_together(examples),
            out,
            limits=settings.limits,
            skipped=skipped,
            shard_bytes=shard_mb << 20,
            on_image=advance,
        )
    if as_json:
        left_out = {"skipped": losses(skipped), "passed_over": passed_over(skipped)}
        facts = {"images": packed.images, "records": packed.records, "size_bytes": packed.size_bytes}
        print_json({"out": out, **facts, "shards": list(map(str, packed.shards)), **left_out})
        return
    click.echo(
        f"packed {plural(packed.images, 'image')} in {plural(packed.records, 'record')} into "
        f"{plural(len(packed.shards), 'shard')} ({plural(packed.size_bytes, 'byte')}) in {out}"
    )


def _open(
    source: str, settings: Settings, skipped: list[Skipped], *, limit: int | None, real_urls: int
) -> Iterator[Example]:
    from code_worker.data.datasets.open import open_examples

    return open_examples(source, settings=settings, skipped=skipped, limit=limit, real_urls=real_urls)


def _checked(examples: Iterable[Example], settings: Settings, skipped: list[Skipped]) -> Iterator[Example]:
    """Only those whose pixels can be read."""
    from code_worker.data.datasets.examples import Skipped
    from code_worker.images.decode import decode_crop

    for example in examples:
        try:
            decode_crop(example.read(), settings.limits)
        except (StorageError, SourceCredentialsError):
            raise
        except (DatasetError, ImageRejectedError, TransientError) as error:
            skipped.append(Skipped(example.key, str(error)))
        else:
            yield example


@contextmanager
def _skipped_listed(*, as_json: bool) -> Iterator[list[Skipped]]:
    """A list whose entries are printed on stderr at the end, whether or not anything else was usable."""
    skipped: list[Skipped] = []
    failed = True
    try:
        yield skipped
        failed = False
    finally:
        if not as_json or failed:
            list_skipped(skipped)
