-- Of what a worker holds: what it has ahead of its calls, as far as it has told.
ALTER TABLE limit_holds ADD COLUMN requests_ahead BIGINT NOT NULL DEFAULT 0;

ALTER TABLE limit_holds ADD COLUMN tokens_ahead BIGINT NOT NULL DEFAULT 0;

-- `gateway_admit_1` stays for workers of the version before, while a fleet is changed over.

-- One batch of claims, decided as gateway/limits.py says. gateway/store/limits.py asks it.
--
-- texts: the worker, the subjects of the accounts in the order in which all workers lock them, the workers of settlements.
-- numbers: beat, judge, now (or NULL), how many accounts, settlements and claims; then
--   14 for each account: request rate and full bucket, token rate and full bucket (in 60,000ths, as the levels),
--     max_parallel, budget (NULL: no such limit), the kind of its period (0 total, 1 month, 2 day), seed (or NULL), how
--     what the worker holds ahead shall change (requests, tokens, slots, cost), and what it has used of it (requests,
--     tokens);
--   8 for each settlement: the place of its account, of its worker in `texts`, slots, tokens held, tokens used, cost held,
--     cost, period;
--   for each claim: tokens in 60,000ths, cost, how many accounts it asks, and the place of each.
--
-- Returns revision, keys_ever_made, 7 for each account: the period (0: no budget), how much more is held ahead (requests,
-- tokens, slots, cost), the levels of requests and of tokens; and 5 for each claim: what refused it (0 nothing, 1 budget,
-- 2 requests, 3 tokens, 4 parallel, 5 seed), the place of that account, the wait, and the levels of its first account as
-- they were then.
--
-- A crash of the server may lose what was decided in its last moments (synchronous_commit). The scans that are off read
-- no less than the index, and a plan that was made for a small table is kept while it grows. An expression is made ready
-- once in each transaction, which costs more than to run it: what can be computed before is.
CREATE FUNCTION gateway_admit_2(texts TEXT[], numbers BIGINT[]) RETURNS BIGINT[] LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    me TEXT := texts[1];
    judge BOOLEAN := numbers[2] = 1;
    present BIGINT;
    ignored TEXT;
    result BIGINT[];

    -- Of each account.
    ats BIGINT[]; levels BIGINT[]; token_levels BIGINT[]; periods BIGINT[]; spents BIGINT[]; fulls BIGINT[];
    slots_of BIGINT[]; reserved_of BIGINT[]; changed BOOLEAN[];
    held_slots BIGINT[]; held_tokens BIGINT[]; held_costs BIGINT[]; holds BOOLEAN[];
    ahead_requests BIGINT[]; ahead_tokens BIGINT[];

    -- Of the account at hand: `b` is where its numbers begin.
    b BIGINT := 6; i BIGINT; name TEXT;
    was BIGINT; level BIGINT; token_level BIGINT; known BIGINT; spent BIGINT; full_again BIGINT;
    request_rate BIGINT; request_full BIGINT; token_rate BIGINT; token_full BIGINT;
    elapsed BIGINT; refunds BIGINT; slots_now BIGINT; reserved_now BIGINT; period_now BIGINT; is_changed BOOLEAN;
    my_slots BIGINT; my_tokens BIGINT; my_cost BIGINT; is_mine BOOLEAN;
    my_requests_ahead BIGINT; my_tokens_ahead BIGINT; requests_ahead_now BIGINT; tokens_ahead_now BIGINT;

    -- Of what is over, by worker.
    over TEXT[]; over_slots BIGINT[]; over_tokens BIGINT[]; over_costs BIGINT[];
    who TEXT; s BIGINT; t BIGINT; u BIGINT; c BIGINT; d BIGINT; e BIGINT; f BIGINT; j BIGINT; is_settled BOOLEAN;

    -- Of the claim at hand.
    p BIGINT; q BIGINT; r BIGINT; wanted BIGINT; cost BIGINT; last BIGINT;
    reason BIGINT; place BIGINT; wait BIGINT; why BIGINT; after BIGINT;
