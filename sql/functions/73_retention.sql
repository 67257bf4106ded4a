-- Retention: a day past it is detached, archived where that is wanted, and dropped. Called by run_maintenance() and the archive.

create or replace function orchestrator.configure_retention(
  p_retention_days integer default null, p_partition_days_ahead integer default null, p_max_schedule_ahead_days integer default null, p_archive boolean default null)
returns void
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_new orchestrator.control;
begin
  select * into v_new from orchestrator.control;
  -- A process that starts says what the database was told before, and must not wait for it.
  if (p_retention_days, p_partition_days_ahead, p_max_schedule_ahead_days, p_archive) is distinct from (null, null, null, null)
    and (coalesce(p_retention_days, v_new.retention_days), coalesce(p_partition_days_ahead, v_new.partition_days_ahead)
      , coalesce(p_max_schedule_ahead_days, v_new.max_schedule_ahead_days), coalesce(p_archive, v_new.archive))
    is not distinct from (v_new.retention_days, v_new.partition_days_ahead, v_new.max_schedule_ahead_days, v_new.archive) then
    return;
  end if;
  select * into v_new from orchestrator.control for update;
  v_new.retention_days := coalesce(p_retention_days, v_new.retention_days);
  v_new.partition_days_ahead := coalesce(p_partition_days_ahead, v_new.partition_days_ahead);
  v_new.max_schedule_ahead_days := coalesce(p_max_schedule_ahead_days, v_new.max_schedule_ahead_days);
  v_new.archive := coalesce(p_archive, v_new.archive);
  if v_new.retention_days not between 1 and 36500 then
    raise exception 'p_retention_days: expected 1 to 36500 days, got %', v_new.retention_days using errcode = 'invalid_parameter_value';
  end if;
  if v_new.partition_days_ahead not between 1 and 400 then
    raise exception 'p_partition_days_ahead: expected 1 to 400 days, got %', v_new.partition_days_ahead using errcode = 'invalid_parameter_value';
  end if;
  if v_new.max_schedule_ahead_days not between v_new.partition_days_ahead and 36500 then
    raise exception 'p_max_schedule_ahead_days: expected % (partition_days_ahead) to 36500 days, got %', v_new.partition_days_ahead, v_new.max_schedule_ahead_days
      using errcode = 'invalid_parameter_value';
  end if;
  update orchestrator.control c
  set retention_days = v_new.retention_days, partition_days_ahead = v_new.partition_days_ahead
    , max_schedule_ahead_days = v_new.max_schedule_ahead_days, archive = v_new.archive
  where (c.retention_days, c.partition_days_ahead, c.max_schedule_ahead_days, c.archive)
    is distinct from (v_new.retention_days, v_new.partition_days_ahead, v_new.max_schedule_ahead_days, v_new.archive);
end $$;
comment on function orchestrator.configure_retention(integer, integer, integer, boolean) is
  'Sets how many days events are kept after they were due, how many days ahead partitions are made, how far ahead events can be scheduled, and whether partitions are archived before they are dropped; null keeps what is. For all who call run_maintenance() or submit, from now on';

-- Nobody waits for it longer than for the two locks it waits for, and those it has only for a moment: it is the last that a transaction does.
create or replace function orchestrator.retire_partition(p_now timestamptz, out detached integer, out dead_letters bigint)
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set lock_timeout = '40 ms'
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_day date;
  v_first uuid;
  v_end uuid;
  v_parent text;
  v_orderings bigint[];
