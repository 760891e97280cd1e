-- For people and tools that look with SQL: readable times (UTC) and dollars.
CREATE VIEW usage_view AS
SELECT request_id, attempt, to_timestamp(created_at / 1000.0) AS created_at, user_id, key_id, end_user, session_id,
    conversation_id, backend, model, upstream_model, input_tokens, cached_tokens, cache_write_tokens, output_tokens,
    reasoning_tokens, counted_by, price_unknown = 1 AS price_unknown, cost_nanousd / 1000000000.0 AS cost_usd,
    charged = 1 AS charged, status, finish_reason, stream = 1 AS stream, ttft_ms, duration_ms,
    CASE WHEN output_tokens > 0 AND duration_ms > COALESCE(ttft_ms, 0)
        THEN round(output_tokens * 1000.0 / (duration_ms - COALESCE(ttft_ms, 0)), 1) END AS tokens_per_second
FROM usage_rows;

CREATE VIEW sessions_view AS
SELECT id, user_id, to_timestamp(created_at / 1000.0) AS created_at, to_timestamp(last_activity / 1000.0) AS last_activity,
    total_tokens, total_cost_nanousd / 1000000000.0 AS total_cost, conversation_count, ended_at IS NULL AS is_active
FROM sessions;

CREATE VIEW conversations_view AS
SELECT id, number, user_id, session_id, parent_id, to_timestamp(created_at / 1000.0) AS created_at,
    to_timestamp(last_used / 1000.0) AS last_used, message_count, total_tokens_input, total_tokens_output,
    total_cost_nanousd / 1000000000.0 AS total_cost, image_urls, tags, title, summary, metadata,
    deleted_at IS NOT NULL AS is_deleted
FROM conversations;

-- Text is shown as text, unless it holds an escape that PostgreSQL cannot store: U+0000 or half a surrogate pair. Then it
-- stays JSON. To find one, leave out escaped backslashes first, then whole pairs.
CREATE VIEW messages_view AS
SELECT m.id, c.id AS conversation_id, m.seq, m.role,
    CASE WHEN m.content = 'null' THEN NULL
        WHEN m.content NOT LIKE '"%' THEN m.content
        WHEN regexp_replace(replace(m.content, '\\', ''), '\\u[dD][89abAB]..\\u[dD][c-fC-F]..', '', 'g')
            ~ '\\u(0000|[dD][89a-fA-F])' THEN m.content
        ELSE m.content::json #>> '{}' END AS content,
    m.tokens, m.cost_nanousd / 1000000000.0 AS cost_usd, m.model, m.finish_reason,
    to_timestamp(m.created_at / 1000.0) AS created_at
FROM messages m JOIN conversations c ON c.pk = m.conversation_pk;
