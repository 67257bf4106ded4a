-- Dedicated lanes: a destination gets a lane of its own when it is configured, or when its attempts fail.
--
-- Locks are taken in this order everywhere: timers by event id, ordering keys by lock number, the names of
-- destinations that are made or deleted (advisory locks), rows of destinations, lanes by number. Nobody waits
-- for the row of control, see 27_control_notes.sql. A claim waits a moment for lanes, and for nothing else.

create or replace function orchestrator.recall_lane(p_lane integer) returns void
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select pg_notify('orchestrator_due', 'hold ' || coalesce(p_lane::text, '*'))
$$;
comment on function orchestrator.recall_lane(integer) is
  'Tells dispatchers to release the events of a lane (null: of all lanes) that they have claimed but not started. '
  'It is a hint: their next claim shows it, too';

create or replace function orchestrator.ensure_dedicated_lanes(p_names text[], p_configured boolean)
returns table (name text, lane integer)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_made integer;
begin
  -- A finish must not wait for an operator: it leaves out names that another session has locked.
  p_names := array(
    select n.name from (select distinct n as name from unnest(p_names) n order by 1) n
    where p_configured
      or exists (select from orchestrator.destination d where d.name = n.name)
      or pg_try_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(n.name)));
  perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(n))
  from unnest(p_names) n
  where p_configured;

  -- A configured pattern takes the place of the unconfigured destinations that match it.
  perform orchestrator.forget_destination(d.name)
  from (
    select d.name
    from orchestrator.destination d
    join unnest(p_names) as n (name) on orchestrator.is_pattern(n.name) and orchestrator.matches(d.name, n.name)
    where p_configured and not d.configured
    order by d.name) d;

  with made as (
    insert into orchestrator.destination (name, configured, changed_at)
    select n.name, p_configured, v_now
    from (select distinct n as name from unnest(p_names) n) n
    where not exists (select from orchestrator.destination d where d.name = n.name)
      and (p_configured
        or orchestrator.pattern_lane(n.name) is null
          and (select count(*) from orchestrator.destination d where not d.configured)
            < orchestrator.max_unconfigured_destinations())
    order by n.name
    on conflict do nothing
    returning name
  ), lanes as (
    insert into orchestrator.lane (lane, name, hash)
    select nextval('orchestrator.lane_number'), m.name
      , case when not orchestrator.is_pattern(m.name) then hashtextextended(m.name, 0) end
    from made m
    returning 1
  )
  select count(*) into v_made from lanes;
  -- From now on claims move the timers that wait in other lanes.
  if v_made > 0 then
    perform orchestrator.note_control('reroute');
  end if;

  if p_configured then
    update orchestrator.destination d set configured = true where d.name = any (p_names) and not d.configured;
  end if;
  return query
  select n.name, coalesce(l.lane, orchestrator.pattern_lane(n.name))
  from unnest(p_names) as n (name)
  left join orchestrator.lane l on l.name = n.name;
end $$;
comment on function orchestrator.ensure_dedicated_lanes(text[], boolean) is
  'Gives destinations dedicated lanes, unless they have them; null where too many unconfigured destinations have one. '
  'Unconfigured names that another session is making or deleting are left out';

create or replace function orchestrator.ensure_dedicated_lane(p_name text, p_configured boolean) returns integer
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select l.lane from orchestrator.ensure_dedicated_lanes(array[p_name], p_configured) l
$$;
comment on function orchestrator.ensure_dedicated_lane(text, boolean) is
  'Gives a destination a dedicated lane, unless it has one. Null: too many unconfigured destinations have one already';

create or replace function orchestrator.forget_destination(p_name text) returns boolean
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_lane integer;
begin
  select l.lane into v_lane from orchestrator.lane l where l.name = p_name;
  if v_lane is null then
    return false;
  end if;
  perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(p_name));
  perform orchestrator.note_control('reroute');
  delete from orchestrator.destination d where d.name = p_name;
  if not found then
    return false;
  end if;
  update orchestrator.lane l
  set name = null
    , hash = null
    , limited = false
    , paused_at = null
    , next_slot_at = null
    , parallel_now = null
    , held_by = null
    , breaker = 'closed'
    , open_until = '-infinity'
    , openings = 0
    , failures = 0
    , window_at = null
  where l.lane = v_lane;
  perform orchestrator.tell_due(orchestrator.now());
  return true;
end $$;
comment on function orchestrator.forget_destination(text) is
  'Deletes a destination with its limits; claims then move its timers to the lanes where they belong. '
  'False: there is no such destination';
