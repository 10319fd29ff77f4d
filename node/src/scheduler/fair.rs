//! Who is next: own jobs, then collectives, with a share kept for the public, and fairness by work within each.
//!
//! Within a class this is start-time fair queueing (Goyal, Vin, Cheng 1996) on two levels: groups (network prefixes in
//! the public, keys elsewhere), then requesters in a group. Each flow carries the virtual time up to which it was
//! served; the flow that is furthest behind is next, and a job advances its flow by its work when it starts. A flow
//! that was idle starts at the virtual time at which its job came: it neither saves up service nor owes any. So a
//! newcomer waits for the jobs that run, not for anybody's queue, however many keys that queue was filled with.
//!
//! Virtual time goes on with the work that starts, divided among those who wait (as in WF2Q+; Bennett, Zhang 1996).
//! Were it to stand still while newcomers start, each of them would overtake everybody's second job, and where
//! newcomers keep coming that job would wait for ever.
//!
//! The public's share is a credit: every start of another class while the public waits earns it
//! `work * share / (100 - share)`, and once the credit covers the public's next job, that job goes first.

use std::collections::{BTreeMap, BTreeSet};

use kinoflock_protocol::id::{JobId, RequesterId};

use super::origin::{GroupKey, Origin};
use super::plan::Candidate;
use crate::policy::Class;

/// Most flows remembered that have nothing waiting; beyond it the ones served least are forgotten, to no harm.
const MAX_IDLE_FLOWS: usize = 4_096;

const CLASSES: [Class; 3] = [Class::Own, Class::Collective, Class::Public];

/// Virtual times: what of the past matters for who is next.
#[derive(Debug, Clone, Default)]
pub(super) struct Fairness {
    classes: BTreeMap<Class, Flows<GroupKey, Flows<RequesterId, ()>>>,
    /// Scaled by 100, so that shares of small work are not rounded away.
    public_credit: u128,
    public_share: u8,
}

/// The virtual times at which a job came: of its class and of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Came {
    group: u64,
    member: u64,
}

/// Who waits while a job starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaitingFlows {
    /// Groups of the job's class.
    pub(super) groups: usize,
    /// Requesters of its group.
    pub(super) members: usize,
    /// Whether a job of the public does.
    pub(super) public: bool,
}

/// Flows of one level. `served` of a flow may be absent while it is not ahead of `now` and has nothing waiting.
#[derive(Debug, Clone)]
struct Flows<K, V> {
    now: u64,
    served: BTreeMap<K, (u64, V)>,
}

impl<K: Ord, V> Default for Flows<K, V> {
    fn default() -> Self {
        Self { now: 0, served: BTreeMap::new() }
    }
}

impl<K: Ord + Copy, V: Default> Flows<K, V> {
    /// The virtual time at which a flow's next job would start, which came at `came`.
    fn tag(&self, key: &K, came: u64) -> u64 {
        self.served.get(key).map_or(came, |(served, _)| (*served).max(came))
    }

    /// A flow's job starts while so many flows have others waiting. Who comes now is served before the flow's next one.
    fn charge(&mut self, key: K, came: u64, work: u64, waiting: usize) {
        let tag = self.tag(&key, came);
        let shared = work / (waiting.max(1) as u64 + 1);
        self.now = self.now.saturating_add(shared).max(tag);
        self.served.entry(key).or_default().0 = tag.saturating_add(work);
    }

    fn refund(&mut self, key: &K, work: u64) {
        if let Some((served, _)) = self.served.get_mut(key) {
            *served = served.saturating_sub(work);
        }
    }

    fn forget_idle(&mut self, waiting: impl Fn(&K) -> bool) {
        let now = self.now;
        self.served.retain(|key, (served, _)| *served > now || waiting(key));
        while self.served.len() > MAX_IDLE_FLOWS {
            let least =
                self.served.iter().filter(|(key, _)| !waiting(key)).min_by_key(|(_, (served, _))| *served);
            let Some(key) = least.map(|(key, _)| *key) else { break };
            self.served.remove(&key);
        }
    }
}

impl Fairness {
    pub(super) fn new(public_share: u8) -> Self {
        Self { public_share: public_share.min(100), ..Self::default() }
    }

