//! The test engine: a worker program with the manners of the real one ([`worker::serve`]), that draws frames from seed
//! and prompt alone, at a speed of one's choice, and fails when it is told to.
//!
//! What it is told are its arguments, each a name and a value:
//!
//! | argument | effect |
//! |---|---|
//! | `--load-ms N`, `--step-ms N`, `--decode-ms N` | loading, each step, and decoding, takes so long |
//! | `--crash-at K` | aborts in step K (counted from 1) |
//! | `--exit-at K` | exits with code 9 in step K |
//! | `--oom-at K` | dies of a failed allocation in step K |
//! | `--kill-at K` | is killed by SIGKILL in step K, as by the system when memory runs out |
//! | `--panic-at K` | panics in step K, with the prompt in its message |
//! | `--fail-at K` | reports a failure that may be tried again in step K |
//! | `--wedge-at K` | never ends step K, and does not hear a cancel |
//! | `--hold-at K --hold-file F` | waits in step K until the file F is there, or the job is cancelled |
//! | `--once F` | all of the above only while the file F is not there; the first time makes it |
//! | `--stray 1` | prints to stdout at every turn, with the prompt among it |
//! | `--wire-version V` | greets with version V |
//! | `--babble 1` | is no worker at all |
//! | `--refuse-device 1` | does not get its device |
//! | `--constant 1` | draws frames of one colour |
//! | `--noise 1` | draws noise, which makes large clips |
//! | `--cheat-at K` | commits, from step K (counted from 1) on, to states of another seed |

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use kinoflock_inference::audit::frames_deviation;
use kinoflock_inference::sampler::checkpoint::latents_bytes;
use kinoflock_inference::{Checkpoint, Commitment, Device, Tensor};
use kinoflock_node::engine::frames::RgbFrames;
use kinoflock_node::engine::mp4::decode_mp4_bytes;
use kinoflock_node::engine::wire::{
    AuditReport, AuditRun, Failure, Hash, LoadRequest, Name, OpenRequest, Phase, RunRequest, WirePath,
    WorkerInfo,
};
use kinoflock_node::engine::worker::{self, Context, Engine, LoadedModel, Made, Stop};
use kinoflock_protocol::BlobId;

/// How often a held step looks for its file.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Values of a latent frame.
const LATENTS: usize = 16;

/// What the program was told.
#[derive(Debug, Clone, Default)]
struct Orders(BTreeMap<String, String>);

impl Orders {
    fn of_arguments() -> Self {
        let mut orders = BTreeMap::new();
        // `worker` comes from the daemon's default arguments.
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "worker");
        while let Some(name) = arguments.next() {
            orders.insert(name.trim_start_matches('-').to_owned(), arguments.next().unwrap_or_default());
        }
        Self(orders)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.parse().ok()
    }

    /// Whether a fault is due in this step.
    fn due(&self, name: &str, step: u32) -> bool {
        if self.number(name) != Some(step.into()) {
            return false;
        }
        match self.0.get("once").map(Path::new) {
            Some(file) if file.exists() => false,
            Some(file) => std::fs::write(file, b"once").is_ok(),
            None => true,
        }
    }
}

/// Runs the test engine as the process's arguments say.
#[must_use]
pub fn main() -> ExitCode {
    let orders = Orders::of_arguments();
    let mut stdout = std::io::stdout();
    if orders.number("babble").is_some() {
        let _nobody_reads = stdout.write_all(b"usage: babble [OPTIONS]\n").and_then(|()| stdout.flush());
        return ExitCode::from(2);
    }
    if let Some(version) = orders.number("wire-version") {
        let mut greeting = *b"kfwk\0\0\0\0";
        greeting[4..].copy_from_slice(&(version as u32).to_le_bytes());
        let _nobody_reads = stdout.write_all(&greeting).and_then(|()| stdout.flush());
        let _until_its_end = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        return ExitCode::from(3);
    }
    worker::serve(TestEngine { orders, loaded: None })
}

struct TestEngine {
    orders: Orders,
    loaded: Option<LoadRequest>,
}

impl Engine for TestEngine {
    fn open(&mut self, request: &OpenRequest) -> Result<WorkerInfo, Failure> {
        if self.orders.number("refuse-device").is_some() {
            return Err(Failure::new("device", "device \"cuda:7\" cannot be opened: there is none", true));
        }
        Ok(WorkerInfo {
            engine: Name::truncated("test-engine"),
            version: Name::truncated(env!("CARGO_PKG_VERSION")),
            device: request.device.clone(),
            device_name: Name::truncated("no device"),
            threads: request.threads,
            pid: std::process::id(),
        })
    }

    fn load(&mut self, request: &LoadRequest) -> Result<LoadedModel, Failure> {
        let cached = self.loaded.as_ref() == Some(request);
        if !cached {
            pause(self.orders.number("load-ms"));
        }
        self.loaded = Some(request.clone());
        Ok(LoadedModel { architecture: "test".to_owned(), dtype: "f32".to_owned(), cached })
    }

