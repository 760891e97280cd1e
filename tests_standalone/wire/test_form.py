"""Forms as clients write them, and as nobody should: where the parts stand, the texts, and what a new text changes."""

from __future__ import annotations

from email.parser import BytesParser
from email.policy import HTTP

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.wire.form import MAX_PART_HEAD, MAX_TEXT, MOST_OPTIONS, MOST_PARTS, Form

TYPE = "multipart/form-data; boundary=b"
MODEL = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nold\r\n'
FILE = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    b"\x89PNG\r\n\x1a\n\x00 --b \r\n-b\r\n\r\n"
)
END = b"--b--\r\n"


def parse(*pieces: bytes, content_type: str = TYPE) -> Form:
    return Form.parse(content_type, b"".join(pieces))


def field(disposition: bytes, value: bytes = b"v", *headers: bytes) -> bytes:
    lines = [b"Content-Disposition: " + disposition, *headers]
    return b"--b\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + value + b"\r\n"


def values(form: Form) -> list[tuple[str, str | None, bytes]]:
    return [(part.name, part.filename, form.raw[part.start : part.end]) for part in form.parts]


def as_python_reads(content_type: str, raw: bytes) -> list[tuple[str, str | None, bytes]]:
    message = BytesParser(policy=HTTP).parsebytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + raw)
    assert not message.defects
    return [
        (str(part.get_param("name", header="content-disposition")), part.get_filename(), part.get_payload(decode=True))  # type: ignore[misc] # none of them is multipart
        for part in message.iter_parts()
    ]


# What is read


def test_texts_and_files() -> None:
    form = parse(MODEL, FILE, field(b'form-data; name="prompt"', "Füge hinzu".encode()), END)
    assert form.texts == {"model": "old", "prompt": "Füge hinzu"}
    assert values(form) == [
        ("model", None, b"old"),
        ("file", "a.png", b"\x89PNG\r\n\x1a\n\x00 --b \r\n-b\r\n"),
        ("prompt", None, "Füge hinzu".encode()),
    ]


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="b"',
        "multipart/form-data;boundary=b",
        "Multipart/Form-Data; charset=utf-8; BOUNDARY=b;",
        'multipart/form-data; x="a;boundary=no"; boundary=b ',
    ],
)
def test_the_boundary_however_it_is_told(content_type: str) -> None:
    assert parse(MODEL, END, content_type=content_type).texts == {"model": "old"}


@pytest.mark.parametrize(
    ("disposition", "name", "filename"),
    [
        (b"form-data; name=a", "a", None),
        (b'FORM-DATA;NAME="a"', "a", None),
        (b'form-data; name="a";', "a", None),
        (b'form-data; name=""', "", None),
        (b'form-data; name="a b; c=d"', "a b; c=d", None),
        (b'form-data; name="a\\"b\\\\c"', 'a"b\\c', None),
        (b'form-data; name="a%22b"', "a%22b", None),
        ('form-data; name="ä"; filename="世界.txt"'.encode(), "ä", "世界.txt"),
        (b'form-data; name="a"; filename="C:\\dir\\x.png"', "a", "C:\\dir\\x.png"),
        (b'form-data; filename="x;name=y"; name="a"', "a", "x;name=y"),
        (b'form-data; name="a"; filename=""', "a", ""),
        (b'form-data; name="a"; filename="x.png"; filename*=utf-8\'\'%C3%A4.png', "a", "x.png"),
        (b"form-data; name=\"a\"; filename*=utf-8''%C3%A4.png", "a", ""),
    ],
)
def test_names_as_clients_write_them(disposition: bytes, name: str, filename: str | None) -> None:
    assert values(parse(field(disposition), END)) == [(name, filename, b"v")]


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n" + MODEL + END,
        MODEL + END + b"an epilogue\r\n--b\r\nno part of it",
        MODEL + b"--b--",
        MODEL + b"--b-- \t\r\n",
        MODEL.replace(b"--b\r\n", b"--b \t \r\n") + END,
        MODEL.replace(b"Content-Disposition: ", b"Content-Type: text/plain\r\ncontent-disposition:") + END,
    ],
    ids=["empty line", "epilogue", "no last line end", "padded end", "padded start", "other headers"],
)
def test_what_may_stand_around(raw: bytes) -> None:
    form = parse(raw)
    assert form.texts == {"model": "old"}
    assert form.with_text("model", "new").raw == raw.replace(b"old", b"new")


