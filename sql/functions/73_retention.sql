-- Retention: a day older than the configured days is detached (retire_partition()), archived if that is
-- configured, and dropped an hour later (drop_partitions()). Called by run_maintenance() and by the archive.

create or replace function orchestrator.configure_retention(
  p_retention_days integer default null, p_partition_days_ahead integer default null,
  p_max_schedule_ahead_days integer default null, p_archive boolean default null)
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
declare
  v_new orchestrator.control;
begin
  select * into v_new from orchestrator.newest_control();
  -- Most processes that start repeat what the database has been told. They must not wait for the row.
  if (p_retention_days, p_partition_days_ahead, p_max_schedule_ahead_days, p_archive)
      is distinct from (null, null, null, null)
    and (coalesce(p_retention_days, v_new.retention_days)
      , coalesce(p_partition_days_ahead, v_new.partition_days_ahead)
      , coalesce(p_max_schedule_ahead_days, v_new.max_schedule_ahead_days)
      , coalesce(p_archive, v_new.archive))
    is not distinct from
      (v_new.retention_days, v_new.partition_days_ahead, v_new.max_schedule_ahead_days, v_new.archive) then
    return;
  end if;
  select * into v_new from orchestrator.control for update;
  v_new.retention_days := coalesce(p_retention_days, v_new.retention_days);
  v_new.partition_days_ahead := coalesce(p_partition_days_ahead, v_new.partition_days_ahead);
  v_new.max_schedule_ahead_days := coalesce(p_max_schedule_ahead_days, v_new.max_schedule_ahead_days);
  v_new.archive := coalesce(p_archive, v_new.archive);
  if v_new.retention_days not between 1 and 36500 then
    raise exception 'p_retention_days: expected 1 to 36500 days, got %', v_new.retention_days
      using errcode = 'invalid_parameter_value';
  end if;
  if v_new.partition_days_ahead not between 1 and 400 then
    raise exception 'p_partition_days_ahead: expected 1 to 400 days, got %', v_new.partition_days_ahead
      using errcode = 'invalid_parameter_value';
  end if;
  if v_new.max_schedule_ahead_days not between v_new.partition_days_ahead and 36500 then
    raise exception 'p_max_schedule_ahead_days: expected % (partition_days_ahead) to 36500 days, got %'
      , v_new.partition_days_ahead, v_new.max_schedule_ahead_days
      using errcode = 'invalid_parameter_value';
  end if;
  update orchestrator.control c
  set retention_days = v_new.retention_days
    , partition_days_ahead = v_new.partition_days_ahead
    , max_schedule_ahead_days = v_new.max_schedule_ahead_days
    , archive = v_new.archive
  where (c.retention_days, c.partition_days_ahead, c.max_schedule_ahead_days, c.archive) is distinct from
    (v_new.retention_days, v_new.partition_days_ahead, v_new.max_schedule_ahead_days, v_new.archive);
end $$;
comment on function orchestrator.configure_retention(integer, integer, integer, boolean) is
  'Sets how long events are kept, how far ahead partitions are created and events can be scheduled, and whether '
  'partitions are archived before dropping. Null keeps a setting';

create or replace function orchestrator.has_live_events(p_day date) returns boolean
language sql stable security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select exists (select from orchestrator.timer t where t.event_id >= d.first_id and t.event_id < d.end_id)
    or exists (select from orchestrator.horizon h where h.id >= d.first_id and h.id < d.end_id)
  from (
    select orchestrator.first_id(p_day::timestamptz) as first_id
      , orchestrator.first_id((p_day + 1)::timestamptz) as end_id) d
$$;
comment on function orchestrator.has_live_events(date) is
  'Whether an event of this day has a timer, or is in horizon';

-- Readers of the three tables wait at most 40 ms: it gives up then, and once it has the locks, it holds them
-- only for a moment. run_maintenance() calls it last.
create or replace function orchestrator.retire_partition(
  p_now timestamptz, out detached integer, out dead_letters bigint)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set lock_timeout = '40 ms'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_day date;
