-- Maintenance: one call from pg_cron, a CronJob or the runtime's own loop; one at a time, by advisory lock.

-- One transaction: whoever kills it leaves nothing half done. Each step is a subtransaction: one that fails does not keep the others from
-- their work, and one that would have to wait, with others behind it, is left for the next time. What others would wait for comes last: the lock of the horizon, or else those to detach a partition.
create or replace function orchestrator.run_maintenance(p_days_ahead integer default null, p_retention_days integer default null) returns json
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set lock_timeout = '80 ms' as $$
declare
  v_began constant timestamptz := clock_timestamp();
  v_now constant timestamptz := orchestrator.now();
  v_step text;
  v_did jsonb := '{}';
  v_problems jsonb := '[]';
  v_count bigint;
  v_waiting bigint;
  v_retired record;
  v_more boolean := false;
  v_run bigint;
begin
  -- A snapshot of before a lock was had would not show what those did that had it.
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    raise exception 'run_maintenance: expected the isolation level read committed, got %', current_setting('transaction_isolation')
      using errcode = 'invalid_transaction_state', hint = format('alter role %I set default_transaction_isolation = ''read committed''', session_user);
  end if;
  if not pg_try_advisory_xact_lock(hashtext('orchestrator.run_maintenance')) then
    return json_build_object('skipped', concat_ws('; ', 'another run_maintenance is at work', orchestrator.holders_text('10 s')));
  end if;
  begin
    perform orchestrator.configure_retention(p_retention_days, p_days_ahead, null, null) where num_nonnulls(p_retention_days, p_days_ahead) > 0;
  exception when lock_not_available then
    v_problems := v_problems || jsonb_build_object('step', 'retention_configured', 'problem', concat_ws('; ', sqlerrm, orchestrator.holders_text()));
  end;
  begin
    select a.kept, a.waiting into v_count, v_waiting from orchestrator.keep_aside(1000) a where exists (select from orchestrator.submission_aside);
    v_did := v_did || jsonb_strip_nulls(jsonb_build_object('submissions_kept', v_count));
    if v_waiting > 0 then
      v_problems := v_problems || jsonb_build_object('step', 'submissions_kept', 'problem', concat_ws('; ', format('%s records still wait for another session', v_waiting), orchestrator.holders_text()));
    end if;
  exception when others then
    v_problems := v_problems || jsonb_build_object('step', 'submissions_kept', 'problem', sqlerrm);
  end;
  foreach v_step in array array[
    'restore_settled', 'statistics_folded', 'events_expired', 'orderings_advanced', 'timers_moved', 'destinations_forgotten', 'floors_lowered', 'partitions_dropped', 'horizon_moved'
  , 'runs_forgotten', 'requests_forgotten', 'partitions_attached', 'partitions_created', 'partitions_detached']
  loop
    begin
      v_count := case v_step
        when 'restore_settled' then orchestrator.settle_restored()
        when 'statistics_folded' then orchestrator.fold_statistics(v_now)
        when 'events_expired' then orchestrator.expire_events()
        -- A net below finish_events() and the others, which do this at once.
        when 'orderings_advanced' then orchestrator.advance_waiting()
        -- Before lanes are given up here, which others see only when this has committed.
        when 'timers_moved' then orchestrator.settle_lanes()
        when 'destinations_forgotten' then orchestrator.forget_well_destinations()
        when 'floors_lowered' then orchestrator.lower_floors()
        when 'partitions_dropped' then orchestrator.drop_partitions(v_now)
        when 'horizon_moved' then orchestrator.move_horizon()
        when 'runs_forgotten' then orchestrator.forget_runs(v_now)
        when 'requests_forgotten' then orchestrator.forget_requests(v_now)
        when 'partitions_attached' then orchestrator.attach_partitions(v_now)
        when 'partitions_created' then orchestrator.make_ready(v_now)
      end;
      if v_step = 'partitions_detached' then
        v_count := 0;
        if not (v_did ->> 'partitions_created')::integer > 0 then
          select * into v_retired from orchestrator.retire_partition(v_now);
          v_count := v_retired.detached;
          v_did := v_did || jsonb_build_object('dead_letters_dropped', v_retired.dead_letters);
        end if;
      end if;
      v_did := v_did || jsonb_build_object(v_step, coalesce(v_count, 0));
      if current_setting('orchestrator.problem', true) <> '' then
        v_problems := v_problems || jsonb_build_object('step', v_step, 'problem', concat_ws('; ', current_setting('orchestrator.problem'), orchestrator.holders_text()));
        perform set_config('orchestrator.problem', '', true);
      end if;
      v_more := v_more or v_step = 'horizon_moved' and v_count > 0 or v_step = 'statistics_folded' and v_count >= 500000 or v_step = 'events_expired' and v_count >= 10000
        or v_step = 'requests_forgotten' and v_count >= 100000
        or v_step in ('partitions_attached', 'partitions_created', 'partitions_detached') and v_count > 0;
    exception when others then
      v_did := v_did || jsonb_build_object(v_step, 0);
      v_problems := v_problems || jsonb_build_object('step', v_step
        , 'problem', concat_ws('; ', sqlerrm, case when sqlstate = '55P03' then orchestrator.holders_text('100 ms'
          -- These take a table for themselves alone: who has only read is in their way, too.
          , case when v_step in ('partitions_dropped', 'partitions_detached') then interval '100 ms' end) end));
    end;
  end loop;
  insert into orchestrator.maintenance_run (started_at, took, did, problems)
  values (v_now, clock_timestamp() - v_began, v_did, v_problems)
  returning run into v_run;
  return (jsonb_build_object('run', v_run, 'took_ms', round(extract(epoch from clock_timestamp() - v_began) * 1000)::integer, 'more', v_more, 'problems', v_problems) || v_did)::json;
