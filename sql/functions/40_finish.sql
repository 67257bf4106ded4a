-- Finishing: the result of an attempt goes into the log, and its timer is deleted or waits for the next
-- attempt. Called by whoever claimed the event. The fence: a result counts only with the attempt number of
-- the event's last claim.
--
-- finish_events() takes an array for each column of its results, as clients pass them; the steps that follow
-- return rows.

create or replace function orchestrator.check_results(p_event_ids uuid[], p_attempts integer[], p_results text[])
returns void
language plpgsql immutable as $$
begin
  if not p_results <@ array['delivered', 'retry', 'fail'] or array_position(p_results, null) is not null then
    raise exception 'p_results: expected delivered, retry or fail, got %', left(p_results::text, 200)
      using errcode = 'invalid_parameter_value';
  end if;
  if cardinality(p_attempts) is distinct from cardinality(p_event_ids)
    or cardinality(p_results) is distinct from cardinality(p_event_ids)
  then
    raise exception 'p_event_ids, p_attempts, p_results: expected arrays of one length, got %, % and %',
      cardinality(p_event_ids), cardinality(p_attempts), cardinality(p_results)
      using errcode = 'invalid_parameter_value';
  end if;
end $$;
comment on function orchestrator.check_results(uuid[], integer[], text[]) is
  'Refuses arguments of finish_events() that cannot be results';

-- Without settings of its own, so that the planner inlines it.
create or replace function orchestrator.stale_results(p_event_ids uuid[], p_attempts integer[], p_worker integer)
returns table (event_id uuid, attempt integer)
language sql stable as $$
  select r.event_id, r.attempt
  from unnest(p_event_ids, p_attempts) as r (event_id, attempt)
  -- Deliberately a count: the planner would join an exists, which is slower.
  where 0 = (
    select count(*) from orchestrator.outcome o
    where o.event_id = r.event_id and o.attempt = r.attempt and o.worker is not distinct from p_worker
      and o.error is distinct from orchestrator.lost_lease()
      and orchestrator.in_millisecond_of(r.event_id, o.scheduled_at))
    and (r.attempt = 1 and r.event_id in (
      select d from unnest((select orchestrator.delivered_before(p_event_ids, p_worker))) d)) is not true
$$;
comment on function orchestrator.stale_results(uuid[], integer[], integer) is
  'Results that are not in the log: another claim took their events before they came';

-- One step of finish_events(), with its settings: all were delivered, without a remark in p_errors.
create or replace function orchestrator.record_delivered(
  p_event_ids uuid[],
  p_attempts integer[],
  p_status_codes integer[],
  p_started_at double precision[],
  p_finished_at double precision[],
  p_worker integer,
  p_claimed_at double precision[],
  p_waited text[],
  p_now timestamptz,
  p_announced boolean,
  out count bigint,
  out finished orchestrator.finished_event[],
  out orderings bigint[],
  out lane_results orchestrator.lane_result[],
  out failed_in_shared_lane boolean)
language plpgsql as $$
#variable_conflict use_column
begin
  with finished as (
    -- The fence is t.attempt = r.attempt: the timers that nobody has claimed since.
    delete from orchestrator.timer t
    using unnest(p_event_ids, p_attempts, p_status_codes, p_started_at, p_finished_at, p_claimed_at, p_waited)
      as r (event_id, attempt, status_code, started_at, finished_at, claimed_at, waited)
    where t.event_id = any (p_event_ids) and t.event_id = r.event_id and t.attempt = r.attempt
      and t.lease_until is not null
    returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.lane, t.ordering, t.source, t.destination, t.retrying
      , r.status_code, r.started_at, r.finished_at, r.claimed_at, r.waited
  ), logged as (
    insert into orchestrator.outcome
      (event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, status_code, result, claimed_at
      , waited)
    select f.event_id, f.scheduled_at, f.due_at, to_timestamp(f.started_at)
      , coalesce(to_timestamp(f.finished_at), p_now), p_worker, f.attempt, f.status_code, 'delivered'
      , to_timestamp(f.claimed_at), f.waited::json
    from finished f
  ), delivered_counts as (
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', p_now), 'delivered', f.source
      , case when f.source is not null then f.destination end, count(*)
    from finished f
    group by 3, 4
  ), retrying_counts as (
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', p_now), 'retrying', f.source
      , case when f.source is not null then f.destination end, -count(*)
    from finished f
    where f.retrying
    group by 3, 4
  )
  select count(*)
    , array_agg(row(f.event_id, f.scheduled_at, 'delivered', null, f.claimed_at, f.attempt)
        ::orchestrator.finished_event) filter (where p_announced)
    , array_agg(f.ordering) filter (where f.ordering is not null)
    , array_agg(row(f.lane, f.event_id, true, f.status_code, f.started_at, f.finished_at)::orchestrator.lane_result)
      filter (where orchestrator.is_dedicated(f.lane))
  into count, finished, orderings, lane_results
  from finished f;
