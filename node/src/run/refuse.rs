//! Refusals that no operator's rule stands behind: what this release does not do, and what is not well formed.

use kinoflock_protocol::job::JobError;
use kinoflock_protocol::order::OrderError;
use kinoflock_protocol::refusal::{Reason, Refusal};

use crate::policy::Rule;

pub(super) fn unserved(model: &kinoflock_protocol::ModelId) -> Box<Refusal> {
    Box::new(Rule::NoDevice.refuse("models that passed their self-test here", model))
}

pub(super) fn unsupported(name: &str, advice: &str) -> Box<Refusal> {
    Box::new(Refusal::new(Reason::UnknownOperation, name).given(name).advice(advice))
}

pub(super) fn invalid(rule: &str, why: &impl std::fmt::Display) -> Box<Refusal> {
    Box::new(Refusal::new(Reason::Invalid, rule).given(why))
}

pub(super) fn job_refusal(error: JobError) -> Box<Refusal> {
    let reason = match error {
        JobError::ClockSkew { .. } => Reason::ClockSkew,
        _ => Reason::Invalid,
    };
    Box::new(Refusal::new(reason, error.code()).given(&error))
}

pub(super) fn order_refusal(error: OrderError) -> Box<Refusal> {
    let reason = match error {
        OrderError::ClockSkew { .. } => Reason::ClockSkew,
        _ => Reason::Invalid,
    };
    Box::new(Refusal::new(reason, error.code()).given(&error))
}
