-- Plainer words for what \d+ shows, and an end to functions whose names said too little.

-- Functions that have another name now. A new database has none of them.
drop function if exists orchestrator.advance_waiting();
drop function if exists orchestrator.make_ready(timestamptz);
drop function if exists orchestrator.still_waiting(
  double precision, double precision, timestamptz, timestamptz, timestamptz);
drop function if exists orchestrator.could_begin(double precision, timestamptz, timestamptz);
drop function if exists orchestrator.lock_most_events(uuid[]);
drop function if exists orchestrator.pairs_kept();
drop function if exists orchestrator.add_statistics(timestamptz[], text[], text[], text[], bigint[]);
