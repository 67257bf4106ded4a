-- Circuit breakers: finishes open and close them, operators close them by hand.

-- Locks the lanes in order, and only those whose state may change: the successes of a healthy destination write nothing.
-- finish_free_events() has it leave out those that another session has: a result is worth more than its count.
create or replace function orchestrator.update_breakers(
  p_lanes integer[], p_delivered boolean[], p_status_codes integer[], p_started_at double precision[], p_finished_at double precision[])
returns void
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_locked integer[];
  v_opened integer[];
  v_closed boolean;
begin
  if current_setting('orchestrator.wait', true) = 'off' then
    v_locked := array(
      select l.lane from orchestrator.lane l
      where l.lane = any (p_lanes) and l.name is not null
        and (l.failures > 0 or l.window_at is not null or l.breaker <> 'closed' or l.parallel_now is not null or false = any (p_delivered))
      order by l.lane
      for update skip locked);
  else
    v_locked := array(
      select l.lane from orchestrator.lane l
      where l.lane = any (p_lanes) and l.name is not null
        and (l.failures > 0 or l.window_at is not null or l.breaker <> 'closed' or l.parallel_now is not null or false = any (p_delivered))
      order by l.lane
      for update);
  end if;
  if v_locked = '{}' then
    return;
  end if;
  with result as (
    select l.lane, r.delivered, r.status_code, r.finished_at
      , max(r.finished_at) filter (where r.delivered) over (partition by l.lane) as last_delivered_at
    from unnest(p_lanes, p_delivered, p_status_codes, p_started_at, p_finished_at) as r (lane, delivered, status_code, started_at, finished_at)
    cross join lateral (select l.* from orchestrator.lane l where l.lane = r.lane limit 1) l
    -- What began before the breaker opened says nothing about its try. A worker's idea of the time may be a little early.
    where l.lane = any (v_locked) and (l.breaker = 'closed' or l.breaker = 'half_open' and coalesce(to_timestamp(r.started_at), v_now) >= l.tried_at - interval '10 ms')
  ), batch as (
    select r.lane, count(*)::integer as attempts, (count(*) filter (where not r.delivered))::integer as failed
      , (count(*) filter (where not r.delivered and r.finished_at > r.last_delivered_at is not false))::integer as trailing
      , count(*) filter (where not r.delivered and coalesce(r.status_code, 503) in (408, 429, 503, 504)) > 0 as throttled
    from result r
    group by r.lane
  ), counted as (
    select l.lane, l.breaker, l.openings, l.parallel_now, l.throttled_at, b.throttled,
       b.attempts - b.failed as delivered, b.failed, d.adaptive, d.max_parallel
      , d.breaker_failures, d.breaker_ratio, d.breaker_minimum, d.breaker_cooldown, d.breaker_max_cooldown
      , case when b.trailing < b.attempts then b.trailing else l.failures + b.failed end as failures
      , w.fresh
      , case when not w.fresh then l.window_at when b.failed > 0 then v_now end as window_at
      , case when not w.fresh then l.window_attempts + b.attempts when b.failed > 0 then b.attempts else 0 end as window_attempts
      , case when w.fresh then b.failed else l.window_failures + b.failed end as window_failures
    from batch b
    cross join lateral (select l.* from orchestrator.lane l where l.lane = b.lane limit 1) l
    cross join lateral (select d.* from orchestrator.destination d where d.name = l.name limit 1) d
    cross join lateral (select l.window_at is null or l.window_at not between v_now - d.breaker_window and v_now as fresh) w
  ), decided as (
    select c.*
      , c.breaker = 'half_open' and c.delivered > 0 as closes
      , case c.breaker
          when 'half_open' then c.delivered = 0
          else coalesce(c.failures >= c.breaker_failures, false)
            or coalesce(c.window_attempts >= c.breaker_minimum and c.window_failures >= c.breaker_ratio * c.window_attempts, false)
        end and c.failed > 0 as opens
    from counted c
  ), noted as (
    update orchestrator.lane l
    set failures = case when d.opens or d.closes then 0 else d.failures end
      , failed_at = case when d.failed > 0 then v_now else l.failed_at end
      , window_at = case when not d.opens and not d.closes then d.window_at end
      , window_attempts = case when d.opens or d.closes then 0 else d.window_attempts end
      , window_failures = case when d.opens or d.closes then 0 else d.window_failures end
      , breaker = case when d.opens then 'open' when d.closes then 'closed' else d.breaker end
      , openings = case when d.opens then least(d.openings + 1, 30) when d.closes then 0 else d.openings end
      , open_until = case when d.opens then v_now + least(d.breaker_cooldown * power(2, d.openings), d.breaker_max_cooldown)
                          when d.closes then '-infinity' else l.open_until end
      , opened_at = case when d.opens and d.breaker = 'closed' then v_now else l.opened_at end
      , closed_at = case when d.closes then v_now else l.closed_at end
      , parallel_now = case
          when not d.adaptive then null
          when d.throttled and d.throttled_at > v_now - interval '1 s' and d.throttled_at <= v_now then d.parallel_now
          when d.throttled then greatest(1, 0.7 * coalesce(d.parallel_now, d.max_parallel))
          else nullif(least(d.max_parallel, d.parallel_now + d.delivered / d.parallel_now), d.max_parallel) end
      , throttled_at = case
          when d.adaptive and d.throttled and (d.throttled_at > v_now - interval '1 s' and d.throttled_at <= v_now) is not true then v_now
          else l.throttled_at end
    from decided d
    where l.lane = d.lane
    returning l.lane, l.hash, d.opens, d.closes
  )
  -- What dispatchers were given before it had a lane of its own, they know by the shared one.
  select array_agg(n.lane) filter (where n.opens) || array_agg((n.hash & 63)::integer) filter (where n.opens and n.hash is not null), bool_or(n.closes)
  into v_opened, v_closed
  from noted n;
  perform orchestrator.recall_lane(o.lane) from unnest(v_opened) as o (lane);
  if v_closed then
    perform orchestrator.tell_due(v_now);
  end if;
