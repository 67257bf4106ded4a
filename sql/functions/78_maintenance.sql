-- Maintenance: one call from pg_cron, a CronJob or the runtime's own loop. An advisory lock lets one run
-- at a time.

-- One transaction: whoever kills it leaves nothing half done. Each step is a subtransaction: one that
-- fails does not keep the others from their work. One that would have to wait for a lock, with others
-- queueing behind it, is left for the next run. Steps that take locks others wait for come last: that of
-- the horizon, or those to detach a partition.
create or replace function orchestrator.run_maintenance(
  p_days_ahead integer default null, p_retention_days integer default null) returns json
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set lock_timeout = '80 ms'
as $$
declare
  v_began constant timestamptz := clock_timestamp();
  v_now constant timestamptz := orchestrator.now();
  v_step text;
  v_did jsonb := '{}';
  v_problems jsonb := '[]';
  v_count bigint;
  v_waiting bigint;
  v_more boolean := false;
  v_run bigint;
begin
  -- A snapshot from before a lock was acquired would not show what its former holder did.
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    raise exception 'run_maintenance: expected the isolation level read committed, got %'
      , current_setting('transaction_isolation')
      using errcode = 'invalid_transaction_state'
        , hint = format('alter role %I set default_transaction_isolation = ''read committed''', session_user);
  end if;
  if not pg_try_advisory_xact_lock(hashtext('orchestrator.run_maintenance')) then
    return json_build_object('skipped'
      , concat_ws('; ', 'another run_maintenance is at work', orchestrator.holders_text('10 s')));
  end if;

  begin
    perform orchestrator.configure_retention(p_retention_days, p_days_ahead, null, null)
    where num_nonnulls(p_retention_days, p_days_ahead) > 0;
  exception when lock_not_available then
    v_problems := v_problems
      || orchestrator.step_problem('retention_configured', sqlerrm, orchestrator.holders_text());
  end;

  begin
    select a.kept, a.waiting into v_count, v_waiting
    from orchestrator.submit_set_aside(1000) a
    where exists (select from orchestrator.submission_aside);
    v_did := v_did || jsonb_strip_nulls(jsonb_build_object('submissions_kept', v_count));
    if v_waiting > 0 then
      v_problems := v_problems || orchestrator.step_problem('submissions_kept'
        , format('%s records still wait for another session', v_waiting), orchestrator.holders_text());
    end if;
  exception when others then
    v_problems := v_problems || orchestrator.step_problem('submissions_kept', sqlerrm, null);
  end;

  foreach v_step in array array[
    'restore_settled', 'statistics_folded', 'events_expired', 'orderings_advanced', 'timers_moved'
    , 'destinations_forgotten', 'floors_lowered', 'partitions_dropped', 'horizon_moved', 'runs_forgotten'
    , 'requests_forgotten', 'partitions_attached', 'partitions_created', 'partitions_detached']
  loop
    begin
      if v_step <> 'partitions_detached' then
        v_count := orchestrator.run_step(v_step, v_now);
      elsif (v_did ->> 'partitions_created')::integer > 0 then
        v_count := 0;  -- this run has the lock of the horizon already
      else
        select r.detached, v_did || jsonb_build_object('dead_letters_dropped', r.dead_letters) into v_count, v_did
        from orchestrator.retire_partition(v_now) r;
      end if;
      v_did := v_did || jsonb_build_object(v_step, coalesce(v_count, 0));
      -- What a step could only do in part, it says in this setting.
      if current_setting('orchestrator.problem', true) <> '' then
        v_problems := v_problems || orchestrator.step_problem(v_step
          , current_setting('orchestrator.problem'), orchestrator.holders_text());
        perform set_config('orchestrator.problem', '', true);
      end if;
      v_more := v_more or coalesce(v_count >= orchestrator.step_bound(v_step), false);
    exception when others then
      v_did := v_did || jsonb_build_object(v_step, 0);
      v_problems := v_problems || orchestrator.step_problem(v_step, sqlerrm, case when sqlstate = '55P03' then
        -- These need a table for themselves alone: who has only read blocks them, too.
        orchestrator.holders_text('100 ms'
          , case when v_step in ('partitions_dropped', 'partitions_detached') then interval '100 ms' end) end);
    end;
  end loop;

  insert into orchestrator.maintenance_run (started_at, took, did, problems)
  values (v_now, clock_timestamp() - v_began, v_did, v_problems)
  returning run into v_run;
  return (v_did || jsonb_build_object(
      'run', v_run
    , 'took_ms', round(extract(epoch from clock_timestamp() - v_began) * 1000)::integer
    , 'more', v_more
    , 'problems', v_problems))::json;
end $$;
comment on function orchestrator.run_maintenance(integer, integer) is
  'Runs the periodic upkeep, and repairs inconsistencies that should not occur; call it outside of a transaction. '
  'It is bounded: if the answer says more, call it again';

