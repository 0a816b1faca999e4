"""Clients of object stores, with credentials and endpoints from where each ecosystem keeps them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pipelines.errors import ConfigError

REQUEST_SECONDS = 300
"""Duration after which a request without a complete answer is given up and repeated, over a slow line."""

_SILENT_SECONDS = 15
"""Duration after which a request is given up whose answer does not begin, or does not go on."""

_CONNECT_SECONDS = 5

_UPLOAD_SECONDS = 120
"""The same for a request that uploads: 64 MB at most, over a slow line."""

UPLOAD_RETRIES = 25
"""Repetitions of a request that uploads: a minute without a server that can be reached."""

_UPLOAD_RETRIES = {
    "max_retries": UPLOAD_RETRIES,
    "retry_timeout": timedelta(seconds=3 * _UPLOAD_SECONDS),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 3},
}
"""Pauses are random, up to the last one times the base."""


def make_store(scheme: str, host: str, *, writes: bool = False) -> Any:
    """Return obstore's client of a bucket, a container or a web server.

    S3 takes credentials, region and endpoint from the environment, ~/.aws and instance roles, by boto3 if it
    is installed; without any it sends unsigned requests. Google's and Azure's are found by obstore.

    Args:
        scheme, host: As of `Url`.
        writes: For uploads, and for lists: it repeats requests, and S3 checks the SHA-256 of what arrives.

    Raises:
        ConfigError: obstore is not installed, or the settings in the environment are not complete.
    """
    try:
        from obstore.store import S3Store, from_url
    except ImportError as error:
        fault = "URLs are read with obstore, which is not installed: pip install 'cosmoflow-dali[cloud]'"
        raise ConfigError("data.dir", f"{scheme}://{host}", fault) from error
    client: dict[str, Any] = {
        "timeout": f"{_UPLOAD_SECONDS if writes else REQUEST_SECONDS}s",
        "connect_timeout": f"{_CONNECT_SECONDS}s",
        **({} if writes else {"read_timeout": f"{_SILENT_SECONDS}s"}),
        # With a plain endpoint, which the user has named, or a web server.
        "allow_http": True,
    }
    # Requests for reading are repeated, and counted, by `Requests`.
    options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
    if writes:
        options["retry_config"] = _UPLOAD_RETRIES
    try:
        if scheme == "s3":
            settings = {**_aws_settings(), **({"checksum_algorithm": "SHA256"} if writes else {})}
            return S3Store(host, **options, **settings)
        return from_url(f"{scheme}://{host}", **options)
    except Exception as error:  # obstore raises errors of many types for its settings
        reason = str(error).partition("\n")[0]
        raise ConfigError("data.dir", f"{scheme}://{host}", f"{reason}; see docs/clouds.md") from error


def _aws_settings() -> dict[str, Any]:
    """Return what boto3 knows of credentials, region and endpoint; empty without boto3."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    session = boto3.Session()
    settings: dict[str, Any] = {}
    if session.get_credentials() is None:
        # As for public data.
        settings["skip_signature"] = True
    else:
        settings["credential_provider"] = Boto3CredentialProvider(session)
    if session.region_name:
        settings["region"] = session.region_name
    try:
        endpoint = session.client("s3", region_name=session.region_name or "us-east-1").meta.endpoint_url
    except BotoCoreError:
        return settings
    except ValueError:
        # Its text has the endpoint, which may have a password.
        raise ValueError("AWS_ENDPOINT_URL is not valid; expected https://HOST or http://HOST:PORT") from None
    if "@" in endpoint:
        raise ValueError("AWS_ENDPOINT_URL must not hold a password")
    if not endpoint.endswith(".amazonaws.com"):
        settings["endpoint"] = endpoint
    return settings
