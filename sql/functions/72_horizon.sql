-- The horizon: events of days that have no partition yet. insert_each() puts them there
-- (20_submission.sql), and run_maintenance() moves them to event once their day has a partition.

create or replace function orchestrator.move_horizon(p_limit integer default 20000) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_days constant date[] := orchestrator.partition_days();
  v_end constant uuid := orchestrator.first_id((v_days[cardinality(v_days)] + 1)::timestamptz);
  v_moved bigint;
  v_ids uuid[];
  v_scheduled timestamptz[];
begin
  with due as materialized (
    select h.id
    from orchestrator.horizon h
    where h.id < v_end and (h.scheduled_at at time zone 'UTC')::date = any (v_days)
    order by h.id
    limit p_limit
    for update skip locked
  ),
  gone as (
    delete from orchestrator.horizon h where h.id = any (array(select d.id from due d)) returning h.*
  ),
  kept as (
    insert into orchestrator.event
    select e.*
    from gone g
    cross join lateral orchestrator.as_event(
      g.id, g.scheduled_at, g.created_at, g.max_retries, g.source, g.external_job_id, g.delivery_type, g.destination
    , g.retry_policy, g.headers, g.payload, g.ordering_key, g.priority, g.spread, g.expires_at, g.predecessor
    , g.correlation_id, g.traceparent) e
    order by e.id
    on conflict do nothing
    returning id, scheduled_at
  ),
  ended as (
    insert into orchestrator.outcome (event_id, scheduled_at, finished_at, attempt, result, successor)
    select g.id, g.scheduled_at, g.ended_at, 0, g.ended_as, g.successor
    from gone g
    join kept k on k.id = g.id
    where g.ended_at is not null
  )
  -- Those that did not end in the horizon get their timers.
  select (select count(*) from gone), array_agg(k.id order by k.id), array_agg(k.scheduled_at order by k.id)
  into v_moved, v_ids, v_scheduled
  from kept k
  join gone g on g.id = k.id and g.ended_at is null;
  perform orchestrator.create_timers(v_ids, v_scheduled) where v_ids is not null;
  return v_moved;
end $$;
comment on function orchestrator.move_horizon(integer) is
  'Moves up to p_limit events, the earliest first, from horizon to event, once their day has a partition. '
  'Creates their timers, or the outcomes that ended them; returns how many it moved';

-- Whoever attaches a day's partition has waited for those that were putting events of that day into the
-- horizon.
create or replace function orchestrator.update_horizon_start() returns timestamptz
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_end timestamptz;
begin
  select (d.day + 1)::timestamptz into v_end
  from unnest(orchestrator.partition_days()) as d (day)
  where d.day >= orchestrator.now()::date and d.day + 1 <> all (orchestrator.partition_days())
  order by d.day
  limit 1;
  select least(v_end, min(h.scheduled_at)) into v_end
  from (select h.scheduled_at from orchestrator.horizon h order by h.id limit 1) h;
  update orchestrator.control c set horizon_at = v_end where c.horizon_at <> v_end;
  return v_end;
end $$;
comment on function orchestrator.update_horizon_start() is
  'Sets the time from which on submissions must look into the horizon: the first day without a partition, or the first '
  'event there';
