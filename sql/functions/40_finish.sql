-- Finishing: a leased timer becomes an outcome and is gone, or waits for its next attempt. Called by whoever claimed.

-- Invariant: a result counts only while its (event_id, attempt) names the present lease; anything else is answered as stale,
-- unless that very result is in the log already (the reply of an earlier call was lost).
-- Locks timers in the order of event_id, as cancel_event() does; then ordering keys, destinations and lanes, see 28_dedicated_lanes.sql.
-- Plans are pinned: the key's index, searched for p_event_ids, hashed with the arrays. A nested loop is as fast, but when the
-- last vacuum found the table empty the planner takes timer for one row and reads all of its index for each call.
create or replace function orchestrator.finish_events(
  p_event_ids uuid[], p_attempts integer[], p_results text[], p_status_codes integer[] default null,
  p_started_at double precision[] default null, p_finished_at double precision[] default null,
  p_errors text[] default null, p_responses text[] default null, p_retry_after double precision[] default null, p_worker integer default 0,
  p_claimed_at double precision[] default null, p_waited text[] default null)
returns table (event_id uuid, result text, due_at timestamptz)
language plpgsql security definer set search_path = orchestrator, pg_temp rows 10
set plan_cache_mode = force_generic_plan set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off
set enable_bitmapscan = off set jit = off as $$
#variable_conflict use_column
declare
  v_now timestamptz;
  v_finished bigint := 0;
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_results text[];
  v_due timestamptz[];
  v_claimed double precision[];
  v_orderings bigint[];
  v_lanes integer[];
  v_delivered boolean[];
  v_status_codes integer[];
  v_started double precision[];
  v_ended double precision[];
  v_strangers uuid[];
  v_told constant boolean := exists (select from orchestrator.outbox_kind where kind = 'timestamp' or not p_results <@ array['delivered']);
