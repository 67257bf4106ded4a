-- Destinations for people: what is configured, and the present state of each.

drop view if exists orchestrator.destinations;
create view orchestrator.destinations as
select d.name
  , d.configured
  , case
      when l.paused_at is not null or p.paused_at is not null or n.paused_at is not null then 'paused'
      when l.breaker <> 'closed' then 'breaker_' || l.breaker
      when l.held_by is not null then 'held_by_' || l.held_by
      else 'ok'
    end as state
  , d.rate_per_second
  , d.burst
  , d.max_parallel
  , d.adaptive
  , d.timeout
  , d.retry_policy
  , d.signing_secret
  , d.secret_headers
  , d.spread
  , coalesce(d.breaker_failures, 0) as breaker_failures
  , coalesce(d.breaker_ratio, 0) as breaker_ratio
  , d.breaker_minimum
  , d.breaker_window
  , d.breaker_cooldown
  , d.breaker_max_cooldown
  , coalesce(l.paused_at, p.paused_at) as paused_at
  , l.breaker
  , case when l.breaker <> 'closed' then l.opened_at end as opened_at
  , case when l.breaker = 'open' then l.open_until end as next_try_at
  , l.failures
  , l.held_by
  , l.parallel_now
  , (select count(*) from orchestrator.timer t where t.slot = l.lane and t.lease_until > n.now) + w.in_flight
    as in_flight
  , w.due
  , l.lane
  , d.changed_at
from orchestrator.destination d
join orchestrator.lane l on l.name = d.name
left join orchestrator.noted_pauses() p on p.name = d.name
cross join (select orchestrator.now() as now, c.paused_at from orchestrator.control_now() c) n
cross join lateral (
  -- No claim looks further ahead than 10 seconds.
  select count(*) filter (where t.slot is null and t.lease_until > n.now) as in_flight
    , count(*) filter (where t.due_at <= n.now and orchestrator.is_free(t.lease_until, n.now)) as due
  from (
    select t.slot, t.lease_until, t.due_at from orchestrator.timer t
    where t.lane = l.lane and t.due_at <= n.now + interval '10 s'
    limit 10000) t) w;
comment on view orchestrator.destinations is
  'Destinations that are configured, or have a dedicated lane because an attempt failed, with their present state';
comment on column orchestrator.destinations.state is
  'paused, breaker_open, breaker_half_open, held_by_rate, held_by_parallel or ok';
comment on column orchestrator.destinations.breaker_failures is
  'Its breaker opens after this many failures in a row; 0: not by that';
comment on column orchestrator.destinations.breaker_ratio is
  'Its breaker opens when this share of the attempts in breaker_window failed; 0: not by that';
comment on column orchestrator.destinations.paused_at is
  'Since when it is paused by itself; null: it is not';
comment on column orchestrator.destinations.opened_at is
  'Since when its breaker is open; null: it is closed';
comment on column orchestrator.destinations.next_try_at is
  'When an open breaker lets the next try through; null: it is closed, or the try is under way';
comment on column orchestrator.destinations.in_flight is
  'Events that are leased for it';
comment on column orchestrator.destinations.due is
  'Events of its lane that are due and not claimed, counted up to 10,000';
