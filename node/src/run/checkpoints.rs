//! Checkpoints of running jobs: kept for this node's own next try, and, where the job asks for them, signed and sealed
//! for another's.
//!
//! A job's folder holds the worker's newest states as they are (`step-8.safetensors`), which this node goes on from after
//! it or its worker died. Where the job asks for checkpoints, each state is sealed with the job's key into the clip
//! store, where whoever learns of it may fetch it, and the signed statement lies beside the state (`step-8.checkpoint`).
//!
//! A node that goes on where another stopped fetches the statement and the sealed state from the submitter, checks that
//! they belong together and to the job, and writes into the state who did the steps so far: the worker carries that from
//! checkpoint to checkpoint, and it becomes the segments of the receipt.

use std::path::{Path, PathBuf};

use kinoflock_inference::Checkpoint as State;
use kinoflock_inference::sampler::checkpoint::{MAX_HISTORY, latents_bytes};
use kinoflock_net::sealed;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::codec::{self, List};
use kinoflock_protocol::envelope::Envelope;
use kinoflock_protocol::id::{BlobId, JobId, NetworkId, NodeId};
use kinoflock_protocol::job::{JobSpec, OpValue, ValidJob};
use kinoflock_protocol::limits::MAX_SEGMENTS;
use kinoflock_protocol::order::{Order, Resume};
use kinoflock_protocol::progress::{Checkpoint, JobEvent};
use kinoflock_protocol::receipt::Segment;
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::seal::{SealKey, seal_bytes};
use kinoflock_protocol::work::WorkModel;

use super::refuse::unsupported;
use super::{Daemon, Note, unix_now};
use crate::clips::{Clips, Owner};
use crate::engine::wire::{Failure, FileReport, WirePath, checkpoint_name};
use crate::queue::{JobRecord, Queue};

/// Sealed checkpoints of a job that are kept; an older one may still be on its way to somebody.
const KEPT: usize = 2;
/// Name of the folder of checkpoints in a job's folder.
const FOLDER: &str = "checkpoints";
/// Name in that folder of the list of who did the steps before this node.
const SEGMENTS: &str = "segments";

/// Who did which steps.
pub(super) type Segments = List<Segment, MAX_SEGMENTS>;

/// What the daemon remembers of a live job's checkpoints.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Where another node left the job.
    pub(super) resume: Option<Resume>,
    /// Who did the steps before this node.
    pub(super) segments: Segments,
    /// Steps that were done before the present run.
    pub(super) began_at: u32,
    /// Sealed states in the clip store, oldest first.
    sealed: Vec<(u32, BlobId)>,
}

impl Kept {
    /// What is known when a job is ordered.
    pub(super) fn of(order: &Order) -> Self {
        Self { resume: order.resume.clone(), ..Self::default() }
    }
}

/// A checkpoint that can be fetched.
#[derive(Debug)]
pub(super) struct Made {
    step: u32,
    sealed: BlobId,
    statement: Envelope,
}

/// Steps in all that a job goes: those of its own timesteps where it names them.
pub(super) fn total_steps(spec: &JobSpec) -> u32 {
    let named = spec.ops.iter().find_map(|op| match &op.value {
        OpValue::Numbers(numbers) if op.name.as_str() == "timesteps" => Some(numbers.len() as u32),
        _ => None,
    });
    named.unwrap_or(spec.steps)
}

/// Refuses an order to go on from where there is nothing left to do, and what takes a job's step for a place in its run
/// where it is none.
pub(super) fn check_states(order: &Order, spec: &JobSpec, work: &WorkModel) -> Result<(), Box<Refusal>> {
    match order.resume.as_ref() {
        Some(_) if !work.counts_by_steps() => {
            Err(unsupported("resume", "this model works in stages: let the job begin anew"))
        }
        None if spec.returns.step_root && !work.counts_by_steps() => {
            Err(unsupported("step_root", "this model works in stages, which cannot be audited yet"))
        }
        Some(resume) if resume.step == 0 || resume.step >= total_steps(spec) => {
            let refusal =
                Refusal::new(Reason::Invalid, "resume.step").limit(total_steps(spec) - 1, resume.step);
            Err(Box::new(refusal.advice("name a checkpoint between the first step and the last")))
        }
        _ => Ok(()),
    }
}

