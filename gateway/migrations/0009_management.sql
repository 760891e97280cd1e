ALTER TABLE conversations ADD COLUMN pinned_at BIGINT;

ALTER TABLE conversations ADD COLUMN archived_at BIGINT;

-- What lists are read from. `number` never changes, so no turn touches them. They begin with an expression and not with
-- the user: see conversations_by_owner. A new conversation is entered into two of them, the others are of few rows.
CREATE INDEX conversations_active ON conversations ((user_id || ''), number)
    WHERE deleted_at IS NULL AND archived_at IS NULL;

CREATE INDEX conversations_archived ON conversations ((user_id || ''), number)
    WHERE deleted_at IS NULL AND archived_at IS NOT NULL;

CREATE INDEX conversations_pinned ON conversations ((user_id || ''), number)
    WHERE deleted_at IS NULL AND pinned_at IS NOT NULL;

CREATE INDEX conversations_deleted ON conversations ((user_id || ''), id, number) WHERE deleted_at IS NOT NULL;

CREATE INDEX conversations_by_session ON conversations (session_id, number) WHERE session_id IS NOT NULL;

-- The tags of a conversation once more, by which it is found. They go with its row.
CREATE TABLE conversation_tags (
    number BIGINT NOT NULL REFERENCES conversations (number) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    user_id TEXT NOT NULL,
    PRIMARY KEY (number, tag)
);

CREATE INDEX conversation_tags_by_owner ON conversation_tags (user_id, tag, number);

-- The user's newest open session is the current one. Its activity is in no index: it changes with each turn.
DROP INDEX sessions_by_user;

CREATE INDEX sessions_open ON sessions (user_id, created_at) WHERE ended_at IS NULL;

CREATE INDEX sessions_by_user ON sessions ((user_id || ''), created_at, id);

-- Moves when somebody opens or ends a session outside of a turn: workers forget which ones are current.
ALTER TABLE gateway_state ADD COLUMN sessions_revision BIGINT NOT NULL DEFAULT 0;
