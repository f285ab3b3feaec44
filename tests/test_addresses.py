"""URLs of servers: one reading for every client, or a refusal that quotes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from kombu import Connection
from redbeat.schedulers import get_redis
from redis import Redis
from sqlalchemy import make_url

from code_worker.doctor import examine
from code_worker.doctor.check import Status
from code_worker.errors import ConfigurationError
from code_worker.publisher import Publisher
from code_worker.settings import Settings, load_settings
from code_worker.settings.addresses import broker_address, database_address, endpoint_address
from code_worker.worker.app import create_app
from tests.servers import RedisServer

PASSWORDS = ["a#b/c?d", "pa/ss", "p?ss", "p#ss", "p@ss", "#", "12/34", "pa%ss", "p;q", "p@s#w/o?r=d&", "über"]


class LockedRedis(RedisServer):
    password = "a#b/c?d@e"

    def command(self) -> list[str]:
        return [*super().command(), "--requirepass", self.password]


@pytest.fixture
def locked() -> Iterator[LockedRedis]:
    with LockedRedis() as server:
        yield server


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_raw_password_is_read_as_it_was_meant(password: str) -> None:
    meant = quote(password, safe="")
    assert broker_address(f"redis://:{password}@h:6379/0") == f"redis://:{meant}@h:6379/0"
    assert broker_address(f"rediss://us-er:{password}@[::1]/1") == f"rediss://us-er:{meant}@[::1]/1"


@pytest.mark.parametrize("password", [one for one in PASSWORDS if one != "12/34"])
def test_a_database_gets_the_password_that_was_meant(password: str) -> None:
    assert make_url(database_address(f"postgresql+psycopg://u:{password}@h:5432/db")).password == password


@pytest.mark.parametrize(
    "url",
    [
        *(
            "redis://h",
            "redis://h:1/0",
            "redis://:p@h/0",
            "rediss://u:p%40ss%2F@h:6380/15",
            "redis://[fd00::1]:6379/0",
        ),
        *("memory://", "amqp://u:p@h:5672//vhost", "redis+socket:///run/redis.sock", "amqp://a//;amqp://b//"),
    ],
)
def test_a_well_formed_broker_url_stays_as_it_is(url: str) -> None:
    assert broker_address(url) == url
    assert broker_address(f" {url}\n") == url


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql+psycopg://u@h/db", "postgresql://u:p@h1,h2:5432/db?target_session_attrs=read-write"),
        *(
            "postgresql://postgres:@/postgres?host=/tmp/a+b",
            "postgresql+psycopg:///db?host=/run",
            "sqlite:////a#b@c?",
        ),
    ],
)
def test_a_well_formed_database_url_stays_as_it_is(url: str) -> None:
    assert database_address(url) == url


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("rediss://h/0?ssl_cert_reqs=CERT_REQUIRED", "rediss://h/0?ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_cert_reqs=None", "rediss://h/0?ssl_cert_reqs=none"),
        ("rediss://h/0?ssl_check_hostname=0", "rediss://h/0?ssl_check_hostname=false"),
        ("REDIS://h/0?db=3", "redis://h/3"),
    ],
)
def test_parameters_get_the_form_that_all_clients_know(url: str, meant: str) -> None:
    assert broker_address(url) == meant


CANARY = "s3cr#t/word?x@"


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ("broker_url", f"redis://u:p@h/0/{CANARY}"),
        ("broker_url", f"redis://u:{CANARY}h/zero"),
        ("broker_url", f"redis://:{CANARY}h:port/0"),
        ("broker_url", "redis://:s3cr?socket_timeout=5"),
        ("broker_url", "redis://h/0?socket_timeout=s3cr"),
        ("broker_url", "redis://h/0?ssl_cert_reqs=required"),
        ("broker_url", "rediss://h/0?ssl_cert_reqs=s3cr"),
        ("broker_url", "rediss://h/0?ssl_check_hostname=s3cr"),
        ("broker_url", "amqp://u:p@h/s3cr@h2"),
        ("broker_url", "s3cr"),
        ("database_url", "postgresql://u:p@s3cr/w@h/db"),
        ("database_url", "postgresql://h/db?user=s3cr@b"),
        ("database_url", "s3cr"),
        ("s3__endpoint_url", "https://key:s3cr@h"),
        ("s3__endpoint_url", "h:s3cr"),
        ("s3__endpoint_url", "https://h/?key=s3cr"),
    ],
)
def test_what_has_two_meanings_is_refused_and_not_shown(
    setting: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CODE_WORKER_{setting.upper()}", url)
    with pytest.raises(ConfigurationError, match=f"wrong settings: CODE_WORKER_{setting.upper()}: ") as refused:
        load_settings()
    shown = f"{refused.value}{refused.value.__cause__}"
    assert not any(piece in shown for piece in ("s3cr", "t/word"))


def test_an_endpoint_keeps_its_path() -> None:
    assert endpoint_address("https://minio.example:9000/s3\n") == "https://minio.example:9000/s3"


def test_every_client_gets_in_with_a_raw_password(locked: LockedRedis, tmp_path: Path) -> None:
    url = f"redis://:{locked.password}@127.0.0.1:{locked.port}/0"
    settings = Settings(data_dir=tmp_path, broker_url=url)  # type: ignore[arg-type]  # pydantic wraps it
    with closing(Publisher.for_producer(settings)) as publisher:
        publisher.publish("code_worker.normal", ["019ad000-0000-7000-8000-000000000000"])
        assert publisher.depth("code_worker.normal") == 1
    with create_app(settings) as app:
        assert get_redis(app).ping()
        get_redis(app).close()
    found = list(examine(["broker"], data_dir=tmp_path, broker_url=url))
    assert all(check.status is not Status.FAIL for check in found), found


def test_every_client_checks_the_servers_certificate_alike(tmp_path: Path) -> None:
    url = "rediss://:p@h:6380/2?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=False"
    settings = Settings(data_dir=tmp_path, broker_url=url)  # type: ignore[arg-type]  # pydantic wraps it
    app = create_app(settings)
    worker = app.connection_for_read()
    assert worker.ssl == Connection(settings.resolved_broker_url).ssl
    beat = get_redis(app).connection_pool.connection_kwargs
    doctor = Redis.from_url(settings.resolved_broker_url).connection_pool.connection_kwargs
    for connection in (beat, doctor):
        assert connection["ssl_cert_reqs"] == "required"
        assert connection["ssl_ca_certs"] == worker.ssl["ssl_ca_certs"] == "/etc/ca.pem"
        assert connection["ssl_check_hostname"] is worker.ssl["ssl_check_hostname"] is False
        assert (connection["host"], connection["port"], connection["db"]) == ("h", 6380, 2)
