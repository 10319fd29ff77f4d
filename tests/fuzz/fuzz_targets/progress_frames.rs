//! Fuzz target `progress_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinoflock_fuzz::targets::run("progress_frames", data));
