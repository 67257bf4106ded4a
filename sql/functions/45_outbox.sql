-- The outbox: messages to Kafka, written in the transaction of what they tell of, by submit_staged(),
-- finish_events() and others; drained by one publisher at a time.

create or replace function orchestrator.set_outbox(p_kinds text[]) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  -- A publisher that starts says what was said before, and must not wait for it.
  if (select array_agg(k.kind) from orchestrator.outbox_kind k) @> p_kinds
    and p_kinds @> (select array_agg(k.kind) from orchestrator.outbox_kind k)
  then
    return;
  end if;
  delete from orchestrator.outbox_kind where kind <> all (p_kinds);
  insert into orchestrator.outbox_kind select unnest(p_kinds) on conflict do nothing;
end $$;
comment on function orchestrator.set_outbox(text[]) is
  'Says which of scheduled, timestamp and dlq are written to the outbox from now on; answers to commands always are';

create or replace function orchestrator.tell_outbox() returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select pg_notify('orchestrator_outbox', '') $$;
comment on function orchestrator.tell_outbox() is
  'Wakes the publisher, once a transaction. A hint: it also looks by itself';

create or replace function orchestrator.record_key(p_ordering_key text, p_external_job_id text, p_id uuid) returns bytea
language sql immutable parallel safe
return convert_to(coalesce(p_ordering_key, p_external_job_id, p_id::text), 'UTF8');
comment on function orchestrator.record_key(text, text, uuid) is
  'Key of the messages about an event: all of them go to one partition';

create or replace function orchestrator.timestamp_message(
  p_id uuid, p_source text, p_external_job_id text, p_scheduled_at timestamptz, p_due_at timestamptz
, p_claimed_at timestamptz, p_started_at timestamptz, p_finished_at timestamptz, p_result text, p_attempt integer)
returns bytea
language sql stable parallel safe
return convert_to(json_build_object(
  'id', p_id, 'source', p_source, 'external_job_id', p_external_job_id, 'scheduled_at', p_scheduled_at
, 'due_at', p_due_at, 'claimed_at', p_claimed_at, 'started_at', p_started_at, 'finished_at', p_finished_at
, 'result', p_result, 'attempt', p_attempt
, 'lateness_ms', round(extract(epoch from p_started_at - p_due_at) * 1000, 3))::text, 'UTF8');
comment on function orchestrator.timestamp_message(
  uuid, text, text, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, text, integer) is
  'The message to the timestamp topic about an event that has ended';

create or replace function orchestrator.dlq_message(p_event orchestrator.event, p_outcome orchestrator.outcome)
returns bytea
language sql stable parallel safe
return convert_to(json_build_object(
  'id', (p_event).id
, 'source', (p_event).source
, 'external_job_id', (p_event).external_job_id
, 'scheduled_at', (p_event).scheduled_at
, 'delivery_type', (p_event).delivery_type
, 'destination', (p_event).destination
, 'payload', (p_event).payload
, 'headers', (p_event).headers
, 'max_retries', (p_event).max_retries
, 'retry_policy', (p_event).retry_policy
, 'ordering_key', (p_event).ordering_key
, 'correlation_id', (p_event).correlation_id
, 'traceparent', (p_event).traceparent
, 'attempts', (p_outcome).attempt
, 'reason', (p_outcome).error
, 'died_at', (p_outcome).finished_at)::text, 'UTF8');
comment on function orchestrator.dlq_message(orchestrator.event, orchestrator.outcome) is
  'The message to the dead-letter topic about an event that is dead';

-- Looks the events up, which costs nothing while nobody listens: the callers ask outbox_kind first.
create or replace function orchestrator.announce_finished(
  p_event_ids uuid[], p_scheduled_at timestamptz[], p_claimed_at double precision[] default null)
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  insert into orchestrator.outbox (created_at, event_id, kind, headers, key, value)
  select v_now, e.id, k.kind
    , case k.kind
        when 'dlq' then json_build_object('orchestrator-kind', 'dead', 'orchestrator-reason', o.error) end
    , orchestrator.record_key(e.ordering_key, e.external_job_id, e.id)
    , case k.kind
        when 'dlq' then orchestrator.dlq_message(e, o)
        else orchestrator.timestamp_message(
          e.id, e.source, e.external_job_id, e.scheduled_at, o.due_at, to_timestamp(f.claimed_at), o.started_at
        , o.finished_at, o.result, o.attempt)
        end
  from unnest(p_event_ids, p_scheduled_at, p_claimed_at) as f (event_id, scheduled_at, claimed_at)
  cross join lateral (
    select * from orchestrator.event e where e.id = f.event_id and e.scheduled_at = f.scheduled_at limit 1) e
  cross join lateral (
    select *
    from orchestrator.outcome o
    where o.event_id = f.event_id and o.scheduled_at = f.scheduled_at
      and o.result in ('delivered', 'dead', 'cancelled', 'rescheduled', 'expired')
    order by o.attempt desc, o.result in ('cancelled', 'rescheduled', 'expired') desc
    limit 1) o
  join orchestrator.outbox_kind k on k.kind = 'timestamp' or k.kind = 'dlq' and o.result = 'dead'
  order by f.event_id;
  perform orchestrator.tell_outbox() where found;
