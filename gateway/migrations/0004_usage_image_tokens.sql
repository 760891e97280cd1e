-- Parts of the counts that were there: of input_tokens, of output_tokens, of cache_write_tokens. In rows from before, 0.
ALTER TABLE usage_rows ADD COLUMN image_input_tokens BIGINT NOT NULL DEFAULT 0;

ALTER TABLE usage_rows ADD COLUMN image_output_tokens BIGINT NOT NULL DEFAULT 0;

ALTER TABLE usage_rows ADD COLUMN cache_write_1h_tokens BIGINT NOT NULL DEFAULT 0;
