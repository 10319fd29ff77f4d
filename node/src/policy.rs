//! What this node is willing to do: the operator's limits, lists and quotas, and the optional veto hook.
//!
//! - [`Policy::check`] is pure: facts of a job ([`Ask`]) and what its requester already uses here ([`Usage`]) in,
//!   `Ok` or a [`Refusal`] that names the rule, its limit and the given value out.
//! - It never sees a prompt: [`Ask`] has no field for one. Only a hook that the operator configured with
//!   `policy.hook_sees_prompt` does, and then [`Policy::content_rules`] is true and the advert says so.
//! - Own keys are bound by sizes and models (what the machine can do), not by lists and quotas (whom it serves).
//!
//! For the glue: build with [`Policy::new`], call [`Policy::resolve_models`] whenever the model store changes, classify
//! with [`Policy::class_of`], give the value to the scheduler (which calls `check` at quote and order), and run
//! [`hook::run`] between `ValidJob` and `handle_order` when [`Policy::hook`] is set.

use std::collections::BTreeSet;

use kinoflock_protocol::id::{CollectiveId, ModelId, RequesterId};

pub use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::work::{JobShape, Work};

pub use self::rule::{Rule, rule_of};
use crate::config::{HookConfig, Limits, PolicyConfig, Serve};
use crate::memory::DeviceSet;

pub mod hook;
mod rule;

/// Work units (10^6 FLOP) in one TFLOP, which the configuration speaks.
const UNITS_PER_TFLOP: u64 = 1_000_000;

/// In whose favour a job runs. The order is the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The operator's own keys.
    Own,
    /// Members of the operator's collectives.
    Collective,
    /// Everybody else.
    Public,
}

/// What is asked for, without prompt or inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The model.
    pub model: ModelId,
    /// Frames, size, steps, guidance.
    pub shape: JobShape,
    /// What it costs, as everybody computes it.
    pub work: Work,
    /// Devices here whose memory it does not fit.
    pub unfit: DeviceSet,
}

/// Who asks for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// The artist's key.
    pub requester: RequesterId,
    /// From [`Policy::class_of`].
    pub class: Class,
    /// The clip.
    pub wanted: Wanted,
}

/// What a requester uses here already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Jobs waiting or running.
    pub live_jobs: u32,
    /// Work admitted in the last 24 hours, work units.
    pub work_today: u64,
    /// Bytes of clips not yet acknowledged.
    pub unacknowledged: u64,
}

/// The operator's rules, checked configuration in, decisions out.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    rules: PolicyConfig,
    serve: Serve,
    models: Option<BTreeSet<ModelId>>,
}

impl Class {
    /// Its name in metrics and in refusals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Collective => "collective",
            Self::Public => "public",
        }
    }
}

impl Policy {
    /// The rules of a configuration. Until [`resolve_models`](Self::resolve_models), named models are not served.
    #[must_use]
    pub fn new(rules: PolicyConfig, serve: Serve) -> Self {
        let models = (!rules.models.is_empty()).then(BTreeSet::new);
        Self { rules, serve, models }
    }

    /// Finds the ids of the models named in `policy.models`; gives back the names that `find` does not know.
    pub fn resolve_models(&mut self, find: impl Fn(&str) -> Option<ModelId>) -> Vec<String> {
        if self.rules.models.is_empty() {
            return Vec::new();
        }
        let mut unknown = Vec::new();
        let mut known = BTreeSet::new();
        for name in &self.rules.models {
            match find(name).or_else(|| name.parse().ok()) {
                Some(id) => {
                    known.insert(id);
                }
                None => unknown.push(name.clone()),
            }
        }
        self.models = Some(known);
        unknown
    }

    /// Whose job this is; `member_of` is the collective whose membership proof was verified, if any.
    #[must_use]
    pub fn class_of(&self, requester: &RequesterId, member_of: Option<&CollectiveId>) -> Class {
        if self.serve.own_keys.contains(requester) {
            Class::Own
        } else if member_of.is_some_and(|collective| self.serve.collectives.contains(collective)) {
            Class::Collective
        } else {
            Class::Public
        }
    }

    /// Whether the model is on the operator's list.
    #[must_use]
    pub fn serves_model(&self, model: &ModelId) -> bool {
        self.models.as_ref().is_none_or(|models| models.contains(model))
    }

    /// Whether a rule of this node looks at prompts, which its advert must say.
    #[must_use]
    pub fn content_rules(&self) -> bool {
        self.rules.hook.as_ref().is_some_and(|hook| hook.sees_prompt)
    }

