-- Outcomes of events that were delivered at their first attempt, many in one row: see finish_delivered().

-- Rows have at most 7,200 bytes, and stay in one piece: compressing ids would cost much and save nothing.
create table orchestrator.delivered_batch
( scheduled_at timestamptz not null
, first_id uuid not null
, last_id uuid not null
, due_at timestamptz not null
, claimed_at timestamptz not null
, worker integer not null
, status_code smallint
, ids uuid[] storage plain not null
, scheduled_us smallint[] storage plain
, due_us integer[] storage plain
, claimed_us integer[] storage plain
, started_us integer[] storage plain not null
, finished_us integer[] storage plain not null
, status_codes smallint[] storage plain
, constraint delivered_batch_ids check (
    cardinality(ids) between 1 and 200 and ids[1] = first_id and ids[cardinality(ids)] = last_id)
, constraint delivered_batch_stretch check (
    scheduled_at = uuid_extract_timestamp(first_id)
    and uuid_extract_timestamp(last_id)
      < date_bin('10 s', scheduled_at, timestamptz '1970-01-01 00:00:00+00') + interval '10 s')
, constraint delivered_batch_lengths check (
    cardinality(started_us) = cardinality(ids) and cardinality(finished_us) = cardinality(ids)
    and coalesce(cardinality(scheduled_us), cardinality(ids)) = cardinality(ids)
    and coalesce(cardinality(due_us), cardinality(ids)) = cardinality(ids)
    and coalesce(cardinality(claimed_us), cardinality(ids)) = cardinality(ids)
    and coalesce(cardinality(status_codes), cardinality(ids)) = cardinality(ids))
) partition by range (scheduled_at);
-- All that a lookup by id compares is in the index: it visits only rows whose ids enclose that id.
create index delivered_batch_ids on orchestrator.delivered_batch (scheduled_at, first_id, last_id);

comment on table orchestrator.delivered_batch is
  'Outcomes of up to 200 events delivered at their first attempt, in arrays by position. '
  'The view outcomes shows them one a row; partitioned like event';
comment on column orchestrator.delivered_batch.scheduled_at is
  'The millisecond that first_id begins with: finds the partition. All ids are of one stretch of ten seconds, by UTC';
comment on column orchestrator.delivered_batch.first_id is 'First of ids';
comment on column orchestrator.delivered_batch.last_id is 'Last of ids';
comment on column orchestrator.delivered_batch.due_at is 'When the events were due; with due_us: what that counts from';
comment on column orchestrator.delivered_batch.claimed_at is
  'When they were claimed; what claimed_us, started_us and finished_us count from';
comment on column orchestrator.delivered_batch.worker is 'worker.worker';
comment on column orchestrator.delivered_batch.status_code is
  'HTTP status of all of them, unless status_codes says it; null: no response, as over Kafka';
comment on column orchestrator.delivered_batch.ids is 'event.id of each, in order';
comment on column orchestrator.delivered_batch.scheduled_us is
  'Microseconds of event.scheduled_at within the millisecond that its id begins with; null: 0 for all';
comment on column orchestrator.delivered_batch.due_us is
  'Microseconds from due_at to when each was due; null: 0 for all';
comment on column orchestrator.delivered_batch.claimed_us is
  'Microseconds from claimed_at to when each was claimed; null: 0 for all';
comment on column orchestrator.delivered_batch.started_us is 'Microseconds from claimed_at to when each attempt began';
comment on column orchestrator.delivered_batch.finished_us is
  'Microseconds from claimed_at to when each result was known';
comment on column orchestrator.delivered_batch.status_codes is 'HTTP status of each; null: status_code is that of all';

comment on table orchestrator.outcome is
  'What happened, append-only: attempts, and whatever else ended an event or revived it; partitioned like event. '
  'Most deliveries are in delivered_batch; the view outcomes has both';

-- The days that events have a partition for. Later ones are created with those of event.
do $$
declare
  v_day text;
begin
  for v_day in
    select right(c.relname, 8) from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'orchestrator.event'::regclass and not i.inhdetachpending and c.relname ~ '^event_p[0-9]{8}$'
  loop
    execute format('create table orchestrator.%I (like orchestrator.delivered_batch including all) using heap'
      , 'delivered_batch_p' || v_day);
    execute format('alter table orchestrator.delivered_batch attach partition orchestrator.%I '
      'for values from (%L) to (%L)', 'delivered_batch_p' || v_day
      , to_date(v_day, 'YYYYMMDD')::timestamp at time zone 'UTC'
      , (to_date(v_day, 'YYYYMMDD') + 1)::timestamp at time zone 'UTC');
  end loop;
end $$;

-- They answer the attempt now.
drop function if exists orchestrator.finish_events(
  uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[]
, integer, double precision[], text[]);
drop function if exists orchestrator.finish_free_events(
  uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[], double precision[]
, integer, double precision[], text[]);
drop function if exists orchestrator.stale_results(uuid[], integer[], integer);

alter type orchestrator.finished_event add attribute attempt integer;
comment on column orchestrator.finished_event.attempt is 'Number of the attempt';
