"""HTTP itself, byte by byte: limits, old clients, clients that say little or leave half-way, headers of replies."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.api.conftest import Running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": "ab", "max_tokens": 3, "temperature": 0}
Start = Callable[..., Running]


@contextlib.contextmanager
def connected(server: Running, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=timeout_s) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            received += piece
    return received


def request(body: object = BODY, *headers: str, version: str = "1.1", path: str = TEXT) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def exchange(server: Running, *sent: bytes, half_close: bool = False) -> tuple[bytes, bytes]:
    """Send the pieces, and split what comes into head and body of the reply."""
    with connected(server) as connection:
        for piece in sent:
            connection.sendall(piece)
            time.sleep(0.02 if len(sent) > 1 else 0)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    return head, body


def closed_while_sending(connection: socket.socket, piece: bytes) -> bool:
    """Whether the server ends a connection on which a piece comes every tenth of a second."""
    with contextlib.suppress(ConnectionError):
        for _ in range(150):
            connection.sendall(piece)
            time.sleep(0.1)
        return False
    return True


def error_of(body: bytes) -> dict[str, object]:
    error: dict[str, object] = json.loads(body)["error"]
    return error


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


# ---- other clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[], ["Connection: keep-alive"]])
def test_a_stream_to_an_http_1_0_client_has_no_chunks(server: Running, headers: list[str]) -> None:
    head, body = exchange(server, request(BODY | {"stream": True}, *headers, version="1.0"))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    events = body.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(e.removeprefix("data: "))["object"] == "text_completion" for e in events[:-1])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_side_gets_its_answer(start_server: Start, version: str, stream: bool) -> None:
    server = start_server(real_s=0.01)
    sent = request(BODY | {"max_tokens": 20, "stream": stream}, version=version)
    head, body = exchange(server, sent, half_close=True)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert (b"[DONE]" if stream else b'"completion_tokens":20') in body
    assert server.idle()


def test_one_that_waits_long_gets_an_interim_reply_and_then_its_answer(start_server: Start) -> None:
    server = start_server(real_s=0.05)
    head, rest = exchange(server, request(BODY | {"max_tokens": 60}), half_close=True)
    assert head == b"HTTP/1.1 100 Continue"
    assert b'"completion_tokens":60' in rest


def test_one_that_closed_both_sides_takes_its_request_with_it(start_server: Start) -> None:
    server = start_server(real_s=0.05)
    with connected(server) as connection:
        connection.sendall(request(BODY | {"max_tokens": 300}))
        time.sleep(0.1)
    assert server.idle()
    assert server.core.stats().finished_abort == 1


def test_one_that_leaves_in_the_middle_of_its_request_gets_nothing(server: Running) -> None:
    head, _ = exchange(server, request()[:-5], half_close=True)
    assert head == b""
    assert server.idle()


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_a_request_to_upgrade_is_served_as_it_stands_with_its_body(server: Running, upgrade: str) -> None:
    sent = request(BODY, "Connection: Upgrade", f"Upgrade: {upgrade}")
    middle = sent.index(b"\r\n\r\n") + 4
    chunked = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: Upgrade\r\n"
        b"Upgrade: " + upgrade.encode() + b"\r\n\r\n%x\r\n" % (len(sent) - middle) + sent[middle:] + b"\r\n0\r\n\r\n"
    )
    for pieces in ([sent], [sent[:middle], sent[middle:]], [sent[: middle + 3], sent[middle + 3 :]], [chunked]):
        # A second, ordinary request shows that the connection is still in step.
        head, rest = exchange(server, *pieces, request(BODY, "Connection: close"))
        assert head.startswith(b"HTTP/1.1 200 ")
        assert rest.count(b'"completion_tokens":3') == 2


def test_garbage_behind_a_request_does_not_cost_its_answer(start_server: Start) -> None:
    server = start_server(real_s=0.01)
    head, body = exchange(server, request(), b"\x00garbage\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b'"completion_tokens":3' in body


def test_pipelined_requests_are_answered_in_turn(server: Running) -> None:
    _, rest = exchange(server, request() * 3 + request(BODY, "Connection: close"))
    assert rest.count(b'"completion_tokens":3') == 4


# ---- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_that_waits_gets_its_status_and_comments(start_server: Start) -> None:
    server = start_server(real_s=0.7, sse_keepalive=0.2)
    reply = httpx.post(server.url + TEXT, json=BODY | {"stream": True}, timeout=30)
    assert reply.status_code == 200
    events = reply.text.strip().split("\n\n")
    assert events[0] == ": keepalive"
    assert [e for e in events if e != ": keepalive"][-1] == "data: [DONE]"
    assert sum(e.startswith("data: {") for e in events) == 3


def test_an_error_after_a_comment_is_an_event(start_server: Start) -> None:
    server = start_server(real_s=0.6, sse_keepalive=0.1)
    server.executor.broken = True
    events = httpx.post(server.url + TEXT, json=BODY | {"stream": True}, timeout=30).text.strip().split("\n\n")
    assert events[0] == ": keepalive"
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"


def test_tokens_of_requests_that_were_cut_off_are_counted(start_server: Start) -> None:
    server = start_server(real_s=0.02)
    patience = httpx.Timeout(5, read=0.4)
    for stream in (True, False):
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST", server.url + TEXT, json=BODY | {"max_tokens": 300, "stream": stream}, timeout=patience
            ) as r,
        ):
            for n, _ in enumerate(r.iter_lines()):
                if n == 8:
                    break
        assert server.idle()
    counted = {
        line.split()[0]: float(line.split()[1])
        for line in httpx.get(server.url + "/metrics").text.splitlines()
        if line.startswith(("nexusengine_prompt_tokens_total", "nexusengine_output_tokens_total"))
    }
    assert counted["nexusengine_prompt_tokens_total"] == 4
    assert 4 <= counted["nexusengine_output_tokens_total"] <= server.core.stats().generated_tokens


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