begin
  detached := 0;
  dead_letters := 0;
  if (select c.retention_days is null from orchestrator.control c) then
    return;
  end if;
  foreach v_day in array orchestrator.partition_days() loop
    exit when v_day >= orchestrator.first_day_kept(p_now);
    v_first := orchestrator.first_id(v_day::timestamptz);
    v_end := orchestrator.first_id((v_day + 1)::timestamptz);
    continue when exists (select from orchestrator.timer t where t.event_id >= v_first and t.event_id < v_end)
      or exists (select from orchestrator.horizon h where h.id >= v_first and h.id < v_end);
    with gone as (
      delete from orchestrator.dead_letter d where d.event_id >= v_first and d.event_id < v_end returning d.blocks
    )
    select count(*), array_agg(distinct g.blocks) filter (where g.blocks is not null) into dead_letters, v_orderings from gone g;
    if v_orderings is not null then
      perform orchestrator.advance_ordering(v_orderings);
    end if;
    perform orchestrator.refuse_open_transaction(format('%s is to be detached', v_day), 'run_maintenance()', '100 ms');
    -- A commit that is lost is made again by the next run, and others need not wait for the disk.
    perform set_config('synchronous_commit', 'off', true);
    lock table only orchestrator.event in access exclusive mode;
    lock table only orchestrator.outcome in access exclusive mode;
    -- Nobody can redrive one of them any more, but somebody may just have done so.
    if exists (select from orchestrator.timer t where t.event_id >= v_first and t.event_id < v_end) then
      raise exception 'events of % were revived meanwhile', v_day using errcode = 'object_in_use';
    end if;
    foreach v_parent in array array['event', 'outcome'] loop
      if exists (select from pg_inherits i where i.inhrelid = to_regclass('orchestrator.' || orchestrator.partition_name(v_parent, v_day))) then
        execute format('alter table orchestrator.%I detach partition orchestrator.%I', v_parent, orchestrator.partition_name(v_parent, v_day));
        insert into orchestrator.retired_partition (name, detached_at) values (orchestrator.partition_name(v_parent, v_day), p_now)
        on conflict (name) do update set detached_at = excluded.detached_at, archived_at = null;
        execute format('grant select on orchestrator.%I to orchestrator_read, orchestrator_ops', orchestrator.partition_name(v_parent, v_day));
        detached := detached + 1;
      end if;
    end loop;
    return;
  end loop;
end $$;
comment on function orchestrator.retire_partition(timestamptz) is
  'Detaches the oldest day past retention that has no live event, with its dead letters; says how many partitions, and how many dead letters went. Gives up after 40 ms behind any query that has event or outcome, so that none waits longer behind it';

create or replace function orchestrator.drop_partitions(p_now timestamptz) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_name text;
  v_dropped integer := 0;
begin
  for v_name in
    select r.name from orchestrator.retired_partition r, orchestrator.control c
    where r.detached_at <= p_now - interval '1 hour' and (r.archived_at is not null or not c.archive)
      -- Not one that somebody attached again.
      and not exists (select from pg_inherits i where i.inhrelid = to_regclass('orchestrator.' || r.name))
    order by r.name
    limit 4
  loop
    execute format('drop table if exists orchestrator.%I', v_name);
    delete from orchestrator.retired_partition r where r.name = v_name;
    v_dropped := v_dropped + 1;
  end loop;
  return v_dropped;
end $$;
comment on function orchestrator.drop_partitions(timestamptz) is
  'Drops up to four partitions that were retired an hour ago, and archived where that is wanted. The hour is for an operator whose clock ran ahead: alter table … attach partition brings a day back';

create or replace function orchestrator.partitions_to_archive() returns table (name text)
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select r.name from orchestrator.retired_partition r
  where r.archived_at is null and to_regclass('orchestrator.' || r.name) is not null
    and not exists (select from pg_inherits i where i.inhrelid = to_regclass('orchestrator.' || r.name))
  order by r.name
$$;
comment on function orchestrator.partitions_to_archive() is 'Tables of retired partitions that are not archived yet. Write each somewhere, then call archived_partition()';

create or replace function orchestrator.archived_partition(p_name text) returns boolean
language sql security definer set search_path = orchestrator, pg_temp as $$
  with noted as (
    update orchestrator.retired_partition r set archived_at = orchestrator.now() where r.name = p_name and r.archived_at is null returning 1)
  select exists (select from noted)
$$;
comment on function orchestrator.archived_partition(text) is 'Notes that a retired partition is archived, so that it may be dropped; false: there is no such one, or it was';
