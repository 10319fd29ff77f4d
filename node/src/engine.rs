//! The engine: one worker process per device, from a job's numbers to a clip on disk.
//!
//! ```text
//! daemon (tokio)                        worker process (no tokio)
//! EngineHandle --commands--> supervisor ==stdin==> watch thread --> compute thread
//! events <-------------------supervisor <==fd 1 duplicate========== (load, text, step, decode, encode)
//!                            files: clip, latents, checkpoint, never through the pipe
//! ```
//!
//! - [`supervisor`]: starts the worker, gives every phase a deadline, cancels, kills and restarts. One job at a time;
//!   whether a failed job is tried again is the scheduler's to decide.
//! - [`wire`]: what the two say to each other, and the version handshake.
//! - [`worker`]: what `kinoflockd worker` runs. A device fault, an out-of-memory or a wedged kernel ends this process
//!   and never the node.
//! - [`encode`], [`color`], [`mp4`], [`frames`]: frames to H.264 in MP4 and back, and to PNG.
//! - [`bench`]: measured speed in work units a second.
//!
//! # For the one who wires it to the scheduler
//!
//! [`supervisor::spawn`] answers an [`EngineHandle`] and a receiver of [`EngineEvent`]s. [`EngineHandle::run`] takes a
//! [`wire::RunRequest`] and does not wait; events follow in order and exactly one of `Done`, `Failed` and `Cancelled`
//! ends each job. The file that `Done` names is written and synced: hash and length are in [`wire::DoneReport`], move
//! it into the clip store. [`Failure::text`] may quote the artist's prompt: send it to the requester, log only
//! [`Failure::code`].

pub mod bench;
pub mod color;
pub mod deadline;
pub mod encode;
pub mod frames;
pub mod mp4;
mod stderr;
pub mod supervisor;
pub mod wire;
pub mod worker;

pub use self::deadline::Deadlines;
pub use self::supervisor::{EngineError, EngineEvent, EngineHandle, WorkerConfig, spawn};
pub use self::wire::Failure;
