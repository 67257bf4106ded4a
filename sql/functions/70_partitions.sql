-- Partitions: days of event and outcome, named and bounded as pg_partman does. Made ahead, attached again when somebody detached one that
-- is needed, retired when all of their events have ended and retention is over, dropped an hour later. Called by run_maintenance().

create or replace function orchestrator.partition_days() returns date[]
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select coalesce(array_agg(to_date(right(c.relname, 8), 'YYYYMMDD') order by c.relname), '{}')
  from pg_inherits i join pg_class c on c.oid = i.inhrelid
  where i.inhparent = 'orchestrator.event'::regclass and not i.inhdetachpending and c.relname ~ '^event_p[0-9]{8}$'
$$;
comment on function orchestrator.partition_days() is 'Days that event has a partition for, in order';

create or replace function orchestrator.partition_bounds(out first_day timestamptz, out end_day timestamptz)
language sql stable security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
  select d[1], d[cardinality(d)] + 1 from orchestrator.partition_days() d
$$;
comment on function orchestrator.partition_bounds() is 'First instant of the first day of event, and first instant after its last day';

create or replace function orchestrator.first_day_kept(p_now timestamptz) returns date
language sql stable security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
  select p_now::date - coalesce(c.retention_days, 7) from orchestrator.control c
$$;
comment on function orchestrator.first_day_kept(timestamptz) is 'The first day that retention keeps: events of before are refused, and go once they have ended; a week, while nobody has said';

-- Ids begin with the millisecond of scheduled_at, so a range of time is a range of any index by id.
create or replace function orchestrator.first_id(p_at timestamptz) returns uuid
language sql immutable strict parallel safe
return encode(substr(int8send(greatest(0, least((extract(epoch from greatest(p_at, '1970-01-01 00:00:00+00')) * 1000)::bigint, 281474976710655))), 3)
  || '\x00000000000000000000', 'hex')::uuid;
comment on function orchestrator.first_id(timestamptz) is 'No event scheduled for then, or later, has an id below this one; all of earlier milliseconds have';

create or replace function orchestrator.partition_name(p_parent text, p_day date) returns text
language sql immutable parallel safe
return p_parent || '_p' || lpad(extract(year from p_day)::text, 4, '0') || lpad(extract(month from p_day)::text, 2, '0') || lpad(extract(day from p_day)::text, 2, '0');
comment on function orchestrator.partition_name(text, date) is 'Name of a day''s partition, as pg_partman names it: event_p20261121';

-- By the extended protocol a transaction of a single statement begins a little before it, too, and behind a pooler by some messages.
create or replace function orchestrator.refuse_open_transaction(p_what text, p_call text, p_most interval) returns void
language plpgsql stable set search_path = orchestrator, pg_temp as $$
begin
  if statement_timestamp() > transaction_timestamp() + p_most then
    raise exception '%, but not in a transaction that goes on: call % outside of any', p_what, p_call using errcode = 'invalid_transaction_state';
  end if;
end $$;
comment on function orchestrator.refuse_open_transaction(text, text, interval) is
  'Refuses to do something whose locks would last as long as the caller''s transaction, when that began longer ago than p_most before this statement';

-- Attaching takes a share update exclusive lock on the parent, which lets reads and writes go on; create table … partition of does not.
-- The lock of the horizon lasts to the end of the transaction: whoever submits beyond the last day waits that long. So all tables are made first.
create or replace function orchestrator.make_partitions(p_first date, p_last date) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_parent text;
  v_day date;
  v_parents text[] := '{}';
  v_days date[] := '{}';
begin
  for v_parent, v_day in
    select parent.name, d::date from generate_series(p_first, p_last, interval '1 day') d, (values ('event'), ('outcome')) parent (name)
    where to_regclass('orchestrator.' || orchestrator.partition_name(parent.name, d::date)) is null
    order by 1, 2
  loop
    begin
      execute format('create table orchestrator.%I (like orchestrator.%I including all) using heap', orchestrator.partition_name(v_parent, v_day), v_parent);
      -- What default privileges gave.
      execute format('revoke all on orchestrator.%I from public, orchestrator_submit, orchestrator_dispatch, orchestrator_ingest', orchestrator.partition_name(v_parent, v_day));
      v_parents := v_parents || v_parent;
      v_days := v_days || v_day;
    exception when duplicate_table or unique_violation then
      continue;
    end;
  end loop;
  for v_parent, v_day in select * from unnest(v_parents, v_days) loop
    perform orchestrator.attach_partition(v_parent, v_day);
  end loop;
  return cardinality(v_days);
