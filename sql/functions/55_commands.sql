-- Commands from the processing topic, and the redrive of one event. Each command is answered in the outbox.

create or replace function orchestrator.redrive_event(p_event_id uuid)
returns table (event_id uuid, result text, status text)
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
begin
  with gone as (
    delete from orchestrator.dead_letter d where d.event_id = p_event_id returning d.event_id, d.scheduled_at, d.attempts
  ), armed as (
    insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, ordering, attempt, max_attempts)
    select e.id, e.scheduled_at, greatest(e.scheduled_at, v_now), orchestrator.lane_for(d.name), hashtextextended(d.name, 0), coalesce(e.priority, 0), hashtextextended(e.ordering_key, 0)
      , g.attempts, g.attempts + 1 + e.max_retries
    from gone g
    cross join lateral (select * from orchestrator.event e where e.id = g.event_id and e.scheduled_at = g.scheduled_at limit 1) e
    cross join lateral (select orchestrator.destination_name(e.delivery_type, e.destination) as name) d
    returning event_id, scheduled_at, attempt
  ), logged as (
    insert into orchestrator.outcome (event_id, scheduled_at, finished_at, attempt, result)
    select a.event_id, a.scheduled_at, v_now, a.attempt, 'redriven' from armed a
  )
  insert into orchestrator.statistic select date_trunc('minute', v_now), 'redriven', count(*) from armed having count(*) > 0;
  if found then
    perform orchestrator.tell_due(v_now);
    return query select p_event_id, 'redriven', 'retrying';
  else
    return query
    select s.id, 'not_dead', s.status from orchestrator.event e
    cross join lateral (
      select s.id, s.status from orchestrator.event_status s where s.id = e.id and s.scheduled_at = e.scheduled_at limit 1) s
    where e.id = p_event_id and e.scheduled_at >= uuid_extract_timestamp(p_event_id) and e.scheduled_at < uuid_extract_timestamp(p_event_id) + interval '1 ms';
  end if;
end $$;
comment on function orchestrator.redrive_event(uuid) is
  'Has a dead event tried again at once, with as many attempts as it had at first. One row: redriven, or not_dead and the status it has; no row: there is no such event';

create or replace function orchestrator.pass_dead_letter(p_event_id uuid) returns boolean
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_ordering bigint;
begin
  update orchestrator.dead_letter d set blocks = null where d.event_id = p_event_id and d.blocks is not null returning old.blocks into v_ordering;
  perform orchestrator.advance_ordering(array[v_ordering]) where v_ordering is not null;
  return v_ordering is not null;
end $$;
comment on function orchestrator.pass_dead_letter(uuid) is
  'Lets the later events of a dead one''s ordering key go on, which its retry policy (dead_blocks) holds back. False: it held back none';

-- Locks every timer it may change first, in the order of event_id, as cancel_event() and finish_events() do.
-- Memoize off: the planner does not see that what it would remember changes, and a repeated command got the answer of the first.
create or replace function orchestrator.execute_commands(p_topic text, p_commands jsonb) returns integer
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set enable_memoize = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_answered integer;
begin
  perform from orchestrator.timer t
  where t.event_id = any (array(
    select (c ->> 'event_id')::uuid from jsonb_array_elements(p_commands) c where c ? 'event_id' and not c ? 'problem'
    union
    select e.id from jsonb_array_elements(p_commands) c
    join orchestrator.event e on hashtextextended(e.external_job_id, 0) = hashtextextended(c ->> 'external_job_id', 0)
      and e.external_job_id = c ->> 'external_job_id'
    where not c ? 'problem'))
  order by t.event_id
  for update;
  insert into orchestrator.outbox (created_at, kind, key, value)
  select v_now, 'answer', convert_to(coalesce(c.event_id::text, c.external_job_id, c.id, ''), 'UTF8')
    , convert_to(json_build_object('id', c.id, 'command', c.command, 'event_id', c.event_id, 'external_job_id', c.external_job_id
      , 'problem', case
          when c.problem is not null then c.problem
          when a.results is null then jsonb_build_object('field', case when c.event_id is null then 'external_job_id' else 'event_id' end
            , 'reason', 'there is no such event')
        end
      , 'results', coalesce(a.results, '[]'), 'answered_at', v_now
      , 'topic', p_topic, 'partition', c.partition, 'offset', c."offset")::text, 'UTF8')
  from jsonb_array_elements(p_commands) with ordinality as i (item, n)
  cross join lateral jsonb_to_record(i.item) as c (
    partition integer, "offset" bigint, id text, command text, event_id uuid, external_job_id text, problem jsonb)
  cross join lateral (
    select case
      when c.problem is not null then null
      when c.command = 'cancel' then (
        select json_agg(json_build_object('event_id', r.event_id, 'result', r.result, 'status', r.status))
        from orchestrator.cancel_event(c.event_id, c.external_job_id) r)
      when c.command = 'redrive' then (
        select json_agg(json_build_object('event_id', r.event_id, 'result', r.result, 'status', r.status))
        from (select c.event_id as id where c.event_id is not null union all
              select e.id from orchestrator.event e
              where hashtextextended(e.external_job_id, 0) = hashtextextended(c.external_job_id, 0) and e.external_job_id = c.external_job_id) e
        cross join lateral orchestrator.redrive_event(e.id) r)
    end as results) a
  order by i.n;
  get diagnostics v_answered = row_count;
  perform orchestrator.tell_outbox() where v_answered > 0;
  return v_answered;
end $$;
comment on function orchestrator.execute_commands(text, jsonb) is
  'Carries out commands read from p_topic, in order: objects of partition, offset, id, command (cancel or redrive), event_id or external_job_id, or problem with what is wrong with it. Each is answered in the outbox, with a result for each event it names, or with its problem; returns how many';
