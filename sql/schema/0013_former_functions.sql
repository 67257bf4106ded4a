-- Functions that have another name now, or take or return other rows. functions/ creates what takes their
-- place; a new database has none of these.

drop function if exists orchestrator.floors(orchestrator.control, timestamptz);
drop function if exists orchestrator.floors_hold(orchestrator.control, timestamptz);
drop function if exists orchestrator.lane_limits(integer[], integer[], timestamptz, timestamptz, integer);
drop function if exists orchestrator.caps_left(integer[], integer[], integer[], bigint[]);
drop function if exists orchestrator.take_slots(
  uuid[], timestamptz[], integer[], integer[], integer[], text[], integer[], timestamptz, timestamptz, interval);
drop function if exists orchestrator.waits(
  timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, text);
drop function if exists orchestrator.sort_out(tid[], boolean, boolean, integer[]);
drop function if exists orchestrator.bury(tid[]);
drop function if exists orchestrator.lost_leases_borne();
drop function if exists orchestrator.settle_lanes(integer);
drop function if exists orchestrator.forget_well_destinations();
drop function if exists orchestrator.waiting_for(text);
drop function if exists orchestrator.waits_for(bigint, uuid, timestamptz);
drop function if exists orchestrator.settle_horizon();
drop function if exists orchestrator.schedule_event(
  text, jsonb, timestamptz, text, text, integer, jsonb, text, text, text, integer, interval, timestamptz);
drop function if exists orchestrator.claim_due_events(integer, integer, interval, interval, integer[], integer);
drop function if exists orchestrator.advance_waiting();
drop function if exists orchestrator.make_ready(timestamptz);
drop function if exists orchestrator.still_waiting(
  double precision, double precision, timestamptz, timestamptz, timestamptz);
drop function if exists orchestrator.could_begin(double precision, timestamptz, timestamptz);
drop function if exists orchestrator.lock_most_events(uuid[]);
drop function if exists orchestrator.pairs_kept();
drop function if exists orchestrator.add_statistics(timestamptz[], text[], text[], text[], bigint[]);
drop function if exists orchestrator.next_slot(timestamptz, timestamptz, interval, integer);
drop function if exists orchestrator.is_limited(orchestrator.destination);
drop function if exists orchestrator.lane_open(orchestrator.lane, timestamptz);