begin
  detached := 0;
  dead_letters := 0;
  if (select c.retention_days is null from orchestrator.newest_control() c) then
    return;
  end if;
  foreach v_day in array orchestrator.partition_days() loop
    exit when v_day >= orchestrator.first_day_kept(p_now);
    continue when orchestrator.has_live_events(v_day);
    dead_letters := orchestrator.drop_dead_letters(v_day);
    perform orchestrator.refuse_open_transaction(format('%s is to be detached', v_day), 'run_maintenance()', '100 ms');
    -- If this commit is lost, the next run repeats it. Others need not wait until it is on the disk.
    perform set_config('synchronous_commit', 'off', true);
    lock table only orchestrator.event in access exclusive mode;
    lock table only orchestrator.outcome in access exclusive mode;
    lock table only orchestrator.delivered_batch in access exclusive mode;
    -- Nobody can redrive one of its events any more, but somebody may just have done so.
    if orchestrator.has_live_events(v_day) then
      raise exception 'events of % were revived meanwhile', v_day using errcode = 'object_in_use';
    end if;
    detached := orchestrator.detach_partition('event', v_day, p_now)
      + orchestrator.detach_partition('outcome', v_day, p_now)
      + orchestrator.detach_partition('delivered_batch', v_day, p_now);
    return;
  end loop;
end $$;
comment on function orchestrator.retire_partition(timestamptz) is
  'Detaches the oldest day past retention that has no live event, with its dead letters; says how many. '
  'It waits for locks no longer than 40 ms';

create or replace function orchestrator.drop_dead_letters(p_day date) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_first constant uuid := orchestrator.first_id(p_day::timestamptz);
  v_end constant uuid := orchestrator.first_id((p_day + 1)::timestamptz);
  v_dropped bigint;
  v_orderings bigint[];
begin
  with gone as (
    delete from orchestrator.dead_letter d where d.event_id >= v_first and d.event_id < v_end returning d.blocks
  )
  select count(*), array_agg(distinct g.blocks) filter (where g.blocks is not null)
  into v_dropped, v_orderings
  from gone g;
  if v_orderings is not null then
    perform orchestrator.advance_ordering(v_orderings);
  end if;
  return v_dropped;
end $$;
comment on function orchestrator.drop_dead_letters(date) is
  'Deletes the dead letters of a day and lets later events of their ordering keys go on; returns how many it deleted';

create or replace function orchestrator.detach_partition(
  p_parent text, p_day date, p_now timestamptz) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
declare
  v_name constant text := orchestrator.partition_name(p_parent, p_day);
begin
  if not exists (select from pg_inherits i where i.inhrelid = to_regclass('orchestrator.' || v_name)) then
    return 0;
  end if;
  execute format('alter table orchestrator.%I detach partition orchestrator.%I', p_parent, v_name);
  insert into orchestrator.retired_partition (name, detached_at) values (v_name, p_now)
  on conflict (name) do update set detached_at = excluded.detached_at, archived_at = null;
  execute format('grant select on orchestrator.%I to orchestrator_read, orchestrator_ops', v_name);
  return 1;
end $$;
comment on function orchestrator.detach_partition(text, date, timestamptz) is
  'Detaches the partition of a day, if it is attached, and notes it in retired_partition; returns how many';

create or replace function orchestrator.drop_partitions(p_now timestamptz) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
declare
  v_name text;
  v_dropped integer := 0;
begin
  for v_name in
    select r.name from orchestrator.retired_partition r, orchestrator.newest_control() c
    where r.detached_at <= p_now - interval '1 hour' and (r.archived_at is not null or not c.archive)
      -- Not one that somebody attached again.
      and not exists (select from pg_inherits i where i.inhrelid = to_regclass('orchestrator.' || r.name))
    order by r.name
    limit 6
  loop
    execute format('drop table if exists orchestrator.%I', v_name);
    delete from orchestrator.retired_partition r where r.name = v_name;
    v_dropped := v_dropped + 1;
  end loop;
  return v_dropped;
end $$;
comment on function orchestrator.drop_partitions(timestamptz) is
  'Drops up to six partitions, two days, that were retired an hour ago, and archived if that is configured. '
  'Within that hour, alter table … attach partition brings a day back';

create or replace function orchestrator.partitions_to_archive() returns table (name text)
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select r.name from orchestrator.retired_partition r
  where r.archived_at is null and to_regclass('orchestrator.' || r.name) is not null
    and not exists (select from pg_inherits i where i.inhrelid = to_regclass('orchestrator.' || r.name))
  order by r.name
$$;
comment on function orchestrator.partitions_to_archive() is
  'Tables of retired partitions that are not archived yet. Copy each somewhere, then call archived_partition()';

create or replace function orchestrator.archived_partition(p_name text) returns boolean
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  with noted as (
    update orchestrator.retired_partition r
    set archived_at = orchestrator.now()
    where r.name = p_name and r.archived_at is null
    returning 1)
  select exists (select from noted)
$$;
comment on function orchestrator.archived_partition(text) is
  'Notes that a retired partition is archived, so that it may be dropped; '
  'false: there is no such partition, or it was archived before';
