//! Fuzz target `clip_ticket`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("clip_ticket", data));