end $$;
comment on function orchestrator.update_breakers(integer[], boolean[], integer[], double precision[], double precision[]) is
  'Counts results of own lanes, one array element each, and opens and closes their breakers; lowers and raises the bound of adaptive ones';

create or replace function orchestrator.ensure_lanes_for_failures(p_lanes integer[], p_event_ids uuid[]) returns integer[]
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_names text[];
begin
  v_names := array(
    select case when r.lane < 64 then (
      select orchestrator.destination_name(e.delivery_type, e.destination) from orchestrator.event e
      where e.id = r.event_id and e.scheduled_at >= uuid_extract_timestamp(r.event_id) and e.scheduled_at < uuid_extract_timestamp(r.event_id) + interval '1 ms' limit 1) end
    from unnest(p_lanes, p_event_ids) with ordinality as r (lane, event_id, n) order by r.n);
  return array(
    select coalesce(o.lane, r.lane) from unnest(p_lanes, v_names) with ordinality as r (lane, name, n)
    left join (select distinct o.name, o.lane from orchestrator.ensure_dedicated_lanes(array(select distinct n from unnest(v_names) n where n is not null), false) o) o on o.name = r.name
    order by r.n);
end $$;
comment on function orchestrator.ensure_lanes_for_failures(integer[], uuid[]) is
  'Gives the destinations of events that failed in shared lanes lanes of their own, for their breakers; answers the lanes by which to count, one for each event';

create or replace function orchestrator.max_unconfigured_destinations() returns integer
language sql immutable parallel safe
return 1000;
comment on function orchestrator.max_unconfigured_destinations() is 'Destinations that get a lane of their own for failing, without being configured; each costs every claim a look';

create or replace function orchestrator.close_breaker(p_name text)
returns table (name text, closed boolean, waiting bigint, note text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_before text;
  v_paused boolean;
begin
  if not orchestrator.await_destination(v_name) then
    return query select v_name, true, orchestrator.count_waiting(v_name), orchestrator.note_destination(v_name, 'close_breaker');
    return;
  end if;
  perform orchestrator.fold_destination(v_name) where exists (select from orchestrator.control_note n where n.name = v_name);
  update orchestrator.lane l
  set breaker = 'closed', open_until = '-infinity', openings = 0, failures = 0, window_at = null, window_attempts = 0, window_failures = 0
    , closed_at = case when l.breaker = 'closed' then l.closed_at else v_now end
  where l.name = v_name
  returning old.breaker, new.paused_at is not null into v_before, v_paused;
  if not found then
    return;
  end if;
  perform orchestrator.tell_due(v_now);
  return query
  select v_name, v_before <> 'closed', orchestrator.count_waiting(v_name)
    , concat_ws('; ', case when v_before = 'closed' then 'it was closed' else 'it opens again when attempts go on failing' end
      , case when v_paused then 'the destination is paused' end);
end $$;
comment on function orchestrator.close_breaker(text) is 'Closes a destination''s breaker without waiting for its next try. No row: there is no such destination';
