//! A worker that computes nothing: it speaks the worker's language like the real one and can be told to fail.
//! Started through `engine.worker`; see [`kinoflock_tests::test_engine`] for what it can be told.

use std::process::ExitCode;

fn main() -> ExitCode {
    kinoflock_tests::test_engine::main()
}
