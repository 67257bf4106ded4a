-- Events say what they belong to, for whoever follows them through several systems: a correlation id and a
-- trace context. And the table holds the bound of expires_at that check_submission() tells.

alter table orchestrator.event drop constraint event_expires_at_check;
alter table orchestrator.event add constraint event_expires_at_check
  check (expires_at > scheduled_at and expires_at < '2201-01-01 00:00:00+00') not valid;
alter table orchestrator.horizon drop constraint event_expires_at_check;
alter table orchestrator.horizon add constraint event_expires_at_check
  check (expires_at > scheduled_at and expires_at < '2201-01-01 00:00:00+00') not valid;

-- Each of these is a table of its own, although horizon was made like event once.
alter table orchestrator.event
  add column correlation_id text,
  add column traceparent text;
alter table orchestrator.horizon
  add column correlation_id text,
  add column traceparent text;
alter table orchestrator.submission_aside
  add column correlation_id text,
  add column traceparent text;
alter table orchestrator.event
  add constraint event_correlation_id_check check (correlation_id ~ '^[!-~]([ -~]{0,198}[!-~])?$') not valid,
  add constraint event_traceparent_check
    check (traceparent ~ '^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$') not valid;
alter table orchestrator.horizon
  add constraint horizon_correlation_id_check check (correlation_id ~ '^[!-~]([ -~]{0,198}[!-~])?$') not valid,
  add constraint horizon_traceparent_check
    check (traceparent ~ '^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$') not valid;
comment on column orchestrator.event.correlation_id is
  'What the client follows it by, 1 to 200 printable ASCII characters; sent along as X-Correlation-ID; null: none';
comment on column orchestrator.event.traceparent is
  'The span that submitted it, as W3C Trace Context writes it in version 00; sent along as traceparent; null: none';
comment on column orchestrator.horizon.correlation_id is 'event.correlation_id';
comment on column orchestrator.horizon.traceparent is 'event.traceparent';
comment on column orchestrator.submission_aside.correlation_id is 'event.correlation_id';
comment on column orchestrator.submission_aside.traceparent is 'event.traceparent';