impl Daemon {
    /// The folder of a job's checkpoints.
    pub(super) fn checkpoints_folder(&self, job: &JobId) -> PathBuf {
        self.work_folder(job).join(FOLDER)
    }

    /// After so many steps a worker leaves a checkpoint: as the job asks, else as this node is configured.
    pub(super) fn checkpoint_every(&self, spec: &JobSpec) -> u32 {
        let every = match spec.returns.checkpoint_every {
            0 => self.config.engine.checkpoint_every.unwrap_or(0),
            asked => asked,
        };
        let passes = self.models.get(&spec.model).map_or(1, |model| model.manifest.work.passes(spec.frames));
        every.saturating_mul(passes)
    }

    /// Seals and signs a state that the worker wrote, away from the daemon's loop, if the job asks for checkpoints.
    pub(super) fn checkpoint(&mut self, job: JobId, step: u32, file: FileReport, latents: BlobId) {
        let Some(live) = self.live.get(&job) else { return };
        let spec = live.job.spec();
        // Another node could not say how far such a job is.
        let told = self.models.get(&spec.model).is_some_and(|model| model.manifest.work.counts_by_steps());
        if spec.returns.checkpoint_every == 0 || !told {
            return;
        }
        let owner = Owner { job, requester: live.job.requester(), class: live.origin.class.into() };
        let statement = Checkpoint {
            job,
            model: spec.model,
            step,
            total: total_steps(spec),
            state: BlobRef { id: file.blake3, len: file.len },
            latents,
            made_at: unix_now(),
        };
        let (queue, clips) = (self.queue.clone(), self.clips.clone());
        let (keypair, network) = (self.identity.keypair().clone(), self.network);
        self.spawn(async move {
            let sealing = tokio::task::spawn_blocking(move || {
                let sealed = seal(&queue, &clips, owner, &file)?;
                let statement = Checkpoint { state: sealed, ..statement };
                let signed =
                    Envelope::seal(&keypair, &network, &statement).map_err(|error| error.to_string());
                let written = signed.and_then(|signed| {
                    let beside = Path::new(file.path.as_str()).with_extension("checkpoint");
                    write(&beside, &signed.encode()).map_err(|error| error.to_string())?;
                    Ok(Made { step, sealed: sealed.id, statement: signed })
                });
                written.inspect_err(|_| release(&clips, &job, &sealed.id))
            });
            let result = sealing.await.unwrap_or_else(|error| Err(error.to_string()));
            Note::Checkpoint { job, result }
        });
    }

    /// A checkpoint can be fetched: the oldest makes room for it, and followers of the job learn of it.
    pub(super) fn handle_checkpoint(&mut self, job: JobId, result: Result<Made, String>) {
        let made = match result {
            Ok(made) => made,
            // Where steps are quick, the worker has replaced it by then.
            Err(error) => return tracing::info!(job = %job.short(), error, "a checkpoint was not made"),
        };
        // The job may be over by now, or a later checkpoint have overtaken this one.
        let kept = self.live.get_mut(&job).map(|live| &mut live.checkpoints.sealed);
        let mut old = Vec::new();
        match kept {
            Some(kept) if kept.last().is_none_or(|(step, _)| *step <= made.step) => {
                kept.retain(|(step, _)| *step != made.step);
                kept.push((made.step, made.sealed));
                let over = kept.len().saturating_sub(KEPT);
                old.extend(kept.drain(..over).map(|(_, blob)| blob).filter(|blob| *blob != made.sealed));
                self.boards.tell(&job, JobEvent::Checkpoint { checkpoint: made.statement });
            }
            _ => old.push(made.sealed),
        }
        self.release(job, old);
    }

    /// Nobody needs the checkpoints of a job any more that is done or cancelled; those of a failed one may go on
    /// elsewhere and stay as the terms say.
    pub(super) fn release_checkpoints(&self, job: &JobId, kept: &Kept) {
        self.release(*job, kept.sealed.iter().map(|(_, blob)| *blob).collect());
    }

    fn release(&self, job: JobId, blobs: Vec<BlobId>) {
        if blobs.is_empty() {
            return;
        }
        let clips = self.clips.clone();
        tokio::task::spawn_blocking(move || {
            for blob in blobs {
                release(&clips, &job, &blob);
            }
        });
    }

