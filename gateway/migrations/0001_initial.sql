-- Times are integer milliseconds (UTC), money is integer nano-dollars, flags are 0 or 1, ids are text made by the gateway.

-- One row. `revision` moves with every change of a key; `keys_ever_made` is set with the first key and never cleared.
CREATE TABLE gateway_state (
    id INTEGER PRIMARY KEY,
    revision BIGINT NOT NULL,
    keys_ever_made INTEGER NOT NULL
);

INSERT INTO gateway_state (id, revision, keys_ever_made) VALUES (1, 0, 0);

CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    user_id TEXT NOT NULL,
    name TEXT,
    is_admin INTEGER NOT NULL,
    models TEXT,
    requests_per_minute BIGINT,
    tokens_per_minute BIGINT,
    max_parallel BIGINT,
    budget_nanousd BIGINT,
    budget_period TEXT,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT
);

-- One row for each call to an upstream.
CREATE TABLE usage_rows (
    id TEXT PRIMARY KEY,
    request_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    created_at BIGINT NOT NULL,
    user_id TEXT NOT NULL,
    key_id TEXT,
    end_user TEXT,
    session_id TEXT,
    conversation_id TEXT,
    backend TEXT NOT NULL,
    model TEXT NOT NULL,
    upstream_model TEXT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    cache_write_tokens BIGINT NOT NULL,
    audio_input_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    audio_output_tokens BIGINT NOT NULL,
    counted_by TEXT NOT NULL,
    price TEXT,
    price_unknown INTEGER NOT NULL,
    cost_nanousd BIGINT,
    charged INTEGER NOT NULL,
    status TEXT NOT NULL,
    finish_reason TEXT,
    stream INTEGER NOT NULL,
    ended_by TEXT,
    ttft_ms BIGINT,
    duration_ms BIGINT NOT NULL
);

CREATE INDEX usage_rows_by_time ON usage_rows (created_at);

CREATE INDEX usage_rows_by_user ON usage_rows (user_id, created_at);

CREATE INDEX usage_rows_by_request ON usage_rows (request_id);

CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    last_activity BIGINT NOT NULL,
    ended_at BIGINT,
    conversation_count BIGINT NOT NULL,
    total_tokens BIGINT NOT NULL,
    total_cost_nanousd BIGINT NOT NULL
);

CREATE INDEX sessions_by_user ON sessions (user_id, last_activity);

-- `content` is JSON text: `\u0000` and a lone surrogate stay escapes, which every engine stores. `extra` holds the
-- message's other fields as a JSON object. `chain` is the hash over the conversation up to this message.
CREATE TABLE messages (
    id TEXT PRIMARY KEY,
    conversation_pk TEXT NOT NULL,
    seq BIGINT NOT NULL,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    extra TEXT,
    chain TEXT,
    tokens BIGINT NOT NULL,
    cost_nanousd BIGINT,
    model TEXT,
    finish_reason TEXT,
    created_at BIGINT NOT NULL,
    UNIQUE (conversation_pk, seq)
);
