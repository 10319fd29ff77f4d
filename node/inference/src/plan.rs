//! How much memory a job needs, from a model's configuration and the lists of its weight files: before anything of it is
//! loaded.
//!
//! A plan has the model's components with what their weights take once loaded, and the phases of a run with the
//! components that each uses and the most that its tensors take at once (their activations). [`MemoryPlan::peak`] is the
//! greatest sum, with every component resident or with each only while its phase lasts ([`Offload`]).
//!
//! A family goes through its own computation with tensors that have no values (`ledger`), in its pipeline's `plan.rs`:
//! such a plan follows the code operation by operation, so who changes what a forward pass holds changes it there too;
//! `tests/memory.rs` measures both. It is exact for f32 on the CPU. For other types there, and on GPUs, operations are
//! candle's own and are taken roughly: that part was compared with no device.
//!
//! What counts is the process's own memory. Weight files are mapped while they are read; those pages are the system's,
//! which takes them back when it needs them, and are gone when a component is loaded. Not in a plan: tokenizers and the
//! program itself (tens of MB), and what an allocator keeps for itself.
//!
//! How weights are held is looked up in their files' lists: a linear layer out of a GGUF file keeps its blocks of few bits
//! and is widened for each call. Where there are no files, every tensor counts in the numbers of the run.

pub(crate) mod adapters;
pub(crate) mod guided;
pub(crate) mod ledger;
pub(crate) mod text;
pub(crate) mod weights;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use serde::Serialize;

use crate::adapter::names::TRANSFORMER;
use crate::error::Error;
use crate::folder::open_t5;
pub(crate) use crate::folder::text_dtype;
use crate::offload::Offload;
use crate::pipeline::run::FRAMES_AT_ONCE;
use crate::pipeline::{DecodeOptions, GenerateRequest, LoadOptions};
use crate::sampler::guidance::GuidancePasses;
use crate::text::{T5Config, T5Encoder};
use crate::weights::Weights;
use adapters::Beside;
use ledger::{Ghost, Ledger, Special};
use weights::{Resident, Wanted};

/// On what a job would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Whether the CPU computes, with the kernels of this engine.
    pub cpu: bool,
    /// In which numbers.
    pub dtype: DType,
    /// Whether the text encoder is on the CPU though the rest is not.
    pub text_on_cpu: bool,
    /// Whether adapters are merged into the transformer's weights, where layers in blocks of few bits are widened for good.
    pub merges: bool,
}

impl PlanOptions {
    /// Those of a pipeline that is loaded so.
    #[must_use]
    pub fn of(options: &LoadOptions) -> Self {
        Self {
            cpu: options.device.is_cpu(),
            dtype: options.dtype,
            text_on_cpu: options.text_on_cpu,
            merges: options.places.merges(),
        }
    }
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self { cpu: true, dtype: DType::F32, text_on_cpu: false, merges: false }
    }
}

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum PlanPhase {
    /// Prompts become embeddings.
    Text,
    /// Given pictures become what the transformer or the latents take.
    Conditions,
    /// The steps.
    Denoise,
    /// Latents become frames.
    Decode,
    /// Frames become a file.
    Encode,
}

impl PlanPhase {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Conditions => "conditions",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
            Self::Encode => "encode",
        }
    }
}

/// A component's weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ComponentMemory {
    /// What it is, such as `transformer`.
    pub name: &'static str,
    /// Bytes once it is loaded.
    pub bytes: u64,
    /// Of those, bytes in blocks of few bits, as its GGUF file has them.
    pub in_blocks: u64,
    /// Bytes beside them while it is loaded.
    pub loading: u64,
    /// Whether it is loaded for its phase alone, however much room there is.
    pub brief: bool,
    /// Whether it is in the machine's memory though the rest is on another device.
    pub on_host: bool,
}

/// What a phase holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PhaseMemory {
    /// Which.
    pub phase: PlanPhase,
    /// The components that it uses, as indices.
    pub uses: Vec<usize>,
    /// The most that its tensors take at once, bytes.
    pub activations: u64,
    /// Whether they are in the machine's memory though the rest is on another device.
    pub on_host: bool,
}

/// What a job needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The model's components.
    pub components: Vec<ComponentMemory>,
    /// In their order.
    pub phases: Vec<PhaseMemory>,
}

impl MemoryPlan {
    /// The plan of a request with the model of a folder.
    ///
    /// # Errors
    /// As [`crate::registry::facts`], or what the request cannot be.
    pub fn new(folder: &Path, request: &GenerateRequest, options: &PlanOptions) -> Result<Self, Error> {
        crate::registry::plan(folder, request, options)
    }