    /// What is on disk of a job that was found in the queue.
    pub(super) fn restore_checkpoints(&self, record: &JobRecord) -> Kept {
        let folder = self.checkpoints_folder(&record.id);
        let order = record.order.open::<Order>(&self.network).ok();
        let mut kept = order.map(|order| Kept::of(&order.value)).unwrap_or_default();
        if let Ok(bytes) = std::fs::read(folder.join(SEGMENTS)) {
            kept.segments = codec::decode(&bytes, MAX_HISTORY).unwrap_or_default();
        }
        for (step, path) in steps_in(&folder, "checkpoint") {
            let statement = std::fs::read(&path).ok().and_then(|bytes| Envelope::decode(&bytes).ok());
            let Some(statement) = statement else { continue };
            let Ok(opened) = statement.open::<Checkpoint>(&self.network) else { continue };
            if opened.value.job == record.id && self.clips.contains(&opened.value.state.id) {
                kept.sealed.push((step, opened.value.state.id));
                self.boards.tell(&record.id, JobEvent::Checkpoint { checkpoint: statement });
            }
        }
        kept
    }

    /// The newest state that a job can go on from, and after how many steps it was left.
    pub(super) fn newest_state(&self, job: &JobId) -> Option<(u32, WirePath)> {
        let (step, path) = steps_in(&self.checkpoints_folder(job), "safetensors").pop()?;
        Some((step, super::jobs::wire_path(&path).ok()?))
    }

    /// A worker could not go on from a state of this node's own: it is thrown away, and the failure is one that another
    /// try may mend. Gives whether there was such a state.
    pub(super) fn discard_states(&self, job: &JobId, failure: &Failure) -> bool {
        let folder = self.checkpoints_folder(job);
        let states = steps_in(&folder, "safetensors");
        let received =
            self.live.get(job).and_then(|live| live.checkpoints.resume.as_ref()).map(|resume| resume.step);
        let own: Vec<_> = states.into_iter().filter(|(step, _)| Some(*step) != received).collect();
        if failure.code.as_str() != "checkpoint" || own.is_empty() {
            return false;
        }
        for (_, path) in own {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(job = %job.short(), %error, "a checkpoint of no use could not be removed");
            }
        }
        true
    }
}

fn release(clips: &Clips, job: &JobId, blob: &BlobId) {
    if let Err(error) = clips.release(blob, job) {
        tracing::debug!(job = %job.short(), %error, "an old checkpoint is not here any more");
    }
}

/// Seals the worker's file into the clip store.
fn seal(queue: &Queue, clips: &Clips, owner: Owner, file: &FileReport) -> Result<BlobRef, String> {
    let record = queue.find(&owner.job).map_err(|error| error.to_string())?;
    let record = record.ok_or("the job is not here any more")?;
    let state = std::fs::read(file.path.as_str()).map_err(|error| error.to_string())?;
    // A worker that was started anew may have replaced it: what is sealed must be what its nonces come from.
    if BlobId::of(&state) != file.blake3 {
        return Err("the state was replaced by a later one".to_owned());
    }
    let sealed = seal_bytes(&SealKey::of_job(&record.job), &state);
    clips.put(&sealed, owner, unix_now()).map_err(|error| error.to_string())
}

/// A checkpoint from another node, and where its files go.
pub(super) struct Received {
    /// This network.
    pub(super) network: NetworkId,
    /// The job.
    pub(super) job: ValidJob,
    /// What the order says of it.
    pub(super) resume: Resume,
    /// The folder of the job's checkpoints.
    pub(super) folder: PathBuf,
}

/// Who made a checkpoint, and what it says.
pub(super) struct Stated {
    maker: NodeId,
    checkpoint: Checkpoint,
}

impl Stated {
    /// The sealed state.
    pub(super) fn state(&self) -> BlobRef {
        self.checkpoint.state
    }
}

