//! Fuzz target `audit_verdict`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("audit_verdict", data));
