//! Fuzz target `events`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("events", data));
