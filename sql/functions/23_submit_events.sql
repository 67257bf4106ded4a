-- Submission by arguments: submit_events() for a JSON array, schedule_event() for one event by hand. Both
-- stage what they are given; submit_staged() does the rest.

create or replace function orchestrator.submission_fields() returns text[]
language sql immutable parallel safe
return array[
  'source', 'external_job_id', 'scheduled_at', 'delivery_type', 'destination', 'payload', 'headers', 'max_retries'
, 'retry_policy', 'ordering_key', 'priority', 'spread_seconds', 'expires_at', 'correlation_id', 'traceparent'];
comment on function orchestrator.submission_fields() is
  'The fields that an event may be submitted with, by their names in JSON; see orchestrator/events/fields.py';

create or replace function orchestrator.shown_json(p_value jsonb) returns text
language sql immutable parallel safe
return case jsonb_typeof(p_value)
  when 'object' then 'an object'
  when 'array' then 'an array'
  else left(p_value::text, 20) end;
comment on function orchestrator.shown_json(jsonb) is
  'A JSON value as a message quotes it: short, and no object or array, which may hold secrets';

create or replace function orchestrator.submit_events(p_events jsonb)
returns table (n integer, id uuid, result text, field text, reason text, status text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_nestloop = off as $$
#variable_conflict use_column
declare
  c_expected_time constant text := 'expected an RFC 3339 time with a zone, such as 2030-01-31T08:00:00Z, got ';
begin
  if jsonb_typeof(p_events) is distinct from 'array' then
    raise exception 'p_events: expected a JSON array of events, got %', coalesce(jsonb_typeof(p_events), 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  perform orchestrator.open_staging();
  return query
  with item as materialized (
    select i.n::integer as n, i.event, e.*
      -- Only what the form of the JSON decides, or check_submission() does not look at.
      , case
        when jsonb_typeof(i.event) <> 'object'
          then 'event: expected an object'
        when u.unknown is not null
          then format('%s: unknown field; expected %s', left(u.unknown, 80)
            , array_to_string(orchestrator.submission_fields(), ', '))
        when w.wrong is not null
          then w.wrong
        when e.scheduled_at is null
          then 'scheduled_at: required'
        when e.at is null
          then format('scheduled_at: %s%s', c_expected_time, orchestrator.shown(e.scheduled_at, 50))
        when i.event ->> 'expires_at' is not null and e.expires_at is null
          then format('expires_at: %s%s', c_expected_time, orchestrator.shown(i.event ->> 'expires_at', 50))
        when i.event ->> 'traceparent' is not null and e.traceparent is null
          then format('traceparent: expected a W3C traceparent, such as %s, got %s'
            , '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
            , orchestrator.shown(i.event ->> 'traceparent', 60))
        when e.source is null
          then 'source: required'
        when e.destination is null and e.delivery_type = 'HTTP'
          then 'destination: required'
        when e.delivery_type = 'HTTP' and e.destination ~ '^https?://[^/?#]*@'
          then 'destination: expected no user name or password in the URL: send credentials in headers'
        when e.delivery_type = 'KAFKA' and orchestrator.topic_fault(e.delivery_type, e.destination) is not null
          then 'destination: ' || orchestrator.topic_fault(e.delivery_type, e.destination)
        when e.delivery_type = 'HTTP' and e.destination ~ E'[^\\x01-\\x7f]'
          then 'destination: expected ASCII: write the host in its xn-- form and percent-encode the rest'
        when e.external_job_id in ('.', '..')
          then format('external_job_id: expected a text that can be a part of a path, got %s', e.external_job_id)
        when not i.event ? 'payload'
          then 'payload: required'
        when jsonb_typeof(i.event -> 'max_retries') not in ('number', 'null')
          or not pg_input_is_valid(e.max_retries, 'smallint')
          then format('max_retries: expected 0 to 100, got %s', orchestrator.shown_json(i.event -> 'max_retries'))
        when jsonb_typeof(i.event -> 'priority') not in ('number', 'null')
          or not pg_input_is_valid(i.event ->> 'priority', 'smallint')
          then format('priority: expected -9 to 9, got %s', orchestrator.shown_json(i.event -> 'priority'))
        when jsonb_typeof(i.event -> 'spread_seconds') not in ('number', 'null')
          or (case jsonb_typeof(i.event -> 'spread_seconds')
              when 'number' then (i.event ->> 'spread_seconds')::numeric end) not between 0.000001 and 604800
          then format('spread_seconds: expected more than 0 and at most 604800 seconds, got %s'
            , orchestrator.shown_json(i.event -> 'spread_seconds'))
        else 'headers: ' || orchestrator.check_headers(i.event -> 'headers')
      end as problem
    from jsonb_array_elements(p_events) with ordinality as i (event, n)
    cross join lateral (
      select case jsonb_typeof(i.event) when 'object' then i.event else '{}' end as fields) o
    cross join lateral (
      select o.fields ->> 'source' as source
        , o.fields ->> 'external_job_id' as external_job_id
        , o.fields ->> 'scheduled_at' as scheduled_at
        , orchestrator.as_time(o.fields ->> 'scheduled_at') as at
        , orchestrator.as_time(o.fields ->> 'expires_at') as expires_at
        , coalesce(o.fields ->> 'delivery_type', 'HTTP') as delivery_type
        , o.fields ->> 'destination' as destination
        , o.fields ->> 'max_retries' as max_retries
        , o.fields ->> 'retry_policy' as retry_policy
        , o.fields ->> 'ordering_key' as ordering_key
        , o.fields ->> 'correlation_id' as correlation_id
        , orchestrator.as_traceparent(o.fields ->> 'traceparent') as traceparent) e
    cross join lateral (
      select min(k) as unknown from jsonb_object_keys(o.fields) k where k <> all (orchestrator.submission_fields())) u
    -- All fields are strings but these.
    cross join lateral (
      select min(format('%s: expected a string, got %s', f.key, jsonb_typeof(f.value))) as wrong
      from jsonb_each(o.fields) f
      where f.key <> all ('{payload,headers,max_retries,priority,spread_seconds}')
        and jsonb_typeof(f.value) not in ('string', 'null')) w
  ),
  staged as (
    insert into pg_temp.submission
      (n, id, scheduled_at, source, external_job_id, delivery_type, destination, payload, headers
      , max_retries, retry_policy, ordering_key, priority, spread
      , expires_at, correlation_id, traceparent)
    select i.n
      , coalesce(orchestrator.event_id(i.source, i.external_job_id, i.at, i.ordering_key)
        , orchestrator.random_event_id(i.at, orchestrator.bucket_of_key(i.ordering_key)))
      , i.at, i.source, i.external_job_id, i.delivery_type, i.destination
      , (i.event -> 'payload')::json, nullif(i.event -> 'headers', 'null')::json
      , coalesce(i.max_retries::integer, 3), i.retry_policy, i.ordering_key
      , (i.event ->> 'priority')::smallint
      , make_interval(secs => (i.event ->> 'spread_seconds')::double precision)
      , i.expires_at, coalesce(i.correlation_id, substr(i.traceparent, 4, 32)), i.traceparent
    from item i
    where i.problem is null
  )
  select i.n, null::uuid, 'refused', split_part(i.problem, ': ', 1)
    , substr(i.problem, strpos(i.problem, ': ') + 2), null::text
  from item i
  where i.problem is not null;
  return query
  with staged as materialized (select s.n, s.id from pg_temp.submission s),
  answer as materialized (select * from orchestrator.submit_staged_with_status())
  select s.n, case when a.result is distinct from 'refused' then coalesce(a.id, s.id) end
    , coalesce(a.result, 'accepted'), a.field, a.reason
    , case when a.result is null then 'scheduled' else a.status end
  from staged s
  left join answer a on a.n = s.n
  order by s.n;
end $$;
comment on function orchestrator.submit_events(jsonb) is
  'Submits an array of events with the fields that submission_fields() names; source, scheduled_at, payload and, but '
  'for KAFKA, destination are required. One row each: accepted, duplicate (kept already, with that status now), or '
  'refused with field and reason, which fails no other';

create or replace function orchestrator.schedule_event(
  p_destination text
, p_payload jsonb
, p_scheduled_at timestamptz default orchestrator.now()
, p_source text default 'psql'
, p_external_job_id text default null
, p_max_retries integer default 3
, p_headers jsonb default null
, p_retry_policy text default null
, p_delivery_type text default 'HTTP'
, p_ordering_key text default null
, p_priority integer default null
, p_spread interval default null
, p_expires_at timestamptz default null
, p_correlation_id text default null
, p_traceparent text default null)
returns uuid
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC' as $$
declare
  v_answer record;
begin
  select * into v_answer from orchestrator.submit_events(jsonb_build_array(jsonb_build_object(
    'destination', p_destination
  , 'payload', p_payload
  , 'scheduled_at', p_scheduled_at
  , 'source', p_source
  , 'external_job_id', p_external_job_id
  , 'max_retries', p_max_retries
  , 'headers', p_headers
  , 'retry_policy', p_retry_policy
  , 'delivery_type', p_delivery_type
  , 'ordering_key', p_ordering_key
  , 'priority', p_priority
  , 'spread_seconds', extract(epoch from p_spread)
  , 'expires_at', p_expires_at
  , 'correlation_id', p_correlation_id
  , 'traceparent', p_traceparent)));
  if v_answer.result = 'refused' then
    raise exception '%: %', v_answer.field, v_answer.reason using errcode = 'invalid_parameter_value';
  end if;
  if v_answer.result = 'duplicate' then
    raise notice 'event % is kept already, and is %', v_answer.id, replace(v_answer.status, '_', ' ');
  end if;
  return v_answer.id;
end $$;
comment on function orchestrator.schedule_event(
  text, jsonb, timestamptz, text, text, integer, jsonb, text, text, text, integer, interval, timestamptz, text, text) is
  'Submits one event and returns its id. Submitting the same (source, external_job_id, scheduled_at, ordering_key) '
  'again returns the same id, changes nothing, and says by a notice what state the event is in';