begin
  if not p_results <@ array['delivered', 'retry', 'fail'] or array_position(p_results, null) is not null then
    raise exception 'p_results: expected delivered, retry or fail, got %', left(p_results::text, 200) using errcode = 'invalid_parameter_value';
  end if;
  if cardinality(p_attempts) is distinct from cardinality(p_event_ids) or cardinality(p_results) is distinct from cardinality(p_event_ids) then
    raise exception 'p_event_ids, p_attempts, p_results: expected arrays of one length, got %, % and %',
      cardinality(p_event_ids), cardinality(p_attempts), cardinality(p_results) using errcode = 'invalid_parameter_value';
  end if;
  -- raise_floors() relies on the clock being read after this, where a retry is put off.
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  -- What there is to note of a delivered one, the other branch notes.
  if p_results <@ array['delivered'] and array_remove(p_errors, null) = '{}' is not false then
    with gone as (
      delete from orchestrator.timer t
      using unnest(p_event_ids, p_attempts, p_status_codes, p_started_at, p_finished_at, p_claimed_at, p_waited)
        as r (event_id, attempt, status_code, started_at, finished_at, claimed_at, waited)
      where t.event_id = any (p_event_ids) and t.event_id = r.event_id and t.attempt = r.attempt and t.lease_until is not null
      returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.lane, t.ordering, t.source, t.destination, t.retrying, r.status_code, r.started_at, r.finished_at, r.claimed_at, r.waited
    ), logged as (
      insert into orchestrator.outcome (event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, status_code, result, claimed_at, waited)
      select g.event_id, g.scheduled_at, g.due_at, to_timestamp(g.started_at), coalesce(to_timestamp(g.finished_at), v_now)
        , p_worker, g.attempt, g.status_code, 'delivered', to_timestamp(g.claimed_at), g.waited::json
      from gone g
    ), counted as (
      insert into orchestrator.statistic (minute, name, source, destination, value)
      select date_trunc('minute', v_now), 'delivered', g.source, case when g.source is not null then g.destination end, count(*) from gone g group by 3, 4
    ), eased as (
      insert into orchestrator.statistic (minute, name, source, destination, value)
      select date_trunc('minute', v_now), 'retrying', g.source, case when g.source is not null then g.destination end, -count(*) from gone g where g.retrying group by 3, 4
    )
    select count(*), array_agg(g.event_id) filter (where v_told), array_agg(g.scheduled_at) filter (where v_told)
      , array_agg(g.claimed_at) filter (where v_told), array_agg(g.ordering) filter (where g.ordering is not null)
      , array_agg(g.lane) filter (where g.lane > 63), array_agg(true) filter (where g.lane > 63), array_agg(g.status_code) filter (where g.lane > 63)
      , array_agg(g.started_at) filter (where g.lane > 63), array_agg(g.finished_at) filter (where g.lane > 63)
    into v_finished, v_ids, v_scheduled, v_claimed, v_orderings, v_lanes, v_delivered, v_status_codes, v_started, v_ended
    from gone g;
    if v_told then
      perform orchestrator.announce_finished(v_ids, v_scheduled, v_claimed);
    end if;
  else
    with given as materialized (
      select distinct on (r.event_id, r.attempt) r.*
      from unnest(p_event_ids, p_attempts, p_results, p_status_codes, p_started_at, p_finished_at, p_errors, p_responses, p_retry_after, p_claimed_at, p_waited)
        as r (event_id, attempt, result, status_code, started_at, finished_at, error, response, retry_after, claimed_at, waited)
      order by r.event_id, r.attempt
    ), done as materialized (
      -- One merge, not a delete and an update: it locks every timer in the order of the ids, whatever becomes of each.
      merge into orchestrator.timer t
      using given r on t.event_id = any (p_event_ids) and t.event_id = r.event_id and t.attempt = r.attempt and t.lease_until is not null
      when matched and r.result = 'retry' and t.attempt < t.max_attempts then
        update set worker = null, lease_until = null, slot = null, busy = null, retrying = true
          , due_at = greatest(t.scheduled_at, v_now + orchestrator.next_delay(t.event_id, t.scheduled_at, t.lane, t.max_attempts - t.attempt
            , case when r.retry_after > 0 then make_interval(secs => least(r.retry_after, 1e9)) end))
      when matched then delete
      returning r.event_id, old.scheduled_at, r.attempt, r.status_code, old.due_at, old.lane, old.ordering, old.source, old.destination, old.retrying, r.started_at, r.finished_at, r.error, r.response
        , r.claimed_at, r.waited, r.result as verdict
        , case when new.event_id is not null then 'retried' when r.result = 'delivered' then 'delivered' else 'dead' end as result
        , new.due_at as next_due
    ), logged as (
      insert into orchestrator.outcome
        (event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, status_code, result, error, response, claimed_at, waited)
      select d.event_id, d.scheduled_at, d.due_at, to_timestamp(d.started_at), coalesce(to_timestamp(d.finished_at), v_now)
        , p_worker, d.attempt, d.status_code, d.result, d.error, d.response, to_timestamp(d.claimed_at), d.waited::json
      from done d
    ), mourned as (
      insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason, blocks)
      select d.event_id, d.scheduled_at, v_now, d.attempt, coalesce(d.error, 'failed'), orchestrator.blocked_by_death(d.event_id, d.scheduled_at, d.lane, d.ordering)
      from done d
      where d.result = 'dead'
    ), counted as (
      insert into orchestrator.statistic (minute, name, source, destination, value)
      select date_trunc('minute', v_now), d.result, d.source, case when d.source is not null then d.destination end, count(*) from done d group by 2, 3, 4
    ), eased as (
      insert into orchestrator.statistic (minute, name, source, destination, value)
      select date_trunc('minute', v_now), 'retrying', d.source, case when d.source is not null then d.destination end, sum(case d.result when 'retried' then 1 else -1 end)
      from done d
      where (d.result = 'retried') = (d.retrying is null)
      group by 3, 4
    )
    select count(*), array_agg(d.event_id), array_agg(d.scheduled_at), array_agg(d.result), array_agg(d.next_due), array_agg(d.claimed_at)
      , array_agg(d.ordering) filter (where d.ordering is not null)
      , array_agg(d.lane order by d.event_id) filter (where d.lane > 63 or d.verdict = 'retry')
      , array_agg(d.verdict <> 'retry' order by d.event_id) filter (where d.lane > 63 or d.verdict = 'retry')
      , array_agg(d.status_code order by d.event_id) filter (where d.lane > 63 or d.verdict = 'retry')
      , array_agg(d.started_at order by d.event_id) filter (where d.lane > 63 or d.verdict = 'retry')
      , array_agg(d.finished_at order by d.event_id) filter (where d.lane > 63 or d.verdict = 'retry')
      , array_agg(d.event_id order by d.event_id) filter (where d.lane > 63 or d.verdict = 'retry')
    into v_finished, v_ids, v_scheduled, v_results, v_due, v_claimed, v_orderings, v_lanes, v_delivered, v_status_codes, v_started, v_ended, v_strangers
    from done d;
    return query
    select * from unnest(v_ids, v_results, v_due) as d (event_id, result, due_at) where d.result <> 'delivered';
    if v_told then
      select array_agg(d.event_id), array_agg(d.scheduled_at), array_agg(d.claimed_at) into v_ids, v_scheduled, v_claimed
      from unnest(v_ids, v_scheduled, v_results, v_claimed) as d (event_id, scheduled_at, result, claimed_at)
      where d.result <> 'retried';
      perform orchestrator.announce_finished(v_ids, v_scheduled, v_claimed);
    end if;
  end if;
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  if v_lanes is not null then
    if 63 >= any (v_lanes) then
      v_lanes := orchestrator.ensure_lanes_for_failures(v_lanes, v_strangers);
    end if;
    perform orchestrator.update_breakers(v_lanes, v_delivered, v_status_codes, v_started, v_ended);
  end if;
  if v_finished < cardinality(p_event_ids) then
    return query
    select r.event_id, 'stale', null::timestamptz
    from unnest(p_event_ids, p_attempts) as r (event_id, attempt)
    -- A count cannot be made into a join.
    where 0 = (
      select count(*) from orchestrator.outcome o
      where o.event_id = r.event_id and o.attempt = r.attempt and o.worker is not distinct from p_worker
        and o.error is distinct from orchestrator.lost_lease()
        and o.scheduled_at >= uuid_extract_timestamp(r.event_id) and o.scheduled_at < uuid_extract_timestamp(r.event_id) + interval '1 ms');
  end if;
