-- Per engine because of `number`: unique per database, given by the database, never used again.
CREATE TABLE conversations (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    pk TEXT NOT NULL UNIQUE,
    id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    key_id TEXT,
    end_user TEXT,
    session_id TEXT,
    parent_id TEXT,
    parent_seq BIGINT,
    created_at BIGINT NOT NULL,
    last_used BIGINT NOT NULL,
    message_count BIGINT NOT NULL,
    total_tokens_input BIGINT NOT NULL,
    total_tokens_output BIGINT NOT NULL,
    total_cost_nanousd BIGINT NOT NULL,
    image_urls TEXT NOT NULL DEFAULT '[]',
    tags TEXT NOT NULL DEFAULT '[]',
    title TEXT,
    summary TEXT,
    metadata TEXT NOT NULL DEFAULT '{}',
    deleted_at BIGINT
);

-- The only index that begins with the user. A second one would be taken for this by a planner without statistics, which
-- reads all conversations of a user to find one.
CREATE UNIQUE INDEX conversations_by_owner ON conversations (user_id, id) WHERE deleted_at IS NULL;
