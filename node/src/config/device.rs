//! `[[device]]` sections, checked: one worker process each.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::file::{DeviceSection, FileConfig};
use super::units::{ByteSize, MemoryLimit};
use super::{ConfigError, MAX_DEVICES, invalid, positive};

/// What a worker computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by its number.
    Cuda(u32),
    /// Apple's GPU.
    Metal,
}

/// The number format that a model computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Dtype {
    /// The worker chooses by device and model.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

/// Where a model's components are during a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Offloading {
    /// Loaded where they fit, else in turn.
    #[default]
    Auto,
    /// Loaded.
    None,
    /// In turn.
    InTurn,
    /// As auto, with the text encoder in the machine's memory.
    TextCpu,
}

/// Largest clip, each bound absent when unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Pixels.
    pub width: Option<u32>,
    /// Pixels.
    pub height: Option<u32>,
    /// Frames.
    pub frames: Option<u32>,
    /// Denoising steps.
    pub steps: Option<u32>,
}

/// One device and its worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Distinct among the devices.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// CPU threads; `None` for all cores.
    pub threads: Option<u32>,
    /// Number format.
    pub dtype: Dtype,
    /// Whether a job's adapters go into the weights, which are read anew for that, instead of beside them.
    pub merge_adapters: bool,
    /// What a job may need.
    pub memory_limit: MemoryLimit,
    /// What becomes of a model's components.
    pub offload: Offloading,
    /// Names or ids; empty for all that the policy serves.
    pub models: Vec<String>,
    /// Largest clip here.
    pub limits: Limits,
    /// The worker program; `None` for this very binary.
    pub worker: Option<PathBuf>,
    /// Its arguments.
    pub worker_args: Vec<String>,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl FromStr for DeviceKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "metal" => Ok(Self::Metal),
            _ => text.strip_prefix("cuda:").and_then(|number| number.parse().ok()).map(Self::Cuda).ok_or(()),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for Dtype {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Auto, Self::F32, Self::Bf16, Self::F16]
            .into_iter()
            .find(|dtype| dtype.to_string() == text)
            .ok_or(())
    }
}

impl fmt::Display for Offloading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::InTurn => "in-turn",
            Self::TextCpu => "text-cpu",
        })
    }
}

impl FromStr for Offloading {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Auto, Self::None, Self::InTurn, Self::TextCpu]
            .into_iter()
            .find(|offload| offload.to_string() == text)
            .ok_or(())
    }
}

/// All devices of the file, or the CPU where it names none.
pub(super) fn check_all(file: &FileConfig) -> Result<Vec<DeviceConfig>, ConfigError> {
    let alone = [DeviceSection::default()];
    let sections = if file.device.is_empty() { &alone[..] } else { &file.device[..] };
    if sections.len() > MAX_DEVICES {
        let count = format!("{} sections", sections.len());
        return Err(invalid("device", &count, &format!("at most {MAX_DEVICES}")));
    }
    let devices: Vec<_> = sections.iter().map(|section| check(section, file)).collect::<Result<_, _>>()?;
    let mut names = BTreeSet::new();
    match devices.iter().find(|device| !names.insert(&device.name)) {
        Some(twice) => Err(invalid("device.name", &twice.name, "another [[device]] has that name")),
        None => Ok(devices),
    }
}

fn check(section: &DeviceSection, file: &FileConfig) -> Result<DeviceConfig, ConfigError> {
    let kind = section
        .kind
        .parse()
        .map_err(|()| invalid("device.kind", &section.kind, "known are cpu, cuda:N and metal"))?;
    let dtype = section
        .dtype
        .parse()
        .map_err(|()| invalid("device.dtype", &section.dtype, "known are auto, f32, bf16 and f16"))?;
    let known = "known are auto, none, in-turn and text-cpu";
    let offload = section.offload.parse().map_err(|()| invalid("device.offload", &section.offload, known))?;
    if kind == DeviceKind::Cpu && offload == Offloading::TextCpu {
        return Err(invalid(
            "device.offload",
            "text-cpu",
            "a device of kind cpu has its text encoder there already",
        ));
    }
    let name = if section.name.is_empty() { section.kind.clone() } else { section.name.clone() };
    // The name is a metric label and an argument on the command line.
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    if name.len() > 32 || !name.chars().all(plain) {
        return Err(invalid("device.name", &name, "at most 32 letters, digits, '-', '_', '.' or ':'"));
    }
    let own_worker = !section.worker.is_empty();
    let program = if own_worker { &section.worker } else { &file.engine.worker };
    let args = match (&section.worker_args, &file.engine.worker_args) {
        (own, _) if !own.is_empty() => own.clone(),
        (_, shared) if !shared.is_empty() && !own_worker => shared.clone(),
        _ => vec!["worker".to_owned()],
    };
    Ok(DeviceConfig {
        name,
        kind,
        threads: (section.threads > 0).then_some(section.threads),
        dtype,
        merge_adapters: section.merge_adapters,
        memory_limit: check_memory(section.memory_limit)?,
        offload,
        models: section.models.clone(),
        limits: Limits {
            width: positive("device.max_width", section.max_width.0)?,
            height: positive("device.max_height", section.max_height.0)?,
            frames: positive("device.max_frames", section.max_frames.0)?,
            steps: positive("device.max_steps", section.max_steps.0)?,
        },
        worker: (!program.is_empty()).then(|| PathBuf::from(program)),
        worker_args: args,
    })
}

fn check_memory(limit: MemoryLimit) -> Result<MemoryLimit, ConfigError> {
    match limit {
        MemoryLimit::At(ByteSize(0)) => {
            Err(invalid("device.memory_limit", "0", "at least 1, \"auto\" or \"unlimited\""))
        }
        limit => Ok(limit),
    }
}
