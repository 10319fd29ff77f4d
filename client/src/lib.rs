//! The artist's thin client: from a prompt to a verified clip, over the network.
//!
//! # The way of a job, on the artist's side
//!
//! [`ask::Ask`] is what the artist wants. [`session::Client::find`] reaches nodes by the [`ticket::Way`]s that lead to
//! them and reads their signed adverts; [`route`] ranks them. [`session::Client::submit`] asks the best few for quotes,
//! signs job and order, and returns once a node has the job durably; from then on the job's record is in the
//! [`store`]. [`session::Client::follow`] tells its [`session::Event`]s, takes a broken stream up again, and at the end
//! checks the receipt and the clip ([`verify`]), keeps both, and answers the receipt. [`provenance`] writes the receipt
//! into the file that the artist takes away, and reads it from a file alone.
//!
//! The library has no terminal, no codec and no model in it. Feature `cli` adds the command `kinoflock`.

pub mod ask;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod fetch;
pub mod keys;
#[cfg(feature = "cli")]
pub mod latents;
pub mod local;
#[cfg(feature = "cli")]
pub mod output;
pub mod provenance;
pub mod route;
pub mod session;
pub mod store;
pub mod ticket;
pub mod verify;

mod mp4;

use kinoflock_protocol::UnixMillis;

/// The time by this machine's clock.
#[must_use]
pub fn now() -> UnixMillis {
    UnixMillis::from_system_time(std::time::SystemTime::now())
}

/// A name for a clip's file that says what it shows as little as its id does: `kinoflock-1a2b3c4d.mp4`.
#[must_use]
pub fn file_name(clip: &kinoflock_protocol::ClipId) -> String {
    format!("kinoflock-{}.mp4", &clip.to_hex()[..8])
}
