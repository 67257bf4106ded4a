-- Lanes: what run_maintenance() does for those that destinations gained or lost.

-- Timers are in a wrong lane when their destination was given a lane, or lost one, after they were submitted. Claims move those they
-- come across; this moves the rest, so that claims need not look any more. Whoever was submitting when the lanes changed must have ended.
create or replace function orchestrator.settle_lanes(p_limit integer default 50000) returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_nestloop = off set enable_mergejoin = off as $$
declare
  v_rerouted_by xid8;
  v_known text[];
  v_ended boolean;
  v_at tid[];
  v_lanes integer[];
  v_moved bigint;
  v_writers text[];
begin
  -- What this may change of lanes, others see when it has committed: the next run settles it.
  if exists (select from orchestrator.control_note) then
    perform orchestrator.fold_notes();
    return 0;
  end if;
  select c.rerouted_by, c.rerouted_writers into v_rerouted_by, v_known from orchestrator.control c;
  if v_rerouted_by is null then
    return 0;
  end if;
  -- Read after the lanes were seen to have changed: who begins to write later sees that, too. Prepared transactions have no process.
  v_writers := array(
    select l.virtualtransaction from pg_locks l
    where l.relation = 'orchestrator.timer'::regclass and l.locktype = 'relation' and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') and l.pid is distinct from pg_backend_pid());
  v_ended := not coalesce(v_known, v_writers) && v_writers;
  with kind as materialized (
    select t.lane, t.destination, any_value(t.event_id) as event_id from orchestrator.timer t group by t.lane, t.destination
  ), wrong as materialized (
    select k.lane, k.destination, case when k.lane < 0 then -1 - r.lane else r.lane end as right_lane
    from kind k
    cross join lateral orchestrator.destination_of(k.event_id) d
    cross join lateral (select orchestrator.lane_for(d.name) as lane) r
    where k.lane <> case when k.lane < 0 then -1 - r.lane else r.lane end
  ), found as (
    select t.ctid as at, w.right_lane from orchestrator.timer t join wrong w on t.lane = w.lane and t.destination = w.destination
    where t.lease_until is null or t.lease_until <= orchestrator.now()
    limit p_limit for update of t skip locked
  )
  select array_agg(f.at), array_agg(f.right_lane), v_ended and not exists (select from wrong) into v_at, v_lanes, v_ended from found f;
  v_moved := orchestrator.move_timers(v_at, v_lanes);
  if not v_ended and orchestrator.fold_control() then
    update orchestrator.control c set rerouted_writers = v_writers where c.rerouted_by = v_rerouted_by and c.rerouted_writers is null;
  end if;
  -- Floors are used again from here on, and those of before the lanes changed may be too high.
  if v_ended and pg_try_advisory_xact_lock(hashtext('orchestrator.floors')) then
    begin
      perform from orchestrator.control for update;
      perform orchestrator.reset_floors();
      -- Nobody can put a timer into a lane that has had no name since before the oldest transaction began.
      delete from orchestrator.lane l
      where l.lane > 63 and l.name is null and not exists (select from orchestrator.timer t where t.lane in (l.lane, -1 - l.lane));
      update orchestrator.control c set rerouted_by = null where c.rerouted_by = v_rerouted_by;
    exception when lock_not_available then
      perform set_config('orchestrator.problem', 'timers were moved, but claims go on looking for others while another session has a lane or control', true);
    end;
  end if;
  return v_moved;
end $$;
comment on function orchestrator.settle_lanes(integer) is 'Moves up to p_limit timers to the lanes where they belong; once there are none left, claims stop looking for them, and lanes of deleted destinations go. Returns how many it moved';

-- Apart from settle_lanes(), which reads the whole table: rows are found by their places, whatever the size of the table.
create or replace function orchestrator.move_timers(p_at tid[], p_lanes integer[]) returns bigint
language sql security definer set search_path = orchestrator, pg_temp
set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
  with moved as (
    update orchestrator.timer t set lane = m.lane
    from unnest(p_at, p_lanes) as m (at, lane)
    where t.ctid = any (p_at) and t.ctid = m.at
    returning 1)
  select count(*) from moved
$$;
comment on function orchestrator.move_timers(tid[], integer[]) is 'Puts timers, by their places, into lanes. The caller has them locked; returns how many';

create or replace function orchestrator.forget_well_destinations() returns bigint
language sql security definer set search_path = orchestrator, pg_temp
set enable_seqscan = off set enable_bitmapscan = off as $$
  select count(*) from orchestrator.destination d join orchestrator.lane l on l.name = d.name cross join orchestrator.now() as n (now)
  where not d.configured
    and case when case l.breaker
        when 'closed' then greatest(d.changed_at, l.failed_at, l.closed_at) < n.now - interval '10 min'
        else l.open_until < n.now - interval '1 hour' and (select true from orchestrator.timer t where t.lane = l.lane limit 1) is null
      end and orchestrator.try_destination(d.name) then orchestrator.forget_destination(d.name) end
$$;
comment on function orchestrator.forget_well_destinations() is 'Gives up the lanes of destinations that were never configured and have not failed for ten minutes. Returns how many';
