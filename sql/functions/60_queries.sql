-- Questions: what the API, the CLI and an operator ask. All answers are JSON as clients see it.

-- Inlined: the planner leaves out all days but one.
create or replace function orchestrator.event_outcomes(p_id uuid, p_scheduled_at timestamptz)
returns setof orchestrator.outcome
language sql stable as $$
  select o.* from orchestrator.outcome o where o.event_id = p_id and o.scheduled_at = p_scheduled_at
  union all
  select o.*
  from orchestrator.delivered_batch b
  cross join lateral orchestrator.batch_outcomes(b) o
  where o.event_id = p_id and orchestrator.batch_holds(p_id, b.scheduled_at, b.first_id, b.last_id, b.ids)
  union all
  select h.id, h.scheduled_at, null, null, h.ended_at, null, 0, null, h.ended_as, null, null, null, null, h.successor
  from orchestrator.horizon h
  where h.id = p_id and h.scheduled_at = p_scheduled_at and h.ended_at is not null
$$;
comment on function orchestrator.event_outcomes(uuid, timestamptz) is
  'The outcomes of one event, wherever they are kept; of those without an attempt, attempt is 0';

-- spread_ms is read off the due time of the first attempt where the event has no spread of its own: its
-- destination's may be another by now.
create or replace function orchestrator.event_json(p_id uuid, p_scheduled_at timestamptz) returns json
language sql stable security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off as $$
  select json_build_object(
    'id', s.id, 'source', s.source, 'external_job_id', s.external_job_id, 'scheduled_at', s.scheduled_at
  , 'delivery_type', s.delivery_type, 'destination', s.destination, 'ordering_key', s.ordering_key
  , 'payload', s.payload, 'headers', s.headers
  , 'max_retries', s.max_retries, 'retry_policy', s.retry_policy, 'priority', s.priority
  , 'spread_seconds', extract(epoch from s.spread)::double precision
  , 'expires_at', s.expires_at, 'correlation_id', s.correlation_id, 'traceparent', s.traceparent
  , 'predecessor', s.predecessor, 'successor', s.successor
  , 'created_at', s.created_at, 'status', s.status, 'attempt', s.attempt, 'due_at', s.due_at
  , 'spread_ms', round(extract(epoch from case
      when s.spread is not null then orchestrator.spread_shift(s.id, s.spread)
      when f.due_at > greatest(s.scheduled_at, s.created_at) then f.due_at - s.scheduled_at end) * 1000, 3)
  , 'waits_for', case when t.lane < 0 then orchestrator.blocking_event(t.ordering, t.event_id, t.scheduled_at) end
  , 'outcomes', coalesce((
      select json_agg(json_build_object(
          'attempt', o.attempt, 'result', o.result, 'status_code', o.status_code, 'error', o.error
        , 'response', o.response
        , 'due_at', o.due_at, 'claimed_at', o.claimed_at, 'started_at', o.started_at, 'finished_at', o.finished_at
        , 'lateness_ms', round(extract(epoch from o.started_at - o.due_at) * 1000, 3), 'waited', o.waited
        , 'worker', w.name, 'successor', o.successor)
        order by o.attempt
          , array_position(
              array['retried', 'delivered', 'dead', 'redriven', 'cancelled', 'rescheduled', 'expired'], o.result)
          , o.finished_at)
      from orchestrator.event_outcomes(p_id, p_scheduled_at) o
      left join orchestrator.worker w using (worker)), '[]'))
  from orchestrator.event_status s
  left join orchestrator.timer t on t.event_id = s.id
  cross join lateral (
    select coalesce(
      (select o.due_at
       from orchestrator.event_outcomes(p_id, p_scheduled_at) o
       where o.due_at is not null
       order by o.attempt
       limit 1)
    , s.due_at) as due_at) f
  where s.id = p_id and s.scheduled_at = p_scheduled_at
$$;
comment on function orchestrator.event_json(uuid, timestamptz) is 'One event with its state and every outcome';

create or replace function orchestrator.get_event(p_id uuid) returns json
language sql stable security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  select orchestrator.event_json(e.id, e.scheduled_at) from orchestrator.find_events(p_id, null) e
$$;
comment on function orchestrator.get_event(uuid) is
  'One event with its state and every outcome; null: there is none';

create or replace function orchestrator.events_by_external_id(
  p_external_job_id text, p_limit integer default 100, p_before_scheduled_at timestamptz default null
, p_before_id uuid default null)
returns setof json
language sql stable security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  select orchestrator.event_json(e.id, e.scheduled_at) from (
    select e.id, e.scheduled_at
    from orchestrator.stored_event e
    where hashtextextended(e.external_job_id, 0) = hashtextextended(p_external_job_id, 0)
      and e.external_job_id = p_external_job_id
      and (p_before_id is null or (e.scheduled_at, e.id) < (p_before_scheduled_at, p_before_id))
    order by e.scheduled_at desc, e.id desc
    limit p_limit) e
$$;
comment on function orchestrator.events_by_external_id(text, integer, timestamptz, uuid) is
  'Events of an external_job_id, newest scheduled_at first. '
  'The next page starts after the last (scheduled_at, id) seen';
