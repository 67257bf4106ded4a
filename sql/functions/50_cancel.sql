-- Cancelling: by id, by external id, or by filter. The timer's row lock decides between a cancel and a
-- claim.

-- Waits for whoever has claimed, finishes, moves or ends one of these events; in the order of ids, so
-- that two calls cannot deadlock. What those did, the caller sees in its next statement.
create or replace function orchestrator.lock_events(p_ids uuid[]) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
  perform from orchestrator.horizon h where h.id = any (p_ids) order by h.id for update;
  perform from orchestrator.timer t where t.event_id = any (p_ids) order by t.event_id for update;
end $$;
comment on function orchestrator.lock_events(uuid[]) is
  'Locks the timers, and the rows of horizon, of these events';

-- Waits for a second, as for a claim, and then leaves out what another session has locked: one locked
-- event must not hold up all others.
create or replace function orchestrator.lock_available_events(p_ids uuid[]) returns uuid[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
as $$
declare
  v_began constant timestamptz := clock_timestamp();
  v_patience constant text := current_setting('lock_timeout');
  v_blocked uuid[];
begin
  perform set_config('lock_timeout', '1s', true);
  perform orchestrator.lock_events(p_ids);
  perform set_config('lock_timeout', v_patience, true);
  return p_ids;
exception when lock_not_available or query_canceled then
  perform orchestrator.pass_on_cancel(sqlstate, sqlerrm, v_began + '1 s');
  v_blocked := orchestrator.lock_free(p_ids) || array(
    select h.id from orchestrator.horizon h where h.id = any (p_ids)
    except
    select f.id from (
      select h.id from orchestrator.horizon h where h.id = any (p_ids) order by h.id for update skip locked) f);
  return array(select i from unnest(p_ids) i where i <> all (v_blocked));
end $$;
comment on function orchestrator.lock_available_events(uuid[]) is
  'As lock_events(), but leaves out events that another session''s open transaction has locked. '
  'Returns those that it has locked';

-- The caller has locked the events.
create or replace function orchestrator.end_events(
  p_ids uuid[], p_result text, p_successor uuid default null) returns uuid[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_ended uuid[];
  v_scheduled timestamptz[];
  v_waiting uuid[];
  v_orderings bigint[];
begin
  with gone as (
    delete from orchestrator.timer t
    where t.event_id = any (p_ids) and orchestrator.is_free(t.lease_until, v_now)
    returning t.event_id, t.scheduled_at, coalesce(t.attempt, 0) as attempt, t.ordering, t.source, t.destination
      , t.retrying
  ), logged as (
    insert into orchestrator.outcome (event_id, scheduled_at, finished_at, attempt, result, successor)
    select g.event_id, g.scheduled_at, v_now, g.attempt, p_result, p_successor from gone g
  ), waiting as (
    -- Events of the horizon have no timer: they are marked there.
    update orchestrator.horizon h
    set ended_at = v_now, ended_as = p_result, successor = p_successor
    where h.id = any (p_ids) and h.ended_at is null
    returning h.id
      , hashtextextended(h.source, 0) as source
      , hashtextextended(orchestrator.destination_name(h.delivery_type, h.destination), 0) as destination
  ), counted as (
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', v_now), c.name, e.source, e.destination, c.value
    from (
      select e.source, case when e.source is not null then e.destination end as destination
        , count(*) as ended, count(*) filter (where e.retrying) as retrying
      from (
        select g.source, g.destination, g.retrying from gone g
        union all
        select w.source, w.destination, false from waiting w) e
      group by 1, 2) e
    cross join lateral (values (p_result, e.ended), ('retrying', -e.retrying)) as c (name, value)
    where c.value <> 0
  )
  select array_agg(g.event_id), array_agg(g.scheduled_at)
    , array_agg(g.ordering) filter (where g.ordering is not null)
    , array(select w.id from waiting w)
  into v_ended, v_scheduled, v_orderings, v_waiting
  from gone g;
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  -- Both kinds are announced, if that is on.
  if exists (select from orchestrator.outbox_kind where kind = 'timestamp') then
    perform orchestrator.announce_finished(v_ended, v_scheduled) where v_ended is not null;
    insert into orchestrator.outbox (created_at, event_id, kind, key, value)
    select v_now, h.id, 'timestamp'
      , orchestrator.record_key(h.ordering_key, h.external_job_id, h.id)
      , orchestrator.timestamp_message(
          h.id, h.source, h.external_job_id, h.scheduled_at, null, null, null, h.ended_at, h.ended_as, 0)
    from orchestrator.horizon h
    where h.id = any (v_waiting)
    order by h.id;
    perform orchestrator.tell_outbox() where found;
  end if;
  return coalesce(v_ended, '{}') || v_waiting;
end $$;
comment on function orchestrator.end_events(uuid[], text, uuid) is
  'Ends events that nobody is attempting, as cancelled or rescheduled; returns those that it ended';

create or replace function orchestrator.cancel_event(
  p_event_id uuid default null, p_external_job_id text default null)
returns table (event_id uuid, result text, status text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_cancelled uuid[];
begin
  if num_nonnulls(p_event_id, p_external_job_id) <> 1 then
    raise exception 'cancel_event: give either p_event_id or p_external_job_id'
      using errcode = 'invalid_parameter_value';
  end if;
  select array_agg(e.id), array_agg(e.scheduled_at) into v_ids, v_scheduled
  from orchestrator.find_events(p_event_id, p_external_job_id) e;
  perform orchestrator.lock_events(v_ids);
  v_cancelled := orchestrator.end_events(v_ids, 'cancelled');
  return query
  select s.id
    , case
        when s.id = any (v_cancelled) then 'cancelled'
        when s.status = 'cancelled' then 'already_cancelled'
        when s.status = 'in_flight' then 'in_flight'
        else 'finished'
      end
    , s.status
  from unnest(v_ids, v_scheduled) as e (id, scheduled_at)
  -- The limit keeps the planner from joining all of timer to the view first.
  cross join lateral (
    select s.id, s.status from orchestrator.event_status s
    where s.id = e.id and s.scheduled_at = e.scheduled_at
    limit 1) s
  order by e.scheduled_at desc, e.id desc;
end $$;
comment on function orchestrator.cancel_event(uuid, text) is
  'Cancels one event, or all with an external_job_id; no row: there is none. A row for each, with its status: '
  'cancelled, already_cancelled, finished, or in_flight (a claimed attempt goes on)';

create or replace function orchestrator.find_events(p_event_id uuid, p_external_job_id text)
returns table (id uuid, scheduled_at timestamptz)
language plpgsql stable security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_at constant timestamptz := uuid_extract_timestamp(p_event_id);
begin
  if p_event_id is not null then
    return query
    select e.id, e.scheduled_at from orchestrator.stored_event e
    where e.id = p_event_id and e.scheduled_at >= v_at and e.scheduled_at < v_at + interval '1 ms';
    -- A program of another version may have told its client the id by the other formula. Only events of
    -- the same millisecond can have it.
    if not found and exists (select from orchestrator.newest_control() c where c.former_ids_until is not null) then
      return query
      select e.id, e.scheduled_at from orchestrator.stored_event e
      where e.id >= orchestrator.first_id(v_at) and e.id < orchestrator.first_id(v_at + interval '1 ms')
        and e.scheduled_at >= v_at and e.scheduled_at < v_at + interval '1 ms'
        and p_event_id in (
          orchestrator.former_event_id(e.source, e.external_job_id, e.scheduled_at)
          , orchestrator.event_id(e.source, e.external_job_id, e.scheduled_at, e.ordering_key))
      limit 1;
    end if;
  else
    return query
    select e.id, e.scheduled_at from orchestrator.stored_event e
    where hashtextextended(e.external_job_id, 0) = hashtextextended(p_external_job_id, 0)
      and e.external_job_id = p_external_job_id;
  end if;
end $$;
comment on function orchestrator.find_events(uuid, text) is
  'The event with this id, or all events with this external_job_id, from event and horizon';

-- Visits live events in the order of ids, which is that of scheduled_at. An event that is submitted or
-- ends meanwhile may be visited or not. Answers one row: seen, matched and cancelled events (none in a
-- dry run), those in flight, which go on, ten examples, and p_after of the next call. An event that
-- matched and is neither cancelled nor in flight is locked by another session's open transaction.
create or replace function orchestrator.cancel_events(
  p_source text default null, p_destination text default null,
  p_from timestamptz default null, p_until timestamptz default null,
  p_dry_run boolean default false, p_limit integer default 10000, p_after uuid default null)
returns table (
  seen bigint, matched bigint, cancelled bigint, in_flight bigint, examples uuid[], next_after uuid)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_from constant uuid := greatest(orchestrator.first_id(p_from), p_after, '00000000-0000-0000-0000-000000000000');
  v_until constant uuid := coalesce(
    orchestrator.first_id(p_until + interval '1 ms'), 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  v_name constant text := case when p_destination is not null then orchestrator.as_destination(p_destination) end;
  v_last uuid;
  v_ids uuid[];
begin
  if num_nonnulls(p_source, p_destination, p_from, p_until) = 0 then
    raise exception 'cancel_events: give p_source, p_destination, p_from or p_until'
      using errcode = 'invalid_parameter_value';
  end if;
  if p_limit is null or p_limit not between 1 and 100000 then
    raise exception 'p_limit: expected 1 to 100000, got %', coalesce(p_limit::text, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  -- The next p_limit live events, of both tables, and which of them match.
  with live as materialized (
    select l.id, l.scheduled_at
    from (
      (select t.event_id as id, t.scheduled_at from orchestrator.timer t
       where t.event_id >= v_from and t.event_id <= v_until and (p_after is null or t.event_id > p_after)
       order by t.event_id
       limit p_limit)
      union all
      (select h.id, h.scheduled_at from orchestrator.horizon h
       where h.id >= v_from and h.id <= v_until and (p_after is null or h.id > p_after) and h.ended_at is null
       order by h.id
       limit p_limit)) l
    order by l.id
    limit p_limit
  )
  select count(*), max(l.id::text)::uuid
    , array_agg(e.id order by e.id) filter (where (p_source is null or e.source = p_source)
        and (v_name is null
          or orchestrator.matches(orchestrator.destination_name(e.delivery_type, e.destination), v_name))
        and (p_from is null or e.scheduled_at >= p_from)
        and (p_until is null or e.scheduled_at < p_until))
  into seen, v_last, v_ids
  from live l
  left join lateral (
    select e.* from orchestrator.stored_event e
    where e.id = l.id and e.scheduled_at = l.scheduled_at
    limit 1) e on true;
  matched := coalesce(cardinality(v_ids), 0);
  cancelled := 0;
  examples := coalesce(v_ids[:10], '{}');
  next_after := case when seen >= p_limit then v_last end;
  if matched > 0 and not p_dry_run then
    cancelled := cardinality(orchestrator.end_events(orchestrator.lock_available_events(v_ids), 'cancelled'));
  end if;
  in_flight := (
    select count(*) from orchestrator.timer t
    where t.event_id = any (v_ids) and t.lease_until > v_now);
  return next;
end $$;
comment on function orchestrator.cancel_events(
  text, text, timestamptz, timestamptz, boolean, integer, uuid) is
  'Cancels live events by source, destination (* for any characters) and scheduled time, from p_from to before '
  'p_until. Looks at p_limit events after p_after; next_after null: there are no more';