end $$;
comment on function orchestrator.finish_events(uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[], integer, double precision[], text[]) is
  'Records the results (delivered; retry: failed, try again if attempts are left; fail: failed for good) of leased attempts, one array element each; times are Unix seconds by the database''s clock, retry_after seconds; p_claimed_at and p_waited (JSON, as the claim gave it) go into the log. Answers only what was not delivered: retried (with the next due_at), dead, or stale (the lease was lost; nothing was recorded)';

create or replace function orchestrator.release_events(p_event_ids uuid[], p_attempts integer[]) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_released integer;
  v_first timestamptz;
  v_lanes integer[];
  v_orderings bigint[];
begin
  with freed as (
    update orchestrator.timer t
    set worker = null, lease_until = null, slot = null, busy = null, max_attempts = t.max_attempts + 1
    from unnest(p_event_ids, p_attempts) as r (event_id, attempt)
    where t.event_id = any (p_event_ids) and t.event_id = r.event_id and t.attempt = r.attempt and t.lease_until is not null
    returning t.due_at, t.lane, t.ordering
  )
  select count(*), min(f.due_at), array_agg(distinct f.lane) filter (where f.lane > 63), array_agg(f.ordering) filter (where f.ordering is not null)
  into v_released, v_first, v_lanes, v_orderings from freed f;
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  if v_lanes is not null then
    -- One that another session has lets its next try through when the lease would have ended.
    update orchestrator.lane l set open_until = orchestrator.now()
    where l.lane = any (array(
      select l.lane from orchestrator.lane l where l.lane = any (v_lanes) and l.breaker = 'half_open' order by l.lane for update skip locked));
  end if;
  perform orchestrator.tell_due(v_first);
  return v_released;
