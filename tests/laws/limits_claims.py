"""What claims may give under limits, and what they must give: each claim is compared with the model.

What a claim may not give is checked on each claim; what it must give, on each claim that came to its end.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta

from tests.laws.limits_model import Breaker, Event, Limits
from tests.support.sql_client import Client, Lease, seconds

LEASE_S = 30
GRAIN = timedelta(microseconds=20)
"""Rounding: times of slots are whole microseconds, the gaps between slots are not."""
AHEAD = timedelta(milliseconds=50)
"""How long before its due time an event that takes a slot may be claimed."""
MANY = 200


class ClaimChecks:
    """For a state machine that keeps these fields."""

    client: Client
    now: datetime
    stepped_back: bool
    events: dict[str, Event]
    limits: dict[str, Limits]
    breakers: defaultdict[int, Breaker]

    # What the model knows

    def destination_of(self, host: str) -> str | None:
        """The configured destination that a host belongs to: itself, else the longest pattern, else the first."""
        if host in self.limits:
            return host
        patterns = [name for name in self.limits if "*" in name and fnmatch.fnmatchcase(host, name)]
        return min(patterns, key=lambda name: (-len(name.replace("*", "")), name), default=None)

    def live(self) -> list[Event]:
        return [each for each in self.events.values() if not each.end]

    def held_back(self, event: Event) -> bool:
        """Whether another event of its ordering key must go first."""
        return event.key is not None and any(
            (other.end is None and (other.rank < event.rank or other.held(self.now))) or other.blocks
            for other in self.events.values()
            if other.key == event.key and other is not event
        )

    def _lanes_of(self, ids: Iterable[str]) -> dict[str, int]:
        return {
            str(uid): lane
            for uid, lane in self.client.rows(
                "select event_id, lane from orchestrator.timer where event_id = any (%s::uuid[])", list(ids)
            )
        }

    def _dedicated_lanes(self) -> list[tuple[str, int, bool]]:
        rows = self.client.rows(
            "select l.name, l.lane, d.configured from orchestrator.lane l join orchestrator.destination d using (name)"
        )
        return [(name, lane, configured) for name, lane, configured in rows]

    def _under_way(self, lane: int) -> int:
        return sum(each.held(self.now) for each in self.live() if each.bound_lane == lane)

    # Claims

    def _claim(self, batch: int, lookahead_s: float, worker: int, max_parallel: int | None) -> list[Lease]:
        until = self.now + seconds(lookahead_s)
        leases: list[Lease] = []
        for _ in range(MANY):
            lanes = self._lanes_of(each.id for each in self.live())
            due = {each.id: each.due_at for each in self.live()}
            given = self.client.claim(
                batch - len(leases), worker=worker, lease_s=LEASE_S, lookahead_s=lookahead_s, max_parallel=max_parallel
            )
            again_at = self.client.claim_again_at()
            self._note_what_claims_moved()
            self._may_be_given(given, until, max_parallel)
            stayed = {each.id: lanes[each.id] for each in self.live() if each.due_at == due[each.id]}
            self._higher_go_first(given, stayed)
            leases += given
            if len(leases) >= batch or again_at is None or again_at > self.now:
                break
        else:
            raise AssertionError(f"claims do not come to an end: the last one said {again_at}")
        if len(leases) < batch:
            self._nothing_more_can_be_given(until, max_parallel, again_at)
        return leases

    def _note_what_claims_moved(self) -> None:
        """Claims delay events older than the spread of their destination, and end events that lost too many leases."""
        kept = {str(uid): due_at for uid, due_at in self.client.rows("select event_id, due_at from orchestrator.timer")}
        for event in self.live():
            if event.id not in kept:
                assert event.lost_too_often
                event.end, event.lease_until = "dead", None
                event.blocks = event.key is not None and event.blocking
            elif kept[event.id] != event.due_at:
                spread_s = self._spread_s(event)
                assert event.attempt == 0
                assert spread_s
                assert event.due_at < kept[event.id] == event.shifted(spread_s)
                event.due_at = kept[event.id]

    def _spread_s(self, event: Event) -> float | None:
        """The spread that its destination gives it."""
        destination = self.destination_of(event.host)
        return self.limits[destination].spread_s if destination and not event.spread_s else None

    def _may_be_given(self, leases: list[Lease], until: datetime, max_parallel: int | None) -> None:
        by_lane: defaultdict[int, list[Lease]] = defaultdict(list)
        for lease in leases:
            event = self.events[lease.event_id]
            assert not event.end
            assert not event.held(self.now)
            assert not event.lost_too_often
            assert not self.held_back(event), f"{event} is not the first of its key"
            assert lease.due_at == event.due_at <= until
            if (spread_s := self._spread_s(event)) and event.attempt == 0:
                assert lease.due_at >= event.shifted(spread_s)
            by_lane[lease.lane].append(lease)
            event.attempt += 1
            event.lease_until = lease.lease_until
            event.bound_lane = None
            assert lease.attempt == event.attempt
            assert lease.due_at <= lease.start_at <= max(until, lease.due_at) + AHEAD
            assert lease.lease_until >= max(until, lease.start_at) + seconds(LEASE_S) - GRAIN
            destination = self.destination_of(event.host)
            if destination is None:
                assert lease.start_at == lease.due_at
            else:
                limits = self.limits[destination]
                assert lease.lane == limits.lane, f"{event.host} belongs to {destination}"
                assert not limits.paused
                assert limits.rate or lease.start_at == lease.due_at, f"{lease} of {destination}: {limits}"
                assert lease.lease_until >= lease.start_at + seconds((limits.timeout_s or 0) + 5), (
                    f"{lease} of {limits}"
                )
            if not self.stepped_back:
                late_ms = (max(lease.start_at, self.now) - lease.due_at) / timedelta(milliseconds=1)
                assert all(0 < waited_ms <= late_ms + 1 for waited_ms in (lease.waited or {}).values())
        names = {lane: name for name, lane, _ in self._dedicated_lanes()}
        for lane, given in by_lane.items():
            if lane < 64:
                continue
            self._breaker_may_give(lane, given)
            limits = self.limits.get(names[lane], Limits(lane))
            if limits.rate:
                self._rate_may_give(limits, given)
            bound = limits.bound(max_parallel)
            if bound:
                for lease in given:
                    self.events[lease.event_id].bound_lane = lane
                assert self._under_way(lane) <= bound

    def _higher_go_first(self, leases: list[Lease], lanes: dict[str, int]) -> None:
        """Among due events that a dedicated lane held before the claim, those left have no higher priority."""
        left = [
            each
            for each in self.live()
            if each.due_at <= self.now and not each.held(self.now) and not each.lost_too_often and each.key is None
        ]
        for lease in leases:
            lowest = self.events[lease.event_id].priority
            for each in left:
                if lanes.get(each.id) == lease.lane > 63 and self._belongs(each, lease.lane):
                    assert each.priority <= lowest, f"{each} was left when {lease} was given"

    def _belongs(self, event: Event, lane: int) -> bool:
        destination = self.destination_of(event.host)
        return destination is not None and self.limits[destination].lane == lane

    def _breaker_may_give(self, lane: int, given: list[Lease]) -> None:
        breaker = self.breakers[lane]
        if breaker.state != "closed":
            assert breaker.lets_through(self.now)
            assert len(given) == 1
            breaker.state, breaker.tried_at, breaker.open_until = "half_open", self.now, given[0].lease_until

    def _rate_may_give(self, limits: Limits, given: list[Lease]) -> None:
        """GCRA: no slot sooner than the arrival time less the burst, so that no window holds too many."""
        for start in sorted(max(lease.start_at, self.now) for lease in given):
            assert start >= limits.next_start(self.now) - GRAIN
            limits.take(start, self.now)
        limits.slots.sort()
        for n, last in enumerate(limits.slots):
            count = sum(last - seconds(10) < at for at in limits.slots[: n + 1])
            assert count <= (limits.rate or 0) * 10 + limits.burst + 1e-3

    def _nothing_more_can_be_given(self, until: datetime, max_parallel: int | None, again_at: datetime | None) -> None:
        dedicated = {name: lane for name, lane, _ in self._dedicated_lanes()}
        lost = {each.key for each in self.live() if each.lease_until is not None and not each.held(self.now)}
        lanes = self._lanes_of(each.id for each in self.live())
        for event in self.live():
            if event.due_at > until or event.held(self.now) or event.lost_too_often or self.held_back(event):
                continue
            if event.key in lost - {None}:
                continue  # the first of the key is let in when a claim visits the event whose lease ran out
            destination = self.destination_of(event.host)
            lane = self.limits[destination].lane if destination else dedicated.get(event.host)
            limits = self.limits[destination] if destination else Limits(lane or 0)
            if limits.paused or (lane and self.breakers[lane].state != "closed"):
                continue
            if lanes[event.id] > 63 and lanes[event.id] != lane:
                continue  # it belongs elsewhere: it moves as the limits of its lane allow, or by maintenance
            bound = limits.bound(max_parallel) if lane else None
            if bound and self._under_way(lane or 0) >= bound:
                continue
            if (bound or limits.rate) and event.due_at > self.now + AHEAD:
                assert again_at is not None
                assert again_at <= event.due_at
                continue
            assert limits.rate, f"{event} was not given"
            ends = min(until, self.now + AHEAD) if bound else until
            assert limits.next_start(self.now) > ends - GRAIN, f"{event} could have had a slot"
            assert again_at is not None
