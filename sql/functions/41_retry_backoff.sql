-- Retry backoff: how long a failed attempt waits for the next. finish_events() calls
-- next_delay(), which finds the event's policy, and that calls retry_delay().

create or replace function orchestrator.retry_policy_of(p_event_id uuid, p_scheduled_at timestamptz, p_lane integer)
returns text
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select coalesce(
    (select e.retry_policy from orchestrator.event e where e.id = p_event_id and e.scheduled_at = p_scheduled_at)
  , (select d.retry_policy from orchestrator.destination d
     where d.name = (
       select l.name from orchestrator.lane l where l.lane = p_lane and orchestrator.is_dedicated(p_lane))))
$$;
comment on function orchestrator.retry_policy_of(uuid, timestamptz, integer) is
  'Retry policy that the event names, or else its destination; null: neither names one';

create or replace function orchestrator.retry_delay(
  p_policy text, p_attempt integer, p_at_least interval default null)
returns interval
language sql volatile
set search_path = orchestrator, pg_temp as $$
  select greatest(
    case
      when r.schedule is not null then r.schedule[least(p_attempt, cardinality(r.schedule))]
      else make_interval(secs => least(
          extract(epoch from r.max_delay)::double precision
        , extract(epoch from r.initial_delay)::double precision * power(r.multiplier, least(p_attempt - 1, 100))))
    end * (1 - r.jitter * random())
  , case when p_at_least is not null then least(p_at_least, r.max_delay) end)
  from orchestrator.retry_policy r
  where r.name in (p_policy, 'default')
  order by r.name = p_policy desc nulls last
  limit 1
$$;
comment on function orchestrator.retry_delay(text, integer, interval) is
  'Wait after failed attempt p_attempt: exponential with full jitter unless the policy says otherwise, and at least '
  'p_at_least, up to max_delay. '
  'A policy that does not exist counts as ''default''';

-- Attempt numbers only grow, also when a lease is released or a dead event is redriven. The attempts that are
-- left say how many have failed since the last redrive, which is where the policy begins again.
-- It looks the policy up itself: retry_policy_of() is not inlined, and would cost each retry a call.
create or replace function orchestrator.next_delay(
  p_event_id uuid, p_scheduled_at timestamptz, p_lane integer, p_attempts_left integer, p_at_least interval)
returns interval
language sql volatile security definer
set search_path = orchestrator, pg_temp as $$
  select coalesce((
    select orchestrator.retry_delay(
        coalesce(e.retry_policy
        , (select d.retry_policy from orchestrator.destination d
           where d.name = (
             select l.name from orchestrator.lane l where l.lane = p_lane and orchestrator.is_dedicated(p_lane))))
      , greatest(1, e.max_retries + 1 - p_attempts_left), p_at_least)
    from orchestrator.event e
    where e.id = p_event_id and e.scheduled_at = p_scheduled_at)
  , '1 min')  -- somebody has deleted the event by hand
$$;
comment on function orchestrator.next_delay(uuid, timestamptz, integer, integer, interval) is
  'Wait after a failed attempt that leaves p_attempts_left more. '
  'The retry policy is that of the event, else of its destination, else ''default''';
