"""Upstreams' errors by example: this body and status in, this failure out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UpstreamError
from gateway.wire.failures import error_from, error_in, streamed_error

WORDS = "No such thing."
SECRET = {"error": {"message": "Incorrect API key provided: sk-1234", "type": "auth", "code": "invalid_api_key"}}


def fields(failure: UpstreamError) -> tuple[int, str, str | None, str | None]:
    return failure.status, failure.type, failure.code, failure.param


class TestShapes:
    @pytest.mark.parametrize(
        "data",
        [
            {"error": {"message": WORDS}},
            {"error": {"detail": WORDS}},
            {"error": WORDS},
            {"message": WORDS},
            {"detail": WORDS},
            {"object": "error", "message": WORDS},
            {"error": None, "message": WORDS},
            {"error": True, "message": WORDS},
            [{"error": {"message": WORDS}}],
            WORDS,
        ],
    )
    def test_the_words_are_found(self, data: object) -> None:
        failure = error_from(data, 400, {})
        assert failure.message == WORDS
        assert fields(failure) == (400, "invalid_request_error", None, None)

    @pytest.mark.parametrize(
        "data", [None, [], {}, 5, True, [5], {"error": {}}, {"error": []}, {"detail": [{"loc": ["body"]}, 5]}]
    )
    def test_without_words_there_are_ours(self, data: object) -> None:
        failure = error_from(data, 422, {})
        assert failure.message == "The upstream refused the request with status 422."
        assert failure.status == 422

    @pytest.mark.parametrize(
        ("detail", "words"),
        [
            (
                [
                    {
                        "type": "missing",
                        "loc": ["body", "messages", 0, "role"],
                        "msg": "Field required",
                        "input": "secret",
                    }
                ],
                "body.messages.0.role: Field required",
            ),
            ([{"loc": ["body", "n"], "msg": "too many"}, {"msg": "x"}, "y", 5], "body.n: too many; x; y"),
            ([{"loc": "body", "msg": "x"}], "x"),
        ],
    )
    def test_fastapis_list_of_mistakes(self, detail: object, words: str) -> None:
        for data in ({"detail": detail}, {"error": {"detail": detail}}):
            assert error_from(data, 422, {}).message == words

    def test_xais_code_stands_beside_its_words(self) -> None:
        failure = error_from({"code": "Client specified an invalid argument", "error": WORDS}, 400, {})
        assert failure.message == WORDS
        assert fields(failure) == (400, "invalid_request_error", "Client specified an invalid argument", None)
        assert "Client" not in (failure.log or "")

    def test_a_sentence_without_spaces_stays_out_of_the_log(self) -> None:
        failure = error_from({"error": {"message": WORDS, "type": "bad_request", "code": "提示词不合规"}}, 400, {})
        assert failure.code == "提示词不合规"
        assert failure.log == "the upstream failed with status 400 type=bad_request"

    def test_azures_gateway(self) -> None:
        failure = error_from({"statusCode": 401, "message": "Access denied due to invalid key."}, 401, {})
        assert fields(failure) == (502, "upstream_error", "upstream_error", None)
        assert error_from({"statusCode": 404, "message": WORDS}, 404, {}).message == WORDS

    def test_azures_content_filter(self) -> None:
        told = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}}
        error = {"message": WORDS, "type": None, "param": "prompt", "code": "content_filter", "status": 400}
        failure = error_from({"error": error | {"innererror": told}}, 400, {})
        assert failure.message == WORDS
        assert fields(failure) == (400, "invalid_request_error", "content_filter", "prompt")

    def test_type_code_and_param_pass(self) -> None:
        error = {"message": WORDS, "type": "t", "code": "c", "param": "messages[0].role"}
        for data in ({"error": error}, error):
            assert fields(error_from(data, 400, {})) == (400, "t", "c", "messages[0].role")

    @pytest.mark.parametrize(
        ("code", "read"), [(400, "400"), ("400", "400"), (None, None), ({}, None), ([], None), (1.5, "1.5")]
    )
    def test_a_code_is_a_string_or_null(self, code: object, read: str | None) -> None:
        assert error_from({"error": {"message": WORDS, "code": code}}, 400, {}).code == read

    def test_long_words_are_cut(self) -> None:
        failure = error_from({"error": {"message": "x" * 10**6, "code": "c" * 10**6}}, 400, {})
        assert len(failure.message) == 2000
        assert len(failure.code or "") == 200
        assert len(failure.log or "") < 300


class TestStatuses:
    BODY = {"error": {"message": WORDS, "type": "t", "code": "c", "param": "p"}}

    @pytest.mark.parametrize("status", [400, 404, 409, 413, 415, 422])
    def test_the_clients_own_mistakes_pass(self, status: int) -> None:
        failure = error_from(self.BODY, status, {})
        assert failure.message == WORDS
        assert fields(failure) == (status, "t", "c", "p")

    @pytest.mark.parametrize(("status", "what"), [(401, "key"), (402, "balance"), (403, "permissions")])
    def test_the_operators_mistakes_keep_their_words_even_from_the_log(self, status: int, what: str) -> None:
        failure = error_from(SECRET, status, {})
        assert fields(failure) == (502, "upstream_error", "upstream_error", None)
        assert what in failure.message
        assert "sk-1234" not in failure.message
        assert f"status {status}" in (failure.log or "")
        assert "sk-1234" not in (failure.log or "")

    def test_a_rate_limit_passes_with_its_waiting_time(self) -> None:
        headers = {"retry-after": "7", "retry-after-ms": "6500", "x-other": "1"}
        failure = error_from(self.BODY, 429, headers)
        assert failure.headers == {"retry-after": "7", "retry-after-ms": "6500"}
        assert fields(failure)[:3] == (429, "t", "c")
        assert failure.message == WORDS

    @pytest.mark.parametrize(
        ("delay", "headers"),
        [
            ("12s", {"retry-after": "12", "retry-after-ms": "12000"}),
            ("0.847655710s", {"retry-after": "1", "retry-after-ms": "848"}),
            ("soon", {}),
            ("-1s", {}),
            ("9" * 99 + "s", {}),
            (12, {}),
        ],
    )
    def test_googles_delay_in_the_body(self, delay: object, headers: dict[str, str]) -> None:
        quota = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": []}
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
        error = {"code": 429, "message": WORDS, "status": "RESOURCE_EXHAUSTED", "details": [quota, 5, info]}
        for data in ({"error": error}, [{"error": error}]):
            failure = error_from(data, 429, {})
            assert failure.headers == headers
            assert failure.code == "429"
        assert error_from({"error": error}, 429, {"retry-after": "3"}).headers == {"retry-after": "3"}
        assert streamed_error(error).headers == headers

    def test_googles_bad_key_is_the_operators(self) -> None:
        details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
        error = {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT", "details": details}
        for failure in (error_from([{"error": error}], 400, {}), streamed_error(error)):
            assert failure.status == 502
            assert failure.upstream_status == 401
            assert "the gateway's key" in failure.message

    def test_an_empty_account_is_a_rate_limit_with_its_code(self) -> None:
        error = {"message": WORDS, "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}
        assert fields(error_from({"error": error}, 429, {})) == (429, "insufficient_quota", "insufficient_quota", None)

    def test_a_rate_limit_without_words(self) -> None:
        failure = error_from(None, 429, {})
        assert fields(failure) == (429, "requests", "rate_limit_exceeded", None)
        assert failure.headers == {}

    @pytest.mark.parametrize(
        ("status", "ours", "code"),
        [
            (408, 504, "upstream_timeout"),
            (504, 504, "upstream_timeout"),
            (503, 503, "upstream_error"),
            (529, 503, "upstream_error"),
            (500, 502, "upstream_error"),
            (502, 502, "upstream_error"),
            (418, 502, "upstream_error"),
            (301, 502, "upstream_error"),
            (204, 502, "upstream_error"),
        ],
    )
    def test_the_rest_is_the_upstreams_fault(self, status: int, ours: int, code: str) -> None:
        failure = error_from(self.BODY, status, {})
        assert fields(failure) == (ours, "upstream_error", code, None)
        assert WORDS not in failure.message

    @pytest.mark.parametrize("status", range(400, 530))
    @pytest.mark.parametrize("data", [None, {"error": {"message": WORDS, "code": 5}}])
    def test_every_status_says_what_the_upstream_said(self, status: int, data: object) -> None:
        failure = error_from(data, status, {})
        assert failure.upstream_status == status
        assert 400 <= failure.status <= 504
        assert failure.message
        assert f"{status}" in (failure.log or "")


class TestStreamed:
    """Errors inside a reply of status 200."""

    def test_without_a_status_it_is_the_upstreams_fault_in_its_words(self) -> None:
        failure = streamed_error({"message": WORDS, "type": "t", "code": "c"})
        assert failure.message == WORDS
        assert fields(failure) == (502, "t", "c", None)
        assert failure.upstream_status is None

    @pytest.mark.parametrize("error", [WORDS, {"message": WORDS}, {"object": "error", "message": WORDS, "code": None}])
    def test_with_words_only(self, error: object) -> None:
        failure = streamed_error(error)
        assert failure.message == WORDS
        assert fields(failure) == (502, "upstream_error", "upstream_error", None)

    @pytest.mark.parametrize("error", [True, 5, [], {}, {"message": 5}])
    def test_without_words(self, error: object) -> None:
        assert streamed_error(error).message == "The upstream reported an error."

    @pytest.mark.parametrize("code", [400, "400"])
    def test_a_code_that_is_a_status_is_taken_as_one(self, code: object) -> None:
        failure = streamed_error({"message": WORDS, "code": code})
        assert failure.message == WORDS
        assert fields(failure) == (400, "invalid_request_error", "400", None)
        assert failure.upstream_status == 400

    @pytest.mark.parametrize(("code", "status"), [(429, 429), (500, 502), (502, 502), (503, 503), (504, 504)])
    def test_the_words_stay(self, code: int, status: int) -> None:
        failure = streamed_error({"message": WORDS, "code": code})
        assert (failure.status, failure.message, failure.upstream_status) == (status, WORDS, code)

    @pytest.mark.parametrize("code", [401, 402, 403, "401"])
    def test_but_not_those_for_the_operator(self, code: object) -> None:
        failure = streamed_error(SECRET["error"] | {"code": code})
        assert failure.status == 502
        assert "sk-1234" not in failure.message

    @pytest.mark.parametrize("code", [0, 200, 399, 600, -1, "0400", "4e2", "²", "٤٠٠٠", "1" * 5000, True, 400.0, [400]])
    def test_other_codes_are_no_status(self, code: object) -> None:
        failure = streamed_error({"message": WORDS, "code": code})
        assert failure.status == 502
        assert failure.upstream_status is None


class TestErrorIn:
    """An event of a stream, or a reply of status 200: is it an error?"""

    @pytest.mark.parametrize(
        "data",
        [
            {"error": {"message": WORDS}},
            {"error": WORDS},
            {"error": {"message": WORDS}, "choices": []},
            {"object": "error", "message": WORDS},
            {"message": WORDS},
            {"detail": WORDS},
            {"detail": [{"msg": WORDS}]},
            {"code": "no", "error": WORDS},
            {"statusCode": 500, "message": WORDS},
        ],
    )
    def test_it_is(self, data: Any) -> None:
        found = error_in(data)
        assert found is not None
        assert streamed_error(found).message in (WORDS, "The upstream failed with status 500.")

    @pytest.mark.parametrize(
        "data",
        [
            {},
            {"error": None},
            {"error": ""},
            {"error": {}},
            {"choices": [], "message": WORDS},
            {"usage": {}, "message": WORDS},
            {"timings": {}, "detail": WORDS},
            {"message": None},
            {"prompt_filter_results": []},
        ],
    )
    def test_it_is_not(self, data: Any) -> None:
        assert error_in(data) is None

    def test_a_code_beside_the_words_stays_with_them(self) -> None:
        assert streamed_error(error_in({"code": "no", "error": WORDS})).code == "no"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["error", "message", "detail", "details", "code", "type", "param"]), inner, max_size=4
        )
    ),
)


@given(_JSON, st.integers(100, 599))
def test_any_body_makes_a_failure_that_can_be_told(data: Any, status: int) -> None:
    for failure in (error_from(data, status, {}), streamed_error(data)):
        assert 400 <= failure.status <= 599
        assert failure.message
        assert isinstance(failure.type, str)
        assert failure.code is None or isinstance(failure.code, str)
        assert failure.param is None or isinstance(failure.param, str)
