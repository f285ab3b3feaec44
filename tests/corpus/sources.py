"""Places that an image might be asked for from, most of which nobody may be sent to."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path
from urllib.parse import quote

from tests.image_files import encoded, pixels

LONGEST_KEY = "k" * 1020 + ".jpg"
FOREIGN_KEY = "ünï/图 #%41?.jpg"


def prepare(directory: Path) -> Path:
    """Makes the allowed root, an image and all that is no file in it, and a secret beside it; returns the root."""
    root = directory / "allowed"
    (root / "directory").mkdir(parents=True)
    picture = encoded(pixels(230, 230), "JPEG")
    (root / "a.jpg").write_bytes(picture)
    (directory / "secret.jpg").write_bytes(picture)
    (root / "link_inside.jpg").symlink_to("a.jpg")
    (root / "link_outside.jpg").symlink_to(directory / "secret.jpg")
    (root / "link_up").symlink_to(directory)
    (root / "link_loop.jpg").symlink_to("link_loop.jpg")
    (root / "link_device.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(root)  # a socket's path is short
        try:
            listener.bind("socket.jpg")
        finally:
            os.chdir(here)
    return root


def sources(root: Path, bucket: str, web: str) -> dict[str, str]:
    """Name → URI; `web` is host and port of a server that keeps account of who comes."""
    port = web.rpartition(":")[2]
    return _of_s3(bucket) | _of_files(root) | {
        "http_metadata_service": "http://169.254.169.254/latest/meta-data/iam",
        "http_loopback": f"http://{web}/a.jpg",
        "https_loopback": f"https://{web}/a.jpg",
        "http_ipv6": f"http://[::1]:{port}/a.jpg",
        "http_decimal_address": f"http://2130706433:{port}/a.jpg",
        "http_octal_address": f"http://0177.0.0.1:{port}/a.jpg",
        "http_user_part": f"http://good.example@127.0.0.1:{port}/#@good.example/a.jpg",
        "http_redirect": f"http://{web}/redirect?to=http://10.0.0.1/",
        "http_name_that_turns": f"http://localhost:{port}/a.jpg",
        "gopher": f"gopher://{web}/_GET%20/",
        "ftp": f"ftp://{web}/a.jpg",
        "jar": f"jar:http://{web}/a.zip!/a.jpg",
        "javascript": "javascript:alert(1)",
        "data_30_megabytes": "data:image/png;base64," + base64.b64encode(bytes(22_500_000)).decode(),
        "upper_case_s3": f"S3://{bucket}/a.jpg",
    }  # fmt: skip


def _of_s3(bucket: str) -> dict[str, str]:
    return {
        "s3_good": f"s3://{bucket}/a.jpg",
        "s3_foreign_key": f"s3://{bucket}/{FOREIGN_KEY}",
        "s3_longest_key": f"s3://{bucket}/{LONGEST_KEY}",
        "s3_missing_key": f"s3://{bucket}/missing.jpg",
        "s3_missing_version": f"s3://{bucket}/a.jpg?versionId=nosuchversion",
        "s3_missing_bucket": "s3://bucket-that-was-deleted/a.jpg",
        "s3_other_bucket": "s3://other-bucket/a.jpg",
        "s3_up": f"s3://{bucket}/../x",
        "s3_up_inside": f"s3://{bucket}/a/../../x",
        "s3_key_with_line_break": f"s3://{bucket}/a\nb.jpg",
        "s3_key_too_long": f"s3://{bucket}/{'k' * 1025}",
        "s3_without_key": f"s3://{bucket}/",
        "s3_without_bucket": "s3:///a.jpg",
        "s3_half_a_surrogate": f"s3://{bucket}/\ud800.jpg",
    }


def _of_files(root: Path) -> dict[str, str]:
    return {
        "file_good": str(root / "a.jpg"),
        "file_uri": (root / "a.jpg").as_uri(),
        "file_link_inside": str(root / "link_inside.jpg"),
        "file_missing": str(root / "missing.jpg"),
        "file_name_too_long": str(root / ("n" * 300)),
        "file_below_a_file": str(root / "a.jpg" / "b"),
        "file_passwords": "file:///etc/passwd",
        "file_relative_up": "file://../../etc/passwd",
        "file_up": f"file://{root}/../secret.jpg",
        "file_up_encoded": f"file://{quote(str(root))}/%2e%2e/secret.jpg",
        "file_nul": f"file://{root}/a.jpg%00.png",
        "file_other_host": f"file://evil.example{root}/a.jpg",
        "file_link_outside": str(root / "link_outside.jpg"),
        "file_link_up": str(root / "link_up" / "secret.jpg"),
        "file_link_loop": str(root / "link_loop.jpg"),
        "file_link_to_device": str(root / "link_device.jpg"),
        "file_pipe": str(root / "pipe.jpg"),
        "file_socket": str(root / "socket.jpg"),
        "file_directory": str(root / "directory"),
        "file_device": "/dev/zero",
        "file_memory": "/proc/self/mem",
        "file_empty_name": "",
    }