end $$;
comment on function orchestrator.record_delivered(
  uuid[], integer[], integer[], double precision[], double precision[], integer, double precision[], text[]
, timestamptz, boolean) is
  'Deletes the timers of delivered events, logs and counts them. '
  'Returns how many they are, and what is to be done about them: messages if p_announced, ordering keys, breakers';

-- One step of finish_events(), with its settings: any results.
create or replace function orchestrator.record_results(
  p_event_ids uuid[],
  p_attempts integer[],
  p_results text[],
  p_status_codes integer[],
  p_started_at double precision[],
  p_finished_at double precision[],
  p_errors text[],
  p_responses text[],
  p_retry_after double precision[],
  p_worker integer,
  p_claimed_at double precision[],
  p_waited text[],
  p_now timestamptz,
  out count bigint,
  out finished orchestrator.finished_event[],
  out orderings bigint[],
  out lane_results orchestrator.lane_result[],
  out failed_in_shared_lane boolean)
language plpgsql as $$
#variable_conflict use_column
begin
  with given as materialized (
    -- In the order of the ids; of a result that is given twice, one.
    select distinct on (r.event_id, r.attempt) r.*
    from unnest(p_event_ids, p_attempts, p_results, p_status_codes, p_started_at, p_finished_at, p_errors, p_responses
        , p_retry_after, p_claimed_at, p_waited)
      as r (event_id, attempt, verdict, status_code, started_at, finished_at, error, response
        , retry_after, claimed_at, waited)
    order by r.event_id, r.attempt
  ), finished as materialized (
    -- One merge, not a delete and an update: it locks all timers in the order of the ids, whatever their
    -- results. The fence is t.attempt = r.attempt.
    merge into orchestrator.timer t
    using given r
    on t.event_id = any (p_event_ids) and t.event_id = r.event_id and t.attempt = r.attempt
      and t.lease_until is not null
    when matched and r.verdict = 'retry' and t.attempt < t.max_attempts then
      update set worker = null, lease_until = null, slot = null, busy = null, retrying = true
        , due_at = greatest(t.scheduled_at, p_now + orchestrator.next_delay(
            t.event_id, t.scheduled_at, t.lane, t.max_attempts - t.attempt
          , case when r.retry_after > 0 then make_interval(secs => least(r.retry_after, 1e9)) end))
    when matched then delete
    returning r.event_id, old.scheduled_at, old.due_at, r.attempt, old.lane, old.ordering, old.source, old.destination
      , old.retrying, r.status_code, r.started_at, r.finished_at, r.error, r.response, r.claimed_at, r.waited
      , r.verdict
      , case
          when new.event_id is not null then 'retried'
          when r.verdict = 'delivered' then 'delivered'
          else 'dead'
        end as result
      , new.due_at as next_due_at
  ), logged as (
    insert into orchestrator.outcome
      (event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, status_code, result, error, response
      , claimed_at, waited)
    select f.event_id, f.scheduled_at, f.due_at, to_timestamp(f.started_at)
      , coalesce(to_timestamp(f.finished_at), p_now), p_worker, f.attempt, f.status_code, f.result, f.error
      , f.response, to_timestamp(f.claimed_at), f.waited::json
    from finished f
  ), dead_letters as (
    insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason, blocks)
    select f.event_id, f.scheduled_at, p_now, f.attempt, coalesce(f.error, 'failed')
      , orchestrator.blocked_by_death(f.event_id, f.scheduled_at, f.lane, f.ordering)
    from finished f
    where f.result = 'dead'
  ), result_counts as (
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', p_now), f.result, f.source
      , case when f.source is not null then f.destination end, count(*)
    from finished f
    group by 2, 3, 4
  ), retrying_counts as (
    -- Those that are retrying from now on, less those that no longer are.
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', p_now), 'retrying', f.source
      , case when f.source is not null then f.destination end, sum(case f.result when 'retried' then 1 else -1 end)
    from finished f
    where (f.result = 'retried') = (f.retrying is null)  -- begins to be retrying, or ends it
    group by 3, 4
  )
  select count(*)
    , array_agg(row(f.event_id, f.scheduled_at, f.result, f.next_due_at, f.claimed_at, f.attempt)
        ::orchestrator.finished_event)
    , array_agg(f.ordering) filter (where f.ordering is not null)
    -- Of the shared lanes only failures: they give a destination a dedicated lane, with a breaker. For the
    -- breaker fail is a success: the destination works, and refuses this event.
    , array_agg(row(f.lane, f.event_id, f.verdict <> 'retry', f.status_code, f.started_at, f.finished_at)
        ::orchestrator.lane_result) filter (where orchestrator.is_dedicated(f.lane) or f.verdict = 'retry')
    , bool_or(not orchestrator.is_dedicated(f.lane) and f.verdict = 'retry')
  into count, finished, orderings, lane_results, failed_in_shared_lane
  from finished f;
