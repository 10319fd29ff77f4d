//! What the daemon counts, in Prometheus' words: one registry, base units, no label that names a person.
//!
//! Prompts, frames and requester keys never become a metric or a label. The registry is encoded by
//! [`Metrics::encode`], which the admin interface serves as `/metrics`.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// Labels of [`Metrics::jobs`].
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct OutcomeLabels {
    /// `done`, `failed` or `cancelled`.
    pub outcome: &'static str,
    /// The model's alias on this node.
    pub model: String,
}

/// One label: the phase of a job.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct PhaseLabels {
    /// `load`, `text`, `denoise`, `vae` or `encode`.
    pub phase: &'static str,
}

/// One label: a device's name from the configuration.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct DeviceLabels {
    /// The device's name.
    pub device: String,
}

/// One label: why something was refused.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ReasonLabels {
    /// The refusal's code.
    pub reason: String,
}

/// One label: how something ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ResultLabels {
    /// The result's short name.
    pub result: &'static str,
}

/// One label: which way bytes went.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct DirectionLabels {
    /// `in` or `out`.
    pub dir: &'static str,
}

type HistogramFamily<L> = Family<L, Histogram, fn() -> Histogram>;

/// Shortest duration that a histogram tells apart, in seconds; each bucket is twice the one before.
const FIRST_BUCKET_SECONDS: f64 = 0.01;
/// Buckets of a duration's histogram: 10 ms to about 3 hours.
const BUCKETS: u16 = 20;

fn seconds_histogram() -> Histogram {
    Histogram::new(exponential_buckets(FIRST_BUCKET_SECONDS, 2.0, BUCKETS))
}

/// Every metric of the daemon. Cheap to clone: the clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Jobs that ended, by outcome and model.
    pub jobs: Family<OutcomeLabels, Counter>,
    /// Jobs running now, per device.
    pub jobs_in_progress: Family<DeviceLabels, Gauge>,
    /// Jobs waiting.
    pub queue_depth: Gauge,
    /// Time from admission to start.
    pub queue_wait: Histogram,
    /// Time that jobs spent in each phase.
    pub job_duration: HistogramFamily<PhaseLabels>,
    /// Time of one denoising step, per device.
    pub denoise_step: HistogramFamily<DeviceLabels>,
    /// Frames made.
    pub frames: Counter,
    /// Adapters that jobs brought: fetched, or kept from an earlier job.
    pub adapters: Family<ResultLabels, Counter>,
    /// Quotes asked of this node, by result.
    pub offers: Family<ResultLabels, Counter>,
    /// Refusals, by reason.
    pub refusals: Family<ReasonLabels, Counter>,
    /// Receipts signed and answered.
    pub receipts: Family<ResultLabels, Counter>,
    /// Envelopes and blobs that failed a check.
    pub verify_failures: Family<ReasonLabels, Counter>,
    /// Worker processes that had to be started again, per device.
    pub worker_restarts: Family<DeviceLabels, Counter>,
    /// Bytes in the clip store.
    pub blob_store_bytes: Gauge<u64, AtomicU64>,
    /// Blob bytes moved, by direction.
    pub blob_bytes: Family<DirectionLabels, Counter>,
    /// Peers connected now.
    pub peers: Gauge,
    /// Nodes whose adverts are known.
    pub known_nodes: Gauge,
}

impl Metrics {
    /// Makes the metrics and the registry that holds them, with this build's version as `kinoflock_build_info`.
    #[must_use]
    pub fn new() -> (Self, Registry) {
        let mut registry = Registry::with_prefix("kinoflock");
        let metrics = Self {
            jobs: Family::default(),
            jobs_in_progress: Family::default(),
            queue_depth: Gauge::default(),
            queue_wait: seconds_histogram(),
            job_duration: Family::new_with_constructor(seconds_histogram),
            denoise_step: Family::new_with_constructor(seconds_histogram),
            frames: Counter::default(),
            adapters: Family::default(),
            offers: Family::default(),
            refusals: Family::default(),
            receipts: Family::default(),
            verify_failures: Family::default(),
            worker_restarts: Family::default(),
            blob_store_bytes: Gauge::default(),
            blob_bytes: Family::default(),
            peers: Gauge::default(),
            known_nodes: Gauge::default(),
        };
        metrics.register_jobs(&mut registry);
        metrics.register_network(&mut registry);
        registry.register("build", "The running build", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        (metrics, registry)
    }

    fn register_jobs(&self, registry: &mut Registry) {
        registry.register("jobs", "Jobs that ended", self.jobs.clone());
        registry.register("jobs_in_progress", "Jobs running now", self.jobs_in_progress.clone());
        registry.register("queue_depth", "Jobs waiting", self.queue_depth.clone());
        let unit = || Unit::Seconds;
        registry.register_with_unit(
            "queue_wait",
            "Time from admission to start",
            unit(),
            self.queue_wait.clone(),
        );
        registry.register_with_unit(
            "job_duration",
            "Time of a job's phases",
            unit(),
            self.job_duration.clone(),
        );
        registry.register_with_unit(
            "denoise_step",
            "Time of one denoising step",
            unit(),
            self.denoise_step.clone(),
        );
        registry.register("frames_generated", "Frames made", self.frames.clone());
        registry.register("adapters", "Adapters of jobs, fetched or kept", self.adapters.clone());
        registry.register("worker_restarts", "Workers started again", self.worker_restarts.clone());
    }

    fn register_network(&self, registry: &mut Registry) {
        registry.register("offers", "Quotes asked of this node", self.offers.clone());
        registry.register("refusals", "Refusals by reason", self.refusals.clone());
        registry.register("receipts", "Receipts signed, accepted, disputed", self.receipts.clone());
        registry.register("verify_failures", "Failed checks", self.verify_failures.clone());
        registry.register_with_unit(
            "blob_store",
            "Clip store size",
            Unit::Bytes,
            self.blob_store_bytes.clone(),
        );
        registry.register_with_unit("blob", "Blob bytes moved", Unit::Bytes, self.blob_bytes.clone());
        registry.register("peers", "Peers connected", self.peers.clone());
        registry.register("known_nodes", "Nodes whose adverts are known", self.known_nodes.clone());
    }
}

/// The registry as text in the OpenMetrics format.
///
/// # Errors
/// Only if a metric cannot be formatted, which none of ours does.
pub fn encode(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_metric_has_the_prefix_and_base_units() {
        let (metrics, registry) = Metrics::new();
        metrics.jobs.get_or_create(&OutcomeLabels { outcome: "done", model: "motif".into() }).inc();
        metrics.queue_wait.observe(0.5);
        let text = encode(&registry).unwrap();
        assert!(text.contains("kinoflock_jobs_total{outcome=\"done\",model=\"motif\"} 1"), "{text}");
        assert!(text.contains("kinoflock_queue_wait_seconds_sum 0.5"), "{text}");
        assert!(text.contains("kinoflock_build_info{version="), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.starts_with("kinoflock_"), "{line}");
        }
    }
}