create or replace function orchestrator.run_step(p_step text, p_now timestamptz) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
begin
  return case p_step
    when 'restore_settled' then orchestrator.repair_after_restore()
    when 'statistics_folded' then orchestrator.fold_statistics(p_now)
    when 'events_expired' then orchestrator.expire_events()
    -- finish_events() and the others do this at once: here is a safety net.
    when 'orderings_advanced' then orchestrator.advance_all_orderings()
    -- Before this run gives up lanes, which others see only when it has committed.
    when 'timers_moved' then orchestrator.reroute_remaining()
    when 'destinations_forgotten' then orchestrator.forget_recovered_destinations()
    when 'floors_lowered' then orchestrator.lower_floors()
    when 'partitions_dropped' then orchestrator.drop_partitions(p_now)
    when 'horizon_moved' then orchestrator.move_horizon()
    when 'runs_forgotten' then orchestrator.forget_runs(p_now)
    when 'requests_forgotten' then orchestrator.forget_requests(p_now)
    when 'partitions_attached' then orchestrator.attach_partitions(p_now)
    when 'partitions_created' then orchestrator.prepare_partitions(p_now)
  end;
end $$;
comment on function orchestrator.run_step(text, timestamptz) is
  'Runs one step of run_maintenance(); returns how many rows or partitions it changed';

create or replace function orchestrator.step_bound(p_step text) returns integer
language sql immutable parallel safe
return case p_step
  when 'statistics_folded' then 500000
  when 'events_expired' then 10000
  when 'requests_forgotten' then 100000
  when 'horizon_moved' then 1
  when 'partitions_attached' then 1
  when 'partitions_created' then 1
  when 'partitions_detached' then 1
end;
comment on function orchestrator.step_bound(text) is
  'How many changes of a step of run_maintenance() mean that there may be more to do; null: it does all at once';

create or replace function orchestrator.step_problem(p_step text, p_problem text, p_holders text) returns jsonb
language sql stable parallel safe
return jsonb_build_object('step', p_step, 'problem', concat_ws('; ', p_problem, p_holders));
comment on function orchestrator.step_problem(text, text, text) is
  'An element of maintenance_run.problems; p_holders: which sessions are in the way, or null';

create or replace function orchestrator.forget_runs(p_now timestamptz) returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  with gone as (
    delete from orchestrator.maintenance_run r
    using orchestrator.newest_control() c
    where r.started_at < p_now - make_interval(days => coalesce(c.retention_days, 7))
    returning 1)
  select count(*) from gone
$$;
comment on function orchestrator.forget_runs(timestamptz) is
  'Deletes rows of maintenance_run past retention; returns how many';

create or replace function orchestrator.prepare_partitions(p_now timestamptz) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_control orchestrator.control;
  v_missing date;
  v_overdue date;
  v_orphaned date;
  v_created bigint := 0;
begin
  select * into v_control from orchestrator.newest_control();
  if v_control.partitioned_by = 'maintenance' then
    v_created := orchestrator.create_partitions(
      greatest(p_now::date - 7, orchestrator.first_day_kept(p_now)), p_now::date + v_control.partition_days_ahead);
  end if;
  -- Where pg_partman makes those of event and outcome, this follows.
  for v_missing in
    select d from unnest(orchestrator.partition_days()) d
    where to_regclass('orchestrator.' || orchestrator.partition_name('delivered_batch', d)) is null
  loop
    v_created := v_created + orchestrator.create_partitions(v_missing, v_missing);
  end loop;
  -- If maintenance did not run in time, overdue days of the horizon get their partitions now: their
  -- events are late, not lost.
  select h.scheduled_at::date into v_overdue from orchestrator.horizon h order by h.id limit 1;
  if v_overdue <= p_now::date then
    v_created := v_created + orchestrator.create_partitions(v_overdue, v_overdue);
  end if;
  -- Days that somebody dropped while they had live events: without a place for the outcomes of these
  -- events, claims that come across them would fail.
  for v_orphaned in
    select d::date
    from (select t.scheduled_at from orchestrator.timer t order by t.event_id limit 1) first
    cross join generate_series(
      first.scheduled_at::date, orchestrator.first_day_kept(p_now) - 1, interval '1 day') d
    where exists (select from orchestrator.missing_partitions(d::date, d::date) m where m.parent <> 'event')
      and exists (
        select from orchestrator.timer t
        where t.event_id >= orchestrator.first_id(d::date::timestamptz)
          and t.event_id < orchestrator.first_id((d::date + 1)::timestamptz))
  loop
    v_created := v_created + orchestrator.create_partitions(v_orphaned, v_orphaned);
  end loop;
  perform orchestrator.update_horizon_start();
  perform orchestrator.forget_former_ids();
  return v_created;
end $$;
comment on function orchestrator.prepare_partitions(timestamptz) is
  'Creates the partitions of the days ahead, and missing ones of the last week and of days with live events. '
  'Notes from when on events wait in horizon; returns how many it created';
