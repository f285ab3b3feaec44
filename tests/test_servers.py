"""The servers that other tests stand on."""

from __future__ import annotations

import psycopg
import redis

from tests.servers import PostgresServer, RedisServer, S3Server


def test_redis_restarts_empty_on_its_port(redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("a", "1")
        redis_server.kill()
        redis_server.start()
        assert client.get("a") is None


def test_postgres_gives_separate_databases(postgres_server: PostgresServer) -> None:
    first, second = (postgres_server.new_database().replace("+psycopg", "") for _ in range(2))
    with psycopg.connect(first) as connection:
        connection.execute("create table only_here (id int)")
    with psycopg.connect(second) as connection:
        row = connection.execute("select count(*) from pg_tables where tablename = 'only_here'").fetchone()
    assert row == (0,)


def test_s3_keeps_objects(s3_server: S3Server) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="servers")
    client.put_object(Bucket="servers", Key="a", Body=b"bytes")
    assert client.get_object(Bucket="servers", Key="a")["Body"].read() == b"bytes"
