"""HTTP itself, byte by byte: limits, old clients, clients that say little or leave half-way, headers of replies."""

from __future__ import annotations

import contextlib
import gzip
import json
import time

import httpx
import pytest

from tests.api.conftest import Running
from tests.api.raw_http import (
    BODY,
    CHAT,
    TEXT,
    Start,
    closed_while_sending,
    connected,
    error_of,
    everything,
    exchange,
    request,
)

# ---- replies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", TEXT, "POST"), ("OPTIONS", TEXT, "POST"), ("DELETE", "/tokenize", "POST"), ("POST", "/livez", "GET")],
)
def test_a_method_that_is_not_allowed_is_answered_with_those_that_are(
    server: Running, method: str, path: str, allowed: str
) -> None:
    reply = httpx.request(method, server.url + path)
    assert reply.status_code == 405
    assert allowed in reply.headers["allow"].split(", ")
    assert allowed in reply.json()["error"]["message"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_is_read_in_any_case(start_server: Start, scheme: str) -> None:
    server = start_server(api_key="secret")
    reply = httpx.post(server.url + TEXT, json=BODY, headers={"Authorization": f"{scheme} secret"})
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "secret")],
        [("Authorization", "Basic secret")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer secret, Bearer secret")],
        [("Authorization", "Bearer secret"), ("Authorization", "Bearer other")],
        [("Authorization", b"Bearer s\xc3\xa9cret")],
    ],
)
def test_without_one_right_bearer_the_reply_says_what_is_wanted(
    start_server: Start, headers: list[tuple[str, str | bytes]]
) -> None:
    server = start_server(api_key="secret")
    reply = httpx.post(server.url + TEXT, json=BODY, headers=headers)  # type: ignore[arg-type]
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"


def test_a_request_id_that_no_header_can_carry_is_replaced_and_a_long_one_cut(server: Running) -> None:
    for given, expected in {"x" * 5000: "x" * 128, "my own": "my own"}.items():
        assert httpx.get(server.url + "/livez", headers={"x-request-id": given}).headers["x-request-id"] == expected
    reply = httpx.get(server.url + "/livez", headers={b"x-request-id": "é".encode()})
    assert reply.status_code == 200
    assert len(reply.headers["x-request-id"]) == 32


# ---- what a body may be declared to be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "application/vnd.api+json",
        "text/json",
    ],
)
def test_json_types_are_read(server: Running, content_type: str) -> None:
    reply = httpx.post(server.url + TEXT, content=json.dumps(BODY), headers={"content-type": content_type})
    assert reply.status_code == 200


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded"])
def test_what_curl_sends_unasked_is_read_but_not_from_a_web_page(server: Running, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert httpx.post(server.url + TEXT, content=json.dumps(BODY), headers=headers).status_code == 200
    reply = httpx.post(server.url + TEXT, content="[]", headers=headers)
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "the body must be a JSON object")
    headers["origin"] = "https://evil.example"
    assert httpx.post(server.url + TEXT, content=json.dumps(BODY), headers=headers).status_code == 415


