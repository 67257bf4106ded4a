-- Commands from the processing topic. Each command is answered in the outbox.

-- A command is an object of partition, offset, id, command (cancel, redrive or reschedule), event_id or
-- external_job_id, scheduled_at and expires_at (reschedule), or problem: what the caller found wrong
-- with it. Its answer has a result for each event that it names, or the problem.
--
-- Locks every timer it may change first, in the order of event_id, as cancel_event() and finish_events()
-- do. Memoize off: the planner does not see that what it would remember changes; a repeated command
-- would get the answer of the first.
create or replace function orchestrator.execute_commands(p_topic text, p_commands jsonb) returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_memoize = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_answered integer;
begin
  perform from orchestrator.timer t
  where t.event_id = any (array(
    select (c ->> 'event_id')::uuid
    from jsonb_array_elements(p_commands) c
    where c ? 'event_id' and not c ? 'problem'
    union
    select e.id
    from jsonb_array_elements(p_commands) c
    cross join lateral (
      select e.id from orchestrator.event e
      where hashtextextended(e.external_job_id, 0) = hashtextextended(c ->> 'external_job_id', 0)
        and e.external_job_id = c ->> 'external_job_id'
      offset 0) e
    where not c ? 'problem'))
  order by t.event_id
  for update;
  insert into orchestrator.outbox (created_at, kind, key, value)
  select v_now, 'answer', convert_to(coalesce(c.event_id::text, c.external_job_id, c.id, ''), 'UTF8')
    , convert_to(json_build_object(
        'id', c.id, 'command', c.command, 'event_id', c.event_id, 'external_job_id', c.external_job_id
      , 'problem', case
          when c.problem is not null then c.problem
          when a.results is null then jsonb_build_object(
            'field', case when c.event_id is null then 'external_job_id' else 'event_id' end
            , 'reason', 'there is no such event')
        end
      , 'results', coalesce(a.results, '[]'), 'answered_at', v_now
      , 'topic', p_topic, 'partition', c.partition, 'offset', c."offset")::text, 'UTF8')
  from jsonb_array_elements(p_commands) with ordinality as i (item, n)
  cross join lateral jsonb_to_record(i.item) as c (
    partition integer, "offset" bigint, id text, command text, event_id uuid, external_job_id text,
    scheduled_at timestamptz, expires_at timestamptz, problem jsonb)
  -- Each command is carried out here, in order; null: it names no event.
  cross join lateral (
    select case
      when c.problem is not null then null
      when c.command = 'cancel' then (
        select json_agg(json_build_object('event_id', r.event_id, 'result', r.result, 'status', r.status))
        from orchestrator.cancel_event(c.event_id, c.external_job_id) r)
      when c.command = 'redrive' then (
        select json_agg(json_build_object('event_id', r.event_id, 'result', r.result, 'status', r.status))
        from (
          select c.event_id as id where c.event_id is not null
          union all
          select e.id from orchestrator.event e
          where hashtextextended(e.external_job_id, 0) = hashtextextended(c.external_job_id, 0)
            and e.external_job_id = c.external_job_id) e
        cross join lateral orchestrator.redrive_event(e.id) r)
      when c.command = 'reschedule' then (
        select json_agg(json_build_object(
            'event_id', r.event_id, 'result', r.result, 'status', r.status
          , 'successor', r.successor, 'field', r.field, 'reason', r.reason))
        from orchestrator.reschedule_event(c.event_id, c.scheduled_at, c.external_job_id, c.expires_at) r)
    end as results) a
  order by i.n;
  get diagnostics v_answered = row_count;
  perform orchestrator.tell_outbox() where v_answered > 0;
  return v_answered;
end $$;
comment on function orchestrator.execute_commands(text, jsonb) is
  'Carries out commands read from p_topic, in order, and writes an answer to each into the outbox; returns how many. '
  'A command that has a problem is answered with it';
