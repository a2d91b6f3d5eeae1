"""Signatures as Standard Webhooks have them: HMAC-SHA256 over id, time and body, one for each secret."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook


def signature_headers(secrets: Sequence[str], webhook_id: str, at: int, body: bytes) -> dict[str, str]:
    """Return the header fields that name and sign a message; without secrets they only name it.

    :param secrets: as ``ASYNCROUTE_CALLBACK_SECRET`` has them. The receiver takes any one's signature, so that a secret
        can be replaced while both are in use.
    :param webhook_id: the same at every attempt; without ``.``.
    :param at: seconds since the epoch, of this attempt.
    """
    fields = {"webhook-id": webhook_id, "webhook-timestamp": str(at)}
    if secrets:
        moment = datetime.fromtimestamp(at, UTC)
        text = body.decode()
        fields["webhook-signature"] = " ".join(Webhook(secret).sign(webhook_id, moment, text) for secret in secrets)
    return fields
