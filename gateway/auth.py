"""Who is asking: credentials to Caller, word by word as the contract's section 2 says.

A key travels in `Authorization: Bearer`, `x-api-key` or `api-key`. It is looked up by its digest and compared in
constant time. What a worker has looked up it keeps until the `revision` of the keys moves; the revision is read on
every call (`admission`), so a revoked key is refused everywhere at once.

`auto` lets a request go without a key only while nobody but this machine can be asking: see `_keyless_refusal`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import string
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from gateway.admission import Admission
from gateway.errors import BadRequest, PermissionDenied, Unauthenticated
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState, StoredKey

DEFAULT_USER = "default"
ADMIN_USER = "admin"
Headers = Sequence[tuple[bytes, bytes]]
Mode = Literal["auto", "keys", "open"]

_HOST = re.compile(r"(?:\[(?P<ip6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]*))(?::[0-9]*)?")
_FORWARDING = re.compile(rb"forwarded|x-forwarded-.*|x-real-ip|via")
_KEY_PARAMETERS = frozenset({"api_key", "api-key", "apikey", "key", "access_token", "x-api-key", "authorization"})
_HOW_TO = "Make one with `gateway keys create --user NAME` and send it as `Authorization: Bearer sk-...`."
_MOST_REMEMBERED = 10_000
_ALPHABET = string.ascii_letters + string.digits + "-_"


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal: whose tokens these are and what it may do. `models` None: all of them."""

    user_id: str
    key_id: str | None = None
    is_admin: bool = False
    models: frozenset[str] | None = None

    def check_model(self, name: str, alias: str | None = None) -> None:
        """The key must name the model, or the alias that it was asked by. Raises PermissionDenied."""
        if self.models is not None and not self.models & {name, alias or name}:
            raise PermissionDenied(f"This key may not use the model '{alias or name}'.", param="model")


@dataclass(slots=True)
class Peer:
    """What the socket and the headers say about where a request comes from. Names are lower case, as ASGI has them."""

    client: str | None
    server: str | None
    headers: Headers
    query: bytes = b""

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
        admission: Admission,
        *,
        mode: Mode,
        admin_key: str = "",
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
    ) -> None:
        self._database = database
        self._admission = admission
        self._mode = mode
        self._admin_digest = digest(admin_key) if admin_key else None
        hosts = [host.lower() for host in allowed_hosts]
        self._hosts = frozenset(hosts) | {host.strip("[]") for host in hosts}
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins if origin != "*")
        self._known: OrderedDict[str, tuple[StoredKey, Caller] | None] = OrderedDict()
        self._revision = -1

    async def identify(self, peer: Peer) -> Caller:
        """Raises Unauthenticated, BadRequest, or DatabaseUnavailable: a silent database never lets anyone in."""
        refuse_key_in_query(peer.query)
        if self._mode == "open":
            await self._admission.check()
            return Caller(DEFAULT_USER)
        state = await self._admission.check()
        refusal = self._keyless_refusal(peer, state)
        if refusal is None:
            return Caller(DEFAULT_USER)
        key = credential(peer)
        if key is None:
            raise Unauthenticated(f"This gateway needs an API key{refusal}. {_HOW_TO}", log="no key")
        return await self._by_key(key, state)

    def is_configured_admin(self, peer: Peer) -> bool:
        """Does the request carry the admin key of the configuration? Asks no database: for when it is down."""
        try:
            key = credential(peer)
        except (BadRequest, Unauthenticated):
            return False
        return key is not None and self._is_admin(digest(key))

    def _is_admin(self, key_digest: str) -> bool:
        return self._admin_digest is not None and hmac.compare_digest(key_digest, self._admin_digest)

    async def _by_key(self, key: str, state: KeyState) -> Caller:
        found = digest(key)
        if self._is_admin(found):
            return Caller(ADMIN_USER, None, is_admin=True)
        if state.revision != self._revision:
            self._known.clear()
            self._revision = state.revision
        known = self._known[found] if found in self._known else await self._lookup(found, state)
        if known is not None:
            stored, caller = known
            if hmac.compare_digest(found, stored.digest) and stored.usable(int(time.time() * 1000)):
                return caller
        raise Unauthenticated(f"The API key is not valid, or no longer. {_HOW_TO}", log="unknown key")

    async def _lookup(self, key_digest: str, state: KeyState) -> tuple[StoredKey, Caller] | None:
        stored = await keys.by_digest(self._database, key_digest)
        known = None if stored is None else (stored, _caller(stored))
        if state.revision == self._revision:
            self._known[key_digest] = known
            if len(self._known) > _MOST_REMEMBERED:
                self._known.popitem(last=False)
        return known

    def _keyless_refusal(self, peer: Peer, state: KeyState) -> str | None:
        """None: this request may go without a key. Otherwise why not, as the end of a sentence."""
        if self._mode == "keys" or state.ever_made or self._admin_digest is not None:
            return ""
        if not (_is_loopback(peer.client) and _is_loopback(peer.server)):
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
        return name is not None and (name == "localhost" or _is_loopback(name))


def _caller(stored: StoredKey) -> Caller:
    models = None if stored.models is None else frozenset(stored.models)
    return Caller(stored.user_id, stored.id, stored.is_admin, models)


def credential(peer: Peer) -> str | None:
    """The one key of the request. The same key sent in several ways is one key; two different ones are refused."""
    found: set[str] = set()
    for name, raw in peer.headers:
        if name == b"authorization":
            value = _text(raw)
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer" and (key := key.strip()):
                found.add(key)
            elif value:
                told = f"The Authorization header must be `Bearer sk-...`. {_HOW_TO}"
                raise Unauthenticated(told, log="wrong scheme")
        elif (name == b"x-api-key" or name == b"api-key") and (value := _text(raw)):
            found.add(value)
    if len(found) > 1:
        raise BadRequest("The request carries two different API keys. Send one.", code="ambiguous_credentials")
    return found.pop() if found else None


def refuse_key_in_query(query: bytes) -> None:
    """URLs end up in logs and histories: a key in one is refused, whatever the mode."""
    if not query:
        return
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


def _is_loopback(address: str | None) -> bool:
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