    fn run(&mut self, request: &RunRequest, context: &mut Context<'_>) -> Result<Made, Stop> {
        let key = key_of(request);
        context.phase(Phase::Text);
        if self.orders.number("stray").is_some() {
            stray(request);
        }
        context.phase(Phase::Step);
        let mut state = self.begin(request, key)?;
        let first = state.steps_done as u32;
        let cheats_at = self.orders.number("cheat-at").unwrap_or(u64::MAX);
        keep_state(context, 0, &step_latents(&key, 0).map_err(|error| fault(&error))?);
        keep_state(context, first, &state.latents);
        for step in first + 1..=request.steps {
            if context.cancelled() {
                return Err(Stop::Cancelled);
            }
            self.misbehave(request, context, step)?;
            pause(self.orders.number("step-ms"));
            let hash = advance(&mut state, step, u64::from(step) >= cheats_at)?;
            keep_state(context, step, &state.latents);
            context.step(step, request.steps);
            if request.preview_every > 0 && step % request.preview_every == 0 {
                context.preview(&draw(&key, 8, 8, 2, false));
            }
            let due = request.checkpoint_every > 0 && step % request.checkpoint_every == 0;
            if due && step < request.steps {
                context.checkpoint(&state.to_bytes().map_err(|error| fault(&error))?, hash);
            }
        }
        context.phase(Phase::Decode);
        pause(self.orders.number("decode-ms"));
        let constant = self.orders.number("constant").is_some();
        let mut frames =
            draw(&key, request.width as usize, request.height as usize, request.frames as usize, constant);
        if self.orders.number("noise").is_some() {
            blake3::Hasher::new_keyed(&key).finalize_xof().fill(&mut frames.data);
        }
        context.frames(frames)?;
        let latents = latents(&key, request.frames as usize);
        let latents_shape = vec![1, 4, request.frames as usize, 2, 2];
        let start = latents_bytes(&step_latents(&key, 0).map_err(|error| fault(&error))?);
        let start = *blake3::hash(&start.map_err(|error| fault(&error))?).as_bytes();
        let state_hashes = [&[start], state.step_hashes.as_slice()].concat();
        let samplers = (0..=request.steps).map(sampler);
        let commitment = Commitment { conditioning: key, samplers: samplers.collect() };
        let steps_done = request.steps - first;
        let kept = BTreeMap::new();
        Ok(Made { latents, latents_shape, kept, state_hashes, commitment, steps_done })
    }

    fn audit(&mut self, audit: &AuditRun, context: &mut Context<'_>) -> Result<AuditReport, Failure> {
        context.phase(Phase::Step);
        pause(self.orders.number("step-ms"));
        let (run, states, step) = (&audit.run, &audit.states, audit.step);
        let key = key_of(run);
        let hash_of = |latents: Tensor| latents_bytes(&latents).map(|bytes| BlobId::of(&bytes));
        let hash = |path: &WirePath| {
            let file = std::fs::read(path.as_str()).map_err(|error| fault(&error))?;
            let file = safetensors::SafeTensors::deserialize(&file).map_err(|error| fault(&error))?;
            let latents = file.tensor("latents").map_err(|error| fault(&error))?;
            Ok::<_, Failure>(BlobId::of(latents.data()))
        };
        let expected = |step: u32| step_latents(&key, step).and_then(hash_of).map_err(|error| fault(&error));
        let latents = [hash(&states.start)?, hash(&states.before)?, hash(&states.after)?, hash(&states.end)?];
        let off = |right: bool| if right { 0.0 } else { f64::INFINITY };
        let (width, height, frames) = (run.width as usize, run.height as usize, run.frames as usize);
        let clip = std::fs::read(audit.clip.as_str()).map_err(|error| fault(&error))?;
        let clip = decode_mp4_bytes(&clip).map_err(|error| fault(&error))?;
        Ok(AuditReport {
            job: run.job,
            starts_well: latents[0] == expected(0)?,
            deviation: off(latents[2] == expected(step + 1)?),
            latents,
            samplers: [0, step, step + 1, run.steps].map(|step| Hash(sampler(step))),
            conditioning: Hash(key),
            frames: frames_deviation(&draw(&key, width, height, frames, false), &clip),
            dtype: Name::truncated("f32"),
        })
    }

    fn reset(&mut self) {
        self.loaded = None;
    }
}

