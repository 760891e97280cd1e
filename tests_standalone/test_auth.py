"""Who may ask: the contract's section 2, word by word. A request in; a user, 401 or 400 out."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from gateway import auth as auth_module
from gateway import key_watch
from gateway.auth import Auth, Caller, KeyLimits, Peer, credential, digest, new_key
from gateway.errors import BadRequest, DatabaseUnavailable, GatewayError, PermissionDenied, RateLimited, Unauthenticated
from gateway.key_watch import KeyWatch
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState, StoredKey
from gateway.wrong_keys import WrongKeys
from tests_standalone.conftest import NOON, Unsteady, stored_key

ADMIN_KEY = "an admin key of any form"
LOCAL = ("host", "localhost:8000")
KEYLESS = "default"


def peer(
    *headers: tuple[str, str],
    client: str | None = "127.0.0.1",
    server: str | None = "127.0.0.1",
    query: str = "",
    behind: tuple[str, ...] = (),
) -> Peer:
    """A request from this machine with these headers and no others."""
    sent = [(name.encode(), value.encode()) for name, value in headers]
    return Peer(client, server, sent, query.encode(), behind)


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


def make_auth(database: Database, **options: Any) -> Auth:
    """It asks how the keys stand on every call."""
    return Auth(database, Watching(database), **{"mode": "auto", **options})


class Watching(KeyWatch):
    async def state(self) -> KeyState:
        return await self.look()


async def answer(auth: Auth, asking: Peer) -> str | int:
    """The user, or the status of the refusal."""
    try:
        return (await auth.identify(asking)).user_id
    except GatewayError as refusal:
        return refusal.status


async def add_key(database: Database, user: str = "ann", secret: str | None = None, **fields: Any) -> tuple[str, str]:
    """Its id and its secret."""
    secret = secret or new_key()
    key = stored_key(digest=digest(secret), user_id=user, **fields)
    await keys.add(database, key)
    return key.id, secret


# Without a key, in mode auto: all of it must hold


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", KEYLESS),
        ("127.0.0.53", "127.0.0.1", KEYLESS),
        ("::1", "::1", KEYLESS),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", KEYLESS),
        ("192.168.1.5", "127.0.0.1", 401),
        ("127.0.0.1", "192.168.1.5", 401),
        ("::ffff:192.168.1.5", "::1", 401),
        ("fe80::1%eth0", "::1", 401),
        ("0.0.0.0", "127.0.0.1", 401),
        ("127.0.0.1", "0.0.0.0", 401),
        (None, "127.0.0.1", 401),
        ("127.0.0.1", None, 401),
        ("localhost", "127.0.0.1", 401),
        ("", "", 401),
        ("2130706433", "127.0.0.1", 401),
    ],
)
async def test_both_ends_of_the_socket_must_be_loopback(
    sqlite: Database, client: str | None, server: str | None, expected: str | int
) -> None:
    assert await answer(make_auth(sqlite), peer(LOCAL, client=client, server=server)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded-anything",
        "x-real-ip",
        "via",
    ],
)
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
async def test_no_header_may_say_that_somebody_stands_between(sqlite: Database, name: str, value: str) -> None:
    assert await answer(make_auth(sqlite), peer(LOCAL, (name, value))) == 401


@pytest.mark.parametrize("name", ["x-forwarde", "via-what", "not-forwarded", "x-real-ip-not", "user-agent"])
async def test_other_headers_say_nothing(sqlite: Database, name: str) -> None:
    assert await answer(make_auth(sqlite), peer(LOCAL, (name, "8.8.8.8"))) == KEYLESS


async def test_forwarding_headers_are_never_believed(sqlite: Database) -> None:
    far = peer(LOCAL, ("x-forwarded-for", "127.0.0.1"), client="203.0.113.9")
    assert await answer(make_auth(sqlite), far) == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", KEYLESS),
        ("LocalHost:8000", KEYLESS),
        ("127.0.0.1", KEYLESS),
        ("127.0.0.1:8000", KEYLESS),
        ("[::1]", KEYLESS),
        ("[::1]:8000", KEYLESS),
        ("chat.example.com", KEYLESS),
        ("Chat.Example.com:443", KEYLESS),
        ("with.port.example:8443", KEYLESS),
        ("[fd00::1]:8000", KEYLESS),
        ("localhost:", KEYLESS),
        ("[localhost]", 401),
        ("with.port.example", 401),
        ("with.port.example:1", 401),
        ("evil.example", 401),
        ("localhost.evil.example", 401),
        ("evil.example:8000", 401),
        ("evil.example/localhost", 401),
        ("localhost@evil.example", 401),
        ("evil.example@localhost", 401),
        ("chat.example.com.evil.example", 401),
        ("[::1].evil.example", 401),
        ("[::1]evil.example:80", 401),
        ("[::1", 401),
        ("[::2]", 401),
        ("127.0.0.2", 401),
        ("127.1", 401),
        ("localhost:8000:8000", 401),
        ("localhost:http", 401),
        ("localhost, evil.example", 401),
        ("", 401),
        ("*", 401),
    ],
)
async def test_the_host_must_be_our_own(sqlite: Database, host: str, expected: str | int) -> None:
    """A page of another site, whose name was made to lead to this machine, sends that site's name (A74)."""
    auth = make_auth(sqlite, allowed_hosts=["chat.example.com", "With.Port.example:8443", "[fd00::1]"])
    assert await answer(auth, peer(("host", host))) == expected


