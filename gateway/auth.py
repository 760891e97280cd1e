"""Who is asking: credentials to Caller, word by word as the contract's section 2 says.

A key travels in `Authorization: Bearer`, `x-api-key` or `api-key`. It is looked up by its digest and compared in
constant time. What a worker has looked up it keeps (`known_keys`) until the `revision` of the keys moves, which it
knows for a moment at a time (`key_watch`), so a revoked key is refused everywhere within a second. A call that learns
of a newer revision on its way asks `again`.

`auto` lets a request go without a key only while nobody but this machine can be asking: see `_keyless_refusal`. An
address that sends many wrong keys (`wrong_keys`) is told to wait, once a key of its is known to be wrong.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from gateway.addresses import client_address, is_loopback, neighbourhood
from gateway.caller import Caller, KeyLimits
from gateway.errors import BadRequest, RateLimited, Unauthenticated
from gateway.key_watch import KeyWatch
from gateway.known_keys import MOST_REMEMBERED, KnownKeys
from gateway.store.database import Database
from gateway.store.keys import KeyState, StoredKey
from gateway.wrong_keys import WrongKeys

__all__ = [
    "ADMIN_USER",
    "DEFAULT_USER",
    "Auth",
    "Caller",
    "KeyLimits",
    "Peer",
    "credential",
    "digest",
    "new_key",
    "refuse_key_in_query",
]

DEFAULT_USER = "default"
ADMIN_USER = "admin"
Headers = Sequence[tuple[bytes, bytes]]
Mode = Literal["auto", "keys", "open"]

_HOST = re.compile(r"(?:\[(?P<ip6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]*))(?::[0-9]*)?")
_FORWARDING = re.compile(rb"forwarded|x-forwarded-.*|x-real-ip|via")
_KEY_PARAMETERS = frozenset({"api_key", "api-key", "apikey", "key", "access_token", "x-api-key", "authorization"})
_CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_HOW_TO = "Make one with `gateway keys create --user NAME` and send it as `Authorization: Bearer sk-...`."
_ALPHABET = string.ascii_letters + string.digits + "-_"


@dataclass(slots=True)
class Peer:
    """What the socket and the headers say about where a request comes from. Names are lower case, as ASGI has them.
    What proxies say of where it comes from counts for one thing only: whose wrong keys these are."""

    client: str | None
    server: str | None
    headers: Headers
    query: bytes = b""
    trusted_proxies: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Of the client, as far as trusted proxies tell."""
        return neighbourhood(client_address(self.client, self.headers, self.trusted_proxies))

    def values(self, name: bytes) -> list[str]:
        return [_text(value) for key, value in self.headers if key == name]


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape").strip()