    /// Bytes of all weights that stay where everything is resident.
    #[must_use]
    pub fn weights(&self) -> u64 {
        self.sum(|component| !component.brief && !component.on_host)
    }

    /// Bytes of weights during a phase.
    #[must_use]
    pub fn weights_in(&self, phase: &PhaseMemory, in_turn: bool) -> u64 {
        let used = |index: usize| phase.uses.contains(&index);
        let counts = |(index, component): &(usize, &ComponentMemory)| {
            !component.on_host && (used(*index) || !in_turn && !component.brief)
        };
        let all = self.components.iter().enumerate().filter(counts);
        all.fold(0, |all, (_, component)| all.saturating_add(component.bytes))
    }

    /// The most that the device holds at once, bytes: with every component resident, or each in turn.
    #[must_use]
    pub fn peak(&self, in_turn: bool) -> u64 {
        let phases = self.phases.iter().map(|phase| {
            let loading = phase.uses.iter().map(|&index| &self.components[index]);
            let loading = loading.filter(|component| !component.on_host && (in_turn || component.brief));
            let loading = loading.map(|component| component.loading).max().unwrap_or(0);
            let activations = if phase.on_host { 0 } else { phase.activations };
            self.weights_in(phase, in_turn).saturating_add(activations.max(loading))
        });
        let most = phases.max().unwrap_or(0);
        if in_turn {
            return most;
        }
        let loading = self.components.iter().filter(|component| !component.on_host);
        let loading = loading.map(|component| component.loading).max().unwrap_or(0);
        most.max(self.weights().saturating_add(loading))
    }

    /// The most that the machine's memory holds for components that are there though the rest is on another device.
    #[must_use]
    pub fn host_peak(&self) -> u64 {
        let activations = self.phases.iter().filter(|phase| phase.on_host).map(|phase| phase.activations);
        self.sum(|component| component.on_host).saturating_add(activations.max().unwrap_or(0))
    }

    /// Whether components go in turn, with this choice and so much memory, and the bytes that are then needed.
    #[must_use]
    pub fn needs(&self, offload: Offload, memory: Option<u64>) -> Needs {
        let in_turn = match offload {
            Offload::None => false,
            Offload::InTurn => true,
            Offload::Auto => memory.is_some_and(|memory| self.peak(false) > memory),
        };
        let bytes = self.peak(in_turn);
        Needs { in_turn, bytes, fits: memory.is_none_or(|memory| bytes <= memory) }
    }

    fn sum(&self, which: impl Fn(&ComponentMemory) -> bool) -> u64 {
        let which = self.components.iter().filter(|component| which(component));
        which.fold(0, |all, component| all.saturating_add(component.bytes))
    }
}

/// How a request runs in so much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// What it needs.
    pub needs: Needs,
    /// In which pieces it is decoded: as it says, or in such that have the very pixels of the whole.
    #[serde(skip)]
    pub decode: DecodeOptions,
    /// How guidance's predictions are computed: as it says, or one after the other.
    #[serde(skip)]
    pub passes: GuidancePasses,
}

impl Fit {
    /// How a request with the model of a folder fits best: whole and all loaded, whole and in turn, or decoded in pieces; of
    /// each, with guidance's predictions together where they would go so, else one after the other. One that says itself how
    /// it is decoded or how they are computed is left so.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn of(
        folder: &Path,
        request: &GenerateRequest,
        options: &PlanOptions,
        (offload, memory): (Offload, Option<u64>),
    ) -> Result<Self, Error> {
        /// Sides of tiles, pixels, and frames of runs.
        const PIECES: [(usize, usize); 4] = [(512, 64), (256, 32), (256, 16), (128, 8)];
        let with = |decode: DecodeOptions, guidance_passes: GuidancePasses| {
            let request = GenerateRequest { decode, guidance_passes, ..request.clone() };
            let plan = MemoryPlan::new(folder, &request, options)?;
            let needs = plan.needs(offload, memory);
            Ok::<_, Error>((Self { needs, decode, passes: guidance_passes }, plan))
        };
        let decoded = |decode: DecodeOptions| {
            let asked = with(decode, request.guidance_passes)?;
            let free = request.guidance_passes == GuidancePasses::Auto && !options.cpu && request.is_guided();
            let needs = asked.0.needs;
            if !free || needs.fits && !needs.in_turn {
                return Ok::<_, Error>(asked);
            }
            let apart = with(decode, GuidancePasses::Apart)?;
            // Reading the components for every clip takes longer than two predictions instead of one batch.
            let better = !needs.fits || apart.0.needs.fits && !apart.0.needs.in_turn;
            Ok(if better { apart } else { asked })
        };
        let (asked, mut plan) = decoded(request.decode)?;
        let exact = crate::registry::exact(folder)?;
        let says_so = request.decode.tile.is_some() || request.decode.chunk.is_some();
        if asked.needs.fits || says_so || !(exact.tiles || exact.runs) {
            return Ok(asked);
        }
        // Pieces help a decode alone.
        plan.phases.retain(|phase| phase.phase != PlanPhase::Decode);
        if !plan.needs(offload, memory).fits {
            return Ok(asked);
        }
        for (tile, chunk) in PIECES {
            let (tile, chunk) = (exact.tiles.then_some(tile), exact.runs.then_some(chunk));
            let (fit, _) = decoded(DecodeOptions { tile, chunk, ..request.decode })?;
            if fit.needs.fits {
                return Ok(fit);
            }
        }
        Ok(asked)
    }
}