    /// The operator's veto command.
    #[must_use]
    pub const fn hook(&self) -> Option<&HookConfig> {
        self.rules.hook.as_ref()
    }

    /// Percent of the work kept for the public; none when the public is not served.
    #[must_use]
    pub const fn public_share(&self) -> u8 {
        if self.serve.public { self.serve.public_share } else { 0 }
    }

    /// The largest clip that the operator wants made here.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.rules.limits
    }

    /// Applies every rule.
    ///
    /// # Errors
    /// The first rule that refuses.
    pub fn check(&self, ask: &Ask, usage: &Usage) -> Result<(), Refusal> {
        if ask.class != Class::Own {
            self.check_requester(ask)?;
        }
        self.check_wanted(&ask.wanted)?;
        if ask.class == Class::Own { Ok(()) } else { self.check_quota(ask, usage) }
    }

    /// The refusal of a requester whom the operator does not serve at all.
    #[must_use]
    pub fn denies(&self, requester: &RequesterId) -> Option<Refusal> {
        self.rules
            .deny
            .contains(requester)
            .then(|| Rule::RequesterDenied.refuse("keys that are not listed", requester))
    }

    fn check_requester(&self, ask: &Ask) -> Result<(), Refusal> {
        if self.rules.deny.contains(&ask.requester) {
            return Err(Rule::RequesterDenied.refuse("keys that are not on the list", ask.requester));
        }
        if !self.rules.allow.is_empty() && !self.rules.allow.contains(&ask.requester) {
            return Err(Rule::RequesterNotAllowed.refuse("keys on the list", ask.requester));
        }
        if ask.class == Class::Public && !self.serve.public {
            return Err(Rule::PublicNotServed.refuse("own keys and collectives", ask.class.name()));
        }
        Ok(())
    }

    fn check_wanted(&self, wanted: &Wanted) -> Result<(), Refusal> {
        if !self.serves_model(&wanted.model) {
            return Err(Rule::Model.refuse("models on the list", wanted.model));
        }
        check_limits(&self.rules.limits, &wanted.shape)?;
        match self.rules.max_work {
            Some(limit) if wanted.work.0 > limit.saturating_mul(UNITS_PER_TFLOP) => {
                Err(Rule::Work.refuse(tflop(limit.saturating_mul(UNITS_PER_TFLOP)), tflop(wanted.work.0)))
            }
            _ => Ok(()),
        }
    }

    fn check_quota(&self, ask: &Ask, usage: &Usage) -> Result<(), Refusal> {
        let rules = &self.rules;
        if let Some(limit) = rules.queued_jobs.filter(|limit| usage.live_jobs >= *limit) {
            return Err(Rule::QueuedJobs.refuse(limit, u64::from(usage.live_jobs) + 1));
        }
        let today = usage.work_today.saturating_add(ask.wanted.work.0);
        if let Some(limit) = rules.work_per_day.filter(|limit| today > limit.saturating_mul(UNITS_PER_TFLOP))
        {
            return Err(Rule::WorkPerDay.refuse(tflop(limit.saturating_mul(UNITS_PER_TFLOP)), tflop(today)));
        }
        if let Some(limit) = rules.unacknowledged.filter(|limit| usage.unacknowledged > *limit) {
            return Err(Rule::Unacknowledged.refuse(bytes(limit), bytes(usage.unacknowledged)));
        }
        Ok(())
    }
}

/// Applies the size limits of an operator or a device.
///
/// # Errors
/// The first that is exceeded.
pub fn check_limits(limits: &Limits, shape: &JobShape) -> Result<(), Refusal> {
    let bounds = [
        (Rule::Width, limits.width, shape.width, "pixels"),
        (Rule::Height, limits.height, shape.height, "pixels"),
        (Rule::Frames, limits.frames, shape.frames, "frames"),
        (Rule::Steps, limits.steps, shape.steps, "steps"),
    ];
    for (rule, limit, given, unit) in bounds {
        if let Some(limit) = limit.filter(|limit| given > *limit) {
            return Err(rule.refuse(format_args!("{limit} {unit}"), format_args!("{given} {unit}")));
        }
    }
    Ok(())
}

fn tflop(units: u64) -> String {
    format!("{}.{:06} TFLOP", units / UNITS_PER_TFLOP, units % UNITS_PER_TFLOP)
}

fn bytes(count: u64) -> String {
    format!("{count} bytes")
}