end $$;
comment on function orchestrator.make_partitions(date, date) is 'create_partitions() in whatever transaction: for submissions, whose events are due';

create or replace function orchestrator.create_partitions(p_first date, p_last date) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
begin
  perform orchestrator.refuse_open_transaction(format('%s to %s are to get their partitions', p_first, p_last), 'run_maintenance() or create_partitions()', '1 s')
  where exists (
    select from generate_series(p_first, p_last, interval '1 day') d, (values ('event'), ('outcome')) parent (name)
    where to_regclass('orchestrator.' || orchestrator.partition_name(parent.name, d::date)) is null);
  return orchestrator.make_partitions(p_first, p_last);
end $$;
comment on function orchestrator.create_partitions(date, date) is
  'Makes the daily partitions of event and outcome that are missing, first to last day; returns how many. Whoever submits beyond the last day waits for the end of the transaction, so one that goes on is refused';

create or replace function orchestrator.attach_partition(p_parent text, p_day date) returns void
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
declare
  v_patience constant text := current_setting('lock_timeout');
begin
  if p_parent = 'event' then
    -- Whoever submits beyond the last day waits behind this wait, so it is never a long one.
    perform set_config('lock_timeout', '2s', true) where v_patience = '0';
    perform pg_advisory_xact_lock(hashtext('orchestrator.horizon'));
    perform set_config('lock_timeout', v_patience, true);
  end if;
  execute format('alter table orchestrator.%I attach partition orchestrator.%I for values from (%L) to (%L)'
    , p_parent, orchestrator.partition_name(p_parent, p_day), p_day::timestamptz, (p_day + 1)::timestamptz);
end $$;
comment on function orchestrator.attach_partition(text, date) is 'Attaches the table of a day, once all that submit events to the horizon have ended';

create or replace function orchestrator.open_days(p_days date[], p_now timestamptz) returns void
language sql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
  select orchestrator.make_partitions(d.day, d.day)
  from unnest(p_days) as d (day)
  where d.day between orchestrator.first_day_kept(p_now) and p_now::date + 1 and d.day <> all (orchestrator.partition_days())
  order by d.day
$$;
comment on function orchestrator.open_days(date[], timestamptz) is
  'Makes the partitions of those days that are kept and begin by tomorrow: whatever maintenance missed, an event that is due has its place';

create or replace function orchestrator.attach_partitions(p_now timestamptz) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC'
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_parent text;
  v_day date;
  v_attached integer := 0;
begin
  for v_parent, v_day in
    select split_part(c.relname, '_p', 1), d.day
    from pg_class c
    cross join lateral (select to_date(right(c.relname, 8), 'YYYYMMDD') as day) d
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'r' and c.relname ~ '^(event|outcome)_p[0-9]{8}$'
      and not exists (select from pg_inherits i where i.inhrelid = c.oid)
      -- Retired ones too, where the clock was ahead, or less was to be kept.
      and (d.day >= orchestrator.first_day_kept(p_now)
           or not exists (select from orchestrator.retired_partition r where r.name = c.relname)
             and exists (select from orchestrator.timer t where t.event_id >= orchestrator.first_id(d.day::timestamptz) and t.event_id < orchestrator.first_id((d.day + 1)::timestamptz)))
    order by c.relname
  loop
    perform orchestrator.refuse_open_transaction(format('%s is to be attached', v_day), 'run_maintenance()', '1 s');
    perform orchestrator.attach_partition(v_parent, v_day);
    delete from orchestrator.retired_partition r where r.name = orchestrator.partition_name(v_parent, v_day);
    v_attached := v_attached + 1;
  end loop;
  return v_attached;
end $$;
comment on function orchestrator.attach_partitions(timestamptz) is
  'Attaches partitions again that somebody detached by hand, while retention keeps their day or events of it are to be delivered, and retired ones whose day is kept after all; others are left alone. Returns how many';

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

create or replace function orchestrator.hand_partitions_to(p_whom text) returns void
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
begin
  if p_whom is null or p_whom not in ('maintenance', 'pg_partman') then
    raise exception 'p_whom: expected maintenance or pg_partman, got %', coalesce(p_whom, 'null') using errcode = 'invalid_parameter_value';
  end if;
  update orchestrator.control set partitioned_by = p_whom;
end $$;
comment on function orchestrator.hand_partitions_to(text) is
  'Says who makes partitions ahead: maintenance, or pg_partman, see ops/pg_partman.sql. run_maintenance() retires and drops them all the same: it alone knows which have live events';
