-- Partitions: days of event, outcome and delivered_batch, named and bounded as pg_partman does. They are
-- created ahead, attached again when somebody detached one that is needed, retired when all of their events
-- have ended and retention is over, and dropped an hour later. Called by run_maintenance().

create or replace function orchestrator.partition_days() returns date[]
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select coalesce(array_agg(to_date(right(c.relname, 8), 'YYYYMMDD') order by c.relname), '{}')
  from pg_inherits i join pg_class c on c.oid = i.inhrelid
  where i.inhparent = 'orchestrator.event'::regclass and not i.inhdetachpending and c.relname ~ '^event_p[0-9]{8}$'
$$;
comment on function orchestrator.partition_days() is 'Days that event has a partition for, in order';

create or replace function orchestrator.partition_bounds(out first_day timestamptz, out end_day timestamptz)
language sql stable security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
as $$
  select d[1], d[cardinality(d)] + 1 from orchestrator.partition_days() d
$$;
comment on function orchestrator.partition_bounds() is
  'First instant of the first day of event, and first instant after its last day';

create or replace function orchestrator.first_day_kept(p_now timestamptz) returns date
language sql stable security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
as $$
  select p_now::date - coalesce(c.retention_days, 7) from orchestrator.newest_control() c
$$;
comment on function orchestrator.first_day_kept(timestamptz) is
  'The first day that retention keeps (7 days until configured). Events of earlier days are refused; existing ones are '
  'dropped once they have ended';

create or replace function orchestrator.partition_name(p_parent text, p_day date) returns text
language sql immutable parallel safe
return p_parent || '_p'
  || lpad(extract(year from p_day)::text, 4, '0')
  || lpad(extract(month from p_day)::text, 2, '0')
  || lpad(extract(day from p_day)::text, 2, '0');
comment on function orchestrator.partition_name(text, date) is
  'Name of a day''s partition, as pg_partman names it: event_p20261121';

-- In the extended protocol a transaction of a single statement, too, begins a little before it, and
-- behind a pooler some messages before it.
create or replace function orchestrator.refuse_open_transaction(p_what text, p_call text, p_most interval) returns void
language plpgsql stable
set search_path = orchestrator, pg_temp
as $$
begin
  if statement_timestamp() > transaction_timestamp() + p_most then
    raise exception '%, but not in a transaction that goes on: call % outside of any', p_what, p_call
      using errcode = 'invalid_transaction_state';
  end if;
end $$;
comment on function orchestrator.refuse_open_transaction(text, text, interval) is
  'Fails if the transaction began more than p_most before this statement: '
  'locks that others wait for would last until its end';

-- Attaching takes a share update exclusive lock on the parent, which lets reads and writes go on; create
-- table … partition of does not. The lock of the horizon lasts until the end of the transaction, and
-- whoever submits beyond the last day waits for it. So all tables are created first.
create or replace function orchestrator.make_partitions(p_first date, p_last date) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
declare
  v_parent text;
  v_day date;
  v_name text;
  v_column text;
  v_parents text[] := '{}';
  v_days date[] := '{}';
begin
  for v_parent, v_day, v_name in
    select m.parent, m.day, m.name from orchestrator.missing_partitions(p_first, p_last) m
    order by m.parent, m.day
  loop
    begin
      execute format('create table orchestrator.%I (like orchestrator.%I including all) using heap', v_name, v_parent);
      -- Takes back what default privileges gave.
      execute format('revoke all on orchestrator.%I from public, orchestrator_submit, orchestrator_dispatch'
        ', orchestrator_ingest', v_name);
      -- Like does not copy which columns are not analyzed.
      for v_column in
        select a.attname from pg_attribute a
        where a.attrelid = format('orchestrator.%I', v_parent)::regclass and a.attstattarget = 0
      loop
        execute format('alter table orchestrator.%I alter %I set statistics 0', v_name, v_column);
      end loop;
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
comment on function orchestrator.make_partitions(date, date) is
  'create_partitions() within any transaction: for submissions of events that are due';

create or replace function orchestrator.missing_partitions(p_first date, p_last date)
returns table (parent text, day date, name text)
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select parent.name, d::date, orchestrator.partition_name(parent.name, d::date)
  from generate_series(p_first, p_last, interval '1 day') d
  cross join (values ('event'), ('outcome'), ('delivered_batch')) parent (name)
  where to_regclass('orchestrator.' || orchestrator.partition_name(parent.name, d::date)) is null
$$;
comment on function orchestrator.missing_partitions(date, date) is
  'Partitions of these days that do not exist, not even detached';

create or replace function orchestrator.create_partitions(p_first date, p_last date) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
begin
  perform orchestrator.refuse_open_transaction(
    format('%s to %s are to get their partitions', p_first, p_last)
    , 'run_maintenance() or create_partitions()', '1 s')
  where exists (select from orchestrator.missing_partitions(p_first, p_last));
  return orchestrator.make_partitions(p_first, p_last);
end $$;
comment on function orchestrator.create_partitions(date, date) is
  'Creates the missing daily partitions of event, outcome and delivered_batch; returns how many. '
  'Refused in a transaction that goes on, since submissions beyond the last day wait for its end';

create or replace function orchestrator.attach_partition(p_parent text, p_day date) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
as $$
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
comment on function orchestrator.attach_partition(text, date) is
  'Attaches the table of a day, once nobody is submitting events to the horizon';

create or replace function orchestrator.open_days(p_days date[], p_now timestamptz) returns void
language sql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
as $$
  select orchestrator.make_partitions(d.day, d.day)
  from unnest(p_days) as d (day)
  where d.day between orchestrator.first_day_kept(p_now) and p_now::date + 1
    and d.day <> all (orchestrator.partition_days())
  order by d.day
$$;
comment on function orchestrator.open_days(date[], timestamptz) is
  'Creates missing partitions of those days that are kept and begin by tomorrow. '
  'So events that are due can be submitted even if maintenance did not run';

create or replace function orchestrator.attach_partitions(p_now timestamptz) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_parent text;
  v_day date;
  v_attached integer := 0;
begin
  for v_parent, v_day in
    select split_part(c.relname, '_p', 1), d.day
    from pg_class c
    cross join lateral (select to_date(right(c.relname, 8), 'YYYYMMDD') as day) d
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'r'
      and c.relname ~ '^(event|outcome|delivered_batch)_p[0-9]{8}$'
      and not exists (select from pg_inherits i where i.inhrelid = c.oid)
      -- Days that are kept, retired ones too: the clock was ahead, or retention was shorter. Of earlier
      -- days those that somebody detached while events of them are still to be delivered.
      and (d.day >= orchestrator.first_day_kept(p_now)
        or not exists (select from orchestrator.retired_partition r where r.name = c.relname)
          and exists (
            select from orchestrator.timer t
            where t.event_id >= orchestrator.first_id(d.day::timestamptz)
              and t.event_id < orchestrator.first_id((d.day + 1)::timestamptz)))
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
  'Attaches detached partitions that are needed: their day is kept, or they have live events and were not retired. '
  'Returns how many';

create or replace function orchestrator.hand_partitions_to(p_whom text) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
begin
  if p_whom is null or p_whom not in ('maintenance', 'pg_partman') then
    raise exception 'p_whom: expected maintenance or pg_partman, got %', coalesce(p_whom, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  update orchestrator.control set partitioned_by = p_whom;
end $$;
comment on function orchestrator.hand_partitions_to(text) is
  'Sets who creates partitions ahead: maintenance, or pg_partman (ops/pg_partman.sql). '
  'Either way run_maintenance() retires and drops them: only it knows which have live events';
