//! The daemon as a library: what `kinoflockd` is made of, for its tests.

pub mod admin;
pub mod cli;
pub mod clips;
pub mod config;
pub mod disk;
pub mod engine;
pub mod holdings;
pub mod identity;
pub mod memory;
pub mod models;
pub mod policy;
pub mod queue;
pub mod run;
pub mod scheduler;
pub mod shutdown;
pub mod telemetry;
