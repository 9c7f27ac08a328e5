"""`nexusengine explain REQUEST_ID`: why a request was served as it was."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nexusengine.errors import NexusError, Unavailable, error_from_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="the id of a reply, such as cmpl-...")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="the server; it runs with --debug-endpoints"
    )
    parser.add_argument("--api-key", metavar="KEY", help="its bearer token")
    parser.add_argument("--json", action="store_true", help="print what the server says instead of sentences")


def run(args: argparse.Namespace) -> int:
    from nexusengine.cli.history_text import request_lines

    found = _ask(args.url.rstrip("/"), args.request_id, args.api_key)
    if args.json:
        print(json.dumps(found))
        return 0
    for number, history in enumerate(found["histories"]):
        if number:
            print("\nBefore, on another worker:")
        print("\n".join(request_lines(history)))
    return 0


def _ask(url: str, request_id: str, api_key: str | None) -> Any:
    """Raises NexusError: what the server says, or that there is none."""
    import urllib.error
    import urllib.parse
    import urllib.request

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    path = f"{url}/debug/requests/{urllib.parse.quote(request_id, safe='')}"
    try:
        with urllib.request.urlopen(urllib.request.Request(path, headers=headers), timeout=10) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise _error_of(error.read(), error.code, url) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)  # of a URLError: what went wrong below it
        reason = getattr(reason, "strerror", None) or reason
        raise Unavailable(f"no server answers at {url}: {reason}; name it with --url") from None


def _error_of(body: bytes, status: int, url: str) -> NexusError:
    try:
        error = json.loads(body)["error"]
        return error_from_code(error["code"], error["message"])
    except (ValueError, LookupError, TypeError):
        return Unavailable(f"{url} answers {status}")
