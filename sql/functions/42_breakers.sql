-- Circuit breakers: finishes open and close them by update_breakers(), operators close them by hand. Claims
-- obey them in 31_limits.sql: lane_may_give() stops attempts, and book_slots() makes an open one half-open
-- for a try. Adaptive bounds (AIMD) move here, too. A result counts as a success (lane_result.succeeded)
-- unless it is one to retry.

-- Inlined by the planner.
create or replace function orchestrator.counts_successes(p_lane orchestrator.lane) returns boolean
language sql immutable
return p_lane.failures > 0 or p_lane.window_at is not null or p_lane.breaker <> 'closed'
  or p_lane.parallel_now is not null;
comment on function orchestrator.counts_successes(orchestrator.lane) is
  'Whether a success changes the state of a lane. It does not where all has gone well';

-- One step of update_breakers(), with its settings. Successes of a healthy destination write nothing.
create or replace function orchestrator.lock_breakers(p_results orchestrator.lane_result[]) returns integer[]
language plpgsql as $$
begin
  if current_setting('orchestrator.wait', true) = 'off' then
    return array(
      select l.lane from orchestrator.lane l
      where l.lane = any (array(select r.lane from unnest(p_results) r)) and l.name is not null
        and (orchestrator.counts_successes(l) or exists (select from unnest(p_results) r where not r.succeeded))
      order by l.lane
      for update skip locked);
  end if;
  return array(
    select l.lane from orchestrator.lane l
    where l.lane = any (array(select r.lane from unnest(p_results) r)) and l.name is not null
      and (orchestrator.counts_successes(l) or exists (select from unnest(p_results) r where not r.succeeded))
    order by l.lane
    for update);
end $$;
comment on function orchestrator.lock_breakers(orchestrator.lane_result[]) is
  'Locks, in order, the lanes whose state the results may change, and returns them. '
  'With orchestrator.wait = off it leaves out those that another session has locked';

-- Inlined by the planner.
create or replace function orchestrator.aimd_bound(
  p_bound double precision, p_max_parallel integer, p_throttled boolean, p_successes integer)
returns double precision
language sql immutable
return case
  when p_throttled then greatest(1, 0.7 * coalesce(p_bound, p_max_parallel))
  else nullif(least(p_max_parallel, p_bound + p_successes / p_bound), p_max_parallel)
end;
comment on function orchestrator.aimd_bound(double precision, integer, boolean, integer) is
  'The next bound of an adaptive destination: times 0.7 when throttled, plus one for each round of successes. '
  'Null: p_max_parallel';

create or replace function orchestrator.update_breakers(p_results orchestrator.lane_result[]) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_locked constant integer[] := orchestrator.lock_breakers(p_results);
  v_opened integer[];
  v_closed boolean;
