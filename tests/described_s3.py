"""Has botocore read its description of S3 once for a process and its copies, not for each client: 0.1 s."""

from __future__ import annotations

from functools import cache

import boto3
import botocore.session
from botocore.loaders import create_loader

botocore.session.create_loader = cache(create_loader)
boto3.session.Session(aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1").client("s3").close()
