-- What a submission may hold. Used by submit_events(), schedule_event(), and for what COPY clients staged.

create or replace function orchestrator.shown(p_text text, p_most integer) returns text
language sql immutable parallel safe
return case
  when p_text is null then 'null'
  when p_text like '%://%' then left(split_part(p_text, '://', 1), 40) || '://…'
  when p_text ~ '[@?]' then format('%s characters', length(p_text))
  else left(p_text, p_most) end;
comment on function orchestrator.shown(text, integer) is
  'A text as a message quotes it: short, and without what may be a password or a token in a URL';

-- Set-returning and without settings of its own, so that the planner inlines it. No other function checks
-- these rules.
create or replace function orchestrator.check_submission(
  p_scheduled_at timestamptz, p_source text, p_external_job_id text, p_delivery_type text, p_destination text
, p_headers json, p_max_retries integer, p_retry_policy text, p_ordering_key text, p_priority smallint
, p_spread interval, p_expires_at timestamptz, p_correlation_id text, p_traceparent text
, p_first_at timestamptz, p_end_at timestamptz, p_days_ahead integer)
returns table (field text, reason text)
language sql stable parallel safe as $$
  select split_part(problem, ': ', 1), substr(problem, strpos(problem, ': ') + 2)
  from (values (case
    when p_scheduled_at < p_first_at
      then format('scheduled_at: %s is before the first day kept; send %s or later'
        , to_json(p_scheduled_at) #>> '{}', to_json(p_first_at) #>> '{}')
    when p_scheduled_at >= p_end_at
      then format('scheduled_at: %s is more than %s days ahead (MAX_SCHEDULE_AHEAD_DAYS); send a time before %s'
        , to_json(p_scheduled_at) #>> '{}', p_days_ahead, to_json(p_end_at) #>> '{}')
    when length(p_source) not between 1 and 200
      then format('source: expected 1 to 200 characters, got %s', length(p_source))
    when length(p_external_job_id) not between 1 and 200
      then format('external_job_id: expected 1 to 200 characters or null, got %s', length(p_external_job_id))
    when p_delivery_type not in ('HTTP', 'KAFKA')
      then format('delivery_type: expected HTTP or KAFKA, got %s', orchestrator.shown(p_delivery_type, 40))
    when p_delivery_type = 'HTTP'
      and (p_destination is null or length(p_destination) > 2048 or p_destination !~ '^https?://[^/]')
      then format('destination: expected an http:// or https:// URL of at most 2048 characters, got %s'
        , orchestrator.shown(p_destination, 100))
    when p_delivery_type = 'HTTP' and p_destination ~ '^https?://[^/?#]*@'
      then 'destination: expected no user name or password in the URL: send credentials in headers'
    when p_delivery_type = 'KAFKA' and p_destination !~ '^(?![.]{1,2}$)[A-Za-z0-9._-]{1,249}$'
      then format('destination: expected a topic of 1 to 249 letters, digits, dots, underscores and hyphens, or none, '
        'got %s', orchestrator.shown(p_destination, 100))
    when json_typeof(p_headers) <> 'object'
      then 'headers: expected an object of strings'
    when p_max_retries not between 0 and 100
      then format('max_retries: expected 0 to 100, got %s', p_max_retries)
    when not exists (select from orchestrator.retry_policy r where r.name = p_retry_policy)
      and p_retry_policy is not null
      then format('retry_policy: there is no policy named %s; see table orchestrator.retry_policy'
        , orchestrator.shown(p_retry_policy, 63))
    when length(p_ordering_key) not between 1 and 200
      then format('ordering_key: expected 1 to 200 characters or null, got %s', length(p_ordering_key))
    when p_priority not between -9 and 9
      then format('priority: expected -9 to 9, got %s', p_priority)
    when p_spread <= '0 s' or p_spread > '7 days'
      then format('spread_seconds: expected more than 0 and at most 604800 seconds, got %s'
        , extract(epoch from p_spread)::double precision)
    when p_expires_at >= '2201-01-01 00:00:00+00'
      then format('expires_at: expected a time from 1970 to 2200, got %s', to_json(p_expires_at) #>> '{}')
    when p_expires_at <= p_scheduled_at
      then format('expires_at: expected a time after scheduled_at %s, got %s'
        , to_json(p_scheduled_at) #>> '{}', to_json(p_expires_at) #>> '{}')
    when p_correlation_id !~ '^[!-~]([ -~]{0,198}[!-~])?$'
      then format('correlation_id: expected 1 to 200 printable ASCII characters, no space at either end, or null, '
        'got %s', orchestrator.shown(p_correlation_id, 40))
    when p_traceparent is distinct from orchestrator.as_traceparent(p_traceparent)
      then format('traceparent: expected a W3C traceparent of version 00, or null, got %s'
        , orchestrator.shown(p_traceparent, 60))
  end)) as checked (problem)
$$;
comment on function orchestrator.check_submission(
  timestamptz, text, text, text, text, json, integer, text, text, smallint, interval, timestamptz, text, text
, timestamptz, timestamptz, integer) is
  'The first rule that a submission breaks: field and reason; both null when it breaks none';

-- The rule of orchestrator/events/headers.py; a dispatcher must be able to send whatever passes.
create or replace function orchestrator.check_headers(p_headers jsonb) returns text
language sql immutable parallel safe as $$
  select case
    when jsonb_typeof(p_headers) not in ('object', 'null')
      then format('expected an object of strings, got %s', jsonb_typeof(p_headers))
    when count(*) > 20
      then format('expected at most 20 headers, got %s', count(*))
    when count(distinct lower(h.key collate "pg_c_utf8")) < count(*)
      then 'expected each header once: names differ in more than case'
    else min(case
      when jsonb_typeof(h.value) <> 'string'
        then format('expected a string for %s, got %s', left(split_part(h.key, ':', 1), 80), jsonb_typeof(h.value))
      when h.key !~ '^[A-Za-z0-9!#$%&''*+.^_`|~-]{1,100}$'
        then format('expected a header name of 1 to 100 token characters, got %s', left(split_part(h.key, ':', 1), 80))
      when lower(h.key collate "C") ~ '^(orchestrator|proxy|webhook)-'
        or lower(h.key collate "C") = any (array[
          'connection', 'content-encoding', 'content-length', 'content-type', 'expect', 'host', 'http2-settings'
        , 'keep-alive', 'te', 'trailer', 'transfer-encoding', 'upgrade', 'user-agent'])
        then format('expected no %s header: it is set on delivery', left(h.key, 80))
      when length(h.value #>> '{}') > 4096 or h.value #>> '{}' ~ E'[\\x01-\\x08\\x0a-\\x1f\\x7f]'
        then format('expected at most 4096 characters, none of them control, in %s', left(h.key, 80))
    end)
  end
  from jsonb_each(case jsonb_typeof(p_headers) when 'object' then p_headers else '{}' end) h
$$;
comment on function orchestrator.check_headers(jsonb) is
  'Why these cannot be the headers of an event; null: they can';

-- Reads what msgspec reads, and as it does: any number of digits, rounded by the seventh. PostgreSQL's own
-- reading is wider, and rounds otherwise.
create or replace function orchestrator.as_time(p_text text) returns timestamptz
language sql stable strict parallel safe as $$
  select case when pg_input_is_valid(m[1], 'date') then
    ((m[1] || ' ' || m[2] || coalesce(m[3], ''))::timestamp at time zone 'UTC')
    + (round(('0.' || rpad(left(coalesce(m[4], ''), 7), 7, '0'))::numeric, 6) * 1000000)::integer
      * interval '1 microsecond'
    - coalesce((m[5] || m[6] || ':' || coalesce(m[7], '00'))::interval, '0 s') end
  from regexp_match(p_text, '^([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]'
    '((?:[01][0-9]|2[0-3]):[0-5][0-9])(?:(:[0-5][0-9])(?:[.]([0-9]+))?)?'
    '(?:[Zz]|([+-])([01][0-9]|2[0-3])(?::?([0-5][0-9]))?)$') m
$$;
comment on function orchestrator.as_time(text) is
  'The time that an RFC 3339 text with a zone names, rounded to the microsecond; null: it is none. '
  'Takes the texts that the API, the command line and Kafka take';

-- W3C Trace Context, 3.2: of a version to come only the first four parts count, and are passed on as version
-- 00.
create or replace function orchestrator.as_traceparent(p_text text) returns text
language sql immutable strict parallel safe
return case
  when p_text ~ '^(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-|$)'
    then '00' || substr(p_text, 3, 53) end;
comment on function orchestrator.as_traceparent(text) is
  'A W3C traceparent in version 00; null: it is none. Takes the texts that the API, the command line and Kafka take';
