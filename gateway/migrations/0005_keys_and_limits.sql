-- `labels` is a JSON object of texts. `per_end_user`: the buckets and slots of the key are those of each of its end users.
-- After a rotation the secret from before (`previous_digest`) is good until `previous_until`.
ALTER TABLE api_keys ADD COLUMN request_burst BIGINT;

ALTER TABLE api_keys ADD COLUMN token_burst BIGINT;

ALTER TABLE api_keys ADD COLUMN per_end_user INTEGER NOT NULL DEFAULT 0;

ALTER TABLE api_keys ADD COLUMN labels TEXT;

ALTER TABLE api_keys ADD COLUMN created_by TEXT;

ALTER TABLE api_keys ADD COLUMN previous_digest TEXT;

ALTER TABLE api_keys ADD COLUMN previous_until BIGINT;

CREATE UNIQUE INDEX api_keys_by_previous_digest ON api_keys (previous_digest) WHERE previous_digest IS NOT NULL;

-- Accounts of limits as they stood at `at`. Levels count in 60,000ths of a request or a token (gateway/limits.py). From
-- `full_at` on the buckets are full.
CREATE TABLE limit_states (
    subject TEXT PRIMARY KEY,
    at BIGINT NOT NULL,
    requests BIGINT,
    tokens BIGINT,
    period BIGINT,
    spent_nanousd BIGINT NOT NULL,
    full_at BIGINT NOT NULL
);

-- What the running calls of each worker hold. A worker that is dead holds nothing.
CREATE TABLE limit_holds (
    subject TEXT NOT NULL,
    worker TEXT NOT NULL,
    slots BIGINT NOT NULL,
    tokens BIGINT NOT NULL,
    cost_nanousd BIGINT NOT NULL,
    PRIMARY KEY (subject, worker)
);

CREATE INDEX limit_holds_by_worker ON limit_holds (worker);

-- Calls that are over, written with their turns, and not entered into their accounts yet.
CREATE TABLE limit_settlements (
    subject TEXT NOT NULL,
    id TEXT NOT NULL,
    worker TEXT NOT NULL,
    slots BIGINT NOT NULL,
    tokens_held BIGINT NOT NULL,
    tokens_used BIGINT NOT NULL,
    cost_held_nanousd BIGINT NOT NULL,
    cost_nanousd BIGINT NOT NULL,
    period BIGINT NOT NULL,
    PRIMARY KEY (subject, id)
);

CREATE TABLE workers (
    id TEXT PRIMARY KEY,
    seen_at BIGINT NOT NULL
);
