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

-- Timers are in a wrong lane when their destination was given a lane, or lost one, after they were submitted. Claims move those they
-- come across; this moves the rest, so that claims need not look any more. Whoever was submitting when the lanes changed must have ended.
create or replace function orchestrator.settle_lanes(p_limit integer default 50000) returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_rerouted_by xid8;
  v_ended boolean;
  v_moved bigint;
begin
  select c.rerouted_by, c.rerouted_by < pg_snapshot_xmin(pg_current_snapshot()) into v_rerouted_by, v_ended from orchestrator.control c;
  if v_rerouted_by is null then
    return 0;
  end if;
  with kind as materialized (
    select t.lane, t.destination, (array_agg(t.event_id))[1] as event_id, (array_agg(t.scheduled_at))[1] as scheduled_at
    from orchestrator.timer t where t.lane <> -1 group by t.lane, t.destination
  ), wrong as materialized (
    select k.lane, k.destination, r.lane as right_lane
    from kind k
    join orchestrator.event e on e.id = k.event_id and e.scheduled_at = k.scheduled_at
    cross join lateral (select orchestrator.lane_for(orchestrator.destination_name(e.delivery_type, e.destination)) as lane) r
    where k.lane <> r.lane
  ), moved as (
    update orchestrator.timer t
    set lane = w.right_lane
    from wrong w
    where t.lane = w.lane and t.destination = w.destination
      and t.ctid = any (array(
        select t.ctid from orchestrator.timer t join wrong w on t.lane = w.lane and t.destination = w.destination
        where t.lease_until is null or t.lease_until <= orchestrator.now()
        limit p_limit for update of t skip locked))
    returning 1
  )
  select (select count(*) from moved), v_ended and not exists (select from wrong) into v_moved, v_ended;
  if v_ended then
    -- Nobody can put a timer into a lane that has had no name since before the oldest transaction began.
    delete from orchestrator.lane l
    where l.lane > 63 and l.name is null and not exists (select from orchestrator.timer t where t.lane = l.lane);
    update orchestrator.control c set rerouted_by = null where c.rerouted_by = v_rerouted_by;
  end if;
  return v_moved;
end $$;
comment on function orchestrator.settle_lanes(integer) is 'Moves up to p_limit timers to the lanes where they belong; once there are none left, claims stop looking for them, and lanes of deleted destinations go. Returns how many it moved';

create or replace function orchestrator.forget_well_destinations() returns bigint
language sql security definer set search_path = orchestrator, pg_temp as $$
  select count(*) from orchestrator.destination d join orchestrator.lane l on l.name = d.name cross join orchestrator.now() as n (now)
  where not d.configured
    and case when case l.breaker
        when 'closed' then greatest(d.changed_at, l.failed_at, l.closed_at) < n.now - interval '10 min'
        else l.open_until < n.now - interval '1 hour' and not exists (select from orchestrator.timer t where t.lane = l.lane)
      end then orchestrator.forget_destination(d.name) end
$$;
comment on function orchestrator.forget_well_destinations() is 'Gives up the lanes of destinations that were never configured and have not failed for ten minutes. Returns how many';

create or replace function orchestrator.run_maintenance(p_days_ahead integer default 30, p_days_behind integer default 7) returns json
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set lock_timeout = '2 s' as $$
declare
  v_today constant date := orchestrator.now()::date;
  v_created integer;
  v_folded bigint;
  v_forgotten bigint;
  v_moved bigint;
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
  -- A net below finish_events() and the others, which do this at once.
  perform orchestrator.advance_ordering(array(select distinct t.ordering from orchestrator.timer t where t.lane = -1));
  v_forgotten := orchestrator.forget_well_destinations();
  v_moved := orchestrator.settle_lanes();
  return json_build_object('partitions_created', v_created, 'statistics_folded', v_folded, 'destinations_forgotten', v_forgotten, 'timers_moved', v_moved);
end $$;
comment on function orchestrator.run_maintenance(integer, integer) is
  'Makes partitions ahead (and behind, for events that arrive late), folds statistics, forgets destinations that are well again and moves timers to the lanes where they belong; safe at any time, from anywhere; says what it did';
