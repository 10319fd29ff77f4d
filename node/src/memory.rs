//! How much memory a device has for a job, and whether a job's plan fits into it.

use std::collections::BTreeMap;
use std::sync::Mutex;

use kinoflock_inference::offload::Offload;
use kinoflock_inference::plan::{Fit, Needs, PlanOptions};
use kinoflock_inference::{DType, Error, GenerateRequest};
use kinoflock_protocol::id::ModelId;
use kinoflock_protocol::work::JobShape;

use crate::config::{DeviceConfig, DeviceKind, Dtype, MemoryLimit, Offloading};
use crate::models::Model;
use crate::policy::{Refusal, Rule, rule_of};

/// What of a machine's or GPU's memory is left to everything else: an eighth, and at least this, bytes.
const RESERVE: u64 = 1 << 30;
const RESERVED_PART: u64 = 8;
/// Plans that are kept.
const MAX_PLANS: usize = 1024;

/// What a job may need on a device, bytes; `None` where nobody knows or cares.
#[must_use]
pub fn limit(device: &DeviceConfig) -> Option<u64> {
    match device.memory_limit {
        MemoryLimit::At(size) => Some(size.0),
        MemoryLimit::Unlimited => None,
        MemoryLimit::Auto => total(device.kind).map(less_reserve),
    }
}

fn less_reserve(total: u64) -> u64 {
    total.saturating_sub((total / RESERVED_PART).max(RESERVE))
}

/// Memory of a device, bytes.
#[must_use]
pub fn total(kind: DeviceKind) -> Option<u64> {
    match kind {
        DeviceKind::Cpu | DeviceKind::Metal => machine(),
        DeviceKind::Cuda(number) => gpu(number),
    }
}

/// The machine's memory, or what its container may have of it.
fn machine() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let total = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|text| text.trim().parse::<u64>().ok());
    Some(group.map_or(total, |group| total.min(group)))
}

/// As its driver's own program says it.
fn gpu(number: u32) -> Option<u64> {
    let number = number.to_string();
    let asked = ["--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", &number];
    let said = std::process::Command::new("nvidia-smi").args(asked).output().ok()?;
    let text = String::from_utf8(said.stdout).ok().filter(|_| said.status.success())?;
    Some(text.trim().parse::<u64>().ok()? << 20)
}

/// How plans are made for a device.
#[must_use]
pub fn plan_options(device: &DeviceConfig) -> PlanOptions {
    let cpu = device.kind == DeviceKind::Cpu;
    let dtype = match device.dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::Auto if matches!(device.kind, DeviceKind::Cuda(_)) => DType::BF16,
        Dtype::Auto => DType::F32,
    };
    PlanOptions { cpu, dtype, text_on_cpu: device.offload == Offloading::TextCpu, merges: false }
}

/// What the engine is told of a device's choice.
#[must_use]
pub fn offload(choice: Offloading) -> Offload {
    match choice {
        Offloading::None => Offload::None,
        Offloading::InTurn => Offload::InTurn,
        Offloading::Auto | Offloading::TextCpu => Offload::Auto,
    }
}

/// A job of this shape, without pictures or tiles, which a quote does not tell: the worker plans again with everything
/// that the job says.
///
/// # Errors
/// What the model's folder cannot be.
pub fn request(model: &Model, shape: &JobShape) -> Result<GenerateRequest, Error> {
    let defaults = kinoflock_inference::registry::facts(&model.dir)?.info.defaults;
    Ok(GenerateRequest {
        width: shape.width as usize,
        height: shape.height as usize,
        frames: shape.frames as usize,
        guidance: if shape.guided { 2.0 } else { 1.0 },
        ..GenerateRequest::new("", &defaults)
    })
}

/// Devices of a node by their number, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceSet(u64);

impl DeviceSet {
    /// None.
    pub const NONE: Self = Self(0);

    /// With this one too.
    #[must_use]
    pub const fn with(self, number: u16) -> Self {
        Self(self.0 | 1 << (number % u64::BITS as u16))
    }

