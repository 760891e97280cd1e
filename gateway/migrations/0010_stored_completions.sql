-- Chat completions that were asked for with `store: true`. `pk` and the `id` that the gateway gives hold the same digits,
-- which begin with the time: the order of `pk` is the order of the calls, and a cursor is good after its row is gone.
-- `metadata` is a JSON object of texts; `completion` is the object as the client saw it, without metadata and conversation;
-- `messages` is the array of rows that the messages' path shows. A deleted one is gone: what it cost is in `usage_rows`.
CREATE TABLE stored_completions (
    pk TEXT PRIMARY KEY,
    id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    key_id TEXT,
    conversation_id TEXT,
    created_at BIGINT NOT NULL,
    model TEXT NOT NULL,
    metadata TEXT NOT NULL,
    completion TEXT NOT NULL,
    messages TEXT NOT NULL
);

-- To find one. The id comes first: an index that begins with the user is for lists, and looks for one take care that no
-- planner without statistics uses it for them (store/stored.py).
CREATE UNIQUE INDEX stored_completions_by_id ON stored_completions (id, user_id);

-- To list those of a user.
CREATE INDEX stored_completions_by_user ON stored_completions (user_id, pk);

-- What one can be found by: a digest of each pair of its metadata, of the model that was asked and of the one that
-- answered. A digest, because a pair can be longer than an entry of an index.
CREATE TABLE stored_labels (
    completion_pk TEXT NOT NULL,
    label TEXT NOT NULL,
    user_id TEXT NOT NULL,
    PRIMARY KEY (completion_pk, label)
);

CREATE INDEX stored_labels_by_user ON stored_labels (user_id, label, completion_pk);