async def test_a_host_that_is_missing_or_doubled(sqlite: Database) -> None:
    auth = make_auth(sqlite)
    assert await answer(auth, peer()) == 401
    assert await answer(auth, peer(LOCAL, LOCAL)) == 401
    assert await answer(auth, peer(LOCAL, ("host", "evil.example"))) == 401


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:3000", KEYLESS),
        ("http://LOCALHOST", KEYLESS),
        ("https://127.0.0.1:8000", KEYLESS),
        ("http://127.0.0.9", KEYLESS),
        ("http://[::1]:5173", KEYLESS),
        ("https://chat.example.com", KEYLESS),
        ("https://Chat.Example.com", KEYLESS),
        ("http://chat.example.com", 401),
        ("https://chat.example.com:8443", 401),
        ("https://evil.example", 401),
        ("http://localhost.evil.example", 401),
        ("http://127.0.0.1.evil.example", 401),
        ("http://evil.example#localhost", 401),
        ("http://localhost@evil.example", 401),
        ("http://0.0.0.0", 401),
        ("http://127.1", 401),
        ("http://[broken", 401),
        ("null", 401),
        ("file://", 401),
        ("", 401),
        ("*", 401),
    ],
)
async def test_an_origin_must_be_loopback_or_listed_by_name(sqlite: Database, origin: str, expected: str | int) -> None:
    auth = make_auth(sqlite, allowed_origins=["*", "https://chat.example.com"])
    assert await answer(auth, peer(LOCAL, ("origin", origin))) == expected


async def test_one_foreign_origin_among_several_is_enough(sqlite: Database) -> None:
    own, foreign = ("origin", "http://localhost"), ("origin", "https://evil.example")
    assert await answer(make_auth(sqlite), peer(LOCAL, own, foreign)) == 401


async def test_a_star_does_not_count_without_a_key_and_does_with_one(sqlite: Database) -> None:
    auth = make_auth(sqlite, allowed_origins=["*"])
    page = ("origin", "https://evil.example")
    assert await answer(auth, peer(LOCAL, page)) == 401
    _, secret = await add_key(sqlite)
    assert await answer(auth, peer(LOCAL, page, bearer(secret))) == "ann"


async def test_the_keyless_user_has_no_rights_beyond_calls(sqlite: Database) -> None:
    assert await make_auth(sqlite).identify(peer(LOCAL)) == Caller("default", None, False, None, None)


@pytest.mark.parametrize(
    "headers",
    [
        [bearer("sk-whatever")],
        [("authorization", "Basic dTpw")],
        [("x-api-key", "one"), ("api-key", "another")],
        [bearer("one"), bearer("another")],
        [bearer("")],
    ],
)
async def test_credentials_sent_to_a_keyless_gateway_are_ignored(
    sqlite: Database, headers: Sequence[tuple[str, str]]
) -> None:
    assert await answer(make_auth(sqlite), peer(LOCAL, *headers)) == KEYLESS
    far = peer(*headers, client="203.0.113.9")
    assert await answer(make_auth(sqlite, mode="open"), far) == KEYLESS


async def test_a_refusal_says_why_and_how_to_make_a_key(sqlite: Database) -> None:
    for asking, why in [
        (peer(LOCAL, client="10.0.0.1"), "from other machines"),
        (peer(LOCAL, ("via", "x")), "behind a proxy"),
        (peer(("host", "evil")), "Host name"),
        (peer(LOCAL, ("origin", "https://evil.example")), "another origin"),
    ]:
        with pytest.raises(Unauthenticated) as caught:
            await make_auth(sqlite).identify(asking)
        assert why in caught.value.message
        assert "gateway keys create" in caught.value.message
        assert "evil" not in caught.value.message


# Which mode, and what the database has held


ALL_GOOD = peer(LOCAL)
FROM_FAR = peer(LOCAL, client="203.0.113.9", server="203.0.113.1")