begin
  if v_locked = '{}' then
    return;
  end if;

  -- What counts: all attempts of a closed breaker, the try of a half-open one, none of an open one.
  with attempt as (
    select l.lane, r.succeeded, r.status_code, r.finished_at
      , max(r.finished_at) filter (where r.succeeded) over (partition by l.lane) as last_success_at
    from unnest(p_results) r
    cross join lateral (select l.* from orchestrator.lane l where l.lane = r.lane limit 1) l
    where l.lane = any (v_locked)
      -- What began before the breaker opened is not its try. A worker's clock may be a little slow.
      and (l.breaker = 'closed'
        or l.breaker = 'half_open' and coalesce(to_timestamp(r.started_at), v_now) >= l.tried_at - interval '10 ms')
  ), batch as (
    -- For each lane; trailing: failures after the last success; throttled: the destination asked for less, or
    -- gave no response (no status code counts as 503).
    select a.lane
      , count(*)::integer as attempts
      , (count(*) filter (where not a.succeeded))::integer as failed
      -- last_success_at null: there was none, so all failures are trailing.
      , (count(*) filter (where not a.succeeded and a.finished_at > a.last_success_at is not false))::integer
        as trailing
      , count(*) filter (where not a.succeeded and coalesce(a.status_code, 503) in (408, 429, 503, 504)) > 0
        as throttled
    from attempt a
    group by a.lane
  ), counters as (
    -- The counters of the lane with the batch added. A window that has ended begins again, and so does one
    -- that began in the future: the clock was set back.
    select l.lane, l.breaker, l.openings, l.parallel_now, b.throttled
      , (l.throttled_at > v_now - interval '1 s' and l.throttled_at <= v_now) is true as is_lowered
      , b.attempts - b.failed as successes, b.failed
      , d.adaptive, d.max_parallel
      , d.breaker_failures, d.breaker_ratio, d.breaker_minimum, d.breaker_cooldown, d.breaker_max_cooldown
      , case when b.trailing < b.attempts then b.trailing else l.failures + b.failed end as failures
      , case when not w.is_new then l.window_at when b.failed > 0 then v_now end as window_at
      , case
          when not w.is_new then l.window_attempts + b.attempts
          when b.failed > 0 then b.attempts
          else 0
        end as window_attempts
      , case when w.is_new then b.failed else l.window_failures + b.failed end as window_failures
    from batch b
    cross join lateral (select l.* from orchestrator.lane l where l.lane = b.lane limit 1) l
    cross join lateral (select d.* from orchestrator.destination d where d.name = l.name limit 1) d
    cross join lateral (
      select l.window_at is null or l.window_at not between v_now - d.breaker_window and v_now as is_new) w
  ), decision as (
    -- A success closes a half-open breaker. A batch without one opens it again, as failures in a row, or
    -- their share of the window, open a closed one.
    select c.*
      , c.breaker = 'half_open' and c.successes > 0 as closes
      , c.failed > 0 and case c.breaker
          when 'half_open' then c.successes = 0
          else coalesce(c.failures >= c.breaker_failures, false)
            or coalesce(c.window_attempts >= c.breaker_minimum
              and c.window_failures >= c.breaker_ratio * c.window_attempts, false)
        end as opens
    from counters c
  ), updated as (
    -- Counters begin again when a breaker opens or closes; each opening doubles the cooldown.
    update orchestrator.lane l
    set failures = case when d.opens or d.closes then 0 else d.failures end
      , failed_at = case when d.failed > 0 then v_now else l.failed_at end
      , window_at = case when not d.opens and not d.closes then d.window_at end
      , window_attempts = case when d.opens or d.closes then 0 else d.window_attempts end
      , window_failures = case when d.opens or d.closes then 0 else d.window_failures end
      , breaker = case when d.opens then 'open' when d.closes then 'closed' else d.breaker end
      , openings = case when d.opens then least(d.openings + 1, 30) when d.closes then 0 else d.openings end
      , open_until = case
          when d.opens then v_now + least(d.breaker_cooldown * power(2, d.openings), d.breaker_max_cooldown)
          when d.closes then '-infinity'
          else l.open_until
        end
      , opened_at = case when d.opens and d.breaker = 'closed' then v_now else l.opened_at end
      , closed_at = case when d.closes then v_now else l.closed_at end
      -- The bound is lowered once a second at most.
      , parallel_now = case
          when not d.adaptive then null
          when d.throttled and d.is_lowered then d.parallel_now
          else orchestrator.aimd_bound(d.parallel_now, d.max_parallel, d.throttled, d.successes)
        end
      , throttled_at = case when d.adaptive and d.throttled and not d.is_lowered then v_now else l.throttled_at end
    from decision d
    where l.lane = d.lane
    returning l.lane, l.hash, d.opens, d.closes
  )
  -- Events claimed earlier still carry the shared lane, so recall that lane too.
  select array_agg(u.lane) filter (where u.opens)
      || array_agg((u.hash & 63)::integer) filter (where u.opens and u.hash is not null)
    , bool_or(u.closes)
  into v_opened, v_closed
  from updated u;

  perform orchestrator.recall_lane(o.lane) from unnest(v_opened) as o (lane);
  if v_closed then
    perform orchestrator.tell_due(v_now);
  end if;
end $$;
comment on function orchestrator.update_breakers(orchestrator.lane_result[]) is
  'Counts results of dedicated lanes, opens and closes their breakers, and lowers and raises adaptive bounds';

create or replace function orchestrator.ensure_lanes_for_failures(p_results orchestrator.lane_result[])
returns orchestrator.lane_result[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
begin
  return array(
    with named as materialized (
      select r.*
        , case when not orchestrator.is_dedicated(r.lane)
            then (select e.name from orchestrator.destination_of(r.event_id) e) end as name
      from unnest(p_results) r
    )
    select row(coalesce(d.lane, n.lane), n.event_id, n.succeeded, n.status_code, n.started_at, n.finished_at)
      ::orchestrator.lane_result
    from named n
    left join orchestrator.ensure_dedicated_lanes(
      array(select distinct n.name from named n where n.name is not null), false) d on d.name = n.name);
end $$;
comment on function orchestrator.ensure_lanes_for_failures(orchestrator.lane_result[]) is
  'Gives the destinations of events that failed in shared lanes dedicated lanes, for their breakers. '
  'Returns the results with the lanes in which to count them';

create or replace function orchestrator.max_unconfigured_destinations() returns integer
language sql immutable parallel safe
return 1000;
comment on function orchestrator.max_unconfigured_destinations() is
  'Most unconfigured destinations that may get a dedicated lane because they failed. Every claim checks each of them';

create or replace function orchestrator.close_breaker(p_name text)
returns table (name text, closed boolean, waiting bigint, note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_before text;
  v_paused boolean;
begin
  if not orchestrator.await_destination(v_name) then
    return query
    select v_name, true, orchestrator.count_waiting(v_name), orchestrator.note_destination(v_name, 'close_breaker');
    return;
  end if;
  perform orchestrator.fold_destination(v_name);
  update orchestrator.lane l
  set breaker = 'closed'
    , open_until = '-infinity'
    , openings = 0
    , failures = 0
    , window_at = null
    , window_attempts = 0
    , window_failures = 0
    , closed_at = case when l.breaker = 'closed' then l.closed_at else v_now end
  where l.name = v_name
  returning old.breaker, new.paused_at is not null into v_before, v_paused;
  if not found then
    return;
  end if;
  perform orchestrator.tell_due(v_now);
  return query
  select v_name, v_before <> 'closed', orchestrator.count_waiting(v_name)
    , concat_ws('; '
      , case when v_before = 'closed' then 'it was closed' else 'it opens again when attempts go on failing' end
      , case when v_paused then 'the destination is paused' end);
end $$;
comment on function orchestrator.close_breaker(text) is
  'Closes the breaker of a destination without waiting for its next try. No row: there is no such destination';
