//! Whole-system test support: real daemons and real clients, as processes, in folders of their own.
//!
//! - [`sandbox`]: N daemons on free loopback ports, clients beside them, logs shown where a test fails;
//! - [`bound`]: commands that file permissions bind, whoever runs the tests;
//! - [`clock`]: wrong clocks for real processes;
//! - [`dns`]: a name server that answers with the texts it is given;
//! - [`invariants`]: what must hold of every clip and every node, whatever a test is about;
//! - [`programs`]: what is under test, freshly built;
//! - [`raw`]: a peer without manners, that writes whatever a test wants onto any stream;
//! - [`requester`]: somebody who signs by hand, so that a test may bend each message;
//! - [`sim`]: many nodes and clients in virtual time;
//! - [`test_engine`]: the worker that fails on demand.

pub mod bound;
pub mod clock;
pub mod distance;
pub mod dns;
pub mod invariants;
pub mod programs;
pub mod raw;
pub mod requester;
pub mod rig;
pub mod sandbox;
pub mod sim;
pub mod test_engine;
