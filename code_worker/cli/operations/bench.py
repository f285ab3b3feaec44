"""`code-worker bench`: what this machine can judge, what limits it, and how many like it a load takes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import json_option
from code_worker.cli.common.database import quiet_settings
from code_worker.cli.common.image_inputs import Inputs
from code_worker.cli.common.output import print_facts, print_json
from code_worker.cli.common.progress import progress
from code_worker.cli.common.release_runtime import start
from code_worker.errors import ConfigurationError, ImageRejectedError, NoReleaseError

if TYPE_CHECKING:
    from code_worker.cli.common.release_runtime import Ready
    from code_worker.moderation.capacity import Capacity, Rate
    from code_worker.settings import Settings

_MADE: Final = 96
_MOST: Final = 512
_STAGES: Final = 4


@click.command()
@click.argument("directory", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--release", metavar="ID|DIR", help="Release to judge with; unset: the champion, or untrained weights.")
@click.option("--size", default="1280x960", show_default=True, metavar="WxH", help="Of images made for this.")
@click.option("--per-day", type=click.IntRange(min=1), help="Images a day that are to be judged.")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 600), default=3.0, show_default=True, help="Per stage and round."
)
@json_option
def bench(
    *,
    directory: str | None,
    release: str | None,
    size: str,
    per_day: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure this machine: decoding, forward pass, and files to verdicts, on images of DIRECTORY or on made ones.

    Your own images tell most: how long decoding takes depends on their size and format. Stages are measured in
    alternating rounds; the figures are medians with their range. Nothing is written to the database.

    Exit status: 0 measured; 2 wrong use or configuration.
    """
    from code_worker.moderation.capacity import ROUNDS, Bench

    sides = _sides(size)
    with tempfile.TemporaryDirectory(prefix="code-worker-bench-") as scratch:
        images = Path(directory) if directory else _make_images(Path(scratch) / "images", sides)
        settings = Inputs([str(images)], every_file=False).allow(quiet_settings())
        with _started(settings, release, Path(scratch)) as (ready, judged_by):
            files = _readable(ready, settings, images)
            machine = Bench(
                ready.runtime,
                ready.judge,
                ready.policies,
                files=files,
                limits=settings.limits,
                threads=settings.worker.fetch_threads,
            )
            with progress("measuring", _STAGES * ROUNDS) as advance:
                found = machine.run(seconds, advance)
    judged = {"release": judged_by, "images": len(files), "source": directory or f"made, {size} JPEG"}
    facts = {**judged, **_facts(found, settings, per_day)}
    if as_json:
        print_json(facts)
    else:
        print_facts(_for_people(facts))


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 1 <= int(width) <= 16_384 and 1 <= int(height) <= 16_384):
        raise click.BadParameter(f"{size!r} is no size such as 1280x960", param_hint="--size")
    return int(width), int(height)


def _make_images(directory: Path, size: tuple[int, int]) -> Path:
    """Pieces of the photographs that scikit-learn ships, enlarged, no two alike."""
    import numpy as np
    from PIL import Image

    from code_worker.demo.toy_images import Photographs

    directory.mkdir()
    photographs, rng = Photographs(), np.random.default_rng(0)
    for number in range(_MADE):
        out = io.BytesIO()
        Image.fromarray(photographs.crop(rng)).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=88)
        (directory / f"{number:03}.jpg").write_bytes(out.getvalue())
    return directory


@contextmanager
def _started(settings: Settings, release: str | None, scratch: Path) -> Iterator[tuple[Ready, str]]:
    try:
        with start(settings, release) as ready:
            yield ready, ready.runtime.release
    except NoReleaseError:
        if release is not None:
            raise
        with start(settings, str(_untrained(scratch / "release"))) as ready:
            yield ready, "untrained weights of the published size"


def _untrained(directory: Path) -> Path:
    """Speed does not depend on what an encoder learned."""
    import numpy as np

    from code_worker.plugins import load_plugins
    from code_worker.releases.building import build_toy_release

    crops = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), np.uint8)
    plugins = load_plugins(quiet_settings())
    build_toy_release(directory, crops, np.arange(16, dtype=np.int8) % 2, plugins, heads=("linear",))
    return directory


def _readable(ready: Ready, settings: Settings, images: Path) -> Sequence[tuple[str, bytes]]:
    from code_worker.images.decode import inspect

    files = []
    for uri in islice(Inputs([str(images)], every_file=False).uris(ready.sources), _MOST):
        data = ready.sources.fetch(uri).data
        try:
            inspect(data, settings.limits)
        except ImageRejectedError:
            continue
        files.append((uri, data))
    if not files:
        raise ConfigurationError(f"no image that can be judged in {images}")
    return files


def _facts(found: Capacity, settings: Settings, per_day: int | None) -> dict[str, Any]:
    from code_worker.images.region import region_decoder
    from code_worker.moderation.capacity import workers_for

    facts: dict[str, Any] = {
        "device": settings.device,
        "engine": found.engine,
        "precision": settings.precision,
        "region_decoding": region_decoder()[1],
        "decode_one_thread_per_s": _rate(found.decode_one),
        "decode_per_s": _rate(found.decode_all),
        "forward_per_s": _rate(found.forward),
        "end_to_end_per_s": _rate(found.end_to_end),
        "encoder_busy": [round(one, 3) for one in found.busy],
        "limit": found.limit,
        "images_per_day": round(found.end_to_end.median * 86_400),
    }
    if per_day is not None:
        facts |= {"wanted_per_day": per_day, "workers": workers_for(per_day, found.end_to_end.median)}
    return facts


def _rate(rate: Rate) -> dict[str, float]:
    rounds = [round(one, 1) for one in rate.rounds]
    return {"median": round(rate.median, 1), "lowest": min(rounds), "highest": max(rounds)}


def _for_people(facts: Mapping[str, Any]) -> dict[str, Any]:
    rates = {name: value for name, value in facts.items() if isinstance(value, dict)}
    plain = ("release", "images", "source", "device", "engine", "precision", "region_decoding")
    shown = {name.replace("_", " "): facts[name] for name in plain}
    for name, value in rates.items():
        text = f"{value['median']} images/s ({value['lowest']} to {value['highest']})"
        shown[name.removesuffix("_per_s").replace("_", " ")] = text
    busy = sorted(facts["encoder_busy"])
    shown["encoder busy"] = f"{busy[len(busy) // 2]:.0%} of the time from file to verdict"
    shown["limited by"] = facts["limit"]
    shown["images per day"] = f"{facts['images_per_day']:,}"
    if "workers" in facts:
        wanted = f"{facts['wanted_per_day']:,} a day"
        shown["workers"] = f"{facts['workers']} like this one for {wanted}, with 30 % to spare"
    return shown