end $$;
comment on function orchestrator.record_results(
  uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[]
, integer, double precision[], text[], timestamptz) is
  'Ends or delays timers by the results of their attempts, logs and counts them, and writes dead letters. '
  'Returns how many they are, and what is to be done about them';

-- A result counts until another claim takes the event, even after lease_until. All later ones are stale,
-- except those that are in the log already, because the reply to an earlier call was lost.
-- Locks timers in the order of event_id, as cancel_event() does: the pinned plan reads them so. Then it locks
-- what 28_dedicated_lanes.sql lists.
--
-- The pinned plan searches the primary key for p_event_ids, and hashes the timers with the arrays. A nested
-- loop is as fast; but once a vacuum has found the table empty, the planner expects one timer, and each call
-- reads the whole index.
create or replace function orchestrator.finish_events(
  p_event_ids uuid[],
  p_attempts integer[],
  p_results text[],
  p_status_codes integer[] default null,
  p_started_at double precision[] default null,  -- Unix seconds, by the database's clock
  p_finished_at double precision[] default null,
  p_errors text[] default null,
  p_responses text[] default null,
  p_retry_after double precision[] default null,  -- seconds that the receiver asked for
  p_worker integer default 0,
  p_claimed_at double precision[] default null,
  p_waited text[] default null)  -- JSON, as the claim gave it
returns table (event_id uuid, result text, due_at timestamptz, attempt integer)
language plpgsql security definer rows 10
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_now timestamptz;
  v_done record;
  -- Whether announce_finished() may have to write: timestamp is about every finished event, dlq about dead
  -- ones.
  v_announced constant boolean := exists (
    select from orchestrator.outbox_kind where kind = 'timestamp' or not p_results <@ array['delivered']);
