"""What Schemathesis cannot find in the document: how Stripe signs, and which cursors and tags were given out."""

import hashlib
import hmac
import json
import os
import time

import requests
import schemathesis


class Signed(requests.auth.AuthBase):
    """Signs what is sent, as Stripe does: any other delivery is refused."""

    def __call__(self, request):
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        now = str(int(time.time()))
        secret = os.environ["SIGNING_SECRET"].encode()
        signature = hmac.new(secret, now.encode() + b"." + body, hashlib.sha256).hexdigest()
        request.headers["Stripe-Signature"] = f"t={now},v1={signature}"
        return request


def is_positive(case):
    return case.meta is not None and case.meta.generation.mode.is_positive


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.operation.path == "/webhooks/stripe" and is_positive(case):
        kwargs["auth"] = Signed()


@schemathesis.hook
def map_case(context, case):
    """Leaves out what looks right and cannot be: a made-up cursor is refused (those that were given out come by links), and a
    made-up tag names nothing that is stored, so that nothing would be."""
    if is_positive(case):
        query, headers = case.query or {}, case.headers or {}
        if case.operation.path.endswith("/invoices") and not was_given_out(query.get("cursor")):
            query.pop("cursor", None)
        if case.operation.method.upper() == "PUT" and headers.get("If-Match") != "*":
            headers.pop("If-Match", None)
    return case


def was_given_out(cursor):
    try:
        return len(json.loads(bytes.fromhex(cursor))) == 3
    except (TypeError, ValueError):
        return False