    /// The virtual times for a job that comes now.
    pub(super) fn present(&self, origin: &Origin) -> Came {
        let Some(groups) = self.classes.get(&origin.class) else { return Came::default() };
        let member = groups.served.get(&origin.group()).map_or(0, |(_, members)| members.now);
        Came { group: groups.now, member }
    }

    /// A job of `work` that came then starts while others wait.
    pub(super) fn charge(&mut self, origin: &Origin, came: Came, work: u64, waiting: WaitingFlows) {
        let groups = self.classes.entry(origin.class).or_default();
        groups.charge(origin.group(), came.group, work, waiting.groups);
        if let Some((_, members)) = groups.served.get_mut(&origin.group()) {
            members.charge(origin.requester, came.member, work, waiting.members);
        }
        let public_waits = waiting.public;
        match origin.class {
            Class::Public => self.public_credit = self.public_credit.saturating_sub(self.due_at(work)),
            _ if public_waits => self.public_credit += u128::from(work) * u128::from(self.public_share),
            _ => {}
        }
        if !public_waits {
            self.public_credit = 0;
        }
    }

    /// `work` of a started job was not done after all.
    pub(super) fn refund(&mut self, origin: &Origin, work: u64) {
        let Some(groups) = self.classes.get_mut(&origin.class) else { return };
        groups.refund(&origin.group(), work);
        if let Some((_, members)) = groups.served.get_mut(&origin.group()) {
            members.refund(&origin.requester, work);
        }
    }

    /// Forgets flows that owe nothing and have nothing waiting.
    pub(super) fn forget_idle(&mut self, waiting: &BTreeSet<(Class, GroupKey)>) {
        for (class, groups) in &mut self.classes {
            groups.forget_idle(|key| waiting.contains(&(*class, *key)));
            for (_, members) in groups.served.values_mut() {
                members.forget_idle(|_| false);
            }
        }
    }

    fn public_is_due(&self, work: u64) -> bool {
        self.public_share > 0 && self.public_credit >= self.due_at(work)
    }

    /// The credit that a job of the public costs: none when all is the public's.
    fn due_at(&self, work: u64) -> u128 {
        u128::from(work) * u128::from(100 - self.public_share)
    }
}

/// A waiting job as the picker sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) job: JobId,
    pub(super) origin: Origin,
    pub(super) seq: u64,
    pub(super) work: u64,
    pub(super) came: Came,
    pub(super) candidate: Candidate,
}

/// Waiting jobs in the order in which fairness would start them, given what came before.
pub(super) struct Picker {
    fairness: Fairness,
    classes: BTreeMap<Class, Line>,
}

/// The waiting groups of a class, by who is next.
#[derive(Default)]
struct Line {
    order: BTreeSet<(u64, u64, GroupKey)>,
    places: BTreeMap<GroupKey, (u64, u64)>,
    groups: BTreeMap<GroupKey, GroupLine>,
}

#[derive(Default)]
struct GroupLine {
    order: BTreeSet<(u64, u64, RequesterId)>,
    places: BTreeMap<RequesterId, (u64, u64)>,
    jobs: BTreeMap<RequesterId, BTreeMap<u64, Waiting>>,
}

impl Picker {
    pub(super) fn new(fairness: &Fairness, waiting: impl Iterator<Item = Waiting>) -> Self {
        let mut classes: BTreeMap<Class, Line> = BTreeMap::new();
        for job in waiting {
            let group =
                classes.entry(job.origin.class).or_default().groups.entry(job.origin.group()).or_default();
            group.jobs.entry(job.origin.requester).or_default().insert(job.seq, job);
        }
        let mut picker = Self { fairness: fairness.clone(), classes };
        for class in CLASSES {
            let groups: Vec<_> = picker
                .classes
                .get(&class)
                .map(|line| line.groups.keys().copied().collect())
                .unwrap_or_default();
            for group in groups {
                let members: Vec<_> = picker.classes[&class].groups[&group].jobs.keys().copied().collect();
                for member in members {
                    picker.place_member(class, group, member);
                }
                picker.place_group(class, group);
            }
        }
        picker
    }

