"""`statements`: several rows of an INSERT by one statement, in pieces of sixteen; everything else row by row."""

from __future__ import annotations

from gateway.store.database import Value
from gateway.store.sqlite_statements import ROWS_AT_ONCE, statements

ADD = "INSERT INTO notes (id, text) VALUES ($1, $2)"


def said(sql: str, rows: list[tuple[Value, ...]]) -> list[tuple[str, list[Value]]]:
    return [(text, list(values)) for text, values in statements(sql, rows)]


def test_rows_are_inserted_together_and_their_statement_keeps_nothing_to_undo() -> None:
    assert said(ADD, [("a", 1), ("b", 2)]) == [
        ("INSERT OR FAIL INTO notes (id, text) VALUES (?, ?), (?, ?)", ["a", 1, "b", 2])
    ]


def test_a_row_of_its_own_is_inserted_as_it_is_said() -> None:
    assert said(ADD, [("a", 1)]) == [("INSERT INTO notes (id, text) VALUES (?, ?)", ["a", 1])]


def test_many_rows_go_in_pieces() -> None:
    rows: list[tuple[Value, ...]] = [(str(number), number) for number in range(2 * ROWS_AT_ONCE + 1)]
    pieces = said(ADD, rows)
    assert [len(values) // 2 for _, values in pieces] == [ROWS_AT_ONCE, ROWS_AT_ONCE, 1]
    assert [value for _, values in pieces for value in values] == [value for row in rows for value in row]


def test_rows_that_are_looked_up_are_inserted_together() -> None:
    sql = "INSERT INTO notes (id, text) SELECT $2, o.text FROM others o WHERE o.id = $1"
    assert said(sql, [("x", "a"), ("y", "b")]) == [
        (
            "INSERT OR FAIL INTO notes (id, text) SELECT ?, o.text FROM others o WHERE o.id = ?"
            " UNION ALL SELECT ?, o.text FROM others o WHERE o.id = ?",
            ["a", "x", "b", "y"],
        )
    ]


def test_what_may_read_or_change_a_row_of_the_same_batch_goes_row_by_row() -> None:
    for sql in (
        "INSERT INTO notes (id, text) SELECT $1, n.text FROM notes n WHERE n.id = $2",
        "INSERT INTO notes (id, text) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET text = excluded.text",
        "UPDATE notes SET text = $1 WHERE id = $2",
    ):
        assert [values for _, values in said(sql, [("a", "b"), ("c", "d")])] == [["a", "b"], ["c", "d"]]