@pytest.mark.parametrize(
    ("mode", "admin_key", "near", "far"),
    [("auto", "", KEYLESS, 401), ("auto", ADMIN_KEY, 401, 401), ("keys", "", 401, 401), ("keys", ADMIN_KEY, 401, 401),
     ("open", "", KEYLESS, KEYLESS), ("open", ADMIN_KEY, KEYLESS, KEYLESS)],
)  # fmt: skip
async def test_who_needs_a_key(sqlite: Database, mode: str, admin_key: str, near: str | int, far: str | int) -> None:
    auth = make_auth(sqlite, mode=mode, admin_key=admin_key)
    assert await answer(auth, ALL_GOOD) == near
    assert await answer(auth, FROM_FAR) == far


@pytest.mark.parametrize("mode", ["auto", "keys", "open"])
async def test_once_a_key_was_made_auto_is_keys_for_ever(sqlite: Database, mode: str) -> None:
    auth = make_auth(sqlite, mode=mode)
    key_id, secret = await add_key(sqlite)
    without = KEYLESS if mode == "open" else 401
    assert await answer(auth, ALL_GOOD) == without
    await keys.revoke(sqlite, key_id, NOON)
    assert await answer(auth, ALL_GOOD) == without
    assert await answer(make_auth(sqlite, mode=mode), ALL_GOOD) == without
    assert await answer(auth, peer(LOCAL, bearer(secret))) == without


