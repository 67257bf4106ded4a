-- Deliveries: a complete status line decides an attempt.

comment on column orchestrator.outcome.error is 'Why it failed; delivered: what was odd about the rest of the answer';
