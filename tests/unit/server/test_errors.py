"""Errors as replies."""

from __future__ import annotations

import json

import pytest

from nexusengine.errors import ERROR_TABLE, InvalidRequest, Overloaded, Unauthorized
from nexusengine.server.errors import error_body, error_response


@pytest.mark.parametrize("code", ERROR_TABLE)
def test_every_error_of_the_table_has_a_reply_in_openais_form(code: str) -> None:
    reply = error_response(ERROR_TABLE[code]("why", param="field"))
    assert reply.status_code == ERROR_TABLE[code].http_status >= 400
    error = json.loads(bytes(reply.body))["error"]
    assert (error["message"], error["param"], error["code"]) == ("why", "field", code)
    assert error["type"]


def test_a_time_to_come_back_is_given_in_whole_seconds_rounded_up() -> None:
    assert error_response(Overloaded("full", retry_after_s=1.2)).headers["retry-after"] == "2"
    assert "retry-after" not in error_response(Overloaded("full")).headers


def test_a_message_that_quotes_half_a_character_can_be_sent() -> None:
    reply = error_response(InvalidRequest("the template refuses \ud800", param="\udfff"))
    assert json.loads(bytes(reply.body))["error"]["message"] == "the template refuses \\ud800"
    assert error_body(InvalidRequest("é"))["error"]["message"] == "é"


def test_a_refused_key_comes_with_the_scheme_that_is_wanted() -> None:
    assert error_response(Unauthorized("no key")).headers["www-authenticate"] == "Bearer"
    assert error_response(InvalidRequest("x"), {"Allow": "POST"}).headers["allow"] == "POST"
