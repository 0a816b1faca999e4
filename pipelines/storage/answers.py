"""Refusals of object stores and web servers: what they mean, in one line without anything secret."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["missing", "empty range", "permanent", "temporary"]

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>|\"error\"\s*:\s*\"(\w+)\"")

_CODES = {
    "ExpiredToken": ("the credentials have expired", "renew them and start again; --resume continues a run"),
    "TokenRefreshRequired": ("the credentials have expired", "renew them and start again"),
    "AuthenticationFailed": ("the credentials are not accepted", "check them; see docs/clouds.md"),
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set it, as by NTP"),
    "InvalidAccessKeyId": ("the access key is unknown to the server", "check it; see docs/clouds.md"),
    "SignatureDoesNotMatch": (
        "the secret key does not belong to the access key",
        "check both, and that no proxy changes requests",
    ),
    "NoSuchBucket": ("the bucket does not exist", "check its name, and the endpoint"),
    "InvalidBucketName": ("the name of the bucket is not valid", "check it"),
    "QuotaExceeded": ("the quota of the bucket is used up", "remove something there, or ask for more"),
    "XMinioStorageFull": ("the server's disks are full", "remove something there"),
    "BadDigest": ("the content was damaged on its way", "run the same command again: it resumes"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_REGION to that region"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set AWS_REGION to that region"),
}
"""Fault and remedy by the error codes of S3 (and Azure's of the same meaning)."""

_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_THROTTLED = (429, 503)

_CONNECTIONS = (
    (re.compile(r"dns error|failed to lookup|Name or service", re.IGNORECASE), "the host is not found"),
    (re.compile(r"ConnectionRefused|Connection refused"), "the connection is refused"),
    (re.compile(r"certificate|UnknownIssuer", re.IGNORECASE), "its certificate is not valid"),
    # Every error of obstore states its setting `retry_timeout`.
    (re.compile(r"TimedOut|timed out|(?<!retry_)timeout", re.IGNORECASE), "no answer in time"),
    (re.compile(r"IncompleteMessage|ConnectionReset|reset by peer|end of file", re.IGNORECASE),
     "the connection broke off"),
)  # fmt: skip


class Refusal(NamedTuple):
    """The meaning of an error of a request.

    Attributes:
        kind: "missing": there is no such object. "empty range": the object ends before the range.
            "temporary": the same request may succeed later. "permanent": it will not.
        fault, remedy: For a DataError.
        throttled: The server asks for fewer requests.
    """

    kind: Kind
    fault: str
    remedy: str
    throttled: bool = False


def explain(error: BaseException) -> Refusal:
    """Return the meaning of `error`, raised by obstore or by a time-out."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    number, name = int(status[1]) if status else 0, (code[1] or code[2]) if code else ""
    answered = f"the server answers {number} {name}".rstrip()
    if name in _CODES:
        return Refusal("permanent", *_CODES[name])
    if isinstance(error, FileNotFoundError) or number == 404:
        return Refusal("missing", "does not exist", "check the address")
    if number == 416:
        return Refusal("empty range", "ends before the bytes that were asked for", "upload it again")
    if number in _TEMPORARY:
        fault = f"the server asks for fewer requests ({number} {name})" if number in _THROTTLED else answered
        return Refusal("temporary", fault, "try again later", number in _THROTTLED)
    if number in (401, 403):
        fault = f"access is denied ({' '.join(filter(None, (str(number), name)))})"
        return Refusal("permanent", fault, "check the credentials and the permissions; see docs/clouds.md")
    if 300 <= number < 400:
        return Refusal("permanent", f"{answered}, a redirection", "give the address that it leads to")
    if number == 412:
        return Refusal("permanent", "has changed since it was first read", "start again")
    if "BareRedirect" in text:
        return Refusal("permanent", *_CODES["PermanentRedirect"])
    if number:
        return Refusal("permanent", answered, "check the address and the server")
    if type(error).__name__ == "NotSupportedError" or "NotPartial" in text:
        fault = "the server answers a request for a part of the file with all of it, or with a page"
        return Refusal("permanent", fault, "check the address; the server must support range requests")
    if "ontent-Length" in text or "HeaderError" in text or "Header {" in text:
        return Refusal("permanent", "the server's answer has no length", "give the address of a file")
    if type(error).__name__ == "UnauthenticatedError":
        # boto3 could not get them, as after the end of a single sign-on.
        return Refusal(
            "temporary",
            "the credentials cannot be renewed",
            "sign in or renew them; --resume continues a run",
        )
    reasons = (reason for pattern, reason in _CONNECTIONS if pattern.search(text))
    if isinstance(error, TimeoutError):
        return Refusal("temporary", "no answer in time", "check the server and the network")
    fault = next(reasons, "the connection failed")
    return Refusal("temporary", fault, "check the address, the server and the network")
