//! Is what came what was asked for? The receipt against the job, the clip's bytes against the receipt, the container
//! against the job.
//!
//! No codec is linked here: of the video stream the client checks what the container says (frames, size, times), that
//! every frame's units lie within the file and fit their lengths, and that the first is one from which a decoder can
//! start.

use kinoflock_protocol::job::JobKind;
use kinoflock_protocol::receipt::{ReceiptError, ValidReceipt};
use kinoflock_protocol::{ClipId, Envelope, Micro, NetworkId, NodeId, ValidJob};
use re_mp4::{Mp4, StsdBoxContent, Track, TrackKind};

use crate::mp4;

/// Greatest clip that is read into memory, in bytes (1 GiB).
pub const MAX_CLIP_BYTES: u64 = 1 << 30;
/// How far the frame rate of a clip may be from the asked one, in millionths of it: times are whole ticks.
const FPS_TOLERANCE: i128 = 10_000;
/// H.264 unit of a picture that needs no other (ISO/IEC 14496-10, table 7-1).
const NAL_IDR: u8 = 5;

/// Why what came is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The receipt is refused.
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    /// The receipt is for something else.
    #[error("the receipt says {what} {given}, the job says {expected}")]
    Mismatch {
        /// Which field.
        what: &'static str,
        /// What the job says.
        expected: String,
        /// What the receipt says.
        given: String,
    },
    /// The clip's bytes changed.
    #[error("the clip's bytes are not the ones signed: their hash is {given}, the receipt says {expected}")]
    WrongBytes {
        /// What the receipt says.
        expected: ClipId,
        /// What the bytes are.
        given: ClipId,
    },
    /// A clip beyond what is read.
    #[error("clip of {given} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Greatest length in bytes.
        limit: u64,
        /// Length given in bytes.
        given: u64,
    },
    /// No MP4 with H.264 video, or a damaged one.
    #[error("not a playable clip: {reason}")]
    Container {
        /// What is wrong.
        reason: String,
    },
    /// A clip of another kind than was asked for.
    #[error("the clip has {what} {given}, the job asked for {expected}")]
    NotAsAsked {
        /// Which property.
        what: &'static str,
        /// What was asked for.
        expected: String,
        /// What came.
        given: String,
    },
}

impl VerifyError {
    /// Stable name for `--json` and for the dispute that the node is told.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Receipt(error) => error.code(),
            Self::Mismatch { .. } => "receipt_mismatch",
            Self::WrongBytes { .. } => "wrong_bytes",
            Self::TooLarge { .. } => "clip_too_large",
            Self::Container { .. } => "container",
            Self::NotAsAsked { .. } => "not_as_asked",
        }
    }
}

/// Checks a receipt's signature, and that it is for this job by this node.
///
/// # Errors
/// `Receipt`, `Mismatch`, `TooLarge`.
pub fn receipt(
    envelope: &Envelope,
    network: &NetworkId,
    job: &ValidJob,
    node: &NodeId,
) -> Result<ValidReceipt, VerifyError> {
    let valid = ValidReceipt::parse(envelope, network)?;
    let (receipt, spec) = (valid.receipt(), job.spec());
    same("job", &job.id(), &receipt.job)?;
    same("requester", &job.requester(), &receipt.requester)?;
    same("node", node, &receipt.node)?;
    same("model", &spec.model, &receipt.model)?;
    same("seed", &spec.seed, &receipt.seed)?;
    same("steps", &spec.steps, &receipt.steps)?;
    same("number of adapters", &spec.adapters.len(), &receipt.adapters.len())?;
    for (asked, used) in spec.adapters.iter().zip(receipt.adapters.iter()) {
        same("adapter", &asked.weights.id, &used.weights)?;
        same("adapter scale", &asked.scale, &used.scale)?;
        if let Some(card) = asked.card.filter(|card| !receipt.cards.contains(card)) {
            let (what, given) = ("adapter card", "no such card".to_owned());
            return Err(VerifyError::Mismatch { what, expected: card.to_string(), given });
        }
    }
    same("number of parents", &spec.parents.len(), &receipt.parents.len())?;
    for (asked, used) in spec.parents.iter().zip(receipt.parents.iter()) {
        same("parent", asked, used)?;
    }
    if receipt.clip_len > MAX_CLIP_BYTES {
        return Err(VerifyError::TooLarge { limit: MAX_CLIP_BYTES, given: receipt.clip_len });
    }
    Ok(valid)
}

/// Checks that these bytes are the receipt's clip and that it is what the job asked for.
///
/// # Errors
/// `WrongBytes`, `Container`, `NotAsAsked`.
pub fn clip(bytes: &[u8], expected: &ClipId, job: &ValidJob) -> Result<ClipInfo, VerifyError> {
    let given = ClipId::of(bytes);
    if given != *expected {
        return Err(VerifyError::WrongBytes { expected: *expected, given });
    }
    let info = clip_info(bytes)?;
    let spec = job.spec();
    if matches!(spec.kind, JobKind::Generate) {
        asked("frames", &spec.frames, &info.frames)?;
        let size = |w: u32, h: u32| format!("{w}x{h}");
        asked("size", &size(spec.width, spec.height), &size(info.width, info.height))?;
        if let Some(fps) = info.fps.filter(|fps| !is_near(spec.fps, *fps)) {
            asked("frames per second", &spec.fps, &fps)?;
        }
    }
    Ok(info)
}