impl TestEngine {
    /// Where the job begins, or where its checkpoint left it.
    fn begin(&self, request: &RunRequest, key: [u8; 32]) -> Result<Checkpoint, Failure> {
        let mut state = Checkpoint {
            steps_done: 0,
            sigmas: (0..=request.steps).map(|step| 1.0 - step as f32 / request.steps as f32).collect(),
            memory: BTreeMap::new(),
            kept: BTreeMap::new(),
            latents: step_latents(&key, 0).map_err(|error| fault(&error))?,
            request_digest: key,
            step_hashes: Vec::new(),
            history: Vec::new(),
        };
        if let Some(path) = &request.extra.resume {
            let bytes = std::fs::read(path.as_str()).map_err(|error| fault(&error))?;
            let left = Checkpoint::from_bytes(&bytes).map_err(|error| fault(&error))?;
            if left.request_digest != key || left.sigmas != state.sigmas {
                return Err(fault(&"it belongs to another job"));
            }
            state = left;
        }
        Ok(state)
    }

    fn misbehave(&self, request: &RunRequest, context: &Context<'_>, step: u32) -> Result<(), Stop> {
        let due = |name: &str| self.orders.due(name, step);
        if due("crash-at") {
            std::process::abort();
        }
        if due("exit-at") {
            std::process::exit(9);
        }
        if due("oom-at") {
            std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u8; 1 << 40]>());
        }
        if due("kill-at") {
            // Nothing is left to do if the system refuses.
            let _dead =
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        assert!(!due("panic-at"), "told to panic at the prompt {:?}", request.prompt.as_str());
        if due("fail-at") {
            return Err(Failure::new("test_failure", "told to fail", true).into());
        }
        if due("wedge-at") {
            loop {
                std::thread::park();
            }
        }
        if due("hold-at") {
            let file = self.orders.0.get("hold-file").map(Path::new);
            while file.is_some_and(|file| !file.exists()) {
                if context.cancelled() {
                    return Err(Stop::Cancelled);
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }
}

fn key_of(request: &RunRequest) -> [u8; 32] {
    let mut key = blake3::Hasher::new();
    key.update(&request.seed.to_le_bytes()).update(request.prompt.as_bytes());
    *key.finalize().as_bytes()
}

fn sampler(step: u32) -> [u8; 32] {
    *blake3::hash(&step.to_le_bytes()).as_bytes()
}

fn keep_state(context: &mut Context<'_>, step: u32, latents: &Tensor) {
    if context.wants_states()
        && let Ok(values) = latents.flatten_all().and_then(|flat| flat.to_vec1::<f32>())
    {
        context.state(step as usize, latents.dims(), &values);
    }
}

/// One step further, or one of another seed; gives the hash of its latents.
fn advance(state: &mut Checkpoint, step: u32, cheats: bool) -> Result<[u8; 32], Failure> {
    let mut key = state.request_digest;
    key[0] ^= u8::from(cheats);
    state.latents = step_latents(&key, step).map_err(|error| fault(&error))?;
    let hash = *blake3::hash(&latents_bytes(&state.latents).map_err(|error| fault(&error))?).as_bytes();
    state.step_hashes.push(hash);
    state.steps_done = step as usize;
    Ok(hash)
}

fn step_latents(key: &[u8; 32], step: u32) -> Result<Tensor, kinoflock_inference::Error> {
    let hash = blake3::keyed_hash(key, &step.to_le_bytes());
    let values: Vec<f32> = hash.as_bytes().iter().map(|byte| f32::from(*byte) / 64.0 - 2.0).collect();
    Ok(Tensor::from_vec(values, (1, 4, 8), &Device::Cpu)?)
}

fn fault(error: &impl std::fmt::Display) -> Failure {
    Failure::new("checkpoint", &error.to_string(), false)
}

/// A square of one colour drifting over another, both from the key.
fn draw(key: &[u8; 32], width: usize, height: usize, count: usize, constant: bool) -> RgbFrames {
    let (ground, square) = ([key[0], key[1], key[2]], [key[3], key[4], !key[0]]);
    let side = (height / 3).max(1);
    let mut data = Vec::with_capacity(width * height * count * 3);
    for frame in 0..count {
        let left = usize::from(key[5]) % width + frame;
        for y in 0..height {
            for x in 0..width {
                let inside = (x + width - left % width) % width < side && y / side == 1;
                data.extend(if inside && !constant { square } else { ground });
            }
        }
    }
    RgbFrames { width, height, count, data }
}

fn latents(key: &[u8; 32], frames: usize) -> Vec<f32> {
    let mut bytes = vec![0; frames * LATENTS];
    blake3::Hasher::new_keyed(key).finalize_xof().fill(&mut bytes);
    bytes.into_iter().map(|byte| f32::from(byte) / 64.0 - 2.0).collect()
}

#[expect(clippy::print_stdout, reason = "a stray print is what it is for")]
fn stray(request: &RunRequest) {
    println!("a stray line on stdout");
    println!("prompt: {}", request.prompt.as_str());
    let _as_a_library_would =
        std::io::stdout().write_all(&[0xff; 300]).and_then(|()| std::io::stdout().flush());
}

fn pause(millis: Option<u64>) {
    if let Some(millis) = millis {
        std::thread::sleep(Duration::from_millis(millis));
    }
}