@pytest.mark.parametrize(
    ("headers", "content", "word"),
    [
        ({"content-type": "text/plain"}, json.dumps(BODY).encode(), "text/plain"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x--", "multipart/form-data"),
        ({"content-type": "application/xml"}, b"<prompt/>", "application/xml"),
        ({"content-type": "application/json; charset=utf-16"}, json.dumps(BODY).encode("utf-16"), "utf-16"),
        ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=ab&max_tokens=3", "form"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, gzip.compress(b"{}", mtime=0), "gzip"),
        ({"content-type": "application/json", "content-encoding": "br"}, b"{}", "br"),
    ],
)
def test_other_types_and_encodings_are_refused_by_name(
    server: Running, headers: dict[str, str], content: bytes, word: str
) -> None:
    for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
        reply = httpx.post(server.url + path, content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert word in reply.json()["error"]["message"]


# ---- other origins ------------------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_no_web_page_is_let_in_unless_the_setting_says_so(server: Running) -> None:
    reply = httpx.options(server.url + CHAT, headers=PREFLIGHT)
    assert reply.status_code == 405
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origins", ["*", "https://page.example", "http://localhost:3000,https://page.example"])
def test_a_browsers_question_is_answered_before_the_key_is_looked_at(start_server: Start, origins: str) -> None:
    server = start_server(cors_origins=origins, api_key="secret")
    asked = httpx.options(server.url + CHAT, headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] in ("*", "https://page.example")
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    headers = {"Origin": "https://page.example", "Authorization": "Bearer secret"}
    for key, status in (("secret", 200), ("wrong", 401)):
        headers["Authorization"] = f"Bearer {key}"
        reply = httpx.post(server.url + TEXT, json=BODY, headers=headers)
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] in ("*", "https://page.example")


def test_a_page_of_another_origin_stays_out(start_server: Start) -> None:
    server = start_server(cors_origins="https://other.example")
    assert "access-control-allow-origin" not in httpx.options(server.url + CHAT, headers=PREFLIGHT).headers
    reply = httpx.post(server.url + TEXT, json=BODY, headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in reply.headers


# ---- headers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"],
        [b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /livez HTTP/1.1\r\n", *[b"X%d: %s\r\n" % (i, b"a" * 4_000) for i in range(20)], b"\r\n"],
        [b"GET /livez HTTP/1.1\r\nX: ", *[b"a" * 20_000] * 5],
        [b"GET /livez HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(9_000)) + b"\r\n"],
    ],
)
def test_too_large_headers_are_refused_before_the_key_is_looked_at(start_server: Start, pieces: list[bytes]) -> None:
    server = start_server(api_key="secret")
    head, body = exchange(server, *pieces)
    assert head.startswith(b"HTTP/1.1 431 ")
    assert error_of(body)["code"] == "headers_too_large"
    assert httpx.get(server.url + "/livez", headers={"x": "a" * 60_000}).status_code == 200


def test_headers_without_end_are_not_read_on(server: Running) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100 * 2**20:
                sent += connection.send(b"a" * 65_536)
    assert sent < 20 * 2**20  # what fits into the buffers of both sides


def test_what_is_not_http_is_answered_in_openais_form(server: Running) -> None:
    for sent in (b"hello\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"):
        head, body = exchange(server, sent)
        assert head.startswith(b"HTTP/1.1 400 ")
        assert error_of(body)["type"] == "invalid_request_error"


@pytest.mark.parametrize("begin", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
def test_a_connection_that_says_nothing_or_little_is_closed(start_server: Start, begin: bytes) -> None:
    server = start_server(header_timeout=0.3)
    with connected(server) as connection:
        connection.sendall(begin)
        received = everything(connection)
    assert received == b"" if begin in (b"", b"\r\n") else received.startswith(b"HTTP/1.1 408 ")


def test_a_header_now_and_then_does_not_keep_a_connection(start_server: Start) -> None:
    server = start_server(header_timeout=0.4)
    with connected(server) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert closed_while_sending(connection, b"X: a\r\n")


def test_the_second_request_of_a_connection_has_the_same_limit(start_server: Start) -> None:
    server = start_server(header_timeout=0.3)
    with connected(server) as connection:
        for _ in range(3):
            connection.sendall(request())
            reply = b""
            while b'"total_tokens"' not in reply:
                reply += connection.recv(65_536)
            assert reply.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"POST /v1/compl")
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


def test_an_answer_is_not_cut_off_by_the_limit_for_headers(start_server: Start) -> None:
    server = start_server(header_timeout=0.2, real_s=0.02)
    with connected(server) as connection:
        connection.sendall(request({"prompt": "ab", "max_tokens": 60}, "Connection: close") + b"\r\n")
        assert b'"completion_tokens":60' in everything(connection)


def test_a_body_that_goes_on_after_its_request_was_refused_does_not_keep_the_connection(start_server: Start) -> None:
    server = start_server(api_key="secret")
    with connected(server, 20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert b" 401 " in connection.recv(65_536)
        assert closed_while_sending(connection, b" ")


# ---- memory -------------------------------------------------------------------------------------------------------


def test_bodies_on_their_way_in_have_a_limit_together(start_server: Start) -> None:
    server = start_server(max_buffered_bytes=300_000)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connected(server))
            connection.sendall(request({"prompt": "x" * 200_000})[:120_000])
        until_s = time.monotonic() + 5
        while server.state.body_bytes < 240_000 and time.monotonic() < until_s:
            time.sleep(0.01)
        reply = httpx.post(server.url + TEXT, json={"prompt": "x" * 200_000})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert httpx.post(server.url + TEXT, json=BODY).status_code == 200
    assert server.idle()
    until_s = time.monotonic() + 5
    while server.state.body_bytes and time.monotonic() < until_s:
        time.sleep(0.01)
    assert server.state.body_bytes == 0
