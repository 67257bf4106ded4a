-- The rows that the steps of a claim hand to each other, and the former names of those steps.

-- These have other names, or take rows, since; a new database has none of them. floors() is made again by
-- functions/.
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

create type orchestrator.queue as
( lane integer
, priority smallint
, floor timestamptz
, until timestamptz
, cap integer
);
comment on type orchestrator.queue is 'A lane from which a claim takes timers, at the priority that comes next there';
comment on column orchestrator.queue.lane is 'lane.lane';
comment on column orchestrator.queue.priority is 'timer.priority of the timers to take';
comment on column orchestrator.queue.floor is 'No timer of the lane is due earlier';
comment on column orchestrator.queue.until is 'Timers due later are left';
comment on column orchestrator.queue.cap is 'How many timers the lane may still give; null: any number';

create type orchestrator.lane_limit as
( lane integer
, allowed integer
, kind text
, bounded boolean
);
comment on type orchestrator.lane_limit is 'What a claim may take from a lane that it has locked';
comment on column orchestrator.lane_limit.lane is 'lane.lane';
comment on column orchestrator.lane_limit.allowed is 'How many leases the claim may give; null: any number';
comment on column orchestrator.lane_limit.kind is 'The limit that decides: rate or parallel; null: none does';
comment on column orchestrator.lane_limit.bounded is 'Whether each lease takes one of max_parallel slots';

create type orchestrator.leased as
( event_id uuid
, scheduled_at timestamptz
, due_at timestamptz
, attempt smallint
, lane integer
, start_at timestamptz
, lease_until timestamptz
, options json
, waited json
);
comment on type orchestrator.leased is 'A lease that a claim has given; see claim_due_events()';
comment on column orchestrator.leased.event_id is 'event.id';
comment on column orchestrator.leased.scheduled_at is 'event.scheduled_at: finds the partition';
comment on column orchestrator.leased.due_at is 'When the attempt was due';
comment on column orchestrator.leased.attempt is 'timer.attempt: names the lease';
comment on column orchestrator.leased.lane is 'The lane that the timer was in';
comment on column orchestrator.leased.start_at is 'When the attempt may start: due_at, or later under a rate';
comment on column orchestrator.leased.lease_until is 'When the lease runs out';
comment on column orchestrator.leased.options is
  'What a dispatcher must know to deliver it, see book_slots(); null: nothing special';
comment on column orchestrator.leased.waited is
  'Why it begins late, see wait_causes(); null: it does not, or nothing held it back';