    /// The job that is next, without taking it.
    pub(super) fn peek(&self) -> Option<Waiting> {
        let head = |class: Class| self.classes.get(&class).and_then(Line::head);
        let public = head(Class::Public);
        if let Some(job) = public.filter(|job| self.fairness.public_is_due(job.work)) {
            return Some(job);
        }
        head(Class::Own).or_else(|| head(Class::Collective)).or(public)
    }

    /// The oldest job of the same group as `head` that satisfies `wanted`.
    pub(super) fn in_group_of(&self, head: &Waiting, wanted: impl Fn(&Waiting) -> bool) -> Option<Waiting> {
        let group = self.classes.get(&head.origin.class)?.groups.get(&head.origin.group())?;
        group
            .jobs
            .values()
            .flat_map(BTreeMap::values)
            .filter(|job| wanted(job))
            .min_by_key(|job| job.seq)
            .copied()
    }

    /// Starts a job: takes it out and charges its flows.
    pub(super) fn start(&mut self, job: &Waiting) {
        let (class, key, member) = (job.origin.class, job.origin.group(), job.origin.requester);
        // The old places must be left before the virtual times move, for they are found by them.
        self.leave(class, key, member);
        let line = self.classes.entry(class).or_default();
        if let Some(group) = line.groups.get_mut(&key) {
            if let Some(jobs) = group.jobs.get_mut(&member) {
                jobs.remove(&job.seq);
                if jobs.is_empty() {
                    group.jobs.remove(&member);
                }
            }
            if group.jobs.is_empty() {
                line.groups.remove(&key);
            }
        }
        let line = self.classes.get(&class);
        let waiting = WaitingFlows {
            groups: line.map_or(0, |line| line.groups.len()),
            members: line.and_then(|line| line.groups.get(&key)).map_or(0, |group| group.jobs.len()),
            public: self.classes.get(&Class::Public).is_some_and(|line| !line.groups.is_empty()),
        };
        self.fairness.charge(&job.origin, job.came, job.work, waiting);
        self.place_member(class, key, member);
        self.place_group(class, key);
    }

    fn leave(&mut self, class: Class, key: GroupKey, member: RequesterId) {
        let Some(line) = self.classes.get_mut(&class) else { return };
        if let Some((tag, seq)) = line.places.remove(&key) {
            line.order.remove(&(tag, seq, key));
        }
        let Some(group) = line.groups.get_mut(&key) else { return };
        if let Some((tag, seq)) = group.places.remove(&member) {
            group.order.remove(&(tag, seq, member));
        }
    }

    fn place_member(&mut self, class: Class, key: GroupKey, member: RequesterId) {
        let flows = self.fairness.classes.get(&class).and_then(|groups| groups.served.get(&key));
        let group = self.classes.get_mut(&class).and_then(|line| line.groups.get_mut(&key));
        let Some(group) = group else { return };
        if let Some(job) = group.jobs.get(&member).and_then(|jobs| jobs.values().next().copied()) {
            let came = job.came.member;
            let (tag, seq) = (flows.map_or(came, |(_, members)| members.tag(&member, came)), job.seq);
            group.order.insert((tag, seq, member));
            group.places.insert(member, (tag, seq));
        }
    }

    fn place_group(&mut self, class: Class, key: GroupKey) {
        let flows = self.fairness.classes.get(&class);
        let Some(line) = self.classes.get_mut(&class) else { return };
        if let Some(job) = line.groups.get(&key).and_then(GroupLine::head) {
            let came = job.came.group;
            let (tag, seq) = (flows.map_or(came, |groups| groups.tag(&key, came)), job.seq);
            line.order.insert((tag, seq, key));
            line.places.insert(key, (tag, seq));
        }
    }
}

impl Line {
    fn head(&self) -> Option<Waiting> {
        let (_, _, group) = self.order.first()?;
        self.groups.get(group)?.head()
    }
}

impl GroupLine {
    fn head(&self) -> Option<Waiting> {
        let (_, _, member) = self.order.first()?;
        self.jobs.get(member)?.values().next().copied()
    }
}
