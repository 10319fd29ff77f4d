//! Fuzz target `audit_grant`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("audit_grant", data));