@pytest.mark.parametrize(
    "value", [b"", b"\r\n", b"\r\n\r\n", b"-", b"--", b"x--b", b" \r\n --b--", b"\r\n--a", b"\x00\n"]
)
def test_values_that_look_like_something_else(value: bytes) -> None:
    assert values(parse(field(b'form-data; name="a"', value), MODEL, END))[0] == ("a", None, value)


def test_a_form_without_fields() -> None:
    form = parse(END)
    assert (form.parts, form.texts) == ((), {})


def test_of_a_name_that_comes_twice_the_last_counts() -> None:
    assert parse(MODEL, MODEL.replace(b"old", b"last"), END).texts == {"model": "last"}


def test_a_file_of_the_same_name_is_no_text() -> None:
    assert parse(MODEL, field(b'form-data; name="model"; filename="x"', b"file"), END).texts == {"model": "old"}


def test_bytes_that_are_no_utf8() -> None:
    assert parse(field(b'form-data; name="a"', b"\xff\xfe"), END).texts == {"a": "\ufffd\ufffd"}


def test_a_long_text() -> None:
    assert len(parse(field(b'form-data; name="a"', b"x" * MAX_TEXT), END).texts["a"]) == MAX_TEXT


def test_as_many_parts_as_allowed() -> None:
    assert len(parse(MODEL * MOST_PARTS, END).parts) == MOST_PARTS


# What is refused


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="b',
        "multipart/form-data; boundary=" + "b" * 201,
        "multipart/form-data; boundary=b; boundary=c",
        "multipart/form-data; boundary*=utf-8''b",
        "multipart/form-data; boundary=b; boundary*0=c",
        "multipart/form-data; boundary",
        "multipart/form-data; boundary=b c",
    ],
)
def test_a_boundary_that_is_not_told_or_twice(content_type: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(MODEL, END, content_type=content_type)
    assert caught.value.code == "invalid_form"


BROKEN = {
    "nothing": b"",
    "no form": b"model=old",
    "another boundary": MODEL.replace(b"--b", b"--c") + END.replace(b"--b", b"--c"),
    "no last boundary": MODEL,
    "cut in the last boundary": MODEL + b"--b-",
    "cut in a value": MODEL[:-2],
    "cut in the headers": MODEL[:30],
    "line ends of LF": (MODEL + END).replace(b"\r\n", b"\n"),
    "a boundary that goes on": MODEL + b"--bb\r\n" + MODEL + END,
    "a last boundary that goes on": MODEL + b"--b--b\r\n",
    "a boundary after LF": field(b'form-data; name="a"', b"x\n--b\r\n") + END,
    "a boundary after LF, in front": b"x\n" + MODEL + MODEL + END,
    "a boundary after CR": field(b'form-data; name="a"', b"x\r--b") + END,
    "a value that is a boundary": field(b'form-data; name="a"', b"--b") + END,
    "no headers": b"--b\r\n\r\nvalue\r\n" + END,
    "nothing in a part": b"--b\r\n\r\n" + END,
    "headers alone": b'--b\r\nContent-Disposition: form-data; name="a"\r\n' + END,
    "no disposition": b"--b\r\nContent-Type: text/plain\r\n\r\nv\r\n" + END,
    "two dispositions": field(b'form-data; name="a"', b"v", b'content-disposition: form-data; name="model"') + END,
    "another disposition": field(b'attachment; name="a"') + END,
    "no name": field(b'form-data; filename="a"') + END,
    "two names": field(b'form-data; name="a"; name="model"') + END,
    "an encoded name": field(b"form-data; name=\"a\"; name*=utf-8''model") + END,
    "a name in pieces": field(b'form-data; name*0="mo"; name*1="del"') + END,
    "two filenames": field(b'form-data; name="a"; filename="x"; filename="y"') + END,
    "a quote that stays open": field(b'form-data; name="a') + END,
    "an option without value": field(b'form-data; name="a"; x') + END,
    "a header on two lines": field(b'form-data; name="a";\r\n name="model"') + END,
    "a header without colon": b'--b\r\nx\r\nContent-Disposition: form-data; name="a"\r\n\r\nv\r\n' + END,
    "a header with a space in its name": field(b'form-data; name="a"', b"v", b"x : y") + END,
    "a header with LF": field(b'form-data; x="\nContent-Disposition: form-data"; name="a"') + END,
    "a header with CR": field(b'form-data; name="a\rb"') + END,
    "a header with NUL": field(b'form-data; name="a\x00b"') + END,
    "long headers": field(b'form-data; name="a"', b"v", b"x: " + b"x" * MAX_PART_HEAD) + END,
    "many options": field(b'form-data; name="a"' + b"".join(b";a%d=b" % n for n in range(MOST_OPTIONS))) + END,
    "many parts": MODEL * (MOST_PARTS + 1) + END,
    "very many parts": MODEL * 100_000 + END,
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN.keys())
def test_a_form_that_is_broken_or_can_be_read_in_two_ways(raw: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")


def test_a_text_that_is_too_long() -> None:
    with pytest.raises(BadRequest, match="The field 'a' is too long") as caught:
        parse(field(b'form-data; name="a"', b"x" * (MAX_TEXT + 1)), END)
    assert caught.value.param == "a"


@given(st.integers(0, len(MODEL + FILE + END) - 3))
def test_a_form_that_breaks_off_anywhere(cut: int) -> None:
    with pytest.raises(BadRequest):
        parse((MODEL + FILE + END)[:cut])


NAMED = b'Content-Disposition: form-data; name="a"'
PIECES = [b"--b", b"--b\r\n", b"--", b"\r\n", b"\n", NAMED, b"--b\r\n" + NAMED + b"\r\n\r\n", b" ", b"x", b"\r\n" + END]


@given(st.lists(st.sampled_from(PIECES)))
def test_what_is_taken_is_what_others_read(pieces: list[bytes]) -> None:
    try:
        form = parse(*pieces)
    except BadRequest:
        return
    if form.parts:  # the standard library finds no form where no field is
        assert values(form) == as_python_reads(TYPE, form.raw)
    assert values(form.with_text("model", "new")) == [("model", None, b"new"), *values(form)]


# A new text


def test_a_new_text_leaves_all_other_bytes() -> None:
    form = parse(FILE, MODEL, END).with_text("model", "a much longer näme")
    assert form.raw == FILE + MODEL.replace(b"old", "a much longer näme".encode()) + END
    assert form.texts == {"model": "a much longer näme"}
    assert values(form)[1] == ("model", None, "a much longer näme".encode())
    assert form == parse(form.raw)


def test_a_text_that_was_not_there_comes_first() -> None:
    form = parse(FILE, END).with_text("model", "new")
    assert form.raw == MODEL.replace(b"old", b"new") + FILE + END
    assert form == parse(form.raw)


@pytest.mark.parametrize("before", [b"", b"\r\n"])
def test_nor_does_an_empty_line_keep_it_from_coming(before: bytes) -> None:
    form = parse(before, FILE, END).with_text("model", "new")
    assert values(form)[0] == ("model", None, b"new")
    assert values(form)[1:] == values(parse(FILE, END))


def test_every_text_of_that_name_is_changed_and_no_file() -> None:
    file = field(b'form-data; name="model"; filename="x"', b"old")
    form = parse(MODEL, FILE, MODEL, file, END).with_text("model", "new")
    new = MODEL.replace(b"old", b"new")
    assert form.raw == new + FILE + new + file + END


# As others write and read them

names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='"\\%'), min_size=1, max_size=20)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
files = st.tuples(names, st.binary(max_size=500) | st.sampled_from([b"\r\n--", b"--\r\n\r\n", b"\r", b"\n", b"\r\n"]))


