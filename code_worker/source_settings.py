"""The sections of the settings on where images come from and what one may cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr, field_validator

from code_worker.addresses import endpoint_address
from code_worker.machine import decode_memory
from code_worker.training_settings import DAY_S, Section

__all__ = ["FileSettings", "LimitSettings", "S3Settings"]

_BUCKET: Final = re.compile(r"[A-Za-z0-9._\-]{1,255}|arn:[^/]+")
"""What botocore accepts: AWS allows fewer names, older buckets and other servers more; ARNs are of access points."""


class S3Settings(Section):
    """Where `s3://` objects come from and how long one may take."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; unset means AWS.")
    region: str | None = Field(None, description="Region; unset leaves it to the AWS configuration chain.")
    access_key_id: SecretStr | None = Field(None, description="Access key; unset leaves it to the AWS chain.")
    secret_access_key: SecretStr | None = Field(None, description="Secret key that goes with `access_key_id`.")
    buckets: tuple[str, ...] = Field(
        (), description="Buckets (or `bucket/prefix`) that may be read. Empty means none: nothing is read from S3."
    )
    path_style: bool = Field(False, description="Put the bucket in the path; most S3-compatible servers need it.")
    connect_timeout_s: float = Field(3.0, gt=0, le=DAY_S, description="Limit for opening a connection.")
    read_timeout_s: float = Field(5.0, gt=0, le=DAY_S, description="Limit between two chunks of a body.")
    object_timeout_s: float = Field(
        30.0, gt=0, le=DAY_S, description="Wall-clock limit for one object, retries included."
    )
    max_attempts: int = Field(4, ge=1, le=100, description="Tries of one request (botocore's standard mode).")
    body_attempts: int = Field(
        3, ge=1, le=100, description="Tries of a body that was cut short; botocore never retries one."
    )
    checksum_mode: bool = Field(
        True,
        description="Send checksums of what is written and verify those of what is read. Backblaze B2, Cloudflare R2 "
        "and other servers that refuse these headers need `false`.",
    )
    anonymous: tuple[str, ...] = Field(
        (), description="Buckets that are public: requests to them are not signed. They must be in `buckets` too."
    )
    requester_pays: tuple[str, ...] = Field(
        (), description="Buckets whose owner has whoever reads pay, which every request to them then agrees to."
    )

    @field_validator("buckets", "anonymous", "requester_pays")
    @classmethod
    def _read_buckets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(name.removeprefix("s3://") for name in names)
        if any("://" in name for name in found):
            raise ValueError("write the name of the bucket and no address, such as uploads or s3://uploads")
        if not all(_BUCKET.fullmatch(name.partition("/")[0]) for name in found):
            raise ValueError("a bucket's name has only letters, digits and . - _, such as uploads")
        return found

    @field_validator("endpoint_url")
    @classmethod
    def _read_endpoint(cls, url: str | None) -> str | None:
        return None if url is None else endpoint_address(url)


class FileSettings(Section):
    """Which local files may be read."""

    roots: tuple[Path, ...] = Field(
        (), description="Directories under which `file://` and paths may be read. Empty means none."
    )


class LimitSettings(Section):
    """What an image may cost before it is refused."""

    max_bytes: int = Field(50 * 2**20, gt=0, le=2**34, description="Largest file, enforced while it streams in.")
    max_pixels: int = Field(50_000_000, gt=0, le=2**40, description="Largest width x height, read from the header.")
    max_side: int = Field(16_384, gt=0, le=2**31 - 1, description="Longest side, read from the header.")
    min_side: int = Field(1, ge=1, le=2**31 - 1, description="Shortest side that is judged.")
    max_decode_bytes: int = Field(
        default_factory=decode_memory,
        gt=0,
        le=2**44,
        description="Memory that one process decodes in, told from headers: large images wait for each other, and "
        "one that takes more is refused. Unset: 280000000, enough for 50 million pixels in most files, 23 million of "
        "a WebP; in a container that may have less than four times as much, a quarter of its memory.",
    )