begin
  perform orchestrator.check_results(p_event_ids, p_attempts, p_results);
  -- Whoever delays a timer locks the table first, and then reads the clock: see 74_lane_floors.sql.
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();

  -- Step 1: end or delay the timers, and log the results. p_errors has no text where all were delivered
  -- without a remark; null: it has none at all.
  if p_results <@ array['delivered'] and coalesce(array_remove(p_errors, null) = '{}', true) then
    v_done := orchestrator.record_delivered(
      p_event_ids, p_attempts, p_status_codes, p_started_at, p_finished_at, p_worker, p_claimed_at, p_waited, v_now
    , v_announced);
  else
    v_done := orchestrator.record_results(
      p_event_ids, p_attempts, p_results, p_status_codes, p_started_at, p_finished_at, p_errors, p_responses
    , p_retry_after, p_worker, p_claimed_at, p_waited, v_now);
    return query
    select f.event_id, f.result, f.due_at, f.attempt from unnest(v_done.finished) f where f.result <> 'delivered';
  end if;

  -- Step 2: announce the events that have ended.
  if v_announced then
    perform orchestrator.announce_finished(
      array_agg(f.event_id), array_agg(f.scheduled_at), array_agg(f.claimed_at))
    from unnest(v_done.finished) f
    where f.result <> 'retried';
  end if;

  -- Step 3: let the next events of their ordering keys go.
  if v_done.orderings is not null then
    perform orchestrator.advance_ordering(v_done.orderings);
  end if;

  -- Step 4: give destinations that fail in shared lanes dedicated ones, and update the breakers.
  if v_done.failed_in_shared_lane then
    v_done.lane_results := orchestrator.ensure_lanes_for_failures(v_done.lane_results);
  end if;
  if v_done.lane_results is not null then
    perform orchestrator.update_breakers(v_done.lane_results);
  end if;

  -- Step 5: say which results are stale. Fewer were recorded than given: another claim has taken some events
  -- since, or the call is repeated.
  if v_done.count < cardinality(p_event_ids) then
    return query
    select s.event_id, 'stale', null::timestamptz, s.attempt
    from orchestrator.stale_results(p_event_ids, p_attempts, p_worker) s;
  end if;
end $$;
comment on function orchestrator.finish_events(
  uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[]
, integer, double precision[], text[]) is
  'Records results of leased attempts, one array element each: delivered, retry (try again if attempts are left), or '
  'fail (for good); times are Unix seconds. '
  'Returns those not delivered, with their attempt: retried with the next due_at, dead, or stale, when the lease was '
  'lost and nothing was recorded';

create or replace function orchestrator.release_events(p_event_ids uuid[], p_attempts integer[]) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_released integer;
  v_first timestamptz;
  v_lanes integer[];
  v_orderings bigint[];
begin
  with released as (
    -- One attempt more: the number of this one stays spent, as the fence.
    update orchestrator.timer t
    set worker = null, lease_until = null, slot = null, busy = null, max_attempts = t.max_attempts + 1
    from unnest(p_event_ids, p_attempts) as r (event_id, attempt)
    where t.event_id = any (p_event_ids) and t.event_id = r.event_id and t.attempt = r.attempt
      and t.lease_until is not null
    returning t.due_at, t.lane, t.ordering
  )
  select count(*), min(r.due_at)
    , array_agg(distinct r.lane) filter (where orchestrator.is_dedicated(r.lane))
    , array_agg(r.ordering) filter (where r.ordering is not null)
  into v_released, v_first, v_lanes, v_orderings
  from released r;
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  if v_lanes is not null then
    -- The try of a half-open breaker was not made. Where another session has the lane locked, the next try
    -- goes through when the lease would have ended.
    update orchestrator.lane l
    set open_until = orchestrator.now()
    where l.lane = any (array(
      select l.lane from orchestrator.lane l
      where l.lane = any (v_lanes) and l.breaker = 'half_open'
      order by l.lane
      for update skip locked));
  end if;
  perform orchestrator.tell_due(v_first);
  return v_released;
end $$;
comment on function orchestrator.release_events(uuid[], integer[]) is
  'Gives leases back unused, without spending an attempt, and wakes the dispatchers if an event is due soon. '
  'Returns how many leases they were';

-- What follows never waits for another session. The caller asked finish_events() first, and got no lock in
-- time.

