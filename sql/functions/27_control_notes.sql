-- What holds for all claims: the row of control, and notes of changes to it. Whoever changes it waits for
-- nobody: the change is noted, and carried over at once, unless another session has locked the row. It holds
-- from the note on. Pauses, resumes and closed breakers of a destination are noted in the same way.

-- Inlined. Floors are raised once a second, which leaves a former version of the row each time, and none of
-- them can be removed while another session holds an old snapshot. The planner knows of one row, and would
-- read all versions: callers that are called often turn enable_seqscan off.
create or replace function orchestrator.newest_control() returns setof orchestrator.control
language sql stable rows 1 as $$
  select c.* from orchestrator.control c order by c.floors_at desc limit 1
$$;
comment on function orchestrator.newest_control() is
  'The row of control, found without reading its former versions. Changes that are only noted are not in it';

create or replace function orchestrator.with_notes(
  p_control orchestrator.control, p_notes orchestrator.control_note[])
returns orchestrator.control
language plpgsql stable
set search_path = orchestrator, pg_temp as $$
declare
  v_note orchestrator.control_note;
begin
  foreach v_note in array p_notes loop
    case v_note.kind
      when 'pause' then
        p_control.paused_at := coalesce(p_control.paused_at, v_note.noted_at);
      when 'resume' then
        if p_control.paused_at is not null then
          p_control.resumed_at := v_note.noted_at;
        end if;
        p_control.last_paused_at := coalesce(p_control.paused_at, p_control.last_paused_at);
        p_control.paused_at := null;
      when 'reroute' then
        -- Transactions that have read the former lanes have begun by now.
        p_control.rerouted_by := greatest(p_control.rerouted_by, pg_snapshot_xmax(pg_current_snapshot()));
        p_control.rerouted_writers := null;
      when 'priorities' then
        p_control.priorities := array(
          select distinct p from unnest(p_control.priorities || v_note.priorities) p order by p desc);
    end case;
  end loop;
  return p_control;
end $$;
comment on function orchestrator.with_notes(orchestrator.control, orchestrator.control_note[]) is
  'The row of control with notes carried over, in their order';

create or replace function orchestrator.control_now() returns setof orchestrator.control
language sql stable security definer rows 1
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  select w.*
  from orchestrator.newest_control() c
  cross join lateral orchestrator.with_notes(c, array(
    select n from orchestrator.control_note n where n.name is null order by n.note)) w
$$;
comment on function orchestrator.control_now() is
  'The row of control as it holds, including changes that are only noted so far';

create or replace function orchestrator.note_control(p_kind text, p_priorities smallint[] default null) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  insert into orchestrator.control_note (noted_at, kind, priorities)
  select orchestrator.now(), p_kind, p_priorities
  where p_kind <> 'priorities'
    or not exists (select from orchestrator.control_now() c where c.priorities @> p_priorities);
  perform orchestrator.fold_control();
end $$;
comment on function orchestrator.note_control(text, smallint[]) is
  'Notes pause, resume, reroute or priorities, which holds from then on. '
  'Carries it over at once, unless another session has locked the row of control';

-- Never waits. Only the session that has locked the row of control deletes its notes.
create or replace function orchestrator.fold_control() returns boolean
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_control orchestrator.control;
  v_notes orchestrator.control_note[];
begin
  select * into v_control from orchestrator.control for update skip locked;
  if not found then
    return false;
  end if;
  with gone as (
    delete from orchestrator.control_note n where n.name is null returning n
  )
  select array_agg(g.n order by (g.n).note) into v_notes from gone g;
  if v_notes is not null then
    v_control := orchestrator.with_notes(v_control, v_notes);
    update orchestrator.control
    set paused_at = v_control.paused_at
      , last_paused_at = v_control.last_paused_at
      , resumed_at = v_control.resumed_at
      , rerouted_by = v_control.rerouted_by
      , rerouted_writers = v_control.rerouted_writers
      , priorities = v_control.priorities;
  end if;
  return true;
end $$;
comment on function orchestrator.fold_control() is
  'Carries notes over to the row of control, and keeps it locked. False: another session has locked it';