    /// Whether this one is in it.
    #[must_use]
    pub const fn has(self, number: u16) -> bool {
        self.0 >> (number % u64::BITS as u16) & 1 == 1
    }
}

/// The memory of a node's devices.
#[derive(Debug)]
pub struct Memories {
    devices: Vec<DeviceMemory>,
    plans: Mutex<BTreeMap<PlanKey, Vec<Option<Needs>>>>,
}

type PlanKey = (ModelId, [u32; 3], bool);

#[derive(Debug)]
struct DeviceMemory {
    options: PlanOptions,
    offload: Offload,
    limit: Option<u64>,
}

impl Memories {
    /// Of these devices, in their order.
    #[must_use]
    pub fn new(devices: &[DeviceConfig]) -> Self {
        let devices = devices.iter().map(|device| DeviceMemory {
            options: plan_options(device),
            offload: offload(device.offload),
            limit: limit(device),
        });
        Self { devices: devices.collect(), plans: Mutex::default() }
    }

    /// What a job may need on a device, bytes; 0 for no known limit.
    #[must_use]
    pub fn limit(&self, number: usize) -> u64 {
        self.devices.get(number).and_then(|device| device.limit).unwrap_or(0)
    }

    /// The devices on which a job of this shape does not fit.
    #[must_use]
    pub fn unfit(&self, model: &Model, shape: &JobShape) -> DeviceSet {
        let needs = self.needs(model, shape);
        let unfit = needs.iter().zip(0u16..).filter(|(needs, _)| needs.is_some_and(|needs| !needs.fits));
        unfit.fold(DeviceSet::NONE, |set, (_, number)| set.with(number))
    }

    /// A refusal as the artist is told it: one for want of memory says how much is needed and how much there is.
    #[must_use]
    pub fn told(&self, refusal: Refusal, model: &Model, shape: &JobShape) -> Refusal {
        if rule_of(&refusal) != Some(Rule::Memory) {
            return refusal;
        }
        let needs = self.needs(model, shape);
        let unfit = needs.iter().zip(&self.devices).filter_map(|(needs, device)| {
            let needs = needs.filter(|needs| !needs.fits)?;
            Some((needs.bytes, device.limit?))
        });
        // The device that lacks least.
        match unfit.min_by_key(|(needed, available)| needed.saturating_sub(*available)) {
            Some((needed, available)) => {
                Rule::Memory.refuse(format_args!("{available} bytes"), format_args!("{needed} bytes"))
            }
            None => refusal,
        }
    }

    /// What each device would need, where there is a limit and a plan can be made.
    fn needs(&self, model: &Model, shape: &JobShape) -> Vec<Option<Needs>> {
        let key = (model.id, [shape.frames, shape.width, shape.height], shape.guided);
        let locked = || self.plans.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(known) = locked().get(&key) {
            return known.clone();
        }
        let each = |device: &DeviceMemory| {
            device.limit?;
            let how = (device.offload, device.limit);
            let fit =
                request(model, shape).and_then(|request| Fit::of(&model.dir, &request, &device.options, how));
            match fit {
                Ok(fit) => Some(fit.needs),
                Err(error) => {
                    tracing::debug!(model = %model.name, %error, "no memory plan");
                    None
                }
            }
        };
        let needs: Vec<_> = self.devices.iter().map(each).collect();
        let mut plans = locked();
        while plans.len() >= MAX_PLANS {
            plans.pop_first();
        }
        plans.insert(key, needs.clone());
        needs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eighth_and_at_least_a_gib_is_left() {
        assert_eq!(less_reserve(80 << 30), 70 << 30);
        assert_eq!(less_reserve(4 << 30), 3 << 30);
        assert_eq!(less_reserve(1 << 20), 0);
    }

    #[test]
    fn a_set_has_what_was_put_into_it() {
        let set = DeviceSet::NONE.with(0).with(63);
        assert!(set.has(0) && set.has(63) && !set.has(1));
    }
}
