-- Submits from SQL, asks what became of the events, and cancels one.
--
--   psql "$DATABASE_URL" --set destination=https://example.com/hook --file examples/from_psql.sql
--
-- The user must be a member of orchestrator_ops; of orchestrator_submit is enough to submit and cancel.
\set ON_ERROR_STOP on

-- One event, in the transaction of whatever else is done here: both are kept, or neither is.
begin;
select orchestrator.schedule_event(
    p_destination => :'destination'
  , p_payload => '{"order": 17}'
  , p_scheduled_at => now() + interval '1 hour'
  , p_source => 'examples'
  , p_external_job_id => 'order-17/reminder') as reminder
\gset
commit;

-- Many events in one call, a row for each: the second is refused, which does not fail the first.
select n, result, field, reason
from orchestrator.submit_events(jsonb_build_array(
    jsonb_build_object(
        'source', 'examples', 'external_job_id', 'order-18/reminder', 'scheduled_at', now() + interval '2 hours'
      , 'destination', :'destination', 'payload', '{"order": 18}'::jsonb)
  , jsonb_build_object(
        'source', 'examples', 'scheduled_at', 'tomorrow', 'destination', :'destination', 'payload', null)));

select external_job_id, status
from orchestrator.event_status
where source = 'examples'
order by external_job_id;

-- Either it is cancelled and no attempt follows, or the result says why not.
select result, status
from orchestrator.cancel_event(:'reminder');