end $$;
comment on function orchestrator.announce_finished(uuid[], timestamptz[], double precision[]) is
  'Writes the messages about events that have just ended, one array element each: timestamp for all, dlq for the dead. '
  'p_claimed_at: in Unix seconds';

-- The lock ends with the transaction: a publisher that hangs is ended by its transaction_timeout, and another
-- takes over.
create or replace function orchestrator.outbox_batch(p_limit integer, p_floor bigint default 0)
returns table (at tid, floor bigint, message bigint, kind text, headers json, key bytea, value bytea)
language plpgsql security definer
set search_path = orchestrator, pg_temp rows 1000
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off as $$
begin
  if pg_try_advisory_xact_lock(hashtext('orchestrator.outbox_batch')) then
    return query
    select o.ctid, least(pg_snapshot_xmin(pg_current_snapshot()), o.written_by)::text::bigint
      , o.message, o.kind, o.headers, o.key, o.value
    from orchestrator.outbox o
    where o.written_by >= p_floor::text::xid8
    order by o.written_by, o.message
    limit p_limit;
  end if;
end $$;
comment on function orchestrator.outbox_batch(integer, bigint) is
  'The oldest messages from p_floor on, for the one publisher that has the transaction''s advisory lock: publish them, '
  'call outbox_published(), commit. No message can appear any more below the floor of a committed batch''s last row';

create or replace function orchestrator.outbox_published(p_at tid[]) returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  with gone as (delete from orchestrator.outbox o where o.ctid = any (p_at) returning 1)
  select count(*) from gone
$$;
comment on function orchestrator.outbox_published(tid[]) is
  'Deletes messages of this transaction''s outbox_batch() that were published, by their column at';

create or replace function orchestrator.outbox_failed(p_at tid[], p_reasons text[]) returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_nestloop = off as $$
  with gone as (
    delete from orchestrator.outbox o where o.ctid = any (p_at) returning o.ctid as at, o.*
  ), kept as (
    insert into orchestrator.outbox_failure
      (message, failed_at, reason, created_at, event_id, kind, headers, key, value)
    select g.message, orchestrator.now(), f.reason, g.created_at, g.event_id, g.kind, g.headers, g.key, g.value
    from gone g join unnest(p_at, p_reasons) as f (at, reason) on f.at = g.at
    returning 1)
  select count(*) from kept
$$;
comment on function orchestrator.outbox_failed(tid[], text[]) is
  'Sets messages of this transaction''s outbox_batch() aside that no broker will take, with the reason';

create or replace function orchestrator.retry_outbox_failures() returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_count bigint;
begin
  with again as (delete from orchestrator.outbox_failure returning *)
  insert into orchestrator.outbox (created_at, event_id, kind, headers, key, value)
  select a.created_at, a.event_id, a.kind, a.headers, a.key, a.value from again a order by a.message;
  get diagnostics v_count = row_count;
  perform orchestrator.tell_outbox() where v_count > 0;
  return v_count;
end $$;
comment on function orchestrator.retry_outbox_failures() is
  'Puts the messages that were set aside back into the outbox, once their cause is mended; returns how many';

create or replace function orchestrator.outbox_pending() returns bigint
language sql volatile security definer
set search_path = orchestrator, pg_temp as $$
  select count(*) from (select from orchestrator.outbox limit 10000) o
$$;
comment on function orchestrator.outbox_pending() is 'Messages waiting to be published, counted up to 10,000';

create or replace function orchestrator.outbox_backlog(out pending bigint, out oldest_seconds double precision)
language sql volatile security definer
set search_path = orchestrator, pg_temp as $$
  select count(*), coalesce(greatest(0, extract(epoch from orchestrator.now() - min(o.created_at))), 0)
  from (select o.created_at from orchestrator.outbox o limit 10000) o
$$;
comment on function orchestrator.outbox_backlog() is
  'outbox_pending(), and for how long the oldest of those messages has waited, in seconds';
