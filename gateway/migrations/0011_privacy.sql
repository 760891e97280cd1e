-- What one worker at a time does for all hosts: who, until when by the database's clock, and how far it has come.
CREATE TABLE chores (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    until BIGINT NOT NULL,
    place BIGINT NOT NULL
);

-- What is to be removed for good, in the order in which its time comes. No turn changes an entry: turns go on in
-- conversations that are not deleted.
CREATE INDEX conversations_to_remove ON conversations (deleted_at, number) WHERE deleted_at IS NOT NULL;

-- Users who were deleted lately. A call of theirs may still be running: what it leaves is removed, too, until `until`.
-- Then nobody knows any more who `anonymous_id` was. `subjects` are the accounts of limits, as JSON.
CREATE TABLE user_deletions (
    user_id TEXT PRIMARY KEY,
    anonymous_id TEXT NOT NULL,
    subjects TEXT NOT NULL,
    up_to BIGINT NOT NULL,
    until BIGINT NOT NULL
);