async def test_the_first_key_counts_at_once_for_who_sends_one(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look was before it was made. Whoever sends none learns of it with the next."""
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 3600.0)
    unsteady = Unsteady(sqlite)
    watch = KeyWatch(unsteady)
    auth = Auth(unsteady, watch, mode="auto")
    for _ in range(3):
        assert await answer(auth, ALL_GOOD) == KEYLESS
        assert await answer(auth, peer(LOCAL, bearer("sk-any"))) == KEYLESS
        assert await answer(auth, peer(LOCAL, ("authorization", "Basic eA=="))) == KEYLESS
    assert len(unsteady.fetched) == 2, "one look, and one for a key that was not seen before"
    _, secret = await add_key(sqlite)
    assert await answer(auth, ALL_GOOD) == KEYLESS
    assert await answer(auth, peer(LOCAL, bearer("sk-any"))) == KEYLESS
    assert await answer(auth, peer(LOCAL, bearer("sk-wrong"))) == 401
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
    assert await answer(auth, ALL_GOOD) == 401
    await watch.aclose()


async def test_the_first_key_counts_for_all_who_send_it_at_one_moment(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_watch, "GOOD_SECONDS", 3600.0)
    watch = KeyWatch(sqlite)
    auth = Auth(sqlite, watch, mode="auto")
    assert await answer(auth, ALL_GOOD) == KEYLESS
    _, secret = await add_key(sqlite)
    assert await asyncio.gather(*(answer(auth, peer(LOCAL, bearer(secret))) for _ in range(50))) == ["ann"] * 50
    await watch.aclose()


@pytest.mark.parametrize("mode", ["auto", "keys"])
@pytest.mark.parametrize("headers", [(), (bearer("sk-unknown"),)])
async def test_a_silent_database_lets_nobody_in(
    sqlite: Database, mode: str, headers: Sequence[tuple[str, str]]
) -> None:
    unsteady = Unsteady(sqlite)
    auth = make_auth(unsteady, mode=mode)
    unsteady.down = True
    with pytest.raises(DatabaseUnavailable):
        await auth.identify(peer(LOCAL, *headers))
    unsteady.down = False
    assert await answer(auth, ALL_GOOD) == (401 if mode == "keys" else KEYLESS)


async def test_open_asks_nobody(sqlite: Database) -> None:
    """Whether the database answers is asked when a call is let in."""
    unsteady = Unsteady(sqlite)
    unsteady.down = True
    assert await answer(make_auth(unsteady, mode="open"), FROM_FAR) == KEYLESS
    assert unsteady.fetched == []


async def test_a_known_key_does_not_help_while_the_database_is_silent(sqlite: Database) -> None:
    unsteady = Unsteady(sqlite)
    auth = make_auth(unsteady)
    _, secret = await add_key(sqlite)
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
    unsteady.down = True
    assert await answer(auth, peer(LOCAL, bearer(secret))) == 503


# With a key


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "authorization"])
@pytest.mark.parametrize("mode", ["auto", "keys"])
async def test_every_header_gives_the_same_rights(sqlite: Database, name: str, mode: str) -> None:
    key_id, secret = await add_key(sqlite, "ann", is_admin=True, models=("a", "b"))
    value = f"Bearer {secret}" if name == "authorization" else secret
    caller = await make_auth(sqlite, mode=mode).identify(peer((name, value), client="203.0.113.9"))
    assert caller == Caller("ann", key_id, True, frozenset({"a", "b"}))


HEADERS: list[tuple[str, list[tuple[str, str]], str | int]] = [
    ("bearer", [("authorization", "Bearer KEY")], "ann"),
    ("any case of the scheme", [("authorization", "bEARER KEY")], "ann"),
    ("more space", [("authorization", "  Bearer    KEY  ")], "ann"),
    ("space around", [("x-api-key", " KEY ")], "ann"),
    ("the same in two headers", [("x-api-key", "KEY"), ("api-key", "KEY")], "ann"),
    ("the same in all", [("x-api-key", "KEY"), ("api-key", "KEY"), ("authorization", "Bearer KEY")], "ann"),
    ("the same twice", [("authorization", "Bearer KEY"), ("authorization", "Bearer KEY")], "ann"),
    ("one of them empty", [("x-api-key", ""), ("authorization", "Bearer KEY")], "ann"),
    ("two authorizations", [("authorization", "Bearer KEY"), ("authorization", "Bearer OTHER")], 400),
    ("two api keys", [("x-api-key", "KEY"), ("x-api-key", "OTHER")], 400),
    ("two headers", [("authorization", "Bearer KEY"), ("x-api-key", "OTHER")], 400),
    ("two headers, the good one last", [("api-key", "OTHER"), ("x-api-key", "KEY")], 400),
    ("a longer one", [("authorization", "Bearer KEY"), ("x-api-key", "KEYx")], 400),
    ("none", [], 401),
    ("empty", [("authorization", "")], 401),
    ("empty key", [("x-api-key", "")], 401),
    ("only spaces", [("authorization", "   ")], 401),
    ("no key after the scheme", [("authorization", "Bearer")], 401),
    ("only spaces after the scheme", [("authorization", "Bearer   ")], 401),
    ("no scheme", [("authorization", "KEY")], 401),
    ("basic", [("authorization", "Basic KEY")], 401),
    ("token", [("authorization", "Token KEY")], 401),
    ("wrong scheme beside a good key", [("authorization", "Basic eA=="), ("x-api-key", "KEY")], 401),
    ("a list", [("authorization", "Bearer KEY, Bearer OTHER")], 401),
    ("another header", [("x-key", "KEY"), ("cookie", "authorization=KEY")], 401),
    ("in a cookie", [("cookie", "api-key=KEY")], 401),
]


@pytest.mark.parametrize(("headers", "expected"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
async def test_where_a_key_may_be(sqlite: Database, headers: list[tuple[str, str]], expected: str | int) -> None:
    _, secret = await add_key(sqlite)
    _, other = await add_key(sqlite, "bob")
    sent = [(name, value.replace("KEY", secret).replace("OTHER", other)) for name, value in headers]
    assert await answer(make_auth(sqlite), peer(LOCAL, *sent)) == expected


@pytest.mark.parametrize("mode", ["auto", "keys", "open"])
@pytest.mark.parametrize(
    "query",
    ["key=x", "api_key=x", "api-key=x", "API_KEY=x", "a=b&access_token=x", "x-api-key=x", "a=sk-abc", "k%65y=x"],
)
async def test_a_key_in_the_query_string_is_refused_with_words(sqlite: Database, mode: str, query: str) -> None:
    _, secret = await add_key(sqlite)
    asking = peer(LOCAL, bearer(secret), query=query)
    with pytest.raises(BadRequest, match="URL") as caught:
        await make_auth(sqlite, mode=mode).identify(asking)
    assert caught.value.code == "key_in_query"
    assert "sk-abc" not in caught.value.message


@pytest.mark.parametrize("query", ["", "limit=5", "key=", "monkey=1", "a=ask-me", "&&==", "%ff=%00"])
async def test_other_queries_pass(sqlite: Database, query: str) -> None:
    assert await answer(make_auth(sqlite), peer(LOCAL, query=query)) == KEYLESS


# Keys that are not ours


SQL = [
    "' OR '1'='1", "' OR 1=1 --", '" OR ""="', "'; DROP TABLE api_keys; --", "' UNION SELECT * FROM api_keys --", "\\'",
    "1; SELECT pg_sleep(10)", "admin'/*", "%' OR '%'='", "$1", "' || (SELECT digest FROM api_keys) || '", "a\x00b",
    "'" * 8192, "\xbf'", "ÿ", "\uff10", "🙂", "%", "_", "*", ".*", "[a-z]*", "null", "undefined", "None", "true", "0",
]  # fmt: skip


@pytest.mark.parametrize("payload", SQL, ids=range(len(SQL)))
async def test_payloads_are_only_wrong_keys(sqlite: Database, payload: str) -> None:
    """A1, A2: they reach the database as a digest."""
    _, secret = await add_key(sqlite)
    auth = make_auth(sqlite)
    bodies = set()
    for sent in (payload, secret + payload, payload + secret):
        with pytest.raises(Unauthenticated) as caught:
            await auth.identify(peer(LOCAL, bearer(sent)))
        bodies.add(caught.value.message)
    assert len(bodies) == 1
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"


@pytest.mark.parametrize("same", [20, 32, 64])
async def test_keys_with_the_same_beginning_are_two_keys(sqlite: Database, same: int) -> None:
    """A5. Asked in both orders, so that neither is taken for the other from memory."""
    start = ("sk-" + "a" * 64)[:same]
    await add_key(sqlite, "ann", start + "1")
    await add_key(sqlite, "bob", start + "2")
    auth = make_auth(sqlite)
    for _ in range(2):
        asked = [await answer(auth, peer(LOCAL, bearer(start + end))) for end in "1213"]
        assert asked == ["ann", "bob", "ann", 401]


async def test_keys_that_differ_in_a_bit_or_in_case(sqlite: Database) -> None:
    _, secret = await add_key(sqlite)
    auth = make_auth(sqlite)
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
    flipped = [secret[:at] + chr(ord(secret[at]) ^ 1) + secret[at + 1 :] for at in (0, 10, len(secret) - 1)]
    for other in [*flipped, secret.swapcase(), secret[:-1], secret + "a", secret.removeprefix("sk-")]:
        assert await answer(auth, peer(LOCAL, bearer(other))) == 401


@pytest.mark.parametrize("shown", [str, str.upper, lambda text: f"sha256:{text}", lambda text: f"sk-{text}"])
async def test_the_stored_digest_is_no_key(sqlite: Database, shown: Callable[[str], str]) -> None:
    _, secret = await add_key(sqlite)
    assert await answer(make_auth(sqlite), peer(LOCAL, bearer(shown(digest(secret))))) == 401
    admin = make_auth(sqlite, admin_key=ADMIN_KEY)
    assert await answer(admin, peer(LOCAL, bearer(shown(digest(ADMIN_KEY))))) == 401


@pytest.mark.parametrize("kind", ["stored", "admin"])
async def test_keys_are_compared_in_constant_time(sqlite: Database, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def spy(one: str, other: str) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    _, secret = await add_key(sqlite)
    sent = secret if kind == "stored" else ADMIN_KEY
    auth = make_auth(sqlite, admin_key=ADMIN_KEY)
    monkeypatch.setattr(auth_module, "hmac", type("spied", (), {"compare_digest": staticmethod(spy)}))
    await auth.identify(peer(LOCAL, bearer(sent)))
    assert (digest(sent), digest(sent)) in compared


async def test_a_row_that_the_database_should_not_have_found_lets_nobody_in(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collation that ignores case, say: the comparison decides, not the look-up."""
    await add_key(sqlite)

    async def careless(_database: Database, asked: Sequence[str], _now: int) -> dict[str, StoredKey]:
        return {found: stored_key(digest=found.upper()) for found in asked}

    monkeypatch.setattr(keys, "by_digests", careless)
    assert await answer(make_auth(sqlite), peer(LOCAL, bearer("sk-a"))) == 401


# The life of a key


async def test_a_revoked_key_is_refused_by_the_next_call_everywhere(sqlite: Database) -> None:
    """A9. Two workers, both of which know the key."""
    key_id, secret = await add_key(sqlite)
    _, other = await add_key(sqlite, "bob")
    one, two = make_auth(sqlite), make_auth(sqlite)
    asking = peer(LOCAL, bearer(secret))
    assert [await answer(auth, asking) for auth in (one, two, one)] == ["ann"] * 3
    await keys.revoke(sqlite, key_id, NOON)
    assert [await answer(auth, asking) for auth in (two, one, two)] == [401] * 3
    assert await answer(two, peer(LOCAL, bearer(other))) == "bob"


async def test_a_key_that_was_unknown_is_known_once_it_is_made(sqlite: Database) -> None:
    await add_key(sqlite)
    auth, secret = make_auth(sqlite), new_key()
    assert await answer(auth, peer(LOCAL, bearer(secret))) == 401
    await add_key(sqlite, "bob", secret)
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "bob"


@pytest.mark.parametrize(("left", "expected"), [(60_000, "ann"), (-1, 401), (0, 401)])
async def test_a_key_ends_at_its_time(sqlite: Database, left: int, expected: str | int) -> None:
    _, secret = await add_key(sqlite, expires_at=int(time.time() * 1000) + left)
    assert await answer(make_auth(sqlite), peer(LOCAL, bearer(secret))) == expected


async def test_a_key_ends_at_its_time_even_when_it_is_remembered(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = await add_key(sqlite, expires_at=int(time.time() * 1000) + 60_000)
    auth = make_auth(sqlite)
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert await answer(auth, peer(LOCAL, bearer(secret))) == 401


async def test_who_was_identified_is_recognized_as_long_as_it_would_be_identified(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsteady = Unsteady(sqlite)
    auth = make_auth(unsteady)
    key_id, secret = await add_key(sqlite, expires_at=int(time.time() * 1000) + 60_000)
    revoked_id, revoked = await add_key(sqlite, "bob")
    for one in (secret, revoked):
        caller = await auth.identify(peer(LOCAL, bearer(one)))
        assert caller.digest == digest(one)
        assert await auth.recognize(digest(one)) == caller
    await keys.revoke(sqlite, revoked_id, NOON)
    assert await auth.recognize(digest(revoked)) is None
    assert await auth.recognize(digest(secret)) is None, "the keys have changed, so it is looked up again"
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
    found = await auth.recognize(digest(secret))
    assert found is not None
    assert found.key_id == key_id
    unsteady.down = True
    with pytest.raises(DatabaseUnavailable):
        await auth.recognize(digest(secret))
    unsteady.down = False
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert await auth.recognize(digest(secret)) is None


async def test_who_is_recognized_without_a_round_trip(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = make_auth(sqlite)
    _, secret = await add_key(sqlite)
    assert auth.recognize_at_once(digest(secret)) is None
    caller = await auth.identify(peer(LOCAL, bearer(secret)))
    monkeypatch.setattr("gateway.key_watch.GOOD_SECONDS", 1e9)
    assert auth.recognize_at_once(digest(secret)) == caller
    assert auth.recognize_at_once(digest("sk-another")) is None
    monkeypatch.setattr("gateway.key_watch.GOOD_SECONDS", 0.0)
    assert auth.recognize_at_once(digest(secret)) is None


@pytest.mark.parametrize("admin_key", ["", "sk-admin"])
async def test_nobody_is_recognized_without_a_key_of_the_database(sqlite: Database, admin_key: str) -> None:
    auth = make_auth(sqlite, admin_key=admin_key)
    caller = await auth.identify(peer(LOCAL, *([bearer(admin_key)] if admin_key else [])))
    assert caller.digest is None
    assert await auth.recognize(digest("sk-admin")) is None


async def test_what_was_looked_up_is_remembered_misses_too(sqlite: Database) -> None:
    """A15. One look-up for each key, whatever the number of calls."""
    unsteady = Unsteady(sqlite)
    _, secret = await add_key(sqlite)
    auth = make_auth(unsteady)
    for _ in range(5):
        assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
        assert await answer(auth, peer(LOCAL, bearer("sk-wrong"))) == 401
    assert len([sql for sql in unsteady.fetched if "api_keys" in sql]) == 2


async def test_both_secrets_are_good_while_a_rotation_lasts(sqlite: Database) -> None:
    key_id, old = await add_key(sqlite)
    new = new_key()
    auth = make_auth(sqlite)
    assert await answer(auth, peer(LOCAL, bearer(old))) == "ann"
    now = int(time.time() * 1000)
    await keys.rotate(sqlite, key_id, digest(new), new[-4:], now + 60_000)
    assert [await answer(auth, peer(LOCAL, bearer(one))) for one in (old, new)] == ["ann", "ann"]
    callers = [await auth.identify(peer(LOCAL, bearer(one))) for one in (old, new)]
    assert [(caller.key_id, caller.digest) for caller in callers] == [(key_id, digest(old)), (key_id, digest(new))]
    await keys.rotate(sqlite, key_id, digest(new), new[-4:], None)
    assert [await answer(auth, peer(LOCAL, bearer(one))) for one in (old, new)] == [401, "ann"]


async def test_the_overlap_ends_at_its_time_even_when_the_old_secret_is_remembered(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, old = await add_key(sqlite)
    await keys.rotate(sqlite, key_id, "0" * 64, "abcd", int(time.time() * 1000) + 60_000)
    auth = make_auth(sqlite)
    assert await answer(auth, peer(LOCAL, bearer(old))) == "ann"
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert await answer(auth, peer(LOCAL, bearer(old))) == 401


async def test_a_revoked_key_has_no_second_secret(sqlite: Database) -> None:
    key_id, old = await add_key(sqlite)
    await keys.rotate(sqlite, key_id, "0" * 64, "abcd", int(time.time() * 1000) + 60_000)
    await keys.revoke(sqlite, key_id, NOON)
    assert await answer(make_auth(sqlite), peer(LOCAL, bearer(old))) == 401


# The same caller, once the keys are known to have changed


async def test_a_caller_has_the_limits_of_its_key_and_the_revision_it_was_found_under(sqlite: Database) -> None:
    limits = {"requests_per_minute": 1, "request_burst": 2, "tokens_per_minute": 3, "token_burst": 4, "max_parallel": 5,
              "budget_nanousd": 6, "budget_period": "day", "per_end_user": True}  # fmt: skip
    _, secret = await add_key(sqlite, **limits)
    caller = await make_auth(sqlite).identify(peer(LOCAL, bearer(secret)))
    assert caller.limits == KeyLimits(1, 2, 3, 4, 5, 6, "day", per_end_user=True)
    assert (caller.revision, caller.digest) == (1, digest(secret))
    assert digest(secret) not in repr(caller)


async def test_again_is_the_same_caller_with_what_its_key_has_now(sqlite: Database) -> None:
    key_id, secret = await add_key(sqlite)
    auth = make_auth(sqlite)
    caller = await auth.identify(peer(LOCAL, bearer(secret)))
    await keys.update(sqlite, key_id, lambda key: replace(key, requests_per_minute=7, models=("m",)))
    found = await auth.again(caller, await keys.state(sqlite))
    assert found == Caller("ann", key_id, False, frozenset({"m"}), KeyLimits(requests_per_minute=7))
    assert (found.revision, found.digest) == (2, caller.digest)


@pytest.mark.parametrize("how", ["revoked", "expired", "gone", "rotated"])
async def test_again_refuses_a_key_that_is_no_more(sqlite: Database, how: str) -> None:
    key_id, secret = await add_key(sqlite)
    auth = make_auth(sqlite)
    caller = await auth.identify(peer(LOCAL, bearer(secret)))
    changes: dict[str, Callable[[StoredKey], StoredKey]] = {
        "revoked": lambda key: replace(key, revoked_at=NOON),
        "expired": lambda key: replace(key, expires_at=1),
        "gone": lambda key: replace(key, digest="0" * 64),
        "rotated": lambda key: key.rotated("0" * 64, "abcd", None),
    }
    await keys.update(sqlite, key_id, changes[how])
    with pytest.raises(Unauthenticated, match="not valid, or no longer"):
        await auth.again(caller, await keys.state(sqlite))


async def test_again_without_a_key(sqlite: Database) -> None:
    auth = make_auth(sqlite)
    caller = await auth.identify(ALL_GOOD)
    assert await auth.again(caller, KeyState(1, ever_made=False)) == caller
    with pytest.raises(Unauthenticated, match="needs an API key"):
        await auth.again(caller, KeyState(2, ever_made=True))
    wide = make_auth(sqlite, mode="open")
    found = await wide.again(await wide.identify(ALL_GOOD), KeyState(2, ever_made=True))
    assert (found, found.revision) == (Caller("default"), 2)
    assert (await wide.identify(ALL_GOOD)).revision == 2


async def test_again_for_the_admin_key_of_the_configuration(sqlite: Database) -> None:
    auth = make_auth(sqlite, admin_key=ADMIN_KEY)
    caller = await auth.identify(peer(bearer(ADMIN_KEY)))
    found = await auth.again(caller, KeyState(9, ever_made=True))
    assert (found, found.revision) == (caller, 9)


async def test_again_asks_the_database_only_for_what_it_does_not_know(sqlite: Database) -> None:
    unsteady = Unsteady(sqlite)
    _, secret = await add_key(sqlite)
    auth = make_auth(unsteady)
    caller = await auth.identify(peer(LOCAL, bearer(secret)))
    asked = len(unsteady.fetched)
    for _ in range(5):
        assert await auth.again(caller, KeyState(7, ever_made=True)) == caller
    assert len(unsteady.fetched) == asked + 1


# Many wrong keys


def without_refill(database: Database) -> Auth:
    """However long the test takes, no address gets another try."""
    auth = make_auth(database)
    auth._wrong = WrongKeys(lambda: 0.0)
    return auth


async def test_many_wrong_keys_from_one_address_are_told_to_wait(sqlite: Database) -> None:
    """A15. A right key from the same address is not, nor is another address."""
    _, secret = await add_key(sqlite)
    auth = without_refill(sqlite)
    answers = await asyncio.gather(*(answer(auth, peer(LOCAL, bearer(f"sk-{number}"))) for number in range(130)))
    assert answers == [401] * 100 + [429] * 30
    with pytest.raises(RateLimited) as caught:
        await auth.identify(peer(LOCAL, bearer("sk-0")))
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    assert caught.value.headers["retry-after"] == "1"
    assert caught.value.headers["retry-after-ms"] == "100"
    assert await answer(auth, peer(LOCAL, bearer(secret))) == "ann"
    assert await answer(auth, peer(LOCAL, bearer("sk-0"), client="203.0.113.7")) == 401


async def test_no_key_at_all_is_not_a_wrong_one(sqlite: Database) -> None:
    await add_key(sqlite)
    auth = without_refill(sqlite)
    assert {await answer(auth, peer(LOCAL)) for _ in range(150)} == {401}


async def test_behind_a_trusted_proxy_the_address_is_the_one_it_tells(sqlite: Database) -> None:
    await add_key(sqlite)
    auth = without_refill(sqlite)

    def wrong(told: str, behind: tuple[str, ...] = ("10.0.0.0/8",)) -> Peer:
        return peer(LOCAL, bearer("sk-wrong"), ("x-forwarded-for", told), client="10.0.0.1", behind=behind)

    answers = [await answer(auth, wrong("203.0.113.1")) for _ in range(130)]
    assert 429 in answers
    assert await answer(auth, wrong("203.0.113.2")) == 401
    answers = [await answer(auth, wrong(f"203.0.113.{number}", ())) for number in range(130)]
    assert 429 in answers, "nobody trusts that proxy, so it is the address"


async def test_a_thousand_wrong_keys_are_a_handful_of_queries(sqlite: Database) -> None:
    """A15."""
    unsteady = Unsteady(sqlite)
    _, secret = await add_key(sqlite)
    auth = without_refill(unsteady)
    asking = [peer(LOCAL, bearer(f"sk-{number}")) for number in range(1000)] + [peer(LOCAL, bearer(secret))]
    answers = await asyncio.gather(*(answer(auth, one) for one in asking))
    assert answers[-1] == "ann"
    assert (answers.count(401), answers.count(429)) == (100, 900)
    assert len(unsteady.fetched) <= 20
    assert {await answer(auth, one) for one in asking[:-1]} == {429}
    assert len([sql for sql in unsteady.fetched if "api_keys" in sql]) <= 18


# The admin key


async def test_the_admin_key_needs_no_row_and_is_an_admin(sqlite: Database) -> None:
    auth = make_auth(sqlite, admin_key=ADMIN_KEY)
    caller = await auth.identify(peer(("x-api-key", ADMIN_KEY), client="203.0.113.9"))
    assert caller == Caller("admin", None, is_admin=True)
    assert await answer(auth, peer(LOCAL, bearer(ADMIN_KEY + "x"))) == 401
    assert await answer(auth, peer(LOCAL, bearer(""))) == 401


@pytest.mark.parametrize("key", ["schlüssel", "🔑🔑🔑", "with space in it"])
async def test_an_admin_key_may_be_any_text(sqlite: Database, key: str) -> None:
    assert await answer(make_auth(sqlite, admin_key=key), peer(("x-api-key", key))) == "admin"


async def test_without_an_admin_key_an_empty_one_is_none(sqlite: Database) -> None:
    auth = make_auth(sqlite, mode="keys", admin_key="")
    assert await answer(auth, peer(LOCAL, ("x-api-key", ""))) == 401
    assert not auth.is_configured_admin(peer(LOCAL, ("x-api-key", "")))


async def test_the_configured_admin_is_known_while_the_database_is_down(sqlite: Database) -> None:
    unsteady = Unsteady(sqlite)
    unsteady.down = True
    auth = make_auth(unsteady, admin_key=ADMIN_KEY)
    assert auth.is_configured_admin(peer(bearer(ADMIN_KEY)))
    for headers in ([], [bearer("sk-x")], [("authorization", "Basic x")], [bearer(ADMIN_KEY), ("api-key", "x")]):
        assert not auth.is_configured_admin(peer(*headers))


# What a caller may do


@pytest.mark.parametrize(
    "name",
    ["gpt-4o-mini", "GPT-4o", "gpt-4o ", " gpt-4o", "gpt-4\u043e", "openai/gpt-4o", "*", "gpt*", "", "gpt-4o\x00"],
)
def test_a_key_may_use_only_its_models(name: str) -> None:
    """A10. The second `o` of one of them is Cyrillic."""
    caller = Caller("ann", models=frozenset({"gpt-4o"}))
    caller.check_model("gpt-4o")
    with pytest.raises(PermissionDenied) as caught:
        caller.check_model(name)
    assert (caught.value.status, caught.value.param) == (403, "model")


def test_a_key_with_no_list_may_use_all_and_with_an_empty_one_none() -> None:
    Caller("ann").check_model("anything")
    with pytest.raises(PermissionDenied):
        Caller("ann", models=frozenset()).check_model("anything")


# Making keys


def test_new_keys_look_like_keys_and_differ() -> None:
    made = [new_key() for _ in range(200)]
    assert len(set(made)) == 200
    assert all(key.startswith("sk-") and len(key) >= 46 for key in made)
    assert set("".join(made)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def test_a_key_is_stored_as_its_sha256() -> None:
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_credential_of_a_request_with_none() -> None:
    assert credential(peer(LOCAL)) is None
    assert credential(replace(peer(LOCAL), headers=[(b"x-api-key", b"\xff\xfe")])) is not None