@given(st.dictionaries(names, texts, max_size=5), st.lists(st.tuples(names, files), min_size=1, max_size=4), names)
def test_what_the_sdks_client_writes(
    fields: dict[str, str], uploads: list[tuple[str, tuple[str, bytes]]], new: str
) -> None:
    request = httpx2.Request("POST", "http://localhost/", data=fields, files=uploads)
    raw = request.read()
    content_type = request.headers["content-type"]
    form = Form.parse(content_type, raw)
    assert form.texts == fields
    assert [(part.name, raw[part.start : part.end]) for part in form.parts if part.filename is not None] == [
        (name, content) for name, (_, content) in uploads
    ]
    changed = form.with_text("model", new)
    assert changed.texts == fields | {"model": new}
    assert Form.parse(content_type, changed.raw) == changed


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data; boundary=b\xe9", 'multipart/form-data; boundary="b "', "multipart/form-data; boundary=b\\x"],
)
def test_boundaries_that_are_read_differently_are_refused(content_type: str) -> None:
    with pytest.raises(BadRequest, match=r"boundary|header"):
        Form.parse(content_type, MODEL + END)


def test_what_stands_before_the_first_boundary_is_refused() -> None:
    """Others might find another first boundary in it."""
    with pytest.raises(BadRequest, match="does not begin with its boundary"):
        parse(b"a preamble, --b in its midst\r\n" + MODEL + END)