def new_key() -> str:
    """`sk-` and 256 random bits or more in letters, digits, `-` and `_`."""
    return "sk-" + "".join(secrets.choice(_ALPHABET) for _ in range(43))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Auth:
    """`identify` is called once for each request that needs a caller, before its body is read."""

    def __init__(
        self,
        database: Database,
        watch: KeyWatch,
        *,
        mode: Mode,
        admin_key: str = "",
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
    ) -> None:
        self._watch = watch
        self._mode = mode
        self._admin_digest = digest(admin_key) if admin_key else None
        hosts = [host.lower() for host in allowed_hosts]
        self._hosts = frozenset(hosts) | {host.strip("[]") for host in hosts}
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins if origin != "*")
        self._keys = KnownKeys(database)
        self._wrong = WrongKeys()
        self._keyless = Caller(DEFAULT_USER)
        self._ignored: set[str] = set()

    async def identify(self, peer: Peer) -> Caller:
        """Raises Unauthenticated, BadRequest, RateLimited, or DatabaseUnavailable: a silent database never lets anyone
        in. In mode `open` nothing is asked of it here."""
        if peer.query:
            refuse_key_in_query(peer.query)
        if self._mode == "open":
            return self._keyless
        state = await self._watch.state()
        refusal = self._keyless_refusal(peer, state)
        if refusal is None and (news := self._news(peer)):
            state = await self._watch.look()
            refusal = self._keyless_refusal(peer, state)
            if refusal is None:
                self._ignore(news)
        if refusal is None:
            return self._without_key(state)
        key = credential(peer)
        if key is None:
            raise _no_key(refusal)
        found = digest(key)
        if self._is_admin(found):
            return Caller(ADMIN_USER, None, is_admin=True, revision=state.revision)
        caller = await self._by_digest(found, state)
        if caller is not None:
            return caller
        wait = self._wrong.count(peer.address)
        if wait:
            raise RateLimited("Too many wrong API keys came from this address.", retry_after=wait, log="wrong keys")
        raise _unknown_key()

    async def recognize(self, found: str) -> Caller | None:
        """What `identify` gives, for a request like one whose caller it has found by a key of this digest. None: it has
        to be asked. Raises DatabaseUnavailable."""
        return self._by_known_digest(found, await self._watch.state())

    def recognize_at_once(self, found: str) -> Caller | None:
        """The same where that needs no round trip. None: ask."""
        state = self._watch.known()
        return None if state is None else self._by_known_digest(found, state)

    def _by_known_digest(self, found: str, state: KeyState) -> Caller | None:
        known = self._keys.found(found, state)
        return known.caller if known is not None and _opens(found, known.key) else None

    async def again(self, caller: Caller, state: KeyState) -> Caller:
        """The same caller under a newer state of the keys. Raises Unauthenticated if its key is not good any more, or
        if it has none and needs one by now, and DatabaseUnavailable."""
        self._watch.tell(state)
        if caller.digest is not None:
            found = await self._by_digest(caller.digest, state)
            if found is None:
                raise _unknown_key()
            return found
        if caller.is_admin:
            return replace(caller, revision=state.revision)
        if self._mode != "open" and state.ever_made:
            raise _no_key()
        return self._without_key(state)

    def is_configured_admin(self, peer: Peer) -> bool:
        """Does the request carry the admin key of the configuration? Asks no database: for when it is down."""
        key = _any_credential(peer)
        return key is not None and self._is_admin(digest(key))

    def _is_admin(self, key_digest: str) -> bool:
        return self._admin_digest is not None and hmac.compare_digest(key_digest, self._admin_digest)

    async def _by_digest(self, found: str, state: KeyState) -> Caller | None:
        known = self._keys.found(found, state) or await self._keys.find(found, state)
        return known.caller if known is not None and _opens(found, known.key) else None

    def _news(self, peer: Peer) -> str | None:
        """The digest of a key that a request sends without need, if none has sent it before: it may be the first key
        there is, made just now. It is news to all who send it until somebody has looked."""
        key = _any_credential(peer)
        found = None if key is None else digest(key)
        return None if found in self._ignored else found

    def _ignore(self, news: str) -> None:
        if len(self._ignored) >= MOST_REMEMBERED:
            self._ignored.clear()
        self._ignored.add(news)

    def _without_key(self, state: KeyState) -> Caller:
        if self._keyless.revision != state.revision:
            self._keyless = Caller(DEFAULT_USER, revision=state.revision)
        return self._keyless

    def _keyless_refusal(self, peer: Peer, state: KeyState) -> str | None:
        """None: this request may go without a key. Otherwise why not, as the end of a sentence."""
        if self._mode == "keys" or state.ever_made or self._admin_digest is not None:
            return ""
        if not (is_loopback(peer.client) and is_loopback(peer.server)):
            return " from other machines"
        if any(_FORWARDING.fullmatch(name) for name, _ in peer.headers):
            return " behind a proxy"
        hosts = peer.values(b"host")
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            return " for this Host name (server.allowed_hosts lists those that count as its own)"
        if any(not self._is_own_origin(origin) for origin in peer.values(b"origin")):
            return " for pages of another origin (server.cors_origins lists those that are trusted by name)"
        return None

    def _is_own_host(self, host: str) -> bool:
        name = _host_name(host)
        return name in ("localhost", "127.0.0.1", "::1") or name in self._hosts or host.lower() in self._hosts

    def _is_own_origin(self, origin: str) -> bool:
        if origin.lower().rstrip("/") in self._origins:
            return True
        try:
            name = urlsplit(origin).hostname
        except ValueError:
            return False
        return name is not None and (name == "localhost" or is_loopback(name))


def _opens(found: str, key: StoredKey) -> bool:
    now = int(time.time() * 1000)
    if not key.usable(now):
        return False
    if hmac.compare_digest(found, key.digest):
        return True
    return any(hmac.compare_digest(found, good) for good in key.accepts(now))


def _no_key(why: str = "") -> Unauthenticated:
    return Unauthenticated(f"This gateway needs an API key{why}. {_HOW_TO}", log="no key")


def _unknown_key() -> Unauthenticated:
    return Unauthenticated(f"The API key is not valid, or no longer. {_HOW_TO}", log="unknown key")


def credential(peer: Peer) -> str | None:
    """The one key of the request. The same key sent in several ways is one key; two different ones are refused."""
    found: set[str] = set()
    for name, raw in peer.headers:
        if name not in _CARRIERS:
            continue
        if name == b"authorization":
            value = _text(raw)
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer" and (key := key.strip()):
                found.add(key)
            elif value:
                told = f"The Authorization header must be `Bearer sk-...`. {_HOW_TO}"
                raise Unauthenticated(told, log="wrong scheme")
        elif value := _text(raw):
            found.add(value)
    if len(found) > 1:
        raise BadRequest("The request carries two different API keys. Send one.", code="ambiguous_credentials")
    return found.pop() if found else None


def _any_credential(peer: Peer) -> str | None:
    try:
        return credential(peer)
    except (BadRequest, Unauthenticated):
        return None


def refuse_key_in_query(query: bytes) -> None:
    """URLs end up in logs and histories: a key in one is refused, whatever the mode."""
    for name, value in parse_qsl(query.decode("latin-1")):
        if value and (name.lower() in _KEY_PARAMETERS or value.startswith("sk-")):
            raise BadRequest(
                f"An API key does not belong into the URL ('{name}'): send it as `Authorization: Bearer sk-...`, "
                "and replace it, for it may have been logged on its way.",
                code="key_in_query",
            )


def _host_name(host: str) -> str:
    """Without its port; `[::1]:8000` is `::1`. Empty if it is no host."""
    found = _HOST.fullmatch(host.lower())
    return (found["ip6"] or found["name"]) if found is not None else ""
