//! The daemon as a library: what `kinoflockd` is made of, for its tests.

pub mod clips;
pub mod config;
pub mod disk;
pub mod identity;
pub mod policy;
pub mod queue;
pub mod scheduler;