/// How a job would run in so much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Whether components are loaded and given back in turn.
    pub in_turn: bool,
    /// The most that is held at once.
    pub bytes: u64,
    /// Whether that fits.
    pub fits: bool,
}

/// A plan that comes together.
pub(crate) struct Draft {
    pub(crate) options: PlanOptions,
    plan: MemoryPlan,
    /// Numbers in the request's own pictures, latents and adapters, which are there as long as it is.
    given: usize,
    /// Of each component, its layers in blocks of few bits.
    in_blocks: Vec<BTreeSet<(usize, usize)>>,
    /// What stands beside the transformer's layers as long as a run goes on.
    beside: Option<Beside>,
}

impl Draft {
    pub(crate) fn new(options: &PlanOptions, request: &GenerateRequest) -> Self {
        let plan = MemoryPlan { components: Vec::new(), phases: Vec::new() };
        let given = request.conditions.iter().map(|given| given.pictures.elem_count());
        let start = request
            .touch
            .start
            .iter()
            .flat_map(|start| std::iter::once(&start.latents).chain(start.memory.values()));
        let latents = request.initial_latents.iter().chain(&request.touch.decode_only).chain(start);
        let given = given.chain(latents.map(Tensor::elem_count)).fold(0, usize::saturating_add);
        let beside = (!request.adapters.is_empty())
            .then(|| Beside::new(&request.adapters, options.dtype, options.cpu));
        let files = beside.as_ref().map_or(0, |beside| beside.files / size_of::<f32>() as u64);
        let given = if options.cpu { given.saturating_add(files as usize) } else { 0 };
        Self { options: *options, plan, given, in_blocks: Vec::new(), beside }
    }

