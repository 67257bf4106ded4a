-- Ingestion: advance_offsets() says how far topics have been read, moved by compare-and-set; the anchor, a
-- hash of the last record read, tells whether a topic is still the same. Then records that another session's
-- open transaction holds up: they are set aside. Called by ingesters, in the transaction that keeps the rows.

create or replace function orchestrator.ingest_offsets(p_topic text)
returns table (partition integer, next_offset bigint, anchor_offset bigint, anchor_hash bigint)
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select o.partition, o.next_offset, o.anchor_offset, o.anchor_hash
  from orchestrator.ingest_offset o
  where o.topic = p_topic
  order by 1
$$;
comment on function orchestrator.ingest_offsets(text) is
  'How far each partition of a topic has been read; no row: reading has not begun';

-- The compare-and-set of a batch. The caller calls it first in its transaction: a second reader of the
-- same partition waits here, and then finds that the offset has moved. It locks rows in the order of
-- partitions, so that two readers of several partitions cannot deadlock.
create or replace function orchestrator.advance_offsets(
  p_topic text, p_partitions integer[], p_expected bigint[], p_next bigint[],
  p_anchor_offsets bigint[], p_anchor_hashes bigint[])
returns table (partition integer, next_offset bigint)
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
begin
  perform from orchestrator.ingest_offset o
  where o.topic = p_topic and o.partition = any (p_partitions)
  order by o.partition
  for update;
  return query
  with given as materialized (
    select g.*
    from unnest(p_partitions, p_expected, p_next, p_anchor_offsets, p_anchor_hashes)
      as g (partition, expected, next_offset, anchor_offset, anchor_hash)
  ), begun as (
    -- Partitions that the caller is the first to read.
    insert into orchestrator.ingest_offset (topic, partition, next_offset, anchor_offset, anchor_hash, moved_at)
    select p_topic, g.partition, g.next_offset, g.anchor_offset, g.anchor_hash, v_now
    from given g
    where g.expected is null
    order by g.partition
    on conflict do nothing
    returning ingest_offset.partition
  ), moved as (
    -- Partitions that still stand where the caller began.
    update orchestrator.ingest_offset o
    set next_offset = g.next_offset
      , anchor_offset = g.anchor_offset
      , anchor_hash = g.anchor_hash
      , moved_at = v_now
    from given g
    where o.topic = p_topic and o.partition = g.partition
      and o.next_offset = g.expected and g.next_offset >= g.expected
    returning o.partition
  )
  -- All others: another reader has moved them.
  select g.partition, o.next_offset
  from given g
  left join orchestrator.ingest_offset o on o.topic = p_topic and o.partition = g.partition
  where g.partition not in (select b.partition from begun b union all select m.partition from moved m)
  order by g.partition;
end $$;
comment on function orchestrator.advance_offsets(text, integer[], bigint[], bigint[], bigint[], bigint[]) is
  'Moves each partition from p_expected (null: not begun) to p_next, and remembers the last record read. '
  'Returns partitions that another reader has moved, with their offsets: the caller must roll back';

create or replace function orchestrator.set_ingest_offset(
  p_topic text, p_partition integer, p_next_offset bigint) returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  insert into orchestrator.ingest_offset as o (topic, partition, next_offset, moved_at)
  values (p_topic, p_partition, p_next_offset, orchestrator.now())
  on conflict (topic, partition) do update
  set next_offset = excluded.next_offset, anchor_offset = null, anchor_hash = null, moved_at = excluded.moved_at
  returning o.next_offset
$$;
comment on function orchestrator.set_ingest_offset(text, integer, bigint) is
  'Makes ingesters read a partition from this offset on. The remedy when ingestion halts because a topic was '
  'recreated or truncated';

-- Records whose event another session is writing in an open transaction are set aside, so that the rest
-- of their partition goes on.

create or replace function orchestrator.set_aside_staged(
  p_topic text, p_numbers integer[], p_partitions integer[], p_offsets bigint[], p_keys bytea[], p_values bytea[])
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
begin
  perform orchestrator.check_staging();
  insert into orchestrator.submission_aside
    (topic, partition, "offset", since
    , id, scheduled_at, source, external_job_id
    , delivery_type, destination, payload, headers
    , max_retries, retry_policy, ordering_key, priority, spread, expires_at, correlation_id, traceparent
    , key, value)
  select p_topic, r.partition, r."offset", orchestrator.now()
    , s.id, s.scheduled_at, s.source, s.external_job_id
    , s.delivery_type, s.destination, s.payload, s.headers
    , s.max_retries, s.retry_policy, s.ordering_key, s.priority, s.spread, s.expires_at
    , s.correlation_id, s.traceparent
    , r.key, r.value
  from unnest(p_numbers, p_partitions, p_offsets, p_keys, p_values) as r (n, partition, "offset", key, value)
  join pg_temp.submission s on s.n = r.n
  order by r.partition, r."offset";
end $$;
comment on function orchestrator.set_aside_staged(text, integer[], integer[], bigint[], bytea[], bytea[]) is
  'Sets the rows of pg_temp.submission aside. Their numbers n tell which record each came from';

-- One row at a time, as each may have to wait, and in random order, so that rows that wait for long keep
-- nobody behind them. Rows that another call has locked are left to it.
create or replace function orchestrator.submit_set_aside(
  p_limit integer default 100, out kept bigint, out waiting bigint)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set lock_timeout = '20 ms'
as $$
declare
  v_row orchestrator.submission_aside;
  v_answer record;
begin
  kept := 0;
  waiting := 0;
  for v_row in
    select * from orchestrator.submission_aside order by random() limit p_limit for update skip locked
  loop
    exit when waiting >= 10;
    begin
      perform orchestrator.open_staging();
      insert into pg_temp.submission
        (n, id, scheduled_at, source, external_job_id
        , delivery_type, destination, payload, headers
        , max_retries, retry_policy, ordering_key, priority, spread, expires_at, correlation_id, traceparent)
      values (1, v_row.id, v_row.scheduled_at, v_row.source, v_row.external_job_id
        , v_row.delivery_type, v_row.destination, v_row.payload, v_row.headers
        , v_row.max_retries, v_row.retry_policy, v_row.ordering_key, v_row.priority, v_row.spread, v_row.expires_at
        , v_row.correlation_id, v_row.traceparent);
      select * into v_answer from orchestrator.insert_staged(null);
      if v_answer.result = 'refused' then
        perform orchestrator.keep_rejects(v_row.topic
          , array[v_row.partition], array[v_row."offset"], array[v_row.key], array[v_row.value]
          , array[v_answer.field], array[v_answer.reason]);
      end if;
      delete from orchestrator.submission_aside a where a.aside = v_row.aside;
      kept := kept + 1;
    exception when lock_not_available then
      waiting := waiting + 1;
    end;
  end loop;
end $$;
comment on function orchestrator.submit_set_aside(integer) is
  'Submits up to p_limit records that were set aside, and stops once ten still wait for another session. '
  'Says how many became events, duplicates or rejects, and how many waited';
