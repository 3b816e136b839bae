"""From a URL, storage options and the environment to what obstore is given; nothing connects."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_CONNECT_S = 10.0
# options of the HTTP client; obstore wants them apart from those of the service, and breaks down otherwise
CLIENT_OPTIONS = frozenset({
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "default_headers",
    "http1_only", "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle",
    "http2_only", "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes",
    "proxy_url", "randomize_addresses", "read_timeout", "root_certificate", "timeout", "user_agent",
})  # fmt: skip
# how names of options begin in the environment, where the prefix also stands in names of options
PREFIXES = {
    "s3": "aws", "s3a": "aws", "gs": "google", "az": "azure", "abfs": "azure", "abfss": "azure"
}  # fmt: skip
ENDPOINTS = ("endpoint_url_s3", "endpoint_url", "endpoint", "storage_endpoint", "base_url")


def obstore_arguments(
    url: str, options: Mapping[str, Any], environment: Mapping[str, str], *, timeout_s: float
) -> dict[str, Any]:
    """Keyword arguments of obstore's ``from_url``, the URL without a login among them.

    Options come before the environment. InputError, without values, for options that do not fit the URL.

    >>> given = obstore_arguments("s3://b/a", {"endpoint": "http://host", "region": "eu"}, {}, timeout_s=5)
    >>> given["config"], given["client_options"]["allow_http"], given["retry_config"]
    ({'endpoint': 'http://host', 'region': 'eu'}, True, {'max_retries': 0})
    """
    config = dict(options)
    parts = urlsplit(url)
    prefix = PREFIXES.get(parts.scheme, "")
    client = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(timeout_s, MAX_CONNECT_S)),
        **_client_of_environment(prefix, environment),
        **{name: config.pop(name) for name in sorted(CLIENT_OPTIONS & set(config))},
        **config.pop("client_options", {}),
    }
    if _endpoint(url, prefix, config, environment).startswith("http://"):
        client.setdefault("allow_http", True)
    login, netloc = _login(parts.netloc, prefix, config)
    if login:  # obstore does not send it by itself
        authorization = f"Basic {base64.b64encode(login.encode()).decode()}"
        client["default_headers"] = {"authorization": authorization, **client.get("default_headers", {})}
    arguments: dict[str, Any] = {
        "url": parts._replace(netloc=netloc).geturl(),
        "client_options": client,
        # retries are made where they can be stopped and counted
        "retry_config": {"max_retries": 0, **config.pop("retry_config", {})},
    }
    if "credential_provider" in config:
        arguments["credential_provider"] = config.pop("credential_provider")
    if prefix:
        arguments["config"] = config
    elif config:
        raise InputError(f"storage options {sorted(config)} are not for http(s) URLs")
    return arguments


def _client_of_environment(prefix: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Client options that obstore would take from the environment if none were given."""
    if not prefix:
        return {}
    names = {name: f"{prefix}_{name}".upper() for name in CLIENT_OPTIONS - {"timeout", "connect_timeout"}}
    return {name: environment[variable] for name, variable in names.items() if variable in environment}


def _endpoint(url: str, prefix: str, config: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    if not prefix:
        return url
    given = {name.lower(): value for name, value in config.items()}
    for name in ENDPOINTS:
        for key in (name, f"{prefix}_{name}"):
            if key in given:
                return str(given[key])
    variables = (f"{prefix}_{name}".upper() for name in ENDPOINTS)
    return next((environment[name] for name in variables if name in environment), "")


def _login(netloc: str, prefix: str, config: dict[str, Any]) -> tuple[str, str]:
    """``user:password`` of an http(s) URL, or of our own options, which are taken out; the host alone."""
    in_url, at, host = netloc.rpartition("@")
    if not prefix and "user" in config:
        return f"{config.pop('user')}:{config.pop('password', '')}", host
    return (unquote(in_url), host) if at and not prefix else ("", netloc)