    /// Adds a component, built without its weights, whose files are these. Why they cannot be opened, loading tells.
    pub(crate) fn component<T>(
        &mut self,
        name: &'static str,
        dtype: DType,
        files: Result<Weights, Error>,
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<(usize, T), Error> {
        self.add(name, (dtype, false), files, build)
    }

    /// Adds a component that is loaded for its phase alone.
    pub(crate) fn brief_component<T>(
        &mut self,
        name: &'static str,
        dtype: DType,
        files: Result<Weights, Error>,
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<(usize, T), Error> {
        let (index, built) = self.add(name, (dtype, false), files, build)?;
        self.plan.components[index].brief = true;
        Ok((index, built))
    }

    /// Adds a component that reads prompts.
    pub(crate) fn text_component<T>(
        &mut self,
        name: &'static str,
        dtype: DType,
        files: Result<Weights, Error>,
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<(usize, T), Error> {
        self.add(name, (dtype, self.text_is_apart()), files, build)
    }

    /// Adds the T5 encoder of a component's folder.
    pub(crate) fn t5(&mut self, part: &Path, config: &T5Config) -> Result<usize, Error> {
        let files = open_t5(part, config, &LoadOptions::default());
        let dtype = text_dtype(self.options.dtype);
        Ok(self.text_component("text encoder", dtype, files, |vb| T5Encoder::load(config, &vb))?.0)
    }

    fn add<T>(
        &mut self,
        name: &'static str,
        (dtype, on_host): (DType, bool),
        files: Result<Weights, Error>,
        build: impl FnOnce(VarBuilder<'static>) -> candle_core::Result<T>,
    ) -> Result<(usize, T), Error> {
        let widened = self.options.merges && name.starts_with(TRANSFORMER);
        let wanted = Wanted { dtype, cpu: self.options.cpu || on_host, widened };
        let (built, resident) = weights::resident(wanted, files.ok().as_ref(), build)?;
        let Resident { bytes, loading, blocks } = resident;
        let in_blocks = blocks.bytes;
        let component = ComponentMemory { name, bytes, in_blocks, loading, brief: false, on_host };
        self.plan.components.push(component);
        self.in_blocks.push(blocks.layers);
        Ok((self.plan.components.len() - 1, built))
    }

    fn text_is_apart(&self) -> bool {
        self.options.text_on_cpu && !self.options.cpu
    }

    /// Adds a phase: `go` goes through what it computes.
    pub(crate) fn phase(&mut self, phase: PlanPhase, uses: &[usize], go: impl FnOnce(&Ledger)) {
        let on_host = phase == PlanPhase::Text && self.text_is_apart();
        let mut special = Special::default();
        special.in_blocks.extend(uses.iter().flat_map(|&index| self.in_blocks[index].iter().copied()));
        if let Some(beside) = self.beside.as_ref().filter(|_| phase == PlanPhase::Denoise) {
            special.beside.clone_from(&beside.ranks);
        }
        let ledger = Ledger::with(self.options.cpu || on_host, special);
        let _given = ledger.wide(&[self.given]);
        go(&ledger);
        let activations = ledger.most();
        self.plan.phases.push(PhaseMemory { phase, uses: uses.to_vec(), activations, on_host });
    }

    /// The plan, with the encoding of the clip at its end, which is the machine's and not the model's.
    pub(crate) fn finish(mut self, request: &GenerateRequest) -> MemoryPlan {
        /// Pictures of 8 bits a channel that an encoder holds beside the clip.
        const HELD: usize = 16;
        if let Some(Beside { bytes, loading, .. }) = self.beside.take() {
            let index = self.plan.components.len();
            let adapters = ComponentMemory {
                name: "adapters",
                bytes,
                in_blocks: 0,
                loading,
                brief: false,
                on_host: false,
            };
            self.plan.components.push(adapters);
            self.plan.phases.iter_mut().for_each(|phase| phase.uses.push(index));
        }
        let size = [request.frames.saturating_add(HELD), request.height, request.width, 3];
        let (uses, activations, on_host) = (Vec::new(), ledger::count(&size), !self.options.cpu);
        self.plan.phases.push(PhaseMemory { phase: PlanPhase::Encode, uses, activations, on_host });
        self.plan
    }
}

/// Where the frames of a decode go: they become bytes, one by one, which are kept.
pub(crate) struct GhostFilm {
    ledger: Ledger,
    /// Frames, height and width of the clip.
    size: [usize; 3],
    bytes: RefCell<Vec<Ghost>>,
}

impl GhostFilm {
    /// For a request's frames.
    pub(crate) fn new(ledger: &Ledger, request: &GenerateRequest) -> Self {
        let size = [request.frames, request.height, request.width];
        Self { ledger: ledger.clone(), size, bytes: RefCell::default() }
    }

    /// Keeps the bytes of some frames.
    fn keep(&self, frames: usize) {
        let [_, height, width] = self.size;
        self.bytes.borrow_mut().push(self.ledger.at_home(&[frames, height, width, 3], DType::U8));
    }

    /// Keeps those of all frames but the last `frames`, which is what is there when these come.
    pub(crate) fn fill_before(&self, frames: usize) {
        self.bytes.borrow_mut().clear();
        self.keep(self.size[0].saturating_sub(frames));
    }

    /// Frames that come together from tiles.
    pub(crate) fn canvas(&self, dims: &[usize]) -> Ghost {
        self.ledger.at_home(dims, DType::F32).view(dims)
    }

    /// Takes the frames of a video `(1, 3, frames, height, width)`.
    pub(crate) fn put(&self, video: &Ghost) {
        let [_, channels, frames, height, width] = video.dims()[..] else { return };
        if self.bytes.borrow().is_empty() {
            self.keep(frames);
        } else {
            self.fill_before(0);
        }
        let some = self.ledger.at_home(&[frames.min(FRAMES_AT_ONCE), height, width, channels], DType::U8);
        let one = || video.turned(&[channels, height, width]).to(DType::F32);
        let _one = (one(), one(), some);
    }
}
