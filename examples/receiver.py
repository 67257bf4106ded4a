"""Receives webhooks: checks the signature and the age of each, and acts on each event once.

    WEBHOOK_SECRET=whsec_… python examples/receiver.py 9000

The secret is one of WEBHOOK_SECRETS. Nothing but the standard library is needed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import sys
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = base64.b64decode(os.environ["WEBHOOK_SECRET"].removeprefix("whsec_"))
TOLERANCE_S = 300  # older than this, a request is somebody's who has recorded it
MAX_BODY_BYTES = 2 << 20

handled: set[str] = set()  # a real receiver keeps them where it keeps what the events change


def is_genuine(headers: Message, body: bytes) -> bool:
    """Whether the request was signed with our secret, lately. See https://www.standardwebhooks.com."""
    timestamp = headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_S:
        return False
    signed = f"{headers.get('webhook-id', '')}.{timestamp}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    # While secrets are being replaced there is a signature for each.
    return any(hmac.compare_digest(expected, given) for given in headers.get("webhook-signature", "").split())


class Webhooks(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which lets the sender use its connection again

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", "0"))
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            self.answer(413)
            return
        body = self.rfile.read(length)
        if not is_genuine(self.headers, body):
            self.answer(401)  # final: the sender does not try again
            return
        # Delivery is at least once. An event whose answer was lost comes again, with the same id.
        event_id = self.headers["webhook-id"]
        if event_id not in handled:
            handled.add(event_id)
            print(f"{event_id} attempt {self.headers['orchestrator-attempt']}: {body.decode()}", flush=True)
        self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Webhooks).serve_forever()
