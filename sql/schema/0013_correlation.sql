-- What a submission is checked against, and answered with.

create type orchestrator.submitted as (n integer, id uuid, result text, field text, reason text);
comment on type orchestrator.submitted is
  'A staged submission that became no new event: duplicate, or refused with field and reason';

-- The bound that check_submission() tells.
alter table orchestrator.event drop constraint event_expires_at_check;
alter table orchestrator.event add constraint event_expires_at_check
  check (expires_at > scheduled_at and expires_at < '2201-01-01 00:00:00+00') not valid;
alter table orchestrator.horizon drop constraint event_expires_at_check;
alter table orchestrator.horizon add constraint event_expires_at_check
  check (expires_at > scheduled_at and expires_at < '2201-01-01 00:00:00+00') not valid;

drop function if exists orchestrator.settle_horizon();
