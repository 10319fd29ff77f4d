//! Leases: what quotes hold for some seconds. Bounded per requester, per network prefix and in total.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use kinoflock_protocol::id::LeaseId;
use kinoflock_protocol::refusal::Refusal;

use super::origin::{NetPrefix, Origin};
use crate::config::QueueConfig;
use crate::policy::{Class, Rule, Wanted};

/// Expired leases remembered, so that who comes late hears just that.
const MAX_EXPIRED: usize = 512;

#[derive(Debug, Clone)]
pub(super) struct Lease {
    /// How many were opened before it.
    pub(super) number: u64,
    pub(super) origin: Origin,
    pub(super) wanted: Wanted,
    pub(super) expires: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Leases {
    open: BTreeMap<LeaseId, Lease>,
    /// The newest last.
    expired: VecDeque<LeaseId>,
    secret: [u8; 32],
    made: u64,
}

impl Leases {
    pub(super) fn new(secret: [u8; 32]) -> Self {
        Self { secret, ..Self::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// Opens a lease. When all are taken, the network that holds most gives up its oldest for one that holds fewer, so
    /// that filling the table locks nobody else out.
    pub(super) fn open(
        &mut self,
        origin: Origin,
        wanted: Wanted,
        limits: &QueueConfig,
        now: Instant,
    ) -> Result<LeaseId, Refusal> {
        let of_requester = self.count(|lease| lease.origin.requester == origin.requester);
        if of_requester >= limits.leases_per_requester {
            return Err(Rule::LeasesPerRequester.refuse(limits.leases_per_requester, of_requester + 1));
        }
        let of_prefix = self.of_prefix(&origin.prefix);
        if origin.class == Class::Public && of_prefix >= limits.leases_per_prefix {
            return Err(Rule::LeasesPerPrefix.refuse(limits.leases_per_prefix, of_prefix + 1));
        }
        if self.open.len() >= limits.leases as usize {
            self.make_room(of_prefix)
                .ok_or_else(|| Rule::Leases.refuse(limits.leases, self.open.len() + 1))?;
        }
        let id = self.next_id();
        self.open.insert(id, Lease { number: self.made, origin, wanted, expires: now + limits.lease });
        Ok(id)
    }

    /// Takes the lease that an order uses; it is used up even if the order is refused after.
    pub(super) fn take(
        &mut self,
        id: &LeaseId,
        origin: &Origin,
        wanted: &Wanted,
        now: Instant,
    ) -> Result<(), Refusal> {
        let lease = self.open.get(id).filter(|lease| lease.expires > now);
        let lease = lease.ok_or_else(|| {
            let over = self.open.contains_key(id) || self.expired.contains(id);
            if over { Rule::LeaseExpired } else { Rule::LeaseUnknown }.refuse("an open lease", id)
        })?;
        if lease.origin.requester != origin.requester {
            // Not used up: a stranger who guessed its id must not be able to burn it.
            return Err(Rule::LeaseOther.refuse(lease.origin.requester, origin.requester));
        }
        let lease = self.open.remove(id).expect("invariant: the lease was just found");
        let within = lease.wanted.model == wanted.model
            && wanted.shape.frames <= lease.wanted.shape.frames
            && wanted.shape.width <= lease.wanted.shape.width
            && wanted.shape.height <= lease.wanted.shape.height
            && wanted.shape.steps <= lease.wanted.shape.steps
            && wanted.work <= lease.wanted.work;
        if within { Ok(()) } else { Err(Rule::LeaseShape.refuse(describe(&lease.wanted), describe(wanted))) }
    }

    pub(super) fn release(&mut self, id: &LeaseId) -> bool {
        self.open.remove(id).is_some()
    }

    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.open.values().map(|lease| lease.expires).min()
    }

    /// Removes and gives back what has expired.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<(LeaseId, Origin)> {
        let over: Vec<_> = self
            .open
            .iter()
            .filter(|(_, lease)| lease.expires <= now)
            .map(|(id, lease)| (*id, lease.origin))
            .collect();
        for (id, _) in &over {
            self.open.remove(id);
            self.expired.push_back(*id);
        }
        while self.expired.len() > MAX_EXPIRED {
            self.expired.pop_front();
        }
        over
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&LeaseId, &Lease)> {
        self.open.iter()
    }

    fn make_room(&mut self, of_prefix: u32) -> Option<()> {
        let mut held: BTreeMap<NetPrefix, u32> = BTreeMap::new();
        for lease in self.open.values().filter(|lease| lease.origin.class == Class::Public) {
            *held.entry(lease.origin.prefix).or_default() += 1;
        }
        let (most, count) = held.into_iter().max_by_key(|(_, count)| *count)?;
        if count <= of_prefix + 1 {
            return None;
        }
        let of_most = self.open.iter().filter(|(_, lease)| lease.origin.prefix == most);
        let (id, _) = of_most.min_by_key(|(_, lease)| lease.expires)?;
        let id = *id;
        self.open.remove(&id).map(drop)
    }

    fn of_prefix(&self, prefix: &NetPrefix) -> u32 {
        self.count(|lease| lease.origin.class == Class::Public && lease.origin.prefix == *prefix)
    }

    fn count(&self, of: impl Fn(&Lease) -> bool) -> u32 {
        u32::try_from(self.open.values().filter(|lease| of(lease)).count()).unwrap_or(u32::MAX)
    }

    /// Unguessable without the secret, so that no lease can be used by who did not get it.
    fn next_id(&mut self) -> LeaseId {
        self.made += 1;
        let hash = blake3::keyed_hash(&self.secret, &self.made.to_le_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hash.as_bytes()[..16]);
        LeaseId::from_bytes(id)
    }
}

fn describe(wanted: &Wanted) -> String {
    let shape = &wanted.shape;
    format!(
        "{}x{}, {} frames, {} steps, {} work units with {}",
        shape.width, shape.height, shape.frames, shape.steps, wanted.work.0, wanted.model
    )
}
