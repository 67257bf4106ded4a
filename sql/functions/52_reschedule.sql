-- Rescheduling: cancel and submit in one transaction. Nothing that was kept of the event changes; it and its
-- successor name each other, and have one bucket. An event may come back to a time that it had: the id of
-- what is submitted for then stays that of the first.

-- Events that were scheduled for that time and rescheduled since leave it free. Their number makes the id:
-- two calls that count the same number get the same id, and one of them finds it taken.
create or replace function orchestrator.successor_id(
  p_event_id uuid, p_source text, p_external_job_id text, p_ordering_key text, p_scheduled_at timestamptz)
returns uuid
language plpgsql volatile security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_taken_by uuid;
  v_copies integer;
begin
  select count(*), (array_agg(e.id) filter (where orchestrator.status_of(e.id) <> 'rescheduled'))[1]
  into v_copies, v_taken_by
  from orchestrator.stored_event e
  where hashtextextended(e.external_job_id, 0) = hashtextextended(p_external_job_id, 0)
    and e.external_job_id = p_external_job_id
    and e.scheduled_at = p_scheduled_at
    and e.source = p_source
    and e.ordering_key is not distinct from p_ordering_key;
  return coalesce(v_taken_by
    , orchestrator.event_id(p_source, p_external_job_id, p_scheduled_at, p_ordering_key, v_copies)
    , orchestrator.random_event_id(p_scheduled_at, orchestrator.bucket(p_event_id)));
end $$;
comment on function orchestrator.successor_id(uuid, text, text, text, timestamptz) is
  'The id of the event that takes the place of a rescheduled one at a time, or of the one that has that time already';

create or replace function orchestrator.reschedule_event(
  p_event_id uuid default null, p_scheduled_at timestamptz default null, p_external_job_id text default null
, p_expires_at timestamptz default null)
returns table (event_id uuid, result text, status text, successor uuid, field text, reason text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_ids uuid[];
  v_live uuid[];
  v_old orchestrator.event_status;
  v_answer record;
begin
  if num_nonnulls(p_event_id, p_external_job_id) <> 1 then
    raise exception 'reschedule_event: give either p_event_id or p_external_job_id'
      using errcode = 'invalid_parameter_value';
  end if;
  if p_scheduled_at is null then
    raise exception 'reschedule_event: give p_scheduled_at' using errcode = 'invalid_parameter_value';
  end if;
  v_ids := array(
    select e.id from orchestrator.find_events(p_event_id, p_external_job_id) e order by e.scheduled_at, e.id);
  if v_ids = '{}' then
    return;
  end if;
  perform orchestrator.lock_events(v_ids);
  v_live := array(
    select i from unnest(v_ids) i
    where exists (select from orchestrator.timer t where t.event_id = i)
      or exists (select from orchestrator.horizon h where h.id = i and h.ended_at is null));
  if cardinality(v_live) > 1 then
    field := 'external_job_id';
    reason := format('names %s events that are still to be delivered; give the id of one, such as %s'
      , cardinality(v_live), v_live[1]);
    result := 'refused';
    return next;
    return;
  end if;
  -- Else the last one that was not rescheduled itself.
  event_id := coalesce(v_live[1]
    , (select i.id
       from unnest(v_ids) with ordinality as i (id, n)
       where orchestrator.status_of(i.id) <> 'rescheduled'
       order by i.n desc
       limit 1)
    , v_ids[cardinality(v_ids)]);
  select s.* into v_old
  from orchestrator.find_events(event_id, null) e
  cross join lateral (
    select * from orchestrator.event_status s where s.id = e.id and s.scheduled_at = e.scheduled_at limit 1) s;
  status := v_old.status;
  -- Asked for again, by a name that is the successor's by now.
  if p_event_id is null and v_old.scheduled_at = p_scheduled_at and v_old.predecessor is not null then
    result := 'already_rescheduled';
    successor := event_id;
    event_id := v_old.predecessor;
    status := 'rescheduled';
    return next;
    return;
  elsif v_old.status = 'rescheduled' and exists (
    select from orchestrator.find_events(v_old.successor, null) n where n.scheduled_at = p_scheduled_at)
  then
    result := 'already_rescheduled';
    successor := v_old.successor;
    return next;
    return;
  elsif v_old.status not in ('scheduled', 'retrying') then
    result := case v_old.status when 'in_flight' then 'in_flight' else 'finished' end;
    successor := v_old.successor;
    return next;
    return;
  end if;
  reason := orchestrator.topic_fault(v_old.delivery_type, v_old.destination);
  if reason is not null then
    result := 'refused';
    field := 'destination';
    return next;
    return;
  end if;
  if p_scheduled_at not between '1970-01-01 00:00:00+00' and '2200-12-31 23:59:59.999999+00' then
    result := 'refused';
    field := 'scheduled_at';
    reason := format('expected a time from 1970 to 2200, got %s', to_json(p_scheduled_at) #>> '{}');
    return next;
    return;
  end if;
  successor := orchestrator.successor_id(
    event_id, v_old.source, v_old.external_job_id, v_old.ordering_key, p_scheduled_at);
  perform orchestrator.open_staging();
  insert into pg_temp.submission
    (n, id, scheduled_at, source, external_job_id, delivery_type, destination, payload, headers
    , max_retries, retry_policy, ordering_key, priority, spread
    , expires_at, correlation_id, traceparent)
  values (1, successor, p_scheduled_at, v_old.source, v_old.external_job_id, v_old.delivery_type, v_old.destination
    , v_old.payload, v_old.headers
    , v_old.max_retries, v_old.retry_policy, v_old.ordering_key, v_old.priority, v_old.spread
    , coalesce(p_expires_at, v_old.expires_at), v_old.correlation_id, v_old.traceparent);
  select * into v_answer from orchestrator.insert_staged(event_id);
  if found then
    result := 'refused';
    field := coalesce(v_answer.field, 'scheduled_at');
    reason := coalesce(v_answer.reason
      , format('an event of this source and external_job_id is scheduled for then already: %s', v_answer.id));
    successor := null;
  else
    perform orchestrator.end_events(array[event_id], 'rescheduled', successor);
    result := 'rescheduled';
    status := 'rescheduled';
  end if;
  return next;
end $$;
comment on function orchestrator.reschedule_event(uuid, timestamptz, text, timestamptz) is
  'Ends an event, by id or by the external_job_id of one live event, as rescheduled; a new one takes its place. '
  'Result: rescheduled or already_rescheduled with the successor; with nothing changed in_flight, finished, or refused '
  'with field and reason; no row: no such event';
