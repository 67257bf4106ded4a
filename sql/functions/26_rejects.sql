-- Rejects: records of a topic that could not become events, with their bytes and the reason. Written by
-- ingesters.

create or replace function orchestrator.keep_rejects(
  p_topic text, p_partitions integer[], p_offsets bigint[], p_keys bytea[], p_values bytea[],
  p_fields text[], p_reasons text[])
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  insert into orchestrator.reject (topic, partition, "offset", received_at, key, value, field, reason)
  select p_topic, r.* from (
    select r.partition, r."offset", v_now, r.key, r.value, r.field, r.reason
    from unnest(p_partitions, p_offsets, p_keys, p_values, p_fields, p_reasons)
      as r (partition, "offset", key, value, field, reason)) r;
  insert into orchestrator.statistic (minute, name, value)
  select date_trunc('minute', v_now), 'rejected', cardinality(p_partitions)
  where cardinality(p_partitions) > 0;
  -- The DLQ topic gets them too, if it is on.
  insert into orchestrator.outbox (created_at, kind, key, value, headers)
  select v_now, 'dlq', r.key, r.value
    , json_build_object(
        'orchestrator-kind', 'reject'
      , 'orchestrator-reason', r.field || ': ' || r.reason
      , 'orchestrator-topic', p_topic
      , 'orchestrator-partition', r.partition::text
      , 'orchestrator-offset', r."offset"::text)
  from unnest(p_partitions, p_offsets, p_keys, p_values, p_fields, p_reasons)
    as r (partition, "offset", key, value, field, reason)
  where exists (select from orchestrator.outbox_kind where kind = 'dlq');
  perform orchestrator.tell_outbox() where found;
end $$;
comment on function orchestrator.keep_rejects(text, integer[], bigint[], bytea[], bytea[], text[], text[]) is
  'Keeps records that could not become events, one for each array element, with what is wrong. '
  'Sends them to the DLQ topic if it is on';

create or replace function orchestrator.list_rejects(
  p_limit integer default 100, p_before bigint default null) returns setof json
language sql stable security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select json_build_object(
      'reject', r.reject
    , 'topic', r.topic, 'partition', r.partition, 'offset', r."offset", 'received_at', r.received_at
    , 'field', r.field, 'reason', r.reason, 'bytes', length(r.value)
    , 'event_id', r.event_id, 'resubmitted_at', r.resubmitted_at)
  from orchestrator.reject r
  where p_before is null or r.reject < p_before
  order by r.reject desc
  limit p_limit
$$;
comment on function orchestrator.list_rejects(integer, bigint) is
  'Rejects, newest first; the next page starts below the last number seen';

create or replace function orchestrator.get_reject(p_reject bigint)
returns table (
  topic text, partition integer, "offset" bigint, received_at timestamptz, key bytea, value bytea,
  field text, reason text, event_id uuid, resubmitted_at timestamptz)
language sql stable security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select r.topic, r.partition, r."offset", r.received_at, r.key, r.value
    , r.field, r.reason, r.event_id, r.resubmitted_at
  from orchestrator.reject r
  where r.reject = p_reject
$$;
comment on function orchestrator.get_reject(bigint) is
  'One reject with its bytes; no row: there is none with this number';

create or replace function orchestrator.resubmitted_reject(p_reject bigint, p_event_id uuid) returns boolean
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  with noted as (
    update orchestrator.reject r
    set event_id = p_event_id, resubmitted_at = orchestrator.now()
    where r.reject = p_reject
    returning 1)
  select exists (select from noted)
$$;
comment on function orchestrator.resubmitted_reject(bigint, uuid) is
  'Notes which event a reject became when it was submitted again; false: there is no such reject';
