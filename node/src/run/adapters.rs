//! The adapters of a job: which are taken, what its worker is told of them, and what its receipt says of them.

mod kept;

use std::collections::BTreeMap;

use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::List;
use kinoflock_protocol::id::{BlobId, CardId};
use kinoflock_protocol::job::JobSpec;
use kinoflock_protocol::limits::MAX_ADAPTERS;
use kinoflock_protocol::receipt::UsedAdapter;
use kinoflock_protocol::refusal::{Reason, Refusal};

pub(super) use self::kept::Kept;
use super::inputs::MAX_INPUT_BYTES;
use crate::config::ByteSize;
use crate::engine::wire::AdapterUse;
use crate::policy::Rule;

/// Refuses adapters of more bytes than the operator takes; a quote is asked for without their sizes.
pub(super) fn check_adapters(limit: u64, count: usize, given: u64) -> Result<(), Box<Refusal>> {
    if count == 0 || (limit > 0 && given <= limit) {
        return Ok(());
    }
    let given = if given > 0 { ByteSize(given).to_string() } else { format!("{count} adapters") };
    let limit = if limit > 0 { ByteSize(limit).to_string() } else { "no adapters".to_owned() };
    Err(Box::new(Rule::Adapters.refuse(limit, given)))
}

/// Refuses more bytes of inputs than are taken, adapters counted beside the rest.
pub(super) fn check_inputs(limit: u64, adapters: usize, given: u64) -> Result<(), Box<Refusal>> {
    let most = if adapters > 0 { MAX_INPUT_BYTES.saturating_add(limit) } else { MAX_INPUT_BYTES };
    if given <= most {
        return Ok(());
    }
    let refusal = Refusal::new(Reason::TooLarge, "inputs").limit(most, given);
    Err(Box::new(refusal.advice("bring fewer bytes of inputs")))
}

/// Checks both for a job.
pub(super) fn check_job(limit: u64, spec: &JobSpec) -> Result<(), Box<Refusal>> {
    let adapters = files(spec).values().sum();
    check_adapters(limit, spec.adapters.len(), adapters)?;
    let all: u64 = spec.inputs().iter().map(|blob| blob.len).sum();
    check_inputs(limit, 0, all.saturating_sub(adapters))
}

/// Most bytes of an input of a job, where so many are taken of an adapter.
pub(super) fn most_of(limit: u64, spec: &JobSpec, blob: &BlobRef) -> u64 {
    if is_one(spec, blob) { limit } else { MAX_INPUT_BYTES }
}

/// Whether an input of a job is an adapter.
pub(super) fn is_one(spec: &JobSpec, blob: &BlobRef) -> bool {
    spec.adapters.iter().any(|adapter| adapter.weights == *blob)
}

/// The files of a job's adapters, each once, with their lengths.
pub(super) fn files(spec: &JobSpec) -> BTreeMap<BlobId, u64> {
    spec.adapters.iter().map(|adapter| (adapter.weights.id, adapter.weights.len)).collect()
}

/// What a worker is told.
pub(super) fn to_use(spec: &JobSpec) -> List<AdapterUse, MAX_ADAPTERS> {
    let each = |adapter: &kinoflock_protocol::job::Adapter| AdapterUse {
        weights: adapter.weights.id,
        scale: adapter.scale.to_f64(),
    };
    List::first_of(spec.adapters.iter().map(each))
}

/// What a receipt says.
pub(super) fn used(spec: &JobSpec) -> List<UsedAdapter, MAX_ADAPTERS> {
    let each = |adapter: &kinoflock_protocol::job::Adapter| UsedAdapter {
        weights: adapter.weights.id,
        scale: adapter.scale,
    };
    List::first_of(spec.adapters.iter().map(each))
}

/// The cards that the requester names for them.
pub(super) fn cards(spec: &JobSpec) -> impl Iterator<Item = CardId> {
    spec.adapters.iter().filter_map(|adapter| adapter.card)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_refusal_tells_the_operators_limit_and_what_was_given() {
        assert!(check_adapters(0, 0, 0).is_ok());
        assert!(check_adapters(1 << 20, 2, 1 << 20).is_ok());
        let refusal = check_adapters(1 << 20, 1, (1 << 20) + 1).unwrap_err();
        assert_eq!(refusal.reason, Reason::AdapterNotServed);
        assert_eq!(&*refusal.rule, "policy.adapter_bytes");
        assert!(refusal.to_string().contains("1 MiB"), "{refusal}");
        let refusal = check_adapters(0, 3, 0).unwrap_err();
        assert!(refusal.to_string().contains("3 adapters"), "{refusal}");
        assert!(check_inputs(5, 0, MAX_INPUT_BYTES + 1).is_err());
        assert!(check_inputs(5, 1, MAX_INPUT_BYTES + 5).is_ok());
    }
}
