-- Cancelling: by id, or every event of an external id. The timer's row lock decides between a cancel and a claim.

create or replace function orchestrator.cancel_event(p_event_id uuid default null, p_external_job_id text default null)
returns table (event_id uuid, result text, status text)
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off as $$
#variable_conflict use_column
declare
  v_now timestamptz;
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_cancelled uuid[];
  v_cancelled_scheduled timestamptz[];
  v_orderings bigint[];
begin
  if num_nonnulls(p_event_id, p_external_job_id) <> 1 then
    raise exception 'cancel_event: give either p_event_id or p_external_job_id' using errcode = 'invalid_parameter_value';
  end if;
  if p_event_id is not null then
    select array_agg(e.id), array_agg(e.scheduled_at) into v_ids, v_scheduled from orchestrator.event e
    where e.id = p_event_id and e.scheduled_at >= uuid_extract_timestamp(p_event_id) and e.scheduled_at < uuid_extract_timestamp(p_event_id) + interval '1 ms';
  else
    select array_agg(e.id), array_agg(e.scheduled_at) into v_ids, v_scheduled from orchestrator.event e
    where hashtextextended(e.external_job_id, 0) = hashtextextended(p_external_job_id, 0) and e.external_job_id = p_external_job_id;
  end if;
  -- Waits here for a claim or a finish that has the row, then sees what it did; ordered, so that two cancels cannot deadlock.
  perform from orchestrator.timer t
  where t.event_id = any (v_ids)
  order by t.event_id
  for update;
  v_now := orchestrator.now();
  with gone as (
    delete from orchestrator.timer t
    where t.event_id = any (v_ids) and (t.lease_until is null or t.lease_until <= v_now)
    returning t.event_id, t.scheduled_at, t.attempt, t.ordering
  ), logged as (
    insert into orchestrator.outcome (event_id, scheduled_at, finished_at, attempt, result)
    select g.event_id, g.scheduled_at, v_now, g.attempt, 'cancelled' from gone g
  ), counted as (
    insert into orchestrator.statistic select date_trunc('minute', v_now), 'cancelled', count(*) from gone having count(*) > 0
  )
  select array_agg(g.event_id), array_agg(g.scheduled_at), array_agg(g.ordering) filter (where g.ordering is not null)
  into v_cancelled, v_cancelled_scheduled, v_orderings from gone g;
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  if v_cancelled is not null and exists (select from orchestrator.outbox_kind where kind = 'timestamp') then
    perform orchestrator.announce_finished(v_cancelled, v_cancelled_scheduled);
  end if;
  -- The limit keeps the planner from joining all of timer to the view first.
  return query
  select s.id
    , case when s.id = any (v_cancelled) then 'cancelled' when s.status = 'cancelled' then 'already_cancelled'
           when s.status = 'in_flight' then 'in_flight' else 'finished' end
    , s.status
  from unnest(v_ids, v_scheduled) as e (id, scheduled_at)
  cross join lateral (
    select s.id, s.status from orchestrator.event_status s where s.id = e.id and s.scheduled_at = e.scheduled_at limit 1) s
  order by e.scheduled_at desc, e.id desc;
end $$;
comment on function orchestrator.cancel_event(uuid, text) is
  'Cancels one event, or every event with an external_job_id. One row an event: cancelled, already_cancelled, in_flight (an attempt has been claimed and goes on) or finished, and its status now; no row: there is no such event';
