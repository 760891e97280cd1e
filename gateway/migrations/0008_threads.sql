-- A branch shares the messages of its parent up to `parent_seq`. `parent_pk` is what reads go by: an id may be taken
-- again once its conversation is deleted. The index is for who removes conversations for good, and holds branches only.
ALTER TABLE conversations ADD COLUMN parent_pk TEXT;

CREATE INDEX conversations_by_parent ON conversations (parent_pk) WHERE parent_pk IS NOT NULL;

-- On an answer: how many of the oldest turns did not fit into the model's window when it was made.
ALTER TABLE messages ADD COLUMN omitted_turns BIGINT;

-- By which a resent history is recognised: by its last answer, so only answers are in it. The newest matches are read,
-- and the time of a message tells that in 8 bytes, its id in 48.
CREATE INDEX messages_by_chain ON messages (chain, created_at) WHERE role = 'assistant' AND chain IS NOT NULL;

-- One turn at a time: who runs one on a conversation, until when by the database's clock.
CREATE TABLE turn_leases (
    user_id TEXT NOT NULL,
    conversation_id TEXT NOT NULL,
    holder TEXT NOT NULL,
    until BIGINT NOT NULL,
    PRIMARY KEY (user_id, conversation_id)
);
