-- Of what a worker holds: what it has ahead of its calls, as far as it has told.
ALTER TABLE limit_holds ADD COLUMN requests_ahead BIGINT NOT NULL DEFAULT 0;

ALTER TABLE limit_holds ADD COLUMN tokens_ahead BIGINT NOT NULL DEFAULT 0;
