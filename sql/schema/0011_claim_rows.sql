-- The rows that the steps of a claim hand to each other, and the former names of those steps.

-- These have other names, or take rows, since; a new database has none of them. floors() is made again by functions/.
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