BEGIN
    ignored := set_config('synchronous_commit', 'off', true) || set_config('enable_seqscan', 'off', true)
        || set_config('enable_bitmapscan', 'off', true);
    result := ARRAY[0, 0];

    FOR i IN 1 .. numbers[4] LOOP
        name := texts[1 + i];
        LOOP
            SELECT at, requests, tokens, period, spent_nanousd, full_at
            INTO was, level, token_level, known, spent, full_again
            FROM limit_states WHERE subject = name FOR NO KEY UPDATE;
            EXIT WHEN FOUND;
            INSERT INTO limit_states (subject, at, spent_nanousd, full_at) VALUES (name, 0, 0, 0) ON CONFLICT DO NOTHING;
        END LOOP;
        -- Only now: who held the lock may have written a later time than that of our beginning.
        present := coalesce(numbers[3], floor(date_part('epoch', clock_timestamp()) * 1000));
        is_changed := was = 0;
        IF is_changed THEN
            was := present; full_again := present;
        END IF;
        refunds := 0; slots_now := 0; reserved_now := 0;
        my_slots := 0; my_tokens := 0; my_cost := 0; is_mine := false;
        my_requests_ahead := 0; my_tokens_ahead := 0; requests_ahead_now := 0; tokens_ahead_now := 0;

        -- Those of the batch go the way of the others, and are gone again before anybody sees them.
        IF numbers[5] > 0 THEN
            FOR j IN 1 .. numbers[5] LOOP
                e := 6 + 14 * numbers[4] + 8 * (j - 1);
                IF numbers[e + 1] = i THEN
                    INSERT INTO limit_settlements
                        (subject, id, worker, slots, tokens_held, tokens_used, cost_held_nanousd, cost_nanousd, period)
                    VALUES (name, CAST(j AS TEXT), texts[numbers[e + 2]], numbers[e + 3], numbers[e + 4], numbers[e + 5],
                        numbers[e + 6], numbers[e + 7], numbers[e + 8]);
                END IF;
            END LOOP;
        END IF;
        over := NULL;
        FOR who, s, t, u, c, d, e IN
            DELETE FROM limit_settlements WHERE subject = name
            RETURNING worker, slots, tokens_held, tokens_used, cost_held_nanousd, cost_nanousd, period
        LOOP
            IF e = known AND d <> 0 THEN
                spent := spent + d; is_changed := true;
            END IF;
            refunds := refunds - u * 60000;
            j := array_position(over, who);
            IF j IS NULL THEN
                j := coalesce(cardinality(over), 0) + 1;
                over[j] := who; over_slots[j] := s; over_tokens[j] := t; over_costs[j] := c;
            ELSE
                over_slots[j] := over_slots[j] + s; over_tokens[j] := over_tokens[j] + t; over_costs[j] := over_costs[j] + c;
            END IF;
        END LOOP;

        FOR who, s, t, c, p, q IN
            SELECT worker, slots, tokens, cost_nanousd, requests_ahead, tokens_ahead FROM limit_holds WHERE subject = name
        LOOP
            is_settled := false;
            IF over IS NOT NULL THEN
                j := array_position(over, who);
                IF j IS NOT NULL THEN
                    d := least(s, over_slots[j]); e := least(t, over_tokens[j]); f := least(c, over_costs[j]);
                    s := s - d; t := t - e; c := c - f; refunds := refunds + e * 60000;
                    is_settled := d + e + f > 0;
                END IF;
            END IF;
            IF who = me THEN
                my_slots := s; my_tokens := t; my_cost := c; is_mine := is_settled;
                my_requests_ahead := p; my_tokens_ahead := q;
            ELSIF judge AND NOT EXISTS (SELECT FROM workers WHERE id = who AND seen_at >= present - 15000) THEN
                refunds := refunds + t * 60000;
                DELETE FROM limit_holds WHERE subject = name AND worker = who;
                CONTINUE;
            ELSIF is_settled THEN
                UPDATE limit_holds SET slots = s, tokens = t, cost_nanousd = c WHERE subject = name AND worker = who;
            END IF;
            slots_now := slots_now + s; reserved_now := reserved_now + c;
            requests_ahead_now := requests_ahead_now + p; tokens_ahead_now := tokens_ahead_now + q;
        END LOOP;

        -- What was used of what is held ahead, and what is not wanted any more.
        IF my_requests_ahead > 0 AND (numbers[b + 9] < 0 OR numbers[b + 13] > 0) THEN
            s := least(my_requests_ahead, numbers[b + 13]);
            t := CASE WHEN numbers[b + 9] < 0 THEN least(my_requests_ahead - s, -numbers[b + 9]) ELSE 0 END;
            my_requests_ahead := my_requests_ahead - s - t; requests_ahead_now := requests_ahead_now - s - t;
            level := level + t * 60000; is_mine := true; is_changed := is_changed OR t > 0;
        END IF;
        IF my_tokens_ahead > 0 AND (numbers[b + 10] < 0 OR numbers[b + 14] > 0) THEN
            s := least(my_tokens_ahead, numbers[b + 14]);
            t := CASE WHEN numbers[b + 10] < 0 THEN least(my_tokens_ahead - s, my_tokens, -numbers[b + 10]) ELSE 0 END;
            my_tokens_ahead := my_tokens_ahead - s - t; tokens_ahead_now := tokens_ahead_now - s - t;
            my_tokens := my_tokens - t; refunds := refunds + t * 60000; is_mine := true;
        END IF;
        IF numbers[b + 11] < 0 AND my_slots > 0 THEN
            s := least(my_slots, -numbers[b + 11]);
            my_slots := my_slots - s; slots_now := slots_now - s; is_mine := true;
        END IF;
        IF numbers[b + 12] < 0 AND my_cost > 0 THEN
            c := least(my_cost, -numbers[b + 12]);
            my_cost := my_cost - c; reserved_now := reserved_now - c; is_mine := true;
        END IF;

        request_rate := numbers[b + 1];
        token_rate := numbers[b + 3];
        IF request_rate IS NULL AND token_rate IS NULL THEN
            IF token_level IS NOT NULL AND refunds <> 0 THEN
                token_level := token_level + refunds; is_changed := true;
                IF refunds < 0 THEN -- nobody knows here how long a debt takes
                    full_again := greatest(full_again, present) + 31 * 86400000::BIGINT;
                END IF;
            END IF;
        ELSE
            is_changed := true;
            elapsed := greatest(0, present - was);
            IF present > was OR present < was - 1000 THEN
                was := present;
            END IF;
            -- No more time than fills the bucket: all of it, multiplied, may be too large a number.
            IF request_rate IS NOT NULL THEN
                request_full := greatest(0, numbers[b + 2] - requests_ahead_now * 60000);
                level := coalesce(least(request_full, level
                    + least(elapsed, greatest(0, request_full - level) / request_rate + 1) * request_rate), request_full);
            END IF;
            IF token_rate IS NOT NULL THEN
                token_full := greatest(0, numbers[b + 4] - tokens_ahead_now * 60000);
                token_level := least(token_full, refunds + coalesce(token_level
                    + least(elapsed, greatest(0, token_full - token_level - refunds) / token_rate + 1) * token_rate,
                    token_full));
            END IF;
        END IF;
        IF numbers[b + 6] IS NOT NULL THEN
            period_now := CASE numbers[b + 7]
                WHEN 2 THEN 2000000 + present / 86400000
                WHEN 1 THEN 1000000 - 1 + date_part('month', to_timestamp(present / 1000) AT TIME ZONE 'UTC')
                    + 12 * date_part('year', to_timestamp(present / 1000) AT TIME ZONE 'UTC')
                ELSE 0 END;
            IF known IS NULL OR known / 1000000 <> period_now / 1000000 THEN
                is_changed := is_changed OR known IS NOT NULL OR numbers[b + 8] IS NOT NULL;
                known := CASE WHEN numbers[b + 8] IS NULL THEN NULL ELSE period_now END;
                spent := coalesce(numbers[b + 8], 0);
            ELSIF known < period_now THEN
                known := period_now; spent := 0; is_changed := true;
            END IF;
            result[7 * i - 4] := coalesce(known, 0);
        ELSE
            result[7 * i - 4] := 0;
        END IF;

        ats[i] := was; levels[i] := level; token_levels[i] := token_level;
        periods[i] := known; spents[i] := spent; fulls[i] := full_again;
        slots_of[i] := slots_now; reserved_of[i] := reserved_now; changed[i] := is_changed;
        held_slots[i] := my_slots; held_tokens[i] := my_tokens; held_costs[i] := my_cost; holds[i] := is_mine;
        ahead_requests[i] := my_requests_ahead; ahead_tokens[i] := my_tokens_ahead;
        b := b + 14;
    END LOOP;

    IF numbers[1] = 1 THEN
        present := coalesce(numbers[3], floor(date_part('epoch', clock_timestamp()) * 1000));
        INSERT INTO workers (id, seen_at) VALUES (me, present) ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at;
    END IF;
    SELECT revision, keys_ever_made INTO s, t FROM gateway_state WHERE id = 1;
    result[1] := s; result[2] := t;

    -- `p` is where the numbers of the claim begin, `q` where its part of the result does.
    p := b + 8 * numbers[5];
    q := 2 + 7 * numbers[4];
    FOR n IN 1 .. numbers[6] LOOP
        wanted := numbers[p + 1]; cost := numbers[p + 2]; last := p + 3 + numbers[p + 3];
        reason := 0; place := 0; wait := 0;
        FOR k IN p + 4 .. last LOOP
            i := numbers[k]; b := 14 * i - 8;
            IF numbers[b + 6] IS NOT NULL AND periods[i] IS NULL THEN
                why := 5; after := 0;
            ELSIF cost > 0 AND cost > numbers[b + 6] - spents[i] - reserved_of[i] THEN
                why := 1; after := 0;
            ELSE
                why := 0; after := 0;
                request_rate := numbers[b + 1]; token_rate := numbers[b + 3];
                IF request_rate IS NOT NULL AND levels[i] < 60000 THEN
                    why := 2; after := (60000 - levels[i] + request_rate - 1) / request_rate;
                END IF;
                IF token_rate IS NOT NULL THEN
                    t := least(wanted, numbers[b + 4]) - token_levels[i];
                    IF t > after * token_rate THEN
                        why := 3; after := (t + token_rate - 1) / token_rate;
                    END IF;
                END IF;
                IF why = 0 AND slots_of[i] >= numbers[b + 5] THEN
                    why := 4;
                END IF;
            END IF;
            IF why > 0 AND (reason = 0
                OR (reason <> 5 AND (why = 5 OR (reason <> 1 AND (why = 1 OR after > wait))))) THEN
                reason := why; place := i; wait := after;
            END IF;
        END LOOP;
        IF reason = 0 THEN
            FOR k IN p + 4 .. last LOOP
                i := numbers[k]; b := 14 * i - 8;
                IF numbers[b + 1] IS NOT NULL THEN
                    levels[i] := levels[i] - 60000;
                END IF;
                IF numbers[b + 3] IS NOT NULL THEN
                    t := least(wanted, numbers[b + 4]);
                    token_levels[i] := token_levels[i] - t; held_tokens[i] := held_tokens[i] + t / 60000;
                    holds[i] := true;
                END IF;
                IF numbers[b + 5] IS NOT NULL THEN
                    slots_of[i] := slots_of[i] + 1; held_slots[i] := held_slots[i] + 1;
                    holds[i] := true;
                END IF;
                IF cost > 0 AND numbers[b + 6] IS NOT NULL THEN
                    reserved_of[i] := reserved_of[i] + cost; held_costs[i] := held_costs[i] + cost;
                    holds[i] := true;
                END IF;
            END LOOP;
        END IF;
        result[q + 1] := reason; result[q + 2] := place; result[q + 3] := wait;
        IF last > p + 3 THEN
            i := numbers[p + 4]; b := 14 * i - 8;
            result[q + 4] := CASE WHEN numbers[b + 1] IS NOT NULL THEN levels[i] END;
            result[q + 5] := CASE WHEN numbers[b + 3] IS NOT NULL THEN token_levels[i] END;
        ELSE
            result[q + 5] := NULL;
        END IF;
        p := last; q := q + 5;
    END LOOP;

    b := 6;
    FOR i IN 1 .. numbers[4] LOOP
        -- Once all claims are decided: a sixteenth of what is left, if that is worth it.
        r := 7 * i - 4;
        p := greatest(0, numbers[b + 9]); t := greatest(0, numbers[b + 10]);
        s := greatest(0, numbers[b + 11]); c := greatest(0, numbers[b + 12]);
        IF p + t + s + c > 0 THEN
            d := CASE WHEN numbers[b + 1] IS NULL THEN 0 ELSE greatest(0, levels[i]) / 960000 END;
            e := CASE WHEN numbers[b + 3] IS NULL THEN 0 ELSE greatest(0, token_levels[i]) / 960000 END;
            f := CASE WHEN numbers[b + 5] IS NULL THEN 0 ELSE greatest(0, numbers[b + 5] - slots_of[i]) / 16 END;
            u := CASE WHEN numbers[b + 6] IS NULL OR periods[i] IS NULL THEN 0
                ELSE greatest(0, numbers[b + 6] - spents[i] - reserved_of[i]) / 16 END;
            IF 4 * d >= p AND 4 * e >= t AND 4 * f >= s AND u >= c / 4.0 THEN
                p := least(p, d); t := least(t, e); s := least(s, f); c := least(c, u);
                levels[i] := levels[i] - p * 60000; token_levels[i] := token_levels[i] - t * 60000;
                slots_of[i] := slots_of[i] + s; reserved_of[i] := reserved_of[i] + c;
                held_slots[i] := held_slots[i] + s; held_tokens[i] := held_tokens[i] + t;
                held_costs[i] := held_costs[i] + c;
                ahead_requests[i] := ahead_requests[i] + p; ahead_tokens[i] := ahead_tokens[i] + t;
                holds[i] := true;
            ELSE
                p := 0; t := 0; s := 0; c := 0;
            END IF;
        END IF;
        result[r + 1] := p; result[r + 2] := t; result[r + 3] := s; result[r + 4] := c;
        result[r + 5] := CASE WHEN numbers[b + 1] IS NOT NULL THEN levels[i] END;
        result[r + 6] := CASE WHEN numbers[b + 3] IS NOT NULL THEN token_levels[i] END;
        IF changed[i] THEN
            UPDATE limit_states SET at = ats[i], requests = levels[i], tokens = token_levels[i], period = periods[i],
                spent_nanousd = spents[i],
                full_at = CASE WHEN numbers[b + 1] IS NULL AND numbers[b + 3] IS NULL THEN fulls[i] ELSE ats[i] + greatest(
                    0,
                    (numbers[b + 2] - levels[i] + numbers[b + 1] - 1) / numbers[b + 1],
                    (numbers[b + 4] - token_levels[i] + numbers[b + 3] - 1) / numbers[b + 3]) END
            WHERE subject = texts[1 + i];
        END IF;
        IF holds[i] THEN
            UPDATE limit_holds SET slots = held_slots[i], tokens = held_tokens[i], cost_nanousd = held_costs[i],
                requests_ahead = ahead_requests[i], tokens_ahead = ahead_tokens[i]
            WHERE subject = texts[1 + i] AND worker = me;
            IF NOT FOUND THEN
                INSERT INTO limit_holds (subject, worker, slots, tokens, cost_nanousd, requests_ahead, tokens_ahead)
                VALUES (texts[1 + i], me, held_slots[i], held_tokens[i], held_costs[i], ahead_requests[i],
                    ahead_tokens[i]);
            END IF;
        END IF;
        b := b + 14;
    END LOOP;
    RETURN result;
END $$;
