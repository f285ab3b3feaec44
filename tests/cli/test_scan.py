from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from code_worker.encoder.weights import random_weights
from code_worker.images.listing import NO_IMAGE, UNJUDGED
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings
from code_worker.store.engine import Store
from code_worker.testing import sample_embeddings
from tests.cli.conftest import Cli
from tests.servers import S3Server
from tests.toy_release import toy_crops, write_toy_release

FIRST_FIELDS = ["uri", "sha256", "outcome", "label", "score", "reason", "head", "release"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six images that the toy release tells apart, a broken one between them, and a file that is no image."""
    directory = tmp_path / "pictures"
    (directory / "deeper").mkdir(parents=True)
    for number, crop in enumerate(toy_crops(6, seed=7)[0]):
        place = directory / "deeper" if number > 3 else directory
        Image.fromarray(crop).save(place / f"{number}.png")
    (directory / "1-broken.jpg").write_bytes(b"no image at all")
    (directory / "notes.txt").write_text("not looked at")
    return directory


@pytest.fixture(scope="module")
def shallow_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block deep: what is tested here is not how long an encoder takes."""
    return write_toy_release(tmp_path_factory.mktemp("shallow") / "release", depth=1)


@pytest.fixture
def scan(bare_cli: Cli, shallow_release: Path) -> Cli:
    """A command line without broker and database, and a release's directory in `TOY`."""
    bare_cli.env["TOY"] = str(shallow_release)
    return bare_cli


def test_a_file_uri_is_scanned_as_the_path_is(scan: Cli, pictures: Path, tmp_path: Path) -> None:
    (odd := tmp_path / "a b%").symlink_to(pictures)
    words = ("--release", scan.env["TOY"], "--json")
    judged = [(record["label"], record["score"]) for record in scan("scan", str(pictures), *words).records]
    for address in (f"{pictures.as_uri()}/", pictures.as_uri(), f"file://localhost{pictures}", f"{odd.as_uri()}/"):
        ran = scan("scan", address, *words)
        assert [(record["label"], record["score"]) for record in ran.records] == judged, ran.stderr
        assert "notes.txt" in ran.stderr
    (one,) = scan("scan", (pictures / "0.png").as_uri(), *words).records
    assert (one["label"], one["score"]) == judged[0]
    named_badly = scan("scan", "file:///caf\udce9.png", *words)
    assert (named_badly.status, "Traceback" in named_badly.stderr) == (1, False)
    elsewhere = scan("scan", "file://elsewhere/x/", *words)
    assert "must name this host" in elsewhere.stdout + elsewhere.stderr


def test_a_directory_is_judged_in_order_without_any_database(scan: Cli, pictures: Path, tmp_path: Path) -> None:
    ran = scan("scan", str(pictures), "--release", scan.env["TOY"], "--json")
    assert ran.status == 1
    assert list(ran.records[0])[: len(FIRST_FIELDS)] == FIRST_FIELDS
    names = [Path(record["uri"]).relative_to(pictures).as_posix() for record in ran.records]
    assert names == ["0.png", "1-broken.jpg", "1.png", "2.png", "3.png", "deeper/4.png", "deeper/5.png"]
    labels = {name: record["label"] for name, record in zip(names, ran.records, strict=True)}
    assert {name: label for name, label in labels.items() if label} == {
        name: "fake" if int(Path(name).stem) % 2 else "real" for name in names if name != "1-broken.jpg"
    }
    (broken,) = (record for record in ran.records if record["outcome"] == "rejected")
    assert broken["reason"] == "unsupported_format"
    assert "7 images" in ran.stderr
    assert f"1 other file passed over (--all-files judges them): {NO_IMAGE}: {pictures}/notes.txt" in ran.stderr
    assert not (tmp_path / "data").exists()


def test_a_scan_and_a_data_set_take_the_same_files_for_images(scan: Cli, pictures: Path) -> None:
    tree = pictures / "real"
    tree.mkdir()
    image = (pictures / "0.png").read_bytes()
    for name in ("a", "b.img", "c.JPG", "d.txt", "e.jfif", "._c.JPG", ".hidden.png"):
        (tree / name).write_bytes(image)
    for name in ("notes.txt", "Thumbs.db", "empty"):
        (tree / name).write_bytes(b"" if name == "empty" else b"these are no pixels at all")
    (tree / "linked").symlink_to(pictures / "deeper")
    judged = scan("scan", str(tree), "--release", scan.env["TOY"], "--json")
    (counted,) = scan("data", "show", str(tree), "--json").records
    assert [Path(record["uri"]).name for record in judged.records] == ["a", "b.img", "c.JPG", "d.txt", "e.jfif"]
    assert (judged.status, counted["images"]) == (0, 5)
    left_out = {one["reason"]: (one["files"], one["some"]) for one in counted["passed_over"]}
    assert left_out == {"hidden": (2, ["._c.JPG", ".hidden.png"]), NO_IMAGE: (3, ["Thumbs.db", "empty", "notes.txt"])}
    assert f"3 other files passed over (--all-files judges them): {NO_IMAGE}: {tree}/Thumbs.db, " in judged.stderr
    assert "2 other files passed over (--all-files judges them): hidden: " in judged.stderr
    assert f"{tree}/linked: a link to a directory, which is not followed" in judged.stderr
    assert [one["key"] for one in counted["skipped"]] == [str(tree / "linked")]


def test_an_image_of_a_format_that_is_not_judged_is_rejected_and_a_data_set_says_so(
    scan: Cli, tmp_path: Path
) -> None:
    tree = tmp_path / "real"
    tree.mkdir()
    image = Image.fromarray(toy_crops(1, seed=7)[0][0])
    image.save(tree / "0.png")
    for form, name in (("JPEG2000", "1.jp2"), ("ICO", "2.ico"), ("PPM", "3.ppm"), ("QOI", "4.img"), ("DDS", "5.jpg")):
        image.save(tree / name, form)
    # As libavif and a telephone write them; Pillow need not be built with either.
    (tree / "6.avif").write_bytes(b"\0\0\0 ftypavif\0\0\0\0avifmif1")
    (tree / "7.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tree / "P6.txt").write_text("P6 is no header, nor is P1 2nd.")
    judged = scan("scan", str(tree), "--release", scan.env["TOY"], "--json")
    said = {Path(one["uri"]).name: (one["reason"], one["detail"]) for one in judged.records if one["reason"]}
    names = {"1.jp2": "jpeg 2000", "2.ico": "ico", "3.ppm": "pnm", "4.img": "qoi", "5.jpg": "dds", "6.avif": "avif"}
    names["7.heic"] = "heif"
    reason = "unsupported_format"
    assert said == {
        name: (reason, f"an image of a format that is not judged: {kind}") for name, kind in names.items()
    }
    assert judged.status == 1
    assert f"1 other file passed over (--all-files judges them): {NO_IMAGE}: {tree}/P6.txt" in judged.stderr
    (counted,) = scan("data", "show", str(tree), "--json").records
    left_out = {one["reason"]: one["some"] for one in counted["passed_over"]}
    assert left_out.pop(NO_IMAGE) == ["P6.txt"]
    assert left_out == {UNJUDGED.format(kind): [name] for name, kind in names.items() if name != "5.jpg"}


def test_every_form_of_output_says_the_same(scan: Cli, pictures: Path) -> None:
    ask = ("scan", str(pictures), "--release", scan.env["TOY"], "--head", "knn")
    lines = scan(*ask, "--json").records
    rows = list(csv.DictReader(io.StringIO(scan(*ask, "--csv").stdout)))
    assert list(rows[0]) == list(lines[0])
    assert [(row["uri"], row["label"], row["head"]) for row in rows] == [
        (line["uri"], line["label"] or "", line["head"] or "") for line in lines
    ]
    table = scan(*ask).stdout.splitlines()[1:]
    assert [row.split()[0] for row in table] == [line["label"] or line["reason"] for line in lines]
    assert all(line["uri"] in row for row, line in zip(table, lines, strict=True))


def test_a_name_that_is_no_text_is_judged_and_printed_as_a_uri(scan: Cli, pictures: Path) -> None:
    name = os.fsdecode(os.fsencode(pictures) + b"/\xff.png")
    (pictures / "0.png").rename(name)
    for place in (name, str(pictures)):
        ran = scan("scan", place, "--release", scan.env["TOY"], "--json")
        assert f"{pictures.as_uri()}/%FF.png" in [record["uri"] for record in ran.records]


def test_status_0_means_that_all_were_judged(scan: Cli, pictures: Path) -> None:
    ran = scan("scan", str(pictures / "0.png"), str(pictures / "1.png"), "--release", scan.env["TOY"])
    assert ran.status == 0


def test_a_link_on_the_command_line_is_followed_and_one_in_a_directory_is_not(
    scan: Cli, pictures: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.png"
    (pictures / "0.png").rename(outside)
    (pictures / "link.png").symlink_to(outside)
    named = scan("scan", str(pictures / "link.png"), "--release", scan.env["TOY"], "--json")
    assert named.records[0]["outcome"] == "judged"
    found = scan("scan", str(pictures), "--release", scan.env["TOY"], "--json").records
    assert {Path(record["uri"]).name: record["reason"] for record in found}["link.png"] == "source_not_allowed"


def test_what_cannot_be_fetched_is_rejected_on_its_own(scan: Cli, pictures: Path) -> None:
    good = str(pictures / "0.png")
    ran = scan(
        "scan", "missing.png", "s3://private/a.png", "https://x/y.png", good, "--release", scan.env["TOY"], "--json"
    )
    assert [record["reason"] for record in ran.records] == [
        "not_found",
        "source_not_allowed",
        "source_not_allowed",
        None,
    ]


def test_an_s3_prefix_is_listed_and_judged(scan: Cli, pictures: Path, s3_server: S3Server) -> None:
    with closing(s3_server.client()) as s3:
        s3.create_bucket(Bucket="cli-scan")
        for path in (pictures / "0.png", pictures / "1.png"):
            s3.put_object(Bucket="cli-scan", Key=f"in/{path.name}", Body=path.read_bytes())
    env = {**s3_server.environment, "CODE_WORKER_S3__BUCKETS": '["cli-scan"]'}
    ran = scan("scan", "s3://cli-scan/in/", "--release", scan.env["TOY"], "--json", env=env)
    assert [(record["uri"], record["label"]) for record in ran.records] == [
        ("s3://cli-scan/in/0.png", "real"),
        ("s3://cli-scan/in/1.png", "fake"),
    ]


def test_a_source_that_stays_away_ends_as_a_rejection_that_says_so(scan: Cli, pictures: Path) -> None:
    env = {
        "CODE_WORKER_S3__ENDPOINT_URL": "http://127.0.0.1:9",
        "CODE_WORKER_S3__BUCKETS": '["away"]',
        "CODE_WORKER_S3__ACCESS_KEY_ID": "a",
        "CODE_WORKER_S3__SECRET_ACCESS_KEY": "b",
        "CODE_WORKER_S3__MAX_ATTEMPTS": "1",
    }
    good = str(pictures / "0.png")
    ran = scan("scan", "s3://away/a.png", good, "--release", scan.env["TOY"], "--json", env=env)
    assert [record["reason"] for record in ran.records] == ["fetch_failed", None]
    assert "another try may succeed" in ran.records[0]["detail"]


def test_an_unknown_head_is_refused_before_any_image(scan: Cli, pictures: Path) -> None:
    ran = scan("scan", str(pictures), "--release", scan.env["TOY"], "--head", "crystal-ball")
    assert (ran.status, ran.stdout) == (2, "")
    assert "unknown head 'crystal-ball'; known: knn, linear, svm" in ran.stderr


def test_without_a_release_the_way_to_one_is_named(cli: Cli, pictures: Path) -> None:
    ran = cli("scan", str(pictures))
    assert (ran.status, ran.stdout) == (2, "")
    assert "code-worker releases import hf:aimagelab/CoDE --promote" in ran.stderr


def test_without_anything_the_way_to_a_release_is_named_too(bare_cli: Cli, pictures: Path) -> None:
    for ran in (bare_cli("scan", str(pictures)), bare_cli("scan", str(pictures), "--release", "r-nowhere")):
        assert (ran.status, ran.stdout) == (2, "")
        assert "code-worker releases import" in ran.stderr


def test_the_champion_judges_unless_another_release_is_named(
    sqlite_cli: Cli, sqlite_store: Store, shallow_release: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))
    release = registry.add(shallow_release)
    registry.promote(release, by="test")
    image = str(pictures / "0.png")
    assert sqlite_cli("scan", image, "--json").records[0]["release"] == release
    assert sqlite_cli("scan", image, "--json", "--release", release).records[0]["release"] == release
    assert sqlite_cli("scan", image, "--release", "r-000000000000").status == 2


@pytest.mark.parametrize("arguments", [(), ("a.png", "--json", "--csv")])
def test_wrong_use_ends_with_status_2(bare_cli: Cli, arguments: tuple[str, ...]) -> None:
    assert bare_cli("scan", *arguments).status == 2


PLUGIN = """
from code_worker import HeadSpec, hookimpl
from code_worker_heads.linear import LinearHead

class Mine(LinearHead):
    def score(self, embeddings):
        return super().score(embeddings) * {factor}

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("mine", Mine)]
"""


def _damage(release: Path, _plugin: Path) -> None:
    with next(release.glob("heads/mine/*.json")).open("ab") as file:
        file.write(b" ")


def _unsigned(_release: Path, _plugin: Path) -> None:
    """The setting asks for a signature, and there is none."""


@pytest.mark.parametrize(
    ("spoil", "env", "said"),
    [
        (lambda _, plugin: plugin.unlink(), {}, "needs the plugin head 'mine'"),
        (lambda _, plugin: plugin.write_text(PLUGIN.format(factor=0.5)), {}, "does not score as it did"),
        (lambda _, plugin: plugin.write_text(PLUGIN.format(factor="nothing")), {}, "cannot score"),
        (lambda _, plugin: plugin.write_text("from code_worker import hookimpl\n1 / 0"), {}, "ZeroDivisionError"),
        (_damage, {}, "changed: heads/mine/"),
        (_unsigned, {"CODE_WORKER_SIGNING_KEYS": "k" * 32}, "sign"),
        (lambda release, _: (release / "manifest.json").unlink(), {}, "manifest.json"),
    ],
    ids=["missing", "changed", "failing", "broken", "damaged", "unsigned", "no release"],
)
def test_a_release_that_cannot_be_loaded_here_is_status_2_whatever_the_reason(
    scan: Cli, pictures: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], env: dict[str, str], said: str
) -> None:
    plugin = tmp_path / "plugins" / "mine.py"
    plugin.parent.mkdir()
    plugin.write_text(PLUGIN.format(factor=1))
    plugins = load_plugins(Settings(plugins_dir=plugin.parent))
    embeddings, labels = sample_embeddings(64)
    head = plugins.head_class("mine")().fit(embeddings, labels)
    facts = ReleaseFacts(source=Source(uri="test"), toy=True)
    build_from_parts(tmp_path / "release", random_weights(0, depth=1), {"mine": head}, plugins, facts)
    spoil(tmp_path / "release", plugin)
    env = {"CODE_WORKER_PLUGINS_DIR": str(plugin.parent), **env}
    ran = scan("scan", str(pictures), "--release", str(tmp_path / "release"), env=env)
    assert (ran.status, ran.stdout) == (2, "")
    (line,) = (line for line in ran.stderr.splitlines() if line.startswith("code-worker: "))
    assert said in line


def test_a_storage_of_releases_that_is_away_is_status_1(
    sqlite_cli: Cli, sqlite_store: Store, shallow_release: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))
    registry.promote(registry.add(shallow_release), by="test", reason="test")
    away = {
        "CODE_WORKER_ARTIFACTS": "s3://bucket/releases",
        "CODE_WORKER_S3__ENDPOINT_URL": "http://127.0.0.1:1",
        "CODE_WORKER_S3__MAX_ATTEMPTS": "1",
        "CODE_WORKER_S3__ACCESS_KEY_ID": "none",
        "CODE_WORKER_S3__SECRET_ACCESS_KEY": "none",
    }
    ran = sqlite_cli("scan", str(pictures), env=away)
    assert (ran.status, ran.stdout) == (1, "")
    assert "cannot read release" in ran.stderr
