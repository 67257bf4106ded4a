-- A timer that was never leased is eight bytes narrower without a number of leases.

alter table orchestrator.timer alter column attempt drop not null;
comment on column orchestrator.timer.attempt is
  'Leases given so far; null: none. It only grows, and is the fencing number: a result with any other number changes '
  'nothing';

-- New events mostly have the greatest ids. So a page of the index is split at its end: the left one stays
-- full, and hardly anything of the right one has to be logged.
alter index orchestrator.timer_pkey set (fillfactor = 100);

-- A claim passes the timers that have ended since the floor once, when it looks for the first one, and not
-- again when it picks.
alter type orchestrator.queue add attribute first_due timestamptz;
comment on column orchestrator.queue.first_due is
  'When the first timer was due as the claim began; null: not known, since timers may have moved';
