-- Maintenance: one call from pg_cron, a CronJob or the runtime's own loop; one at a time, by advisory lock.

-- Attaching takes a share update exclusive lock on the parent, which lets reads and writes go on; create table … partition of does not.
create or replace function orchestrator.create_partitions(p_first date, p_last date) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
declare
  v_new record;
  v_created integer := 0;
begin
  for v_new in
    select parent.name as parent, format('%s_p%s', parent.name, to_char(d, 'YYYYMMDD')) as name, d::date::timestamptz as starts, (d::date + 1)::timestamptz as ends
    from generate_series(p_first, p_last, interval '1 day') d, (values ('event'), ('outcome')) parent (name)
    where to_regclass(format('orchestrator.%s_p%s', parent.name, to_char(d, 'YYYYMMDD'))) is null
    order by 1, 2
  loop
    execute format('create table orchestrator.%I (like orchestrator.%I including all)', v_new.name, v_new.parent);
    execute format('alter table orchestrator.%I attach partition orchestrator.%I for values from (%L) to (%L)', v_new.parent, v_new.name, v_new.starts, v_new.ends);
    v_created := v_created + 1;
  end loop;
  return v_created;
end $$;
comment on function orchestrator.create_partitions(date, date) is
  'Makes the daily partitions of event and outcome that are missing, first to last day; named and bounded as pg_partman does';

create or replace function orchestrator.run_maintenance(p_days_ahead integer default 30, p_days_behind integer default 7) returns json
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set lock_timeout = '2 s' as $$
declare
  v_today constant date := orchestrator.now()::date;
  v_created integer;
  v_folded bigint;
begin
  if not pg_try_advisory_xact_lock(hashtext('orchestrator.run_maintenance')) then
    return json_build_object('skipped', 'another run_maintenance is at work');
  end if;
  v_created := orchestrator.create_partitions(v_today - p_days_behind, v_today + p_days_ahead);
  with gone as (
    delete from orchestrator.statistic s
    using (select minute, name from orchestrator.statistic group by 1, 2 having count(*) > 1) d
    where s.minute = d.minute and s.name = d.name
    returning s.*
  ), folded as (
    insert into orchestrator.statistic select minute, name, sum(value) from gone group by 1, 2
  )
  select count(*) into v_folded from gone;
  return json_build_object('partitions_created', v_created, 'statistics_folded', v_folded);
end $$;
comment on function orchestrator.run_maintenance(integer, integer) is
  'Makes partitions ahead (and behind, for events that arrive late) and folds statistics; safe at any time, from anywhere; says what it did';