-- Never waits.
create or replace function orchestrator.try_destination(p_name text) returns boolean
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  if not pg_try_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(p_name)) then
    return false;
  end if;
  perform from orchestrator.destination d where d.name = p_name for update skip locked;
  if not found and exists (select from orchestrator.destination d where d.name = p_name) then
    return false;
  end if;
  perform from orchestrator.lane l where l.name = p_name for update skip locked;
  return found or not exists (select from orchestrator.lane l where l.name = p_name);
end $$;
comment on function orchestrator.try_destination(text) is
  'Locks a destination, whether it exists or not, and its lane. '
  'False: another session has locked it, or is making or deleting it';

-- Claims and finishes keep a lane locked for milliseconds.
create or replace function orchestrator.await_destination(p_name text) returns boolean
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_began constant timestamptz := clock_timestamp();
  v_patience constant text := current_setting('lock_timeout');
begin
  if not orchestrator.try_destination(p_name) then
    perform set_config('lock_timeout', '100ms', true);
    perform pg_advisory_xact_lock(hashtext('orchestrator.destination'), hashtext(p_name));
    perform from orchestrator.destination d where d.name = p_name for update;
    perform from orchestrator.lane l where l.name = p_name for update;
    perform set_config('lock_timeout', v_patience, true);
  end if;
  return true;
exception when lock_not_available or query_canceled then
  perform orchestrator.pass_on_cancel(sqlstate, sqlerrm, v_began + '100 ms');
  return false;
end $$;
comment on function orchestrator.await_destination(text) is 'try_destination() that waits up to 100 ms for each lock';

create or replace function orchestrator.note_destination(p_name text, p_kind text) returns text
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  insert into orchestrator.control_note (noted_at, kind, name) values (orchestrator.now(), p_kind, p_name);
  return concat_ws(': '
  , 'another session''s open transaction holds the destination', orchestrator.holders_text('0 s'));
end $$;
comment on function orchestrator.note_destination(text, text) is
  'Notes pause, resume or close_breaker of a destination that another session has locked. Returns which session';

create or replace function orchestrator.noted_pauses()
returns table (name text, paused_at timestamptz, lane integer, destination bigint)
language sql stable security definer
set search_path = orchestrator, pg_temp as $$
  select n.name, n.noted_at, l.lane
    , case when not orchestrator.is_pattern(n.name) then hashtextextended(n.name, 0) end
  from (
    select distinct on (n.name) n.* from orchestrator.control_note n
    where n.name is not null and n.kind in ('pause', 'resume')
    order by n.name, n.note desc) n
  left join orchestrator.lane l on l.name = n.name
  where n.kind = 'pause'
$$;
comment on function orchestrator.noted_pauses() is
  'Destinations that only a note pauses. The dedicated lane is null where there is none, the hash for a pattern';

-- The caller has locked the destination by try_destination() or await_destination(). The functions called
-- here call this one again, which finds no notes any more.
create or replace function orchestrator.fold_destination(p_name text) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_kinds text[];
  v_kind text;
begin
  with gone as (
    delete from orchestrator.control_note n where n.name = p_name returning n.note, n.kind
  )
  select array_agg(g.kind order by g.note) into v_kinds from gone g;
  if v_kinds is null then
    return;
  end if;
  perform set_config('orchestrator.folding', 'on', true);
  foreach v_kind in array v_kinds loop
    case v_kind
      when 'pause' then perform orchestrator.pause_destination(p_name);
      when 'resume' then perform orchestrator.resume_destination(p_name);
      else perform orchestrator.close_breaker(p_name);
    end case;
  end loop;
  perform set_config('orchestrator.folding', '', true);
end $$;
comment on function orchestrator.fold_destination(text) is
  'Carries the notes about a destination over, if there are any, in their order';

-- Never waits. Called by claims and by maintenance while there are notes.
create or replace function orchestrator.fold_notes() returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  perform orchestrator.fold_control();
  perform orchestrator.fold_destination(n.name)
  from (select distinct n.name from orchestrator.control_note n where n.name is not null order by 1) n
  where orchestrator.try_destination(n.name);
end $$;
comment on function orchestrator.fold_notes() is
  'Carries over all notes whose rows no other session has locked';
