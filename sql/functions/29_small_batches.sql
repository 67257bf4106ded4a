-- A small batch of submissions in one call. It saves the COPY, which costs more than a few rows do, and the
-- staging table. Whatever cannot be inserted as it is gets staged within the call, and answered as ever.

-- Each statement has one possible plan. It is kept, as that of insert_timers() is: to make it again for a few
-- rows, as PostgreSQL would, takes longer than to run it.
create or replace function orchestrator.submit_batch(
  p_ids uuid[], p_scheduled_at timestamptz[], p_max_retries smallint[], p_kinds integer[]
, p_sources text[], p_delivery_types text[], p_destinations text[]
, p_external_job_ids text[], p_payloads json[]
, p_headers json[] default null, p_correlation_ids text[] default null, p_traceparents text[] default null
, p_retry_policies text[] default null, p_ordering_keys text[] default null, p_priorities smallint[] default null
, p_spreads interval[] default null, p_expires_at timestamptz[] default null)
returns table (n integer, id uuid, result text, field text, reason text, status text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set lock_timeout = '250 ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off as $$
declare
  v_now timestamptz;
  v_first timestamptz;
  v_last timestamptz;
begin
  if not exists (select from orchestrator.outbox_kind where kind = 'scheduled')
    and not exists (select from orchestrator.newest_control() c where c.former_ids_until is not null)
  then
    begin
      -- In this order, as insert_staged() does.
      lock table orchestrator.timer in row exclusive mode;
      v_now := orchestrator.now();
      perform pg_current_xact_id();
      select min(s.at), max(s.at) into v_first, v_last from unnest(p_scheduled_at) as s (at);
      perform orchestrator.require_plain(v_last, array_remove(p_retry_policies, null));
      insert into orchestrator.event
        (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy
        , headers, payload, ordering_key, priority, spread, expires_at, correlation_id, traceparent)
      select e.id, e.scheduled_at, v_now, e.max_retries, p_sources[e.kind], e.external_job_id
        , p_delivery_types[e.kind], p_destinations[e.kind], e.retry_policy
        , e.headers, e.payload, e.ordering_key, e.priority, e.spread, e.expires_at, e.correlation_id, e.traceparent
      from (
        select unnest(p_ids) as id, unnest(p_scheduled_at) as scheduled_at, unnest(p_max_retries) as max_retries
          , unnest(p_kinds) as kind, unnest(p_external_job_ids) as external_job_id, unnest(p_payloads) as payload
          , unnest(p_headers) as headers, unnest(p_correlation_ids) as correlation_id
          , unnest(p_traceparents) as traceparent, unnest(p_retry_policies) as retry_policy
          , unnest(p_ordering_keys) as ordering_key, unnest(p_priorities) as priority
          , unnest(p_spreads) as spread, unnest(p_expires_at) as expires_at) e;
      perform orchestrator.note_priorities(array_agg(distinct p.priority))
      from unnest(p_priorities) as p (priority)
      where p.priority is not null;
      perform orchestrator.insert_timers(v_now, p_ids, p_scheduled_at, p_max_retries, p_kinds
      , p_sources, p_delivery_types, p_destinations, p_ordering_keys, p_priorities, p_spreads, p_expires_at);
      perform orchestrator.tell_due(v_first);
      return;
    exception when unique_violation or check_violation or numeric_value_out_of_range then
      null;  -- some of them are duplicates, refused, or for the horizon
    end;
  end if;
  perform orchestrator.open_staging();
  insert into pg_temp.submission
    (n, id, scheduled_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy
    , headers, payload, ordering_key, priority, spread, expires_at, correlation_id, traceparent)
  select e.n, e.id, e.scheduled_at, e.max_retries, p_sources[e.kind], e.external_job_id
    , p_delivery_types[e.kind], p_destinations[e.kind], e.retry_policy
    , e.headers, e.payload, e.ordering_key, e.priority, e.spread, e.expires_at, e.correlation_id, e.traceparent
  from unnest(p_ids, p_scheduled_at, p_max_retries, p_kinds, p_external_job_ids, p_payloads, p_headers
  , p_correlation_ids, p_traceparents, p_retry_policies, p_ordering_keys, p_priorities, p_spreads, p_expires_at)
    with ordinality as e (id, scheduled_at, max_retries, kind, external_job_id, payload, headers
    , correlation_id, traceparent, retry_policy, ordering_key, priority, spread, expires_at, n);
  return query select * from orchestrator.submit_staged_with_status();
end $$;
comment on function orchestrator.submit_batch(
  uuid[], timestamptz[], smallint[], integer[], text[], text[], text[], text[], json[], json[], text[], text[], text[]
, text[], smallint[], interval[], timestamptz[]) is
  'try_submit_staged_with_status() for a batch in arrays, in order of id; n is the place in them, from 1. '
  'p_kinds says which element of p_sources, p_delivery_types and p_destinations is that of each event';
