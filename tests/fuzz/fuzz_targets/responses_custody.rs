//! Fuzz target `responses_custody`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("responses_custody", data));