/// What a clip file says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipInfo {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Number of frames.
    pub frames: u32,
    /// Frames a second; none for a clip of one frame.
    pub fps: Option<Micro>,
}

/// Reads what a clip says of itself and checks its structure.
///
/// # Errors
/// `TooLarge`, `Container`.
pub fn clip_info(bytes: &[u8]) -> Result<ClipInfo, VerifyError> {
    if bytes.len() as u64 > MAX_CLIP_BYTES {
        return Err(VerifyError::TooLarge { limit: MAX_CLIP_BYTES, given: bytes.len() as u64 });
    }
    let mp4 = parse(bytes)?;
    let is_video = |track: &&Track| matches!(track.kind, Some(TrackKind::Video));
    let track = mp4.tracks().values().find(is_video).ok_or_else(|| damaged("it has no video track"))?;
    let frames = u32::try_from(track.samples.len()).map_err(|_| damaged("it has too many frames"))?;
    if frames == 0 || track.width == 0 || track.height == 0 {
        return Err(damaged("its video track is empty"));
    }
    let StsdBoxContent::Avc1(avc1) = &track.trak(&mp4).mdia.minf.stbl.stsd.contents else {
        return Err(damaged("its video is not H.264"));
    };
    let config = &avc1.avcc;
    if config.sequence_parameter_sets.is_empty() || config.picture_parameter_sets.is_empty() {
        return Err(damaged("its video has no parameter sets"));
    }
    check_samples(bytes, track, usize::from(config.length_size_minus_one & 3) + 1)?;
    Ok(ClipInfo { width: track.width.into(), height: track.height.into(), frames, fps: fps(track) })
}

fn parse(bytes: &[u8]) -> Result<Mp4, VerifyError> {
    let container = |reason| VerifyError::Container { reason };
    mp4::check_tables(bytes).map_err(container)?;
    let bytes = mp4::without_metadata(bytes).map_err(container)?;
    // The parser indexes its tables by numbers from the file; a damaged one must not take the process along, nor
    // print a trace at an artist.
    let hook = quiet::Hush::new();
    let parsed = std::panic::catch_unwind(|| Mp4::read_bytes(&bytes));
    drop(hook);
    parsed
        .map_err(|_| damaged("its tables contradict each other"))?
        .map_err(|error| VerifyError::Container { reason: error.to_string() })
}

/// Silences the panic message of this thread while the parser of others runs.
mod quiet {
    use std::cell::Cell;
    use std::sync::Once;

    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();

    pub(super) struct Hush;

    impl Hush {
        pub(super) fn new() -> Self {
            HOOK.call_once(|| {
                let usual = std::panic::take_hook();
                std::panic::set_hook(Box::new(move |info| {
                    if !QUIET.get() {
                        usual(info);
                    }
                }));
            });
            QUIET.set(true);
            Self
        }
    }

    impl Drop for Hush {
        fn drop(&mut self) {
            QUIET.set(false);
        }
    }
}

fn check_samples(bytes: &[u8], track: &Track, prefix: usize) -> Result<(), VerifyError> {
    for (index, sample) in track.samples.iter().enumerate() {
        let fault = |reason: &str| damaged(&format!("frame {index} {reason}"));
        let start = usize::try_from(sample.offset).ok();
        let end = sample.offset.checked_add(sample.size).and_then(|end| usize::try_from(end).ok());
        let mut rest = start
            .zip(end)
            .and_then(|(start, end)| bytes.get(start..end))
            .ok_or_else(|| fault("lies outside the file"))?;
        let mut can_start = false;
        while !rest.is_empty() {
            let (head, tail) = rest.split_at_checked(prefix).ok_or_else(|| fault("is cut"))?;
            let len = head.iter().fold(0usize, |len, byte| len << 8 | usize::from(*byte));
            let (unit, tail) = tail.split_at_checked(len).ok_or_else(|| fault("is cut"))?;
            can_start |= unit.first().is_some_and(|byte| byte & 0x1f == NAL_IDR);
            rest = tail;
        }
        if index == 0 && !can_start {
            return Err(fault("is none from which a player can start"));
        }
    }
    Ok(())
}

/// Frames a second over the whole clip, from the time of its last frame.
fn fps(track: &Track) -> Option<Micro> {
    let times = || track.samples.iter().map(|sample| i128::from(sample.composition_timestamp));
    let span = times().max()? - times().min()?;
    let gaps = i128::try_from(track.samples.len()).ok()? - 1;
    if gaps < 1 || span <= 0 {
        return None;
    }
    let micro = (gaps * i128::from(track.timescale) * 1_000_000 + span / 2) / span;
    i64::try_from(micro).ok().map(Micro)
}

fn is_near(asked: Micro, given: Micro) -> bool {
    let (asked, given) = (i128::from(asked.0), i128::from(given.0));
    (asked - given).abs() * 1_000_000 <= asked * FPS_TOLERANCE
}

fn same<T: PartialEq + ToString>(what: &'static str, expected: &T, given: &T) -> Result<(), VerifyError> {
    if expected == given {
        return Ok(());
    }
    Err(VerifyError::Mismatch { what, expected: expected.to_string(), given: given.to_string() })
}

fn asked<T: PartialEq + ToString>(what: &'static str, expected: &T, given: &T) -> Result<(), VerifyError> {
    if expected == given {
        return Ok(());
    }
    Err(VerifyError::NotAsAsked { what, expected: expected.to_string(), given: given.to_string() })
}

fn damaged(reason: &str) -> VerifyError {
    VerifyError::Container { reason: reason.to_owned() }
}
