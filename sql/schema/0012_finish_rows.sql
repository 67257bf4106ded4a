-- Functions that have another name now.

drop function if exists orchestrator.waiting_for(text);
drop function if exists orchestrator.waits_for(bigint, uuid, timestamptz);