-- Later statements of the transaction need not wait for what this has locked.
create or replace function orchestrator.lock_free(p_event_ids uuid[]) returns uuid[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off as $$
declare
  v_locked uuid[];
begin
  with free as materialized (
    select t.event_id, t.ordering from orchestrator.timer t
    where t.event_id = any (p_event_ids)
    order by t.event_id
    for update skip locked
  )
  select array_agg(f.event_id) into v_locked
  from free f
  where f.ordering is null
    or pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), orchestrator.ordering_lock_number(f.ordering));
  return array(
    select t.event_id from orchestrator.timer t
    where t.event_id = any (p_event_ids) and t.event_id <> all (coalesce(v_locked, '{}')));
end $$;
comment on function orchestrator.lock_free(uuid[]) is
  'Locks the timers and ordering keys of events, except those that another session has locked. Returns these';

create or replace function orchestrator.finish_free_events(
  p_event_ids uuid[],
  p_attempts integer[],
  p_results text[],
  p_status_codes integer[] default null,
  p_started_at double precision[] default null,
  p_finished_at double precision[] default null,
  p_errors text[] default null,
  p_responses text[] default null,
  p_retry_after double precision[] default null,
  p_worker integer default 0,
  p_claimed_at double precision[] default null,
  p_waited text[] default null)
returns table (event_id uuid, result text, due_at timestamptz, attempt integer)
language plpgsql security definer rows 10
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_blocked constant uuid[] := orchestrator.lock_free(p_event_ids);
begin
  -- update_breakers() leaves out lanes that another session has locked: recording a result matters more than
  -- its count.
  perform set_config('orchestrator.wait', 'off', true);
  return query
  select f.event_id, f.result, f.due_at, f.attempt
  from (
    select array_agg(r.event_id) as event_ids
      , array_agg(r.attempt) as attempts
      , array_agg(r.result) as results
      , array_agg(r.status_code) as status_codes
      , array_agg(r.started_at) as started_at
      , array_agg(r.finished_at) as finished_at
      , array_agg(r.error) as errors
      , array_agg(r.response) as responses
      , array_agg(r.retry_after) as retry_after
      , array_agg(r.claimed_at) as claimed_at
      , array_agg(r.waited) as waited
    from unnest(p_event_ids, p_attempts, p_results, p_status_codes, p_started_at, p_finished_at, p_errors, p_responses
        , p_retry_after, p_claimed_at, p_waited)
      as r (event_id, attempt, result, status_code, started_at, finished_at, error, response
        , retry_after, claimed_at, waited)
    where r.event_id <> all (v_blocked)) r
  cross join lateral orchestrator.finish_events(
    r.event_ids, r.attempts, r.results, r.status_codes, r.started_at, r.finished_at, r.errors, r.responses
  , r.retry_after, p_worker, r.claimed_at, r.waited) f
  where r.event_ids is not null
  union all
  select r.event_id, 'blocked', null, r.attempt
  from unnest(p_event_ids, p_attempts) as r (event_id, attempt)
  where r.event_id = any (v_blocked);
  perform set_config('orchestrator.wait', '', true);
end $$;
comment on function orchestrator.finish_free_events(
  uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[]
, integer, double precision[], text[]) is
  'finish_events() that does not wait for other sessions. '
  'Returns blocked, and records nothing, for events whose timer or ordering key another session has locked; try again';

create or replace function orchestrator.release_free_events(p_event_ids uuid[], p_attempts integer[])
returns table (released integer, blocked uuid[])
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  blocked := orchestrator.lock_free(p_event_ids);
  released := (
    select orchestrator.release_events(array_agg(r.event_id), array_agg(r.attempt))
    from unnest(p_event_ids, p_attempts) as r (event_id, attempt)
    where r.event_id <> all (blocked));
  return next;
end $$;
comment on function orchestrator.release_free_events(uuid[], integer[]) is
  'release_events() that does not wait for other sessions. '
  'Returns how many leases it gave back, and which events others have locked';
