-- Lanes of a destination's own: made when it is configured or when its attempts fail, and taken away again.
-- Locks, in this order everywhere: timers by event id, ordering keys by bucket, destinations that are made or deleted by the
-- advisory lock of their name, old destinations, lanes by number. Nobody waits for the row of control, see 27_control_notes.sql.
-- A claim waits a moment for lanes, and for nothing else.

create or replace function orchestrator.recall_lane(p_lane integer) returns void
language sql security definer set search_path = orchestrator, pg_temp
as $$ select pg_notify('orchestrator_due', 'hold ' || coalesce(p_lane::text, '*')) $$;
comment on function orchestrator.recall_lane(integer) is 'Has dispatchers hand back what they hold of a lane and have not begun; null: of all lanes. A hint: they see it at their next claim all the same';

create or replace function orchestrator.ensure_dedicated_lanes(p_names text[], p_configured boolean) returns table (name text, lane integer)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_made integer;
begin
  -- Whoever watches one that fails must not wait for an operator.
  p_names := array(
    select n.name from (select distinct n as name from unnest(p_names) n order by 1) n
    where p_configured or exists (select from orchestrator.destination d where d.name = n.name)
      or pg_try_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(n.name)));
  perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(n)) from unnest(p_names) n where p_configured;
  -- What a pattern matches is one destination from now on.
  perform orchestrator.forget_destination(d.name)
  from (select d.name from orchestrator.destination d join unnest(p_names) as n (name) on orchestrator.is_pattern(n.name) and orchestrator.matches(d.name, n.name)
        where p_configured and not d.configured order by d.name) d;
  with made as (
    insert into orchestrator.destination (name, configured, changed_at)
    select n.name, p_configured, v_now
    from (select distinct n as name from unnest(p_names) n) n
    where not exists (select from orchestrator.destination d where d.name = n.name)
      and (p_configured or orchestrator.pattern_lane(n.name) is null
           and (select count(*) from orchestrator.destination d where not d.configured) < orchestrator.max_unconfigured_destinations())
    order by n.name
    on conflict do nothing
    returning name
  ), laned as (
    insert into orchestrator.lane (lane, name, hash)
    select nextval('orchestrator.lane_number'), m.name, case when not orchestrator.is_pattern(m.name) then hashtextextended(m.name, 0) end
    from made m
    returning 1
  )
  select count(*) into v_made from laned;
  if v_made > 0 then
    perform orchestrator.note_control('reroute');
  end if;
  if p_configured then
    update orchestrator.destination d set configured = true where d.name = any (p_names) and not d.configured;
  end if;
  return query
  select n.name, coalesce(l.lane, orchestrator.pattern_lane(n.name))
  from unnest(p_names) as n (name) left join orchestrator.lane l on l.name = n.name;
end $$;
comment on function orchestrator.ensure_dedicated_lanes(text[], boolean) is
  'Gives destinations lanes of their own, unless they have one; claims move the timers that wait elsewhere. Lane null: too many misbehave already, or (then it is left out) another session is about to make or delete it';

create or replace function orchestrator.ensure_dedicated_lane(p_name text, p_configured boolean) returns integer
language sql security definer set search_path = orchestrator, pg_temp
as $$ select o.lane from orchestrator.ensure_dedicated_lanes(array[p_name], p_configured) o $$;
comment on function orchestrator.ensure_dedicated_lane(text, boolean) is 'Gives a destination a lane of its own, unless it has one. Null: too many misbehave already';

create or replace function orchestrator.forget_destination(p_name text) returns boolean
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
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
  set name = null, hash = null, limited = false, paused_at = null, next_slot_at = null, parallel_now = null, held_by = null
    , breaker = 'closed', open_until = '-infinity', openings = 0, failures = 0, window_at = null
  where l.lane = v_lane;
  perform orchestrator.tell_due(orchestrator.now());
  return true;
end $$;
comment on function orchestrator.forget_destination(text) is
  'Takes a destination''s configuration and limits away; its timers move at claim to the lanes where they belong then. False: there is no such destination';

-- Ordering keys. Only the first live event of a key is in a lane that claims look at; claims put the others of lane n into lane -1 - n
-- when they come across them, and whoever ends or puts off the first one lets the next one in.