impl Received {
    /// Checks the maker's signed statement against the job and the order.
    pub(super) fn check(&self, statement: &[u8]) -> Result<Stated, String> {
        let envelope = Envelope::decode(statement).map_err(|error| format!("the checkpoint: {error}"))?;
        let opened = envelope.open::<Checkpoint>(&self.network).map_err(|error| error.to_string())?;
        let checkpoint = opened.value;
        let spec = self.job.spec();
        let wrong = |what: &str| Err(format!("the checkpoint is of another {what} than the order"));
        if checkpoint.job != self.job.id() {
            return wrong("job");
        }
        if checkpoint.model != spec.model {
            return wrong("model");
        }
        if checkpoint.step != self.resume.step {
            return wrong("step");
        }
        if checkpoint.total != total_steps(spec) {
            return wrong("number of steps");
        }
        Ok(Stated { maker: opened.signer.into(), checkpoint })
    }

    /// Where the sealed state goes.
    pub(super) fn sealed_path(&self) -> PathBuf {
        self.folder.join("received.sealed")
    }

    /// Opens the sealed state, checks it against its statement, and makes it the one that the job goes on from. Gives
    /// who did the steps so far.
    pub(super) fn accept(&self, key: &SealKey, stated: &Stated) -> Result<Segments, String> {
        let opened = self.folder.join("received.opened");
        let sealed = self.sealed_path();
        let accepted = self.read(key, stated, &sealed, &opened);
        for file in [&sealed, &opened] {
            // What is left of it is removed with the job's folder.
            let _ = std::fs::remove_file(file);
        }
        accepted
    }

    fn read(&self, key: &SealKey, stated: &Stated, sealed: &Path, opened: &Path) -> Result<Segments, String> {
        let text = |error: std::io::Error| format!("the checkpoint's state: {error}");
        sealed::open_unnamed(key, sealed, opened).map_err(text)?;
        let bytes = std::fs::read(opened).map_err(text)?;
        let mut state = State::from_bytes(&bytes).map_err(|error| error.to_string())?;
        let latents = latents_bytes(&state.latents).map_err(|error| error.to_string())?;
        let (hash, checkpoint) = (BlobId::of(&latents), &stated.checkpoint);
        let last = state.step_hashes.last().map(|hash| BlobId::from_bytes(*hash));
        if hash != checkpoint.latents || last != Some(hash) || state.steps_done != checkpoint.step as usize {
            return Err("the checkpoint's state holds other latents than its maker signed".to_owned());
        }
        let segments = self.history(&state.history, stated)?;
        state.history = codec::encode(&segments);
        let bytes = state.to_bytes().map_err(|error| error.to_string())?;
        write(&self.folder.join(SEGMENTS), &state.history).map_err(text)?;
        write(&self.folder.join(checkpoint_name(checkpoint.step)), &bytes).map_err(text)?;
        Ok(segments)
    }

    /// The segments that the maker told of, and its own.
    fn history(&self, told: &[u8], stated: &Stated) -> Result<Segments, String> {
        let mut segments = match told {
            [] => Vec::new(),
            told => {
                codec::decode::<Segments>(told, MAX_HISTORY).map_err(|error| error.to_string())?.into_vec()
            }
        };
        let mut next = 0;
        for segment in &segments {
            if segment.first_step != next || segment.steps == 0 {
                return Err("the checkpoint tells of segments with gaps".to_owned());
            }
            next = next.saturating_add(segment.steps);
        }
        let step = stated.checkpoint.step;
        if next >= step || segments.len() + 2 > MAX_SEGMENTS {
            return Err(format!("the checkpoint tells of {} segments before step {step}", segments.len()));
        }
        segments.push(Segment {
            node: stated.maker,
            first_step: next,
            steps: step - next,
            checkpoint: Some(self.resume.checkpoint.id),
        });
        List::new(segments).map_err(|error| error.to_string())
    }
}

/// The segments of a finished job: those before, and this node's; none where one node did it all.
pub(super) fn all_segments(before: &Segments, here: NodeId, total: u32) -> Segments {
    let Some(last) = before.last() else { return List::default() };
    let first_step = last.first_step + last.steps;
    let own = Segment { node: here, first_step, steps: total.saturating_sub(first_step), checkpoint: None };
    List::first_of(before.iter().cloned().chain([own]))
}

/// The files `step-N` of this kind in a folder, by rising `N`.
fn steps_in(folder: &Path, extension: &str) -> Vec<(u32, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|given| given == extension))
        .filter_map(|path| {
            let step = path.file_stem()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, path))
        })
        .collect();
    found.sort();
    found
}

/// Writes a small file whole, or not at all.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let part = path.with_added_extension("part");
    let mut file = std::fs::File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&part, path)
}
