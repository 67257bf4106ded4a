-- Pauses: of one destination, of a pattern, of everything. Called from psql, the CLI and the API. They wait
-- for nobody: what they cannot lock, they note (27_control_notes.sql), and it holds from the next claim on.

create or replace function orchestrator.pause_destination(p_name text)
returns table (name text, paused_at timestamptz, in_flight bigint, waiting bigint, note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_is_pattern constant boolean := orchestrator.is_pattern(v_name);
  v_hash constant bigint := hashtextextended(v_name, 0);
  v_part_of constant text := (
    select d.name from orchestrator.destination d
    where d.name = orchestrator.destination_for(v_name) and d.name <> v_name);
  v_settings orchestrator.destination;
  v_lane integer;
  v_since timestamptz;
begin
  -- Another session has locked it, or one of the unconfigured destinations whose place a new pattern takes.
  if not orchestrator.await_destination(v_name) or v_is_pattern and not (
    select coalesce(bool_and(orchestrator.try_destination(d.name)), true) from orchestrator.destination d
    where not d.configured and orchestrator.matches(d.name, v_name))
  then
    select l.lane into v_lane from orchestrator.lane l where l.name = v_name;
    if v_lane is null and v_is_pattern then
      raise exception 'name: % cannot be paused yet: %', v_name, orchestrator.note_destination(v_name, 'pause')
        using errcode = 'lock_not_available';
    end if;
    perform orchestrator.recall_lane(r.lane)
    from unnest(case when v_is_pattern then array[null::integer] else array[v_lane, (v_hash & 63)::integer] end)
      as r (lane)
    where r.lane is not null or v_is_pattern;
    return query
    select v_name, v_now
      , (select count(*) from orchestrator.timer t where t.destination = v_hash and t.lease_until > v_now)
      , orchestrator.count_waiting(v_name)
      , concat_ws('; '
        , 'no attempt begins until it is resumed; those under way are left alone'
        , orchestrator.note_destination(v_name, 'pause'));
    return;
  end if;

  perform orchestrator.fold_destination(v_name);
  v_lane := orchestrator.ensure_dedicated_lane(v_name, true);
  -- A host that is part of a pattern takes the pattern's settings along: resumed, it must not be without
  -- limits.
  if v_part_of is not null then
    select * into v_settings from orchestrator.destination d where d.name = v_part_of;
    v_settings.name := v_name;
    v_settings.changed_at := v_now;
    perform orchestrator.store_destination(v_settings);
  end if;
  update orchestrator.lane l
  set paused_at = coalesce(l.paused_at, v_now)
    , limited = (select orchestrator.needs_destination_row(d) from orchestrator.destination d where d.name = v_name)
  where l.lane = v_lane
  returning l.paused_at into v_since;

  -- Dispatchers know events that they claimed before the destination had this lane by another lane.
  perform orchestrator.recall_lane(r.lane)
  from unnest(case
    when v_is_pattern or v_part_of is not null then array[null::integer]
    else array[v_lane, (v_hash & 63)::integer] end) as r (lane);
  return query
  select v_name, v_since, d.in_flight, orchestrator.count_waiting(v_name)
    , concat_ws('; '
      , 'no attempt begins until it is resumed; those under way are left alone'
      , case when v_since < v_now then 'it was paused before' end
      , case when v_part_of is not null then format('it was part of %s, and has its settings as its own now', v_part_of)
        end)
  from orchestrator.destinations d
  where d.name = v_name;
end $$;
comment on function orchestrator.pause_destination(text) is
  'Stops attempts to a destination until resume_destination(), through restarts too; dispatchers release what they '
  'hold. '
  'While another session has it locked the pause is noted, or refused for a pattern without a lane';

create or replace function orchestrator.resume_destination(p_name text)
returns table (name text, paused_at timestamptz, resumed boolean, waiting bigint, note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC' as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_name constant text := orchestrator.as_destination(p_name);
  v_locked boolean;
  v_before timestamptz;
  v_breaker text;
begin
  v_locked := orchestrator.await_destination(v_name);
  perform orchestrator.fold_destination(v_name) where v_locked;
  -- The pause of a pattern stays a note while another session has a destination locked that matches it.
  if not v_locked or exists (select from orchestrator.control_note n where n.name = v_name) then
    return query
    select v_name, null::timestamptz, true, orchestrator.count_waiting(v_name)
      , orchestrator.note_destination(v_name, 'resume');
    return;
  end if;
  update orchestrator.lane l
  set paused_at = null
    , last_paused_at = coalesce(l.paused_at, l.last_paused_at)
    , resumed_at = case when l.paused_at is null then l.resumed_at else v_now end
  where l.name = v_name
  returning old.paused_at, l.breaker into v_before, v_breaker;
  if not found then
    return;
  end if;
  perform orchestrator.tell_due(v_now);
  return query
  select v_name, null::timestamptz, v_before is not null, orchestrator.count_waiting(v_name)
    , concat_ws('; '
      , case when v_before is null then 'it was not paused'
          else format('it was paused since %s', to_json(v_before) #>> '{}') end
      , case when v_breaker <> 'closed' then format('its breaker is %s', replace(v_breaker, '_', ' ')) end
      , case when (select c.paused_at from orchestrator.control_now() c) is not null
          then 'everything is paused, and so is it' end);
end $$;
comment on function orchestrator.resume_destination(text) is
  'Ends the pause of a destination; due events go at once, under its limits. No row: there is no such destination';

create or replace function orchestrator.pause_all()
returns table (paused_at timestamptz, in_flight bigint, note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_since timestamptz;
begin
  perform orchestrator.note_control('pause');
  v_since := (select c.paused_at from orchestrator.control_now() c);
  perform orchestrator.recall_lane(null);
  return query
  select v_since, (select count(*) from orchestrator.timer t where t.lease_until > v_now)
    , concat_ws('; '
      , 'no attempt begins anywhere until everything is resumed; those under way are left alone'
      , case when v_since < v_now then 'it was paused before' end);
end $$;
comment on function orchestrator.pause_all() is
  'Stops all attempts until resume_all(), through restarts too. Events are accepted all the same';

create or replace function orchestrator.resume_all()
returns table (paused_at timestamptz, resumed boolean, destinations_paused bigint, breakers_open bigint, note text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC' as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_before constant timestamptz := (select c.paused_at from orchestrator.control_now() c);
begin
  perform orchestrator.note_control('resume');
  perform orchestrator.tell_due(v_now);
  return query
  select s.paused_at, v_before is not null, s.destinations_paused, s.breakers_open
    , concat_ws('; '
      , case when v_before is null then 'it was not paused'
          else format('it was paused since %s', to_json(v_before) #>> '{}') end
      , case when s.destinations_paused > 0 then 'destinations that were paused by themselves still are' end)
  from orchestrator.standstills() s;
end $$;
comment on function orchestrator.resume_all() is
  'Ends the pause of everything. Destinations that were paused by themselves stay paused';
