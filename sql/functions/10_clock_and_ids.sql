-- The clock and the event id. Used by every other function; event_id() has a twin in
-- orchestrator/events/ids.py.

create or replace function orchestrator.now() returns timestamptz
language sql volatile parallel safe
return coalesce(nullif(current_setting('orchestrator.now', true), '')::timestamptz, clock_timestamp());
comment on function orchestrator.now() is
  'The only clock. Tests set it for their session: set orchestrator.now = ''2030-01-01T00:00:00Z''';

-- Invariant: what is submitted again has the same id, everywhere. The lengths keep ('ab','c') apart from
-- ('a','bc'). One expression, so that the planner inlines it. p_copy: see reschedule_event().
create or replace function orchestrator.event_id(
  p_source text, p_external_job_id text, p_scheduled_at timestamptz, p_ordering_key text default null
, p_copy integer default 0)
returns uuid
language sql immutable parallel safe
return encode(set_bit(set_bit(
    substr(int8send((extract(epoch from p_scheduled_at) * 1000000)::bigint / 1000), 3)
    || decode('7'
      || left(encode(sha256(convert_to(coalesce(p_ordering_key, p_external_job_id), 'UTF8')), 'hex'), 3), 'hex')
    || substr(sha256(convert_to(case when p_copy > 0 then format('r%s:', p_copy) else '' end
      || case when p_ordering_key is null
           then format('%s:%s:'
               , (extract(epoch from p_scheduled_at) * 1000000)::bigint, octet_length(p_source))
             || p_source || p_external_job_id
           else format('k%s:%s:%s:'
               , (extract(epoch from p_scheduled_at) * 1000000)::bigint, octet_length(p_source)
               , octet_length(p_external_job_id))
             || p_source || p_external_job_id || p_ordering_key
         end, 'UTF8')), 3, 8), 71, 1), 70, 0), 'hex')::uuid;
comment on function orchestrator.event_id(text, text, timestamptz, text, integer) is
  'The id of (source, external_job_id, scheduled_at, ordering_key), null without one of the first three. A UUID, laid '
  'out as version 7 (RFC 9562): milliseconds of scheduled_at, 12 bits of its bucket, 62 of a SHA-256 over all four';

comment on column orchestrator.event.id is
  'event_id() of it; random_event_id() without an external_job_id. It is the idempotency key';

create or replace function orchestrator.random_event_id(p_scheduled_at timestamptz, p_bucket integer default null)
returns uuid
language sql volatile parallel safe
return encode(substr(int8send((extract(epoch from p_scheduled_at) * 1000000)::bigint / 1000), 3)
  || decode('7' || coalesce(lpad(to_hex(p_bucket), 3, '0'), right(gen_random_uuid()::text, 3)), 'hex')
  || substr(uuid_send(gen_random_uuid()), 9), 'hex')::uuid;
comment on function orchestrator.random_event_id(timestamptz, integer) is
  'The id of an event that has no external_job_id, in a bucket from 0 to 4095, by default a random one';

create or replace function orchestrator.bucket_of_key(p_key text) returns integer
language sql immutable strict parallel safe
return ('x' || left(encode(sha256(convert_to(p_key, 'UTF8')), 'hex'), 3))::bit(12)::integer;
comment on function orchestrator.bucket_of_key(text) is
  'The bucket, 0 to 4095, of the events of an ordering_key, or of an external_job_id without one: the first 12 bits of '
  'its SHA-256';

create or replace function orchestrator.bucket(p_id uuid) returns integer
language sql immutable strict parallel safe
return ('x' || substr(p_id::text, 16, 3))::bit(12)::integer;
comment on function orchestrator.bucket(uuid) is
  'The bucket that an event id holds, 0 to 4095: bucket_of_key() of its ordering_key, else of its external_job_id, '
  'else random';

create or replace function orchestrator.spread_shift(p_id uuid, p_spread interval) returns interval
language sql immutable strict parallel safe
return p_spread * (('x' || right(p_id::text, 8))::bit(32)::bigint / 4294967296.0::double precision);
comment on function orchestrator.spread_shift(uuid, interval) is
  'How much of a spread an event is shifted by: a share from 0 to just under 1 that its id decides. '
  'The same event is always shifted alike';

-- Ids begin with the millisecond of scheduled_at, so a range of time is a range of any index by id.
create or replace function orchestrator.first_id(p_at timestamptz) returns uuid
language sql immutable strict parallel safe
return encode(substr(int8send(greatest(0, least(
    (extract(epoch from greatest(p_at, '1970-01-01 00:00:00+00')) * 1000)::bigint, 281474976710655))), 3)
  || '\x00000000000000000000', 'hex')::uuid;
comment on function orchestrator.first_id(timestamptz) is
  'No event scheduled for then, or later, has an id below this one; all of earlier milliseconds have';