end $$;
comment on function orchestrator.release_events(uuid[], integer[]) is
  'Hands leases back unused, spending no attempt, and wakes the dispatchers if one is due soon. Returns how many were still held';

-- What another session's open transaction holds is set aside: the caller asked finish_events() first, and got no lock in time.

-- Never waits. What it has locked, whoever comes next in the transaction need not wait for.
create or replace function orchestrator.lock_free(p_event_ids uuid[]) returns uuid[]
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off as $$
declare
  v_free uuid[];
begin
  with free as materialized (
    select t.event_id, t.ordering from orchestrator.timer t where t.event_id = any (p_event_ids) order by t.event_id for update skip locked
  )
  select array_agg(f.event_id) into v_free
  from free f
  where f.ordering is null or pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), orchestrator.ordering_bucket(f.ordering));
  return array(select t.event_id from orchestrator.timer t where t.event_id = any (p_event_ids) and t.event_id <> all (coalesce(v_free, '{}')));
end $$;
comment on function orchestrator.lock_free(uuid[]) is
  'Locks the timers of events, with their ordering keys, but for those that another session has locked; answers these';

-- Leaves the count of a result for a breaker out where another session has the lane: its lease must not run out for that.
create or replace function orchestrator.finish_free_events(
  p_event_ids uuid[], p_attempts integer[], p_results text[], p_status_codes integer[] default null,
  p_started_at double precision[] default null, p_finished_at double precision[] default null,
  p_errors text[] default null, p_responses text[] default null, p_retry_after double precision[] default null, p_worker integer default 0,
  p_claimed_at double precision[] default null, p_waited text[] default null)
returns table (event_id uuid, result text, due_at timestamptz)
language plpgsql security definer set search_path = orchestrator, pg_temp rows 10 as $$
#variable_conflict use_column
declare
  v_blocked constant uuid[] := orchestrator.lock_free(p_event_ids);
begin
  perform set_config('orchestrator.wait', 'off', true);
  return query
  select f.* from (
    select array_agg(r.event_id) as event_ids, array_agg(r.attempt) as attempts, array_agg(r.result) as results, array_agg(r.status_code) as status_codes
      , array_agg(r.started_at) as started_at, array_agg(r.finished_at) as finished_at, array_agg(r.error) as errors, array_agg(r.response) as responses
      , array_agg(r.retry_after) as retry_after, array_agg(r.claimed_at) as claimed_at, array_agg(r.waited) as waited
    from unnest(p_event_ids, p_attempts, p_results, p_status_codes, p_started_at, p_finished_at, p_errors, p_responses, p_retry_after, p_claimed_at, p_waited)
      as r (event_id, attempt, result, status_code, started_at, finished_at, error, response, retry_after, claimed_at, waited)
    where r.event_id <> all (v_blocked)) r
  cross join lateral orchestrator.finish_events(r.event_ids, r.attempts, r.results, r.status_codes, r.started_at, r.finished_at, r.errors
    , r.responses, r.retry_after, p_worker, r.claimed_at, r.waited) f
  where r.event_ids is not null
  union all
  select b, 'blocked', null from unnest(v_blocked) b;
  perform set_config('orchestrator.wait', '', true);
end $$;
comment on function orchestrator.finish_free_events(uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[], integer, double precision[], text[]) is
  'finish_events() that waits for no other session: answers blocked, and records nothing, for events that one has locked, or whose ordering key one has. No claim can take those either; try them again';

create or replace function orchestrator.release_free_events(p_event_ids uuid[], p_attempts integer[]) returns table (released integer, blocked uuid[])
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
begin
  blocked := orchestrator.lock_free(p_event_ids);
  released := (
    select orchestrator.release_events(array_agg(r.event_id), array_agg(r.attempt))
    from unnest(p_event_ids, p_attempts) as r (event_id, attempt) where r.event_id <> all (blocked));
  return next;
end $$;
comment on function orchestrator.release_free_events(uuid[], integer[]) is 'release_events() that waits for no other session''s events: answers how many it released, and which are blocked';
