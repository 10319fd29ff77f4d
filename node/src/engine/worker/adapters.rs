//! The adapters of a run, read from the job's inputs. They come from strangers, and are read here, in the worker's process,
//! within bounds.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::sync::Arc;

use kinoflock_inference::{Adapter, Error, Lora};
use kinoflock_protocol::id::BlobId;

use crate::engine::wire::{AdapterUse, Failure, RunRequest, input_name};

/// Greatest file of an adapter that is read, bytes (8 GiB); the operator's limit is the daemon's matter.
const MAX_ADAPTER: u64 = 8 << 30;

/// The adapters, in the order in which they are asked for; what the model passes over is said.
pub(super) fn adapters(request: &RunRequest) -> Result<Vec<Adapter>, Failure> {
    let adapters = read_all(request)?;
    for ignored in adapters.iter().map(|adapter| adapter.lora.ignored().len()).filter(|&count| count > 0) {
        super::say(&format!("{ignored} tensors of an adapter are passed over, as the reference does"));
    }
    Ok(adapters)
}

/// The same, and nothing is said.
pub(super) fn read_all(request: &RunRequest) -> Result<Vec<Adapter>, Failure> {
    let extra = &request.extra;
    let Some(folder) = &extra.inputs else {
        let order = || Failure::new("worker_order", "adapters without a folder of inputs", false);
        return if extra.adapters.is_empty() { Ok(Vec::new()) } else { Err(order()) };
    };
    // A file that is named several times is read once: the operator's limit counts it once too.
    let mut files = BTreeMap::new();
    let one = |used: &AdapterUse| {
        let lora = match files.entry(used.weights) {
            Entry::Occupied(known) => Arc::clone(known.get()),
            Entry::Vacant(place) => {
                Arc::clone(place.insert(read(Path::new(folder.as_str()), &used.weights)?))
            }
        };
        Ok(Adapter { lora, scale: used.scale })
    };
    extra.adapters.iter().map(one).collect()
}

fn read(folder: &Path, weights: &BlobId) -> Result<Arc<Lora>, Failure> {
    let lora = Lora::read(&folder.join(input_name(weights)), &weights.short(), MAX_ADAPTER);
    lora.map(Arc::new).map_err(|error| super::local::failure(&Error::from(error)))
}