end $$;
comment on function orchestrator.run_maintenance(integer, integer) is
  'Does what is to be done once a minute: folds statistics, ends what has expired, drops, moves, makes and retires partitions, and mends what should not need it. Safe at any time, from anywhere; call it outside of a transaction. Bounded: when it says more, call it again. p_days_ahead and p_retention_days are kept as configure_retention() does. Says what it did, as table maintenance_run does';

create or replace function orchestrator.forget_runs(p_now timestamptz) returns bigint
language sql security definer set search_path = orchestrator, pg_temp as $$
  with gone as (delete from orchestrator.maintenance_run r using orchestrator.control c where r.started_at < p_now - make_interval(days => coalesce(c.retention_days, 7)) returning 1)
  select count(*) from gone
$$;
comment on function orchestrator.forget_runs(timestamptz) is 'Deletes rows of maintenance_run past retention; returns how many';

-- Days of the horizon that were overslept get their partitions too: their events are late, not lost.
create or replace function orchestrator.make_ready(p_now timestamptz) returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC'
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_control orchestrator.control;
  v_overslept date;
  v_orphaned date;
  v_created bigint := 0;
begin
  select * into v_control from orchestrator.control;
  if v_control.partitioned_by = 'maintenance' then
    v_created := orchestrator.create_partitions(greatest(p_now::date - 7, orchestrator.first_day_kept(p_now)), p_now::date + v_control.partition_days_ahead);
  end if;
  select h.scheduled_at::date into v_overslept from orchestrator.horizon h order by h.id limit 1;
  if v_overslept <= p_now::date then
    v_created := v_created + orchestrator.create_partitions(v_overslept, v_overslept);
  end if;
  -- What somebody dropped with live events: their ends need a place, or claims that come across them would fail.
  for v_orphaned in
    select d::date
    from (select t.scheduled_at from orchestrator.timer t order by t.event_id limit 1) first
    cross join generate_series(first.scheduled_at::date, orchestrator.first_day_kept(p_now) - 1, interval '1 day') d
    where to_regclass('orchestrator.' || orchestrator.partition_name('outcome', d::date)) is null
      and exists (select from orchestrator.timer t where t.event_id >= orchestrator.first_id(d::date::timestamptz) and t.event_id < orchestrator.first_id((d::date + 1)::timestamptz))
  loop
    v_created := v_created + orchestrator.create_partitions(v_orphaned, v_orphaned);
  end loop;
  perform orchestrator.update_horizon_start();
  perform orchestrator.forget_former_ids();
  return v_created;
end $$;
comment on function orchestrator.make_ready(timestamptz) is
  'Makes the partitions of the last week, as far as it is kept, and of the days ahead; says from when on events wait in horizon. Returns how many it made';
