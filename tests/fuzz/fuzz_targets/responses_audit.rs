//! Fuzz target `responses_audit`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("responses_audit", data));
