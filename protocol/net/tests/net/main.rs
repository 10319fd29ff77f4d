//! The network layer between real swarms on loopback. Every test of requests and streams is one body that
//! runs over TCP and over QUIC.
#![allow(clippy::unwrap_used)]

mod blobs;
mod discovery;
mod hostile;
mod lifecycle;
mod relay;
mod rpc;
mod slices;
mod streams;
mod support;
mod versions;
